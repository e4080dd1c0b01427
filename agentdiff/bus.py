"""The event bus: subscriptions, lanes, deliveries.

`emit` takes no mutex and waits for nobody (E4): it looks the route up, puts a delivery at the end of
its lane, and if nobody works on that lane, hands the lane to a worker. A lane is worked on by whoever
holds its `turn`, so its events are delivered one at a time (E2). Who lets a turn go looks at the lane
once more afterwards; who adds to a lane tries for the turn afterwards. So nothing is left lying.
"""

from __future__ import annotations

import inspect
import logging
import os
import re
import threading
import traceback
from asyncio import AbstractEventLoop, CancelledError, Task
from collections import deque
from collections.abc import Generator
from contextlib import suppress
from contextvars import Context
from itertools import count
from types import CoroutineType, TracebackType
from typing import Any, Callable, Optional, Union
from weakref import WeakKeyDictionary, WeakValueDictionary

from ._clock import Clock, check_timeout
from ._owner import GeneratorOwner, ThreadOwner, current_owner, running_loop
from ._waitqueue import Bell, TaskBell, ThreadBell
from ._workers import OwnLoop, Tally, Workers, drain_at_exit
from .errors import ClosedError, CoordinationTimeoutError, DeadlockError, LoopClosedError, QueueFullError, text_of
from .events import CAUSE, Event, Run, as_regex, check_name, is_pattern

logger = logging.getLogger("agentdiff")

Handler = Callable[[Any], Any]
Emit = Callable[..., "Delivery"]

_ROUTES_KEPT = 4096
_TURNS_BEFORE_OTHERS = 64
_HELP_EVERY = 0.02


class Subscription:
    """What `on` gives back: cancel it, or use it as a context manager that cancels at the end (E10).

    >>> from agentdiff import Coordinator
    >>> with Coordinator() as coord:
    ...     with coord.on("ready", print):
    ...         _ = coord.emit("ready", "once").wait()
    ...     _ = coord.emit("ready", "nobody listens any more")
    once
    """

    __slots__ = (
        "_active",
        "_bus",
        "_claim",
        "_is_async",
        "_loop",
        "_order",
        "concurrent",
        "handler",
        "name",
        "once",
        "pass_event",
    )  # fmt: skip

    def __init__(
        self,
        bus: Bus,
        name: str,
        handler: Handler,
        order: int,
        loop: Optional[AbstractEventLoop],
        is_async: bool,
        pass_event: bool,
        concurrent: bool,
        once: bool,
    ) -> None:
        self.name = name
        self.handler = handler
        self.pass_event = pass_event
        self.concurrent = concurrent
        self.once = once
        self._bus = bus
        self._order = order
        self._loop = loop
        self._is_async = is_async
        self._active = True
        self._claim = threading.Lock() if once else None

    def __repr__(self) -> str:
        return f"<Subscription {self.name!r} {_name_of(self.handler)}{'' if self._active else ' cancelled'}>"

    @property
    def active(self) -> bool:
        """Whether it has not been cancelled."""
        return self._active

    def cancel(self) -> None:
        """Have no further call started, for events that are queued already too; one that runs may finish (E10)."""
        self._bus.unsubscribe(self)

    def __enter__(self) -> Subscription:
        return self

    def __exit__(
        self, kind: Optional[type[BaseException]], error: Optional[BaseException], trace: Optional[TracebackType]
    ) -> None:
        self.cancel()

    def _may_start(self) -> bool:
        """Asked right before a call: not cancelled, and for `once` the first to ask."""
        if not self._active:
            return False
        if self._claim is not None:
            if not self._claim.acquire(False):
                return False
            self._bus.unsubscribe(self)
        return True


class Cause:
    """Why events are emitted in this context: a handler at work, an agent's call, a `run` block."""

    # `lane` is where the events go that it causes; None: to be found by `Bus.lane_of`. `number` is that of the
    # event behind it, None for a run block outside of any. `handled` says that a handler of this event is at work.
    __slots__ = ("bus", "depth", "handled", "lane", "name", "number", "outer")

    bus: Bus
    outer: Optional[Cause]
    lane: Optional[Lane]
    number: Optional[int]
    name: str
    depth: int
    handled: bool


