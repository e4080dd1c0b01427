"""Programs of the library formerly published as `agentdiff_coordination` run unchanged (F1, F3)."""

from __future__ import annotations

import inspect
import threading
from pathlib import Path
from typing import Any

import pytest
from support import join_all, run_script, start_all

import agentdiff
from agentdiff import Coordinator, default_coordinator
from agentdiff.stores import open_store
from agentdiff_coordination import (
    CoordinationError,
    CoordinationTimeoutError,
    configure_broker,
    coordinate,
    emit,
    when,
)


def test_F1_the_errors_are_the_same_tree() -> None:
    """Who catches the old names catches what agentdiff raises."""
    assert CoordinationError is agentdiff.CoordinationError
    assert CoordinationTimeoutError is agentdiff.CoordinationTimeoutError
    assert issubclass(CoordinationTimeoutError, CoordinationError)


def test_F1_emit_gives_the_events_id(fresh_default: Coordinator) -> None:
    """`emit` returns a string, another one for each event: the id that handlers see."""
    seen: list[Any] = []
    default_coordinator().on("e", seen.append, pass_event=True)
    ids = [emit("e"), emit("e", {"n": 1}), emit("e", [2], "me"), emit(event_name="e", data=3, sender="you")]
    default_coordinator().join(10)
    assert all(isinstance(one, str) and one for one in ids)
    assert ids == [event.id for event in seen]
    assert len(set(ids)) == 4
    assert [event.data for event in seen] == [None, {"n": 1}, [2], 3]
    assert [event.sender for event in seen] == [None, None, "me", "you"]
    assert isinstance(emit("nobody_listens"), str)


@pytest.mark.parametrize(
    "decorator",
    [lambda: when("e"), lambda: when("e", timeout=5), lambda: when("e", 5), lambda: when(event_name="e")],
)
def test_F1_when_registers_and_leaves_the_function_alone(fresh_default: Coordinator, decorator: Any) -> None:
    """A handler gets the event's data, and can still be called as what it was; a `timeout` is accepted."""
    seen: list[Any] = []

    @decorator()
    def handle(event_data: Any) -> str:
        """Handle it."""
        seen.append(event_data)
        return "called"

    emit("e", {"n": 1})
    default_coordinator().join(10)
    assert seen == [{"n": 1}]
    assert handle(2) == "called"
    assert (handle.__name__, handle.__doc__) == ("handle", "Handle it.")


def test_F1_when_knows_patterns(fresh_default: Coordinator) -> None:
    """A pattern hears every event that it matches."""
    seen: list[Any] = []
    when("*_complete")(seen.append)
    for name in ("a_complete", "b_complete", "b_failed"):
        emit(name, name)
    default_coordinator().join(10)
    assert seen == ["a_complete", "b_complete"]


def test_F1_coordinate_locks_and_tells_its_life(fresh_default: Coordinator) -> None:
    """`_started`, `_complete` and `_failed` carry the keys that they always carried, and the agent as sender."""
    seen: list[Any] = []
    default_coordinator().on("agent_*", seen.append, pass_event=True)

    @coordinate("agent", lock_name="x")
    def agent(n: int, *, fail: bool = False) -> int:
        assert agentdiff.lock("x").locked()
        if fail:
            raise ValueError("bad")
        return n * 2

    assert agent(4) == 8
    with pytest.raises(ValueError, match="bad"):
        agent(5, fail=True)
    default_coordinator().join(10)
    assert [event.name for event in seen] == ["agent_started", "agent_complete", "agent_started", "agent_failed"]
    started, complete, again, failed = (event.data for event in seen)
    assert (started["args"], started["kwargs"]) == ((4,), {})
    assert (again["args"], again["kwargs"]) == ((5,), {"fail": True})
    assert complete["result"] == 8
    assert failed["error"] == "bad"
    for data, keys in ((started, ()), (complete, ("duration",)), (failed, ("duration",))):
        assert all(isinstance(data[key], float) for key in ("timestamp", *keys))
    assert {event.sender for event in seen} == {"agent"}


def test_F1_coordinate_takes_its_arguments_by_position_too(fresh_default: Coordinator) -> None:
    """`coordinate(name)`, `coordinate(name, lock)` and keywords are the same as ever; None is no lock."""
    for dec in (coordinate("a"), coordinate("a", None), coordinate("a", "x"), coordinate(name="a", lock_name="x")):
        assert dec(lambda: 1)() == 1


