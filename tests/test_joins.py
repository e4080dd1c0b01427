"""`all_of` and `any_of`: handlers that wait for several events (E13)."""

from __future__ import annotations

import asyncio
import gc
import itertools
import logging
import threading

import pytest
from support import eventually, join_all, start_all

from agentdiff import Coordinator, Event, all_of, any_of


@pytest.fixture
def timed(clock):
    """A coordinator on the fake clock."""
    with Coordinator(name="test", clock=clock) as made:
        yield made


def kept(coord):
    """Everything that `Joins` holds on to."""
    joins = coord._bus.joins
    return [*joins._sets, *joins._timed, *joins._lines]


def sleeps_until(clock, when):
    """Until whoever watches the time has gone to sleep, for so long."""
    eventually(lambda: [alarm[0] for alarm in list(clock._alarms)] == [when])


# -- the names -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("make", [all_of, any_of])
@pytest.mark.parametrize(
    ("names", "error", "says"),
    [
        ((), ValueError, "needs the names"),
        (("a", ""), ValueError, "must not be empty"),
        (("a", 1), TypeError, "must be a string, not int"),
        ((["a", "b"],), TypeError, "must be a string, not list"),
    ],
)
def test_E13_names_that_make_no_sense_are_refused(make, names, error, says):
    """Where they are given."""
    with pytest.raises(error, match=says):
        make(*names)


def test_E13_all_of_takes_no_patterns():
    """Which of its events would it wait for?"""
    with pytest.raises(ValueError, match="'b\\*' is one"):
        all_of("a", "b*")


def test_E13_a_name_said_twice_is_one():
    """In the order of their first mention."""
    assert all_of("b", "a", "b").names == any_of("b", "a", "b").names == ("b", "a")
    assert str(all_of("b", "a")) == "all_of('b', 'a')"


@pytest.mark.parametrize(
    ("name", "options", "error", "says"),
    [
        (all_of("a", "b"), {"concurrent": True}, ValueError, "makes no sense for all_of"),
        (all_of("a", "b"), {"timeout": -1}, ValueError, "timeout"),
        (all_of("a", "b"), {"timeout": 0}, ValueError, "must not be 0"),
        (all_of("a", "b"), {"timeout": "1"}, TypeError, "timeout"),
        (any_of("a", "b"), {"timeout": 1}, ValueError, "is for all_of"),
        ("a", {"timeout": 1}, ValueError, "is for all_of"),
    ],
)
def test_E13_options_that_make_no_sense_are_refused(coord, name, options, error, says):
    """And nothing is subscribed."""
    with pytest.raises(error, match=says):
        coord.on(name, print, **options)
    assert not coord._bus.subscriptions()


@pytest.mark.parametrize("handler", [None, 3, lambda: None, lambda a, b: None])
def test_E13_a_handler_that_cannot_take_a_set_is_refused(coord, handler):
    """Like any other."""
    with pytest.raises(TypeError, match="handler"):
        coord.on(all_of("a", "b"))(handler)


@pytest.mark.parametrize("bound", [0, -1, True, 1.0])
def test_E13_a_bound_that_makes_no_sense_is_refused(bound):
    """`max_joins` is a whole number of at least 1."""
    with pytest.raises((ValueError, TypeError), match="max_joins"):
        Coordinator(max_joins=bound)


# -- any_of ----------------------------------------------------------------------------------------------------


def test_E13_any_of_fires_for_each(coord):
    """Names and patterns; once for an event that several of them mean."""
    seen = []
    coord.on(any_of("a", "b*", "ba"), seen.append)
    for name in ("a", "b", "c", "ba", "a"):
        coord.emit(name, name)
    coord.join(10)
    assert seen == ["a", "b", "ba", "a"]


def test_E13_any_of_once_is_called_once_in_all(coord):
    """Not once for each name; then nothing of it is left."""
    seen = []
    sub = coord.on(any_of("a", "b*"), seen.append, once=True, pass_event=True)
    assert sub.name == "a | b*"
    for name in ("b", "a", "b"):
        coord.emit(name)
    coord.join(10)
    assert [event.name for event in seen] == ["b"]
    assert not coord._bus.subscriptions()