class Lane:
    """The order within a run, or a thread or task outside of any: its events are delivered one at a time (E2)."""

    __slots__ = ("__weakref__", "_bus", "parked", "queue", "run_id", "turn")

    def __init__(self, bus: Bus, run_id: Optional[str]) -> None:
        self.run_id = run_id
        self.queue: deque[Delivery] = deque()
        self.turn = threading.Lock()
        self.parked: Optional[Delivery] = None  # waits for an async handler; only the turn's holder looks at it
        self._bus = bus

    def park(self, delivery: Delivery, place: int) -> None:
        """Have the next `run` go on with this delivery, at this handler."""
        delivery._next = place
        self.parked = delivery

    def run(self) -> None:
        """Deliver, in turn, until nothing is left or an async handler is to be waited for."""
        bus = self._bus
        queue = self.queue
        delivery, self.parked = self.parked, None
        place = 0 if delivery is None else delivery._next
        turns = 0
        while True:
            if bus.abandoned:
                queue.clear()
            if delivery is None:
                try:
                    delivery = queue.popleft()
                except IndexError:
                    self.turn.release()
                    if queue and self.turn.acquire(False):
                        continue
                    bus.look_for_idle()
                    return
            if not bus.carry_on(delivery, place):
                return  # whoever ends the async handler has this method run again
            delivery = None
            place = 0
            turns += 1
            if turns >= _TURNS_BEFORE_OTHERS and bus.workers.backlog:
                bus.workers.submit(self.run)  # others wait for a worker: to the end of their line
                return


class Delivery:
    """The handling of one event: what `emit` returns (E4). Waiting for it is optional.

    >>> from agentdiff import Coordinator
    >>> with Coordinator() as coord:
    ...     sub = coord.on("question", lambda data: data * 2)
    ...     coord.emit("question", 21).wait(timeout=5).results
    (42,)
    """

    # The first nine are set by `emit`, the others when the handling begins, so that a pending event is small and
    # quick to make. `_route` is emptied at the end: nobody is to be called any more.
    __slots__ = (
        "__weakref__",
        "_beside",
        "_bus",
        "_cause",
        "_data",
        "_event",
        "_inner",
        "_lane",
        "_name",
        "_next",
        "_number",
        "_outcomes",
        "_route",
        "_sender",
        "_time",
    )  # fmt: skip

    _bus: Bus
    _name: str
    _data: Any
    _sender: Optional[str]
    _number: int
    _time: float
    _cause: Optional[Cause]
    _lane: Optional[Lane]
    _route: tuple[Subscription, ...]
    _inner: Cause
    _next: int
    _outcomes: list[tuple[int, Any, Optional[BaseException]]]
    _beside: int
    _event: Event

    def __repr__(self) -> str:
        return f"<Delivery of {self._name!r} {'pending' if self._route else 'done'}>"

    @property
    def event(self) -> Event:
        """The event that is being delivered."""
        try:
            return self._event
        except AttributeError:
            return self._bus.event_of(self)

    @property
    def done(self) -> bool:
        """Whether every handler has ended."""
        return not self._route

    @property
    def results(self) -> tuple[Any, ...]:
        """What the handlers have returned so far, in registration order; without those that raised."""
        outcomes = sorted(getattr(self, "_outcomes", ()), key=_by_place)
        return tuple(result for _, result, error in outcomes if error is None)

    @property
    def errors(self) -> tuple[BaseException, ...]:
        """What the handlers have raised so far, in registration order."""
        outcomes = sorted(getattr(self, "_outcomes", ()), key=_by_place)
        return tuple(error for _, _, error in outcomes if error is not None)

    def wait(self, timeout: Optional[float] = None) -> Delivery:
        """Block this thread until every handler has ended.

        Args:
            timeout: seconds; None waits.

        Returns:
            The delivery itself.

        Raises:
            CoordinationTimeoutError: it took longer.
            DeadlockError: called in a handler of this very event, or of one that this event caused (E16).
        """
        timeout = check_timeout(timeout)
        self._refuse_own()
        if self._route:
            self._bus.sleep(self._add_bell, self._drop_bell, lambda: not self._route, timeout)
            if self._route:
                raise CoordinationTimeoutError(
                    f"event {self._name!r} was not handled within {timeout:g} s", name=self._name, timeout=timeout
                )
        return self

    def __await__(self) -> Generator[Any, None, Delivery]:
        self._refuse_own()
        if self._route:
            bell = TaskBell()
            self._add_bell(bell)
            try:
                if self._route:
                    yield from bell.sleep(self._bus.clock, None).__await__()
            finally:
                self._drop_bell(bell)
        return self

    def _refuse_own(self) -> None:
        cause: Any = CAUSE.get()
        while cause is not None and self._route:
            if cause.handled and cause.number == self._number and cause.bus is self._bus:
                raise DeadlockError(
                    f"a handler of event {self._name!r}, or one that this event caused, waits for this event's "
                    "handlers to end: it would wait for itself",
                    name=self._name,
                    cycle=(f"the delivery of {self._name!r} waits for its handlers", "one of them waits for it"),
                )
            cause = cause.outer

    def _add_bell(self, bell: Bell) -> None:
        with self._bus.mutex:
            self._bus.bells.setdefault(self, []).append(bell)

    def _drop_bell(self, bell: Bell) -> None:
        with self._bus.mutex:
            bells = self._bus.bells.get(self, [])
            if bell in bells:
                bells.remove(bell)
            if not bells:
                self._bus.bells.pop(self, None)

    def _finish(self) -> None:
        self._route = ()
        if self._bus.bells:
            with self._bus.mutex:
                bells = self._bus.bells.pop(self, ())
            for bell in bells:
                bell.ring()


