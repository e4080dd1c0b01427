from __future__ import annotations

import asyncio
import contextlib
import contextvars
import functools
import random
import threading
import time
from unittest.mock import Mock

import pytest
from support import eager_switching, eventually, join_all, start_all, yielding_at_opcodes

from agentdiff import (
    ClosedError,
    CoordinationTimeoutError,
    Coordinator,
    DeadlockError,
    Event,
    LoopClosedError,
    QueueFullError,
    _workers,
    bus,
)
from agentdiff.testing import FakeClock


class Gate:
    """A handler that stays until it is let go; `began` tells that it has been called."""

    def __init__(self):
        self.began = threading.Event()
        self.go = threading.Event()

    def __call__(self, data):
        self.began.set()
        assert self.go.wait(20)
        return data

    async def wait_async(self, data):
        self.began.set()
        while not self.go.is_set():
            await asyncio.sleep(0.001)
        return data

    def __enter__(self):
        return self

    def __exit__(self, *error):
        self.go.set()


@pytest.fixture
def gate():
    with Gate() as made:
        yield made


@pytest.fixture
def fragile():
    """A coordinator that can't hold up the end of the process, for tests that would jam it if they failed."""
    made = Coordinator(name="test", exit_timeout=0)
    yield made
    made.join(5)
    made.close()


def as_async(function):
    async def handler(data):
        await asyncio.sleep(0)
        return function(data)

    return handler


def as_sync_giving_coroutine(function):
    inner = as_async(function)
    return lambda data: inner(data)


def as_is(function):
    return function


KINDS = pytest.mark.parametrize("kind", [as_is, as_async, as_sync_giving_coroutine])


@contextlib.contextmanager
def loop_elsewhere():
    """A loop that runs on a thread of its own, as an application's does."""
    loop = asyncio.new_event_loop()
    threads = start_all(loop.run_forever)
    try:
        yield loop
    finally:
        if not loop.is_closed():
            loop.call_soon_threadsafe(loop.stop)
            join_all(threads)
            loop.close()


def in_thread(function):
    """What a function gives when a new thread runs it."""
    found = []
    join_all(start_all(lambda: found.append(function())))
    return found[0]


# -- E1: the handlers of one event ---------------------------------------------------------------------------


def test_E1_handlers_run_in_registration_order(coord):
    """Sync, async, patterns and plain names: one after another as registered, each after the end of the one before."""
    order = []

    def make(number):
        def handler(data):
            order.append((number, "begins"))
            time.sleep(0)
            order.append((number, "ends"))
            return number

        return [as_is, as_async, as_sync_giving_coroutine][number % 3](handler)

    for number in range(18):
        coord.on(["a", "*", "a*", "?"][number % 4], make(number))
    delivery = coord.emit("a").wait(10)
    assert order == [(number, what) for number in range(18) for what in ("begins", "ends")]
    assert delivery.results == tuple(range(18))


def test_E1_the_next_handler_waits_for_an_async_one(coord, gate):
    """An async handler that awaits isn't overtaken, neither by the next handler nor by the lane's next event."""
    seen = []
    coord.on("a", gate.wait_async)
    coord.on("a", seen.append)
    first, second = coord.emit("a", 1), coord.emit("a", 2)
    assert gate.began.wait(10)
    with pytest.raises(CoordinationTimeoutError):
        first.wait(0.05)
    assert seen == []
    gate.go.set()
    second.wait(10)
    assert seen == [1, 2]


@pytest.mark.parametrize(
    "make", [lambda gate: gate, lambda gate: gate.wait_async, lambda gate: lambda data: gate.wait_async(data)]
)
def test_E1_nobody_waits_for_a_concurrent_handler_but_its_delivery(coord, gate, make):
    """Later handlers and events go on; the delivery, `join` and the pending count wait."""
    coord.on("a", lambda data: "before")
    coord.on("a", make(gate), concurrent=True)
    coord.on("a", lambda data: "after")
    coord.on("b", lambda data: "next")
    slow = coord.emit("a", "slow")
    assert coord.emit("b").wait(10).results == ("next",)
    assert gate.began.wait(10)
    assert not slow.done
    assert slow.results == ("before", "after")
    assert coord.snapshot().pending == 1
    with pytest.raises(CoordinationTimeoutError):
        coord.join(0.01)
    gate.go.set()
    assert slow.wait(10).results == ("before", "slow", "after")
    coord.join(10)


@pytest.mark.parametrize("concurrent", [lambda seen: seen.append, lambda seen: as_async(seen.append)])
def test_E1_a_concurrent_handler_starts_in_its_turn(coord, gate, concurrent):
    """Not before the handlers ahead of it have ended."""
    seen = []
    coord.on("a", gate)
    coord.on("a", concurrent(seen), concurrent=True)
    delivery = coord.emit("a", 1)
    assert gate.began.wait(10)
    assert seen == []
    gate.go.set()
    delivery.wait(10)
    assert seen == [1]


def test_E1_concurrent_handlers_of_one_event_run_side_by_side(coord):
    """They meet at a barrier."""
    barrier = threading.Barrier(3)
    for _ in range(3):
        coord.on("a", lambda data: barrier.wait(10) >= 0, concurrent=True)
    assert coord.emit("a").wait(20).results == (True, True, True)


# -- E2: lanes -----------------------------------------------------------------------------------------------


class Ward:
    """A handler that notes what it got, and whether it ever ran twice at once."""

    def __init__(self):
        self.seen = []
        self.inside = 0
        self.most = 0

    def __call__(self, data):
        self.inside += 1
        self.most = max(self.most, self.inside)
        time.sleep(0)
        self.seen.append(data)
        self.inside -= 1


@KINDS
def test_E2_events_of_one_run_are_delivered_one_at_a_time(coord, kind):
    """From however many threads they come; each thread's keep their order."""
    ward = Ward()
    coord.on("a", kind(ward))

    def emit(who):
        with coord.run("r"):
            for number in range(60):
                coord.emit("a", (who, number))

    with eager_switching():
        join_all(start_all(*[functools.partial(emit, who) for who in range(6)]))
        coord.join(20)
    assert ward.most == 1
    for who in range(6):
        assert [number for sender, number in ward.seen if sender == who] == list(range(60))


@KINDS
def test_E2_events_of_one_thread_keep_their_order(coord, kind):
    """Outside a run the thread is the lane."""
    ward = Ward()
    coord.on("*", kind(ward))
    for number in range(200):
        coord.emit(f"name{number % 7}", number)
    coord.join(20)
    assert (ward.seen, ward.most) == (list(range(200)), 1)


def test_E2_events_of_one_task_keep_their_order_and_tasks_run_in_parallel(coord):
    """Outside a run the task is the lane, not its thread."""
    barrier = threading.Barrier(3)
    seen = {0: [], 1: [], 2: []}

    def handler(data):
        who, number = data
        if number == 0:
            barrier.wait(10)
        seen[who].append(number)

    coord.on("a", handler)

    async def emitter(who):
        for number in range(20):
            coord.emit("a", (who, number))
            await asyncio.sleep(0)

    async def main():
        await asyncio.gather(*map(emitter, range(3)))
        await coord.join_async(20)

    asyncio.run(main())
    assert list(seen.values()) == [list(range(20))] * 3


@pytest.mark.parametrize("lane", ["threads", "runs"])
def test_E2_different_lanes_run_in_parallel(coord, lane):
    """As many as there are workers meet in their handlers."""
    barrier = threading.Barrier(16)
    coord.on("a", lambda data: barrier.wait(20) >= 0)

    def emit(number):
        with coord.run(f"r{number}") if lane == "runs" else contextlib.nullcontext():
            return coord.emit("a")

    if lane == "runs":
        deliveries = [emit(number) for number in range(16)]
    else:
        deliveries = [in_thread(lambda: emit(0)) for _ in range(16)]
    assert [delivery.wait(20).results for delivery in deliveries] == [(True,)] * 16


