"""The names of the library formerly published as `agentdiff_coordination`, on `agentdiff`: its programs run unchanged.

What is new, or better said, is in `agentdiff`; new programs import that.
"""

from __future__ import annotations

from typing import Any, Optional

from agentdiff import CoordinationError, CoordinationTimeoutError, configure, coordinate, when
from agentdiff import emit as _emit

__all__ = ["CoordinationError", "CoordinationTimeoutError", "configure_broker", "coordinate", "emit", "when"]

_BACKENDS = ("inmemory", "none", "file", "redis")
_LATER = ("file", "redis")


def emit(event_name: str, data: Any = None, sender: Optional[str] = None) -> str:
    """Emit an event on the default coordinator.

    Returns:
        The event's id.
    """
    return _emit(event_name, data, sender=sender).event.id


def configure_broker(backend: str = "inmemory", **config: Any) -> None:
    """Choose where events are kept; handlers that are registered stay registered.

    Args:
        backend: `inmemory` or `none` keep them nowhere. `file` and `redis` need a store, which this version has not.

    Raises:
        ValueError: an unknown backend.
        NotImplementedError: a backend that this version can't serve.
    """
    if backend not in _BACKENDS:
        raise ValueError(f"unknown backend {backend!r}; known: {', '.join(_BACKENDS)}")
    if backend in _LATER:
        raise NotImplementedError(f"backend {backend!r} needs a store, and this version has none yet; use 'inmemory'")
    configure()
