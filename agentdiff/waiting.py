"""Waiting for events, for deliveries and for the end, and what goes on meanwhile (E15, E16).

A handler that waits lends what it holds up: its worker always, its lane where it waits for an event or a delivery.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from types import TracebackType
from typing import Any, Callable, Optional, Protocol

from ._clock import Clock, check_timeout, left_until
from ._lanes import Away, Delivery, Lane
from ._log import about, logger
from ._owner import Owner, current_owner, current_task_of, lent_worker, running_loop, task_loop, this_thread
from ._waitqueue import Bell, TaskBell, ThreadBell
from ._workers import Workers, look_whether_all_wait
from .deadlock import Graph, Hop, OtherWait, Party, Wait, at, named, where
from .errors import CoordinationTimeoutError
from .events import CAUSE, Event, as_regex, check_name

_HELP_EVERY = 0.02


class Expecting(Protocol):
    """The bus, as those who expect an event see it."""

    mutex: Any
    waits: Waits

    def expect(self, expected: Expected) -> None: ...

    def expect_no_more(self, expected: Expected) -> None: ...


class Expected:
    """What `coord.expect(name)` gives: the next event of this name, from the moment on when the block began (E15).

    >>> from agentdiff import Coordinator
    >>> with Coordinator() as coord:
    ...     with coord.expect("answer") as expected:
    ...         _ = coord.emit("answer", 42)
    ...         expected.wait(timeout=5).data
    42
    """

    __slots__ = ("_bells", "_bus", "_event", "_listens", "error", "matches", "name")

    def __init__(self, bus: Expecting, name: str) -> None:
        self.name: str = name
        self.error: Optional[BaseException] = None
        self._bus = bus
        self._bells: list[Bell] = []
        self._event: Optional[Event] = None
        self._listens = False
        self.matches: Callable[[str], Any] = re.compile(as_regex(check_name(name)), re.DOTALL).fullmatch

    def __repr__(self) -> str:
        return f"<Expected {self.name!r} {'has come' if self._event is not None else 'not yet'}>"

    @property
    def event(self) -> Optional[Event]:
        """The event, once it has been emitted."""
        return self._event

    def wait(self, timeout: Optional[float] = None) -> Event:
        """Block this thread until the event is emitted. In a handler, others go on meanwhile (E16).

        Args:
            timeout: seconds; None waits.

        Returns:
            The event.

        Raises:
            CoordinationTimeoutError: it did not come in time.
            ClosedError: the coordinator has been closed meanwhile.
            DeadlockError: nobody is left who could emit it: the process is ending (E6); or this is a handler, and could
                never go on in its place in the run's order (L5).
        """
        timeout = self._check(timeout)
        wait = self._bus.waits.for_event(self.name)
        self._bus.waits.sleep(self._add, self._drop, self._is_over, timeout, wait, lane_too=True)
        return self._outcome(timeout)

    async def wait_async(self, timeout: Optional[float] = None) -> Event:
        """`wait` on a loop, which goes on meanwhile (E15)."""
        timeout = self._check(timeout)
        bell = TaskBell()
        self._add(bell)
        try:
            if not self._is_over() and timeout != 0:
                wait = self._bus.waits.for_event(self.name)
                await self._bus.waits.sleep_async(bell, self._is_over, timeout, wait, lane_too=True)
        finally:
            self._drop(bell)
        return self._outcome(timeout)

    def _check(self, timeout: Optional[float]) -> Optional[float]:
        if not self._listens and not self._is_over():
            raise RuntimeError(f"event {self.name!r} is expected within the block of `with coord.expect(...)` only")
        return check_timeout(timeout)

    def _outcome(self, timeout: Optional[float]) -> Event:
        if self._event is not None:
            return self._event
        if self.error is not None:
            raise self.error
        raise CoordinationTimeoutError(
            f"no event {self.name!r} was emitted within {timeout:g} s", name=self.name, timeout=timeout
        )

    def _is_over(self) -> bool:
        return self._event is not None or self.error is not None

    def _add(self, bell: Bell) -> None:
        with self._bus.mutex:
            self._bells.append(bell)

    def _drop(self, bell: Bell) -> None:
        with self._bus.mutex:
            if bell in self._bells:
                self._bells.remove(bell)

    def offer(self, delivery: Delivery) -> bool:
        """An event has been emitted: is it the one?"""
        if self._event is None and self.matches(delivery.name):
            self._event = delivery.event
            return True
        return False

    def end(self, error: Optional[BaseException] = None) -> None:
        """Wake whoever waits."""
        if error is not None and self._event is None:
            self.error = error
        for bell in list(self._bells):
            bell.ring()

    def __enter__(self) -> Expected:
        self._bus.expect(self)
        self._listens = True
        return self

    def __exit__(
        self, kind: Optional[type[BaseException]], error: Optional[BaseException], trace: Optional[TracebackType]
    ) -> None:
        self._listens = False
        self._bus.expect_no_more(self)


class _Wait:
    """A handler's wait: whose, and whether it is over though the handler may not have noticed yet."""

    __slots__ = ("_deadline", "_done", "delivery", "owner")

    def __init__(self, delivery: Delivery, done: Callable[[], bool], deadline: Optional[float]) -> None:
        self.delivery: Delivery = delivery
        self.owner: Owner = current_owner()
        self._done = done
        self._deadline = deadline

    def is_over(self, now: float) -> bool:
        return self._done() or (self._deadline is not None and self._deadline <= now)