def test_E2_no_more_handlers_run_at_once_than_there_are_workers():
    """The third lane's event waits for a worker."""
    with Coordinator(name="test", workers=2) as coord, Gate() as gate:
        ward = []
        coord.on("a", lambda data: (ward.append(data), gate(data)))
        for number in range(5):
            with coord.run(f"r{number}"):
                coord.emit("a", number)
        eventually(lambda: len(ward) == 2)
        eventually(lambda: coord._bus.workers.backlog == 3)
        assert coord._bus.workers.threads == 2
        assert len(ward) == 2
        gate.go.set()
    assert sorted(ward) == list(range(5))


def test_E2_a_long_lane_does_not_starve_the_others():
    """With one worker only, a lane that has much to do lets others in between."""
    with Coordinator(name="test", workers=1) as coord, Gate() as gate:
        seen = []
        coord.on("first", gate)
        coord.on("a", seen.append)
        coord.emit("first")
        with coord.run("long"):
            for _ in range(1000):
                coord.emit("a", "long")
        with coord.run("short"):
            coord.emit("a", "short")
        gate.go.set()
        coord.join(20)
    assert len(seen) == 1001
    assert seen.index("short") < 500


def test_E2_what_a_handler_emits_belongs_to_the_run_of_its_event(coord):
    """At any depth, from sync and async handlers, with its parent's id."""
    events = []
    for number in range(6):

        def handler(event, number=number):
            events.append(event)
            coord.emit(f"n{number + 1}")

        coord.on(f"n{number}", as_async(handler) if number % 2 else handler, pass_event=True)
    with coord.run("r"):
        coord.emit("n0")
    coord.join(10)
    assert [event.name for event in events] == [f"n{number}" for number in range(6)]
    assert {event.run_id for event in events} == {"r"}
    assert [event.parent_id for event in events] == [None, *[event.id for event in events[:-1]]]
    assert len({event.id for event in events}) == 6


def test_E2_outside_a_run_an_events_id_names_the_run_of_what_its_handlers_emit(coord):
    """The first has none; all below it are of one run, named after it."""
    events = []

    def handler(event):
        events.append(event)
        if event.data:
            coord.emit("a", event.data - 1)
            coord.emit("a", 0)

    coord.on("a", handler, pass_event=True)
    coord.emit("a", 2)
    coord.join(10)
    assert events[0].run_id is None
    assert len(events) == 5
    assert {event.run_id for event in events[1:]} == {events[0].id}


def test_E2_two_events_of_one_thread_start_two_runs(coord):
    """What their handlers emit may run in parallel."""
    barrier = threading.Barrier(2)
    runs = []
    coord.on("a", lambda data: coord.emit("b", data))
    coord.on("b", lambda event: (barrier.wait(10), runs.append(event.run_id)), pass_event=True)
    events = [coord.emit("a").event.id, coord.emit("a").event.id]
    coord.join(20)
    assert sorted(runs) == sorted(events)


def test_E2_what_a_handler_emits_comes_after_what_its_run_has_queued(coord, gate):
    """The lane is one line."""
    seen = []
    coord.on("first", lambda data: (gate(data), coord.emit("a", "from the handler")))
    coord.on("a", seen.append)
    with coord.run("r"):
        coord.emit("first")
        coord.emit("a", "queued")
    gate.go.set()
    coord.join(10)
    assert seen == ["queued", "from the handler"]


@pytest.mark.parametrize("moment", ["before", "after"])
def test_E2_an_event_that_comes_when_the_lane_is_let_go_is_delivered(coord, moment):
    """The worker has found the lane empty; the event comes right before or right after it lets the turn go."""
    seen, let_go = [], threading.Event()
    coord.on("a", seen.append)

    class Turn:
        def __init__(self):
            self.lock = threading.Lock()
            self.acquire = self.lock.acquire
            self.late = lambda: in_run(2)

        def release(self):
            late, self.late = self.late, lambda: None
            if moment == "before":
                late()
            self.lock.release()
            if moment == "after":
                late()
            let_go.set()

    def in_run(number):
        with coord.run("r"):
            return coord.emit("a", number)

    with coord.run("r"):
        lane = coord._bus.lane_of(bus.CAUSE.get())
        lane.turn = Turn()
        in_run(1)
    assert let_go.wait(10)
    coord.join(10)
    assert seen == [1, 2]


def test_E2_an_async_handler_that_ends_before_it_is_waited_for_stops_nothing(coord):
    """It reports from its loop before the worker has put the lane down."""
    seen = []
    real = coord._bus._send_away

    def send_away(*args):
        real(*args)
        eventually(lambda: not coord._bus.away)

    coord._bus._send_away = send_away
    coord.on("a", as_async(seen.append))
    coord.on("a", as_async(seen.append))
    for number in range(5):
        coord.emit("a", number)
    coord.join(20)
    assert seen == [number for number in range(5) for _ in range(2)]


# -- E3: handlers that raise ---------------------------------------------------------------------------------

ERRORS = pytest.mark.parametrize(
    "kind_of_error", [ValueError, SystemExit, KeyboardInterrupt, GeneratorExit, asyncio.CancelledError, RecursionError]
)


@KINDS
@ERRORS
def test_E3_a_handler_that_raises_disturbs_nobody(fragile, caplog, kind, kind_of_error):
    """Whatever it raises: the rest run, and it is called again for each later event, once."""
    coord = fragile
    calls, others = [], []

    def broken(data):
        calls.append(data)
        raise kind_of_error(f"broken {data}")

    coord.on("a", others.append)
    coord.on("a", kind(broken))
    coord.on("a", kind(others.append))
    for number in range(3):
        delivery = coord.emit("a", number).wait(5)
        assert [type(error) for error in delivery.errors] == [kind_of_error]
        assert delivery.results == (None, None)
    assert calls == [0, 1, 2]
    assert others == [0, 0, 1, 1, 2, 2]
    assert coord.snapshot().counts.handlers_failed == 3


@KINDS
def test_E3_an_error_is_logged_with_its_traceback(coord, caplog, kind):
    """Who failed at what, and where."""

    def broken_tool(data):
        raise ValueError("no such customer")

    coord.on("a", kind(broken_tool))
    coord.emit("a").wait(10)
    (record,) = caplog.records
    assert (record.name, record.levelname) == ("agentdiff", "ERROR")
    assert "'a'" in record.getMessage()
    assert "ValueError: no such customer" in record.getMessage()
    assert "broken_tool" in caplog.text
    assert "Traceback (most recent call last)" in caplog.text
    assert 'raise ValueError("no such customer")' in caplog.text


def test_E3_an_error_is_told_as_an_event(coord, caplog):
    """`handler_failed` holds the facts, and belongs to the event's run."""
    told = []

    def broken(data):
        raise ValueError("broken")

    coord.on("a", broken)
    coord.on("handler_failed", told.append, pass_event=True)
    with coord.run("r"):
        delivery = coord.emit("a", 7)
    coord.join(10)
    (event,) = told
    assert (event.run_id, event.parent_id) == ("r", delivery.event.id)
    assert event.data["event"] is delivery.event
    assert event.data["exception"] is delivery.errors[0]
    assert event.data["error"] == "broken"
    assert event.data["error_type"] == "ValueError"
    assert "broken" in event.data["handler"]
    assert 'raise ValueError("broken")' in event.data["traceback"]


@pytest.mark.parametrize("name", ["handler_failed", "*", "handler_*"])
@KINDS
def test_E3_a_failing_handler_of_handler_failed_is_logged_and_counted_only(coord, caplog, name, kind):
    """Nothing echoes, wildcards included."""
    calls = []

    def broken(data):
        calls.append(data)
        raise ValueError("broken")

    coord.on("a", broken)
    coord.on(name, kind(broken))
    coord.emit("a").wait(10)
    coord.join(10)
    expected = 4 if name == "*" else 2  # `*` fails for the event, and for each of the two failures
    assert len(calls) == coord.snapshot().counts.handlers_failed == expected
    assert len([record for record in caplog.records if record.levelname == "ERROR"]) == expected