class _Away:
    """A handler that runs on a loop; it reports back exactly once, even if the loop is closed beneath it (E8)."""

    __slots__ = ("_reported", "argument", "delivery", "loop", "place", "subscription", "task", "then")

    def __init__(
        self,
        delivery: Delivery,
        subscription: Subscription,
        place: int,
        loop: AbstractEventLoop,
        argument: Any,
        then: Callable[[], None],
    ) -> None:
        self.delivery = delivery
        self.subscription = subscription
        self.place = place
        self.loop = loop
        self.argument = argument  # what the handler takes, or a coroutine that it has given already
        self.then = then
        self.task: Optional[Task[Any]] = None
        self._reported = threading.Lock()

    def start(self) -> None:
        """On the loop."""
        Context().run(self._start)

    def _start(self) -> None:
        CAUSE.set(self.delivery._inner)
        if inspect.iscoroutine(self.argument):
            coroutine = self.argument
        elif not self.subscription._may_start():
            return self.skip()
        else:
            try:
                coroutine = self.subscription.handler(self.argument)
            except BaseException as error:
                return self.report(None, error)
            if not inspect.isawaitable(coroutine):
                return self.report(coroutine, None)
        self.task = self.loop.create_task(self._drive(coroutine))
        self.task.add_done_callback(self._ended)

    async def _drive(self, awaitable: Any) -> tuple[Any, Optional[BaseException]]:
        try:
            return await awaitable, None
        except CancelledError:
            raise
        except BaseException as error:
            if not isinstance(error, Exception) and threading.current_thread() is threading.main_thread():
                self.report(None, error)
                raise  # Ctrl-C: the program's own loop is to end; a loop of ours goes on
            return None, error

    def _ended(self, task: Task[Any]) -> None:
        if task.cancelled():
            self.report(None, CancelledError("the handler's task was cancelled"))
        elif task.exception() is None:
            self.report(*task.result())

    def report(self, result: Any, error: Optional[BaseException]) -> None:
        """Hand the outcome in, once."""
        if self._reported.acquire(False):
            if self.task is None and inspect.iscoroutine(self.argument):
                self.argument.close()  # its loop is closed: it will never run
            bus = self.delivery._bus
            bus.away.discard(self)
            bus.record(self.delivery, self.subscription, self.place, result, error)
            self.then()

    def skip(self) -> None:
        """It was cancelled before it began."""
        if self._reported.acquire(False):
            self.delivery._bus.away.discard(self)
            self.then()