class Waits:
    """How threads and tasks of one coordinator wait, and which of its handlers do."""

    def __init__(self, clock: Clock, workers: Workers, graph: Graph, away: Collection[Away]) -> None:
        self._clock = clock
        self._workers = workers
        self._graph = graph
        self._away = away
        self._now: set[_Wait] = set()  # of handlers

    def __len__(self) -> int:
        return len(self._now)

    def forget(self) -> None:
        """Nobody waits."""
        self._now.clear()

    def is_work_left(self, live: Collection[Delivery]) -> bool:
        """Whether any of these deliveries has something to do but wait."""
        if len(live) > len(self._now):
            return True
        now = self._clock.monotonic()
        waits = Counter(wait.delivery for wait in list(self._now) if not wait.is_over(now))
        return any(waits[delivery] < delivery.at_work for delivery in list(live))

    def sleep(
        self,
        add: Callable[[Bell], None],
        drop: Callable[[Bell], None],
        done: Callable[[], bool],
        timeout: Optional[float],
        wait: Optional[OtherWait] = None,
        lane_too: bool = False,
    ) -> bool:
        """Block this thread until `done()`, or for `timeout` seconds; tell which. `add` and `drop` say whom to ring.

        A worker is lent meanwhile to others, and with `lane_too` the lane of the handler that waits here (E16).

        Raises:
            DeadlockError: this `wait` could never end (L5).
        """
        deadline = self._clock.deadline(timeout)
        handled = _delivery_here() if lane_too else None
        loop = running_loop()
        lane: Optional[Lane] = this_thread().lane if lane_too and loop is None else None
        warn_at: Optional[float] = None
        if wait is not None and loop is not None:
            wait.blocks = loop
            warn_at = self._clock.deadline(self._graph.warn_after(loop))
        while not done():
            now = self._clock.monotonic()
            if deadline is not None and deadline <= now:
                return False
            if wait is not None and warn_at is not None and warn_at <= now:
                warn_at = None
                _warn(wait)
            left = left_until(now, deadline, warn_at)
            bell = ThreadBell()
            add(bell)
            try:
                with _noted(handled, done, deadline), self._known(wait, bell, lane), _lent(lane):
                    if self._workers.short_of_threads:  # at the exit of the process: nobody else may be there to do it
                        self._workers.run_jobs()
                        look_whether_all_wait()
                        left = _HELP_EVERY if left is None else min(left, _HELP_EVERY)
                    if not done():
                        bell.sleep(self._clock, left)
            finally:
                drop(bell)
        return True

    async def sleep_async(
        self,
        bell: TaskBell,
        done: Callable[[], bool],
        timeout: Optional[float],
        wait: Optional[OtherWait] = None,
        lane_too: bool = False,
    ) -> None:
        """Let this task sleep until the bell is rung; its lane goes on meanwhile, if it is a handler's (E16)."""
        delivery = _delivery_here() if lane_too else None
        away = _away_here(delivery)
        lane = away.lane if away is not None else None
        with _noted(delivery, done, self._clock.deadline(timeout)), self._known(wait, bell, lane):
            if away is None or lane is None:
                await bell.sleep(self._clock, timeout)
                return
            away.loan = loan = lane.lend()
            try:
                await bell.sleep(self._clock, timeout)
            finally:
                if not loan.reclaimed:  # else this is a mere collection: the loop has been closed
                    await lane.take_back_async(loan)
                    away.loan = None

    # -- for whom (L5) ------------------------------------------------------------------------------------

    @contextmanager
    def _known(self, wait: Optional[OtherWait], bell: Bell, lane: Optional[Lane]) -> Iterator[None]:
        """While this wait lasts, for which the lane is lent, the graph knows of it; refused if it could never end."""
        if wait is None:
            yield
            return
        wait.bell = bell
        holder = None
        if lane is not None:
            holder, lane.holder = lane.holder, None  # before anybody can see the wait, and until nobody can any more
        try:
            self._graph.begin_wait(wait)
            try:
                yield
            finally:
                self._graph.end_wait(wait)
        finally:
            if lane is not None and (not isinstance(holder, Away) or holder.loan is None):  # else it never came back
                lane.holder = holder

    def for_delivery(self, delivery: Delivery) -> OtherWait:
        """A wait here for all handlers of this event."""

        def parties() -> list[Party]:
            if delivery.done:
                return []
            found: list[Party] = [wait.owner for wait in list(self._now) if wait.delivery is delivery]
            found += [away.party for away in list(self._away) if away.delivery is delivery]
            if delivery.lane is not None and not delivery.has_beside:  # else the lane may have gone on
                found += self._at_work_in(delivery.lane)
            return found

        return self._wait(delivery.name, f"event {delivery.name!r}", parties)

    def for_event(self, name: str) -> OtherWait:
        """A wait here for an event that anybody may emit."""
        return self._wait(name, f"event {name!r}", list)

    def for_all(self, lane: Optional[Lane], what: str) -> OtherWait:
        """A wait here for all that is pending, in a lane or in all of them."""

        def parties() -> list[Party]:
            if lane is not None:
                return self._at_work_in(lane)
            return [*list(self._workers.owners), *(away.party for away in list(self._away))]

        return self._wait("join", what, parties)

    @staticmethod
    def _at_work_in(lane: Lane) -> list[Party]:
        """Who must go on before the next event of this lane can be handled."""
        holder = lane.holder
        if holder is None:
            return []
        return [holder.party if isinstance(holder, Away) else holder]

    def _wait(self, name: str, what: str, parties: Callable[[], list[Party]]) -> OtherWait:
        me = current_owner()
        away = _away_here(_delivery_here())
        mine: Optional[Lane] = away.lane if away is not None else None if running_loop() else this_thread().lane

        def whom() -> Wait:
            found = [(party, what) for party in parties()]
            if mine is not None:  # it goes on when it has its lane back
                found += [(party, "its turn") for party in self._at_work_in(mine)]
            others = [(party, (f"{for_what}, held up by", "")) for party, for_what in found if party is not me]
            return Wait([Hop(me, other, None, None, why) for other, why in others])

        return OtherWait(me, name, what, whom, since=self._clock.monotonic())

    # -- which handlers wait --------------------------------------------------------------------------------

    def begin(self, wait: _Wait) -> None:
        """A handler waits."""
        self._now.add(wait)

    def end(self, wait: _Wait) -> None:
        """It goes on."""
        self._now.discard(wait)