class HostileResult:
    __class__ = property(lambda self: 1 / 0)  # such as a lazy object whose source is gone


class HostileError(Exception):
    def __str__(self):
        raise ValueError("no text")

    __repr__ = __str__


class HostileHandler:
    def __call__(self, data):
        raise ValueError("broken")

    def __repr__(self):
        raise ValueError("no name")


def raises_hostile(data):
    raise HostileError


HOSTILE = {
    "a result that hides its class": lambda data: HostileResult(),
    "an error that can't be shown": raises_hostile,
    "a handler that can't be shown": HostileHandler(),
}


@pytest.mark.parametrize("what", HOSTILE)
def test_E3_no_object_of_the_users_can_stop_a_lane(fragile, what, monkeypatch):
    """An error that can't be shown, a result that defends itself: the delivery ends, and the next one comes."""
    monkeypatch.setattr("logging.raiseExceptions", False)
    monkeypatch.setattr(bus.logger, "propagate", False)  # pytest's own handler would raise
    seen = []
    fragile.on("a", HOSTILE[what])
    fragile.on("a", seen.append)
    fragile.emit("a", 1).wait(3)
    fragile.emit("a", 2).wait(3)
    assert seen == [1, 2]


@KINDS
def test_E3_no_logging_set_up_can_stop_a_lane(fragile, kind, monkeypatch):
    """A log filter that raises is a fault of the program's, and no reason to lose events."""

    def broken(data):
        raise ValueError("broken")

    def no(record):
        raise TypeError("filter")

    seen = []
    fragile.on("a", kind(broken))
    fragile.on("a", seen.append)
    monkeypatch.setattr(bus.logger, "filters", [Mock(filter=no)])
    fragile.emit("a", 1).wait(3)
    fragile.emit("a", 2).wait(3)
    assert seen == [1, 2]


# -- E4: emit and its delivery -------------------------------------------------------------------------------


@pytest.mark.parametrize("where", ["thread", "loop", "handler"])
def test_E4_emit_never_waits_for_a_handler(coord, gate, where):
    """The handler is stuck, in this very lane, and still every emit comes back."""
    coord.on("a", gate)

    def emit_all():
        with coord.run("r"):
            return [coord.emit("a", number) for number in range(50)]

    async def on_loop():
        return emit_all()

    if where == "thread":
        deliveries = emit_all()
    elif where == "loop":
        deliveries = asyncio.run(on_loop())
    else:
        coord.on("go", lambda data: emit_all())
        (deliveries,) = coord.emit("go").wait(10).results
    assert gate.began.wait(10)
    assert not any(delivery.done for delivery in deliveries)
    gate.go.set()
    coord.join(10)
    assert [delivery.results for delivery in deliveries] == [(number,) for number in range(50)]


def test_E4_wait_gives_the_delivery_itself(coord):
    """So that `.wait().results` reads well; again and again, and from several threads."""
    coord.on("a", lambda data: data + 1)
    delivery = coord.emit("a", 1)
    assert delivery.wait() is delivery
    assert delivery.wait(0) is delivery
    assert delivery.done
    assert in_thread(delivery.wait) is delivery
    assert delivery.results == (2,)
    assert "done" in repr(delivery)


def test_E4_a_wait_ends_when_its_time_is_over(gate):
    """Not before, by the clock that was given; the error names the event and the time."""
    clock = FakeClock()
    coord = Coordinator(name="test", clock=clock)
    coord.on("a", gate)
    delivery = coord.emit("a")
    ended = []

    def wait():
        with pytest.raises(CoordinationTimeoutError, match=r"'a'.*30 s") as caught:
            delivery.wait(30)
        ended.append(caught.value)

    threads = start_all(wait)
    clock.wait_for_sleepers(1)
    clock.advance(29.9)
    assert not ended
    clock.advance(0.2)
    join_all(threads)
    assert isinstance(ended[0], TimeoutError)
    assert (ended[0].name, ended[0].timeout) == ("a", 30)
    with pytest.raises(CoordinationTimeoutError):
        delivery.wait(0)
    assert not coord._bus.bells
    gate.go.set()
    assert delivery.wait().results == (None,)
    coord.close()


def test_E4_a_delivery_can_be_awaited(coord, gate):
    """By several tasks of several loops at once, with threads beside them; afterwards nothing is left."""
    coord.on("a", gate)
    delivery = coord.emit("a", 1)

    async def wait():
        async def one():
            return await delivery

        return await asyncio.gather(one(), one())

    found = []
    threads = start_all(*[lambda: found.extend(asyncio.run(wait()))] * 2, lambda: found.append(delivery.wait(10)))
    eventually(lambda: sum(map(len, list(coord._bus.bells.values()))) == 5)
    gate.go.set()
    join_all(threads)
    assert found == [delivery] * 5
    eventually(lambda: not coord._bus.bells)


def test_E4_a_wait_that_is_cancelled_leaves_nothing(coord, gate):
    """Cancelled, or interrupted: no bell is left, and the delivery goes on."""
    coord.on("a", gate)
    delivery = coord.emit("a", 1)

    async def main():
        async def wait():
            return await delivery

        with pytest.raises(asyncio.TimeoutError):
            await asyncio.wait_for(wait(), 0.01)

    asyncio.run(main())

    def interrupt(lock, timeout):
        raise KeyboardInterrupt

    coord._bus.clock.wait = interrupt
    with pytest.raises(KeyboardInterrupt):
        delivery.wait()
    del coord._bus.clock.wait
    assert not coord._bus.bells
    gate.go.set()
    assert delivery.wait(10).results == (1,)


def test_E4_a_loop_that_ended_while_awaiting_disturbs_nobody(coord, gate):
    """Its bell can't ring any more; the others' do."""
    coord.on("a", gate)
    delivery = coord.emit("a", 1)
    loop = asyncio.new_event_loop()

    async def wait():
        await delivery

    task = loop.create_task(wait())
    loop.run_until_complete(asyncio.sleep(0))
    task._log_destroy_pending = False
    loop.close()
    found = []
    threads = start_all(lambda: found.append(delivery.wait(10)))
    eventually(lambda: sum(map(len, list(coord._bus.bells.values()))) == 2)
    gate.go.set()
    join_all(threads)
    assert found == [delivery]


def test_E4_results_and_errors_are_in_registration_order(coord, caplog):
    """Also where a concurrent handler ends last."""
    last = threading.Event()

    def fail(number):
        def handler(data):
            raise ValueError(number)

        return handler

    coord.on("a", lambda data: (last.wait(10), 0)[1], concurrent=True)
    coord.on("a", fail(1))
    coord.on("a", as_async(lambda data: 2))
    coord.on("a", as_async(fail(3)))
    coord.on("a", lambda data: (last.set(), 4)[1])
    delivery = coord.emit("a").wait(10)
    assert delivery.results == (0, 2, 4)
    assert [error.args for error in delivery.errors] == [(1,), (3,)]


def test_E4_results_can_be_read_while_it_is_pending(coord, gate):
    """What there is so far; before it begins, nothing."""
    coord.on("a", lambda data: "early")
    coord.on("a", gate)
    with coord.run("r"):
        first, second = coord.emit("a", 1), coord.emit("a", 2)
    assert gate.began.wait(10)
    assert (first.results, first.errors) == (("early",), ())
    assert (second.results, second.errors, second.done) == ((), (), False)
    assert "pending" in repr(second)


