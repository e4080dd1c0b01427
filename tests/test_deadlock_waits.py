"""Waits for deliveries, events, agents and the end of all are edges of the wait-for graph too (L5, L12)."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import threading
from collections.abc import Callable
from typing import Any

import pytest
from support import eager_switching, eventually, join_all, start_all, yielding_at_opcodes

from agentdiff import Coordinator, DeadlockError, DependencyFailedError
from agentdiff._owner import ThreadOwner
from agentdiff.deadlock import Hop, OtherWait, Wait
from agentdiff.testing import FakeClock

Way = Callable[[Coordinator, Any], Any]

WAITS: dict[str, Way] = {
    "delivery": lambda coord, delivery: delivery.wait(),
    "join": lambda coord, delivery: coord.join(),
    "join of the run": lambda coord, delivery: coord.join(run="r"),
    "close": lambda coord, delivery: coord.close(),
}
ASYNC_WAITS: dict[str, Way] = {
    "delivery": lambda coord, delivery: delivery,
    "join": lambda coord, delivery: coord.join_async(),
    "join of the run": lambda coord, delivery: coord.join_async(run="r"),
}


def somebody_waits(coord: Coordinator) -> bool:
    return any(lock.waiters for lock in coord.snapshot().locks)


# -- a handler wants what the one who waits for it holds ----------------------------------------------------


@pytest.mark.parametrize("way", WAITS)
def test_L5_who_holds_what_a_handler_waits_for_must_not_wait_for_that_handler(coord: Coordinator, way: str) -> None:
    """The handler stands in line already: the wait is refused, each hop named, and all goes on afterwards."""

    @coord.on("ready")
    def handler(data: Any) -> str:
        with coord.lock("record"):
            return "written"

    with coord.lock("record"):
        with coord.run("r"):
            delivery = coord.emit("ready")
        eventually(lambda: somebody_waits(coord))
        with pytest.raises(DeadlockError) as caught:
            WAITS[way](coord, delivery)
    assert len(caught.value.cycle) == 2
    assert "held up by" in caught.value.cycle[0]
    assert "lock 'record'" in caught.value.cycle[1]
    assert delivery.wait(10).results == ("written",)


@pytest.mark.parametrize("way", WAITS)
def test_L5_a_handler_must_not_wait_for_who_waits_for_it(coord: Coordinator, way: str) -> None:
    """Here it comes to the lock later: its own wait is refused, which is its failure and nobody else's."""
    go = threading.Event()

    @coord.on("ready")
    def handler(data: Any) -> None:
        assert go.wait(10)
        coord.lock("record").acquire()

    with coord.run("r"):
        delivery = coord.emit("ready")

    def holder() -> None:
        with coord.lock("record"):
            WAITS[way](coord, delivery)

    threads = start_all(holder)
    eventually(lambda: coord._table.book.elsewhere)
    go.set()
    join_all(threads)
    assert [type(error) for error in delivery.errors] == [DeadlockError]


@pytest.mark.parametrize("way", ASYNC_WAITS)
def test_L5_the_same_among_tasks(coord: Coordinator, way: str) -> None:
    """The handler is a task that waits for a lock of the task that waits for it."""

    async def main() -> Any:
        @coord.on("ready")
        async def handler(data: Any) -> str:
            async with coord.lock("record"):
                return "written"

        async with coord.lock("record"):
            with coord.run("r"):
                delivery = coord.emit("ready")
            while not somebody_waits(coord):
                await asyncio.sleep(0.001)
            with pytest.raises(DeadlockError) as caught:
                await ASYNC_WAITS[way](coord, delivery)
        assert len(caught.value.cycle) == 2
        return (await delivery).results

    assert asyncio.run(main()) == ("written",)


def test_L5_what_waits_behind_a_stuck_handler_is_stuck_too(coord: Coordinator) -> None:
    """An event that is still queued waits for the handler before it in its run."""
    coord.on("first", lambda data: coord.lock("record").acquire())
    coord.on("second", lambda data: None)
    with coord.lock("record"), coord.run("r"):
        coord.emit("first")
        second = coord.emit("second")
        eventually(lambda: somebody_waits(coord))
        with pytest.raises(DeadlockError, match="event 'second'"):
            second.wait()
    second.wait(10)


