"""What users can rely on about locks, promise by promise; and the table's protocol, forced into its corners."""

from __future__ import annotations

import asyncio
import contextlib
import functools
import gc
import signal
import sys
import threading
from collections.abc import Iterator
from contextvars import Context, copy_context
from types import SimpleNamespace
from typing import Any, Callable, Optional

import pytest
from support import PACKAGE, eventually, interrupted, join_all, start_all
from visitors import Visitor, attempt, closed_loop, drop, in_thread, inside, line, nothing_left, queued, until

from agentdiff import CoordinationTimeoutError, Coordinator, DeadlockError, Lock, LockGroup, NotHeldError, Slot
from agentdiff._owner import ThreadOwner, current_owner
from agentdiff._places import Door, How
from agentdiff._table import LockTable
from agentdiff._waitqueue import TaskBell, WaitQueue
from agentdiff.limits import Limit
from agentdiff.testing import FakeClock


@pytest.fixture(params=["lock", "limit of one"])
def coord(request: pytest.FixtureRequest) -> Iterator[Coordinator]:
    """A coordinator whose "a" is a lock, or a limit to one at once: that is to differ in nothing."""
    with Coordinator(name="test") as coordinator:
        if request.param == "limit of one":
            coordinator.limit("a", concurrency=1)
        yield coordinator


# -- L1, L2: who holds --------------------------------------------------------------------------------------


def test_L1_one_holder_per_name(coord: Coordinator) -> None:
    """While one is inside nobody else gets in; another name is another lock."""
    with coord.lock("a"):
        assert in_thread(lambda: coord.lock("a").acquire(blocking=False)) is False
        with Visitor(coord.lock("b")):
            assert inside(coord, "b")
    assert in_thread(lambda: coord.lock("a").acquire(blocking=False)) is True


def test_L1_the_same_name_in_another_coordinator_is_another_lock(coord: Coordinator) -> None:
    """Two coordinators share nothing."""
    with Coordinator() as other, coord.lock("a"), Visitor(other.lock("a")):
        assert inside(coord) != inside(other)


def test_L2_a_thread_and_a_task_exclude_each_other(coord: Coordinator) -> None:
    """One table serves both, in both directions."""
    lock = coord.lock("a")

    async def main() -> None:
        with Visitor(lock) as thread:
            task = asyncio.ensure_future(hold())
            await until(lambda: line(coord))
            assert inside(coord) == ['thread "Visitor"']
            thread.leave.set()
            await task

    async def hold() -> None:
        async with lock:
            assert await asyncio.get_running_loop().run_in_executor(None, lambda: lock.acquire(timeout=0)) is False

    asyncio.run(main())
    assert nothing_left(coord)


def test_L2_tasks_of_two_loops_exclude_each_other(coord: Coordinator) -> None:
    """A hand-over crosses loops."""
    lock = coord.lock("a")
    order: list[int] = []

    async def second() -> None:
        await until(lambda: order)
        async with lock:
            order.append(2)

    async def first() -> None:
        async with lock:
            order.append(1)
            await until(lambda: line(coord))
            order.append(-1)

    join_all(start_all(lambda: asyncio.run(first()), lambda: asyncio.run(second())))
    assert order == [1, -1, 2]
    assert nothing_left(coord)


def test_L2_two_tasks_of_one_thread_exclude_each_other(coord: Coordinator) -> None:
    """The task holds, not the thread that runs it."""
    lock = coord.lock("a")

    async def main() -> None:
        async def attempt() -> bool:
            return await lock.acquire_async(blocking=False)

        before = copy_context()
        async with lock:
            task = before.run(asyncio.ensure_future, attempt())  # with no context of the holder's: no borrower
            assert await task is False

    asyncio.run(main())


def test_L2_a_lock_is_reentrant_for_its_holder(coord: Coordinator) -> None:
    """Entered three times, it is free after the third exit; the slot is the same one."""
    lock = coord.lock("a")
    with lock as outer:
        with lock as middle:
            assert lock.acquire()
            assert middle is outer
            assert coord.snapshot().locks[0].holders[0].entries == 3
        lock.release()
        assert lock.locked()
    assert not lock.locked()

    async def main() -> None:
        async with lock as outer, lock as inner:
            assert inner is outer
            assert await lock.acquire_async(timeout=0)
            lock.release()
        assert not lock.locked()

    asyncio.run(main())


def test_L2_reentry_does_not_queue_behind_those_who_wait(coord: Coordinator) -> None:
    """The holder's own second entry is no newcomer."""
    lock = coord.lock("a")
    with lock:
        waiter = queued(coord, lock)
        with lock, coord.lock("a", timeout=0):
            assert line(coord) == ['thread "Waiter"']
    waiter.entered().go()
    assert nothing_left(coord)


@pytest.mark.parametrize("how", ["to_thread", "gather"])
def test_L2_children_of_a_holder_enter_one_at_a_time(coord: Coordinator, how: str) -> None:
    """A tool inside an agent inside one lock doesn't hang, and siblings exclude each other."""
    lock = coord.lock("a")
    now: list[str] = []
    most: list[int] = []

    def tool(name: str) -> None:
        with lock:
            now.append(name)
            most.append(len(now))
            now.remove(name)

    async def async_tool(name: str) -> None:
        async with lock:
            now.append(name)
            await asyncio.sleep(0)
            most.append(len(now))
            now.remove(name)

    async def main() -> None:
        async with lock:
            if how == "gather":
                await asyncio.gather(*(async_tool(str(n)) for n in range(5)))
            else:
                await asyncio.gather(*(asyncio.to_thread(tool, str(n)) for n in range(5)))

    asyncio.run(asyncio.wait_for(main(), 20))
    assert most == [1] * 5
    assert nothing_left(coord)


def test_L2_a_sibling_waits_until_the_borrower_has_left(coord: Coordinator) -> None:
    """The second child enters when the first has left, though the lender is inside all the time."""
    lock = coord.lock("a")
    with lock:
        context = copy_context()
        first = Visitor(lock, "First", context).entered()
        second = queued(coord, lock, "Second", context)
        assert not second.inside.is_set()
        first.go()
        second.entered().go()
    assert nothing_left(coord)


def test_L2_the_lender_is_not_excluded_from_its_borrowers(coord: Coordinator) -> None:
    """Its re-entry never waits, borrower inside or not."""
    lock = coord.lock("a")
    with lock:
        with Visitor(lock, "Child", copy_context()):
            assert lock.acquire(timeout=0)
            assert [holder.entries for holder in coord.snapshot().locks[0].holders] == [2, 1]
            lock.release()
            assert lock.acquire(timeout=0)
        lock.release()
    assert nothing_left(coord)


def test_L2_the_lock_stays_until_the_last_borrower_has_left(coord: Coordinator) -> None:
    """The lender releases with a borrower inside: a stranger waits for the borrower."""
    lock = coord.lock("a")
    with lock:
        child = Visitor(lock, "Child", copy_context()).entered()
    assert lock.locked()
    stranger = queued(coord, lock, "Stranger")
    assert inside(coord) == ['thread "Child"']
    child.go()
    stranger.entered().go()
    assert nothing_left(coord)


def test_L2_a_former_lender_is_a_newcomer(coord: Coordinator) -> None:
    """Once released, the lender waits for its borrower like anybody."""
    lock = coord.lock("a")
    with lock:
        child = Visitor(lock, "Child", copy_context()).entered()
    assert lock.acquire(timeout=0) is False
    child.go()
    assert lock.acquire(timeout=0) is True
    lock.release()