def test_E13_any_of_cancelled_is_gone_under_all_names(coord):
    """None of them calls it any more."""
    seen = []
    with coord.on(any_of("a", "b*", "c"), seen.append):
        pass
    for name in ("a", "b", "c"):
        coord.emit(name)
    coord.join(10)
    assert seen == []
    assert not coord._bus.subscriptions()


# -- all_of: which sets there are --------------------------------------------------------------------------------


def test_E13_the_handler_gets_a_dict_from_event_name_to_data(coord):
    """In the order of the names, whichever came first; the very objects."""
    a, b = object(), object()
    seen = []
    coord.on(all_of("a", "b"), seen.append)
    coord.emit("b", b)
    coord.join(10)
    assert seen == []
    coord.emit("a", a)
    coord.join(10)
    assert seen == [{"a": a, "b": b}]
    assert list(seen[0]) == ["a", "b"]


def test_E13_with_pass_event_it_gets_the_events(coord):
    """Each with its own id and sender (E14)."""
    seen = []
    coord.on(all_of("a", "b"), seen.append, pass_event=True)
    with coord.run("r"):
        first, second = coord.emit("b", 1, sender="s"), coord.emit("a", 2)
    coord.join(10)
    assert seen == [{"a": second.event, "b": first.event}]
    assert all(isinstance(event, Event) and event.run_id == "r" for event in seen[0].values())


def test_E13_events_are_paired_in_the_order_of_coming(coord):
    """The first `a` with the first `b`, and so on, however they are mixed."""
    for mix in sorted(set(itertools.permutations("aaabbb"))):
        seen = []
        with coord.on(all_of("a", "b"), seen.append):
            numbers = {"a": itertools.count(), "b": itertools.count()}
            for name in mix:
                coord.emit(name, next(numbers[name]))
            coord.join(10)
        assert seen == [{"a": number, "b": number} for number in range(3)]


def test_E13_no_memory_of_past_firings(coord):
    """After a full set all names are wanted anew."""
    seen = []
    coord.on(all_of("a", "b"), seen.append)
    for name in "abaab":
        coord.emit(name, name)
    coord.join(10)
    assert len(seen) == 2
    assert [(join.came, join.missing) for join in coord.snapshot().joins] == [(("a",), ("b",))]


def test_E13_a_single_name_fires_for_each_event(coord):
    """As `on(name)` would, but with a dict."""
    seen = []
    coord.on(all_of("a"), seen.append)
    for number in range(3):
        coord.emit("a", number)
    coord.join(10)
    assert seen == [{"a": 0}, {"a": 1}, {"a": 2}]
    assert not kept(coord)


def test_E13_sets_of_different_runs_do_not_mix(coord):
    """Nor with those outside of any run, which come from any thread."""
    seen = []
    coord.on(all_of("a", "b"), seen.append)

    def elsewhere():
        coord.emit("b", "outside")

    for run in ("r", "s"):
        with coord.run(run):
            coord.emit("a", run)
    coord.emit("a", "outside")
    coord.join(10)
    join_all(start_all(elsewhere))
    coord.join(10)
    assert seen == [{"a": "outside", "b": "outside"}]
    for run in ("s", "r"):
        with coord.run(run):
            coord.emit("b", run)
        coord.join(10)
    assert seen[1:] == [{"a": "s", "b": "s"}, {"a": "r", "b": "r"}]


def test_E13_fifty_runs_side_by_side_give_fifty_pairs(coord):
    """Two agents each, in either order, from threads and tasks: one pair for each run, of that run."""
    pairs = []
    coord.on(all_of("research_complete", "critic_complete"), pairs.append, pass_event=True)
    agents = [coord.coordinate("research")(lambda topic: f"facts {topic}")]
    agents += [coord.coordinate("critic")(lambda topic: f"doubts {topic}")]
    together = threading.Barrier(50)

    def work(number):
        together.wait(20)
        with coord.run(f"r{number}"):
            for agent in agents if number % 2 else reversed(agents):
                agent(number)

    async def work_async(number):
        await asyncio.to_thread(together.wait, 20)
        with coord.run(f"r{number}"):
            order = agents if number % 2 else agents[::-1]
            await asyncio.gather(*[asyncio.to_thread(agent, number) for agent in order])

    join_all(
        start_all(
            *[lambda n=n: work(n) if n % 3 else asyncio.run(work_async(n)) for n in range(50)],
        )
    )
    coord.join(20)
    assert len(pairs) == 50
    for pair in pairs:
        (run,) = {event.run_id for event in pair.values()}
        assert {event.data["result"] for event in pair.values()} == {f"facts {run[1:]}", f"doubts {run[1:]}"}
    assert {pair["research_complete"].run_id for pair in pairs} == {f"r{number}" for number in range(50)}
    assert not kept(coord)


