"""The one department of global state: the default coordinator, made on first use, and the facades on it (F1)."""

from __future__ import annotations

import threading
from asyncio import AbstractEventLoop
from collections.abc import Sequence
from typing import Any, Callable, Optional, TypeVar, Union, overload

from ._lanes import Delivery, Handler, Subscription
from .agents import LockSpec
from .coordinator import Coordinator
from .joins import Names
from .locks import Lock, LockGroup
from .settings import make_coordinator

F = TypeVar("F", bound=Callable[..., Any])

_mutex = threading.Lock()
_default: Optional[Coordinator] = None


def default_coordinator() -> Coordinator:
    """The coordinator behind the module-level functions; made on first use, as the environment says (F1, F3)."""
    global _default
    found = _default
    if found is None:
        with _mutex:
            if _default is None:
                _default = make_coordinator()
            found = _default
    return found


def reset_default() -> None:
    """Forget the default coordinator; the next use makes a new one. For tests: what was decorated keeps the old one."""
    global _default
    with _mutex:
        _default = None


def configure(
    *,
    workers: Optional[int] = None,
    lock_timeout: Any = ...,
    max_pending: Optional[int] = None,
    exit_timeout: Any = ...,
    store: Any = ...,
    flush_timeout: Any = ...,
    redact: Any = ...,
    max_payload: Any = ...,
) -> None:
    """Change the default coordinator in place: see `Coordinator.configure` (F3).

    Before its first use, it is made so, and for the rest as the environment says.
    """
    global _default
    given: dict[str, Any] = {
        "lock_timeout": lock_timeout,
        "exit_timeout": exit_timeout,
        "store": store,
        "flush_timeout": flush_timeout,
        "redact": redact,
        "max_payload": max_payload,
    }
    given = {name: value for name, value in given.items() if value is not ...}
    given.update((name, n) for name, n in (("workers", workers), ("max_pending", max_pending)) if n is not None)
    with _mutex:
        if _default is None:
            _default = make_coordinator(**given)
            return
        found = _default
    found.configure(**given)


def coordinate(
    name: str,
    lock_name: LockSpec = None,
    *,
    timeout: Any = ...,
    after: Union[str, Sequence[str]] = (),
    tokens: Union[float, Callable[..., float]] = 0,
    throttle_on: Union[type[BaseException], tuple[type[BaseException], ...]] = (),
    control_flow: Union[type[BaseException], tuple[type[BaseException], ...]] = (),
    collect: Optional[Callable[[list[Any]], Any]] = None,
) -> Callable[[F], F]:
    """`Coordinator.coordinate` on the default coordinator (F1)."""
    return default_coordinator().coordinate(
        name,
        lock_name,
        timeout=timeout,
        after=after,
        tokens=tokens,
        throttle_on=throttle_on,
        control_flow=control_flow,
        collect=collect,
    )


@overload
def when(
    name: Names,
    handler: None = ...,
    *,
    loop: Optional[AbstractEventLoop] = ...,
    pass_event: bool = ...,
    concurrent: bool = ...,
    once: bool = ...,
    timeout: Optional[float] = ...,
) -> Callable[[F], F]: ...


@overload
def when(
    name: Names,
    handler: Handler,
    *,
    loop: Optional[AbstractEventLoop] = ...,
    pass_event: bool = ...,
    concurrent: bool = ...,
    once: bool = ...,
    timeout: Optional[float] = ...,
) -> Subscription: ...


def when(
    name: Names,
    handler: Optional[Handler] = None,
    *,
    loop: Optional[AbstractEventLoop] = None,
    pass_event: bool = False,
    concurrent: bool = False,
    once: bool = False,
    timeout: Optional[float] = None,
) -> Union[Subscription, Callable[[F], F]]:
    """`Coordinator.on` on the default coordinator (F1)."""
    return default_coordinator().on(
        name, handler, loop=loop, pass_event=pass_event, concurrent=concurrent, once=once, timeout=timeout
    )


def emit(name: str, data: Any = None, *, sender: Optional[str] = None) -> Delivery:
    """`Coordinator.emit` on the default coordinator (F1)."""
    return default_coordinator().emit(name, data, sender=sender)


@overload
def lock(name: str, *, timeout: Any = ..., lend: bool = True, tokens: float = 0) -> Lock: ...


@overload
def lock(
    name: str, second: str, /, *more: str, timeout: Any = ..., lend: bool = True, tokens: float = 0
) -> LockGroup: ...


def lock(name: str, *more: str, timeout: Any = ..., lend: bool = True, tokens: float = 0) -> Union[Lock, LockGroup]:
    """`Coordinator.lock` on the default coordinator (F1)."""
    found = default_coordinator()
    if not more and timeout is ... and lend is True and not tokens:  # what most ask for, by its short way
        return found.lock(name)
    handle: Union[Lock, LockGroup] = found.lock(name, *more, timeout=timeout, lend=lend, tokens=tokens)
    return handle


def limit(
    name: str,
    *,
    concurrency: Optional[int] = None,
    requests: Optional[int] = None,
    tokens: Optional[int] = None,
    per: float = 60.0,
    margin: float = 0.1,
) -> None:
    """`Coordinator.limit` on the default coordinator (F1)."""
    default_coordinator().limit(name, concurrency=concurrency, requests=requests, tokens=tokens, per=per, margin=margin)
