"""The names of the library formerly published as `agentdiff_coordination`, on `agentdiff`: its programs run unchanged.

What is new, or better said, is in `agentdiff`; new programs import that.
"""

from __future__ import annotations

from typing import Any, Callable, Optional, TypeVar

from agentdiff import CoordinationError, CoordinationTimeoutError, configure, coordinate
from agentdiff import emit as _emit
from agentdiff import when as _when
from agentdiff.settings import from_environment, store_url

__all__ = ["CoordinationError", "CoordinationTimeoutError", "configure_broker", "coordinate", "emit", "when"]

F = TypeVar("F", bound=Callable[..., Any])

_BACKENDS = ("inmemory", "none", "file", "redis")
_OURS = {
    "dir": "data_dir",
    "data_dir": "data_dir",
    "url": "redis_url",
    "password": "redis_password",
    "db": "redis_db",
    "key_prefix": "redis_prefix",
}


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
        backend: `inmemory` or `none`: nowhere. `file`: in the SQLite file `events.db` of a folder. `redis`: in Redis.
        config: of `file`: `dir`; of `redis`: `url`, `password`, `db`, `key_prefix`. What is left out is as the
            environment says; what is more is not used.

    Raises:
        ValueError: an unknown backend.
        agentdiff.StoreError: the file can't be opened.
        ImportError: redis-py is not installed.
    """
    if backend not in _BACKENDS:
        raise ValueError(f"unknown backend {backend!r}; known: {', '.join(_BACKENDS)}")
    if backend in ("inmemory", "none"):
        configure(store=None)
        return
    known = {name: value for name, value in from_environment().items() if name in _OURS.values()}
    known.update((_OURS[name], value) for name, value in config.items() if name in _OURS and value is not None)
    configure(store=store_url(backend, **known))
