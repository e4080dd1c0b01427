"""Cascades (E11), waiting for events (E15), handlers that wait (E16); bounds, Ctrl-C and the end (E4 to E7)."""

from __future__ import annotations

import asyncio
import functools
import gc
import threading

import pytest
from support import eventually, interrupted, join_all, run_script, start_all

from agentdiff import (
    CascadeError,
    ClosedError,
    CoordinationTimeoutError,
    Coordinator,
    DeadlockError,
    QueueFullError,
    _workers,
)
from agentdiff._owner import this_thread


def settled(coord):
    """Nothing of what waits leave behind is left."""
    bus = coord._bus
    return not (bus._expected or bus.bells or len(bus.waits) or bus.live or bus._joiners)


# -- E11: cascades ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("depth", [1, 2, 7, 1000])
@pytest.mark.parametrize("kind", ["sync", "async"])
def test_E11_ping_pong_is_stopped_and_the_error_shows_the_loop(kind, depth, caplog):
    """After exactly `max_depth` handlers, by a `CascadeError` in the last one: `p -> q -> p`."""
    calls, failures = [], []

    def make(emits):
        def handler(data):
            calls.append(emits)
            coord.emit(emits, data)

        async def handler_async(data):
            handler(data)

        return handler if kind == "sync" else handler_async

    with Coordinator(name="test", max_depth=depth) as coord:
        coord.on("p", make("q"))
        coord.on("q", make("p"))
        coord.on("handler_failed", failures.append)
        coord.emit("p")
        coord.join(30)
        assert len(calls) == depth
        (failure,) = failures
        error = failure["exception"]
        assert isinstance(error, CascadeError)
        assert (error.name, error.depth) == ("p" if depth % 2 == 0 else "q", depth)
        loop = {1: ("p", "q")}.get(depth, ("p", "q", "p") if depth % 2 == 0 else ("q", "p", "q"))
        assert error.loop == loop
        assert " -> ".join(loop) in str(error)
        assert f"max_depth is {depth}" in str(error)


def test_E11_an_event_that_causes_itself_is_a_loop_of_one():
    """`p -> p`."""
    with Coordinator(name="test", max_depth=20) as coord:
        failures = []
        coord.on("p", lambda data: coord.emit("p"))
        coord.on("handler_failed", failures.append)
        coord.emit("p")
        coord.join(10)
        assert failures[0]["exception"].loop == ("p", "p")


def test_E11_a_cascade_without_a_loop_shows_its_last_names():
    """Names that are new each time: the last twelve of them."""
    with Coordinator(name="test", max_depth=30) as coord:
        failures = []
        coord.on("n*", lambda data: coord.emit(f"n{data}", data + 1))
        coord.on("handler_failed", failures.append)
        coord.emit("n0", 1)
        coord.join(10)
        assert failures[0]["exception"].loop == tuple(f"n{number}" for number in range(19, 31))


def test_E11_breadth_is_not_depth():
    """A handler that emits a thousand events, or is called for a thousand, is at depth 1."""
    with Coordinator(name="test", max_depth=2) as coord:
        seen = []
        coord.on("a", lambda data: [coord.emit("b") for _ in range(100)])
        coord.on("b", seen.append)
        for _ in range(10):
            coord.emit("a")
        coord.join(20)
        assert len(seen) == 1000
        assert coord.snapshot().counts.handlers_failed == 0


def test_E11_agents_in_a_loop_are_stopped_and_not_hurt(caplog):
    """Their events are counted and logged with the loop, and never raised into them (E5)."""
    results = []
    with Coordinator(name="test", max_depth=10) as coord:

        @coord.coordinate("ping")
        def ping():
            return "ping"

        @coord.coordinate("pong")
        def pong():
            return "pong"

        coord.on("ping_complete", lambda data: results.append(pong()))
        coord.on("pong_complete", lambda data: results.append(ping()))
        assert ping() == "ping"
        coord.join(10)
        counts = coord.snapshot().counts
    assert (results.count("ping"), results.count("pong")) == (5, 5)
    assert (counts.events_refused, counts.handlers_failed) == (1, 0)
    assert "ping_complete -> pong_complete -> ping_complete" in caplog.text