def test_E13_many_joins_of_the_same_events_each_have_their_own_sets(coord):
    """An event counts in all of them."""
    first, second = [], []
    coord.on(all_of("a", "b"), first.append)
    coord.on(all_of("a", "b", "c"), second.append)
    for name in "abc":
        coord.emit(name, name)
    coord.join(10)
    assert first == [{"a": "a", "b": "b"}]
    assert second == [{"a": "a", "b": "b", "c": "c"}]


# -- all_of: how the handler is called ---------------------------------------------------------------------------


def test_E13_the_handler_is_called_in_the_lane_of_the_event_that_fills_the_set(coord):
    """Events of the run that come later wait for it, and what it emits belongs to the run."""
    began, go = threading.Event(), threading.Event()
    seen = []

    def handler(data):
        began.set()
        assert go.wait(20)
        seen.append("joined")
        coord.emit("told")

    coord.on(all_of("a", "b"), handler)
    coord.on(any_of("c", "told"), lambda event: seen.append((event.name, event.run_id)), pass_event=True)
    with coord.run("r"):
        coord.emit("a")
        coord.emit("b")
        coord.emit("c")
    assert began.wait(10)
    assert seen == []
    go.set()
    coord.join(10)
    assert seen == ["joined", ("c", "r"), ("told", "r")]


@pytest.mark.parametrize("kind", ["async", "sync giving a coroutine"])
def test_E13_async_handlers_run_on_the_loop_of_their_registration(coord, kind):
    """As others do (E8); the delivery of the event that fills the set holds the result."""

    async def main():
        loop = asyncio.get_running_loop()

        async def handler(data):
            await asyncio.sleep(0)
            return asyncio.get_running_loop() is loop, data

        coord.on(all_of("a", "b"), handler if kind == "async" else lambda data: handler(data), loop=loop)
        coord.emit("a", 1)
        delivery = await coord.emit("b", 2)
        assert delivery.results == ((True, {"a": 1, "b": 2}),)

    asyncio.run(main())


def test_E13_without_a_loop_an_async_handler_has_ours_at_once(coord):
    """When the set is full it may be too late to start a thread: the process may be ending (E6)."""

    async def handler(data):
        return threading.current_thread().name

    coord.on(all_of("a", "b"), handler)
    assert coord._bus.loop._thread is not None
    coord.emit("a")
    assert coord.emit("b").wait(10).results == ("test-loop",)


def test_E13_a_handler_that_raises_fails_like_any_other(coord, caplog):
    """Its name is told, and the set counts as used (E3)."""
    failures = []

    def fussy(data):
        raise ValueError("no")

    coord.on("handler_failed", failures.append)
    coord.on(all_of("a", "b"), fussy)
    coord.emit("a")
    delivery = coord.emit("b").wait(10)
    coord.join(10)
    assert [type(error) for error in delivery.errors] == [ValueError]
    assert "fussy" in failures[0]["handler"]
    assert "fussy" in caplog.text
    assert not kept(coord)


def test_E13_once_means_one_set(coord):
    """Then it is cancelled, and half full sets are gone."""
    seen = []
    coord.on(all_of("a", "b"), seen.append, once=True)
    for name in "aabb":
        coord.emit(name, name)
    coord.join(10)
    assert seen == [{"a": "a", "b": "b"}]
    assert not coord._bus.subscriptions()
    assert not kept(coord)


@pytest.mark.parametrize("kind", ["sync", "async"])
def test_E13_once_is_exact_when_sets_of_many_runs_are_full_at_once(coord, kind):
    """One call, though every run fills a set at the same moment (E10)."""
    for _ in range(20):
        seen = []

        async def handler_async(data, seen=seen):
            seen.append(data)

        coord.on(all_of("a", "b"), seen.append if kind == "sync" else handler_async, once=True)
        together = threading.Barrier(4)

        def emit(run, together=together):
            with coord.run(run):
                coord.emit("a")
                together.wait(10)
                coord.emit("b")

        join_all(start_all(*[lambda run=run: emit(f"r{run}") for run in range(4)]))
        coord.join(10)
        assert len(seen) == 1
        assert not coord._bus.subscriptions()
        assert not kept(coord)