def test_L5_two_handlers_that_wait_for_each_others_events_are_refused(coord: Coordinator) -> None:
    """Whichever comes second."""
    deliveries: dict[str, Any] = {}
    both = threading.Barrier(3)

    def waits_for(other: str) -> Callable[[Any], None]:
        def handler(data: Any) -> None:
            both.wait(10)
            deliveries[other].wait()

        return handler

    coord.on("a", waits_for("b"))
    coord.on("b", waits_for("a"))
    for name in "ab":
        with coord.run(name):
            deliveries[name] = coord.emit(name)
    both.wait(10)
    ends = [deliveries[name].wait(10).errors for name in "ab"]
    assert sorted(len(errors) for errors in ends) == [0, 1]
    assert type(sum(ends, ())[0]) is DeadlockError


def test_L5_who_must_take_its_turn_back_is_held_up_by_who_has_it(coord: Coordinator) -> None:
    """A handler that holds a lock waits for an event, and lends its turn to a handler that wants the lock."""

    @coord.on("asks")
    def asks(data: Any) -> Any:
        with coord.lock("record"):
            coord.emit("writes")
            return coord.wait_for("answer").data

    @coord.on("writes")
    def writes(data: Any) -> None:
        with coord.lock("record"):
            raise AssertionError("nobody can let it in")

    with coord.run("r"):
        asked = coord.emit("asks")
        eventually(lambda: coord.snapshot().counts.handlers_failed == 1)  # `writes` was refused
        coord.emit("answer", 42)
    assert asked.wait(10).results == (42,)


def test_L5_a_handler_that_has_its_turn_back_holds_up_its_event(coord: Coordinator) -> None:
    """It has waited before, and now stands in line for what the one who waits for it holds."""

    @coord.on("ready")
    def handler(data: Any) -> str:
        coord.wait_for("go")
        with coord.lock("record"):
            return "written"

    with coord.lock("record"):
        with coord.run("r"):
            delivery = coord.emit("ready")
        eventually(lambda: coord._bus._expected)
        coord.emit("go")
        eventually(lambda: somebody_waits(coord))
        with pytest.raises(DeadlockError, match="lock 'record'"):
            delivery.wait()
    assert delivery.wait(10).results == ("written",)


# -- a wait blocks the loop on which a handler is to run ----------------------------------------------------


@pytest.mark.parametrize("way", WAITS)
@pytest.mark.parametrize("when", ["before", "after"])
def test_L5_a_wait_that_blocks_the_loop_of_a_handler_is_refused(coord: Coordinator, way: str, when: str) -> None:
    """`wait()`, `join()`, `close()` in a coroutine, whether the handler's turn comes before the wait or after."""
    go = threading.Event()

    async def main() -> Any:
        coord.on("ready", lambda data: when == "before" or go.wait(10))

        @coord.on("ready")
        async def handler(data: Any) -> str:
            return "handled"

        with coord.run("r"):
            delivery = coord.emit("ready")
        if when == "before":
            eventually(lambda: coord._bus.away)
        else:
            threading.Timer(0, lambda: (eventually(lambda: coord._table.book.blocked), go.set())).start()
        with pytest.raises(DeadlockError, match="await") as caught:
            WAITS[way](coord, delivery)
        assert "an event loop that is to run a handler" in caught.value.cycle[0]
        return (await delivery).results

    assert asyncio.run(main())[-1] == "handled"


def test_L5_a_wait_that_blocks_the_loop_of_a_handler_beside_is_refused(coord: Coordinator) -> None:
    """A `concurrent=True` handler holds up its event, though not the lane."""

    async def main() -> Any:
        @coord.on("ready", concurrent=True)
        async def handler(data: Any) -> str:
            return "handled"

        delivery = coord.emit("ready")
        with pytest.raises(DeadlockError, match="await"):
            delivery.wait()
        return (await delivery).results

    assert asyncio.run(main()) == ("handled",)


def test_L5_a_blocking_wait_for_handlers_of_other_loops_is_none_of_these(coord: Coordinator) -> None:
    """Handlers on workers and on the coordinator's own loop end, whoever is blocked."""

    async def own(data: Any) -> str:
        return "on its own loop"

    coord.on("ready", own)
    coord.on("ready", lambda data: "on a worker")

    async def main() -> Any:
        return coord.emit("ready").wait(10).results

    assert asyncio.run(main()) == ("on its own loop", "on a worker")