def test_E11_handlers_that_fail_without_end_are_stopped_too(caplog):
    """A handler of `handler_failed` that causes what has failed: each failure is told, and the chain ends."""
    with Coordinator(name="test", max_depth=8) as coord:
        calls = []

        def fail(data):
            calls.append("fail")
            raise ValueError("again")

        coord.on("work", fail)
        coord.on("handler_failed", lambda data: coord.emit("work"))
        coord.emit("work")
        coord.join(10)
        assert len(calls) == 4
        assert "CascadeError" in caplog.text


@pytest.mark.parametrize("bound", [0, -1, True, 1.0])
def test_E11_a_bound_that_makes_no_sense_is_refused(bound):
    """`max_depth` is a whole number of at least 1."""
    with pytest.raises((ValueError, TypeError), match="max_depth"):
        Coordinator(max_depth=bound)


# -- E15: waiting for events -----------------------------------------------------------------------------------


def wait_sync(coord, name, timeout=None):
    return coord.wait_for(name, timeout)


def wait_async(coord, name, timeout=None):
    return asyncio.run(coord.wait_for_async(name, timeout))


def expect_sync(coord, name, timeout=None):
    with coord.expect(name) as expected:
        return expected.wait(timeout)


def expect_async(coord, name, timeout=None):
    async def main():
        with coord.expect(name) as expected:
            return await expected.wait_async(timeout)

    return asyncio.run(main())


WAITS = pytest.mark.parametrize("wait", [wait_sync, wait_async, expect_sync, expect_async])


@WAITS
@pytest.mark.parametrize("heard", [True, False])
def test_E15_it_gives_the_next_event_of_the_name(coord, wait, heard):
    """Whether or not anybody else listens; events of other names are not it."""
    if heard:
        coord.on("*", lambda data: None)
    coord.emit("a", "before")
    found = []
    threads = start_all(lambda: found.append(wait(coord, "a", 20)))
    eventually(lambda: coord._bus._expected)
    coord.emit("b", "other")
    with coord.run("r"):
        coord.emit("a", "next", sender="s")
    coord.emit("a", "after")
    join_all(threads)
    (event,) = found
    assert (event.name, event.data, event.sender, event.run_id) == ("a", "next", "s", "r")
    coord.join(10)
    assert settled(coord)


@WAITS
def test_E15_a_pattern_will_do(coord, wait):
    """As for `on` (E9)."""
    found = []
    threads = start_all(lambda: found.append(wait(coord, "a*e", 20)))
    eventually(lambda: coord._bus._expected)
    for name in ("a", "are", "ae"):
        coord.emit(name)
    join_all(threads)
    assert found[0].name == "are"


@WAITS
def test_E15_it_resolves_ahead_of_the_handlers(coord, wait):
    """When the event is emitted, though a handler of it blocks, and another event is before it in the lane."""
    go = threading.Event()
    coord.on("a", lambda data: go.wait(20))
    coord.emit("a", 1)
    found = []
    threads = start_all(lambda: found.append(wait(coord, "a", 20).data))
    eventually(lambda: coord._bus._expected)
    delivery = coord.emit("a", 2)
    join_all(threads)
    assert found == [2]
    assert not delivery.done
    go.set()


def test_E15_expect_misses_nothing_between_registering_and_waiting(coord):
    """The first event since the block began, though it came before the wait; a second wait gives it again."""
    with coord.expect("a") as expected:
        assert "not yet" in repr(expected)
        assert expected.event is None
        first = coord.emit("a", 1).event
        coord.emit("a", 2)
        assert expected.event is first
        assert "has come" in repr(expected)
        assert expected.wait() is first
        assert expected.wait(0) is first
        assert asyncio.run(expected.wait_async(0)) is first
    assert settled(coord)


def test_E15_all_who_wait_get_it(coord):
    """Threads and tasks, each the same event."""
    found = []
    waits = [wait_sync, wait_async, expect_sync, expect_async] * 3
    threads = start_all(*[lambda wait=wait: found.append(wait(coord, "a", 20)) for wait in waits])
    eventually(lambda: len(coord._bus._expected) == len(waits))
    event = coord.emit("a").event
    join_all(threads)
    assert len(found) == len(waits)
    assert all(one is event for one in found)
    assert settled(coord)


