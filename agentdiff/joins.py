"""`all_of` and `any_of`: handlers that wait for several events (E13).

An `any_of` is a subscription with several names. An `all_of` is one too, and its handler of ours puts each event into
the first set of its run that lacks it; the one that fills a set goes on to the user's handler, in the lane of that
event. Sets that stay half full are shown, bounded in number, and told of when their time is over.
"""

from __future__ import annotations

import logging
import threading
from collections import OrderedDict
from contextlib import suppress
from typing import Any, Optional, Protocol, Union

import attrs

from ._clock import Clock
from ._lanes import Cause, Handler, Subscription, cause_here
from ._owner import lent_worker
from ._workers import Workers
from .events import Event, check_name, is_pattern

logger = logging.getLogger("agentdiff")


@attrs.frozen
class AnyOf:
    """What `any_of` gives."""

    names: tuple[str, ...]


@attrs.frozen
class AllOf:
    """What `all_of` gives."""

    names: tuple[str, ...]

    def __str__(self) -> str:
        return f"all_of({', '.join(map(repr, self.names))})"


Names = Union[str, AnyOf, AllOf]


def any_of(*names: str) -> AnyOf:
    """For `on`: the handler is called for each event of any of these names, or patterns (E13).

    Raises:
        TypeError, ValueError: no names, or what is none.
    """
    return AnyOf(_checked("any_of", names))


def all_of(*names: str) -> AllOf:
    """For `on`: the handler is called once for each full set of these events within a run (E13).

    It takes a dict from event name to data. The first event of one name goes with the first of the other, and so on;
    those outside any run make up sets among themselves.

    >>> from agentdiff import Coordinator, all_of
    >>> with Coordinator() as coord:
    ...     sub = coord.on(all_of("facts", "style"), lambda data: print(data["facts"], "in", data["style"]))
    ...     with coord.run("report-1"):
    ...         _ = coord.emit("style", "prose")
    ...         _ = coord.emit("facts", "bees")
    bees in prose

    Raises:
        TypeError, ValueError: no names, what is none, or a pattern: which of its events would it wait for?
    """
    for name in _checked("all_of", names):
        if is_pattern(name):
            raise ValueError(f"all_of takes no patterns, and {name!r} is one: name each event that is to come")
    return AllOf(_checked("all_of", names))


def _checked(what: str, names: tuple[str, ...]) -> tuple[str, ...]:
    if not names:
        raise ValueError(f"{what} needs the names of events")
    return tuple(OrderedDict.fromkeys(map(check_name, names)))


@attrs.frozen(kw_only=True)
class JoinInfo:
    """A set of events that is not full yet, as a snapshot shows it (E13, L11).

    Attributes:
        join: what it waits for in all, in words.
        run: the id of its run; None outside of any.
        came: the names of the events that have come.
        missing: those of the others.
        waiting_for: for how many seconds it has waited since the first came.
    """

    join: str
    run: Optional[str]
    came: tuple[str, ...]
    missing: tuple[str, ...]
    waiting_for: float


class _Set:
    """One set: what has come, and since when it has been waiting."""

    __slots__ = ("cause", "due", "events", "join", "run", "since")

    def __init__(self, join: Join, run: Optional[str], since: float, cause: Optional[Cause]) -> None:
        self.join = join
        self.run = run
        self.since = since
        self.due = None if join.timeout is None else since + join.timeout
        self.cause = cause  # so that what is told of it belongs to its run
        self.events: dict[str, Event] = {}

    @property
    def missing(self) -> tuple[str, ...]:
        return tuple(name for name in self.join.names.names if name not in self.events)


class _Line:
    """The unfinished sets of one join in one run, the oldest first: they are filled, and given up, in this order."""

    __slots__ = ("having", "sets")

    def __init__(self, names: tuple[str, ...]) -> None:
        self.sets: list[_Set] = []
        self.having = dict.fromkeys(names, 0)  # how many of the sets, from the first on, have an event of this name

    def remove(self, one: _Set) -> None:
        self.sets.remove(one)
        for name in one.events:
            self.having[name] -= 1


class Join:
    """One `on(all_of(...))`: sorts events into sets, and calls the handler for each full one."""

    def __init__(
        self, joins: Joins, names: AllOf, handler: Handler, *, pass_event: bool, once: bool, timeout: Optional[float]
    ) -> None:
        self.names = names
        self.timeout = timeout
        self.subscription: Optional[Subscription] = None
        self._joins = joins
        self._handler = handler
        self._pass_event = pass_event
        self._claim = threading.Lock() if once else None
        self.__qualname__ = getattr(handler, "__qualname__", str(names))  # how failures name it

    def __call__(self, event: Event) -> Any:
        """An event has come; gives what the handler gives, if that fills a set."""
        full = self._joins.put(self, event)
        if full is None:
            return None
        if self._claim is not None:
            if not self._claim.acquire(False):
                return None
            if self.subscription is not None:
                self.subscription.cancel()
        found = ((name, full[name]) for name in self.names.names)
        return self._handler({name: event if self._pass_event else event.data for name, event in found})