def test_E4_an_event_that_nobody_hears_is_done_at_once(coord):
    """Wait and await come back, from a handler too, and it is an event like others."""

    async def wait(delivery):
        return await delivery

    delivery = coord.emit("a", 1, sender="me")
    assert delivery.wait(0) is delivery is asyncio.run(wait(delivery))
    assert (delivery.done, delivery.results, delivery.errors) == (True, (), ())
    assert (delivery.event.name, delivery.event.data, delivery.event.sender) == ("a", 1, "me")
    assert delivery.event.id != coord.emit("a").event.id
    with coord.run("r"):
        assert coord.emit("a").event.run_id == "r"
    coord.on("b", lambda data: coord.emit("unheard").wait().event)
    parent = coord.emit("b").wait(10)
    assert (parent.results[0].parent_id, parent.results[0].run_id) == (parent.event.id,) * 2


def test_E4_a_delivery_names_its_event(coord):
    """The same object that handlers get."""
    seen = []
    coord.on("a", seen.append, pass_event=True)
    delivery = coord.emit("a", [1], sender="me").wait(10)
    assert seen == [delivery.event]
    assert seen[0] is delivery.event
    assert delivery.event == Event(
        name="a", data=[1], sender="me", id=seen[0].id, time=seen[0].time, run_id=None, parent_id=None
    )
    assert abs(seen[0].time - time.time()) < 60


@pytest.mark.parametrize("depth", [0, 1, 3])
@pytest.mark.parametrize("how", ["wait", "await", "to_thread"])
def test_E4_waiting_for_ones_own_or_an_ancestors_delivery_is_refused(coord, how, depth):
    """It would wait for itself: refused at once, with the reason."""
    refused = []
    ready = threading.Event()
    top = []

    def wait(delivery):
        with pytest.raises(DeadlockError, match="wait for itself") as caught:
            delivery.wait()
        refused.append(caught.value)

    async def wait_async(delivery):
        if how == "to_thread":
            await asyncio.get_running_loop().run_in_executor(None, contextvars.copy_context().run, wait, delivery)
            return
        with pytest.raises(DeadlockError) as caught:
            await delivery
        refused.append(caught.value)

    def go_down(data):
        ready.wait(10)
        if data == depth:
            return wait(top[0]) if how == "wait" else wait_async(top[0])
        coord.emit("a", data + 1)
        if data == 0:
            eventually(lambda: refused)  # the ancestor's handler is still at work
        return None

    coord.on("a", go_down)
    top.append(coord.emit("a", 0))
    ready.set()
    assert top[0].wait(20).errors == ()
    coord.join(20)
    assert len(refused) == 1
    assert refused[0].name == "a"
    assert refused[0].cycle


def test_E4_waiting_for_what_one_has_caused_is_allowed(coord):
    """Outside of a run a child is of another lane; an ancestor that has ended is no danger either."""
    first = []
    go = threading.Event()
    coord.on("parent", lambda data: coord.emit("child", data).wait(10).results)
    coord.on("child", lambda data: data + 1)
    assert coord.emit("parent", 1).wait(20).results == ((2,),)
    coord.on("ended", lambda data: coord.emit("late"))
    coord.on("late", lambda data: (go.wait(10), first[0].wait(0))[1].event.name)
    first.append(coord.emit("ended").wait(10))
    go.set()
    assert first[0].results[0].wait(10).results == ("ended",)


@pytest.mark.parametrize("name", [None, 3, b"a", ["a"], {}])
def test_E4_a_name_that_is_no_string_is_refused(coord, name):
    """By `emit` and by `on`, unhashable ones too."""
    with pytest.raises(TypeError, match="string"):
        coord.emit(name)
    with pytest.raises(TypeError, match="string"):
        coord.on(name, print)


def test_E4_an_empty_name_is_refused(coord):
    """By `emit` and by `on`."""
    with pytest.raises(ValueError, match="empty"):
        coord.emit("")
    with pytest.raises(ValueError, match="empty"):
        coord.on("")


# -- E5: the bounded queue -----------------------------------------------------------------------------------


@pytest.mark.parametrize("limit", [1, 2, 7])
def test_E5_max_pending_is_exact(limit):
    """So many are taken, the one being delivered included, and not one more; each that ends makes room for one."""
    step = threading.Semaphore(0)
    with Coordinator(name="test", max_pending=limit) as coord:
        coord.on("a", lambda data: step.acquire(timeout=20))
        for _ in range(3):
            for _ in range(limit - coord.snapshot().pending):
                coord.emit("a")
            for _ in range(2):
                with pytest.raises(QueueFullError, match=f"max_pending is {limit}") as caught:
                    coord.emit("a")
                error = caught.value
                assert (error.name, error.pending, error.max_pending) == ("a", limit, limit)
            assert coord.snapshot().pending == limit
            coord.emit("unheard")
            step.release()
            eventually(lambda: coord.snapshot().pending == limit - 1)
        for _ in range(limit):
            step.release()


@pytest.mark.parametrize("harass", [eager_switching, yielding_at_opcodes])
def test_E5_max_pending_is_exact_under_threads(harass, gate):
    """Eight threads emit as much as they can: as many as there is room for get in."""
    coord = Coordinator(name="test", max_pending=50)
    coord.on("a", gate)
    taken, refused = [], []

    def emit():
        for _ in range(40):
            try:
                taken.append(coord.emit("a"))
            except QueueFullError:
                refused.append(1)

    with harass():
        join_all(start_all(*[emit] * 8))
    assert (len(taken), len(refused)) == (50, 270)
    assert coord.snapshot().pending == 50
    gate.go.set()
    coord.join(20)
    assert all(delivery.done for delivery in taken)
    coord.close()


def test_E5_a_concurrent_handler_counts_as_pending(gate):
    """Its event takes a place until it ends."""
    with Coordinator(name="test", max_pending=1) as coord:
        coord.on("a", gate, concurrent=True)
        coord.emit("a")
        assert gate.began.wait(10)
        with pytest.raises(QueueFullError):
            coord.emit("a")
        gate.go.set()
        coord.join(10)
        coord.emit("a").wait(10)


def test_E5_a_lifecycle_event_that_cannot_be_queued_is_counted_and_logged(gate, caplog):
    """The agent's result and its error are what they would have been."""
    with Coordinator(name="test", max_pending=1) as coord:
        coord.on("*", gate)

        @coord.coordinate("agent")
        def agent(fail=False):
            if fail:
                raise KeyError("its own")
            return 42

        coord.emit("a")
        assert agent() == 42
        with pytest.raises(KeyError, match="its own"):
            agent(True)
        assert coord.snapshot().counts.events_refused == 4
        names = ["agent_started", "agent_complete", "agent_started", "agent_failed"]
        assert [record.args[0] for record in caplog.records] == names
        assert all("max_pending is 1" in record.getMessage() for record in caplog.records)
        gate.go.set()


def test_E5_a_handler_whose_event_is_refused_is_told(caplog):
    """The error is raised in the handler, and counts as its failure."""
    with Coordinator(name="test", max_pending=1) as coord:
        coord.on("a", lambda data: coord.emit("b"))
        coord.on("b", print)
        delivery = coord.emit("a").wait(10)
        assert isinstance(delivery.errors[0], QueueFullError)
        coord.join(10)


def test_E5_max_pending_can_be_changed(gate):
    """In both directions, while events are pending."""
    with Coordinator(name="test", max_pending=2) as coord:
        coord.on("a", gate)
        coord.emit("a")
        coord.emit("a")
        coord.configure(max_pending=3)
        coord.emit("a")
        coord.configure(max_pending=1)
        with pytest.raises(QueueFullError):
            coord.emit("a")
        gate.go.set()
        coord.join(10)
        coord.emit("a").wait(10)


@pytest.mark.parametrize("setting", ["workers", "max_pending"])
@pytest.mark.parametrize(("value", "error"), [(0, ValueError), (-1, ValueError), (True, TypeError), (1.0, TypeError)])
def test_E5_a_bound_that_makes_no_sense_is_refused(coord, setting, value, error):
    """Where it is given."""
    with pytest.raises(error, match=setting):
        Coordinator(**{setting: value})
    with pytest.raises(error, match=setting):
        coord.configure(**{setting: value})


