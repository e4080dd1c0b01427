"""What happened, made of events: each agent's calls, how long they waited and for whom, and all other events.

A call is its `_started` event and the one of its end whose parent that is. Data may be cut or strange, since they come
from a store: whatever doesn't look as expected is left out.
"""

from __future__ import annotations

import json
from bisect import bisect_left, bisect_right
from collections.abc import Iterable, Mapping
from typing import Any, Optional

import attrs

from ..events import Event

COMPLETE, FAILED, CANCELLED, UNFINISHED = "complete", "failed", "cancelled", "unfinished"
A_WAIT = 0.001
"""Seconds: what is shorter is not worth speaking of."""

_ENDS = (COMPLETE, FAILED, CANCELLED)


@attrs.frozen(kw_only=True, eq=False)
class Call:
    """One call of an agent.

    Attributes:
        agent: the agent's name.
        outcome: complete, failed, cancelled, or unfinished: its end is not among the events.
        begin: when it was called, in seconds since the epoch.
        end: when it ended; of an unfinished one, the time of the last event.
        after_wait: for how many seconds it waited for agents that it comes after.
        lock_wait: for how many seconds it waited for its locks, after that.
        locks: their names.
        after: the agents that it comes after.
        started: its first event; None where it is missing.
        ended: its last; None where it is missing.
    """

    agent: str
    outcome: str
    begin: float
    end: float
    after_wait: float
    lock_wait: float
    locks: tuple[str, ...]
    after: tuple[str, ...]
    started: Optional[Event]
    ended: Optional[Event]

    @property
    def entered(self) -> float:
        """When its own code began to run: all waits were over."""
        return min(self.begin + self.after_wait + self.lock_wait, self.end)

    @property
    def running(self) -> float:
        """For how many seconds its own code ran."""
        return self.end - self.entered

    @property
    def waited(self) -> bool:
        """Whether its wait for locks is worth speaking of."""
        return self.lock_wait >= A_WAIT

    @property
    def event(self) -> Event:
        """Its first event that there is."""
        found = self.started or self.ended
        assert found is not None
        return found

    @property
    def run(self) -> Optional[str]:
        """The id of its run."""
        return self.event.run_id

    @property
    def parent(self) -> Optional[str]:
        """The id of the event that caused it."""
        return self.started.parent_id if self.started is not None else None

    @property
    def error(self) -> str:
        """Its error in words; empty where there is none."""
        data = data_of(self.ended)
        words = ": ".join(str(data[key]) for key in ("error_type", "error") if data.get(key))
        return words if self.outcome in (FAILED, CANCELLED) else ""

    @property
    def label(self) -> str:
        """What it was called with, short: its first argument."""
        data = data_of(self.started)
        args, kwargs = data.get("args"), data.get("kwargs")
        values = list(args) if isinstance(args, (list, tuple)) else []
        values += list(kwargs.values()) if isinstance(kwargs, Mapping) else []
        return as_text(values[0]) if values else ""