def test_L5_an_agent_that_blocks_the_loop_of_what_it_comes_after_is_refused(coord: Coordinator) -> None:
    """A plain function, called in a coroutine, comes after an agent that is a task of that loop."""

    @coord.coordinate("researcher")
    async def researcher() -> None:
        await asyncio.sleep(0)

    @coord.coordinate("writer", after="researcher")
    def writer() -> None:
        raise AssertionError("it can't begin")

    async def main() -> None:
        with coord.run("r"):
            task = asyncio.create_task(researcher())
            await asyncio.sleep(0)
            with pytest.raises(DeadlockError, match="await"):
                writer()
            await task

    asyncio.run(main())


# -- and nobody else is refused ---------------------------------------------------------------------------


def test_L5_trying_once_and_what_is_done_are_never_refused(coord: Coordinator) -> None:
    """A wait of no seconds doesn't wait; nor does one for what has ended."""
    coord.on("ready", lambda data: coord.lock("record").acquire())
    coord.on("done", lambda data: None)
    done = coord.emit("done").wait(10)
    with coord.lock("record"):
        delivery = coord.emit("ready")
        eventually(lambda: somebody_waits(coord))
        with pytest.raises(TimeoutError):
            delivery.wait(0)
        with pytest.raises(TimeoutError):
            coord.join(0)
        done.wait()
    delivery.wait(10)


def test_L5_what_is_over_holds_up_nobody(coord: Coordinator) -> None:
    """Who is about to wake up from a wait that has ended waits no more, whatever goes on in that lane now."""
    coord.on("first", lambda data: None)
    coord.on("second", lambda data: coord.lock("record").acquire())
    with coord.lock("record"):
        with coord.run("r"):
            first = coord.emit("first")
            second = coord.emit("second")
        eventually(lambda: somebody_waits(coord))
        wait = coord._bus.waits.for_delivery(first)
        coord._table.begin_wait(wait)
        coord._table.end_wait(wait)
    second.wait(10)


def test_L5_a_handler_that_has_lent_its_lane_holds_up_nobody_in_it() -> None:
    """It waits for who waits for a lock; who holds that lock waits for a later event of the lane, which is handled."""
    go = threading.Event()
    with Coordinator(name="test", workers=1) as coord:
        coord.on("writes", lambda data: coord.lock("record").acquire())
        coord.on("waits", lambda delivery: delivery.wait())
        coord.on("quick", lambda data: "done")
        coord.on("busy", lambda data: go.wait(10))
        with coord.lock("record"):
            with coord.run("writer"):
                writes = coord.emit("writes")
            with coord.run("waiter"):
                waits = coord.emit("waits", writes)
            eventually(lambda: len(coord._table.book.elsewhere) == 1 and somebody_waits(coord))
            with coord.run("other"):
                coord.emit("busy")  # the one worker that is left
            with coord.run("waiter"):
                quick = coord.emit("quick")
            threading.Timer(0, lambda: (eventually(lambda: len(coord._table.book.elsewhere) == 2), go.set())).start()
            assert quick.wait(10).results == ("done",)
        waits.wait(10)


def test_L5_who_waits_for_a_run_is_not_held_up_by_another(coord: Coordinator) -> None:
    """A handler of run "other" wants the lock; the end of run "r" doesn't depend on it."""
    go = threading.Event()
    coord.on("writes", lambda data: coord.lock("record").acquire())
    coord.on("waits", lambda data: go.wait(10))
    with coord.lock("record"):
        with coord.run("other"):
            coord.emit("writes")
        with coord.run("r"):
            coord.emit("waits")
        eventually(lambda: somebody_waits(coord))
        threading.Timer(0, lambda: (eventually(lambda: coord._table.book.elsewhere), go.set())).start()
        coord.join(10, run="r")
    coord.join(10)


