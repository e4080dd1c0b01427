"""Chrome trace JSON (agentdiff/monitor/trace.py)."""

from __future__ import annotations

import json
from collections import Counter
from typing import Any

from scenes import crowd, story

from agentdiff.monitor import trace

NEEDED = {
    "M": {"name", "args"},
    "X": {"name", "cat", "ts", "dur"},
    "B": {"name", "cat", "ts"},
    "i": {"name", "s", "ts"},
    "s": {"id", "name", "cat", "ts"},
    "f": {"id", "name", "cat", "ts", "bp"},
}


def check(found: Any) -> None:
    """The rules of the trace event format, for the phases that we use."""
    found = json.loads(json.dumps(found, allow_nan=False))
    assert found["displayTimeUnit"] in ("ms", "ns")
    open_slices: dict[Any, list[float]] = {}
    named = {(e["pid"], e["tid"]) for e in found["traceEvents"] if e["ph"] == "M"}
    for event in found["traceEvents"]:
        assert NEEDED[event["ph"]] <= set(event)
        assert isinstance(event["pid"], int)
        assert isinstance(event["tid"], int)
        assert (event["pid"], event["tid"]) in named
        if event["ph"] != "M":
            assert event["ts"] >= 0
        if event["ph"] == "i":
            assert event["s"] in ("t", "p", "g")
    slices = [e for e in found["traceEvents"] if e["ph"] == "X"]
    for event in sorted(slices, key=lambda e: (e["ts"], -e["dur"])):  # slices of one thread nest, or follow each other
        assert event["dur"] >= 0
        stack = open_slices.setdefault(event["tid"], [])
        while stack and stack[-1] <= event["ts"] + 1e-2:
            stack.pop()
        assert not stack or event["ts"] + event["dur"] <= stack[-1] + 1e-2
        stack.append(event["ts"] + event["dur"])
    arrows = Counter((e["id"], e["ph"]) for e in found["traceEvents"] if e["ph"] in "sf")
    assert set(arrows.values()) <= {1}
    assert {id for id, ph in arrows if ph == "s"} == {id for id, ph in arrows if ph == "f"}


def test_a_trace_keeps_to_the_format() -> None:
    """Fields by phase, named threads, nested slices, arrows with both ends."""
    check(trace(story().events))
    check(trace(crowd(500).events))
    check(trace([]))


def test_a_trace_tells_the_story() -> None:
    """Slices for calls, waits and running; instants for events; a call that has not ended is left open."""
    events = trace(story().events)["traceEvents"]
    names = Counter(e["name"] for e in events if e["ph"] == "X")
    assert names["waits for lock api"] == 2
    assert names["waits for researcher, critic"] == 1
    assert names["runs"] == 4
    assert [e["name"] for e in events if e["ph"] == "B"] == ["critic(wasps)"]
    assert [e["name"] for e in events if e["ph"] == "i"] == ["source_found", "report_ready", "handler_failed"]
    failed = next(e for e in events if e.get("cat") == "failed")
    assert failed["args"]["waited for"] == "2 calls, the last critic(bees), researcher(bees)"
    threads = [e["args"]["name"] for e in events if e["name"] == "thread_name"]
    assert threads == ["writer", "researcher 1", "researcher 2", "critic", "other events", "failed handlers"]