class Bus:
    """All subscriptions and events of one coordinator."""

    def __init__(
        self,
        clock: Clock,
        *,
        name: str,
        workers: int,
        max_pending: int,
        exit_timeout: Optional[float],
    ) -> None:
        self.clock = clock
        self.max_pending = max_pending
        self.exit_timeout = exit_timeout
        self.workers = Workers(name, workers)
        self.workers.watch = self._watch_loops
        self.loop = OwnLoop(name)
        self.mutex = threading.RLock()  # for what is rare; re-entrant, since a collected generator emits (A1)
        self.version = 0  # raised whenever somebody may have begun or ceased to listen
        self.closed = False
        self.abandoned = False  # what is queued will not be delivered
        self.failed = 0  # handlers that raised
        self.refused = 0  # lifecycle events that could not be queued
        self.away: set[_Away] = set()
        self.bells: dict[Delivery, list[Bell]] = {}  # of those who wait for a delivery
        self._exact: dict[str, list[Subscription]] = {}
        self._patterns: list[tuple[re.Pattern[str], Subscription]] = []
        self._any_pattern: Optional[re.Pattern[str]] = None
        self._routes: dict[str, tuple[Subscription, ...]] = {}
        self._order = count()
        self._runs: WeakValueDictionary[str, Lane] = WeakValueDictionary()
        self._begin()

    def _begin(self) -> None:
        """Nothing has been emitted yet."""
        self._prefix = os.urandom(5).hex() + "-"
        self._accepted = Tally()
        self._finished = Tally()
        self.room = self.max_pending
        self._joiners: list[Bell] = []
        self._outside = threading.local()
        self._outside_tasks: WeakKeyDictionary[Task[Any], Lane] = WeakKeyDictionary()
        self.emit = _make_emit(self, self._routes, self._accepted.add)

    def forget(self) -> None:
        """After a fork: the subscriptions are there, and nothing else (L13)."""
        self.mutex = threading.RLock()
        self.away.clear()
        self.bells.clear()
        self.workers.forget()
        self.loop.forget()
        for lane in list(self._runs.values()):  # this thread may be in such a run
            lane.queue.clear()
            lane.turn = threading.Lock()
            lane.parked = None
        self._begin()

    # -- subscribing ------------------------------------------------------------------------------------

    def subscribe(
        self,
        name: str,
        handler: Handler,
        *,
        loop: Optional[AbstractEventLoop],
        pass_event: bool,
        concurrent: bool,
        once: bool,
    ) -> Subscription:
        """Call `handler` for each event called `name` from now on (E1, E8, E9, E10)."""
        check_name(name)
        is_async = _check_handler(handler)
        if is_async and loop is None:
            loop = running_loop()
        with self.mutex:
            self._refuse_if_closed()
            sub = Subscription(self, name, handler, next(self._order), loop, is_async, pass_event, concurrent, once)
            if is_pattern(name):
                self._patterns.append((re.compile(as_regex(name), re.DOTALL), sub))
            else:
                self._exact.setdefault(name, []).append(sub)
            self._reroute(name)
        if is_async and loop is None:
            self.loop.get()  # now, since at the exit of the process no thread may be startable any more
        drain_at_exit(self)
        return sub

    def unsubscribe(self, sub: Subscription) -> None:
        """No further call of `sub` is started (E10)."""
        with self.mutex:
            if not sub._active:
                return
            sub._active = False
            if is_pattern(sub.name):
                self._patterns = [(regex, other) for regex, other in self._patterns if other is not sub]
            else:
                left = [other for other in self._exact.get(sub.name, ()) if other is not sub]
                if left:
                    self._exact[sub.name] = left
                else:
                    self._exact.pop(sub.name, None)
            self._reroute(sub.name)

    def _reroute(self, name: str) -> None:
        if is_pattern(name):
            regexes = [regex.pattern for regex, _ in self._patterns]
            self._any_pattern = re.compile("|".join(f"(?:{r})" for r in regexes), re.DOTALL) if regexes else None
            self._routes.clear()
        else:
            self._routes.pop(name, None)
        self.version += 1

    def find_route(self, name: str) -> tuple[Subscription, ...]:
        """Who listens to `name`, in registration order; remembered, so that others' subscriptions cost nothing (E9)."""
        check_name(name)
        with self.mutex:
            self._refuse_if_closed()
            subs = list(self._exact.get(name, ()))
            if self._any_pattern is not None and self._any_pattern.fullmatch(name):
                subs += [sub for regex, sub in self._patterns if regex.fullmatch(name)]
                subs.sort(key=lambda sub: sub._order)
            route = tuple(subs)
            if len(self._routes) >= _ROUTES_KEPT:
                self._routes.clear()
            self._routes[name] = route
            return route

    def hears(self, name: str) -> bool:
        """Whether an event of this name would reach anybody."""
        try:
            return bool(self._routes.get(name) or self.find_route(name))
        except ClosedError:
            return False

    # -- emitting ---------------------------------------------------------------------------------------

    def make_room(self, name: str) -> None:
        """The count says that the queue may be full: find out (E5)."""
        with self.mutex:
            pending = self._accepted.read() - self._finished.read()  # this one included
            if pending <= self.max_pending:
                self.room = self._accepted.read() + self._accepted.reads + self.max_pending - pending
                return
            self._finished.add()
        self.look_for_idle()
        raise QueueFullError(
            f"event {name!r} was refused: {pending - 1} events are pending, and max_pending is {self.max_pending}; "
            "handlers are slower than emitters",
            name=name,
            pending=pending - 1,
            max_pending=self.max_pending,
        )

    def own_cause(self, cause: Any) -> Optional[Cause]:
        """The nearest cause of this bus: coordinators share nothing, though they may share a context."""
        while cause is not None and cause.bus is not self:
            cause = cause.outer
        found: Optional[Cause] = cause
        return found

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
        if running_loop() is None or isinstance(owner := current_owner(), ThreadOwner):
            try:
                lane: Lane = self._outside.lane
            except AttributeError:
                lane = self._outside.lane = Lane(self, None)
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

    def event_of(self, delivery: Delivery) -> Event:
        """The event as others see it, made when somebody looks."""
        cause = delivery._cause
        parent = None
        run_id = None
        if delivery._lane is not None:
            run_id = delivery._lane.run_id
        elif cause is not None:
            run_id = self.lane_of(cause).run_id
        while cause is not None and parent is None:
            parent = cause.number
            cause = cause.outer
        event = Event(
            name=delivery._name,
            data=delivery._data,
            sender=delivery._sender,
            id=self._id_of(delivery._number),
            time=delivery._time,
            run_id=run_id,
            parent_id=None if parent is None else self._id_of(parent),
        )
        delivery._event = event
        return event

    # -- runs and agents' calls: causes that users open ---------------------------------------------------

    def new_run_id(self) -> str:
        """An id that no run has yet."""
        return f"{self._prefix}run-{next(self._order):x}"

    def _id_of(self, number: Optional[int]) -> str:
        """An event's number as others see it: unique beyond this process; events that nobody heard count downwards."""
        assert number is not None
        return f"{self._prefix}{number:x}" if number >= 0 else f"{self._prefix}u{-number:x}"

    def run_cause(self, run_id: str) -> Cause:
        """The cause of a `run` block; the same id goes on in the same lane (E12)."""
        with self.mutex:
            self._refuse_if_closed()
            lane = self._run_lane(run_id)
        outer = self.own_cause(CAUSE.get())
        cause = Cause()
        cause.bus = self
        cause.outer = CAUSE.get()
        cause.lane = lane
        cause.number = None
        cause.name = run_id
        cause.depth = 0 if outer is None else outer.depth
        cause.handled = False
        return cause

    def call_cause(self, started: Delivery) -> Cause:
        """The cause of all that an agent does: its `_started` event is the parent; the lane stays what it was (E2)."""
        outer = started._cause
        cause = Cause()
        cause.bus = self
        cause.outer = CAUSE.get()
        cause.lane = outer.lane if outer is not None else None
        cause.number = started._number
        cause.name = started._name
        cause.depth = 0 if outer is None else outer.depth
        cause.handled = False
        return cause

    def emit_lifecycle(
        self, name: str, data: Any, sender: str, cause: Optional[Cause], lane: Optional[Lane]
    ) -> Optional[Delivery]:
        """Emit for an agent: into the lane given, and whatever goes wrong never reaches the agent (A3, E5)."""
        try:
            return self.emit(name, data, sender, cause, lane)
        except Exception as error:
            with self.mutex:
                self.refused += 1
            logger.error("event %r of agent %r could not be emitted: %s", name, sender, error)
            return None

    # -- delivering ---------------------------------------------------------------------------------------

    def carry_on(self, delivery: Delivery, place: int) -> bool:
        """Call the next handlers, one after another (E1); False if an async one is to be waited for first."""
        route = delivery._route
        if place == 0:
            delivery._inner = self._inner_cause(delivery)
            delivery._outcomes = []
            delivery._beside = 0
        while place < len(route):
            sub = route[place]
            place += 1
            if sub.concurrent:
                self._start_beside(delivery, sub, place)
            elif sub._is_async:
                if sub._active:
                    lane = delivery._lane
                    assert lane is not None
                    lane.park(delivery, place)
                    self._send_away(delivery, sub, place, _argument(delivery, sub), self._resume(lane))
                    return False
            elif sub._may_start() and not Context().run(self._call, delivery, sub, place, None):
                return False
        if delivery._beside:
            return self._all_but_concurrent_done(delivery)
        delivery._finish()
        self._finished.add()
        return True

    def _inner_cause(self, delivery: Delivery) -> Cause:
        lane = delivery._lane
        assert lane is not None
        outer = delivery._cause
        cause = Cause()
        cause.bus = self
        cause.outer = outer
        cause.lane = lane if lane.run_id is not None else None
        cause.number = delivery._number
        cause.name = delivery._name
        cause.depth = 1 if outer is None else outer.depth + 1
        cause.handled = True
        return cause

    def _resume(self, lane: Lane) -> Callable[[], None]:
        def then() -> None:
            self.workers.submit(lane.run)

        return then

    def _call(self, delivery: Delivery, sub: Subscription, place: int, then: Optional[Callable[[], None]]) -> bool:
        """Call a sync handler on this worker; False if it gave a coroutine, which is then driven on a loop."""
        CAUSE.set(delivery._inner)
        try:
            result = sub.handler(delivery.event if sub.pass_event else delivery._data)
        except BaseException as error:
            self.record(delivery, sub, place, None, error)
            if isinstance(error, KeyboardInterrupt) and threading.current_thread() is threading.main_thread():
                raise  # Ctrl-C while the main thread lends a hand at exit
            return True
        if type(result) is CoroutineType:
            lane = delivery._lane
            assert lane is not None
            if then is None:
                lane.park(delivery, place)
                then = self._resume(lane)
            self._send_away(delivery, sub, place, result, then)
            return False
        delivery._outcomes.append((place, result, None))
        return True

    def _start_beside(self, delivery: Delivery, sub: Subscription, place: int) -> None:
        """Start a `concurrent=True` handler: neither later handlers nor the lane wait for it (E1)."""
        if not sub._active:
            return
        with self.mutex:
            delivery._beside += 1

        def then() -> None:
            self._one_beside_done(delivery)

        def job() -> None:
            if not sub._may_start() or Context().run(self._call, delivery, sub, place, then):
                then()

        if sub._is_async:
            self._send_away(delivery, sub, place, _argument(delivery, sub), then)
        else:
            self.workers.submit(job)

    def _one_beside_done(self, delivery: Delivery) -> None:
        with self.mutex:
            delivery._beside -= 1
            last = delivery._beside == -1  # the sequential part counts itself off below zero
        if last:
            self._finish_beside(delivery)

    def _all_but_concurrent_done(self, delivery: Delivery) -> bool:
        with self.mutex:
            delivery._beside -= 1
            last = delivery._beside == -1
        if last:
            self._finish_beside(delivery)
        return True

    def _finish_beside(self, delivery: Delivery) -> None:
        delivery._finish()
        self._finished.add()
        self.look_for_idle()

    def _send_away(
        self, delivery: Delivery, sub: Subscription, place: int, argument: Any, then: Callable[[], None]
    ) -> None:
        """Have a coroutine run on the handler's loop (E8)."""
        try:
            loop = sub._loop or self.loop.get()
            away = _Away(delivery, sub, place, loop, argument, then)
            self.away.add(away)
            try:
                loop.call_soon_threadsafe(away.start)
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
        delivery._outcomes.append((place, result, error))
        if error is None:
            return
        with self.mutex:
            self.failed += 1
        try:
            self._tell_failure(delivery, _name_of(sub.handler), error)
        except Exception:  # a logging filter, say: nothing of the users' may stop a lane
            with suppress(Exception):
                logger.exception("the failure of a handler of event %r could not be told", delivery._name)

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
            self.emit_lifecycle("handler_failed", data, handler, delivery._inner, None)
        logger.error(
            "handler %s of event %r failed: %s: %s",
            handler,
            event.name,
            type(error).__name__,
            text_of(error),
            exc_info=(type(error), error, error.__traceback__),
            extra={"event": event.name, "agent": event.sender, "run": event.run_id},
        )

    # -- waiting for all ------------------------------------------------------------------------------------

    @property
    def pending(self) -> int:
        """How many events are queued or being delivered."""
        if self.abandoned:
            return 0
        with self.mutex:
            finished = self._finished.read()
            return self._accepted.read() - finished

    @property
    def accepted(self) -> int:
        """How many events have been queued so far."""
        with self.mutex:
            return self._accepted.read()

    def look_for_idle(self) -> None:
        """Something has ended: if it was the last, wake those who wait for that."""
        if self._joiners and not self.pending:
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

    def sleep(
        self,
        add: Callable[[Bell], None],
        drop: Callable[[Bell], None],
        done: Callable[[], bool],
        timeout: Optional[float],
    ) -> bool:
        """Block this thread until `done()`, or for `timeout` seconds; tell which. `add` and `drop` say whom to ring."""
        deadline = None if timeout is None else self.clock.monotonic() + timeout
        while not done():
            bell = ThreadBell()
            add(bell)
            try:
                left = None if deadline is None else deadline - self.clock.monotonic()
                if self.workers.short_of_threads:  # at the exit of the process: nobody else may be there to do it
                    self.workers.run_jobs()
                    left = _HELP_EVERY if left is None else min(left, _HELP_EVERY)
                if done():
                    return True
                if deadline is not None and deadline <= self.clock.monotonic():
                    return False
                bell.sleep(self.clock, left)
            finally:
                drop(bell)
        return True

    def refuse_in_handler(self, what: str) -> None:
        """A handler can't wait for all handlers (E16)."""
        cause: Any = CAUSE.get()
        while cause is not None:
            if cause.handled and cause.bus is self:
                raise DeadlockError(
                    f"{what} was called in a handler of event {cause.name!r}: it waits until every handler has ended, "
                    "this one included",
                    name=cause.name,
                    cycle=(f"the handler waits in {what}", f"{what} waits for the handler"),
                )
            cause = cause.outer

    def join(self, timeout: Optional[float] = None) -> None:
        """Wait until all is delivered, cascades too (E7)."""
        self.refuse_in_handler("join()")
        if not self.sleep(self._add_joiner, self._drop_joiner, lambda: not self.pending, timeout):
            assert timeout is not None
            raise self._join_timeout(timeout)

    async def join_async(self, timeout: Optional[float] = None) -> None:
        """Wait until all is delivered, cascades too; the loop goes on (E7)."""
        self.refuse_in_handler("join_async()")
        deadline = None if timeout is None else self.clock.monotonic() + timeout
        while self.pending:
            bell = TaskBell()
            self._add_joiner(bell)
            try:
                left = None if deadline is None else deadline - self.clock.monotonic()
                if self.pending and (left is None or left > 0):
                    await bell.sleep(self.clock, left)
                elif left is not None and left <= 0 and self.pending:
                    assert timeout is not None
                    raise self._join_timeout(timeout)
            finally:
                self._drop_joiner(bell)

    def _join_timeout(self, timeout: float) -> CoordinationTimeoutError:
        return CoordinationTimeoutError(
            f"{self.pending} events were still pending after {timeout:g} s", name="join", timeout=timeout
        )

    def drain(self, timeout: Optional[float]) -> bool:
        """At the exit of the process: let the work go on, lending this thread where no worker can start (E6)."""
        if not self.workers.threads:
            self.workers.run_jobs()
        self._watch_loops()
        return self.sleep(self._add_joiner, self._drop_joiner, lambda: not self.pending, timeout)

    def abandon(self, why: str) -> None:
        """Say what will not be delivered."""
        pending = self.pending
        if pending:
            logger.warning("%d events are abandoned: %s", pending, why)

    def quit(self, why: str) -> None:
        """Refuse from now on, and deliver nothing of what is queued; what runs may finish."""
        self.close()
        self.abandon(why)
        self.abandoned = True

    # -- the end ------------------------------------------------------------------------------------------

    def resize(self, workers: Optional[int], max_pending: Optional[int]) -> None:
        """Change how much may go on at once (F3)."""
        with self.mutex:
            if workers is not None:
                self.workers.limit = workers
            if max_pending is not None:
                self.max_pending = max_pending
                self.room = 0  # the next `emit` finds out how much room there is

    def _refuse_if_closed(self) -> None:
        if self.closed:
            raise ClosedError("this coordinator has been closed")

    def close(self) -> None:
        """Refuse from now on; what is queued is still delivered."""
        with self.mutex:
            self.closed = True
            self._routes.clear()
            self.version += 1

    def stop(self) -> None:
        """End the threads, after `close`, when all is delivered."""
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
        cause: Any = CAUSE.get()
        while cause is not None and not (cause.bus is self._bus and cause.number is None and cause.name == self._id):
            cause = cause.outer
        if cause is not None:  # else it was entered in another context, and ends with that
            CAUSE.set(cause.outer)