@WAITS
def test_E15_a_wait_ends_when_its_time_is_over(clock, wait):
    """With an error that says what did not come, and leaves nothing."""
    with Coordinator(name="test", clock=clock) as coord:
        errors = []

        def target():
            with pytest.raises(CoordinationTimeoutError, match="no event 'a' was emitted within 5 s") as caught:
                wait(coord, "a", 5)
            errors.append(caught.value)

        threads = start_all(target)
        clock.wait_for_sleepers(1)
        clock.advance(4.9)
        assert not errors
        clock.advance(0.2)
        join_all(threads)
        assert (errors[0].name, errors[0].timeout) == ("a", 5)
        assert isinstance(errors[0], TimeoutError)
        assert settled(coord)


@WAITS
def test_E15_a_timeout_of_0_looks_once(coord, wait):
    """And does not wait."""
    with pytest.raises(CoordinationTimeoutError):
        wait(coord, "a", 0)
    assert settled(coord)


@WAITS
@pytest.mark.parametrize("timeout", [-1, float("nan"), True, "1"])
def test_E15_a_timeout_that_makes_no_sense_is_refused(coord, wait, timeout):
    """As everywhere (L4)."""
    with pytest.raises((TypeError, ValueError)):
        wait(coord, "a", timeout)
    assert settled(coord)


@WAITS
@pytest.mark.parametrize(("name", "error"), [("", ValueError), (1, TypeError)])
def test_E15_a_name_that_makes_no_sense_is_refused(coord, wait, name, error):
    """At once."""
    with pytest.raises(error):
        wait(coord, name, 0)


def test_E15_a_block_that_ends_without_the_event_leaves_nothing(coord):
    """However it ends; emitting has no more to look for."""

    def leave():
        with coord.expect("a"):
            assert coord._bus.hears("a")
            raise KeyError

    with pytest.raises(KeyError):
        leave()
    assert not coord._bus.hears("a")
    assert settled(coord)
    coord.emit("b")
    assert "b" in coord._bus.routes


def test_E15_a_cancelled_wait_leaves_nothing(coord):
    """The task ends as cancelled; the event that comes then troubles nobody."""

    async def main():
        task = asyncio.ensure_future(coord.wait_for_async("a"))
        while not coord._bus._expected:
            await asyncio.sleep(0)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert settled(coord)
        coord.emit("a")

    asyncio.run(main())


def test_E15_an_agents_events_can_be_waited_for(coord):
    """Though nobody listened before, so that the agent told nothing."""

    @coord.coordinate("agent")
    def agent():
        return 42

    agent()
    with coord.expect("agent_complete") as expected:
        agent()
        assert expected.wait(5).data["result"] == 42
    assert settled(coord)


def test_E15_a_refused_event_is_nobodys_next():
    """It was not emitted."""
    with Coordinator(name="test", max_pending=1) as coord:
        go = threading.Event()
        coord.on("a", lambda data: go.wait(20))
        coord.emit("a")
        with coord.expect("a") as expected, pytest.raises(QueueFullError):
            coord.emit("a")
        assert expected.event is None
        go.set()


# -- E16: handlers that wait -----------------------------------------------------------------------------------


def ask(coord, data, timeout=20):
    """A question and the wait for its answer: the delivery itself, or an event."""
    if data % 2:
        return coord.emit("question", data).wait(timeout).results[0]
    with coord.expect(f"answer-{data}") as expected:
        coord.emit("question", data)
        return expected.wait(timeout).data


async def ask_async(coord, data):
    if data % 2:
        return (await coord.emit("question", data)).results[0]
    with coord.expect(f"answer-{data}") as expected:
        coord.emit("question", data)
        return (await expected.wait_async(20)).data


def answering(coord):
    def answer(data):
        coord.emit(f"answer-{data}", data * 10)
        return data * 10

    coord.on("question", answer)


