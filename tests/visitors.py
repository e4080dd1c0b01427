"""Who enters locks and limits in tests: threads that stay inside until they are told to leave, and who is where."""

from __future__ import annotations

import asyncio
import threading
import time
from collections import Counter
from contextvars import Context, copy_context
from typing import Any, Callable, Optional

from support import eventually, join_all, start_all

from agentdiff import Coordinator
from agentdiff.testing import FakeClock

PER = 64.0
"""The window of a limit: with margins that are powers of two too, no rounding blurs when it ends."""


class CountingClock(FakeClock):
    """Counts the waits, with a time and without."""

    def __init__(self) -> None:
        super().__init__()
        self.waits: Counter[bool] = Counter()

    def wait(self, lock: Any, timeout: Optional[float]) -> bool:
        self.waits[timeout is not None] += 1
        return super().wait(lock, timeout)

    def call_later(self, loop: Any, delay: float, call: Callable[[], Any]) -> Any:
        self.waits[True] += 1
        return super().call_later(loop, delay, call)

    @property
    def timers(self) -> list[float]:
        """When the waits that go on now will end, in seconds from now."""
        return sorted(alarm[0] - self.now for alarm in self._alarms)


class Visitor:
    """A thread that enters and stays inside until it is told to leave."""

    def __init__(self, lock: Any, name: str = "Visitor", context: Optional[Context] = None) -> None:
        self.lock = lock
        self.inside, self.leave = threading.Event(), threading.Event()
        self.context: Optional[Context] = None
        self.slot: Any = None
        self.error: Optional[BaseException] = None
        run = context.copy().run if context is not None else lambda call: call()
        self.thread = threading.Thread(target=lambda: run(self._visit), name=name, daemon=True)
        self.thread.start()

    def _visit(self) -> None:
        try:
            with self.lock as self.slot:
                self.context = copy_context()
                self.inside.set()
                assert self.leave.wait(30)
        except BaseException as error:
            self.error = error

    def __enter__(self) -> Visitor:
        return self.entered()

    def __exit__(self, *error: Any) -> None:
        self.go()

    def entered(self) -> Visitor:
        assert self.inside.wait(10), self.error
        return self

    def go(self) -> None:
        self.leave.set()
        self.ended()
        assert self.error is None, self.error

    def ended(self) -> Optional[BaseException]:
        join_all([self.thread])
        return self.error


def queued(coord: Coordinator, lock: Any, name: str = "Waiter", context: Optional[Context] = None) -> Visitor:
    """A visitor that stands in line."""
    before = len(line(coord))
    visitor = Visitor(lock, name, context)
    eventually(lambda: len(line(coord)) > before)
    return visitor


def line(coord: Coordinator, name: Optional[str] = None) -> list[str]:
    """Who waits, under this name or any."""
    return [waiter.who for lock in coord.snapshot().locks if name in (None, lock.name) for waiter in lock.waiters]


def inside(coord: Coordinator, name: Optional[str] = None) -> list[str]:
    """Who is inside, under this name or any."""
    return [holder.who for lock in coord.snapshot().locks if name in (None, lock.name) for holder in lock.holders]


def info(coord: Coordinator, name: str = "api") -> Any:
    """What a snapshot says of a limit."""
    return next(limit for limit in coord.snapshot().limits if limit.name == name)


def nothing_left(coord: Coordinator) -> bool:
    """Nobody is inside or in line, nothing is granted that has not been entered; of names only the limited ones."""
    table = coord._table
    book = table.book
    assert coord.snapshot().locks == ()
    assert not any((book.waiting, book.blocked, book.woken, table._chores))
    limits = coord.snapshot().limits
    for limit in limits:
        entry: Any = table.entries[limit.name]
        assert (limit.places_taken, limit.waiting) == (0, 0)
        assert not any((entry.line, entry.hopeful, entry._chains, entry.account.open, entry.inside()))
        assert book.slots[limit.name] is entry._closed
    assert set(table.slots) == set(table.entries) == {limit.name for limit in limits}
    return True


async def until(condition: Callable[[], Any], timeout: float = 10.0) -> None:
    """`eventually`, and the loop goes on meanwhile."""
    deadline = time.monotonic() + timeout
    while not condition():
        assert time.monotonic() < deadline, f"never came true: {condition}"
        await asyncio.sleep(0)


def in_thread(call: Callable[[], Any]) -> Any:
    """What the call returns on a thread of its own, with no context of the caller's."""
    results: list[Any] = []
    join_all(start_all(lambda: results.append(Context().run(call))))
    return results[0]


def attempt(lock: Any, timeout: float = 0) -> bool:
    """Whether this thread gets in; it leaves again."""
    entered = bool(lock.acquire(timeout=timeout))
    if entered:
        lock.release()
    return entered


def enters(lock: Any) -> bool:
    """Whether a stranger gets in at once; it leaves again."""
    return bool(in_thread(lambda: attempt(lock)))


async def by_acquire_async(lock: Any, body: Callable[[], Any] = int) -> None:
    assert await lock.acquire_async()
    try:
        body()
    finally:
        lock.release()


def closed_loop(lock: Any) -> Any:
    """A task that waits for the lock on a loop which is closed then."""
    loop = asyncio.new_event_loop()
    task = Context().run(loop.create_task, lock.acquire_async())
    loop.run_until_complete(asyncio.sleep(0))
    loop.close()
    return task


def drop(tasks: list[Any]) -> None:
    """Let tasks of closed loops go without their complaint that they were pending."""
    for task in tasks:
        task._log_destroy_pending = False
    tasks.clear()
