"""Time, injectable: whatever waits or measures asks a `Clock`, so that tests can own time."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any, Callable, Optional, Protocol

if TYPE_CHECKING:
    import asyncio


class RawLock(Protocol):
    """What `threading.Lock()` gives."""

    def acquire(self, blocking: bool = ..., timeout: float = ...) -> bool: ...

    def release(self) -> None: ...


class Timer(Protocol):
    """Something that will happen unless it is cancelled."""

    def cancel(self) -> None: ...


class Clock:
    """The system's time. A test's clock overrides what waits or tells the time.

    `monotonic` and `time` are plain functions on the instance, because they stand on hot paths.
    """

    def __init__(self) -> None:
        self.monotonic: Callable[[], float] = time.monotonic
        self.time: Callable[[], float] = time.time

    def wait(self, lock: RawLock, timeout: Optional[float]) -> bool:
        """Wait until somebody releases `lock`, for at most `timeout` seconds; tell whether it was released."""
        if timeout is None:
            return lock.acquire()
        return lock.acquire(True, timeout if 0 <= timeout <= MAX_WAIT else 0 if timeout < 0 else MAX_WAIT)

    def call_later(self, loop: asyncio.AbstractEventLoop, delay: float, call: Callable[[], Any]) -> Timer:
        """Have `loop`, which is the running one, make `call` after `delay` seconds."""
        return loop.call_later(min(delay, MAX_WAIT), call)

    def deadline(self, timeout: Optional[float]) -> Optional[float]:
        """When so many seconds from now are over, by `monotonic`; None for ever."""
        return None if timeout is None else self.monotonic() + timeout


MAX_WAIT = 86400.0 * 365
"""A year: the operating system refuses waits much longer, and nobody waits that long."""


def left_until(now: float, *ends: Optional[float]) -> Optional[float]:
    """How many seconds are left until the first of these times; None if there is none."""
    return min((end - now for end in ends if end is not None), default=None)


def check_timeout(timeout: Any) -> Optional[float]:
    """Refuse what can't be a timeout (L4): None waits, 0 tries once, positive seconds wait that long."""
    if timeout is None:
        return None
    if isinstance(timeout, bool) or not isinstance(timeout, (int, float)):
        raise TypeError(f"a timeout must be a number of seconds or None, not {type(timeout).__name__}: {timeout!r}")
    if not timeout >= 0:  # NaN neither is nor isn't
        raise ValueError(f"a timeout must be 0 (try once), positive, or None (wait), not {timeout!r}")
    return float(timeout) if timeout <= MAX_WAIT else None  # nobody waits for more than a year