def test_L2_when_the_lender_releases_its_waiting_children_join_the_line(coord: Coordinator) -> None:
    """They keep the place of their coming: before strangers that came later, behind those that came earlier."""
    lock, order = coord.lock("a"), []

    def note(name: str) -> Any:
        class Noted:
            def __enter__(self) -> None:
                lock.__enter__()
                order.append(name)

            def __exit__(self, *error: Any) -> None:
                lock.__exit__(None, None, None)

        return Noted()

    with lock:
        context = copy_context()
        child = Visitor(lock, "Child", context).entered()
        waiting = [queued(coord, note("early"), "early"), queued(coord, note("sibling"), "sibling", context)]
        waiting.append(queued(coord, note("late"), "late"))
    for visitor in waiting:
        visitor.leave.set()
    child.go()
    for visitor in waiting:
        visitor.go()
    assert order == ["early", "sibling", "late"]
    assert nothing_left(coord)


def test_L2_a_borrower_borrows_from_its_nearest_ancestor(coord: Coordinator) -> None:
    """A chain of fifty, each started inside by the one before; it empties from anywhere."""
    lock = coord.lock("a")
    chain = [Visitor(lock, "V0").entered()]
    for number in range(1, 50):
        chain.append(Visitor(lock, f"V{number}", chain[-1].context).entered())
    assert len(inside(coord)) == 50
    sibling = queued(coord, lock, "Sibling", chain[-2].context)
    stranger = queued(coord, lock, "Stranger")
    chain.pop().go()
    sibling.entered().go()
    for visitor in [*chain[20:30], *chain[:20]]:
        visitor.go()
        assert not stranger.inside.is_set()
    for visitor in reversed(chain[30:]):
        assert not stranger.inside.is_set()
        visitor.go()
    stranger.entered().go()
    assert nothing_left(coord)


def test_L2_a_place_is_free_when_the_borrowers_own_borrowers_have_left(coord: Coordinator) -> None:
    """A child leaves with a grandchild inside: its sibling waits for the grandchild."""
    lock = coord.lock("a")
    with lock:
        context = copy_context()
        child = Visitor(lock, "Child", context).entered()
        grandchild = Visitor(lock, "Grandchild", child.context).entered()
        sibling = queued(coord, lock, "Sibling", context)
        child.go()
        assert not sibling.inside.is_set()
        assert line(coord) == ['thread "Sibling"']
        grandchild.go()
        sibling.entered().go()
    assert nothing_left(coord)


def test_L2_a_hold_that_has_ended_lends_nothing(coord: Coordinator) -> None:
    """Whoever was started inside a block that is over is a stranger to the next holder, even the same thread."""
    lock = coord.lock("a")
    with lock:
        stale = copy_context()
    with lock:
        assert in_thread(lambda: stale.run(lambda: lock.acquire(timeout=0))) is False
    with Visitor(lock):
        assert in_thread(lambda: stale.run(lambda: lock.acquire(timeout=0))) is False


def test_L2_an_ended_hold_does_not_hide_the_one_around_it(coord: Coordinator) -> None:
    """Locks released in the order of their taking: what is still held is lent on."""
    a, b, c = coord.lock("a"), coord.lock("b"), coord.lock("c")
    a.acquire()
    b.acquire()
    c.acquire()
    b.release()
    c.release()
    context = copy_context()
    with Visitor(a, "Child", context):
        assert len(inside(coord)) == 2
    a.release()
    assert nothing_left(coord)


def test_L2_many_hand_over_hand_steps_leave_no_chain() -> None:
    """Ended holds are dropped from the chain: it can't grow for ever."""
    with Coordinator() as coord:
        coord.lock("0").acquire()
        for step in range(1, 1000):
            coord.lock(str(step % 2)).acquire()
            coord.lock(str((step - 1) % 2)).release()
        slot: Optional[Slot] = coord._table.slots["1"]
        length = 0
        while slot is not None:
            slot, length = slot.outer, length + 1
        assert length <= 2
        coord.lock("1").release()


@pytest.mark.parametrize("contended", [False, True])
def test_L2_lend_false_turns_lending_off(coord: Coordinator, contended: bool) -> None:
    """A child of such a holder is a stranger; the holder itself enters again."""
    lock = coord.lock("a", lend=False)
    before = Visitor(coord.lock("a")).entered() if contended else None
    if before is not None:
        before.leave.set()
    with lock, coord.lock("a"):
        context = copy_context()
        assert in_thread(lambda: context.run(lambda: coord.lock("a").acquire(timeout=0))) is False
    assert nothing_left(coord)


@pytest.mark.skipif(sys.version_info >= (3, 14), reason="threads inherit their context there")
def test_L2_a_plain_thread_inherits_nothing(coord: Coordinator) -> None:
    """Without its starter's context a thread is a stranger."""
    with coord.lock("a"):
        assert in_thread(lambda: coord.lock("a").acquire(timeout=0)) is False


def test_L2_a_borrower_that_leaves_while_the_lender_leaves_frees_the_lock(coord: Coordinator) -> None:
    """Many times over, in either order."""
    lock = coord.lock("a")
    for _ in range(100):
        lock.acquire()
        child = Visitor(lock, "Child", copy_context()).entered()
        child.leave.set()
        lock.release()
        child.go()
        assert nothing_left(coord)


# -- L3: order ----------------------------------------------------------------------------------------------


def test_L3_waiters_are_served_in_order(coord: Coordinator) -> None:
    """Threads and tasks stand in one line and enter in the order of their coming."""
    lock, order = coord.lock("a"), []

    def by_thread(number: int) -> None:
        with lock:
            order.append(number)

    async def by_task(number: int) -> None:
        async with lock:
            order.append(number)

    async def main() -> None:
        holder = Visitor(lock).entered()
        threads, tasks = [], []
        for number in range(20):
            if number % 2:
                threads += start_all(lambda number=number: by_thread(number))
            else:
                tasks.append(asyncio.ensure_future(by_task(number)))
            await until(lambda number=number: len(line(coord)) == number + 1)
        holder.leave.set()
        await asyncio.gather(*tasks)
        await asyncio.get_running_loop().run_in_executor(None, join_all, threads)

    asyncio.run(main())
    assert order == list(range(20))
    assert nothing_left(coord)


def test_L3_nobody_barges_in(coord: Coordinator) -> None:
    """A release appoints the first in line, before it has woken up: whoever releases can't take it again at once."""
    lock = coord.lock("a")
    lock.acquire()
    waiter = queued(coord, lock)
    lock.release()
    assert lock.acquire(blocking=False) is False
    assert inside(coord) == ['thread "Waiter"']
    waiter.entered().go()


def test_L3_one_who_gave_up_holds_up_nobody(timed: Coordinator, clock: FakeClock) -> None:
    """Whoever leaves the line, from its front or middle, leaves the order of the others as it was."""
    lock, order = timed.lock("a"), []

    def wait(number: int) -> None:
        if lock.acquire(timeout=100 if number % 2 else 5):
            order.append(number)
            lock.release()

    with lock:
        threads = []
        for number in range(6):
            threads += start_all(lambda number=number: wait(number))
            eventually(lambda number=number: len(line(timed)) == number + 1)
        clock.wait_for_sleepers(6)
        clock.advance(5)
        eventually(lambda: len(line(timed)) == 3)
    join_all(threads)
    assert order == [1, 3, 5]
    assert nothing_left(timed)