@pytest.mark.parametrize("kind", ["sync", "async"])
@pytest.mark.parametrize("runs", [1, 4])
def test_E16_64_handlers_that_ask_and_wait_for_their_answers_all_end(kind, runs):
    """In one run and in several, with four workers."""
    with Coordinator(name="test", workers=4) as coord:
        answering(coord)
        got = []

        async def work_async(data):
            got.append((data, await ask_async(coord, data)))

        coord.on("work", (lambda data: got.append((data, ask(coord, data)))) if kind == "sync" else work_async)
        for number in range(64):
            with coord.run(f"r{number % runs}"):
                coord.emit("work", number)
        coord.join(30)
        assert sorted(got) == [(number, number * 10) for number in range(64)]
        assert settled(coord)
        assert coord._bus.workers.limit == 4


@pytest.mark.parametrize("kind", ["sync", "async"])
def test_E16_two_handlers_of_a_run_never_work_at_once(kind):
    """Outside of their waits: whoever comes back from one takes its lane back before it goes on (E2)."""
    overlaps, inside = [], []

    def enter(data):
        inside.append(data)
        if len(inside) > 1:
            overlaps.append(tuple(inside))

    with Coordinator(name="test", workers=8) as coord:
        coord.on("question", lambda data: (enter("q"), inside.remove("q"), data)[-1])

        def work(data):
            for _ in range(3):
                enter(data)
                inside.remove(data)
                coord.emit("question", data).wait(20)

        async def work_async(data):
            for _ in range(3):
                enter(data)
                await asyncio.sleep(0)
                inside.remove(data)
                await coord.emit("question", data)

        coord.on("work", work if kind == "sync" else work_async)
        with coord.run("r"):
            for number in range(40):
                coord.emit("work", number)
        coord.join(30)
        assert not overlaps
        assert coord.snapshot().counts.handlers_failed == 0


def test_E16_later_handlers_of_the_event_do_not_overtake_a_wait(coord):
    """Later events may."""
    order = []
    gate = threading.Event()

    def first(data):
        order.append("waits")
        coord.wait_for("go", 20)
        order.append("goes on")

    coord.on("a", first)
    coord.on("a", lambda data: order.append("second"))
    coord.on("b", lambda data: (order.append("overtakes"), gate.set()))
    with coord.run("r"):
        coord.emit("a")
        coord.emit("b")
    assert gate.wait(10)
    coord.emit("go")
    coord.join(10)
    assert order == ["waits", "overtakes", "goes on", "second"]


def test_E16_a_handler_after_an_async_one_lends_its_lane_too(coord):
    """Whoever goes on with the event has the same turn: what it emits in its run is handled while it waits."""

    @coord.on("work")
    async def first(data):
        return "first"

    coord.on("work", lambda data: coord.emit("question").wait(10).results)
    coord.on("question", lambda data: "answer")
    with coord.run("r"):
        assert coord.emit("work").wait(10).results == ("first", ("answer",))


def test_E16_a_lock_wait_lends_the_worker_and_not_the_lane():
    """With one worker, another run's handler goes on; an event of the same run stays behind."""
    with Coordinator(name="test", workers=1) as coord:
        order = []

        def locked(data):
            order.append("waits")
            with coord.lock("l"):
                order.append("has it")

        coord.on("a", locked)
        coord.on("b", order.append)
        with coord.lock("l"):
            with coord.run("r"):
                coord.emit("a")
                last = coord.emit("b", "same run")
            with coord.run("s"):
                coord.emit("b", "other run").wait(10)
            assert order == ["waits", "other run"]
        last.wait(10)
        assert order == ["waits", "other run", "has it", "same run"]