@pytest.mark.parametrize("kind", ["sync", "async"])
def test_E13_after_cancel_it_is_not_called(coord, kind):
    """Not for what is queued either; the sets are gone from the snapshot (E10)."""
    began, go = threading.Event(), threading.Event()
    seen = []

    def block(data):
        began.set()
        assert go.wait(20)

    async def handler_async(data):
        seen.append(data)

    coord.on("block", block)
    sub = coord.on(all_of("a", "b"), seen.append if kind == "sync" else handler_async)
    coord.emit("a")
    coord.join(10)
    coord.emit("block")
    coord.emit("b")
    assert began.wait(10)
    sub.cancel()
    assert coord.snapshot().joins == ()
    go.set()
    coord.join(10)
    assert seen == []
    assert not kept(coord)


def test_E13_cancelled_on_its_way_to_the_loop_it_does_not_start(coord):
    """An async handler is asked for once more on its loop, right before it begins (E10)."""
    seen = []

    async def main():
        async def handler(data):
            seen.append(data)

        sub = coord.on(all_of("a", "b"), handler)
        coord.emit("a")
        filling = coord.emit("b")
        while not coord._bus.away:  # on its way here: this loop has not looked yet, since we never await
            pass
        sub.cancel()
        await filling
        assert filling.results == (None,)

    asyncio.run(main())
    assert seen == []


def test_E13_cancelled_between_the_full_set_and_the_call_it_does_not_start(coord, monkeypatch):
    """A sync handler is asked for once more right before the call (E10)."""
    seen = []
    sub = coord.on(all_of("a", "b"), seen.append)
    put = coord._bus.joins.put

    def put_and_cancel(join, event):
        full = put(join, event)
        if full is not None:
            sub.cancel()
        return full

    monkeypatch.setattr(coord._bus.joins, "put", put_and_cancel)
    coord.emit("a")
    coord.emit("b")
    coord.join(10)
    assert seen == []


def test_E13_an_event_that_comes_after_cancel_leaves_no_set(coord, monkeypatch):
    """It was asked for before the cancel, and put away after."""
    put = coord._bus.joins.put
    sub = coord.on(all_of("a", "b"), print)

    def cancel_and_put(join, event):
        sub.cancel()
        return put(join, event)

    monkeypatch.setattr(coord._bus.joins, "put", cancel_and_put)
    coord.emit("a")
    coord.join(10)
    assert not kept(coord)


@pytest.mark.parametrize("end", ["cancel", "stop"])
def test_E13_what_ends_while_an_event_is_put_into_its_set_leaves_no_set(coord, monkeypatch, end):
    """Whoever cancels waits for nobody, and whoever was amid that clears up."""
    joins = coord._bus.joins
    sub = coord.on(all_of("a", "b"), print)
    place = joins._place

    def place_and_end(*args):
        found = place(*args)
        sub.cancel() if end == "cancel" else joins.stop()
        return found

    monkeypatch.setattr(joins, "_place", place_and_end)
    coord.emit("a")
    coord.join(10)
    assert not kept(coord)


def test_E13_a_collection_may_cancel_amid_anything(coord):
    """`cancel` in a `__del__`, while this thread is inside the joins' own mutex: it waits for nobody."""
    seen = []
    sub = coord.on(all_of("a", "b"), seen.append)
    other = coord.on(all_of("a", "c"), seen.append)

    class Owner:
        def __del__(self):
            sub.cancel()

    coord.emit("a")
    coord.join(10)
    owner = [Owner()]
    owner.append(owner)
    with coord._bus.joins._mutex:
        del owner
        gc.collect()
        assert not sub.active
    assert [join.join for join in coord.snapshot().joins] == ["all_of('a', 'c')"]
    other.cancel()
    assert not kept(coord)