# -- E7: join and close --------------------------------------------------------------------------------------


def cascade(coord, depth):
    """Handlers that emit, sync and async in turns; what the last one has seen."""
    seen = []

    def handler(data):
        seen.append(data)
        if data:
            coord.emit(f"n{data % 2}", data - 1)

    coord.on("n0", as_async(handler))
    coord.on("n1", handler)
    coord.emit("n0", depth)
    return seen


def test_E6_from_the_drain_on_a_bus_counts_what_begins(coord):
    """So who drains notices work that has come and gone: handlers of every kind, one after another or beside."""
    coord.on("a", lambda data: None)
    coord.on("b", lambda data: None, pass_event=True)
    coord.on("c", lambda data: None, concurrent=True)
    assert coord._bus.drain(0)
    for number, name in enumerate("abca", 1):
        coord.emit(name).wait(10)
        assert coord._bus.begun == number


def test_E7_join_waits_for_cascades(coord):
    """When it returns nothing is pending."""
    seen = cascade(coord, 50)
    coord.join()
    assert seen == list(range(50, -1, -1))
    assert coord.snapshot().pending == 0
    coord.join(0)


def test_E7_join_async_waits_for_cascades_and_the_loop_goes_on(coord):
    """Handlers of the same loop run meanwhile."""

    async def main():
        seen = cascade(coord, 50)
        await coord.join_async()
        assert seen == list(range(50, -1, -1))
        await coord.join_async(0)

    asyncio.run(main())


@pytest.mark.parametrize("timeout", [0, 0.01])
def test_E7_join_ends_when_its_time_is_over(coord, gate, timeout):
    """It says how many are pending, and can be called again."""
    coord.on("a", gate)
    coord.emit("a")
    coord.emit("a")
    with pytest.raises(CoordinationTimeoutError, match="2 events"):
        coord.join(timeout)
    with pytest.raises(CoordinationTimeoutError, match="2 events"):
        asyncio.run(coord.join_async(timeout))
    assert not coord._bus._joiners
    gate.go.set()
    coord.join(10)


def test_E7_join_is_not_late_because_somebody_emits_again(coord, gate):
    """All was delivered, in good time; that another event comes right after is no timeout."""
    coord.on("a", gate)
    sleep = coord._bus.waits.sleep

    def sleep_and_emit(*args):
        outcome = sleep(*args)
        coord.emit("a")
        return outcome

    coord._bus.waits.sleep = sleep_and_emit
    coord.join(20)
    coord._bus.waits.sleep = sleep
    gate.go.set()


@pytest.mark.parametrize("timeout", [-1, float("nan"), True, "1"])
def test_E7_a_timeout_that_makes_no_sense_is_refused(coord, timeout):
    """A negative, NaN, boolean or non-numeric one."""
    with pytest.raises((TypeError, ValueError)):
        coord.join(timeout)
    with pytest.raises((TypeError, ValueError)):
        asyncio.run(coord.join_async(timeout))


@pytest.mark.parametrize("timeout", [-1, float("nan"), True, "1"])
def test_E4_a_timeout_that_makes_no_sense_is_refused(coord, timeout):
    """As everywhere; not waited for."""
    go = threading.Event()
    coord.on("a", lambda data: go.wait(0.5))
    with pytest.raises((TypeError, ValueError)):
        coord.emit("a").wait(timeout)
    go.set()


def test_E7_many_can_join_at_once(coord, gate):
    """Threads and tasks: all are woken."""
    coord.on("a", gate)
    coord.emit("a")
    done = []
    joiners = [lambda: done.append(coord.join())] * 3 + [lambda: done.append(asyncio.run(coord.join_async()))] * 3
    threads = start_all(*joiners)
    eventually(lambda: len(coord._bus._joiners) == 6)
    gate.go.set()
    join_all(threads)
    assert len(done) == 6


def test_E7_close_joins_then_refuses(coord):
    """All that was emitted is handled; afterwards `emit`, `on`, `run` and `lock` are refused, and threads are gone."""
    seen = cascade(coord, 20)
    coord.close()
    assert len(seen) == 21
    calls = [
        lambda: coord.emit("n0"),
        lambda: coord.emit("never heard of"),
        lambda: coord.on("a", print),
        lambda: coord.run("r").__enter__(),
        lambda: coord.lock("l"),
    ]
    for refused in calls:
        with pytest.raises(ClosedError):
            refused()
    assert "closed" in repr(coord)
    coord.close()


@pytest.mark.parametrize("error", [None, ValueError])
@pytest.mark.parametrize("kind", ["with", "async with"])
def test_E7_leaving_the_block_closes(kind, error):
    """Also with an exception, which goes through."""
    seen = []

    def leave(coord):
        seen.append(cascade(coord, 20))
        if error is not None:
            raise error("mine")

    def block():
        with Coordinator(name="test") as coord:
            leave(coord)

    async def async_block():
        async with Coordinator(name="test") as coord:
            leave(coord)

    with pytest.raises(error, match="mine") if error else contextlib.nullcontext():
        block() if kind == "with" else asyncio.run(async_block())
    assert len(seen[0]) == 21
    eventually(lambda: not [t for t in threading.enumerate() if t.name.startswith("test-")])


@pytest.mark.parametrize("error", [KeyboardInterrupt, asyncio.CancelledError, GeneratorExit])
@pytest.mark.parametrize("kind", ["with", "async with"])
def test_E7_left_by_an_interrupt_it_does_not_join(kind, error, gate, caplog):
    """The block ends at once, refuses from now on, and says what it left undone."""
    coord = Coordinator(name="test")
    coord.on("a", gate)
    coord.emit("a")
    assert gate.began.wait(10)

    def block():
        with coord:
            raise error

    async def async_block():
        async with coord:
            raise error

    with pytest.raises(error):
        block() if kind == "with" else drive(async_block())
    assert "1 events are abandoned" in caplog.text
    with pytest.raises(ClosedError):
        coord.emit("a")
    coord.close()


def drive(coroutine):
    """As a loop does, but without asyncio's own rules for KeyboardInterrupt."""
    coroutine.send(None)


@pytest.mark.parametrize("call", ["join", "join_async", "close", "close_async"])
@pytest.mark.parametrize("via", ["handler", "thread of a handler"])
def test_E7_join_in_a_handler_is_refused(coord, call, via):
    """It would wait for itself; so would closing."""

    def in_handler(data):
        with pytest.raises(DeadlockError, match=call.replace("close", "join")):
            getattr(coord, call)()
        return "refused"

    async def in_async_handler(data):
        with pytest.raises(DeadlockError, match=call.replace("close", "join")):
            await getattr(coord, call)()
        return "refused"

    def elsewhere(data):
        context = contextvars.copy_context()
        return in_thread(lambda: context.run(in_handler, data))

    is_async = call.endswith("async")
    if via == "handler":
        coord.on("a", in_async_handler if is_async else in_handler)
    elif is_async:
        coord.on("a", lambda data: asyncio.run(in_async_handler(data)))
    else:
        coord.on("a", elsewhere)
    assert coord.emit("a").wait(10).results == ("refused",)


def test_E7_another_coordinators_handler_may_join(coord):
    """Two coordinators share nothing."""
    with Coordinator(name="other") as other:
        other.on("a", lambda data: coord.join(10))
        assert other.emit("a").wait(10).errors == ()


# -- E8: where handlers run ----------------------------------------------------------------------------------


def test_E8_sync_handlers_run_on_worker_threads(coord):
    """Never on a loop, also when they are registered and emitted on one."""
    seen = []

    def handler(data):
        seen.append((threading.current_thread().name, asyncio._get_running_loop()))

    async def main():
        coord.on("a", handler)
        coord.on("a", handler, concurrent=True)
        await coord.emit("a")

    asyncio.run(main())
    coord.emit("a").wait(10)
    assert len(seen) == 4
    assert all(name.startswith("test-worker-") and loop is None for name, loop in seen)