@pytest.mark.parametrize("kind", ["sync", "async"])
def test_E16_a_timeout_bounds_the_wait_and_not_the_taking_back(clock, kind):
    """The handler goes on when the lane is free again, and then gets its error."""
    with Coordinator(name="test", clock=clock) as coord:
        began, go = threading.Event(), threading.Event()
        order = []

        def work(data):
            with pytest.raises(CoordinationTimeoutError):
                coord.wait_for("never", 5)
            order.append("timed out")

        async def work_async(data):
            with pytest.raises(CoordinationTimeoutError):
                await coord.wait_for_async("never", 5)
            order.append("timed out")

        def other(data):
            began.set()
            assert go.wait(20)
            order.append("other")

        coord.on("work", work if kind == "sync" else work_async)
        coord.on("other", other)
        with coord.run("r"):
            coord.emit("work")
            coord.emit("other")
        assert began.wait(10)
        clock.wait_for_sleepers(1)
        clock.advance(6)
        lane = coord._bus._runs["r"]
        eventually(lambda: lane._returning)
        assert order == []
        go.set()
        coord.join(10)
        assert order == ["other", "timed out"]


@pytest.mark.parametrize("depth", [0, 2])
@pytest.mark.parametrize("kind", ["sync", "async"])
def test_E16_join_in_a_handler_is_refused(coord, kind, depth, caplog):
    """And in what it has caused: it would wait for itself. The error names the event."""
    coord.on("n", lambda data: coord.emit("n", data - 1) if data else coord.emit("last"))

    async def join_async(data):
        await coord.join_async()

    coord.on("last", (lambda data: coord.join()) if kind == "sync" else join_async)
    failures = []
    coord.on("handler_failed", failures.append)
    coord.emit("n", depth)
    coord.join(10)
    (failure,) = failures
    error = failure["exception"]
    assert isinstance(error, DeadlockError)
    assert error.name == "last"
    assert "join" in str(error)
    assert len(error.cycle) == 2


def test_E16_another_coordinators_join_in_a_handler_is_allowed(coord):
    """It does not wait for this handler."""
    with Coordinator(name="other") as other:
        other.on("b", lambda data: data)
        coord.on("a", lambda data: (other.emit("b"), other.join(10)) and "joined")
        assert coord.emit("a").wait(10).results == ("joined",)


@pytest.mark.parametrize("kind", ["sync", "async"])
def test_E16_a_lane_that_is_lent_is_taken_back_by_one_alone(coord, kind):
    """Another event is worked on when the wait ends: the waiting handler stands in line for its lane."""
    order, began, go = [], threading.Event(), threading.Event()

    def first(data):
        coord.wait_for("wake", 20)
        order.append("first")

    async def first_async(data):
        await coord.wait_for_async("wake", 20)
        order.append("first")

    def second(data):
        began.set()
        assert go.wait(20)
        order.append("second")

    coord.on("first", first if kind == "sync" else first_async)
    coord.on("second", second)
    coord.on("third", lambda data: order.append("third"))
    with coord.run("r"):
        coord.emit("first")
        coord.emit("second")
        coord.emit("third")
    assert began.wait(10)
    coord.emit("wake")
    lane = coord._bus._runs["r"]
    eventually(lambda: lane._returning)
    go.set()
    coord.join(10)
    assert order == ["second", "first", "third"]


@pytest.mark.parametrize("times", [1, 2, 3])
def test_E16_a_handler_that_is_cancelled_while_it_takes_its_lane_back_jams_nothing(coord, times, caplog):
    """However often: it ends as cancelled when it has the lane again, and the run goes on."""
    began, go = threading.Event(), threading.Event()
    seen = []

    async def waits(data):
        seen.append(asyncio.current_task())
        await coord.wait_for_async("never")

    def busy(data):
        began.set()
        assert go.wait(20)

    coord.on("waits", waits)
    coord.on("busy", busy)
    coord.on("after", seen.append)
    with coord.run("r"):
        cancelled = coord.emit("waits")
        coord.emit("busy")
        coord.emit("after", "went on")
    assert began.wait(10)
    (task,) = seen
    lane = coord._bus._runs["r"]
    for _ in range(times):
        task.get_loop().call_soon_threadsafe(task.cancel)
        eventually(lambda: lane._returning)
    for _ in range(3):  # the loop has had its turns
        turned = threading.Event()
        task.get_loop().call_soon_threadsafe(turned.set)
        assert turned.wait(10)
    assert not task.done()
    go.set()
    coord.join(10)
    assert seen[1:] == ["went on"]
    assert isinstance(cancelled.errors[0], asyncio.CancelledError)
    assert settled(coord)


