"""Where calls and events are drawn: a lane for each agent, a row for each call that overlaps; and what caused what."""

from __future__ import annotations

from heapq import heappop, heappush
from typing import Optional

from .history import A_WAIT, UNFINISHED, History

OTHERS = "other events"
BROKEN = "failed handlers"


class Lanes:
    """Places for all of a history.

    A thing is a call's number, or for another event -1 minus its number.

    Attributes:
        lanes: name and number of rows, in order.
        places: lane and row of each call.
        marks: lane and row of each other event.
    """

    def __init__(self, history: History) -> None:
        self.history = history
        self.lanes: list[tuple[str, int]] = []
        self.places: list[tuple[int, int]] = []
        self.marks: list[tuple[int, int]] = []
        self.sources: dict[str, tuple[int, float]] = {}  # by event's id: what it belongs to, and when it was
        self._ends: dict[tuple[Optional[str], str], list[tuple[float, int]]] = {}  # by run and agent

    def place(self, thing: int) -> tuple[int, int]:
        """Lane and row of a call or other event."""
        return self.places[thing] if thing >= 0 else self.marks[-1 - thing]

    def causes_of_call(self, number: int) -> list[tuple[int, float, float]]:
        """What a call was caused by, or came after: each with the times from which and to which that led."""
        call = self.history.calls[number]
        found = [(*self.sources[call.parent], call.begin)] if call.parent in self.sources else []
        ready = call.begin + call.after_wait
        for agent in call.after:
            before = [end for end in self._ends.get((call.run, agent), ()) if end[0] <= ready + A_WAIT]
            if before:
                found.append((before[-1][1], before[-1][0], ready))
        return found

    def causes_of_mark(self, number: int) -> list[tuple[int, float, float]]:
        """What another event was caused by."""
        event = self.history.others[number]
        return [(*self.sources[event.parent_id], event.time)] if event.parent_id in self.sources else []


def lay_out(history: History) -> Lanes:
    """Give everything its place."""
    found = Lanes(history)
    names = {agent: number for number, agent in enumerate(history.agents)}
    rows = dict.fromkeys(names.values(), 0)
    free: dict[int, list[int]] = {lane: [] for lane in rows}
    busy: dict[int, list[tuple[float, int]]] = {lane: [] for lane in rows}
    for number, call in enumerate(history.calls):
        lane = names[call.agent]
        while busy[lane] and busy[lane][0][0] <= call.begin:
            heappush(free[lane], heappop(busy[lane])[1])
        if not free[lane]:
            free[lane].append(rows[lane])
            rows[lane] += 1
        row = heappop(free[lane])
        heappush(busy[lane], (float("inf") if call.outcome == UNFINISHED else call.end, row))
        found.places.append((lane, row))
        if call.started is not None:
            found.sources[call.started.id] = (number, call.begin)
        if call.ended is not None:
            found.sources[call.ended.id] = (number, call.end)
            found._ends.setdefault((call.run, call.agent), []).append((call.end, number))
    for ends in found._ends.values():
        ends.sort()
    lanes = {**{name: rows[lane] for name, lane in names.items()}}
    found.lanes = list(lanes.items())
    extra: dict[str, int] = {}
    for number, event in enumerate(history.others):
        source = found.sources.get(event.parent_id or "")
        if event.name != "handler_failed" and source is not None and _is_within(history, source, event.time):
            found.marks.append(found.places[source[0]])
        else:
            name = BROKEN if event.name == "handler_failed" else OTHERS
            if name not in extra:
                extra[name] = len(found.lanes)
                found.lanes.append((name, 1))
            found.marks.append((extra[name], 0))
        found.sources[event.id] = (-1 - number, event.time)
    return found


def _is_within(history: History, source: tuple[int, float], time: float) -> bool:
    """Whether an event came while the call that caused it was going on."""
    return source[0] >= 0 and source[1] < history.calls[source[0]].end and time <= history.calls[source[0]].end