def test_L5_a_handler_beside_holds_up_only_its_own_event(coord: Coordinator) -> None:
    """The lane goes on beside a `concurrent=True` handler: what is stuck later in it is nothing to that event."""
    leave = threading.Event()

    @coord.on("first", concurrent=True)
    def beside(data: Any) -> str:
        assert leave.wait(10)
        return "ended"

    coord.on("second", lambda data: coord.lock("record").acquire())
    with coord.run("r"):
        first = coord.emit("first")
        second = coord.emit("second")
    with coord.lock("record"):
        eventually(lambda: somebody_waits(coord))
        threading.Timer(0, lambda: (eventually(lambda: coord._table.book.elsewhere), leave.set())).start()
        assert first.wait(10).results == ("ended",)
    second.wait(10)


def test_L5_a_ring_of_which_one_goes_on_while_it_is_looked_for_is_none(coord: Coordinator) -> None:
    """c would wait for a, a waits for b, b for c; a's wait ends after it has been looked at, and before b's has."""
    table = coord._table
    a, b, c = (ThreadOwner(threading.Thread(name=name)) for name in "abc")

    def for_owner(waiter: ThreadOwner, other: ThreadOwner, meanwhile: Callable[[], Any] = lambda: None) -> OtherWait:
        def whom() -> Wait:
            meanwhile()
            return Wait([Hop(waiter, other, None, None, ("it, held up by", ""))])

        return OtherWait(waiter, "it", "it", whom)

    first = for_owner(a, b)
    table.begin_wait(first)
    table.begin_wait(for_owner(b, c, lambda: c in table.book.elsewhere and table.end_wait(first)))
    table.begin_wait(for_owner(c, a))
    for wait in table.other_waits():
        table.end_wait(wait)


@pytest.mark.parametrize("kind", ["sync", "async", "both"])
@pytest.mark.parametrize("hostile", [contextlib.nullcontext, eager_switching, yielding_at_opcodes])
def test_L5_chains_of_locks_and_waits_without_a_ring_all_end(coord: Coordinator, hostile: Any, kind: str) -> None:
    """Each level holds its own lock and waits for the next, in twelve runs: contention everywhere, and no ring."""
    depth = 4

    def level(number: int) -> Callable[[Any], Any]:
        def handler(data: Any) -> int:
            with coord.lock(f"level-{number}"):
                return 0 if number == depth else 1 + sum(coord.emit(f"level-{number + 1}").wait(30).results)

        async def handler_async(data: Any) -> int:
            async with coord.lock(f"level-{number}"):
                return 0 if number == depth else 1 + sum((await coord.emit(f"level-{number + 1}")).results)

        return handler_async if kind == "async" or (kind == "both" and number % 2) else handler

    for number in range(depth + 1):
        coord.on(f"level-{number}", level(number))
    deliveries = []
    with hostile():
        for run in range(12):
            with coord.run(f"run-{run}"):
                deliveries.append(coord.emit("level-0"))
        assert [delivery.wait(30).results for delivery in deliveries] == [(depth,)] * 12
    assert not coord._table.book.elsewhere
    assert not coord._table.book.blocked


# -- slow waits for agents (L12) ----------------------------------------------------------------------------


def test_L12_a_long_wait_for_an_agent_is_told_once(caplog: pytest.LogCaptureFixture) -> None:
    """After `slow_after` seconds: which agent waits for which, since when, in which run, and what to do."""
    clock = FakeClock()
    coord = Coordinator(name="test", clock=clock, slow_after=30.0)

    @coord.coordinate("writer", after=("researcher", "checker"))
    def writer() -> None:
        pass

    researcher = coord.coordinate("researcher")(lambda: None)
    checker = coord.coordinate("checker")(lambda: None)

    def late() -> None:
        with coord.run("r"):
            writer()

    with caplog.at_level(logging.WARNING, logger="agentdiff"), coord.run("r"):
        threads = start_all(late)
        clock.wait_for_sleepers(1)
        clock.advance(29)
        assert not caplog.records
        clock.advance(1)
        eventually(lambda: caplog.records)
        researcher()
        eventually(lambda: any(agent.waits_for == ("checker",) for agent in coord.snapshot().agents))
        clock.advance(100)
        checker()
        join_all(threads)
    (record,) = caplog.records
    said = record.getMessage()
    assert "Agent 'writer'" in said
    assert "has waited for 30 s for 'researcher' (not started), 'checker' (not started) in run 'r'" in said
    assert "Nobody has called 'checker' in run 'r' yet" in said
    assert (record.agentdiff_agent, record.agentdiff_run) == ("writer", "r")  # type: ignore[attr-defined]
    coord.close()