@pytest.mark.parametrize("moment", ["waits", "wants back", "was given it"])
def test_E16_a_loop_that_closes_beneath_a_handler_that_has_lent_its_lane_jams_nothing(coord, moment, caplog):
    """An error on its delivery; its event's later handlers, and the run, go on, never two at once (E8)."""
    began, go = threading.Event(), threading.Event()
    inside, seen = [], []
    loop = asyncio.new_event_loop()

    async def waits(data):
        await coord.wait_for_async("wake")

    def busy(data):
        inside.append("busy")
        began.set()
        assert go.wait(20)
        inside.remove("busy")

    def note(data):
        seen.append((data, list(inside)))

    coord.on("waits", waits, loop=loop)
    coord.on("waits", note)
    coord.on("busy", busy)
    coord.on("after", note)

    def turn_until(condition):
        async def main():
            while not condition():
                await asyncio.sleep(0.001)

        loop.run_until_complete(main())

    with coord.run("r"):
        lost = coord.emit("waits", "second handler")
        turn_until(lambda: coord._bus._expected)
        if moment == "waits":
            coord.emit("busy")
            assert began.wait(10)
        elif moment == "wants back":
            coord.emit("busy")
            assert began.wait(10)
            coord.emit("wake")
            turn_until(lambda: coord._bus._runs["r"]._returning)
        else:
            coord.emit("busy")
            assert began.wait(10)
            coord.emit("wake")
            turn_until(lambda: coord._bus._runs["r"]._returning)
            go.set()
            eventually(lambda: next(iter(coord._bus.away)).loan.given)
        coord.emit("after", "next event")
    tasks = asyncio.all_tasks(loop)
    loop.close()
    coord._bus._watch_loops()
    go.set()
    coord.join(10)
    assert [type(error).__name__ for error in lost.errors] == ["LoopClosedError"]
    assert sorted(seen) == [("next event", []), ("second handler", [])]
    assert not coord._bus.away
    for task in tasks:
        task._log_destroy_pending = False
    del tasks, task
    gc.collect()
    assert coord.emit("after", "still").wait(10).done


def test_E16_what_a_thread_does_while_its_handler_waits_is_not_that_handlers(coord, monkeypatch):
    """A concurrent handler that it runs meanwhile, where no thread can start, lends no lane of another (E6)."""
    order = []
    workers = coord._bus.workers

    def outer(data):
        workers.short_of_threads = True
        monkeypatch.setattr(workers, "_start", lambda: None)
        coord.emit("inner").wait(20)
        order.append("outer")

    def inner(data):
        assert this_thread().lane is None
        with coord.expect("told") as expected:
            coord.emit("tell")
            expected.wait(20)
        order.append("inner")

    coord.on("outer", outer)
    coord.on("inner", inner, concurrent=True)
    coord.on("tell", lambda data: coord.emit("told"))
    coord.emit("outer")
    eventually(lambda: order == ["inner", "outer"])
    workers.short_of_threads = False
    coord.join(20)
    assert order == ["inner", "outer"]


def test_E16_a_worker_that_leaves_calls_another_for_the_job_it_was_called_for(monkeypatch):
    """There were more than allowed since a handler came back from its wait, and the one that was rung is surplus."""
    workers = _workers.Workers("test", 2)
    monkeypatch.setattr(_workers, "PARK_FOR", 30)
    meet, go, done = threading.Barrier(3), threading.Event(), threading.Event()
    for _ in range(2):
        workers.submit(lambda: meet.wait(10))
    meet.wait(10)
    eventually(lambda: len(workers._parked) == 2)
    workers.limit = 3
    began = threading.Event()
    with workers._mutex:  # a third, that will be busy for long
        parked, workers._parked = workers._parked, type(workers._parked)()
    workers.submit(lambda: (began.set(), go.wait(20)))
    assert began.wait(10)
    workers._parked.extend(parked)
    workers.limit = 2
    workers.submit(done.set)
    assert done.wait(10)
    go.set()
    workers.stop()


# -- E7: the end of those who wait -------------------------------------------------------------------------------