@contextmanager
def _lent(lane: Optional[Lane]) -> Iterator[None]:
    """While this thread sleeps, others do its work, and what comes next in the lane."""
    with lent_worker():
        if lane is None:
            yield
            return
        me = this_thread()
        loan = lane.lend()
        me.lane = None  # what this thread may do meanwhile has nothing to do with it
        try:
            yield
        finally:
            me.lane = lane
            lane.take_back(loan)


def _warn(wait: OtherWait) -> None:
    logger.warning(
        "%s waits for %s and blocks its event loop meanwhile: use `await`, or `async with Coordinator()`%s",
        named(wait.owner),
        wait.what,
        at(where(wait.owner)),
        extra=about(),
    )


def _delivery_here() -> Optional[Delivery]:
    """The delivery whose handler is at work in this context, of whichever bus."""
    found = CAUSE.get()
    if found.__class__ is Delivery:
        delivery: Delivery = found
        return delivery
    return None


def _away_here(delivery: Optional[Delivery]) -> Optional[Away]:
    """The handler whose own task this is, on a loop."""
    if delivery is None:
        return None
    me = current_task_of(task_loop())
    return next((away for away in list(delivery.bus.away) if away.task is me), None)


@contextmanager
def _noted(delivery: Optional[Delivery], done: Callable[[], bool], deadline: Optional[float]) -> Iterator[None]:
    """While this wait lasts, those who look know that the handler waits."""
    if delivery is None:
        yield
        return
    wait = _Wait(delivery, done, deadline)
    waits = delivery.bus.waits  # perhaps not those of the coordinator whose event is waited for
    waits.begin(wait)
    try:
        yield
    finally:
        waits.end(wait)
