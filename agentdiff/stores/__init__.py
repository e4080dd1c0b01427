"""Where events are written down (S1). A store is loaded when it is opened: `import agentdiff` needs none of them."""

from __future__ import annotations

from typing import Callable

from .base import Query, Record, Store, StoreError

__all__ = ["Query", "Record", "Store", "StoreError", "open_store"]


def open_store(url: str) -> Store:
    """Open a store by its URL, for reading or for `Coordinator(store=...)`.

    Args:
        url: `sqlite:///relative.db`, `sqlite:////absolute.db`, `redis://host:6379/0` (also `rediss://`, `unix://`), or
            `memory://`: the last events, in this process only.

    Raises:
        TypeError, ValueError: no URL of a store; the text says which there are.
        StoreError: it can't be opened.
        ImportError: what the store needs is not installed; the text says how to get it.
    """
    if not isinstance(url, str):
        raise TypeError(f"a store's URL must be a string, not {type(url).__name__}")
    scheme, colon, _ = url.partition("://")
    opener = _OPENERS.get(scheme.lower()) if colon else None
    if opener is None:
        known = ", ".join(f"{name}://" for name in _OPENERS)
        given = f"{scheme}://..." if colon else "without ://"  # the rest may hold a password
        raise ValueError(f"a store's URL begins with one of {known}; this one is {given}")
    return opener(url)


def _open_memory(url: str) -> Store:
    from .memory import MemoryStore

    if url[len("memory://") :]:
        raise ValueError(f"the memory store takes nothing after memory://, not {url!r}")
    return MemoryStore()


def _open_sqlite(url: str) -> Store:
    from .sqlite import SQLiteStore

    return SQLiteStore.from_url(url)


def _open_redis(url: str) -> Store:
    try:
        from .redis import RedisStore
    except ModuleNotFoundError as error:
        if error.name != "redis":
            raise
        raise ImportError('the Redis store needs redis-py: pip install "agentdiff-coordination[redis]"') from error
    return RedisStore(url)


_OPENERS: dict[str, Callable[[str], Store]] = {
    "sqlite": _open_sqlite,
    "redis": _open_redis,
    "rediss": _open_redis,
    "unix": _open_redis,
    "memory": _open_memory,
}