def test_E13_an_event_that_comes_while_it_is_being_subscribed_finds_it_whole(coord, monkeypatch):
    """`once` can cancel it: the join knows its subscription before any event comes."""
    subscribe = coord._bus.subscribe
    seen = []

    def subscribe_and_emit(*args, **options):
        sub = subscribe(*args, **options)
        threads.extend(start_all(lambda: coord.emit("a", 1)))
        threads[0].join(0.05)  # it may not get in, and must not be let in
        return sub

    threads = []
    monkeypatch.setattr(coord._bus, "subscribe", subscribe_and_emit)
    coord.on(all_of("a"), seen.append, once=True)
    join_all(threads)
    coord.join(10)
    assert seen == [{"a": 1}]
    assert not coord._bus.subscriptions()


# -- what never gets full ----------------------------------------------------------------------------------------


def test_E13_the_snapshot_lists_sets_that_still_wait(clock):
    """Their run, what came, what is missing, for how long; the oldest first; `explain` says it in words."""
    with Coordinator(name="test", clock=clock) as coord:
        coord.on(all_of("a", "b", "c"), print)
        with coord.run("r"):
            coord.emit("b")
        coord.join(10)
        clock.advance(5)
        coord.emit("a")
        coord.join(10)
        clock.advance(2)
        first, second = coord.snapshot().joins
        assert (first.join, first.run, first.came, first.missing, first.waiting_for) == (
            "all_of('a', 'b', 'c')", "r", ("b",), ("a", "c"), 7.0,
        )  # fmt: skip
        assert (second.run, second.came, second.missing, second.waiting_for) == (None, ("a",), ("b", "c"), 2.0)
        said = coord.explain()
        assert "all_of('a', 'b', 'c') in run 'r' has waited for 7 s for 'a', 'c'; 'b' came." in said
        with pytest.raises(AttributeError):
            first.run = "other"


def test_E13_unmet_joins_hold_up_neither_join_nor_close(caplog):
    """With a timeout and without one; nobody is told after the close."""
    told = []
    coord = Coordinator(name="test")
    coord.on("join_timeout", told.append)
    coord.on(all_of("a", "b"), print)
    coord.on(all_of("a", "c"), print, timeout=1000)
    coord.emit("a")
    coord.join(10)
    assert len(coord.snapshot().joins) == 2
    coord.close()
    assert coord.snapshot().joins == ()
    assert told == []
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("test-")]


def test_E13_an_event_after_the_close_starts_nothing():
    """One that was emitted at the last moment keeps no thread alive until a timeout."""
    coord = Coordinator(name="test")
    sub = coord.on(all_of("a", "c"), print, timeout=1000)
    event = coord.emit("unheard").event
    coord.close()
    assert sub.handler(event) is None
    assert not kept(coord)
    assert not coord._bus.workers.threads


def test_E13_a_set_whose_time_is_over_is_given_up_and_told(timed, clock, caplog):
    """By an event `join_timeout` of its run, and in the log; then a late event begins a new set."""
    told, seen = [], []
    timed.on("join_timeout", told.append, pass_event=True)
    timed.on(all_of("a", "b", "c"), seen.append, timeout=60)
    with timed.run("r"):
        timed.emit("b", 42)
    timed.join(10)
    sleeps_until(clock, 1060)
    clock.advance(59)
    assert len(timed.snapshot().joins) == 1
    clock.advance(2)
    eventually(lambda: told)
    event = told[0]
    assert (event.run_id, event.sender) == ("r", "all_of('a', 'b', 'c')")
    assert event.data == {
        "join": "all_of('a', 'b', 'c')",
        "run": "r",
        "came": {"b": 42},
        "missing": ("a", "c"),
        "waited": 61.0,
        "reason": "their time of 60 s is over",
        "timestamp": clock.time(),
    }
    eventually(lambda: caplog.records)
    assert "all_of('a', 'b', 'c') in run 'r': 'b' came, and 'a', 'c' did not; given up" in caplog.text
    assert not kept(timed)
    with timed.run("r"):
        for name in ("a", "c"):
            timed.emit(name)
    timed.join(10)
    assert seen == []
    assert [join.missing for join in timed.snapshot().joins] == [("b",)]


