"""The event bus: who listens to what, what `emit` does, how handlers are called, and who waits for them.

`emit` takes no mutex and waits for nobody (E4): it looks the route up, puts a delivery at the end of its lane, and
has a worker come if none is on its way. How lanes keep their order is told in `_lanes.py`.
"""

from __future__ import annotations

import inspect
import os
import re
import threading
import traceback
from asyncio import AbstractEventLoop, Task
from collections.abc import Sequence
from contextlib import suppress
from contextvars import Context
from itertools import count
from types import CoroutineType, TracebackType
from typing import Any, Callable, Optional, Union
from weakref import WeakKeyDictionary, WeakValueDictionary

from ._clock import Clock
from ._flow import BEGUN, NOTHING, Emit, keeping, make_deliver, make_emit
from ._lanes import (
    Away,
    Cause,
    Delivery,
    Handler,
    Lane,
    Route,
    Subscription,
    cause_here,
    name_of,
)
from ._log import about, logger
from ._owner import GeneratorOwner, ThreadOwner, current_owner, running_loop, this_thread
from ._waitqueue import Bell, TaskBell
from ._workers import OwnLoop, Workers, drain_at_exit
from .deadlock import Graph, OtherWait
from .errors import (
    CascadeError,
    ClosedError,
    CoordinationTimeoutError,
    DeadlockError,
    LoopClosedError,
    QueueFullError,
    text_of,
)
from .events import CAUSE, Event, Run, as_regex, check_name, is_pattern
from .joins import AllOf, Join, Joins
from .waiting import Expected, Waits

_ROUTES_KEPT = 4096
_NAMES_SHOWN = 12


