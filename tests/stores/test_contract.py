"""One contract for every store (S1)."""

from __future__ import annotations

import threading
from typing import Any

import pytest
from support import join_all, start_all

from agentdiff import Coordinator, Event
from agentdiff.stores import Record, Store


def record(number: int, **facts: Any) -> Record:
    plain: dict[str, Any] = {
        "id": f"id-{number:x}",
        "name": "thing_done",
        "time": 1000.0 + number,
        "sender": None,
        "run_id": None,
        "parent_id": None,
        "data": "null",
    }
    return Record(**{**plain, **facts})


def ids(store: Store, **query: Any) -> list[str]:
    return [event.id for event in store.read(**query)]


def test_S1_what_was_written_is_given_back_as_events(store: Store) -> None:
    """All fields, the data as JSON says it, whatever characters there are."""
    facts = {"sender": "Zoë", "run_id": "run ✓", "parent_id": "id-0", "data": '{"a": [1, null, "é\\u0000\\n"]}'}
    store.write([record(1, name='it\'s "done" %s [x] ✓', time=1234.56789, **facts), record(2)])
    first, second = store.read()
    assert first == Event(
        name='it\'s "done" %s [x] ✓',
        data={"a": [1, None, "é\x00\n"]},
        sender="Zoë",
        id="id-1",
        time=1234.56789,
        run_id="run ✓",
        parent_id="id-0",
    )
    assert second.data is None
    assert second.sender is second.run_id is second.parent_id is None


def test_S1_events_come_in_the_order_of_writing(store: Store) -> None:
    """Whatever their times and ids say; across batches too."""
    store.write([record(5), record(3)])
    store.write([record(9), record(1)])
    assert ids(store) == ["id-5", "id-3", "id-9", "id-1"]


def test_S1_an_empty_store_gives_nothing(store: Store) -> None:
    """Not before the first event, and not after an empty batch."""
    assert ids(store) == []
    store.write([])
    assert ids(store) == []


def test_S1_what_is_written_again_is_kept_once(store: Store) -> None:
    """A reply may be lost after the work was done; then the batch comes again, perhaps with others."""
    store.write([record(1), record(2)])
    store.write([record(1), record(2)])
    store.write([record(2), record(3)])
    assert ids(store) == ["id-1", "id-2", "id-3"]


def test_S1_read_selects_by_name_and_pattern(store: Store) -> None:
    """`*` and `?` match, dots and line ends too; all else is literal, and cases differ."""
    names = ["a_done", "b_done", "a.b_done", "A_done", "a[b]", "ab", "a%", "a\nb", "*"]
    store.write([record(number, name=name) for number, name in enumerate(names)])

    def found(name: str) -> list[str]:
        return [event.name for event in store.read(name=name)]

    assert found("a_done") == ["a_done"]
    assert found("?_done") == ["a_done", "b_done", "A_done"]
    assert found("a*_done") == ["a_done", "a.b_done"]
    assert found("a[b]") == ["a[b]"]
    assert found("a[*]") == ["a[b]"]
    assert found("a%") == ["a%"]
    assert found("a?b") == ["a\nb"]
    assert found("*") == names
    assert found("nothing") == []


def test_S1_read_selects_by_run_time_and_number(store: Store) -> None:
    """The bounds are inclusive; `limit` gives the first; all of them together narrow it down."""
    store.write([record(number, run_id="odd" if number % 2 else "even") for number in range(10)])
    assert ids(store, run="odd", limit=2) == ["id-1", "id-3"]
    assert ids(store, since=1003, until=1005.0) == ["id-3", "id-4", "id-5"]
    assert ids(store, run="even", since=1003, until=1008, name="thing*", limit=5) == ["id-4", "id-6", "id-8"]
    assert ids(store, limit=0) == []
    assert ids(store, run="none") == []


def test_S1_a_follower_reads_on_after_the_last_event_that_it_saw(store: Store) -> None:
    """By its id; with a filter too; an id that isn't there gives everything."""
    store.write([record(number, run_id=str(number % 2)) for number in range(5)])
    assert ids(store, after="id-2") == ["id-3", "id-4"]
    assert ids(store, after="id-2", run="0") == ["id-4"]
    assert ids(store, after="id-4") == []
    store.write([record(0x10)])
    assert ids(store, after="id-4") == ["id-10"]
    assert len(ids(store, after="unknown")) == 6