def test_E13_a_set_that_is_full_in_time_is_not_told(timed, clock):
    """Nobody looks at it again."""
    told, seen = [], []
    timed.on("join_timeout", told.append)
    timed.on(all_of("a", "b"), seen.append, timeout=10)
    timed.emit("a")
    timed.join(10)
    clock.wait_for_sleepers(1)
    timed.emit("b")
    timed.join(10)
    clock.advance(20)
    eventually(lambda: timed._bus.joins._asleep_until is None)
    timed.join(10)
    assert (len(seen), told) == (1, [])


def test_E13_times_of_different_length_end_in_their_order(timed, clock):
    """A shorter one that begins later is told first: whoever sleeps is woken for it."""
    told = []
    timed.on("join_timeout", lambda data: told.append((data["missing"], data["waited"])))
    timed.on(all_of("a", "long"), print, timeout=100)
    timed.on(all_of("a", "short"), print, timeout=10)
    timed.on(all_of("b", "shortest"), print, timeout=5)
    timed.emit("a")
    timed.join(10)
    sleeps_until(clock, 1010)
    clock.advance(1)
    timed.emit("b")
    timed.join(10)
    for due, waited, told_by_then in [(1006, 5, 1), (1010, 4, 2), (1100, 90, 3)]:
        sleeps_until(clock, due)
        clock.advance(waited)
        eventually(lambda told_by_then=told_by_then: len(told) == told_by_then)
    assert told == [(("shortest",), 5.0), (("short",), 10.0), (("long",), 100.0)]


def test_E13_sets_that_are_over_together_are_told_in_the_order_of_their_ends(timed, clock):
    """Though each length of time is kept by itself."""
    told = []
    timed.on("join_timeout", lambda data: told.append((data["came"], data["missing"])))
    timed.on(all_of("a", "long"), print, timeout=100)
    timed.on(all_of("a", "short"), print, timeout=98)
    for number in range(3):
        with timed.run("r"):  # whose events are handled in the order in which they are told
            timed.emit("a", number)
        timed.join(10)
        sleeps_until(clock, 1098)
        clock.advance(3)
    clock.advance(1000)
    eventually(lambda: len(told) == 6)
    ends = [(number, name) for number in range(3) for name in ("short", "long")]
    assert told == [({"a": number}, (name,)) for number, name in ends]


def test_E13_watching_the_time_takes_no_worker(clock):
    """With a single one, events are handled while sets wait (E16)."""
    with Coordinator(name="test", clock=clock, workers=1) as coord:
        coord.on(all_of("a", "b"), print, timeout=60)
        coord.on("c", lambda data: data)
        coord.emit("a")
        clock.wait_for_sleepers(1)
        for number in range(5):
            assert coord.emit("c", number).wait(10).results == (number,)


def test_E13_one_watcher_for_all(timed, clock):
    """A thousand sets with times keep one sleeper; the work for each does not grow with their number."""
    told = []
    timed.on("join_timeout", lambda data: told.append(data["run"]))
    timed.on(all_of("a", "b"), print, timeout=60)
    for number in range(1000):
        with timed.run(f"r{number}"):
            timed.emit("a")
    timed.join(20)
    clock.wait_for_sleepers(1)
    assert len(clock._alarms) == 1
    assert len(timed.snapshot().joins) == 1000
    assert "990 more sets of events are not full yet" in timed.explain()
    clock.advance(61)
    eventually(lambda: len(told) == 1000)
    assert set(told) == {f"r{number}" for number in range(1000)}
    assert not kept(timed)


def test_E13_when_the_last_timed_set_is_cancelled_nobody_watches(timed, clock):
    """The sleeper goes home."""
    sub = timed.on(all_of("a", "b"), print, timeout=60)
    timed.emit("a")
    clock.wait_for_sleepers(1)
    sub.cancel()
    eventually(lambda: timed._bus.joins._asleep_until is None)
    eventually(lambda: not clock._alarms)