class Bus:
    """All subscriptions and events of one coordinator."""

    def __init__(
        self,
        clock: Clock,
        *,
        workers: Workers,
        loop: OwnLoop,
        graph: Graph,
        max_pending: int,
        max_depth: int,
        max_joins: int,
        exit_timeout: Optional[float],
    ) -> None:
        self.clock = clock
        self.max_pending: int = max_pending
        self.max_depth = max_depth
        self.exit_timeout = exit_timeout
        self.workers = workers
        self.workers.watch = self._watch_loops
        self.loop = loop
        self.joins: Joins = Joins(clock, self.workers, self, max_joins)
        self.mutex: Any = threading.RLock()  # for what is rare; re-entrant, since a collected generator emits (A1)
        self.version: int = 0  # raised whenever somebody may have begun or ceased to listen
        self.closed: bool = False
        self.abandoned: bool = False  # what is queued will not be delivered
        self.odd: list[str] = []  # why a delivery is looked at before it is handled
        self.begun: int = 0  # of those that were looked at, how many were handled
        self.failed: int = 0  # handlers that raised
        self.refused: int = 0  # lifecycle events that could not be queued
        self.away: set[Away] = set()
        self.bells: dict[Delivery, list[Bell]] = {}  # of those who wait for a delivery
        self.beside: dict[Delivery, int] = {}  # how many handlers run beside the others
        self._exact: dict[str, list[Subscription]] = {}
        self._patterns: list[tuple[re.Pattern[str], Subscription]] = []
        self._any_pattern: Optional[re.Pattern[str]] = None
        self.routes: dict[str, Route] = {}
        self._expected: list[Expected] = []
        self._order = count()
        self._runs: WeakValueDictionary[str, Lane] = WeakValueDictionary()
        self.live: set[Delivery] = set()  # queued, or being handled
        self.graph = graph
        self.waits: Waits = Waits(clock, workers, graph, self.away)
        self.open_blocks: dict[str, int] = {}  # how many `run` blocks are open, by run
        self.end_of_run: Callable[[str], None] = _ignore  # told whenever something of a run has ended
        self.keep: Optional[Callable[[Delivery], None]] = None  # takes every event, for a store
        self.parameters: dict[str, set[tuple[str, ...]]] = {}  # of agents, by the name of their `_started` event
        self._begin()

    def _begin(self) -> None:
        """Nothing has been emitted yet."""
        self._prefix = os.urandom(5).hex() + "-"
        self._numbers = count()
        self.beside.clear()
        self.live.clear()
        self.waits.forget()
        self._joiners: list[Bell] = []
        self.outside: threading.local = threading.local()
        self._outside_tasks: WeakKeyDictionary[Task[Any], Lane] = WeakKeyDictionary()
        self.emit: Emit
        self.emit_in: Emit
        self._make_emit()
        self.deliver: Callable[..., int] = make_deliver(self)

    def _make_emit(self) -> None:
        self.emit, self.emit_in = make_emit(self, self.outside)
        if self.keep is not None:
            self.emit, self.emit_in = keeping(self.emit, self.emit_in, self.keep)

    def give_to(self, keep: Optional[Callable[[Delivery], None]]) -> None:
        """From now on every event goes there too, whether anybody listens or not (S1)."""
        with self.mutex:
            self.keep = keep
            self._make_emit()
            self.version += 1
        if keep is not None:
            drain_at_exit(self)

    def pending_names(self) -> list[str]:
        """The names of events that are queued or being delivered."""
        return sorted({delivery.name for delivery in list(self.live)})

    def forget_work(self) -> None:
        """What is queued will not be handled, and nobody is told of anything that has been."""
        with self.mutex:
            for lane in {delivery.lane for delivery in self.live}:
                lane.queue.clear()
            self.live.clear()
            self._expected.clear()
        self.joins.clear()

    def forget(self) -> None:
        """After a fork: the subscriptions are there, and nothing else (L13)."""
        self.mutex = threading.RLock()
        self.away.clear()
        self.bells.clear()
        self._expected.clear()
        self.joins.begin()
        self.workers.forget()
        self.loop.forget()
        me = this_thread()
        here: Optional[Lane] = me.lane  # this thread may be in a handler, or in a run
        for lane in list(self._runs.values()):
            if lane is not here:
                lane.begin()
        if here is not None:
            here.forget()
        me.lane = me.workers = None
        self._begin()

    # -- subscribing ------------------------------------------------------------------------------------

    def subscribe(
        self,
        names: Sequence[str],
        handler: Handler,
        *,
        loop: Optional[AbstractEventLoop],
        pass_event: bool,
        concurrent: bool,
        once: bool,
        is_async: Optional[bool] = None,
    ) -> Subscription:
        """Call `handler` for each event of these names from now on (E1, E8, E9, E10)."""
        for name in names:
            check_name(name)
        if is_async is None:
            is_async = check_handler(handler)
        if is_async and loop is None:
            loop = running_loop()
        with self.mutex:
            self._refuse_if_closed()
            sub = Subscription(self, names, handler, next(self._order), loop, is_async, pass_event, concurrent, once)
            for name in names:
                if is_pattern(name):
                    self._patterns.append((re.compile(as_regex(name), re.DOTALL), sub))
                else:
                    self._exact.setdefault(name, []).append(sub)
                self._reroute(name)
        if is_async and loop is None:
            self.loop.get()  # now, since at the exit of the process no thread may be startable any more
        drain_at_exit(self)
        return sub

    def subscribe_all(
        self,
        names: AllOf,
        handler: Handler,
        *,
        loop: Optional[AbstractEventLoop],
        pass_event: bool,
        once: bool,
        timeout: Optional[float],
    ) -> Subscription:
        """Call `handler` for each full set of these events within a run (E13)."""
        is_async = check_handler(handler)
        if is_async and loop is None:
            loop = running_loop()
            if loop is None:
                self.loop.get()  # now: see `subscribe`
        join = Join(self.joins, names, handler, is_async=is_async, pass_event=pass_event, once=once, timeout=timeout)
        with self.mutex:  # so that no event comes before the join knows its subscription
            join.subscription = self.subscribe(
                names.names, join, loop=loop, pass_event=True, concurrent=False, once=False, is_async=False
            )
        return join.subscription

    def unsubscribe(self, sub: Subscription) -> None:
        """No further call of `sub` is started (E10)."""
        with self.mutex:
            if not sub.switch_off():
                return
            if isinstance(sub.handler, Join):
                self.joins.cancel(sub.handler)
            self._patterns = [(regex, other) for regex, other in self._patterns if other is not sub]
            for name in sub.names:
                left = [other for other in self._exact.pop(name, ()) if other is not sub]
                if left:
                    self._exact[name] = left
                self._reroute(name)

    def subscriptions(self) -> set[Subscription]:
        """All that are not cancelled."""
        with self.mutex:
            return {sub for _, sub in self._patterns}.union(*self._exact.values())

    def _reroute(self, name: str) -> None:
        if is_pattern(name):
            regexes = [regex.pattern for regex, _ in self._patterns]
            self._any_pattern = re.compile("|".join(f"(?:{r})" for r in regexes), re.DOTALL) if regexes else None
            self.routes.clear()
        else:
            self.routes.pop(name, None)
        self.version += 1

    def find_route(self, name: str) -> Route:
        """Who listens to `name`, in registration order; remembered, so that others' subscriptions cost nothing (E9)."""
        check_name(name)
        found = self.routes.get(name)
        if found is not None:
            return found
        with self.mutex:
            self._refuse_if_closed()
            subs = list(self._exact.get(name, ()))
            if self._any_pattern is not None and self._any_pattern.fullmatch(name):
                subs += [sub for regex, sub in self._patterns if regex.fullmatch(name) and sub not in subs]
                subs.sort(key=lambda sub: sub.order)
            route = Route(self, name, tuple(subs))
            if len(self.routes) >= _ROUTES_KEPT:
                self.routes.clear()
            if not self._expected:  # else each event is to be told of
                self.routes[name] = route
            return route

    def hears(self, name: str) -> bool:
        """Whether an event of this name would reach anybody."""
        if self.keep is not None:
            return not self.closed
        try:
            return self.find_route(name).heard or self._is_expected(name)
        except ClosedError:
            return False

    def be_noticed(self, named: set[str], agents: Sequence[str]) -> None:
        """From now on the ends of these agents are of interest, whoever listens (A5)."""
        with self.mutex:
            named.update(agents)
            self.version += 1

    # -- expecting (E15) --------------------------------------------------------------------------------

    def expect(self, expected: Expected) -> None:
        """Tell `expected` of the next event of its name, ahead of the handlers."""
        with self.mutex:
            self._refuse_if_closed()
            self._expected.append(expected)
            self.routes.clear()
            self.version += 1

    def expect_no_more(self, expected: Expected) -> None:
        """It has come, or is not wanted any more."""
        with self.mutex:
            if expected in self._expected:
                self._expected.remove(expected)
                self.version += 1

    def _is_expected(self, name: str) -> bool:
        with self.mutex:
            return any(expected.matches(name) for expected in self._expected)

    def tell_expecting(self, delivery: Delivery) -> None:
        """An event has been emitted: those who wait for it go on."""
        if not self._expected:
            return
        with self.mutex:
            found = [expected for expected in self._expected if expected.offer(delivery)]
            for expected in found:
                self._expected.remove(expected)
                self.version += 1
        for expected in found:
            expected.end()

    # -- emitting ---------------------------------------------------------------------------------------

    def make_room(self, delivery: Delivery) -> None:
        """There are too many with this one: it is refused, unless somebody else's has been meanwhile (E5)."""
        with self.mutex:
            if len(self.live) <= self.max_pending:
                return
            self.live.discard(delivery)
            pending = len(self.live)
        self.look_for_idle()
        raise QueueFullError(
            f"event {delivery.name!r} was refused: {pending} events are pending, and max_pending is "
            f"{self.max_pending}; handlers are slower than emitters",
            name=delivery.name,
            pending=pending,
            max_pending=self.max_pending,
        )

    def _refuse_depth(self, name: str, cause: Cause) -> None:
        """Handlers have caused one another too often (E11): say which."""
        names = [name]
        at: Optional[Cause] = cause
        while at is not None and len(names) < self.max_depth + 2:
            if at.handled:
                names.append(at.name)
            at = at.outer
        again = names.index(name, 1) + 1 if name in names[1:] else min(len(names), _NAMES_SHOWN)
        loop = tuple(reversed(names[:again]))
        raise CascadeError(
            f"event {name!r} was refused: {cause.depth} handlers have caused one another, and max_depth is "
            f"{self.max_depth}: {' -> '.join(loop)}",
            name=name,
            depth=cause.depth,
            loop=loop,
        )

    def repair(self, delivery: Delivery) -> None:
        """`emit` was interrupted somewhere on its way: have the event delivered, if it was counted already.

        It may be queued for the second time, and the worker come for the second time; neither does harm.
        """
        lane = delivery.lane
        if delivery in self.live:
            self.odd.append("some may be queued twice")
            lane.queue.append(delivery)
        lane.scheduled = True
        self.workers.submit(lane.run)

    def skips(self, delivery: Delivery) -> bool:
        """Whether a delivery that comes from its lane is not to be handled."""
        if delivery.outcomes is not None:
            return True  # it has begun already
        if self.abandoned:
            error = ClosedError(f"event {delivery.name!r} was abandoned: its coordinator has quit")
            delivery.outcomes = [(0, None, error)]
            self.finish(delivery)
            return True
        with self.mutex:
            self.begun += 1
        return False

    def own_cause(self, cause: Any) -> Optional[Cause]:
        """The nearest cause of this bus: coordinators share nothing, though they may share a context."""
        if cause.__class__ is Delivery:
            cause = cause.as_cause()
        while cause is not None and cause.bus is not self:
            cause = cause.outer
        found: Optional[Cause] = cause
        return found

    def lane_for(self, name: str, cause: Optional[Cause], lane: Optional[Lane] = None) -> Lane:
        """Into which lane an event goes that has this cause; refuses what would make the cascade too deep (E11)."""
        if cause is not None and cause.depth >= self.max_depth and name != "handler_failed":
            self._refuse_depth(name, cause)
        return lane or self.lane_of(cause)

    def lane_of(self, cause: Optional[Cause]) -> Lane:
        """The lane where no run is named: that of the event being handled, else the thread's or task's own (E2)."""
        while cause is not None:
            if cause.lane is not None:
                return cause.lane
            if cause.handled:
                with self.mutex:
                    if cause.lane is None:
                        cause.lane = self._run_lane(self._id_of(cause.number))
                    return cause.lane
            cause = self.own_cause(cause.outer)
        owner = current_owner()
        if isinstance(owner, ThreadOwner):
            try:
                lane: Lane = self.outside.lane
            except AttributeError:
                lane = self.outside.lane = Lane(self, None)
            return lane
        assert not isinstance(owner, GeneratorOwner)
        with self.mutex:
            found = self._outside_tasks.get(owner)
            if found is None:
                found = self._outside_tasks[owner] = Lane(self, None)
            return found

    def _run_lane(self, run_id: str) -> Lane:
        lane = self._runs.get(run_id)
        if lane is None:
            lane = self._runs[run_id] = Lane(self, run_id)
        return lane

    def number_of(self, delivery: Delivery) -> int:
        """Give an event its number, if it has none yet."""
        with self.mutex:  # several may ask at once: a handler, and the writer of a store
            if delivery.serial is None:
                delivery.serial = next(self._numbers)
            return delivery.serial

    def event_of(self, delivery: Delivery) -> Event:
        """The event as others see it, made when somebody looks."""
        event_id, run_id, parent_id = self.ids_of(delivery)
        return Event(
            name=delivery.name,
            data=delivery.data,
            sender=delivery.sender,
            id=event_id,
            time=delivery.time,
            run_id=run_id,
            parent_id=parent_id,
        )

    def ids_of(self, delivery: Delivery) -> tuple[str, Optional[str], Optional[str]]:
        """The id of an event, of its run, and of its parent."""
        event_id = self._id_of(self.number_of(delivery) if delivery.serial is None else delivery.serial)
        lane = delivery.lane if delivery.route.heard else None
        cause = None if delivery.details is None else delivery.details.outer
        if cause is None:
            return event_id, None if lane is None else lane.run_id, None
        run_id = (lane or self.lane_of(cause)).run_id
        while cause is not None and cause.number is None:
            cause = cause.outer
        return event_id, run_id, None if cause is None else self._id_of(cause.number)

    # -- runs and agents' calls: causes that users open ---------------------------------------------------

    def new_run_id(self) -> str:
        """An id that no run has yet."""
        return f"{self._prefix}run-{next(self._order):x}"

    def _id_of(self, number: Optional[int]) -> str:
        """An event's number as others see it: unique beyond this process."""
        return f"{self._prefix}{number:x}"

    def run_here(self) -> Optional[str]:
        """The id of the run that the caller is in; None outside of any."""
        cause = self.own_cause(cause_here())
        return None if cause is None else self.lane_of(cause).run_id

    def run_cause(self, run_id: str) -> Cause:
        """The cause of a `run` block; the same id goes on in the same lane (E12)."""
        with self.mutex:
            self._refuse_if_closed()
            lane = self._run_lane(run_id)
            self.open_blocks[run_id] = self.open_blocks.get(run_id, 0) + 1
        return Cause(self, cause_here(), lane, None, run_id, False)

    def close_block(self, run_id: str) -> None:
        """A `run` block has ended."""
        with self.mutex:
            left = self.open_blocks.pop(run_id, 1) - 1
            if left:
                self.open_blocks[run_id] = left
        self.end_of_run(run_id)

    def is_going_on(self, run_id: str) -> bool:
        """Whether a run has an open block, or anything pending."""
        return run_id in self.open_blocks or self.is_pending(run_id)

    def call_cause(self, started: Delivery) -> Cause:
        """The cause of all that an agent does: its `_started` event is the parent; the lane stays what it was (E2)."""
        lane = None if started.outer is None else started.outer.lane
        return Cause(self, cause_here(), lane, started.number, started.name, False)

    def emit_lifecycle(
        self, name: str, data: Any, sender: str, cause: Optional[Cause], lane: Optional[Lane]
    ) -> Optional[Delivery]:
        """Emit for an agent: into the lane given, and whatever goes wrong never reaches the agent (A3, E5)."""
        try:
            return self.emit_in(name, data, sender, cause, lane)
        except Exception as error:
            with self.mutex:
                self.refused += 1
            with suppress(Exception):  # a logging filter, say
                run = lane.run_id if lane is not None else None if cause is None else self.lane_of(cause).run_id
                extra = about(event=name, agent=sender, run=run)
                logger.error("event %r of agent %r could not be emitted: %s", name, sender, error, extra=extra)
            return None

    # -- delivering ---------------------------------------------------------------------------------------

    def handle(self, delivery: Delivery, place: int) -> bool:
        """Call the handlers from `place` on, one after another (E1); False if an async one is to be waited for."""
        route = delivery.route.subs
        beside = place > 0 and delivery.has_beside
        if place == 0:
            delivery.outcomes = BEGUN
        while place < len(route):
            sub = route[place]
            place += 1
            if sub.plain:
                if (
                    sub.active
                    and (not sub.once or sub.may_start())
                    and not Context().run(_call, self, delivery, sub, place)
                ):
                    return False
            elif sub.concurrent:
                beside = self._start_beside(delivery, sub, place) or beside
            elif sub.active:
                self._park(delivery, sub, place, _argument(delivery, sub))
                return False
        if not beside or delivery.end_beside():
            self.finish(delivery)
        return True

    def finish(self, delivery: Delivery) -> None:
        """Every handler of the event has ended."""
        delivery.outcomes = tuple(delivery.outcomes or ())
        if self.bells:
            delivery.ring()
        self.live.discard(delivery)

    def _park(self, delivery: Delivery, sub: Subscription, place: int, argument: Any) -> None:
        """The lane waits for this handler, which runs on a loop."""
        lane = delivery.lane
        lane.parked = (delivery, place)
        self._send_away(delivery, sub, place, argument, lambda: self.workers.submit(lane.resume))

    def _start_beside(self, delivery: Delivery, sub: Subscription, place: int) -> bool:
        """Start a `concurrent=True` handler: neither later handlers nor the lane wait for it (E1)."""
        if not sub.active:
            return False
        delivery.begin_beside()

        def then() -> None:
            if delivery.end_beside():
                self.finish(delivery)
                self.look_for_idle(delivery.lane.run_id)

        def job() -> None:
            if not sub.may_start() or Context().run(_call, self, delivery, sub, place, then):
                then()

        if sub.is_async:
            self._send_away(delivery, sub, place, _argument(delivery, sub), then)
        else:
            self.workers.submit(job)
        return True

    def has_raised(self, delivery: Delivery, sub: Subscription, place: int, error: BaseException) -> None:
        """A sync handler has raised."""
        self.record(delivery, sub, place, None, error)
        if isinstance(error, KeyboardInterrupt) and threading.current_thread() is threading.main_thread():
            raise error  # Ctrl-C while the main thread lends a hand at exit

    def has_returned(
        self, delivery: Delivery, sub: Subscription, place: int, result: Any, then: Optional[Callable[[], None]]
    ) -> bool:
        """A sync handler has returned; False if it gave a coroutine, which is then driven on a loop."""
        if result is None and len(delivery.route.subs) == 1:  # most handlers of most events
            delivery.outcomes = NOTHING
            return True
        if type(result) is not CoroutineType:
            delivery.add_outcome(place, result, None)
            return True
        if then is None:
            self._park(delivery, sub, place, result)
        else:
            self._send_away(delivery, sub, place, result, then)
        return False

    def _send_away(
        self, delivery: Delivery, sub: Subscription, place: int, argument: Any, then: Callable[[], None]
    ) -> None:
        """Have a coroutine run on the handler's loop (E8)."""
        try:
            loop = sub.loop or self.loop.get()
            away = Away(delivery, sub, place, loop, argument, then)
            if away.lane is not None:
                away.lane.holder = away
            self.away.add(away)
            try:
                loop.call_soon_threadsafe(away.start)
                self.graph.look_again(loop)  # whose thread may be waiting for this very handler
            except RuntimeError:
                away.report(None, _loop_closed(sub))
        except RuntimeError as error:  # no loop of our own can be had any more
            self.record(delivery, sub, place, None, error)
            then()

    def _watch_loops(self) -> bool:
        """Report for the handlers whose loop has been closed; True while any are away."""
        for away in list(self.away):
            if away.loop.is_closed():
                away.report(None, _loop_closed(away.subscription))
        return bool(self.away)

    def record(
        self, delivery: Delivery, sub: Subscription, place: int, result: Any, error: Optional[BaseException]
    ) -> None:
        """Keep the outcome on the delivery; log a failure and tell it as an event (E3)."""
        delivery.add_outcome(place, result, error)
        if error is None:
            return
        with self.mutex:
            self.failed += 1
        try:
            self._tell_failure(delivery, name_of(sub.handler), error)
        except Exception:  # a logging filter, say: nothing of the users' may stop a lane
            with suppress(Exception):
                extra = about(event=delivery.name, agent=delivery.sender)
                logger.exception("the failure of a handler of event %r could not be told", delivery.name, extra=extra)

    def _tell_failure(self, delivery: Delivery, handler: str, error: BaseException) -> None:
        event = delivery.event
        data = {
            "event": event,
            "handler": handler,
            "error": text_of(error),
            "error_type": type(error).__name__,
            "exception": error,
            "traceback": "".join(traceback.format_exception(type(error), error, error.__traceback__)),
            "timestamp": self.clock.time(),
        }
        if event.name != "handler_failed":
            self.emit_lifecycle("handler_failed", data, handler, delivery.as_cause(), None)
        logger.error(
            "handler %s of event %r failed: %s: %s",
            handler,
            event.name,
            type(error).__name__,
            text_of(error),
            exc_info=(type(error), error, error.__traceback__),
            extra=about(event=event.name, agent=event.sender, run=event.run_id),
        )

    # -- waiting ------------------------------------------------------------------------------------------

    @property
    def pending(self) -> int:
        """How many events are queued or being delivered."""
        return 0 if self.abandoned else len(self.live)

    def is_pending(self, run_id: Optional[str]) -> bool:
        """Whether any event of a run is queued or being delivered; None: of any."""
        if run_id is None or not self.pending:
            return bool(self.pending)
        return any(delivery.lane.run_id == run_id for delivery in list(self.live))

    def look_for_idle(self, run_id: Optional[str] = None) -> None:
        """A lane is idle, or a handler beside has ended: those who join look whether that was all."""
        if run_id is not None:
            self.end_of_run(run_id)
        if self._joiners:
            with self.mutex:
                bells, self._joiners = self._joiners, []
            for bell in bells:
                bell.ring()

    def _add_joiner(self, bell: Bell) -> None:
        with self.mutex:
            self._joiners.append(bell)

    def _drop_joiner(self, bell: Bell) -> None:
        with self.mutex:
            if bell in self._joiners:
                self._joiners.remove(bell)

    @property
    def only_waits(self) -> bool:
        """Whether all that is pending are handlers that wait for others."""
        return self.abandoned or not (self.workers.backlog or self.waits.is_work_left(self.live))

    def end_waits(self) -> None:
        """The process is ending, and nobody is left who could emit what is waited for (E6)."""
        self._end_expected(
            lambda name: DeadlockError(
                f"the process is ending, and nobody is left who could emit {name!r}: "
                "only handlers that wait for events remain",
                name=name,
                cycle=(f"the end of the process waits for a handler, which waits for {name!r}",),
            )
        )

    def _end_expected(self, why: Callable[[str], BaseException]) -> None:
        with self.mutex:
            found, self._expected = self._expected, []
        for expected in found:
            expected.end(why(expected.name))

    def refuse_in_handler(self, what: str) -> None:
        """A handler can't wait for all handlers (E16)."""
        cause = cause_here()
        while cause is not None:
            if cause.handled and cause.bus is self:
                raise DeadlockError(
                    f"{what} was called in a handler of event {cause.name!r}: it waits until every handler has ended, "
                    "this one included",
                    name=cause.name,
                    cycle=(f"the handler waits in {what}", f"{what} waits for the handler"),
                )
            cause = cause.outer

    def join(self, timeout: Optional[float] = None, run_id: Optional[str] = None) -> None:
        """Wait until all is delivered, or all of a run, cascades too (E7)."""
        self.refuse_in_handler("join()")
        wait = self._wait_for_all(run_id)
        if not self.waits.sleep(
            self._add_joiner, self._drop_joiner, lambda: not self.is_pending(run_id), timeout, wait
        ):
            assert timeout is not None
            raise self._join_timeout(timeout)

    async def join_async(self, timeout: Optional[float] = None, run_id: Optional[str] = None) -> None:
        """The same on a loop, which goes on meanwhile (E7)."""
        self.refuse_in_handler("join_async()")
        deadline = self.clock.deadline(timeout)
        wait = self._wait_for_all(run_id)
        while self.is_pending(run_id):
            bell = TaskBell()
            self._add_joiner(bell)
            try:
                left = None if deadline is None else deadline - self.clock.monotonic()
                if self.is_pending(run_id) and (left is None or left > 0):
                    await self.waits.sleep_async(bell, lambda: not self.is_pending(run_id), left, wait)
                elif left is not None and left <= 0 and self.is_pending(run_id):
                    assert timeout is not None
                    raise self._join_timeout(timeout)
            finally:
                self._drop_joiner(bell)

    def _wait_for_all(self, run_id: Optional[str]) -> OtherWait:
        if run_id is None:
            return self.waits.for_all(None, "all events")
        return self.waits.for_all(self._run_lane(run_id), f"all events of run {run_id!r}")

    def _join_timeout(self, timeout: float) -> CoordinationTimeoutError:
        return CoordinationTimeoutError(
            f"{self.pending} events were still pending after {timeout:g} s", name="join", timeout=timeout
        )

    def drain(self, timeout: Optional[float]) -> bool:
        """At the exit of the process: let the work go on, lending this thread where no worker can start (E6)."""
        if not self.odd:
            self.odd.append("those that begin are counted")
        if not self.workers.threads:
            self.workers.run_jobs()
        self._watch_loops()
        return self.waits.sleep(self._add_joiner, self._drop_joiner, lambda: not self.pending, timeout)

    def abandon(self, why: str) -> None:
        """Say what will not be delivered."""
        pending = self.pending
        if pending:
            logger.warning("%d events are abandoned: %s", pending, why, extra=about())

    def quit(self, why: str) -> None:
        """Refuse from now on, and deliver nothing of what is queued; what runs may finish."""
        self.close()
        self.abandon(why)
        self.abandoned = True
        self.odd.append("abandoned")

    # -- the end ------------------------------------------------------------------------------------------

    def resize(self, workers: Optional[int], max_pending: Optional[int]) -> None:
        """Change how much may go on at once (F3)."""
        with self.mutex:
            if workers is not None:
                self.workers.limit = workers
            if max_pending is not None:
                self.max_pending = max_pending

    def _refuse_if_closed(self) -> None:
        if self.closed:
            raise ClosedError("this coordinator has been closed")

    def close(self) -> None:
        """Refuse from now on; what is queued is still delivered."""
        with self.mutex:
            self.closed = True
            self.routes.clear()
            self.version += 1
        self._end_expected(lambda name: ClosedError(f"this coordinator has been closed: no event {name!r} will come"))

    def stop(self) -> None:
        """End the threads, after `close`, when all is delivered."""
        self.joins.stop()
        self.workers.stop()
        self.loop.stop()