@WAITS
@pytest.mark.parametrize("end", ["close", "quit"])
def test_E7_a_close_ends_the_waits_for_events(wait, end):
    """None will come any more: they say so."""
    coord = Coordinator(name="test")
    errors = []

    def target():
        with pytest.raises(ClosedError, match="no event 'a' will come") as caught:
            wait(coord, "a", 20)
        errors.append(caught.value)

    threads = start_all(target)
    eventually(lambda: coord._bus._expected and coord._bus._expected[0]._bells)
    getattr(coord, end)()
    join_all(threads)
    assert errors
    assert settled(coord)


def test_E7_who_waits_for_an_abandoned_event_is_told():
    """`quit` delivers nothing of what is queued: those deliveries end, with an error."""
    coord = Coordinator(name="test")
    began, go = threading.Event(), threading.Event()
    seen = []

    def block(data):
        began.set()
        assert go.wait(20)

    coord.on("a", block)
    coord.on("b", seen.append)
    with coord.run("r"):
        first, second = coord.emit("a"), coord.emit("b")
    assert began.wait(10)
    waiter = start_all(lambda: second.wait(20))
    coord.quit()
    go.set()
    join_all(waiter)
    first.wait(10)
    assert [type(error) for error in second.errors] == [ClosedError]
    assert seen == []


def test_E15_expected_outside_of_its_block_cannot_be_waited_for(coord):
    """It would wait for ever: nobody tells it of events."""
    expected = coord.expect("a")
    with pytest.raises(RuntimeError, match="of `with coord"):
        expected.wait(0)
    with pytest.raises(RuntimeError, match="of `with coord"):
        asyncio.run(expected.wait_async(0))


# -- E6: at the exit ---------------------------------------------------------------------------------------------

STUCK = """
    import asyncio, sys, threading
    from agentdiff import *
    coord = Coordinator()
    other = Coordinator()

    def sync(data):
        try:
            coord.wait_for("never")
        except DeadlockError as error:
            print("ended:", error)

    async def on_loop(data):
        try:
            await coord.wait_for_async("never")
        except DeadlockError as error:
            print("ended:", error)

    def works(data):
        threading.Event().wait(0.4)
        coord.emit("never", "it came")

    def told(data):
        print(coord.wait_for("never").data)

    def asks(data):
        coord.emit("sync").wait()
        print("asked")

    coord.on("sync", sync)
    coord.on("on_loop", on_loop)
    coord.on("asks", asks)
    coord.on("beside", told, concurrent=True)
    coord.on("beside", works)
    coord.on("elsewhere", told)
    other.on("elsewhere", works)
    other.on("waits elsewhere", told)
    name = sys.argv[1]
    with coord.expect("never") as expected:
        coord.emit(name)
        other.emit(name)
"""


@pytest.mark.parametrize("name", ["sync", "on_loop", "asks"])
def test_E6_waits_that_nobody_can_end_are_ended_at_the_exit(name):
    """When only handlers that wait are left; the error names the event."""
    done = run_script(STUCK, name)
    assert (done.returncode, done.stderr) == (0, "")
    said = "ended: the process is ending, and nobody is left who could emit 'never'"
    assert done.stdout.startswith(said)
    assert ("asked" in done.stdout) is (name == "asks")


@pytest.mark.parametrize("name", ["beside", "elsewhere"])
def test_E6_a_wait_that_somebody_can_still_end_goes_on_at_the_exit(name):
    """Another handler of the same event, or another coordinator's, works half a second and then emits."""
    done = run_script(STUCK, name)
    assert (done.returncode, done.stderr, done.stdout) == (0, "", "it came\n")


def test_E6_a_handler_of_one_coordinator_that_waits_for_anothers_event_is_ended_too():
    """Neither has anything else to do."""
    done = run_script(STUCK, "waits elsewhere")
    assert done.returncode == 0
    assert "DeadlockError: the process is ending" in done.stderr