def where_it_ran(coord, **options):
    seen = []

    async def handler(data):
        seen.append((asyncio.get_running_loop(), threading.current_thread().name))

    coord.on("a", handler, **options)
    return seen


def test_E8_async_handlers_run_on_the_loop_where_they_were_registered(coord):
    """From wherever the event comes."""

    async def main():
        seen = where_it_ran(coord)
        await coord.emit("a")
        await asyncio.get_running_loop().run_in_executor(None, lambda: coord.emit("a").wait(10))
        assert seen == [(asyncio.get_running_loop(), threading.current_thread().name)] * 2

    asyncio.run(main())


def test_E8_async_handlers_without_a_loop_get_one_of_the_coordinators(coord):
    """The same for all of them."""
    seen = where_it_ran(coord)
    seen_too = where_it_ran(coord)
    coord.emit("a").wait(10)
    coord.emit("a").wait(10)
    assert len(set(seen + seen_too)) == 1
    assert seen[0][1] == "test-loop"


@pytest.mark.parametrize("registered_on", ["a loop", "no loop"])
def test_E8_loop_overrides(coord, registered_on):
    """The loop that is named wins."""
    with loop_elsewhere() as loop:

        async def register():
            return where_it_ran(coord, loop=loop)

        seen = asyncio.run(register()) if registered_on == "a loop" else where_it_ran(coord, loop=loop)
        coord.emit("a").wait(10)
        assert [found for found, _ in seen] == [loop]


class Agent:
    async def method(self, data):
        return asyncio.get_running_loop()

    async def __call__(self, data):
        return asyncio.get_running_loop()

    @staticmethod
    async def static(data):
        return asyncio.get_running_loop()


@pytest.mark.parametrize(
    "handler",
    [Agent().method, Agent(), Agent.static, functools.partial(Agent().method), lambda data: Agent().method(data)],
)
def test_E8_whatever_gives_a_coroutine_is_driven_on_a_loop(coord, handler):
    """Methods, callable instances, partials and lambdas."""
    coord.on("a", handler)
    assert coord.emit("a").wait(10).results == (coord._bus.loop.get(),)


@pytest.mark.parametrize("concurrent", [False, True])
@pytest.mark.parametrize("kind", [as_async, as_sync_giving_coroutine])
def test_E8_a_closed_loop_is_an_error_on_the_delivery(coord, caplog, concurrent, kind):
    """Later handlers and events go on; nothing is left that was never awaited."""
    loop = asyncio.new_event_loop()
    loop.close()
    coord.on("a", kind(print), loop=loop, concurrent=concurrent)
    coord.on("a", lambda data: data)
    for number in range(2):
        delivery = coord.emit("a", number).wait(10)
        assert [type(error) for error in delivery.errors] == [LoopClosedError]
        assert delivery.results == (number,)


@pytest.mark.parametrize("moment", ["before it starts", "while it runs"])
@pytest.mark.parametrize("concurrent", [False, True])
def test_E8_a_loop_that_closes_after_the_submission_is_an_error_on_the_delivery(
    coord, caplog, monkeypatch, moment, concurrent
):
    """A handler that will never report is found out; no event hangs."""
    monkeypatch.setattr(_workers, "PARK_FOR", 0.01)
    loop = asyncio.new_event_loop()
    began = []

    async def handler(data):
        began.append(asyncio.current_task())
        began[0]._log_destroy_pending = False
        await asyncio.Event().wait()

    coord.on("a", handler, loop=loop, concurrent=concurrent)
    coord.on("a", lambda data: data)
    delivery = coord.emit("a", 1)
    eventually(lambda: coord._bus.away)
    if moment == "while it runs":
        while not began:
            loop.run_until_complete(asyncio.sleep(0.001))
    loop.close()
    delivery.wait(10)
    assert [type(error) for error in delivery.errors] == [LoopClosedError]
    assert delivery.results == (1,)
    began.clear()


def test_E8_a_handler_that_is_cancelled_is_an_error_on_the_delivery(coord, caplog):
    """As when `asyncio.run` ends, and cancels what still runs on its loop."""

    async def handler(data):
        await asyncio.Event().wait()

    async def main():
        coord.on("a", handler)
        delivery = coord.emit("a")
        while not coord._bus.away or not next(iter(coord._bus.away)).task:
            await asyncio.sleep(0.001)
        return delivery

    delivery = asyncio.run(main()).wait(10)
    assert [type(error) for error in delivery.errors] == [asyncio.CancelledError]


def test_E8_a_handler_is_waited_for_on_a_loop_that_does_not_run_yet(coord):
    """It is done when the loop comes round."""
    loop = asyncio.new_event_loop()
    coord.on("a", as_async(lambda data: data + 1), loop=loop)
    delivery = coord.emit("a", 1)
    eventually(lambda: coord._bus.away)

    async def wait():
        return await delivery

    assert loop.run_until_complete(wait()).results == (2,)
    loop.close()


@pytest.mark.parametrize("handler", [None, 3, "print"])
def test_E8_a_handler_that_cannot_be_called_is_refused(coord, handler):
    """Where it is registered."""
    with pytest.raises(TypeError, match="callable"):
        coord._bus.subscribe("a", handler, loop=None, pass_event=False, concurrent=False, once=False)


@pytest.mark.parametrize("handler", [lambda: 1, lambda a, b: 1, Agent.method, lambda *, a: 1])
def test_E8_a_handler_that_takes_no_data_is_refused(coord, handler):
    """The error says what a handler takes."""
    with pytest.raises(TypeError, match="one positional argument"):
        coord.on("a", handler)


# -- E9: patterns --------------------------------------------------------------------------------------------


def test_E9_patterns_and_names(coord):
    """`*` and `?` mean many names, `[` means itself; a handler is called once however it matches."""
    seen = []
    for name in ["*", "team.*", "team.?", "team.a", "x[1]", "x[1]*"]:
        coord.on(name, functools.partial(lambda name, data: seen.append(name), name))
    expected = {
        "team.a": ["*", "team.*", "team.?", "team.a"],
        "team.a.b": ["*", "team.*"],
        "x[1]": ["*", "x[1]", "x[1]*"],
        "x1": ["*"],
        "line\nend": ["*"],
    }
    for name, names in expected.items():
        seen.clear()
        coord.emit(name).wait(10)
        assert seen == names


def test_E9_patterns_come_and_go(coord):
    """Also for names that have been emitted before."""
    assert coord.emit("a").wait(10).results == ()
    pattern = coord.on("a*", lambda data: "pattern")
    assert coord.emit("a").wait(10).results == ("pattern",)
    name = coord.on("a", lambda data: "name")
    assert coord.emit("a").wait(10).results == ("pattern", "name")
    pattern.cancel()
    assert coord.emit("a").wait(10).results == ("name",)
    name.cancel()
    assert coord.emit("a").wait(10).results == ()


def test_E9_the_cost_of_emit_does_not_grow_with_other_handlers(coord, monkeypatch):
    """A name's handlers are looked up once; others' subscriptions don't make it look again, and it doesn't try them."""
    looked_up = []
    find_route = coord._bus.find_route
    monkeypatch.setattr(coord._bus, "find_route", lambda name: looked_up.append(name) or find_route(name))
    tried = []
    for number in range(1000):
        coord.on(f"other{number}", tried.append)
    coord.on("a", lambda data: None)
    for _ in range(500):
        coord.emit("a")
        coord.emit("unheard")
    for number in range(100):
        coord.on(f"more{number}", tried.append).cancel()
        coord.emit("a")
    coord.join(10)
    assert sorted(looked_up) == ["a", "unheard"]
    assert not tried