# -- L4: time -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("timeout", [-1, -0.001, float("nan"), float("-inf")])
def test_L4_a_timeout_that_makes_no_sense_is_refused(coord: Coordinator, timeout: float) -> None:
    """Negative and NaN are no timeouts, wherever one is given."""
    for give in timeouts(coord):
        with pytest.raises(ValueError, match="timeout must be 0"):
            give(timeout)
    assert nothing_left(coord)


@pytest.mark.parametrize("timeout", [True, False, "5", b"5", [1], 1j, object()])
def test_L4_what_is_no_number_is_refused(coord: Coordinator, timeout: Any) -> None:
    """Booleans, strings and the like are no timeouts, wherever one is given."""
    for give in timeouts(coord):
        with pytest.raises(TypeError, match="timeout must be a number"):
            give(timeout)
    assert nothing_left(coord)


def timeouts(coord: Coordinator) -> list[Callable[[Any], Any]]:
    lock, group = coord.lock("a"), coord.lock("a", "b")
    return [
        lambda t: coord.lock("a", timeout=t),
        lambda t: coord.lock("a", "b", timeout=t),
        lambda t: lock.acquire(timeout=t),
        lambda t: lock.acquire(True, t),
        lambda t: group.acquire(timeout=t),
        lambda t: asyncio.run(lock.acquire_async(timeout=t)),
        lambda t: asyncio.run(group.acquire_async(timeout=t)),
        lambda t: Coordinator(lock_timeout=t),
    ]


@pytest.mark.parametrize("timeout", [None, 0, 0.0, 5, 1e300, float("inf"), 10**400])
def test_L4_every_other_number_is_a_timeout(coord: Coordinator, timeout: Any) -> None:
    """However large: it just waits."""
    for give in timeouts(coord)[:3]:
        give(timeout)
    coord.lock("a").release()


def test_L4_a_timeout_and_not_blocking_contradict_each_other(coord: Coordinator) -> None:
    """`acquire(False, 5)` is refused, as in the standard library."""
    for lock in (coord.lock("a"), coord.lock("a", "b")):
        with pytest.raises(ValueError, match="blocking=False"):
            lock.acquire(False, 5)
    assert nothing_left(coord)


@pytest.mark.parametrize("how", ["lock", "group"])
def test_L4_zero_tries_once_and_never_waits(timed: Coordinator, how: str) -> None:
    """Not a moment passes: with `timeout=0` and with `blocking=False`, on threads and loops."""
    free, names = timed.lock("z"), ("a",) if how == "lock" else ("a", "b")
    lock: Any = timed.lock(*names)
    once: Any = timed.lock(*names, timeout=0)

    async def main() -> None:
        assert await lock.acquire_async(timeout=0) is False
        assert await lock.acquire_async(blocking=False) is False
        with pytest.raises(CoordinationTimeoutError, match="is not free"):
            async with once:
                pass
        assert await free.acquire_async(timeout=0) is True
        free.release()

    with Visitor(timed.lock("a")):
        assert lock.acquire(timeout=0) is False
        assert lock.acquire(blocking=False) is False
        with pytest.raises(CoordinationTimeoutError, match="is not free"), once:
            pass
        asyncio.run(main())
        assert line(timed) == []
    with once:
        pass
    assert nothing_left(timed)


def test_L4_a_positive_timeout_waits_no_longer_than_that(timed: Coordinator, clock: FakeClock) -> None:
    """`acquire` tells whether it got the lock: after 5 s no, and yes if it is free before that."""
    lock = timed.lock("a")
    answers: list[bool] = []
    for seconds in (5, 4):
        with Visitor(lock) as holder:
            threads = start_all(lambda: answers.append(attempt(lock, 5)))
            clock.wait_for_sleepers(1)
            clock.advance(4.5 if seconds == 5 else seconds)
            assert threads[0].is_alive()
            if seconds == 5:
                clock.advance(0.5)
                join_all(threads)
            else:
                holder.leave.set()
                join_all(threads)
    assert answers == [False, True]


def test_L4_a_task_waits_no_longer_than_its_timeout(timed: Coordinator, clock: FakeClock) -> None:
    """`acquire_async` and `async with` likewise."""
    lock = timed.lock("a")

    async def enter() -> None:
        async with timed.lock("a", timeout=5):
            raise AssertionError("it is not free")

    async def enter_patiently() -> bool:
        async with timed.lock("a", timeout=6):
            return True

    async def main() -> None:
        with Visitor(lock) as holder:
            tasks = [asyncio.ensure_future(lock.acquire_async(timeout=5)), asyncio.ensure_future(enter())]
            patient = asyncio.ensure_future(enter_patiently())
            await until(lambda: len(line(timed)) == 3)
            clock.advance(5)
            assert await tasks[0] is False
            with pytest.raises(CoordinationTimeoutError, match="within 5 s"):
                await tasks[1]
            holder.leave.set()
            assert await patient is True

    asyncio.run(main())


def test_L4_the_coordinators_timeout_is_for_those_who_name_none(clock: FakeClock) -> None:
    """`lock_timeout` holds for `with` and `acquire`; a handle's or a call's own goes before it, None included."""
    with Coordinator(lock_timeout=0, clock=clock) as coord:
        with Visitor(coord.lock("a")):
            assert coord.lock("a").acquire() is False
            with pytest.raises(CoordinationTimeoutError):
                coord.lock("a").__enter__()
            with pytest.raises(CoordinationTimeoutError):
                coord.lock("a", "b").__enter__()
            waiter = queued(coord, coord.lock("a", timeout=None))
        waiter.entered().go()


def test_L4_the_error_names_lock_holder_since_when_and_how_many_wait(timed: Coordinator, clock: FakeClock) -> None:
    """What, who, for how long, how many: in the sentence and in the fields."""
    lock = timed.lock("customer_123")

    @timed.coordinate("writer", lock_name="customer_123")
    def write() -> None:
        entered.set()
        leave.wait(30)

    entered, leave = threading.Event(), threading.Event()
    thread = threading.Thread(target=write, name="Writer-1", daemon=True)
    thread.start()
    assert entered.wait(10)
    clock.advance(7)
    others = start_all(lambda: attempt(lock, 500))
    eventually(lambda: line(timed, "customer_123"))
    with pytest.raises(CoordinationTimeoutError) as caught:
        timed.lock("customer_123", timeout=0).__enter__()
    error = caught.value
    for fact in ("'customer_123'", "agent 'writer'", 'thread "Writer-1"', "held for 7 s", "1 other waiting"):
        assert fact in str(error)
    assert isinstance(error, TimeoutError)
    assert (error.name, error.timeout, error.held_for, error.waiting) == ("customer_123", 0, 7, 1)
    assert "writer" in str(error.holder)
    leave.set()
    join_all([thread, *others])


# -- L6: several at once ------------------------------------------------------------------------------------


def test_L6_a_group_takes_all_in_one_canonical_order(coord: Coordinator) -> None:
    """Whatever the order of naming, and a name twice counts once."""
    one, other = coord.lock("b", "a", "c", "a"), coord.lock("c", "b", "a")
    assert isinstance(one, LockGroup)
    assert one.names == other.names == ("a", "b", "c")
    with one as slots:
        assert [slot.name for slot in slots] == ["a", "b", "c"]
        assert [lock.name for lock in coord.snapshot().locks] == ["a", "b", "c"]
        assert [lock.holders[0].entries for lock in coord.snapshot().locks] == [1, 1, 1]
        assert one.locked()
        with other:
            assert [lock.holders[0].entries for lock in coord.snapshot().locks] == [2, 2, 2]
    assert nothing_left(coord)


