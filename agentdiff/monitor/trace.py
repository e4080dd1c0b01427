"""Events as Chrome trace JSON, which Perfetto and chrome://tracing open."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from ..events import Event
from .history import UNFINISHED, Call, History
from .lanes import lay_out


def trace(events: Iterable[Event]) -> dict[str, Any]:
    """A trace: a thread for each row of each agent, a slice for each call, with its waits and its running inside.

    Events that are no part of a call are instants; what caused a call is an arrow to it.

    Returns:
        What `json.dump` makes a trace file of. Times are microseconds since the first event.
    """
    history = History(events)
    lanes = lay_out(history)
    found: list[dict[str, Any]] = [
        {"ph": "M", "pid": 1, "tid": 0, "name": "process_name", "args": {"name": "agentdiff"}}
    ]
    threads: dict[tuple[int, int], int] = {}
    for lane, (name, rows) in enumerate(lanes.lanes):
        for row in range(rows):
            thread = threads[lane, row] = len(threads) + 1
            shown = name if rows == 1 else f"{name} {row + 1}"
            for what, args in (("thread_name", {"name": shown}), ("thread_sort_index", {"sort_index": thread})):
                found.append({"ph": "M", "pid": 1, "tid": thread, "name": what, "args": args})

    def at(time: float) -> float:
        return round((time - history.begin) * 1e6, 3)

    for number, call in enumerate(history.calls):
        thread = threads[lanes.places[number]]
        common = {"pid": 1, "tid": thread}
        found.append(
            {
                **common,
                "ph": "B" if call.outcome == UNFINISHED else "X",
                "name": f"{call.agent}({call.label[:60]})",
                "cat": call.outcome,
                "ts": at(call.begin),
                **({} if call.outcome == UNFINISHED else {"dur": max(at(call.end) - at(call.begin), 0)}),
                **({"cname": "terrible"} if call.outcome == "failed" else {}),
                "args": _arguments(call, history),
            }
        )
        if call.outcome != UNFINISHED:
            waited = call.begin + call.after_wait
            for name, begin, end in (
                ("waits for " + ", ".join(call.after), call.begin, waited),
                ("waits for lock " + ", ".join(call.locks), waited, call.entered),
                ("runs", call.entered, call.end),
            ):
                if end - begin >= 1e-6:
                    dur = max(at(end) - at(begin), 0)
                    found.append({**common, "ph": "X", "name": name, "cat": "part", "ts": at(begin), "dur": dur})
        for cause, time, until in lanes.causes_of_call(number):
            arrow = {"cat": "cause", "name": "caused", "id": len(found), "pid": 1}
            found.append({**arrow, "ph": "s", "tid": threads[lanes.place(cause)], "ts": at(time)})
            found.append({**arrow, "ph": "f", "bp": "e", "tid": thread, "ts": at(until)})
    for number, event in enumerate(history.others):
        found.append(
            {
                "ph": "i",
                "s": "t",
                "pid": 1,
                "tid": threads[lanes.marks[number]],
                "name": event.name,
                "cat": "event",
                "ts": at(event.time),
                "args": {"data": event.data, "run": event.run_id, "id": event.id},
            }
        )
    return {"traceEvents": found, "displayTimeUnit": "ms", "otherData": {"began": history.begin}}


def _arguments(call: Call, history: History) -> dict[str, Any]:
    told = {
        "outcome": call.outcome,
        "run": call.run,
        "started": call.started.data if call.started is not None else None,
        "ended": call.ended.data if call.ended is not None else None,
    }
    inside, number = history.waited_for(call)
    if inside:
        told["waited for"] = f"{number} calls, the last {', '.join(f'{one.agent}({one.label})' for one in inside)}"
    return told
