"""Waits that can never end are refused before they begin (L5), and a standstill explains itself (L11, L12)."""

from __future__ import annotations

import asyncio
import logging
import threading
from collections.abc import AsyncIterator, Iterator
from typing import Any, Callable

import pytest
from support import eventually, join_all, start_all
from visitors import PER, CountingClock, Visitor, by_acquire_async, enters, info, line, queued, until

from agentdiff import Coordinator, DeadlockError
from agentdiff.testing import FakeClock


class Ring:
    """n parties: each takes its own lock, waits until all have, and then takes its neighbour's."""

    def __init__(self, coord: Coordinator, size: int) -> None:
        self.coord = coord
        self.size = size
        self.errors: list[DeadlockError] = []
        self.through: list[int] = []
        self.inside = 0
        self.mutex = threading.Lock()
        self.all_in = threading.Event()

    def lock(self, number: int) -> Any:
        return self.coord.lock(f"lock-{number % self.size}")

    def came_in(self) -> None:
        with self.mutex:
            self.inside += 1
            if self.inside == self.size:
                self.all_in.set()

    def thread(self, number: int) -> None:
        try:
            with self.lock(number):
                self.came_in()
                assert self.all_in.wait(10)
                with self.lock(number + 1):
                    self.through.append(number)
        except DeadlockError as error:
            self.errors.append(error)

    async def task(self, number: int) -> None:
        try:
            async with self.lock(number):
                self.came_in()
                while not self.all_in.is_set():
                    await asyncio.sleep(0)
                async with self.lock(number + 1):
                    self.through.append(number)
        except DeadlockError as error:
            self.errors.append(error)

    def run(self, threads: int) -> None:
        async def tasks() -> None:
            await asyncio.gather(*(self.task(number) for number in range(threads, self.size)))

        started = start_all(*(lambda n=n: self.thread(n) for n in range(threads)))  # type: ignore[misc]
        if threads < self.size:
            asyncio.run(asyncio.wait_for(tasks(), 10))
        join_all(started, 10)