def test_F1_agents_under_one_lock_take_turns(fresh_default: Coordinator) -> None:
    """Two agents that name one lock never run together, and an agent may call another under its own lock."""
    inside: list[str] = []

    def work(name: str) -> None:
        inside.append(name)
        threading.Event().wait(0)
        assert inside == [name]
        inside.clear()

    one = coordinate("one", lock_name="x")(lambda: work("one"))
    other = coordinate("other", lock_name="x")(lambda: work("other"))
    join_all(start_all(*[lambda f=f: [f() for _ in range(200)] for f in (one, other, one)]))
    coordinate("outer", lock_name="x")(lambda: one())()


@pytest.mark.parametrize("backend", ["inmemory", "none", "file", "redis"])
def test_F3_configure_broker_chooses_where_events_are_kept(
    fresh_default: Coordinator, backend: str, caplog: pytest.LogCaptureFixture, tmp_path: Path, request: Any
) -> None:
    """Every backend takes its options, handlers stay registered, events are where they should be, no password shows."""
    seen: list[Any] = []
    when("e")(seen.append)
    url = request.getfixturevalue("redis_server").url if backend == "redis" else "redis://nowhere"
    configure_broker(backend, dir=str(tmp_path), url=url, password="secret" if backend != "redis" else None, more=1)
    emit("e", 1)
    default_coordinator().join(10)
    default_coordinator().flush(10)
    assert seen == [1]
    assert default_coordinator() is fresh_default
    assert [path.name for path in tmp_path.glob("*.db")] == ["events.db"] * (backend == "file")
    kept = {"file": f"sqlite:///{tmp_path}/events.db", "redis": url}.get(backend)
    if kept is not None:
        with open_store(kept) as store:
            assert [event.data for event in store.read()] == [1]
    configure_broker("none")
    assert "secret" not in caplog.text


def test_F3_configure_broker_takes_from_the_environment_what_it_is_not_told(
    fresh_default: Coordinator, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """The folder, say; code wins where it says so, and over DISABLE_PERSISTENCE."""
    monkeypatch.setenv("AGENTDIFF_COORDINATION_DATA_DIR", str(tmp_path / "environment"))
    monkeypatch.setenv("AGENTDIFF_COORDINATION_DISABLE_PERSISTENCE", "true")
    configure_broker("file")
    configure_broker("file", dir=str(tmp_path / "code"))
    configure_broker("inmemory")
    assert sorted(path.parent.name for path in tmp_path.glob("*/events.db")) == ["code", "environment"]


@pytest.mark.parametrize("backend", ["kafkaesque", "", None, "File"])
def test_F3_configure_broker_refuses_what_it_does_not_know(fresh_default: Coordinator, backend: Any) -> None:
    """An unknown backend is a `ValueError` that names it and those that are known; handlers are kept."""
    seen: list[Any] = []
    when("e")(seen.append)
    with pytest.raises(ValueError, match="inmemory") as caught:
        configure_broker(backend)
    assert repr(backend) in str(caught.value)
    emit("e", 1)
    default_coordinator().join(10)
    assert seen == [1]


def test_F1_the_parameters_have_their_old_names() -> None:
    """Who passed arguments by keyword still can."""
    names = {f: list(inspect.signature(f).parameters) for f in (emit, when, coordinate, configure_broker)}
    assert names[emit] == ["event_name", "data", "sender"]
    assert names[when] == ["event_name", "timeout"]
    assert names[coordinate][:2] == ["name", "lock_name"]
    assert names[configure_broker][0] == "backend"
    assert inspect.signature(configure_broker).parameters["backend"].default == "file"


def test_E6_a_program_of_the_old_library_runs_to_its_end() -> None:
    """A script whose last line starts a chain runs the whole chain, with nothing to wait for."""
    result = run_script(
        """
        from agentdiff_coordination import configure_broker, coordinate, emit, when

        configure_broker("inmemory")

        @coordinate("researcher", lock_name="openai_api")
        def researcher(topic):
            return f"facts about {topic}"

        @when("researcher_complete")
        def analyse(event_data):
            analyst(event_data["result"])

        @coordinate("analyst", lock_name="openai_api")
        def analyst(facts):
            return f"analysis of {facts}"

        @when("analyst_complete")
        def report(event_data):
            print(event_data["result"])

        researcher("bees")
        """
    )
    assert (result.stdout, result.stderr, result.returncode) == ("analysis of facts about bees\n", "", 0)
