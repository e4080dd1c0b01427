"""What happened, made of events (agentdiff/monitor/history.py, lanes.py, stats.py)."""

from __future__ import annotations

import json
from typing import Any

import pytest
from scenes import EPOCH, Scene, story

from agentdiff import Coordinator
from agentdiff.monitor import History, stats
from agentdiff.monitor.history import as_text, seconds, short
from agentdiff.monitor.lanes import lay_out
from agentdiff.stores import open_store


def test_a_call_is_its_start_and_its_end() -> None:
    """Waits and running are told apart; the rest are other events."""
    history = History(story().events)
    assert [(call.agent, call.outcome) for call in history.calls] == [
        ("writer", "complete"),
        ("researcher", "complete"),
        ("critic", "complete"),
        ("researcher", "failed"),
        ("critic", "unfinished"),
    ]
    writer, _, _, failed, open_call = history.calls
    assert writer.entered - EPOCH == pytest.approx(2.1)
    assert writer.running == pytest.approx(1.0)
    assert writer.after == ("researcher", "critic")
    assert failed.entered - EPOCH == pytest.approx(2.1)
    assert (failed.label, failed.locks, failed.run) == ("ants", ("api",), "r2")
    assert (failed.error, writer.error) == ("ValueError: no sources", "")
    assert open_call.end == history.end
    assert [event.name for event in history.others] == ["source_found", "report_ready", "handler_failed"]


def test_a_wait_names_those_who_were_inside() -> None:
    """The last ones first, and how many there were in all."""
    history = History(story().events)
    _, research, check, again, _ = history.calls
    assert history.waited_for(research) == ((), 0)
    assert history.waited_for(check) == ((research,), 1)
    assert history.waited_for(again) == ((check, research), 2)
    assert history.waited_for(again, most=1) == ((check,), 2)


def test_a_wait_names_nobody_who_had_left_before() -> None:
    """Only who was inside while it waited."""
    scene = Scene()
    scene.end(scene.start("a", 0, "early", lock="x"), 1)
    scene.end(scene.start("a", 2, "inside", lock="x"), 4)
    scene.end(scene.start("b", 3, lock="x"), 5, lock_wait=1.0)
    history = History(scene.events)
    inside, number = history.waited_for(history.calls[-1])
    assert ([call.label for call in inside], number) == (["inside"], 1)


def test_a_wait_names_few_of_many() -> None:
    """However many were inside before, the list is short."""
    scene = Scene()
    events = [scene.start("a", 0, n, lock="x") for n in range(50)]
    for n, started in enumerate(events):
        scene.end(started, n + 1.0, lock_wait=float(n))
    history = History(scene.events)
    inside, number = history.waited_for(history.calls[-1])
    assert [call.label for call in inside] == ["48", "47", "46"]
    assert number == 49


def test_events_that_are_cut_or_strange_do_no_harm() -> None:
    """Data may be text, numbers text, an end may have no start, or two ends one."""
    scene = Scene()
    started = scene.emit("a_started", 0, "<cut>", sender="a")
    scene.emit("a_complete", 1, "<cut>", sender="a", parent_id=started.id)
    scene.emit("a_complete", 2, {"duration": 1.5, "lock": ["x", 1], "lock_wait": "?"}, sender="a", parent_id=started.id)
    scene.emit("b_failed", 3, {"duration": None, "lock_wait": float("nan"), "error": "e"}, sender="b", parent_id="gone")
    scene.emit("b_complete", 3, None, sender="b", parent_id=started.id)
    scene.emit("c_started", 4, {"args": "?", "kwargs": {"k": 1}}, sender="c")
    scene.emit("d_started", 4, {"args": [1]})
    history = History(scene.events)
    assert [call.outcome for call in history.calls] == ["complete", "complete", "failed", "complete", "unfinished"]
    assert history.calls[1].begin == EPOCH + 0.5
    assert history.calls[1].locks == ("x", "1")
    assert history.calls[1].parent is None
    assert history.calls[2].error == "e"
    assert history.calls[-1].label == "1"
    assert [event.name for event in history.others] == ["d_started"]
    assert lay_out(history).lanes
    assert str(stats(scene.events))


def test_nothing_happened() -> None:
    """No events, or none of agents."""
    assert History([]).story() == ["0 events, and no agent was called."]
    assert str(stats([])) == "0 events, and no agent was called."
    scene = Scene()
    scene.emit("tick", 0)
    assert stats(scene.events).seconds == 0


def test_the_story_says_what_failed_and_who_waited() -> None:
    """In sentences, for someone who has not seen the code."""
    told = History(story().events).story()
    assert told == [
        "3 agents (writer, researcher, critic) were called 5 times within 3.25 s.",
        "1 call failed: researcher(ants): ValueError: no sources.",
        "1 call not ended: critic(wasps).",
        "Together the calls waited 2.7 s for locks; the longest wait was researcher(ants)'s: 1.8 s for api, "
        "behind 2 calls, the last of critic.",
        "1 handler raised an error.",
    ]