def test_L6_two_groups_named_in_opposite_orders_never_deadlock(coord: Coordinator) -> None:
    """Threads and tasks take them crosswise, and all end."""
    count = [0]

    def by_thread(*names: str) -> None:
        for _ in range(200):
            with coord.lock(*names):
                count[0] += 1

    async def by_tasks() -> None:
        await asyncio.gather(by_task("a", "b", "c"), by_task("c", "b"), by_task("b", "a"))

    async def by_task(*names: str) -> None:
        for _ in range(100):
            async with coord.lock(*names):
                count[0] += 1
                await asyncio.sleep(0)

    join_all(start_all(lambda: by_thread("a", "b"), lambda: by_thread("c", "b", "a"), lambda: asyncio.run(by_tasks())))
    assert count[0] == 700  # every count is made under "b"
    assert nothing_left(coord)


@pytest.mark.parametrize("how", ["acquire", "with", "acquire_async", "async with"])
@pytest.mark.parametrize("timeout", [0, 5.0])
def test_L6_a_group_that_gets_not_all_keeps_none(
    timed: Coordinator, clock: FakeClock, how: str, timeout: float
) -> None:
    """The timeout covers the whole; the error names the lock that was missing, and the first locks are free again."""
    group = timed.lock("a", "b", "c", timeout=timeout)

    async def by_task() -> bool:
        if how == "acquire_async":
            return await group.acquire_async(timeout=timeout)
        async with group:
            return True

    def enter() -> bool:
        if "async" in how:
            return asyncio.run(by_task())
        if how == "acquire":
            return group.acquire(timeout=timeout)
        with group:
            return True

    outcome: list[Any] = []

    def attempt() -> None:
        try:
            outcome.append(enter())
        except CoordinationTimeoutError as error:
            outcome.append(error.name)

    a, b = Visitor(timed.lock("a")).entered(), Visitor(timed.lock("b")).entered()
    threads = start_all(attempt)
    if timeout:
        eventually(lambda: line(timed, "a"))
        clock.wait_for_sleepers(1)
        clock.advance(3)
        a.go()
        eventually(lambda: line(timed, "b"))
        clock.wait_for_sleepers(1)
        clock.advance(2)
    join_all(threads)
    missing = "b" if timeout else "a"
    assert outcome == [False if "acquire" in how else missing]
    b.go()
    if not timeout:
        a.go()
    assert nothing_left(timed)


def test_L6_a_cancelled_group_keeps_none(coord: Coordinator) -> None:
    """Cancelled while it waits for the second, it gives the first back."""

    async def take() -> None:
        async with coord.lock("a", "b"):
            raise AssertionError("b is not free")

    async def main() -> None:
        with Visitor(coord.lock("b")):
            task = asyncio.ensure_future(take())
            await until(lambda: line(coord, "b"))
            assert coord.lock("a").locked()
            task.cancel()
            await asyncio.wait([task])
            assert not coord.lock("a").locked()

    asyncio.run(main())
    assert nothing_left(coord)


def test_L6_releasing_a_group_that_is_not_all_held_changes_nothing(coord: Coordinator) -> None:
    """One lock missing: an error, and the others stay held."""
    group = coord.lock("a", "b")
    assert group.acquire()
    coord.lock("b").release()
    with pytest.raises(NotHeldError):
        group.release()
    assert coord.lock("a").locked()
    coord.lock("a").release()


def test_L8_a_group_whose_block_lost_one_lock_frees_the_others(coord: Coordinator) -> None:
    """The block's end says what is wrong, and leaves nothing held."""
    with pytest.raises(NotHeldError), coord.lock("a", "b", "c"):
        coord.lock("b").release()
    assert nothing_left(coord)


# -- L7: whoever stops waiting leaves nothing behind -------------------------------------------------------


def test_L7_a_cancelled_waiter_leaves_nothing_behind(coord: Coordinator) -> None:
    """It is out of the line, and the next in line gets the lock."""
    lock = coord.lock("a")

    async def main() -> None:
        with Visitor(lock) as holder:
            first, second = (asyncio.ensure_future(lock.acquire_async()) for _ in range(2))
            await until(lambda: len(line(coord)) == 2)
            first.cancel()
            await asyncio.wait([first])
            assert len(line(coord)) == 1
            holder.leave.set()
            assert await second

    asyncio.run(main())


