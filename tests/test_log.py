"""What is logged says what it is about, in words and as fields; nothing is configured (F2)."""

from __future__ import annotations

import ast
import logging
from pathlib import Path
from typing import Any

import pytest
from support import PACKAGE, eventually, join_all, run_script, start_all

from agentdiff import Coordinator, all_of
from agentdiff._log import about
from agentdiff.stores import Query, Store
from agentdiff.testing import FakeClock

Log = pytest.LogCaptureFixture


def fields(record: Any) -> tuple[Any, Any, Any]:
    assert record.name == "agentdiff"
    assert record.getMessage()
    return record.agentdiff_event, record.agentdiff_agent, record.agentdiff_run


def test_F2_every_record_carries_the_fields() -> None:
    """No call of the logger in the package goes without them, so a formatter may count on them."""
    calls = []
    for path in Path(PACKAGE).rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Call) and ast.unparse(node.func).startswith("logger."):
                calls.append(f"{path.name}:{node.lineno}")
                assert any(keyword.arg == "extra" for keyword in node.keywords), calls[-1]
    assert len(calls) >= 15


def test_F2_the_fields_collide_with_nothing() -> None:
    """Neither with what a record has, nor with what an application's records have of its own."""
    record = logging.makeLogRecord({})
    assert not set(about()) & {*vars(record), "message", "asctime", "event", "agent", "run"}
    result = run_script(
        """
        import logging
        from agentdiff import Coordinator
        make = logging.getLogRecordFactory()
        def record(*args, **kwargs):
            made = make(*args, **kwargs)
            made.event = made.agent = made.run = "mine"
            return made
        logging.setLogRecordFactory(record)
        with Coordinator() as coord:
            coord.on("e", lambda data: 1 / 0)
            coord.emit("e")
        """
    )
    assert "handler <lambda> of event 'e' failed: ZeroDivisionError" in result.stderr


def test_F2_nothing_is_configured() -> None:
    """No handler, no level; what is below a warning is not shown."""
    result = run_script(
        """
        import logging
        import agentdiff
        logger = logging.getLogger("agentdiff")
        assert (logger.handlers, logger.filters, logger.level, logger.propagate) == ([], [], 0, True)
        assert logging.getLogger().handlers == []
        with agentdiff.Coordinator(store="memory://") as coord:
            agent = coord.coordinate("agent", lock_name="x")(lambda: coord.emit("e"))
            coord.on("e", lambda data: None)
            agent()
        """
    )
    assert (result.stdout, result.stderr, result.returncode) == ("", "", 0)


def test_E3_a_failed_handler(coord: Coordinator, caplog: Log) -> None:
    """Its event, the sender, the run."""
    coord.on("e", lambda data: 1 / 0)
    with coord.run("r"):
        coord.emit("e", sender="me").wait(10)
    assert [fields(record) for record in caplog.records] == [("e", "me", "r")]


def test_E5_a_lifecycle_event_that_could_not_be_queued(caplog: Log) -> None:
    """The event that is missing, its agent, and its run."""
    with Coordinator(max_depth=1) as coord:
        agent = coord.coordinate("agent")(lambda: None)
        coord.on("agent_*", lambda data: None)
        coord.on("e", lambda data: agent())
        with coord.run("r"):
            coord.emit("e")
        coord.join(10)
    assert ("agent_started", "agent", "r") in [fields(record) for record in caplog.records]


def test_A3_what_fails_around_an_agent(coord: Coordinator, caplog: Log, monkeypatch: pytest.MonkeyPatch) -> None:
    """`collect`, a pause that an API asked for, a release: the agent and its run."""

    def fail(*args: Any, **kwargs: Any) -> Any:
        raise OSError("no")

    coord.on("*", lambda data: None)

    @coord.coordinate("streamer", collect=fail)
    def stream() -> Any:
        yield 1

    with coord.run("r"):
        assert list(stream()) == [1]
    assert [fields(record) for record in caplog.records] == [(None, "streamer", "r")]
    caplog.clear()

    @coord.coordinate("caller", lock_name="x", throttle_on=ValueError)
    def call() -> Any:
        raise ValueError("too many requests")

    monkeypatch.setattr("agentdiff.agents.retry_after", fail)
    monkeypatch.setattr(coord._table, "free_all", fail)
    with coord.run("r"), pytest.raises(ValueError, match="too many"):
        call()
    assert [fields(record) for record in caplog.records] == [(None, "caller", "r")] * 2


def test_E7_events_that_are_abandoned(caplog: Log) -> None:
    """They belong to no run in particular."""
    coord = Coordinator()
    coord.on("e", lambda data: coord.quit("enough"))
    coord.emit("e")
    eventually(lambda: caplog.records)
    assert fields(caplog.records[0]) == (None, None, None)


def test_E13_a_set_that_is_given_up(clock: FakeClock, caplog: Log) -> None:
    """The event that tells of it, and the run."""
    with Coordinator(clock=clock) as coord:
        coord.on(all_of("a", "b"), print, timeout=5)
        with coord.run("r"):
            coord.emit("a").wait(10)
        clock.wait_for_sleepers(1)
        clock.advance(6)
        eventually(lambda: caplog.records)
    assert fields(caplog.records[0]) == ("join_timeout", None, "r")


def test_L12_a_slow_wait(clock: FakeClock, caplog: Log) -> None:
    """The agent that waits."""
    with Coordinator(clock=clock, slow_after=5) as coord:
        coord.lock("x").acquire()
        threads = start_all(coord.coordinate("agent", lock_name="x")(lambda: None))
        clock.wait_for_sleepers(1)
        clock.advance(6)
        eventually(lambda: caplog.records)
        coord.lock("x").release()
        join_all(threads)
    assert fields(caplog.records[0]) == (None, "agent", None)


class Refusing(Store):
    def write(self, records: Any) -> None:
        raise ValueError("not this one")

    def select(self, query: Query) -> Any:
        return iter(())


def test_S2_an_event_that_a_store_refuses(caplog: Log) -> None:
    """Which, whose, of which run."""
    with Coordinator(store=Refusing()) as coord, coord.run("r"):
        coord.emit("e", sender="me")
    assert [fields(record) for record in caplog.records] == [("e", "me", "r")]