# -- E12: the end of one run -------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["sync", "async"])
def test_E12_join_waits_for_one_run(coord, kind):
    """Its cascades too; another run's handler goes on meanwhile."""
    go, seen = threading.Event(), []
    coord.on("slow", lambda data: go.wait(20))
    coord.on("n", lambda data: (seen.append(data), data and coord.emit("n", data - 1)))

    def join(timeout=20):
        if kind == "sync":
            coord.join(timeout, run="r")
        else:
            asyncio.run(coord.join_async(timeout, run="r"))

    join(0)
    with coord.run("s"):
        other = coord.emit("slow")
    with coord.run("r"):
        coord.emit("n", 30)
    join()
    assert seen == list(range(30, -1, -1))
    assert not other.done
    with coord.run("r"):
        coord.emit("slow")
    with pytest.raises(CoordinationTimeoutError):
        join(0.01)
    go.set()
    join()
    coord.join(10)
    assert settled(coord)


# -- E5 ----------------------------------------------------------------------------------------------------------


def test_E5_two_hundred_thousand_events_from_four_threads_are_all_handled(coord):
    """None lost, none twice; each thread's in order."""
    seen = []
    coord.on("a", seen.append)

    def emit(who):
        for number in range(50_000):
            coord.emit("a", (who, number))

    join_all(start_all(*[lambda who=who: emit(who) for who in range(4)]), 50)
    coord.join(50)
    assert len(seen) == 200_000
    for who in range(4):
        assert [number for sender, number in seen if sender == who] == list(range(50_000))


def test_E5_what_was_taken_is_handled_and_what_was_refused_was_refused_aloud(caplog):
    """With `max_pending=100` and a handler that blocks; an agent inside never sees it, and loses only its events."""
    began, go, seen, taken, results = threading.Event(), threading.Event(), [], [], []
    refused = 0

    def handler(event):
        began.set()
        assert go.wait(20)
        seen.append(event.data)

    with Coordinator(name="test", max_pending=100) as coord:
        coord.on("*", handler, pass_event=True)
        agent = coord.coordinate("agent")(lambda number: number * 2)
        coord.emit("a", "first")
        assert began.wait(10)
        for number in range(300):
            try:
                coord.emit("a", number)
                taken.append(number)
            except QueueFullError:
                refused += 1
            results.append(agent(number))
        assert results == [number * 2 for number in range(300)]
        pending = coord.snapshot().pending
        assert pending == 100
        lost = coord.snapshot().counts.events_refused
        go.set()
        coord.join(20)
    data = [one for one in seen if not isinstance(one, dict)]
    assert data == ["first", *taken]
    assert len(taken) + refused == 300
    assert len(seen) - len(data) + lost == 600


@pytest.mark.parametrize("place", ["first of its lane", "behind others"])
def test_E4_ctrl_c_inside_emit_jams_nothing(place):
    """Wherever it comes: the event is handled once or not at all, later ones are, and `join` comes back."""
    step, hit = 0, True
    coord = Coordinator(name="test", workers=1, exit_timeout=0)
    while hit:
        seen, began, go = [], threading.Event(), threading.Event()

        def handler(data, seen=seen, began=began, go=go):
            if data == "block":
                began.set()
                assert go.wait(20)
            seen.append(data)

        with coord.on("a", handler), coord.run(f"r{step}"):
            if place == "behind others":
                coord.emit("a", "block")
                assert began.wait(10)
            hit = interrupted(step, lambda: coord.emit("a", "interrupted"))
            go.set()
            coord.emit("a", "after")
            coord.join(10)
        seen = [data for data in seen if data != "block"]
        assert seen in (["interrupted", "after"], ["after", "interrupted"], ["after"]), step
        assert hit or seen == ["interrupted", "after"]
        assert settled(coord)
        step += 1
    assert step > 2
    coord.close()


def test_E4_ctrl_c_while_the_first_worker_is_started_jams_nothing():
    """The place that it was to take is not lost."""
    step, hit = 0, True
    while hit:
        coord = Coordinator(name="test", workers=1, exit_timeout=0)
        seen = []
        coord.on("a", seen.append)
        hit = interrupted(step, functools.partial(coord.emit, "a", "interrupted"))
        coord.emit("a", "after")
        coord.join(10)
        assert "after" in seen, step
        coord.close()
        step += 1
