"""The one line in which threads and tasks wait, first come first served (L3).

Nothing here decides. The table appoints a waiter under its mutex and wakes it afterwards; a
waiter only knows how to sleep on its side, thread or loop, and how to be woken.
"""

from __future__ import annotations

from _thread import allocate_lock
from asyncio import AbstractEventLoop, Future, get_running_loop
from collections import OrderedDict
from typing import Any, Generic, Optional, Protocol, TypeVar, Union

from ._clock import Clock
from ._owner import Owner, running_loop

T = TypeVar("T")


class Bell(Protocol):
    """What a sleeper leaves with whoever will wake it."""

    def ring(self) -> bool:
        """End the sleep, or the next; False if whoever sleeps can't be woken. Never blocks, may be called twice."""


class ThreadBell:
    """A sleep on a thread."""

    __slots__ = ("_lock",)

    loop = None

    def __init__(self) -> None:
        self._lock = lock = allocate_lock()
        lock.acquire()

    def ring(self) -> bool:
        try:  # noqa: SIM105  (quicker than suppress, on the way from one holder to the next)
            self._lock.release()
        except RuntimeError:
            pass  # rung already
        return True

    def sleep(self, clock: Clock, timeout: Optional[float]) -> None:
        """Sleep until it is rung, `timeout` seconds at most."""
        clock.wait(self._lock, timeout)


class TaskBell:
    """A sleep on the running loop."""

    __slots__ = ("_future", "_rung", "loop")

    def __init__(self) -> None:
        self.loop: AbstractEventLoop = get_running_loop()
        self._rung = False
        self._future: Optional[Future[None]] = None

    def ring(self) -> bool:
        if running_loop() is self.loop:
            self._finish()
            return True
        try:
            self.loop.call_soon_threadsafe(self._finish)
        except RuntimeError:
            return self._future is None  # the loop has been closed: whoever sleeps there is never run again
        return True

    def _finish(self) -> None:
        self._rung = True
        self._end_sleep()

    def _end_sleep(self) -> None:
        if self._future is not None and not self._future.done():
            self._future.set_result(None)

    async def sleep(self, clock: Clock, timeout: Optional[float]) -> None:
        """Sleep until it is rung, `timeout` seconds at most."""
        if not self._rung:
            self._future = self.loop.create_future()
            if timeout is None:
                await self._future
            else:
                timer = clock.call_later(self.loop, timeout, self._end_sleep)
                try:
                    await self._future
                finally:
                    timer.cancel()
        self._rung, self._future = False, None  # it can be rung again


class Waiter(Generic[T]):
    """One place in a line. `claim` is what it gets when its turn comes; `served` says that it has.

    Both are written under the mutex of whoever owns the line; the waiter reads them under it too, or after the bell.
    Whoever makes one fills it in: this is on the way from one holder to the next, where a call would show.
    Without a bell it is not willing to wait. `blocks` is the loop whose thread sleeps in this wait, `tokens` how many
    it asks of a limit, and `request` what has become of that.
    """

    __slots__ = ("bell", "blocks", "claim", "owner", "request", "served", "since", "timeout", "tokens", "warned")

    bell: Union[ThreadBell, TaskBell, None]
    blocks: Optional[AbstractEventLoop]
    claim: T
    owner: Owner
    request: Any
    served: bool
    since: float
    timeout: Optional[float]
    tokens: float
    warned: bool


class WaitQueue(OrderedDict[Waiter[T], None]):
    """Waiters in the order of their coming; leaving from the middle costs no more than leaving from the front."""

    __slots__ = ()