@pytest.mark.parametrize("size", [2, 3, 10])
@pytest.mark.parametrize("kind", ["threads", "tasks", "mixed"])
def test_L5_a_ring_is_refused_once_and_everybody_else_goes_on(coord: Coordinator, size: int, kind: str) -> None:
    """Exactly one of a ring gets the error, which names each hop; the others get their locks."""
    ring = Ring(coord, size)
    ring.run({"threads": size, "tasks": 0, "mixed": size // 2}[kind])
    (error,) = ring.errors
    assert len(ring.through) == size - 1
    assert len(error.cycle) == size
    for number in range(size):
        assert sum(f"'lock-{number}'" in hop for hop in error.cycle) == 1
    assert all(hop in str(error) and "has held for" in hop for hop in error.cycle)
    assert "would wait for" in error.cycle[0]
    assert coord.snapshot().locks == ()


def test_L5_a_timeout_does_not_count_as_an_end(coord: Coordinator) -> None:
    """Even if both would give up some day, the wait that closes the ring is refused at once."""
    waiting = threading.Event()

    def other() -> None:
        with coord.lock("b"):
            waiting.set()
            with coord.lock("a", timeout=30):
                pass

    with coord.lock("a"):
        (thread,) = start_all(other)
        assert waiting.wait(5)
        eventually(lambda: any(lock.waiters for lock in coord.snapshot().locks))
        with pytest.raises(DeadlockError), coord.lock("b", timeout=30):
            pass
    join_all([thread])


def test_L5_trying_once_is_never_refused(coord: Coordinator) -> None:
    """Who doesn't wait can't deadlock: timeout 0 just says no."""
    waiting = threading.Event()

    def other() -> None:
        with coord.lock("b"):
            waiting.set()
            with coord.lock("a"):
                pass

    with coord.lock("a"):
        (thread,) = start_all(other)
        assert waiting.wait(5)
        eventually(lambda: any(lock.waiters for lock in coord.snapshot().locks))
        assert coord.lock("b").acquire(blocking=False) is False
    join_all([thread])


def test_L5_a_blocking_acquire_that_its_own_loop_must_release_is_refused(coord: Coordinator) -> None:
    """A task holds the lock; a blocking acquire on its loop's thread would keep it from ever going on."""

    async def main() -> str:
        entered, leave = asyncio.Event(), asyncio.Event()

        async def holder() -> None:
            async with coord.lock("a"):
                entered.set()
                await leave.wait()

        task = asyncio.create_task(holder())
        await entered.wait()
        with pytest.raises(DeadlockError) as caught, coord.lock("a"):
            pass
        leave.set()
        await task
        return str(caught.value)

    assert "use `async with` or `await` there" in asyncio.run(main())


def test_L5_a_loop_blocked_for_somebody_who_waits_for_its_task_is_refused(coord: Coordinator) -> None:
    """The ring goes through the loop: a thread waits for a task's lock, a callback on that loop for the thread's."""
    held, waits = threading.Event(), threading.Event()

    def thread() -> None:
        with coord.lock("of-the-thread"):
            held.set()
            waits.wait(5)
            with coord.lock("of-the-task"):
                pass

    async def main() -> None:
        async with coord.lock("of-the-task"):
            waits.set()
            await asyncio.to_thread(eventually, lambda: any(lock.waiters for lock in coord.snapshot().locks))
            other = asyncio.create_task(blocking())
            await other

    async def blocking() -> None:
        with pytest.raises(DeadlockError) as caught, coord.lock("of-the-thread", lend=False):
            pass
        assert len(caught.value.cycle) == 3

    (started,) = start_all(thread)
    assert held.wait(5)
    asyncio.run(asyncio.wait_for(main(), 10))
    join_all([started])


def test_L5_a_task_queued_behind_a_task_of_a_blocked_loop_sees_the_ring(coord: Coordinator) -> None:
    """Those ahead in line count too: one of them can't take its turn, since its loop's thread is blocked."""
    log: list[str] = []
    first_in, queued, done = threading.Event(), threading.Event(), threading.Event()

    def holder() -> None:  # holds a until all is decided
        with coord.lock("a"):
            first_in.set()
            assert done.wait(10)

    def loop_thread() -> None:
        async def main() -> None:
            async def in_line() -> None:
                async with coord.lock("a"):
                    log.append("in line got a")

            task = asyncio.create_task(in_line())
            await asyncio.to_thread(eventually, lambda: waiters("a") == 1)
            queued.set()
            with coord.lock("b"):  # blocks this loop's thread until the last one lets b go
                log.append("loop got b")
            await task

        asyncio.run(main())

    def waiters(name: str) -> int:
        return sum(len(lock.waiters) for lock in coord.snapshot().locks if lock.name == name)

    with coord.lock("b"):
        threads = start_all(holder)
        assert first_in.wait(5)
        threads += start_all(loop_thread)
        assert queued.wait(5)
        eventually(lambda: waiters("b") == 1)
        with pytest.raises(DeadlockError) as caught, coord.lock("a"):
            pass
        assert "ahead in line" in str(caught.value)
    done.set()
    join_all(threads)
    assert sorted(log) == ["in line got a", "loop got b"]


def test_L5_a_borrower_waits_for_its_siblings_and_not_for_its_lender(coord: Coordinator) -> None:
    """The lender doesn't exclude its borrower, so a lender that waits for the borrower's lock closes no ring."""

    async def main() -> list[str]:
        log: list[str] = []
        sibling_in, sibling_out, has_b = asyncio.Event(), asyncio.Event(), asyncio.Event()

        async def sibling() -> None:
            async with coord.lock("a"):
                sibling_in.set()
                await sibling_out.wait()

        async def borrower() -> None:
            await sibling_in.wait()
            async with coord.lock("b"):
                has_b.set()
                async with coord.lock("a"):
                    log.append("borrowed a")

        async with coord.lock("a"):
            tasks = [asyncio.create_task(sibling()), asyncio.create_task(borrower())]
            await has_b.wait()
            asyncio.get_running_loop().call_later(0.01, sibling_out.set)
            async with coord.lock("b"):
                log.append("lender got b")
            await asyncio.gather(*tasks)
        return log

    assert asyncio.run(asyncio.wait_for(main(), 10)) == ["borrowed a", "lender got b"]


def driving(coord: Coordinator, kind: str, around: str, within: str) -> Callable[[], Any]:
    """Drives a stream whose lock is "api", and holds the one lock around that, and the other amid its step."""

    @coord.coordinate("poet", lock_name="api")
    def poem() -> Iterator[int]:
        with coord.lock(within):
            yield 1

    @coord.coordinate("poet", lock_name="api")
    async def async_poem() -> AsyncIterator[int]:
        async with coord.lock(within):
            yield 1

    def drive() -> None:
        with coord.lock(around):
            list(poem())

    async def drive_async() -> None:
        async with coord.lock(around):
            async for _ in async_poem():
                pass

    return drive if kind == "generator" else lambda: asyncio.run(drive_async())


@pytest.mark.parametrize("limited", [False, True])
@pytest.mark.parametrize("kind", ["generator", "async generator"])
def test_L5_whoever_drives_a_stream_that_waits_for_its_lock_waits_too(
    coord: Coordinator, kind: str, limited: bool
) -> None:
    """It holds a lock that the holder of the stream's lock wants."""
    if limited:
        coord.limit("api", concurrency=1)
    with coord.lock("api"):
        threads = start_all(driving(coord, kind, around="x", within="y"))
        eventually(lambda: waiting_for(coord, "api"))
        with pytest.raises(DeadlockError) as caught:
            coord.lock("x").acquire()
        assert "a generator" in caught.value.cycle[1]
    join_all(threads)


@pytest.mark.parametrize("limited", [False, True])
@pytest.mark.parametrize("kind", ["generator", "async generator"])
def test_L5_a_stream_amid_a_step_waits_if_its_driver_does(coord: Coordinator, kind: str, limited: bool) -> None:
    """It has the stream's lock, and waits in the step for one whose holder wants the stream's."""
    if limited:
        coord.limit("api", concurrency=1)
    with coord.lock("x"):
        threads = start_all(driving(coord, kind, around="y", within="x"))
        eventually(lambda: waiting_for(coord, "x"))
        with pytest.raises(DeadlockError) as caught:
            coord.lock("api").acquire()
        assert len(caught.value.cycle) == 2
    join_all(threads)


def test_L5_a_stream_between_its_steps_waits_for_nobody(coord: Coordinator) -> None:
    """Its driver waits for what I hold; but anybody may take the next step."""

    @coord.coordinate("poet", lock_name="api")
    def poem() -> Iterator[int]:
        yield 1

    verses = poem()

    def drive() -> None:
        next(verses)
        with coord.lock("x"):
            pass

    with coord.lock("x"):
        threads = start_all(drive)
        eventually(lambda: waiting_for(coord, "x"))
        threads += start_all(lambda: (eventually(lambda: waiting_for(coord, "api")), list(verses)))
        with coord.lock("api"):
            pass
    join_all(threads)


def waiting_for(coord: Coordinator, name: str) -> int:
    return sum(len(lock.waiters) for lock in coord.snapshot().locks if lock.name == name)


def stand_still(coord: Coordinator) -> tuple[list[threading.Thread], threading.Event]:
    """An agent holds a lock, another waits for it."""
    inside, leave = threading.Event(), threading.Event()

    @coord.coordinate("writer", lock_name="customer_123")
    def write() -> None:
        inside.set()
        assert leave.wait(10)

    @coord.coordinate("auditor", lock_name="customer_123")
    def audit() -> None:
        pass

    threads = start_all(write)
    assert inside.wait(5)
    threads += start_all(audit)
    eventually(lambda: coord.snapshot().locks[0].waiters)
    return threads, leave


def test_L11_explain_says_who_what_since_when_where_and_what_to_do() -> None:
    """The text names both agents, the lock, the ages, the lines of code, and advises."""
    clock = FakeClock()
    coord = Coordinator(clock=clock, name="test")
    threads, leave = stand_still(coord)
    clock.now += 75
    text = coord.explain()
    leave.set()
    join_all(threads)
    assert "Lock 'customer_123' is held by agent 'writer' (thread" in text
    assert "for 1 min 15 s" in text
    assert "1. agent 'auditor' (thread" in text
    assert "in write()" in text
    assert "->" in text
    assert coord.explain() == "Nobody waits for a lock, and no event is pending."
    coord.close()


def test_L11_a_snapshot_is_frozen_and_shows_holders_and_waiters(coord: Coordinator) -> None:
    """Names, agents, places and order are there; nothing can be changed; an idle coordinator has none."""
    threads, leave = stand_still(coord)
    (lock,) = coord.snapshot().locks
    assert (lock.name, lock.holders[0].agent, lock.waiters[0].agent) == ("customer_123", "writer", "auditor")
    assert lock.holders[0].where is not None
    assert "in write()" in lock.holders[0].where
    with pytest.raises(AttributeError):
        lock.name = "other"  # type: ignore[misc]
    leave.set()
    join_all(threads)
    assert coord.snapshot().locks == ()


def test_L8_explain_tells_of_an_orphan_and_what_to_do_about_it(coord: Coordinator) -> None:
    """A thread that ended while holding is named as such; the hold is not freed silently."""
    (thread,) = start_all(coord.lock("a").acquire)
    join_all([thread])
    assert "has ended without releasing" in coord.explain()
    assert coord.lock("a").acquire(timeout=0) is False
    assert coord.snapshot().locks[0].holders[0].orphaned


def test_L12_a_slow_wait_is_logged_once_with_its_explanation(caplog: pytest.LogCaptureFixture) -> None:
    """After `slow_after` one warning; not a second one, however long it goes on."""
    clock = FakeClock()
    coord = Coordinator(clock=clock, name="test", slow_after=30)
    with caplog.at_level(logging.WARNING, "agentdiff"):
        threads, leave = stand_still(coord)
        clock.wait_for_sleepers(1)
        clock.advance(29)
        assert not caplog.records
        clock.advance(2)
        eventually(lambda: caplog.records)
        clock.advance(1000)
        leave.set()
        join_all(threads)
    (record,) = caplog.records
    assert "agent 'auditor'" in record.getMessage()
    assert "has waited 31 s for lock 'customer_123'" in record.getMessage()
    assert "held by agent 'writer'" in record.getMessage()
    coord.close()


def test_L12_a_task_that_waits_long_is_logged_too(caplog: pytest.LogCaptureFixture) -> None:
    """The same on a loop, where the wait goes on after the warning and still ends in time."""
    clock = FakeClock()
    coord = Coordinator(clock=clock, name="test", slow_after=30)

    async def main() -> bool:
        with coord.lock("a", lend=False):

            async def wait() -> bool:
                return await coord.lock("a").acquire_async(timeout=50)

            task = asyncio.create_task(wait())
            await asyncio.to_thread(clock.wait_for_sleepers, 1)
            clock.advance(31)
            await asyncio.to_thread(clock.wait_for_sleepers, 1)
            clock.advance(20)
            return await task

    with caplog.at_level(logging.WARNING, "agentdiff"):
        assert asyncio.run(main()) is False
    assert len(caplog.records) == 1
    coord.close()


def test_L12_blocking_a_running_loop_is_logged_after_a_tenth_of_a_second(caplog: pytest.LogCaptureFixture) -> None:
    """A blocking wait on a loop's thread holds up every task there: it is told soon, with the way out."""
    clock = FakeClock()
    coord = Coordinator(clock=clock, name="test")
    inside, leave = threading.Event(), threading.Event()

    def holder() -> None:
        with coord.lock("a"):
            inside.set()
            assert leave.wait(10)

    def help_out() -> None:
        clock.wait_for_sleepers(1)
        clock.advance(0.2)
        eventually(lambda: caplog.records)
        leave.set()

    async def main() -> None:
        with coord.lock("a"):
            pass

    with caplog.at_level(logging.WARNING, "agentdiff"):
        threads = start_all(holder)
        assert inside.wait(5)
        threads += start_all(help_out)
        asyncio.run(main())
        join_all(threads)
    assert "use `async with`" in caplog.records[0].getMessage()
    coord.close()


# -- under a limit: places, and never time ------------------------------------------------------------------------


def cross(timed: Coordinator, first: str, second: str) -> Visitor:
    """A thread that holds the one and waits for the other."""

    class Both:
        name = second

        def __enter__(self) -> None:
            timed.lock(first).__enter__()
            timed.lock(second).__enter__()

        def __exit__(self, *error: Any) -> None:
            timed.lock(second).__exit__(None, None, None)
            timed.lock(first).__exit__(None, None, None)

    return queued(timed, Both(), f"Cross-{first}-{second}")


def test_L5_a_wait_is_refused_only_if_every_holder_is_stuck(timed: Coordinator) -> None:
    """Two places: one holder waits for me, the other can go on, and I wait; then it is stuck too, and I am refused."""
    timed.limit("api", concurrency=2)
    free = Visitor(timed.lock("api"), "Free").entered()
    with timed.lock("b"):
        stuck = cross(timed, "api", "b")
        answers: list[Any] = []
        helper = start_all(lambda: (eventually(lambda: line(timed)), answers.append(True), free.go()))
        with timed.lock("api"):
            pass
        join_all(helper)
        assert answers == [True]
        also = cross(timed, "api", "b")
        with pytest.raises(DeadlockError) as caught:
            timed.lock("api").acquire()
        assert "'api'" in str(caught.value)
        assert "'b'" in str(caught.value)
        assert line(timed, "api") == []
    stuck.entered().go()
    also.entered().go()


def test_L5_two_who_would_enter_again_wait_for_nobody(timed: Coordinator) -> None:
    """Both places taken, and both holders enter again: no ring."""
    timed.limit("api", concurrency=2)
    barrier = threading.Barrier(2)

    def visit() -> None:
        with timed.lock("api"):
            barrier.wait(10)
            with timed.lock("api"):
                barrier.wait(10)

    join_all(start_all(visit, visit))


def test_L5_waiting_for_a_rate_is_never_refused(timed: Coordinator, clock: CountingClock) -> None:
    """Everyone inside waits for me, and I for time: it will pass."""
    timed.limit("api", requests=2, per=PER, margin=0)
    assert enters(timed.lock("api"))
    with timed.lock("b"):
        stuck = cross(timed, "api", "b")
        helper = start_all(lambda: (clock.wait_for_sleepers(1), clock.advance(PER)))
        with timed.lock("api"):
            pass
        join_all(helper)
    stuck.entered().go()


def test_L5_waiting_for_tokens_or_for_a_pause_is_never_refused(timed: Coordinator, clock: CountingClock) -> None:
    """A plain lock that the API holds back is one that nobody has."""
    with timed.lock("api") as slot:
        slot.throttled(retry_after=16)
    timed.limit("other", tokens=10, per=32, margin=0)
    with timed.lock("other", tokens=10), timed.lock("b"):
        stuck = cross(timed, "c", "b")
        for name in ("api", "other"):
            helper = start_all(lambda: (clock.wait_for_sleepers(1), clock.advance(16)))
            with timed.lock(name, tokens=10):
                pass
            join_all(helper)
    stuck.entered().go()


def test_L5_two_requests_left_close_no_ring(timed: Coordinator, clock: CountingClock) -> None:
    """One is taken by a group that waits for me; the other will be free in time."""
    timed.limit("api", requests=2, per=PER, margin=0)
    assert enters(timed.lock("api"))
    with timed.lock("b"):
        group = Visitor(timed.lock("api", "b"))
        eventually(lambda: line(timed, "b"))
        helper = start_all(lambda: (clock.wait_for_sleepers(1), clock.advance(PER)))
        with timed.lock("api"):
            pass
        join_all(helper)
    group.entered().go()


@pytest.mark.parametrize("limit", [{"requests": 1}, {"tokens": 10}, {"requests": 5, "tokens": 19}])
def test_L5_a_group_on_its_way_in_can_close_a_ring(timed: Coordinator, limit: dict[str, int]) -> None:
    """It has the last request, or tokens, until it has the other lock too; and that I hold."""
    timed.limit("api", **limit, per=PER, margin=0)
    with timed.lock("b"):
        group = Visitor(timed.lock("api", "b", tokens=10), "Group")
        eventually(lambda: line(timed, "b"))
        with pytest.raises(DeadlockError) as caught, timed.lock("api", tokens=10):
            pass
        assert "waiting for lock 'api'" in str(caught.value)
        assert "lock 'api', which thread \"Group\" has held" in caught.value.cycle[0]
        assert "lock 'b'" in caught.value.cycle[1]
    group.entered().go()
    assert info(timed).requests_used == 1


def test_L5_a_group_is_refused_if_it_would_close_the_ring(timed: Coordinator, clock: CountingClock) -> None:
    """It stood ahead in line; now it has the request, and the other lock is held by the one behind."""
    timed.limit("api", requests=1, per=PER, margin=0)
    assert enters(timed.lock("api"))
    group = Visitor(timed.lock("api", "b"), "Group")
    eventually(lambda: line(timed))
    holder = cross(timed, "b", "api")
    clock.wait_for_sleepers(1)
    clock.advance(PER)
    assert isinstance(group.ended(), DeadlockError)
    holder.entered().go()


def test_L5_tokens_that_a_group_on_its_way_in_leaves_close_no_ring(timed: Coordinator, clock: CountingClock) -> None:
    """The limit has enough for both, in time; one token more, and it is a ring."""
    timed.limit("api", tokens=100, per=PER, margin=0)
    with timed.lock("b"):
        group = Visitor(timed.lock("api", "b", tokens=40))
        eventually(lambda: line(timed, "b"))
        assert enters(timed.lock("api", tokens=60))
        with pytest.raises(DeadlockError):
            timed.lock("api", tokens=61).acquire()
        helper = start_all(lambda: (clock.wait_for_sleepers(1), clock.advance(PER)))
        with timed.lock("api", tokens=60):
            pass
        join_all(helper)
    group.entered().go()


def test_L5_those_ahead_who_ask_for_more_can_close_a_ring(timed: Coordinator, clock: CountingClock) -> None:
    """Somebody ahead waits for the tokens that a group on its way in has: there is no way past."""
    timed.limit("api", tokens=100, per=PER, margin=0)
    with timed.lock("b"):
        group = Visitor(timed.lock("api", "b", tokens=40))
        eventually(lambda: line(timed, "b"))
        big = queued(timed, timed.lock("api", tokens=61))
        with pytest.raises(DeadlockError):
            timed.lock("api", tokens=1).acquire()
    group.entered().go()
    clock.wait_for_sleepers(1)
    clock.advance(PER)
    big.entered().go()


@pytest.mark.parametrize("ahead", ["in line", "on its way in"])
@pytest.mark.parametrize(("limit", "refused"), [
    ({"requests": 1}, True),
    ({"requests": 2}, False),
    ({"tokens": 19}, True),
    ({"tokens": 20}, False),
    ({"requests": 2, "concurrency": 1}, True),
    ({"requests": 2, "concurrency": 2}, False),
])  # fmt: skip
def test_L5_a_blocking_acquire_behind_a_task_of_its_own_loop(
    timed: Coordinator, clock: CountingClock, ahead: str, limit: dict[str, int], refused: bool
) -> None:
    """The task can't go in while its loop is blocked: refused if it would get the last of what there is."""
    timed.limit("api", **limit, per=PER, margin=0)
    lock = timed.lock("api", tokens=10)
    while enters(lock):
        pass

    def time_passes() -> None:
        clock.wait_for_sleepers(2)
        clock.advance(1)  # the warning is due
        eventually(lambda: clock.timers == [PER - 1, PER - 1])
        clock.advance(PER - 1)

    async def main() -> None:
        task = asyncio.ensure_future(by_acquire_async(lock))
        await until(lambda: line(timed))
        if ahead == "on its way in":
            clock.now += PER
            lock.locked()
            assert line(timed) == []  # it has been let in, and has not woken up yet
        helper = [] if refused or ahead != "in line" else start_all(time_passes)
        if refused:
            with pytest.raises(DeadlockError, match="use `async with`"), lock:
                pass
        else:
            with lock:
                pass
        join_all(helper)
        clock.advance(PER)
        await task

    asyncio.run(main())
