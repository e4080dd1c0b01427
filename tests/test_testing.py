from __future__ import annotations

import asyncio
import threading

import pytest
from support import join_all, start_all

from agentdiff import CoordinationTimeoutError, Coordinator
from agentdiff.testing import EventRecorder, FakeClock, InlineCoordinator


@pytest.fixture
def inline():
    before = set(threading.enumerate())
    coord = InlineCoordinator()
    yield coord
    coord.close()
    assert set(threading.enumerate()) <= before


@pytest.fixture
def recorder(coord):
    return EventRecorder(coord)


# -- the inline coordinator -----------------------------------------------------------------------------------


def test_T1_inline_every_event_is_handled_before_emit_returns(inline):
    """On the thread that emits, with its whole cascade, in emit order."""
    seen = []

    @inline.on("a")
    def a(data):
        seen.append(("a", data, threading.current_thread()))
        inline.emit("b", data)
        seen.append(("a ends", data, threading.current_thread()))

    @inline.on("b")
    def b(data):
        seen.append(("b", data, threading.current_thread()))

    delivery = inline.emit("a", 1)
    here = threading.current_thread()
    assert seen == [("a", 1, here), ("a ends", 1, here), ("b", 1, here)]
    assert delivery.done
    assert inline.snapshot().pending == 0


def test_T1_inline_agents_and_their_chains_run_to_the_end(inline):
    """What `@coordinate` and `on` chain is over when the agent's call returns."""
    reports = []

    @inline.coordinate("researcher", lock_name="api")
    def research(topic):
        return f"facts about {topic}"

    inline.on("researcher_complete", lambda data: reports.append(data["result"]))
    research("bees")
    assert reports == ["facts about bees"]


@pytest.mark.parametrize("inside", [True, False], ids=["within a loop", "without a loop"])
def test_T1_inline_async_handlers_run_to_their_end_as_well(inline, inside):
    """Before `emit` returns, too, even if the emitter runs on a loop itself."""
    seen = []

    @inline.on("a")
    async def handler(data):
        await asyncio.sleep(0.001)
        seen.append(data)
        return data

    async def emits():
        return inline.emit("a", 1)

    delivery = asyncio.run(emits()) if inside else inline.emit("a", 1)
    assert (seen, delivery.results) == ([1], (1,))


def test_T1_inline_handlers_of_the_tests_own_loop_run_there(inline):
    """They are awaited as ever."""

    async def main():
        loops = []

        async def handler(data):
            loops.append(asyncio.get_running_loop())

        inline.on("a", handler)
        await inline.emit("a")
        assert loops == [asyncio.get_running_loop()]

    asyncio.run(main())


def test_T1_inline_a_handler_that_waits_for_what_it_emits_has_it(inline):
    """Request and reply in one thread."""
    inline.on("question", lambda data: data * 2)
    inline.on("start", lambda data: inline.emit("question", data).wait(5).results[0])
    assert inline.emit("start", 21).results == (42,)


def test_T1_inline_a_failing_handler_is_an_error_on_the_delivery(inline, caplog):
    """And the emitter goes on."""
    failures = EventRecorder(inline, "handler_failed")

    @inline.on("a")
    def fails(data):
        raise ValueError("mine")

    (error,) = inline.emit("a").errors
    assert str(error) == "mine"
    assert "mine" in caplog.text
    failures.assert_emitted("handler_failed", times=1)


def test_T1_inline_two_threads_may_emit(inline):
    """Everything is handled, by one of them at a time."""
    seen, busy = [], []

    @inline.on("a")
    def handler(data):
        busy.append(1)
        assert len(busy) == 1
        seen.append(data)
        busy.pop()

    join_all(start_all(*[lambda: [inline.emit("a", n) for n in range(200)]] * 4))
    assert inline.join(5) is None
    assert len(seen) == 800


def test_T1_inline_async_handlers_of_no_loop_end_with_close():
    """Closing twice is fine; nothing runs afterwards."""
    coord = InlineCoordinator(name="mine")
    assert repr(coord) == "<InlineCoordinator 'mine'>"
    coord.on("a", asyncio.sleep)
    coord.emit("a", 0)
    coord.close()
    coord.close()


# -- the recorder -------------------------------------------------------------------------------------------


def test_T1_a_recorder_has_the_events_in_order(coord, recorder):
    """Names, events by name, all; and it can begin anew."""
    coord.emit("a", 1)
    coord.emit("b", 2)
    coord.emit("a", 3)
    assert recorder.names == ("a", "b", "a")
    assert [event.data for event in recorder.of("a")] == [1, 3]
    assert [event.data for event in recorder.events] == [1, 2, 3]
    recorder.clear()
    assert recorder.events == ()
    recorder.assert_not_emitted("a")
    recorder.subscription.cancel()
    coord.emit("a")
    assert recorder.names == ()