class History:
    """Calls and other events, in order of time.

    Args:
        events: in any order.

    Attributes:
        calls: all calls, by when they began.
        others: all events that are no part of a call.
        begin: the first moment, in seconds since the epoch.
        end: the last one.
    """

    def __init__(self, events: Iterable[Event]) -> None:
        events = sorted(events, key=lambda event: event.time)
        started = {event.id: event for event in events if _is_part(event, "started")}
        last = max((event.time for event in events), default=0.0)
        calls, others, ended = [], [], set()
        for event in events:
            outcome = next((end for end in _ENDS if _is_part(event, end)), None)
            if outcome is not None:
                start = started.get(event.parent_id or "")
                if start is not None and (start.sender != event.sender or start.id in ended):
                    start = None
                if start is not None:
                    ended.add(start.id)
                calls.append(_call(outcome, start, event, event.time))
            elif event.id not in started:
                others.append(event)
        calls += [_call(UNFINISHED, event, None, last) for id, event in started.items() if id not in ended]
        calls.sort(key=lambda call: call.begin)
        self.calls: tuple[Call, ...] = tuple(calls)
        self.others: tuple[Event, ...] = tuple(others)
        self.begin: float = min([call.begin for call in calls[:1]] + [event.time for event in events[:1]], default=0.0)
        self.end = last
        self._inside: dict[str, list[Call]] = {}  # by lock, those who were inside, by when they entered
        for call in sorted(calls, key=lambda call: call.entered):
            for lock in call.locks:
                if call.running > 0:
                    self._inside.setdefault(lock, []).append(call)
        self._entries = {lock: [call.entered for call in inside] for lock, inside in self._inside.items()}
        self._exits = {lock: sorted(call.end for call in inside) for lock, inside in self._inside.items()}

    @property
    def agents(self) -> tuple[str, ...]:
        """The agents' names, by their first call."""
        return tuple(dict.fromkeys(call.agent for call in self.calls))

    @property
    def locks(self) -> tuple[str, ...]:
        """The names of all locks that calls took or waited for."""
        return tuple(dict.fromkeys(lock for call in self.calls for lock in call.locks))

    def of_lock(self, lock: str) -> tuple[Call, ...]:
        """Those who were inside."""
        return tuple(self._inside.get(lock, ()))

    def waited_for(self, call: Call, most: int = 3) -> tuple[tuple[Call, ...], int]:
        """Who was inside while a call waited: the last ones, and how many there were in all."""
        if not call.waited:
            return (), 0
        begin = call.begin + call.after_wait
        found: list[Call] = []
        number = 0
        for lock in call.locks:
            inside = self._inside.get(lock, [])
            place = bisect_left(self._entries.get(lock, []), call.entered)
            number += max(place - bisect_right(self._exits.get(lock, []), begin), 0)
            for other in reversed(inside[max(place - 10 * most, 0) : place]):
                if other is not call and other.end > begin and len(found) < most and other not in found:
                    found.append(other)
        return tuple(found), max(number, len(found))

    def story(self) -> list[str]:
        """What happened, in a few sentences."""
        if not self.calls:
            return [f"{len(self.others)} events, and no agent was called."]
        agents = self.agents
        who = ", ".join(agents[:4]) + (", ..." if len(agents) > 4 else "")
        told = [
            f"{_count(len(agents), 'agent')} ({who}) {'was' if len(agents) == 1 else 'were'} called "
            f"{_count(len(self.calls), 'time')} within {seconds(self.end - self.begin)}."
        ]
        for outcome, words in ((FAILED, "failed"), (CANCELLED, "cancelled"), (UNFINISHED, "not ended")):
            found = [call for call in self.calls if call.outcome == outcome]
            if found:
                first = next((call for call in found if not call.error.startswith("DependencyFailed")), found[0])
                why = f": {short(first.error, 160)}" if first.error else ""
                one = f"{first.agent}({short(first.label, 40)}){why}"
                told.append(f"{_count(len(found), 'call')} {words}{', first of all' if len(found) > 1 else ':'} {one}.")
        longest = max(self.calls, key=lambda call: call.lock_wait)
        if longest.waited:
            inside, number = self.waited_for(longest)
            behind = f", behind {_count(number, 'call')}, the last of {inside[0].agent}" if inside else ""
            total = sum(call.lock_wait for call in self.calls)
            told.append(
                f"Together the calls waited {seconds(total)} for locks; the longest wait was {longest.agent}"
                f"({short(longest.label, 40)})'s: {seconds(longest.lock_wait)} for {', '.join(longest.locks)}{behind}."
            )
        failed = sum(event.name == "handler_failed" for event in self.others)
        if failed:
            told.append(f"{_count(failed, 'handler')} raised an error.")
        return told


def _count(number: int, what: str) -> str:
    return f"{number} {what}{'' if number == 1 else 's'}"


def _is_part(event: Event, what: str) -> bool:
    return event.sender is not None and event.name == f"{event.sender}_{what}"


def _call(outcome: str, start: Optional[Event], end: Optional[Event], at: float) -> Call:
    first, last = data_of(start), data_of(end)
    event = start or end
    assert event is not None
    begin = start.time if start is not None else at - _number(last.get("duration"))
    duration = max(at - begin, 0.0)
    after_wait = min(_number(last.get("after_wait")), duration)
    return Call(
        agent=event.sender or "",
        outcome=outcome,
        begin=begin,
        end=begin + duration,
        after_wait=after_wait,
        lock_wait=min(_number(last.get("lock_wait")), duration - after_wait),
        locks=_names(last.get("lock", first.get("lock"))),
        after=_names(first.get("after")),
        started=start,
        ended=end,
    )


def data_of(event: Optional[Event]) -> Mapping[str, Any]:
    """Its data, if they are what an agent's event holds; else nothing."""
    return event.data if event is not None and isinstance(event.data, Mapping) else {}


def _number(value: object) -> float:
    return max(float(value), 0.0) if isinstance(value, (int, float)) and value == value else 0.0  # noqa: PLR0124  (NaN)


def _names(value: object) -> tuple[str, ...]:
    if isinstance(value, str):
        return (value,)
    return tuple(map(str, value)) if isinstance(value, (list, tuple)) else ()


def as_text(value: object) -> str:
    """A value as people read it: a string as it is, else JSON."""
    if isinstance(value, str):
        return value
    return json.dumps(value, ensure_ascii=False, default=repr)


def short(text: str, most: int) -> str:
    """A text on one line, cut where it is longer."""
    text = text[: 2 * most].replace("\n", " ")
    return text if len(text) <= most else text[: most - 1] + "…"


def seconds(number: float) -> str:
    """A time as people read it."""
    if number < 0.0995:
        return f"{number * 1000:.2g} ms" if number < 0.00995 else f"{number * 1000:.3g} ms"
    if number < 120:
        return f"{number:.3g} s"
    return f"{number / 60:.3g} min" if number < 7200 else f"{number / 3600:.3g} h"