def test_E9_names_without_end_take_no_memory_without_end(coord):
    """What is remembered of names that are used once is bounded."""
    coord.on("*", lambda data: None)
    for number in range(10_000):
        coord.emit(f"customer_{number}")
    coord.join(20)
    assert len(coord._bus.routes) <= 5000
    assert not coord._bus._runs


# -- E10: subscriptions --------------------------------------------------------------------------------------


@KINDS
@pytest.mark.parametrize("options", [{}, {"concurrent": True}, {"once": True}])
def test_E10_after_cancel_no_call_starts(coord, gate, kind, options):
    """Not for events that are queued already, not even for the rest of an event that is being delivered."""
    seen = []
    coord.on("a", gate)
    sub = coord.on("a", kind(seen.append), **options)
    deliveries = [coord.emit("a", number) for number in range(5)]
    assert gate.began.wait(10)
    assert sub.active
    sub.cancel()
    assert not sub.active
    assert "cancelled" in repr(sub)
    sub.cancel()
    gate.go.set()
    coord.join(10)
    assert seen == []
    assert [delivery.results for delivery in deliveries] == [(number,) for number in range(5)]


def test_E10_cancelled_on_its_way_to_the_loop_it_does_not_start(coord):
    """The event is with the loop already."""
    loop = asyncio.new_event_loop()
    seen = []
    sub = coord.on("a", as_async(seen.append), loop=loop)
    delivery = coord.emit("a")
    eventually(lambda: loop._ready)
    sub.cancel()
    loop.run_until_complete(asyncio.sleep(0))
    loop.close()
    delivery.wait(10)
    assert (seen, delivery.results, delivery.errors) == ([], (), ())


@pytest.mark.parametrize("make", [lambda gate: gate, lambda gate: gate.wait_async])
def test_E10_a_running_call_finishes(coord, gate, make):
    """Cancelling doesn't interrupt."""
    sub = coord.on("a", make(gate))
    delivery = coord.emit("a", 1)
    assert gate.began.wait(10)
    sub.cancel()
    gate.go.set()
    assert delivery.wait(10).results == (1,)


def test_E10_a_handler_can_cancel_itself(coord):
    """And gets no more."""
    seen = []
    sub = coord.on("a", lambda data: (seen.append(data), sub.cancel()))
    for number in range(3):
        coord.emit("a", number)
    coord.join(10)
    assert seen == [0]


@KINDS
@pytest.mark.parametrize("options", [{}, {"concurrent": True}])
def test_E10_once_is_exact_under_concurrency(coord, kind, options):
    """Many lanes at once: one call."""
    seen = []
    barrier = threading.Barrier(8)
    sub = coord.on("a", kind(seen.append), once=True, **options)

    def emit():
        barrier.wait(10)
        for _ in range(10):
            coord.emit("a")

    with eager_switching():
        join_all(start_all(*[emit] * 8))
        coord.join(10)
    assert len(seen) == 1
    assert not sub.active


def test_E10_once_that_raises_has_had_its_call(coord, caplog):
    """No retry."""
    calls = []

    def broken(data):
        calls.append(data)
        raise ValueError

    coord.on("a", broken, once=True)
    coord.emit("a")
    coord.emit("a")
    coord.join(10)
    assert len(calls) == 1


def test_E10_handlers_are_held_strongly(coord):
    """A method of an object that nobody else holds is called."""
    import gc

    seen = []

    class Listener:
        def hear(self, data):
            seen.append(data)

    coord.on("a", Listener().hear)
    coord.on("a", lambda data: seen.append(data))
    gc.collect()
    coord.emit("a", 1).wait(10)
    assert seen == [1, 1]


@pytest.mark.parametrize("name", ["a", "*"])
def test_E10_an_event_goes_to_those_subscribed_when_it_was_emitted(coord, gate, name):
    """Who comes while it is queued doesn't get it."""
    seen = []
    coord.on("a", gate)
    coord.emit("a", 1)
    coord.emit("a", 2)
    coord.on(name, seen.append)
    coord.emit("a", 3)
    gate.go.set()
    coord.join(10)
    assert seen == [3]


def test_E10_a_subscription_is_a_context_manager(coord):
    """It is cancelled at the end of the block."""
    seen = []
    with coord.on("a", seen.append) as sub:
        assert sub.active
        coord.emit("a", 1).wait(10)
    coord.emit("a", 2).wait(10)
    assert seen == [1]
    assert not sub.active


def test_E10_the_same_function_can_be_subscribed_twice(coord):
    """Each subscription is its own."""
    seen = []
    first = coord.on("a", seen.append)
    coord.on("a", seen.append)
    coord.emit("a", 1).wait(10)
    first.cancel()
    coord.emit("a", 2).wait(10)
    assert seen == [1, 1, 2]


def test_E10_on_as_a_decorator_gives_the_function_back(coord):
    """So decorators stack, and the function can be called."""

    @coord.on("a")
    @coord.on("b")
    def handler(data):
        return data

    assert handler(1) == 1
    assert coord.emit("a", 2).wait(10).results == coord.emit("b", 2).wait(10).results == (2,)


# -- E12: runs -----------------------------------------------------------------------------------------------


def run_of(coord):
    """The run that an event belongs to when it is emitted here."""
    return coord.emit("probe").event.run_id


def test_E12_a_run_names_what_is_emitted_within(coord):
    """Nested ones too, and afterwards it is what it was."""
    coord.on("probe", lambda data: None)
    assert run_of(coord) is None
    with coord.run("outer") as run:
        assert run.id == run_of(coord) == "outer"
        with coord.run("inner"):
            assert run_of(coord) == "inner"
        assert run_of(coord) == "outer"
    with pytest.raises(KeyError), coord.run("outer"):
        raise KeyError
    assert run_of(coord) is None


def test_E12_a_run_follows_the_context(coord):
    """Into tasks and executors that copy it, not into plain threads."""

    async def main():
        async def task():
            await asyncio.sleep(0)
            return run_of(coord)

        with coord.run("r"):
            made = asyncio.create_task(task())
            in_executor = await asyncio.to_thread(run_of, coord)
        assert await made == in_executor == "r"
        assert run_of(coord) is None

    asyncio.run(main())
    with coord.run("r"):
        context = contextvars.copy_context()
    assert in_thread(lambda: context.run(run_of, coord)) == "r"


def test_E12_tasks_have_runs_of_their_own(coord):
    """Interleaved blocks don't mix."""

    async def main():
        async def agent(name):
            with coord.run(name):
                for _ in range(5):
                    await asyncio.sleep(0)
                    assert run_of(coord) == name

        await asyncio.gather(*[agent(f"r{number}") for number in range(10)])

    asyncio.run(main())


def test_E12_entering_an_id_again_continues_that_run(coord, gate):
    """The second block's events are in the same lane, also from another thread."""
    seen = []
    coord.on("a", lambda data: (gate(data), seen.append(data)))
    with coord.run("r"):
        coord.emit("a", 1)
    assert gate.began.wait(10)

    def again():
        with coord.run("r"):
            return coord.emit("a", 2)

    in_thread(again)
    other = coord.on("b", seen.append)
    coord.emit("b", "another lane").wait(10)
    other.cancel()
    assert seen == ["another lane"]
    gate.go.set()
    coord.join(10)
    assert seen == ["another lane", 1, 2]


def test_E12_an_events_id_can_be_entered_as_a_run(coord, gate):
    """It is the run of what its handlers emit: the same lane."""
    order = []
    coord.on("a", lambda data: coord.emit("b", "handler"))
    coord.on("b", lambda data: (gate(data), order.append(data)))
    delivery = coord.emit("a").wait(10)
    assert gate.began.wait(10)
    with coord.run(delivery.event.id):
        late = coord.emit("b", "block")
    assert late.event.run_id == delivery.event.id
    assert order == []
    gate.go.set()
    coord.join(10)
    assert order == ["handler", "block"]


