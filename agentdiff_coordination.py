"""The names of the library formerly published as `agentdiff_coordination`, on `agentdiff`: its programs run unchanged.

What is new, or better said, is in `agentdiff`; new programs import that.
"""

from __future__ import annotations

import logging
from typing import Any, Callable, Optional, TypeVar

from agentdiff import CoordinationError, CoordinationTimeoutError, configure, coordinate
from agentdiff import emit as _emit
from agentdiff import when as _when

__all__ = ["CoordinationError", "CoordinationTimeoutError", "configure_broker", "coordinate", "emit", "when"]

F = TypeVar("F", bound=Callable[..., Any])

_BACKENDS = ("inmemory", "none", "file", "redis")


def when(event_name: str, timeout: Optional[float] = None) -> Callable[[F], F]:
    """Have a function called with the data of each event of this name; `timeout` never had a meaning."""
    return _when(event_name)


def emit(event_name: str, data: Any = None, sender: Optional[str] = None) -> str:
    """Emit an event on the default coordinator.

    Returns:
        The event's id.
    """
    return _emit(event_name, data, sender=sender).event.id


def configure_broker(backend: str = "file", **config: Any) -> None:
    """Choose where events are kept; handlers that are registered stay registered.

    Args:
        backend: `inmemory` or `none`: nowhere. `file` and `redis` are accepted, and a warning says that this version
            keeps no events yet.
        config: what the backend took; not used as long as no events are kept.

    Raises:
        ValueError: an unknown backend.
    """
    if backend not in _BACKENDS:
        raise ValueError(f"unknown backend {backend!r}; known: {', '.join(_BACKENDS)}")
    if backend in {"file", "redis"}:
        logging.getLogger("agentdiff").warning("backend %r: this version of agentdiff keeps no events yet", backend)
    configure()