def test_L7_giving_up_does_not_walk_the_line(coord: Coordinator, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever is cancelled finds its place at once: a thousand cancellations don't cost a million steps."""
    lock, steps = coord.lock("a"), [0]
    walk = WaitQueue.__iter__

    def counted(line: Any) -> Iterator[Any]:
        for waiter in walk(line):
            steps[0] += 1
            yield waiter

    async def main() -> None:
        with Visitor(lock):
            tasks = [asyncio.ensure_future(lock.acquire_async()) for _ in range(300)]
            await until(lambda: len(line(coord)) == 300)
            steps[0] = 0
            with monkeypatch.context() as patched:
                patched.setattr(WaitQueue, "__iter__", counted)
                for task in tasks:
                    task.cancel()
                await asyncio.wait(tasks)

    asyncio.run(main())
    assert steps[0] <= 5 * 300
    assert nothing_left(coord)


@pytest.mark.parametrize("first", ["release", "cancel"])
def test_L7_a_hand_over_that_meets_a_cancellation_is_passed_on(coord: Coordinator, first: str) -> None:
    """Release and cancellation in one turn of the loop, in either order: the next in line gets the lock."""
    lock = coord.lock("a")

    async def main() -> None:
        await lock.acquire_async()
        fresh = Context()
        doomed, heir = (fresh.run(asyncio.ensure_future, lock.acquire_async()) for _ in range(2))
        await until(lambda: len(line(coord)) == 2)
        for act in [lock.release, doomed.cancel] if first == "release" else [doomed.cancel, lock.release]:
            act()
        assert await asyncio.wait_for(heir, 10)
        assert doomed.cancelled()
        assert len(inside(coord)) == 1

    asyncio.run(main())
    assert len(inside(coord)) == 1  # the heir's task has ended without releasing: shown, and not freed


class Taken:
    """A table's mutex that somebody else has just now: who doesn't wait for it, doesn't get it."""

    def __init__(self, mutex: Any) -> None:
        self._mutex = mutex
        self.release, self._is_owned = mutex.release, mutex._is_owned

    def acquire(self, blocking: bool = True) -> bool:
        return blocking and self._mutex.acquire()

    def __enter__(self) -> None:
        self.acquire()

    def __exit__(self, *error: Any) -> None:
        self.release()


def test_L7_a_task_that_gave_up_its_turn_is_not_inside_by_it(coord: Coordinator) -> None:
    """It goes on when the turn has been passed on: asking again before, it would have come in beside the next."""
    lock = coord.lock("a")
    holder = Visitor(lock).entered()
    others: list[Visitor] = []
    coord._table._mutex = Taken(coord._table._mutex)

    async def main() -> bool:
        asyncio.get_running_loop().call_soon(meet, asyncio.current_task())
        with pytest.raises(asyncio.CancelledError):
            await lock.acquire_async()
        return await lock.acquire_async(timeout=0)

    def meet(task: Any) -> None:
        others.append(queued(coord, lock))
        holder.go()
        task.cancel()

    assert not asyncio.run(main())
    others[0].entered().go()
    assert nothing_left(coord)


def test_L7_a_hand_over_that_meets_a_timeout_is_kept_or_passed_on(timed: Coordinator, clock: FakeClock) -> None:
    """Release and the end of the time in one moment: the lock is either got or free, never lost."""
    lock = timed.lock("a")

    async def main(first: str) -> None:
        await lock.acquire_async()
        waiter = Context().run(asyncio.ensure_future, attempt())
        await until(lambda: line(timed))
        for act in [lock.release, lambda: clock.advance(5)][:: 1 if first == "release" else -1]:
            act()
        assert await asyncio.wait_for(waiter, 10) is True  # its turn came before it looked

    async def attempt() -> bool:
        got = await lock.acquire_async(timeout=5)
        if got:
            lock.release()
        return got

    for first in ("release", "time"):
        asyncio.run(main(first))
        assert nothing_left(timed)


@pytest.mark.skipif(not hasattr(signal, "pthread_kill"), reason="no signals to threads")
def test_L7_ctrl_c_in_a_waiting_main_thread_leaves_nothing_behind(coord: Coordinator) -> None:
    """A real SIGINT ends the wait as KeyboardInterrupt."""
    lock, main = coord.lock("a"), threading.get_ident()

    def interrupt() -> None:
        eventually(lambda: line(coord))
        signal.pthread_kill(main, signal.SIGINT)

    with Visitor(lock):
        threads = start_all(interrupt)
        with pytest.raises(KeyboardInterrupt), lock:
            pass
        join_all(threads)
        assert line(coord) == []
    assert nothing_left(coord)


class InterruptedClock(FakeClock):
    """Its waits are interrupted by Ctrl-C, after something has happened."""

    def __init__(self, happening: Callable[[], Any]) -> None:
        super().__init__()
        self.happening = happening

    def wait(self, lock: Any, timeout: Optional[float]) -> bool:
        self.happening()
        raise KeyboardInterrupt


def test_L7_ctrl_c_that_meets_a_hand_over_passes_it_on() -> None:
    """Interrupted with the turn already in its hands, the thread gives it to the next."""
    clock = InterruptedClock(lambda: holder.go())
    with Coordinator(clock=clock) as coord:
        lock = coord.lock("a")
        holder = Visitor(lock).entered()
        with pytest.raises(KeyboardInterrupt):
            lock.acquire()
        assert nothing_left(coord)


class Interruption:
    """A wait of this thread's, for a lock or a limit, interrupted at such a function call of ours; a stranger behind.

    With `again` it is inside already, and enters again.
    """

    def __init__(self, limit: Optional[Limit], call: int, again: bool) -> None:
        self.call = call
        self.seen = 0
        self.place: Optional[str] = None
        self.me = current_owner()
        self.holder, self.other = (ThreadOwner(threading.current_thread()) for _ in range(2))
        interruption = self

        class HandingOver(FakeClock):
            def wait(self, lock: Any, timeout: Optional[float]) -> bool:
                sys.settrace(None)  # what happens now happens elsewhere
                interruption.turn()
                sys.settrace(interruption.trace)
                return bool(lock.acquire())

        self.clock = HandingOver()
        self.coord = Coordinator(clock=self.clock, slow_after=None)
        self.table = self.coord._table
        if limit is not None:
            self.table.limit("a", limit)
        self.held = self.enter(self.me) if again else None
        self.slot = self.enter(self.holder)
        self.behind: Any = None

    def claim(self, me: Any) -> Slot:
        return self.table.claim(Door(self.table, "a", How(tokens=1)), me)

    def enter(self, me: Any) -> Optional[Slot]:
        return Context().run(lambda: self.table.acquire(self.claim(me), me, None))

    def turn(self) -> None:
        """The stranger behind comes, the holder leaves, and time passes."""
        if self.behind is None:
            bell = SimpleNamespace(ring=lambda: True, loop=None)
            self.behind, _ = Context().run(lambda: self.table._decide(self.claim(self.other), self.other, None, bell))
            assert self.slot is not None
            self.table.free(self.slot, self.holder)
            self.pass_time()

    def pass_time(self) -> None:
        self.clock.advance(60)
        self.coord.snapshot()

    def trace(self, frame: Any, event: str, arg: Any) -> Any:
        code = frame.f_code
        if code.co_name == "wait" or not code.co_filename.startswith(PACKAGE):
            return None
        if self.seen or any(entry.line for entry in self.table.entries.values()):  # from joining the line on
            self.seen += 1
            if self.seen == self.call:
                self.place = code.co_name
                raise KeyboardInterrupt
        return None

    def play(self) -> None:
        got = None
        before = sys.gettrace()
        sys.settrace(self.trace)
        with contextlib.suppress(KeyboardInterrupt):
            got = self.enter(self.me)
        sys.settrace(before)
        if got is not None:
            self.table.free(got, self.me)
        self.turn()
        self.pass_time()
        told = f"interrupted in {self.place} ({self.call})"
        assert self.behind.served, told
        self.table.all_taken((self.behind.claim,))
        self.table.free(self.behind.claim, self.other)
        if self.held is not None:
            assert self.held.depth == 1, told
            self.table.free(self.held, self.me)
        self.pass_time()
        assert nothing_left(self.coord), told
        for limit in self.coord.snapshot().limits:
            assert (limit.requests_used, limit.tokens_used) == (0, 0), told


@pytest.mark.parametrize(
    ("limit", "again"),
    [
        (None, False),
        (Limit(concurrency=1), False),
        (Limit(requests=1, per=50), False),
        (Limit(tokens=1, per=50), False),
        (Limit(concurrency=2, requests=2, per=50), True),
    ],
)
def test_L7_ctrl_c_at_any_call_within_a_wait_leaves_nothing_behind(limit: Optional[Limit], again: bool) -> None:
    """From joining the line to having the lock: no ghost stays, nothing is lost, and the one behind gets its turn."""
    for call in range(1, 400):
        interruption = Interruption(limit, call, again)
        interruption.play()
        if interruption.place is None:
            break
    assert 3 < call < 399


def test_L7_ctrl_c_when_the_last_of_several_has_come_lets_go_of_all(
    coord: Coordinator, monkeypatch: pytest.MonkeyPatch
) -> None:
    """They are counted as entered then, which may have to wait for others."""

    def interrupt(slots: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(coord._table, "all_taken", interrupt)
    with pytest.raises(KeyboardInterrupt):
        coord.lock("a", "b").acquire()
    assert nothing_left(coord)


@pytest.mark.parametrize("behind", [1, 2])
@pytest.mark.parametrize("kind", ["threads", "tasks"])
def test_L7_ctrl_c_while_the_lock_is_handed_over_loses_no_turn(kind: str, behind: int) -> None:
    """Wherever it comes, the lock has been handed over or is still held; all in line have their turn in the end."""
    step, hit = 0, True
    while hit:
        coord = Coordinator()
        table, lock = coord._table, coord.lock("a")
        slots: list[Slot] = []
        waiters: list[Any] = []
        rung: list[Any] = []

        def come(
            table: Any = table, lock: Any = lock, slots: Any = slots, waiters: Any = waiters, rung: Any = rung
        ) -> None:
            slots.append(lock.__enter__())
            for number in range(behind):
                me = ThreadOwner(threading.current_thread())
                bell = SimpleNamespace(
                    ring=lambda number=number: rung.append(number) or True, loop=None if kind == "threads" else me
                )
                claim = Context().run(table.claim, Door(table, "a"), me)
                waiters.append(Context().run(table._decide, claim, me, None, bell)[0])

        hit = interrupted(step, functools.partial(lock.__exit__, None, None, None), come)
        if slots[0].owner is not None:
            assert table.slots["a"] is slots[0], step
            table.free(slots[0], slots[0].owner)
        for number, waiter in enumerate(waiters):
            assert waiter.served, step
            assert number in rung, step
            table.free(waiter.claim, waiter.owner)
        assert nothing_left(coord)
        coord.close()
        step += 1
    assert step > 4


def test_L7_a_waiter_on_a_closed_loop_is_passed_over(coord: Coordinator) -> None:
    """Its loop was closed while it waited: its turn goes to the next in line."""
    lock = coord.lock("a")
    with lock:
        tasks = [closed_loop(lock) for _ in range(3)]
        waiter = queued(coord, lock)
        assert len(line(coord)) == 4
    waiter.entered().go()
    assert nothing_left(coord)
    drop(tasks)


def test_L8_who_is_late_to_wake_a_task_does_not_pass_on_the_turn_that_it_took(
    coord: Coordinator, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two threads ring, and the task, woken by the first, has ended with its loop when the second does."""
    lock = coord.lock("a")
    ring = TaskBell.ring
    holder = Visitor(lock).entered()
    tasks = start_all(lambda: asyncio.run(lock.acquire_async()))
    eventually(lambda: line(coord))

    def late(bell: TaskBell) -> bool:
        monkeypatch.undo()
        join_all(start_all(coord._table._act))
        join_all(tasks)
        return ring(bell)

    monkeypatch.setattr(TaskBell, "ring", late)
    holder.go()
    assert len(inside(coord)) == 1  # it has ended without releasing: shown, and not freed


def test_L7_very_many_waiters_on_a_closed_loop_are_passed_over(coord: Coordinator) -> None:
    """Two thousand of them are passed over as well as one."""
    lock = coord.lock("a")
    loop = asyncio.new_event_loop()
    with lock:
        tasks = [Context().run(loop.create_task, lock.acquire_async()) for _ in range(2000)]
        loop.run_until_complete(asyncio.sleep(0))
        loop.close()
        waiter = queued(coord, lock)
    waiter.entered().go()
    assert nothing_left(coord)
    drop(tasks)


# -- L8: releasing ------------------------------------------------------------------------------------------


def test_L8_releasing_what_nobody_holds_raises(coord: Coordinator) -> None:
    """The error says so, and nothing is changed."""
    with pytest.raises(NotHeldError, match="nobody holds it") as caught:
        coord.lock("a").release()
    assert (caught.value.name, caught.value.holder) == ("a", None)
    assert nothing_left(coord)


@pytest.mark.parametrize("lent", [False, True])
def test_L8_releasing_what_another_holds_raises_and_changes_nothing(coord: Coordinator, lent: bool) -> None:
    """From a thread, from a task, from the holder's own child: the lock stays its holder's."""
    lock = coord.lock("a")
    holder = Visitor(lock, "Holder").entered()
    waiter = queued(coord, lock)
    context = holder.context if lent else Context()
    assert context is not None

    async def by_task() -> None:
        with pytest.raises(NotHeldError, match='held by thread "Holder"'):
            lock.release()

    def by_thread() -> None:
        with pytest.raises(NotHeldError, match='held by thread "Holder"') as caught:
            lock.release()
        assert caught.value.holder == 'thread "Holder"'

    context.run(by_thread)
    context.run(asyncio.run, by_task())
    assert inside(coord) == ['thread "Holder"']
    assert line(coord) == ['thread "Waiter"']
    holder.go()
    waiter.entered().go()


def test_L8_releasing_once_too_often_raises(coord: Coordinator) -> None:
    """Each entry can be ended once."""
    lock = coord.lock("a")
    lock.acquire()
    lock.acquire()
    lock.release()
    lock.release()
    with pytest.raises(NotHeldError):
        lock.release()


def test_L8_a_block_that_was_released_inside_does_not_free_anothers_hold(coord: Coordinator) -> None:
    """Its end raises, and whoever took the lock in between keeps it."""
    lock = coord.lock("a")
    visitors: list[Visitor] = []

    def misuse() -> None:
        with lock:
            lock.release()
            visitors.append(Visitor(lock, "Next").entered())

    with pytest.raises(NotHeldError):
        misuse()
    for visitor in visitors:
        assert inside(coord) == ['thread "Next"']
        visitor.go()
    assert nothing_left(coord)


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt, GeneratorExit, asyncio.CancelledError])
@pytest.mark.parametrize("contended", [False, True])
def test_L8_whatever_ends_the_block_releases_it(
    coord: Coordinator, error: type[BaseException], contended: bool
) -> None:
    """An exception of any kind goes on unchanged, and the lock is free, or the next one's."""
    for lock in (coord.lock("a"), coord.lock("a", "b")):
        assert end_block(lock, coord, error("stop"), contended)
        assert nothing_left(coord)


def end_block(lock: Any, coord: Coordinator, raised: BaseException, contended: bool) -> bool:
    """Whether the very exception came out; then whoever waited enters and leaves."""
    visitors: list[Visitor] = []
    caught: Optional[BaseException] = None
    try:
        with lock:
            visitors += [queued(coord, coord.lock("a"))] if contended else []
            raise raised
    except BaseException as error:
        caught = error
    for visitor in visitors:
        visitor.entered().go()
    return caught is raised


def test_L8_a_cancelled_block_is_released(coord: Coordinator) -> None:
    """A task cancelled inside its block, by `return` and by `break` too."""
    lock = coord.lock("a")

    async def hold() -> None:
        async with lock:
            await asyncio.sleep(1000)

    async def main() -> None:
        task = asyncio.ensure_future(hold())
        await until(lock.locked)
        task.cancel()
        await asyncio.wait([task])
        assert not lock.locked()

    def leave() -> None:
        while True:
            with lock:
                break
        with lock:
            return

    asyncio.run(main())
    leave()
    assert nothing_left(coord)


@pytest.mark.parametrize("contended", [False, True])
def test_L8_an_async_generator_closed_by_another_task_is_released(coord: Coordinator, contended: bool) -> None:
    """A block inside it ends in a task that never entered: the block's entry ends all the same."""
    lock = coord.lock("a")

    async def stream() -> Any:
        async with lock:
            yield 1

    async def first(items: Any) -> None:
        await items.__anext__()

    async def main() -> None:
        items = stream()
        await asyncio.ensure_future(first(items))
        waiter = asyncio.ensure_future(lock.acquire_async()) if contended else None
        if waiter is not None:
            await until(lambda: line(coord))
        await asyncio.ensure_future(items.aclose())
        if waiter is not None:
            assert await asyncio.wait_for(waiter, 10)
        else:
            assert nothing_left(coord)

    asyncio.run(main())


def test_L8_a_generator_collected_on_another_thread_is_released(coord: Coordinator) -> None:
    """A plain generator with a block inside, thrown away elsewhere."""
    lock = coord.lock("a")

    def stream() -> Iterator[int]:
        with lock:
            yield 1

    items = [stream()]
    assert next(items[0]) == 1
    assert lock.locked()
    in_thread(items.clear)
    gc.collect()
    assert nothing_left(coord)


def test_L8_a_generator_closed_by_one_who_released_by_hand_before_is_released(coord: Coordinator) -> None:
    """That it has used `acquire` and `release` on the same lock makes it no less the one who ends this block."""
    lock = coord.lock("a")
    assert lock.acquire()
    lock.release()

    def stream() -> Iterator[int]:
        with lock:
            yield 1

    items = stream()
    assert in_thread(lambda: next(items)) == 1
    items.close()
    assert nothing_left(coord)


def test_L8_an_orphaned_hold_is_shown_and_not_freed(coord: Coordinator) -> None:
    """A thread and a task that ended without releasing: the lock stays, the snapshot and the error say so."""
    join_all(start_all(coord.lock("a").acquire))
    asyncio.run(coord.lock("b").acquire_async())
    assert [lock.holders[0].orphaned for lock in coord.snapshot().locks] == [True, True]
    for name in ("a", "b"):
        with pytest.raises(CoordinationTimeoutError, match="has ended without releasing"):
            coord.lock(name, timeout=0).__enter__()
        with pytest.raises(NotHeldError):
            coord.lock(name).release()
        assert coord.lock(name).locked()


def test_L8_a_later_thread_does_not_inherit_an_orphaned_hold(coord: Coordinator) -> None:
    """Thread numbers are used again; the lock of a dead thread stays closed to all that follow."""
    join_all(start_all(coord.lock("a").acquire))
    for _ in range(50):
        assert in_thread(lambda: coord.lock("a").acquire(timeout=0)) is False


# -- L9, L10, L11, L13 --------------------------------------------------------------------------------------


def test_L9_a_name_that_nobody_uses_costs_nothing(coord: Coordinator) -> None:
    """After very many names, quick and slow, lent and waited for, timed out and refused, the table is empty."""
    for number in range(20_000):
        with coord.lock(f"name-{number}"):
            pass
    with coord.lock("a"):
        for number in range(100):
            assert in_thread(lambda: coord.lock("a").acquire(timeout=0)) is False
            with coord.lock(f"x{number}", f"y{number}"), coord.lock(f"z{number}", lend=False):
                pass
    assert nothing_left(coord)
    assert len(coord._handles) <= 1024


def test_L10_a_handle_is_cheap_and_shared(coord: Coordinator) -> None:
    """The same name gives the same lock, from whatever handle; one handle serves all threads and tasks."""
    one, other = coord.lock("a"), Lock(coord._table, "a")
    assert coord.lock("a") is one
    assert one.name == other.name == "a"
    one.acquire()
    assert other.locked()
    assert "locked" in repr(other)
    other.release()
    assert repr(one) == "<Lock 'a'>"
    assert repr(coord.lock("b", "a")) == "<LockGroup 'a', 'b'>"
    count = [0]

    def by_thread() -> None:
        for _ in range(100):
            with one:
                count[0] += 1

    async def by_task() -> None:
        for _ in range(100):
            async with one:
                count[0] += 1

    join_all(start_all(by_thread, by_thread, lambda: asyncio.run(by_task())))
    assert count == [300]


def test_L10_a_handle_is_a_context_manager_for_whoever_asks_its_class(coord: Coordinator) -> None:
    """`ExitStack` and `AsyncExitStack` take it as `with` does; so do checks for context managers of both kinds."""
    lock = coord.lock("a")

    async def main() -> None:
        async with contextlib.AsyncExitStack() as stack:
            slot = await stack.enter_async_context(lock)
            assert slot.name == "a"
            assert lock.locked()
        assert not lock.locked()

    asyncio.run(main())
    with contextlib.ExitStack() as stack:
        assert stack.enter_context(lock).name == "a"
        assert lock.locked()
    assert not lock.locked()
    assert isinstance(lock, contextlib.AbstractContextManager)
    assert isinstance(lock, contextlib.AbstractAsyncContextManager)


def test_L10_a_handle_is_the_same_before_and_after_its_first_async_with(coord: Coordinator) -> None:
    """It gets what `async with` needs when that is used first, even within its own `with`; an exit says nothing."""
    lock = coord.lock("a")

    async def main() -> None:
        with lock as slot:
            async with lock as again:
                assert again is slot

    async def by_hand() -> None:
        for _ in range(2):
            slot = await lock.__aenter__()
            assert lock.locked()
            assert await lock.__aexit__(ValueError, ValueError("x"), None) is None  # type: ignore[func-returns-value]
            assert slot.owner is None

    asyncio.run(main())
    asyncio.run(by_hand())
    assert isinstance(lock, Lock)
    assert coord.lock("a") is lock


def test_L10_a_block_yields_its_slot(coord: Coordinator) -> None:
    """`with coord.lock(name) as slot` gives the held place, which tells its name and whether it is over."""
    with coord.lock("a") as slot:
        assert isinstance(slot, Slot)
        assert (slot.name, slot.agent) == ("a", None)
        assert "MainThread" in repr(slot)
    assert repr(slot) == "<Slot 'a' released>"


@pytest.mark.parametrize(
    ("name", "error"), [("", ValueError), (None, TypeError), (b"a", TypeError), (5, TypeError), ([], TypeError)]
)
def test_L10_a_name_is_a_non_empty_string(coord: Coordinator, name: Any, error: type[Exception]) -> None:
    """Anything else is refused, alone and in a group."""
    for names in ([name], ["a", name], [name, "a"]):
        with pytest.raises(error, match="lock's name must"):
            coord.lock(*names)


def test_L11_a_snapshot_shows_every_holder_and_waiter(timed: Coordinator, clock: FakeClock) -> None:
    """Who, since when, borrowed or not, in which order; frozen; empty when idle."""
    lock = timed.lock("a")
    assert timed.snapshot().locks == ()
    with lock, lock:
        clock.advance(3)
        child = Visitor(lock, "Child", copy_context()).entered()
        threads = start_all(lambda: lock.acquire(timeout=100) and lock.release())
        eventually(lambda: line(timed))
        clock.advance(4)
        second = queued(timed, lock, "Second")
        (info,) = timed.snapshot().locks
        assert info.name == "a"
        held = [(h.who, h.held_for, h.entries, h.borrowed, h.orphaned, h.agent) for h in info.holders]
        assert held == [
            ('thread "MainThread"', 7, 2, False, False, None),
            ('thread "Child"', 4, 1, True, False, None),
        ]
        assert [(w.waiting_for, w.timeout, w.agent) for w in info.waiters] == [(4, 100, None), (0, None, None)]
        assert info.waiters[1].who == 'thread "Second"'
        for frozen in (info, info.holders[0], info.waiters[0], timed.snapshot()):
            with pytest.raises(AttributeError):
                frozen.name = "b"  # type: ignore[union-attr]
        assert isinstance(info.holders, tuple)
    child.go()
    second.entered().go()
    join_all(threads)
    assert timed.snapshot().locks == ()


@pytest.mark.parametrize("names", [("a",), ("a", "b")])
def test_L13_async_with_outside_asyncio_raises(coord: Coordinator, names: tuple[str, ...]) -> None:
    """Driven by something that is no asyncio task, it refuses and takes nothing."""
    lock: Any = coord.lock(*names)

    async def block() -> None:
        async with lock:
            pass

    for make in (block, lock.acquire_async):
        coroutine = make()
        with pytest.raises(RuntimeError, match="asyncio task"):
            coroutine.send(None)
    assert nothing_left(coord)


# -- the protocol, forced into its corners ------------------------------------------------------------------


class Hooks:
    """What happens once, just before or after an access to the table's dicts."""

    def __init__(self) -> None:
        self.todo: dict[tuple[str, str, str], Callable[[], Any]] = {}

    def at(self, when: str, which: str, access: str, call: Callable[[], Any]) -> None:
        self.todo[when, which, access] = call

    def run(self, when: str, which: str, access: str) -> None:
        call = self.todo.pop((when, which, access), None)
        if call is not None:
            call()


class Hooked(dict):  # type: ignore[type-arg]
    hooks: Hooks
    which: str

    def _do(self, access: str, *args: Any) -> Any:
        self.hooks.run("before", self.which, access)
        result = getattr(dict, access)(self, *args)
        self.hooks.run("after", self.which, access)
        return result

    def setdefault(self, *args: Any) -> Any:
        return self._do("setdefault", *args)

    def __contains__(self, key: object) -> bool:
        return bool(self._do("__contains__", key))

    def __setitem__(self, *args: Any) -> None:
        self._do("__setitem__", *args)

    def __delitem__(self, *args: Any) -> None:
        self._do("__delitem__", *args)


@pytest.fixture
def hooks() -> Hooks:
    return Hooks()


@pytest.fixture
def hooked(hooks: Hooks) -> Coordinator:
    """A coordinator with hooks in its lock table."""
    which = iter(["slots", "entries"])

    def storage() -> Any:
        made = Hooked()
        made.hooks, made.which = hooks, next(which)
        return made

    coordinator = Coordinator()
    coordinator._table = LockTable(FakeClock(), slow_after=None, storage=storage)  # type: ignore[arg-type]
    del coordinator.lock  # the short way, to the table that was there
    return coordinator


@pytest.mark.parametrize("when", ["before", "after"])
def test_L3_a_waiter_that_comes_while_the_holder_leaves_is_not_forgotten(
    hooked: Coordinator, hooks: Hooks, when: str
) -> None:
    """It joins the line after the holder has looked for one: before it has left, or just after."""
    lock = hooked.lock("a")
    came: list[Visitor] = []

    def come() -> None:
        came.append(Visitor(lock))
        eventually(lambda: line(hooked) if when == "before" else came[0].inside.is_set())

    lock.acquire()
    hooks.at(when, "slots", "__delitem__", come)
    lock.__exit__(None, None, None)
    came[0].entered().go()
    assert nothing_left(hooked)


def test_L3_a_newcomer_that_finds_the_name_free_lets_those_in_line_pass(hooked: Coordinator, hooks: Hooks) -> None:
    """It takes the name in the moment between the holder's leaving and the hand-over, sees the line and undoes it."""
    lock = hooked.lock("a")
    came: list[Visitor] = []
    answers: list[bool] = []
    lock.acquire()
    hooks.at("before", "slots", "__delitem__", lambda: came.append(queued(hooked, lock)))
    hooks.at("after", "slots", "__delitem__", lambda: answers.append(in_thread(lambda: lock.acquire(timeout=0))))
    lock.__exit__(None, None, None)
    assert answers == [False]
    came[0].entered().go()
    assert nothing_left(hooked)


def test_L1_a_newcomer_that_takes_a_lent_name_is_put_out_again(hooked: Coordinator, hooks: Hooks) -> None:
    """The holder leaves the quick way while a borrower enters, a newcomer takes the name: it waits for the borrower."""
    lock = hooked.lock("a")
    lock.acquire()
    context = copy_context()
    children: list[Visitor] = []
    strangers: list[Visitor] = []
    hooks.at("before", "slots", "__delitem__", lambda: children.append(Visitor(lock, "Child", context).entered()))
    hooks.at("after", "slots", "__delitem__", lambda: strangers.append(queued(hooked, lock, "Stranger")))
    lock.__exit__(None, None, None)
    assert inside(hooked) == ['thread "Child"']
    assert line(hooked) == ['thread "Stranger"']
    children[0].go()
    strangers[0].entered().go()
    assert nothing_left(hooked)


@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize("contended", [False, True])
def test_L7_ctrl_c_in_the_moment_of_taking_leaves_nothing_behind(
    hooked: Coordinator, hooks: Hooks, when: str, contended: bool
) -> None:
    """Raised just before the name is taken or just after: it is free, or goes on to the one in line."""
    lock = hooked.lock("a")
    came: list[Visitor] = []

    def interrupt() -> None:
        if contended and when == "after":
            came.append(queued(hooked, lock))
        raise KeyboardInterrupt

    hooks.at(when, "slots", "setdefault", interrupt)
    with pytest.raises(KeyboardInterrupt):
        lock.__enter__()
    for visitor in came:
        visitor.entered().go()
    assert nothing_left(hooked)
    assert lock.acquire(timeout=0)
    lock.release()


class Meanwhile:
    """A table's mutex: whenever somebody is inside, somebody else puts a chore aside."""

    def __init__(self, table: Any) -> None:
        self._table = table
        self._mutex = table._mutex
        self.acquire, self.release, self._is_owned = self._mutex.acquire, self._mutex.release, self._mutex._is_owned
        self.asked = self.done = 0

    def _ask(self) -> None:
        self.asked += 1
        self._table._chores.append(self._do)
        self._table._act()

    def _do(self) -> None:
        self.done += 1

    def __enter__(self) -> None:
        self._mutex.acquire()
        join_all(start_all(self._ask))

    def __exit__(self, *error: Any) -> None:
        self._mutex.release()


STAYS: dict[str, Callable[[Coordinator], Any]] = {
    "enters a limit": lambda coord: attempt(coord.lock("api")),
    "looks at a limit": lambda coord: coord.lock("api").locked(),
    "declares": lambda coord: coord.limit("api", requests=1),
    "is isolated": lambda coord: coord._table.declared(),
    "is isolated no more": lambda coord: coord._table.unlimit("api"),
    "holds back": lambda coord: coord._table.hold_back("api", 0),
    "looks": lambda coord: coord.snapshot(),
    "asks for its slot": lambda coord: coord._table.holds("api", current_owner()),
    "finds nobody to hand over to": lambda coord: coord._table.hand_over(coord.lock("a").__enter__()),
}


@pytest.mark.parametrize("stay", STAYS)
def test_L7_whoever_was_in_the_tables_mutex_does_what_others_put_aside(coord: Coordinator, stay: str) -> None:
    """One that gives up waits for nobody, be it a collection: the one inside lets the next in line have its turn."""
    coord.limit("api", requests=5)
    table: Any = coord._table
    table._mutex = mutex = Meanwhile(table)
    STAYS[stay](coord)
    assert mutex.done == mutex.asked > 0


@pytest.mark.parametrize("kind", ["generator", "async generator"])
def test_L8_a_collection_inside_the_tables_mutex_does_not_hang(hooked: Coordinator, hooks: Hooks, kind: str) -> None:
    """Garbage is collected on a thread that is inside the mutex, and a generator's block ends there."""
    lock = hooked.lock("a")

    def stream() -> Iterator[int]:
        with lock:
            yield 1

    def open_block() -> None:
        items: list[Any] = [stream()]
        next(items[0])
        items.append(items)  # a ring: only the collector finds it

    async def astream() -> Any:
        with lock:
            yield 1

    def open_async_block() -> None:
        items: list[Any] = [astream()]
        with contextlib.suppress(StopIteration):
            items[0].asend(None).send(None)
        items.append(items)

    gc.disable()
    try:
        (open_block if kind == "generator" else open_async_block)()
        waiter = queued(hooked, lock)
        hooks.at("before", "entries", "__setitem__", gc.collect)  # an entry is made under the mutex
        with hooked.lock("b"):
            visit = Visitor(hooked.lock("b"))
            assert waiter.inside.wait(5), "it waits for the mutex that it holds"
            eventually(lambda: line(hooked, "b"))
        visit.entered().go()
    finally:
        gc.enable()
    waiter.go()
    assert nothing_left(hooked)


def test_L5_a_wait_refused_as_a_deadlock_leaves_nothing_behind(coord: Coordinator) -> None:
    """Whoever is refused was never in line: the other goes on."""
    a, b = coord.lock("a"), coord.lock("b")
    with a:

        def cross() -> None:
            with b, a:
                pass

        (thread,) = start_all(cross)
        eventually(lambda: line(coord))
        with pytest.raises(DeadlockError):
            b.acquire()
    join_all([thread])
    assert nothing_left(coord)