def test_E12_runs_without_a_name_get_one(coord):
    """Each another one, and no event's id."""
    ids = set()
    for _ in range(5):
        with coord.run() as run:
            assert run_of(coord) == run.id
            ids |= {run.id, coord.emit("probe").event.id}
    assert len(ids) == 10


@pytest.mark.parametrize(("id", "error"), [("", ValueError), (3, TypeError), (b"r", TypeError)])
def test_E12_an_id_that_makes_no_sense_is_refused(coord, id, error):
    """Where the block is made."""
    with pytest.raises(error):
        coord.run(id)


def test_E12_a_block_can_be_shared_by_threads(coord):
    """Each gets back what it had before."""
    block = coord.run("shared")
    entered, left = threading.Event(), threading.Event()
    found = []

    def one():
        with coord.run("mine"):
            with block:
                entered.set()
                assert left.wait(10)
            found.append(run_of(coord))

    threads = start_all(one)
    with coord.run("theirs"):
        assert entered.wait(10)
        block.__enter__()
        left.set()
        join_all(threads)
        block.__exit__(None, None, None)
        found.append(run_of(coord))
    assert found == ["mine", "theirs"]


def test_E12_coordinators_in_one_context_have_runs_of_their_own(coord):
    """A run block, and a handler, of one are nothing to the other; nesting keeps both."""
    with Coordinator(name="other") as other, coord.run("c"):
        assert run_of(other) is None
        with other.run("o"):
            assert (run_of(coord), run_of(other)) == ("c", "o")
        other.on("a", lambda data: run_of(coord))
        assert other.emit("a").wait(10).results == (None,)


var = contextvars.ContextVar("var", default="default")


@KINDS
@pytest.mark.parametrize("concurrent", [False, True])
@pytest.mark.parametrize("loop", ["own", "given"])
def test_E12_no_callers_context_leaks_into_handlers(coord, kind, concurrent, loop):
    """Neither from who registers, nor who emits or starts our thread or loop, nor the handler before."""
    seen = []

    def handler(data):
        seen.append(var.get())
        var.set("a handler's")

    with contextlib.ExitStack() as stack:
        token = var.set("the caller's")
        given = {"loop": stack.enter_context(loop_elsewhere())} if loop == "given" and kind is as_async else {}
        coord.on("a", kind(handler), concurrent=concurrent, **given)
        coord.on("a", kind(handler), concurrent=concurrent, **given)
        coord.emit("a")
        coord.emit("a")
        coord.join(10)
        var.reset(token)
    assert seen == ["default"] * 4


@KINDS
def test_E12_a_handler_has_no_holds(coord, kind):
    """What the emitter holds, its handlers don't: they would have to wait."""
    seen = []

    def handler(data):
        seen.append(coord.lock("l").acquire(False))

    coord.on("a", kind(handler))
    with coord.lock("l"):
        coord.emit("a").wait(10)
    assert seen == [False]


@pytest.mark.parametrize("pass_event", [False, True])
@pytest.mark.parametrize("second_name", ["first", "second"])
def test_E12_what_a_handler_leaves_in_its_context_the_next_one_does_not_find(coord, second_name, pass_event):
    """Handlers of one lane share nothing: neither those of one event, nor those of the events after it."""
    found = []

    def leaves(data):
        found.append(var.get())
        var.set("left behind")
        with coord.lock("x"):
            pass

    coord.on("first", leaves, pass_event=pass_event)
    coord.on(second_name, lambda data: found.append(var.get()))
    for _ in range(3):
        coord.emit("first")
        coord.emit("second")
    coord.join(10)
    assert found == ["default"] * 6


def test_E4_there_is_no_result_before_the_handler_has_returned(coord, gate):
    """A handler at work has given nothing yet, not even None."""
    coord.on("slow", lambda data: gate(data) and None)
    delivery = coord.emit("slow", 1)
    assert gate.began.wait(10)
    assert (delivery.results, delivery.done) == ((), False)
    gate.go.set()
    assert delivery.wait(10).results == (None,)


def test_E2_a_lane_whose_handlers_all_use_locks_lets_others_pass(gate):
    """One worker, one busy run: another run's event is handled before the busy one is through."""
    order = []
    with Coordinator(workers=1) as coord:

        def busy(data):
            with coord.lock("x"):
                order.append(data)

        coord.on("gate", gate)
        coord.on("busy", busy)
        with coord.run("first"):
            coord.emit("gate")
            assert gate.began.wait(10)
            for _ in range(500):
                coord.emit("busy", "busy")
        with coord.run("second"):
            coord.emit("busy", "other")
        gate.go.set()
        coord.join(10)
    assert order.index("other") < 200


@KINDS
def test_E12_a_handlers_context_carries_the_run(coord, kind):
    """Into what it starts, too."""
    found = []

    def handler(data):
        context = contextvars.copy_context()
        found.append(in_thread(lambda: context.run(run_of, coord)))

    coord.on("a", kind(handler))
    with coord.run("r"):
        coord.emit("a")
    coord.join(10)
    assert found == ["r"]


# -- E14: what a handler takes -------------------------------------------------------------------------------


@KINDS
@pytest.mark.parametrize("data", [None, 0, "text", [1], object()])
def test_E14_a_handler_takes_the_data_that_was_emitted(coord, kind, data):
    """The very object; with `pass_event` the whole event."""
    coord.on("a", kind(lambda data: data))
    coord.on("a", kind(lambda event: event), pass_event=True)
    delivery = coord.emit("a", data).wait(10)
    assert delivery.results[0] is data
    assert delivery.results[1] is delivery.event
    assert delivery.event.data is data


def test_E14_data_is_not_copied(coord, gate):
    """A handler sees what has changed since."""
    seen = []
    coord.on("a", lambda data: (gate(data), seen.extend(data)))
    data = [1]
    coord.emit("a", data)
    data.append(2)
    gate.go.set()
    coord.join(10)
    assert seen == [1, 2]


def test_E14_an_event_says_when_it_was_emitted():
    """By the clock that was given, not when somebody looks."""
    clock = FakeClock()
    with Coordinator(name="test", clock=clock) as coord:
        delivery = coord.emit("a")
        clock.advance(5)
        assert delivery.event.time == 1_001_000.0


# -- how much ------------------------------------------------------------------------------------------------


def test_E5_a_hundred_thousand_events_are_all_handled(coord):
    """In order, from one thread."""
    seen = []
    coord.on("a", seen.append)
    for number in range(100_000):
        coord.emit("a", number)
    coord.join(60)
    assert seen == list(range(100_000))


def test_E9_a_thousand_handlers_cost_no_threads(coord):
    """A subscription is an entry in a table; one event for all of them takes one worker."""
    before = set(threading.enumerate())

    def new():
        return [thread for thread in threading.enumerate() if thread not in before]

    for number in range(500):
        coord.on(f"name{number}", print)
        coord.on("all", lambda data: 1)
    assert not new()
    assert sum(coord.emit("all").wait(10).results) == 500
    assert len(new()) == 1


def test_E1_uneven_handlers_never_get_out_of_order(coord):
    """20 handlers of uneven length, 100 events: no inversion, neither between handlers nor between events."""
    dice = random.Random(0)
    seen = []

    def make(place):
        def handler(number):
            time.sleep(dice.choice([0, 0, 0, 0.0002]))
            seen.append((number, place))

        return as_async(handler) if place % 5 == 4 else handler

    for place in range(20):
        coord.on("a", make(place))
    for number in range(100):
        coord.emit("a", number)
    coord.join(60)
    assert seen == [(number, place) for number in range(100) for place in range(20)]


def test_E2_what_is_over_is_forgotten(coord):
    """Lanes, runs, bells and handlers under way leave nothing behind."""
    coord.on("a", as_async(lambda data: None))
    for number in range(50):
        with coord.run(f"r{number}"):
            coord.emit("a")
    coord.join(10)
    eventually(lambda: not coord._bus._runs)
    assert not coord._bus.away
    assert not coord._bus.bells
    assert not coord._bus._joiners