def _make_emit(bus: Bus, routes: dict[str, tuple[Subscription, ...]], accept: Callable[[], int]) -> Emit:
    """A closure, since every attribute looked up on this path shows in the figures."""
    find = routes.get
    now = bus.clock.time
    count_unheard = count(-1, -1).__next__
    why = CAUSE.get

    def emit(
        name: str, data: Any = None, sender: Optional[str] = None, cause: Any = ..., lane: Optional[Lane] = None
    ) -> Delivery:
        """Send an event on its way; never waits for a handler (E4). An agent's call names its cause and lane."""
        try:
            route = find(name)
        except TypeError:  # unhashable
            check_name(name)
            raise
        if route is None:
            route = bus.find_route(name)
        if cause is ...:
            cause = why()
            if cause is not None and cause.bus is not bus:
                cause = bus.own_cause(cause)
        delivery = Delivery()
        delivery._bus = bus
        delivery._name = name
        delivery._data = data
        delivery._sender = sender
        delivery._time = now()
        delivery._cause = cause
        delivery._route = route
        if not route:
            delivery._number = count_unheard()
            delivery._lane = lane
            return delivery
        delivery._number = number = accept()
        if number >= bus.room:
            bus.make_room(name)
        if lane is None:
            lane = bus.lane_of(cause) if cause is None or cause.lane is None else cause.lane
        delivery._lane = lane
        lane.queue.append(delivery)
        if lane.turn.acquire(False):
            bus.workers.submit(lane.run)
        return delivery

    return emit


