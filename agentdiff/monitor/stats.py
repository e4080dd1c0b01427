"""Numbers: how often each agent was called, how it ended, how long it waited and ran; the busiest locks."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import Optional

import attrs

from ..events import Event
from .history import CANCELLED, FAILED, UNFINISHED, Call, History, seconds, short


@attrs.frozen(kw_only=True)
class AgentStats:
    """One agent in numbers; times in seconds, None where there is nothing to measure.

    Attributes:
        name: the agent's.
        calls: how many there were.
        failed: how many of them failed.
        cancelled: how many were cancelled.
        unfinished: of how many the end is not among the events.
        wait_p50: how long it waited, for locks and for agents that it comes after: half of the ended calls no longer.
        wait_p95: 95 % of them no longer.
        run_p50: how long its own code ran, likewise.
        run_p95: likewise.
    """

    name: str
    calls: int
    failed: int
    cancelled: int
    unfinished: int
    wait_p50: Optional[float]
    wait_p95: Optional[float]
    run_p50: Optional[float]
    run_p95: Optional[float]


@attrs.frozen(kw_only=True)
class LockStats:
    """One lock in numbers, as far as agents took it by `lock_name`.

    Attributes:
        name: the lock's.
        calls: how many took it.
        waited: how many waited for it.
        total_wait: for how many seconds they waited, together.
        longest_wait: for how many seconds the one that waited longest did.
        busy: for which part of the whole time somebody was inside, from 0 to 1.
    """

    name: str
    calls: int
    waited: int
    total_wait: float
    longest_wait: float
    busy: float


@attrs.frozen(kw_only=True)
class Stats:
    """What `stats` gives.

    Attributes:
        events: how many there were.
        seconds: from the first to the last moment.
        agents: by the number of calls, most first.
        locks: by the time waited for them, most first.
        story: the same in a few sentences.
    """

    events: int
    seconds: float
    agents: tuple[AgentStats, ...]
    locks: tuple[LockStats, ...]
    story: tuple[str, ...]

    def __str__(self) -> str:
        lines = [*self.story]
        if self.agents:
            head = ("agent", "calls", "failed", "cancelled", "unfinished", "wait p50", "p95", "run p50", "p95")
            rows = [
                (
                    short(one.name, 40),
                    *map(str, (one.calls, one.failed, one.cancelled, one.unfinished)),
                    *map(_seconds, (one.wait_p50, one.wait_p95, one.run_p50, one.run_p95)),
                )
                for one in self.agents
            ]
            lines += ["", *_table(head, rows)]
        if self.locks:
            titles = ("lock", "calls", "waited", "total wait", "longest", "busy")
            cells = [
                (
                    short(lock.name, 40),
                    *map(str, (lock.calls, lock.waited)),
                    seconds(lock.total_wait),
                    seconds(lock.longest_wait),
                    f"{lock.busy:.0%}",
                )
                for lock in self.locks
            ]
            lines += ["", *_table(titles, cells)]
        return "\n".join(lines)


def stats(events: Iterable[Event]) -> Stats:
    """Numbers about what happened."""
    events = list(events)
    history = History(events)
    by_agent: dict[str, list[Call]] = {}
    by_lock: dict[str, list[Call]] = {}
    for call in history.calls:
        by_agent.setdefault(call.agent, []).append(call)
        for lock in call.locks:
            by_lock.setdefault(lock, []).append(call)
    span = history.end - history.begin
    agents = [_agent(name, calls) for name, calls in by_agent.items()]
    locks = [_lock(name, calls, history.of_lock(name), span) for name, calls in by_lock.items()]
    return Stats(
        events=len(events),
        seconds=span,
        agents=tuple(sorted(agents, key=lambda one: -one.calls)),
        locks=tuple(sorted(locks, key=lambda one: (-one.total_wait, -one.busy))),
        story=tuple(history.story()),
    )


def _agent(name: str, calls: Sequence[Call]) -> AgentStats:
    ended = [call for call in calls if call.outcome != UNFINISHED]
    waits = sorted(call.entered - call.begin for call in ended)
    runs = sorted(call.running for call in ended)
    return AgentStats(
        name=name,
        calls=len(calls),
        failed=sum(call.outcome == FAILED for call in calls),
        cancelled=sum(call.outcome == CANCELLED for call in calls),
        unfinished=len(calls) - len(ended),
        wait_p50=_percentile(waits, 0.5),
        wait_p95=_percentile(waits, 0.95),
        run_p50=_percentile(runs, 0.5),
        run_p95=_percentile(runs, 0.95),
    )


def _lock(name: str, calls: Sequence[Call], inside: Sequence[Call], span: float) -> LockStats:
    busy, until = 0.0, -math.inf
    for call in inside:
        busy += max(call.end - max(call.entered, until), 0.0)
        until = max(until, call.end)
    return LockStats(
        name=name,
        calls=len(calls),
        waited=sum(call.waited for call in calls),
        total_wait=sum(call.lock_wait for call in calls),
        longest_wait=max(call.lock_wait for call in calls),
        busy=min(busy / span, 1.0) if span else 0.0,
    )


def _percentile(values: Sequence[float], part: float) -> Optional[float]:
    return values[math.ceil(part * len(values)) - 1] if values else None


def _seconds(number: Optional[float]) -> str:
    return "-" if number is None else seconds(number)


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    widths = [max(map(len, column)) for column in zip(head, *rows)]
    return [
        "  ".join([row[0].ljust(widths[0]), *(cell.rjust(width) for cell, width in zip(row[1:], widths[1:]))])
        for row in (head, *rows)
    ]