def test_L12_an_agent_that_blocks_its_loop_while_it_waits_is_told_of_soon(caplog: pytest.LogCaptureFixture) -> None:
    """After a tenth of a second, with the advice to make it a coroutine function."""
    clock = FakeClock()
    coord = Coordinator(name="test", clock=clock)
    researcher = coord.coordinate("researcher")(lambda: None)
    writer = coord.coordinate("writer", after="researcher")(lambda: None)

    async def main() -> None:
        writer()

    threads = start_all(lambda: asyncio.run(main()))
    with caplog.at_level(logging.WARNING, logger="agentdiff"):
        clock.wait_for_sleepers(1)
        clock.advance(0.1)
        eventually(lambda: caplog.records)
        researcher()
        join_all(threads)
    assert "`async def`" in caplog.text
    coord.close()


def test_L12_a_wait_that_blocks_its_loop_is_told_of_soon(caplog: pytest.LogCaptureFixture) -> None:
    """Once, after a tenth of a second, even where it can end: everything else on that loop stands still."""
    clock, go = FakeClock(), threading.Event()
    coord = Coordinator(name="test", clock=clock)
    coord.on("ready", lambda data: go.wait(10))

    async def main() -> None:
        coord.emit("ready").wait(30)

    threads = start_all(lambda: asyncio.run(main()))
    with caplog.at_level(logging.WARNING, logger="agentdiff"):
        clock.wait_for_sleepers(1)
        clock.advance(0.1)
        eventually(lambda: caplog.records)
        clock.advance(1)
        go.set()
        join_all(threads)
    (record,) = caplog.records
    assert "waits for event 'ready' and blocks its event loop meanwhile: use `await`" in record.getMessage()
    assert "in main()" in record.getMessage()
    coord.close()


def test_L11_what_is_to_be_done_for_an_agent_that_waits(coord: Coordinator) -> None:
    """`explain()` says where that agent is at, or that it waits itself, or that nobody has called it."""
    begun, leave = threading.Event(), threading.Event()

    @coord.coordinate("a")
    def a() -> None:
        begun.set()
        assert leave.wait(10)

    b = coord.coordinate("b", after="a")(lambda: None)
    c = coord.coordinate("c", after=("a", "b", "d"))(lambda: None)
    threads = start_all(a)
    assert begun.wait(10)
    threads += start_all(b, c)
    eventually(lambda: sum(bool(agent.waits_for) for agent in coord.snapshot().agents) == 2)
    said = coord.explain()
    assert "'a' is at work, at test_deadlock_waits.py:" in said
    assert "'b' waits itself: see there." in said
    assert "Nobody has called 'd' yet: who is to?" in said
    coord.coordinate("d")(lambda: None)()
    leave.set()
    join_all(threads)


def test_L11_who_waits_for_events_is_told(clock: FakeClock) -> None:
    """For which, since when, where: an event that nobody emits, a delivery, the end of all."""
    leave = threading.Event()
    coord = Coordinator(name="test", clock=clock)
    coord.on("ready", lambda data: leave.wait(10))
    ready = coord.emit("ready")
    threads = start_all(lambda: coord.wait_for("answer"), lambda: ready.wait(), lambda: coord.join())
    eventually(lambda: len(coord._table.book.elsewhere) == 3)
    clock.advance(4)
    said = coord.explain()
    for what in ("event 'answer'", "event 'ready'", "all events"):
        assert f"has waited for 4 s for {what}, at " in said
    leave.set()
    coord.emit("answer")
    join_all(threads)
    assert "has waited" not in coord.explain()
    coord.close()


def test_A5_a_refused_agent_counts_as_failed_for_those_after_it(coord: Coordinator) -> None:
    """What L5 refuses, A5 tells on."""

    @coord.coordinate("researcher")
    async def researcher() -> None:
        await asyncio.sleep(0)

    writer = coord.coordinate("writer", after="researcher")(lambda: None)
    editor = coord.coordinate("editor", after="writer")(lambda: None)

    async def main() -> None:
        with coord.run("r"):
            task = asyncio.create_task(researcher())
            await asyncio.sleep(0)
            with pytest.raises(DeadlockError):
                writer()
            await task
            with pytest.raises(DependencyFailedError, match="'writer'"):
                editor()

    asyncio.run(main())