def test_S1_a_long_history_is_read_whole(store: Store) -> None:
    """In the order of writing, and `limit` reaches over pages."""
    for begin in range(0, 3000, 750):
        store.write([record(number) for number in range(begin, begin + 750)])
    assert ids(store) == [f"id-{number:x}" for number in range(3000)]
    assert ids(store, limit=1234, after="id-1") == [f"id-{number:x}" for number in range(2, 1236)]


def test_S1_a_store_that_was_closed_opens_again(store: Store) -> None:
    """`close` lets go of what it holds, and nothing else; it may be called twice."""
    store.write([record(1)])
    store.close()
    store.close()
    assert ids(store) == ["id-1"]
    store.write([record(2)])
    assert ids(store) == ["id-1", "id-2"]


def test_S1_reading_goes_on_beside_writing(store: Store) -> None:
    """Readers see a beginning of what is written, in order, and none fails."""
    over = threading.Event()
    failures: list[Any] = []

    def read() -> None:
        try:
            while not over.is_set():
                seen = ids(store)
                assert seen == [f"id-{number:x}" for number in range(len(seen))]
        except BaseException as error:
            failures.append(error)

    readers = start_all(*[read] * 4)
    try:
        for begin in range(0, 2000, 50):
            store.write([record(number) for number in range(begin, begin + 50)])
    finally:
        over.set()
        join_all(readers)
    assert failures == []
    assert len(ids(store)) == 2000


@pytest.mark.parametrize(
    ("query", "error"),
    [
        ({"name": 1}, TypeError),
        ({"name": ""}, ValueError),
        ({"run": 1}, TypeError),
        ({"after": 1}, TypeError),
        ({"since": "now"}, TypeError),
        ({"until": True}, TypeError),
        ({"since": float("nan")}, ValueError),
        ({"limit": 1.5}, TypeError),
        ({"limit": -1}, ValueError),
    ],
    ids=str,
)
def test_S1_a_question_that_makes_no_sense_is_refused_at_once(
    store: Store, query: dict[str, Any], error: type[Exception]
) -> None:
    """When it is asked, not when the first answer is looked at."""
    with pytest.raises(error):
        store.read(**query)


def test_S1_a_coordinator_writes_every_event_whether_it_is_heard_or_not(store: Store) -> None:
    """Emitted, caused, and of agents' lives; with run, parent and sender; what failed is there with its traceback."""
    with Coordinator(store=store) as coord:

        @coord.on("question")
        def answer(data: Any) -> None:
            coord.emit("answer", data * 2)
            raise OSError("no more")

        @coord.coordinate("researcher")
        def research(topic: str) -> str:
            coord.emit("progress", 50)
            return topic.upper()

        with coord.run("report"):
            asked = coord.emit("question", 21, sender="me")
            assert research("bees") == "BEES"
        coord.join()
        coord.flush()
        counts = coord.snapshot().counts
    events = {event.name: event for event in store.read()}
    assert set(events) == {
        "question", "answer", "handler_failed", "researcher_started", "progress", "researcher_complete"
    }  # fmt: skip
    assert {event.run_id for event in events.values()} == {"report"}
    assert events["question"] == asked.event
    assert events["question"].sender == "me"
    assert events["answer"].data == 42
    assert events["answer"].parent_id == events["handler_failed"].parent_id == asked.event.id
    assert events["progress"].parent_id == events["researcher_started"].id
    assert events["researcher_started"].data["args"] == ["bees"]
    assert events["researcher_complete"].data["result"] == "BEES"
    failed = events["handler_failed"].data
    assert failed["handler"].endswith("answer")
    assert (failed["error"], failed["error_type"]) == ("no more", "OSError")
    assert "in answer" in failed["traceback"]
    assert failed["event"]["id"] == asked.event.id
    assert (counts.events_stored, counts.events_dropped) == (6, 0)