def test_overlapping_calls_get_rows_of_their_own() -> None:
    """One lane for each agent; a row is used again when its call has ended."""
    lanes = lay_out(History(story().events))
    assert lanes.lanes == [("writer", 1), ("researcher", 2), ("critic", 1), ("other events", 1), ("failed handlers", 1)]
    assert lanes.places == [(0, 0), (1, 0), (2, 0), (1, 1), (2, 0)]
    assert lanes.marks == [(1, 0), (3, 0), (4, 0)]  # the first came while its call was running


def test_what_caused_a_call_is_found() -> None:
    """Its parent event, and the agents that it came after, each with times."""
    lanes = lay_out(History(story().events))
    found = [(thing, round(a - EPOCH, 3), round(b - EPOCH, 3)) for thing, a, b in lanes.causes_of_call(0)]
    assert found == [(1, 1.1, 2.1), (2, 2.1, 2.1)]
    assert [cause[0] for cause in lanes.causes_of_mark(1)] == [0]
    assert [cause[0] for cause in lanes.causes_of_mark(2)] == [-2]
    assert (lanes.place(-2), lanes.place(0)) == ((3, 0), (0, 0))
    scene = Scene()
    outer = scene.start("a", 0)
    scene.end(scene.start("b", 1, parent_id=outer.id), 2)
    assert lay_out(History(scene.events)).causes_of_call(1) == [(0, EPOCH, EPOCH + 1)]


def test_stats_count_and_measure() -> None:
    """Calls, failures, percentiles of waiting and running, busiest locks."""
    found = stats(story().events)
    researcher = next(agent for agent in found.agents if agent.name == "researcher")
    assert (researcher.calls, researcher.failed, researcher.unfinished) == (2, 1, 0)
    assert researcher.wait_p50 == pytest.approx(0)
    assert (researcher.wait_p95, researcher.run_p95) == (pytest.approx(1.8), pytest.approx(1.0))
    (lock,) = found.locks
    assert (lock.name, lock.calls, lock.waited) == ("api", 4, 2)
    assert (lock.total_wait, lock.longest_wait) == (pytest.approx(2.7), pytest.approx(1.8))
    assert lock.busy == pytest.approx(2.5 / 3.25)
    lines = str(found).splitlines()
    assert any(line.split() == ["api", "4", "2", "2.7", "s", "1.8", "s", "77%"] for line in lines)
    scene = Scene()
    scene.start("a", 0)
    (only,) = stats(scene.events).agents
    assert (only.unfinished, only.run_p50) == (1, None)
    assert "-" in str(stats(scene.events)).split()


def test_a_real_run_is_read_back() -> None:
    """Threads, a lock, a failure, an `after=`: the store's events make the same calls."""
    store = open_store("memory://")
    with Coordinator(store=store) as coord:

        @coord.coordinate("one", lock_name="x")
        def one(n: int) -> int:
            return 1 // n

        @coord.coordinate("two", after="one")
        def two() -> None:
            """Comes second."""

        with coord.run("r"):
            one(1)
            two()
        with pytest.raises(ZeroDivisionError):
            one(0)
    history = History(store.read())
    assert [(call.agent, call.outcome, call.locks, call.after) for call in history.calls] == [
        ("one", "complete", ("x",), ()),
        ("two", "complete", (), ("one",)),
        ("one", "failed", ("x",), ()),
    ]
    assert [thing for thing, _, _ in lay_out(history).causes_of_call(1)] == [0]


def test_L11_a_snapshot_is_json() -> None:
    """`as_dict()` goes through `json.dumps` whatever is held, waited for and limited."""
    with Coordinator() as coord:
        coord.limit("api", concurrency=2, requests=5, per=60)
        with coord.lock("x"), coord.lock("api"):
            found: Any = json.loads(json.dumps(coord.snapshot().as_dict()))
    assert sorted(lock["name"] for lock in found["locks"]) == ["api", "x"]
    assert found["limits"][0]["places_taken"] == 1
    assert found["counts"]["handlers_failed"] == 0


@pytest.mark.parametrize(
    ("number", "words"),
    [
        (0, "0 ms"),
        (0.00123, "1.2 ms"),
        (0.056, "56 ms"),
        (0.5, "0.5 s"),
        (75.2, "75.2 s"),
        (600, "10 min"),
        (9000, "2.5 h"),
    ],
)
def test_a_time_reads_well(number: float, words: str) -> None:
    """In the unit that people would use."""
    assert seconds(number) == words


def test_texts_are_cut_and_stay_on_a_line() -> None:
    """And strings are shown as they are, all else as JSON."""
    assert short("a\nb" * 20, 7) == "a ba b…"
    assert short("abc", 3) == "abc"
    assert (as_text("x"), as_text({"a": [1]})) == ("x", '{"a": [1]}')