def test_T1_a_recorder_of_a_pattern_records_what_fits(coord):
    """The rest is of no interest."""
    recorder = EventRecorder(coord, "writer_*")
    coord.coordinate("reader")(len)("")
    coord.coordinate("writer")(len)("")
    assert recorder.names == ("writer_started", "writer_complete")
    recorder.assert_order("writer_started", "writer_complete")


def test_T1_a_recorders_assertions_say_what_there_was(coord, recorder):
    """What is missing, and what was recorded instead."""
    coord.emit("a", 1)
    coord.emit("b", 2)
    recorder.assert_emitted("a")
    recorder.assert_emitted("a", times=1, data=1)
    recorder.assert_order("a", "b")
    recorder.assert_not_emitted("c")
    told = "recorded: a, b"
    for wrong, words in [
        (lambda: recorder.assert_emitted("c"), f"no event 'c'; {told}"),
        (lambda: recorder.assert_emitted("a", times=2), f"event 'a' was emitted 1 times, not 2; {told}"),
        (lambda: recorder.assert_emitted("a", data=9), f"no event 'a' with data 9; there were: 1; {told}"),
        (lambda: recorder.assert_emitted("c", data=9), "there were: none at all"),
        (lambda: recorder.assert_not_emitted("a"), f"event 'a' was emitted 1 times, not 0; {told}"),
        (lambda: recorder.assert_order("b", "a"), f"no event 'a' after 'b'; {told}"),
        (lambda: recorder.assert_order("c"), f"no event 'c'; {told}"),
    ]:
        with pytest.raises(AssertionError) as caught:
            wrong()
        assert words in str(caught.value)
    recorder.clear()
    with pytest.raises(AssertionError, match="recorded: nothing"):
        recorder.assert_emitted("a")


def test_T1_a_recorder_waits_until_all_is_handled(coord):
    """But not for ever."""
    gate = threading.Event()
    coord.on("a", lambda data: gate.wait(20) and coord.emit("b"))
    recorder = EventRecorder(coord)
    coord.emit("a")
    threading.Timer(0.01, gate.set).start()
    recorder.assert_order("a", "b")
    impatient = EventRecorder(coord, timeout=0)
    gate.clear()
    coord.emit("a")
    assert "b" not in impatient.names
    gate.set()


# -- the clock ----------------------------------------------------------------------------------------------


def test_T1_time_stands_still_until_the_test_moves_it():
    """Threads and tasks wake in the order of their times, and no sooner."""
    clock = FakeClock()
    coord = Coordinator(clock=clock)
    woken = []

    def wait(seconds):
        with pytest.raises(CoordinationTimeoutError):
            coord.wait_for("never", timeout=seconds)
        woken.append(seconds)

    async def wait_async(seconds):
        with pytest.raises(CoordinationTimeoutError):
            await coord.wait_for_async("never", timeout=seconds)
        woken.append(seconds)

    threads = start_all(lambda: wait(10), lambda: asyncio.run(wait_async(20)))
    clock.wait_for_sleepers(2)
    clock.advance(9.9)
    assert woken == []
    clock.advance(0.2)
    clock.wait_for_sleepers(1)
    join_all(threads[:1])
    assert woken == [10]
    clock.advance(10)
    join_all(threads)
    assert woken == [10, 20]
    coord.close()


def test_T1_what_comes_before_its_time_ends_the_wait():
    """And its alarm is gone."""
    clock = FakeClock()
    coord = Coordinator(clock=clock)
    with coord.expect("a") as expected:
        threads = start_all(lambda: expected.wait(10))
        clock.wait_for_sleepers(1)
        coord.emit("a")
        join_all(threads)

    async def main():
        with coord.expect("a") as expected:
            waiting = asyncio.ensure_future(expected.wait_async(10))
            await asyncio.sleep(0)
            coord.emit("a")
            await waiting

    asyncio.run(main())
    with pytest.raises(TimeoutError, match="0 waits have begun, not 1"):
        clock.wait_for_sleepers(1, timeout=0.01)
    with coord.lock("l"):
        assert coord.lock("l").acquire(timeout=None)
        coord.lock("l").release()
    coord.close()


def test_T1_a_limits_hour_takes_no_time():
    """What waits for a rate goes on as soon as the clock says so."""
    clock = FakeClock()
    coord = Coordinator(clock=clock)
    coord.limit("api", requests=1, per=3600, margin=0)
    entered = []

    def call():
        with coord.lock("api"):
            entered.append(clock.now)

    call()
    threads = start_all(call)
    clock.wait_for_sleepers(1)
    clock.advance(3600)
    join_all(threads)
    assert entered == [1000.0, 4600.0]
    coord.close()


def test_T1_a_wait_of_no_time_does_not_wait_for_the_test():
    """The clock stands still, and such a wait is over at once."""
    clock, lock = FakeClock(), threading.Lock()
    assert clock.wait(lock, 0) is True
    assert clock.wait(lock, 0) is False