def _argument(delivery: Delivery, sub: Subscription) -> Any:
    return delivery.event if sub.pass_event else delivery._data


def _by_place(outcome: tuple[int, Any, Optional[BaseException]]) -> int:
    return outcome[0]


def _loop_closed(sub: Subscription) -> LoopClosedError:
    return LoopClosedError(f"the event loop of handler {_name_of(sub.handler)} has been closed")


def _name_of(handler: Any) -> str:
    try:
        name = getattr(handler, "__qualname__", None) or getattr(handler, "__name__", None)
        return str(name) if name else repr(handler)
    except Exception:
        return f"a {type(handler).__name__}"


def _check_handler(handler: Any) -> bool:
    """Refuse what can't handle an event; tell whether it is async."""
    if not callable(handler):
        raise TypeError(f"a handler must be callable, not {type(handler).__name__}: {handler!r}")
    try:
        inspect.signature(handler).bind(None)
    except TypeError:
        raise TypeError(
            f"handler {_name_of(handler)} must take one positional argument, the event's data"
            " (for a method, register the bound one: coord.on(name, self.method))"
        ) from None
    except ValueError:
        pass  # a builtin that doesn't tell its signature
    inner: Union[Any, Callable[..., Any]] = handler
    while hasattr(inner, "func") and not inspect.isroutine(inner):  # partials
        inner = inner.func
    return inspect.iscoroutinefunction(inner) or inspect.iscoroutinefunction(getattr(inner, "__call__", None))  # noqa: B004