class RunBlock:
    """What `coord.run("id")` gives: a context manager that makes events belong to a run (E12)."""

    __slots__ = ("_bus", "_id")

    def __init__(self, bus: Bus, run_id: Optional[str]) -> None:
        if run_id is not None and not isinstance(run_id, str):
            raise TypeError(f"a run's id must be a string, not {type(run_id).__name__}: {run_id!r}")
        if run_id == "":
            raise ValueError("a run's id must not be empty")
        self._bus = bus
        self._id = run_id or bus.new_run_id()

    def __enter__(self) -> Run:
        CAUSE.set(self._bus.run_cause(self._id))
        return Run(id=self._id)

    def __exit__(
        self, kind: Optional[type[BaseException]], error: Optional[BaseException], trace: Optional[TracebackType]
    ) -> None:
        cause = cause_here()
        while cause is not None and not (cause.bus is self._bus and cause.number is None and cause.name == self._id):
            cause = cause.outer
        self._bus.close_block(self._id)
        if cause is not None:  # else it was entered in another context, and ends with that
            CAUSE.set(cause.outer)


def _call(
    bus: Bus, delivery: Delivery, sub: Subscription, place: int, then: Optional[Callable[[], None]] = None
) -> bool:
    """Call a sync handler on this worker; False if it gave a coroutine."""
    CAUSE.set(delivery)
    try:
        result = sub.handler(delivery.event if sub.pass_event else delivery.data)
    except BaseException as error:
        bus.has_raised(delivery, sub, place, error)
        return True
    return bus.has_returned(delivery, sub, place, result, then)


def _ignore(run_id: str) -> None:
    """Nobody wants to know."""


def _argument(delivery: Delivery, sub: Subscription) -> Any:
    return delivery.event if sub.pass_event else delivery.data


def _loop_closed(sub: Subscription) -> LoopClosedError:
    return LoopClosedError(f"the event loop of handler {name_of(sub.handler)} has been closed")


def check_handler(handler: Any) -> bool:
    """Refuse what can't handle an event; tell whether it is async."""
    if not callable(handler):
        raise TypeError(f"a handler must be callable, not {type(handler).__name__}: {handler!r}")
    try:
        inspect.signature(handler).bind(None)
    except TypeError:
        raise TypeError(
            f"handler {name_of(handler)} must take one positional argument, the event's data"
            " (for a method, register the bound one: coord.on(name, self.method))"
        ) from None
    except ValueError:
        pass  # a builtin that doesn't tell its signature
    inner: Union[Any, Callable[..., Any]] = handler
    while hasattr(inner, "func") and not inspect.isroutine(inner):  # partials
        inner = inner.func
    return inspect.iscoroutinefunction(inner) or inspect.iscoroutinefunction(getattr(inner, "__call__", None))  # noqa: B004