def test_E13_beyond_max_joins_the_oldest_is_dropped_counted_logged_and_told(caplog):
    """At most so many are kept, over all joins and runs; what is dropped can't fire any more."""
    told, seen = [], []
    with Coordinator(name="test", max_joins=3) as coord:
        coord.on("join_timeout", told.append, pass_event=True)
        coord.on(all_of("a", "b"), seen.append)
        for number in range(5):
            with coord.run(f"r{number}"):
                coord.emit("a", number)
            coord.join(10)
        assert [join.run for join in coord.snapshot().joins] == ["r2", "r3", "r4"]
        assert coord.snapshot().counts.joins_dropped == 2
        assert [(event.run_id, event.data["came"], event.data["missing"]) for event in told] == [
            ("r0", {"a": 0}, ("b",)),
            ("r1", {"a": 1}, ("b",)),
        ]
        assert all(event.data["reason"] == "there were more than 3 unfinished sets" for event in told)
        assert [record.levelname for record in caplog.records] == ["WARNING"] * 2
        for number in (4, 3, 2, 1, 0):
            with coord.run(f"r{number}"):
                coord.emit("b", number)
            coord.join(10)
        assert seen == [{"a": number, "b": number} for number in (4, 3, 2)]
        assert coord.snapshot().counts.joins_dropped == 2


def test_E13_the_bound_holds_for_a_line_of_one_name(caplog):
    """A name that comes again and again, while the other never does."""
    with Coordinator(name="test", max_joins=10) as coord:
        sub = coord.on(all_of("a", "b"), print)
        for number in range(100):
            coord.emit("a", number)
        coord.join(20)
        assert len(coord.snapshot().joins) == 10
        assert coord.snapshot().counts.joins_dropped == 90
        seen = []
        sub.handler._handler = seen.append
        coord.emit("b", "late")
        coord.join(10)
        assert seen == [{"a": 90, "b": "late"}]


@pytest.mark.parametrize("trouble", ["filter", "emit"])
def test_E13_nothing_that_goes_wrong_with_telling_stops_anybody(clock, monkeypatch, trouble):
    """Neither the lane whose event dropped a set nor whoever watches the time."""
    logger = logging.getLogger("agentdiff")

    def refuse(*args, **options):
        raise RuntimeError("no room")

    with Coordinator(name="test", clock=clock, max_joins=1) as coord:
        if trouble == "filter":
            monkeypatch.setattr(logger, "filter", refuse)
        else:
            monkeypatch.setattr(coord._bus, "emit_lifecycle", refuse)
        seen = []
        coord.on(all_of("a", "b"), seen.append, timeout=10)
        for number in range(3):
            coord.emit("a", number)
        coord.emit("b")
        coord.join(10)
        assert seen == [{"a": 2, "b": None}]
        for _ in range(2):
            coord.emit("a")
            coord.join(10)
            clock.wait_for_sleepers(1)
            clock.advance(11)
            eventually(lambda: not kept(coord))
        assert coord.snapshot().counts.handlers_failed == 0


def test_E13_at_the_exit_nobody_is_held_up_by_a_timeout(clock):
    """A thread that lends a hand looks at the times, and does not sleep until they are over."""
    with Coordinator(name="test", clock=clock) as coord:
        joins = coord._bus.joins
        coord.on(all_of("a", "b"), print, timeout=60)
        jobs = []
        joins._workers = Jobs(jobs)
        coord.emit("a")
        coord.join(10)
        (watch,) = jobs
        watch()
        assert joins._asleep_until is None
        assert len(coord.snapshot().joins) == 1
        clock.advance(61)
        watch()
        assert coord.snapshot().joins == ()


class Jobs:
    """Workers that only take jobs down."""

    def __init__(self, jobs):
        self.submit = jobs.append


def test_E13_sets_begun_in_isolated_are_gone_after_it(coord):
    """And joins go on working afterwards (T1)."""
    seen = []
    coord.on(all_of("a", "b"), seen.append)
    with coord.isolated():
        coord.emit("a", "inside")
        coord.join(10)
        assert len(coord.snapshot().joins) == 1
    assert coord.snapshot().joins == ()
    coord.emit("b", 1)
    coord.emit("a", 2)
    coord.join(10)
    assert seen == [{"a": 2, "b": 1}]


def test_E13_a_forked_child_has_none_of_the_parents_sets():
    """The subscription is there, and what came before the fork is not (L13)."""
    coord = Coordinator(name="test")
    seen = []
    coord.on(all_of("a", "b"), seen.append)
    coord.emit("a", 1)
    coord.join(10)
    coord.forget()  # what the hook calls in a child
    assert coord.snapshot().joins == ()
    coord.emit("b", 2)
    coord.emit("a", 3)
    coord.join(10)
    assert seen == [{"a": 3, "b": 2}]
    coord.close()
