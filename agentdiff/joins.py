"""`all_of` and `any_of`: handlers that wait for several events (E13).

An `any_of` is a subscription with several names. An `all_of` is one too, and its handler of ours puts each event into
the first set of its run that lacks it; the one that fills a set goes on to the user's handler, in the lane of that
event. Sets that stay half full are shown, bounded in number, and told of when their time is over.
"""

from __future__ import annotations

import threading
from collections import OrderedDict, deque
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from operator import itemgetter
from typing import Any, Optional, Protocol, Union

import attrs

from ._clock import Clock
from ._lanes import Cause, Handler, Subscription, cause_here, name_of
from ._log import about, logger
from ._owner import lent_worker, this_thread
from ._workers import Workers
from .events import Event, check_name, is_pattern


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

    Args:
        names: at least one event's name.

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

    Args:
        names: at least one event's name.

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
        self,
        joins: Joins,
        names: AllOf,
        handler: Handler,
        *,
        is_async: bool,
        pass_event: bool,
        once: bool,
        timeout: Optional[float],
    ) -> None:
        if timeout == 0:
            raise ValueError(f"the timeout of {names} must not be 0: none of its sets would ever be full in time")
        self.names = names
        self.timeout = timeout
        self.subscription: Optional[Subscription] = None
        self.cancelled = False
        self._joins = joins
        self._handler = handler
        self._is_async = is_async
        self._pass_event = pass_event
        self._claim = threading.Lock() if once else None
        self.__qualname__ = name_of(handler)  # how failures name it

    def __call__(self, event: Event) -> Any:
        """An event has come; gives what the handler gives, if that fills a set."""
        full = self._joins.put(self, event)
        if full is None or (self._claim is not None and not self._claim.acquire(False)):
            return None
        found = ((name, full[name]) for name in self.names.names)
        argument = {name: event if self._pass_event else event.data for name, event in found}
        if self._is_async:
            return self._handle_async(argument)
        return self._handler(argument) if self._may_start() else None

    async def _handle_async(self, argument: dict[str, Any]) -> Any:
        """On the handler's loop, which may have taken its time."""
        return await self._handler(argument) if self._may_start() else None

    def _may_start(self) -> bool:
        """Asked right before the call: not cancelled (E10)."""
        if self.cancelled:
            return False
        if self._claim is not None and self.subscription is not None:
            self.subscription.cancel()
        return True


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
        self.dropped: int = 0
        self._clock = clock
        self._workers = workers
        self._teller = teller
        self._stopped = False
        self.begin()

    def begin(self) -> None:
        """Nothing has come yet."""
        self._mutex = threading.Lock()
        self._bell = threading.Lock()
        self._bell.acquire()
        self._sets: OrderedDict[_Set, None] = OrderedDict()  # the oldest first
        self._timed: dict[float, OrderedDict[_Set, None]] = {}  # those with a timeout, by that: the first is due first
        self._lines: dict[Join, dict[Optional[str], _Line]] = {}
        self._cancelled: deque[Join] = deque()  # whose sets are still there
        self._asleep_until: Optional[float] = None  # when whoever watches the time looks again; None: nobody does

    def put(self, join: Join, event: Event) -> Optional[dict[str, Event]]:
        """Put the event into its set; the set, if that is full now."""
        dropped: Optional[_Set] = None
        cause = cause_here()
        with self._inside():
            if join.cancelled or self._stopped:
                return None
            found = self._place(join, event, cause)
            found.events[event.name] = event
            full = len(found.events) == len(join.names.names)
            if full:
                self._remove(found)
            elif len(self._sets) > self.limit:
                dropped = next(iter(self._sets))
                self._remove(dropped)
                self.dropped += 1
            watched = self._asleep_until is not None
            due = None if full else found.due
            sooner = due is not None and (self._asleep_until is None or due < self._asleep_until)
            if sooner:
                self._asleep_until = due
        if sooner and watched:
            self._ring()
        elif sooner:
            self._workers.submit(self._watch)
        if dropped is not None:
            self._tell(dropped, f"there were more than {self.limit} unfinished sets")
        return found.events if full else None

    def _place(self, join: Join, event: Event, cause: Optional[Cause]) -> _Set:
        """The first set of the event's run that has none of this name."""
        lines = self._lines.setdefault(join, {})
        line = lines.get(event.run_id)
        if line is None:
            line = lines[event.run_id] = _Line(join.names.names)
        place = line.having[event.name]
        line.having[event.name] += 1
        if place < len(line.sets):
            return line.sets[place]
        made = _Set(join, event.run_id, self._clock.monotonic(), cause)
        line.sets.append(made)
        self._sets[made] = None
        if join.timeout is not None:
            self._timed.setdefault(join.timeout, OrderedDict())[made] = None
        return made

    def _remove(self, one: _Set) -> None:
        self._take_out(one)
        lines = self._lines[one.join]
        line = lines[one.run]
        line.remove(one)
        if not line.sets:
            del lines[one.run]
            if not lines:
                del self._lines[one.join]

    def _take_out(self, one: _Set) -> None:
        del self._sets[one]
        timeout = one.join.timeout
        if timeout is not None:
            del self._timed[timeout][one]
            if not self._timed[timeout]:
                del self._timed[timeout]

    def cancel(self, join: Join) -> None:
        """Its subscription has been cancelled: what it waits for is of no interest.

        A garbage collection may do that, amid any of what is done here: so it waits for nobody.
        """
        join.cancelled = True
        self._cancelled.append(join)
        self._tidy()
        self._ring()

    def clear(self) -> None:
        """Forget what has come."""
        with self._inside():
            self._forget_sets()
        self._ring()

    def stop(self) -> None:
        """Nothing is kept, and nobody is told of anything any more."""
        self._stopped = True
        self._tidy()
        self._ring()

    def _tidy(self) -> None:
        while (self._cancelled or (self._stopped and self._sets)) and self._mutex.acquire(False):
            try:
                self._forget_cancelled()
            finally:
                self._mutex.release()

    @contextmanager
    def _inside(self) -> Iterator[None]:
        """With the mutex. What others have cancelled meanwhile, who didn't wait for it, is forgotten afterwards."""
        with self._mutex:
            self._forget_cancelled()
            yield
        self._tidy()

    def _forget_cancelled(self) -> None:
        if self._stopped:
            self._forget_sets()
        while self._cancelled:
            for line in self._lines.pop(self._cancelled.popleft(), {}).values():
                for one in line.sets:
                    self._take_out(one)

    def _forget_sets(self) -> None:
        for kept in (self._sets, self._lines, self._timed):
            kept.clear()

    # -- time ---------------------------------------------------------------------------------------------

    def _ring(self) -> None:
        with suppress(RuntimeError):  # rung already
            self._bell.release()

    def _watch(self) -> None:
        """On a worker: sleep until the next set's time is over, as long as there is one."""
        lends_a_hand = this_thread().workers is not self._workers  # at exit, say, which nobody holds up
        while True:
            with self._inside():
                over = self._take_overdue(self._clock.monotonic())
                until = min((next(iter(sets)).due or 0.0 for sets in self._timed.values()), default=None)
                if lends_a_hand:
                    until = None
                self._asleep_until = until
            for one in over:
                self._tell(one, f"their time of {one.join.timeout:g} s is over")
            if until is None:
                return
            left = until - self._clock.monotonic()
            if left > 0:
                with lent_worker():
                    self._clock.wait(self._bell, left)

    def _take_overdue(self, now: float) -> list[_Set]:
        """The sets whose time is over, in the order of their ends."""
        over: list[tuple[float, _Set]] = []
        for sets in list(self._timed.values()):
            while sets:
                one = next(iter(sets))
                if one.due is None or one.due > now:
                    break
                self._remove(one)
                over.append((one.due, one))
        return [one for _, one in sorted(over, key=itemgetter(0))]

    def _tell(self, one: _Set, why: str) -> None:
        """A set will never be full. Whatever goes wrong with that stops nobody."""
        data = {
            "join": str(one.join.names),
            "run": one.run,
            "came": {name: event.data for name, event in one.events.items()},
            "missing": one.missing,
            "waited": self._clock.monotonic() - one.since,
            "reason": why,
            "timestamp": self._clock.time(),
        }
        came = ", ".join(map(repr, one.events))
        missing = ", ".join(map(repr, one.missing))
        where = f" in run {one.run!r}" if one.run is not None else ""
        try:
            self._teller.emit_lifecycle("join_timeout", data, str(one.join.names), one.cause, None)
            text = "%s%s: %s came, and %s did not; given up, because %s"
            logger.warning(
                text, one.join.names, where, came, missing, why, extra=about(event="join_timeout", run=one.run)
            )
        except Exception:  # a logging filter, say
            with suppress(Exception):
                logger.exception("that %s was given up could not be told", one.join.names, extra=about(run=one.run))

    # -- looking ------------------------------------------------------------------------------------------

    def snapshot(self) -> tuple[JoinInfo, ...]:
        """The sets that are not full, the oldest first."""
        with self._inside():
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