class Teller(Protocol):
    """Emits for others, and never fails."""

    def emit_lifecycle(self, name: str, data: Any, sender: str, cause: Optional[Cause], lane: Any) -> Any: ...


class Joins:
    """All half-full sets of one coordinator.

    Args:
        limit: how many there may be; beyond that the oldest is dropped.
    """

    def __init__(self, clock: Clock, workers: Workers, teller: Teller, limit: int) -> None:
        self.limit = limit
        self.dropped = 0
        self._clock = clock
        self._workers = workers
        self._teller = teller
        self.begin()

    def begin(self) -> None:
        """Nothing has come yet."""
        self._mutex = threading.Lock()
        self._bell = threading.Lock()
        self._bell.acquire()
        self._sets: OrderedDict[_Set, None] = OrderedDict()  # the oldest first
        self._lines: dict[tuple[Join, Optional[str]], _Line] = {}
        self._asleep_until: Optional[float] = None  # when whoever watches the time looks again; None: nobody does

    def put(self, join: Join, event: Event) -> Optional[dict[str, Event]]:
        """Put the event into its set; the set, if that is full now."""
        dropped: Optional[_Set] = None
        cause = cause_here()
        with self._mutex:
            key = (join, event.run_id)
            line = self._lines.get(key)
            if line is None:
                line = self._lines[key] = _Line(join.names.names)
            place = line.having[event.name]
            line.having[event.name] += 1
            if place < len(line.sets):
                found = line.sets[place]
            else:
                found = _Set(join, event.run_id, self._clock.monotonic(), cause)
                line.sets.append(found)
                self._sets[found] = None
            found.events[event.name] = event
            full = not found.missing
            if full:
                self._remove(found)
            elif len(self._sets) > self.limit:
                dropped = next(iter(self._sets))
                self._remove(dropped)
                self.dropped += 1
            watched = self._asleep_until is not None
            due = found.due if found in self._sets else None
            sooner = due is not None and (self._asleep_until is None or due < self._asleep_until)
            if sooner:
                self._asleep_until = due
        if dropped is not None:
            self._tell(dropped, f"there were more than {self.limit} unfinished sets")
        if sooner and watched:
            self._ring()
        elif sooner:
            self._workers.submit(self._watch)
        return found.events if full else None

    def _remove(self, one: _Set) -> None:
        del self._sets[one]
        line = self._lines[one.join, one.run]
        line.remove(one)
        if not line.sets:
            del self._lines[one.join, one.run]

    def cancel(self, join: Join) -> None:
        """Its subscription has been cancelled: what it waits for is of no interest."""
        with self._mutex:
            for one in [one for one in self._sets if one.join is join]:
                self._remove(one)
        self._ring()

    # -- time ---------------------------------------------------------------------------------------------

    def _ring(self) -> None:
        with suppress(RuntimeError):  # rung already
            self._bell.release()

    def _watch(self) -> None:
        """On a worker: sleep until the next set's time is over, as long as there is one."""
        while True:
            with self._mutex:
                now = self._clock.monotonic()
                timed = [(one.due, one) for one in self._sets if one.due is not None]
                over = [one for due, one in timed if due <= now]
                for one in over:
                    self._remove(one)
                self._asleep_until = until = min((due for due, _ in timed if due > now), default=None)
            for one in over:
                self._tell(one, f"their time of {one.join.timeout:g} s is over")
            if until is None:
                return
            with lent_worker():
                self._clock.wait(self._bell, until - now)

    def _tell(self, one: _Set, why: str) -> None:
        """A set will never be full."""
        came = ", ".join(map(repr, one.events))
        missing = ", ".join(map(repr, one.missing))
        where = f" in run {one.run!r}" if one.run is not None else ""
        logger.warning("%s%s: %s came, and %s did not; given up, because %s", one.join.names, where, came, missing, why)
        data = {
            "join": str(one.join.names),
            "run": one.run,
            "came": {name: event.data for name, event in one.events.items()},
            "missing": one.missing,
            "waited": self._clock.monotonic() - one.since,
            "reason": why,
            "timestamp": self._clock.time(),
        }
        self._teller.emit_lifecycle("join_timeout", data, str(one.join.names), one.cause, None)

    def stop(self) -> None:
        """Nobody is told of anything any more."""
        with self._mutex:
            self._sets.clear()
            self._lines.clear()
        self._ring()

    # -- looking ------------------------------------------------------------------------------------------

    def snapshot(self) -> tuple[JoinInfo, ...]:
        """The sets that are not full, the oldest first."""
        with self._mutex:
            now = self._clock.monotonic()
            return tuple(
                JoinInfo(
                    join=str(one.join.names),
                    run=one.run,
                    came=tuple(one.events),
                    missing=one.missing,
                    waiting_for=now - one.since,
                )
                for one in self._sets
            )
