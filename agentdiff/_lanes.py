"""Subscriptions, deliveries, and the lanes in which these go one at a time.

A lane is worked on by whoever holds its `turn`. Who adds to a lane has a worker come unless one is on its way
(`scheduled`); a worker that finds the turn taken goes away again. Who lets a turn go looks at the lane once more
afterwards; so nothing is left lying, and it does no harm if a worker is sent twice.
"""

from __future__ import annotations

import inspect
import threading
from asyncio import AbstractEventLoop, CancelledError, Task
from collections import deque
from collections.abc import Generator, Sequence
from contextvars import Context
from types import TracebackType
from typing import Any, Callable, Optional, Protocol, Union

from ._clock import Clock, check_timeout
from ._owner import Owner, this_thread
from ._waitqueue import Bell, TaskBell, ThreadBell
from ._workers import Workers
from .deadlock import OtherWait, Party
from .errors import CoordinationTimeoutError, DeadlockError
from .events import CAUSE, Event

Handler = Callable[[Any], Any]
Outcome = tuple[int, Any, Optional[BaseException]]

EMPTY, AWAY, ENOUGH = range(3)
"""Why the delivering of a lane's events has paused: nothing is left; an async handler is to be waited for; others may
be waiting for a worker, or for this lane, or the context is not as good as new."""


class Sleeper(Protocol):
    """How threads and tasks wait, as deliveries see it."""

    def sleep(
        self,
        add: Callable[[Bell], None],
        drop: Callable[[Bell], None],
        done: Callable[[], bool],
        timeout: Optional[float],
        wait: Optional[OtherWait] = ...,
        lane_too: bool = ...,
    ) -> bool: ...

    async def sleep_async(
        self,
        bell: TaskBell,
        done: Callable[[], bool],
        timeout: Optional[float],
        wait: Optional[OtherWait] = ...,
        lane_too: bool = ...,
    ) -> None: ...

    def for_delivery(self, delivery: Delivery) -> OtherWait: ...

    def begin(self, wait: Any) -> None: ...

    def end(self, wait: Any) -> None: ...


class Deliverer(Protocol):
    """The bus, as lanes and deliveries see it."""

    clock: Clock
    workers: Workers
    mutex: Any
    away: set[Away]
    bells: dict[Delivery, list[Bell]]
    beside: dict[Delivery, int]

    @property
    def waits(self) -> Sleeper: ...

    def unsubscribe(self, sub: Subscription) -> None: ...

    @property
    def deliver(self) -> Callable[[deque[Delivery], deque[Loan], Context], int]: ...

    def handle(self, delivery: Delivery, place: int) -> bool: ...

    def look_for_idle(self, run_id: Optional[str] = None) -> None: ...

    def number_of(self, delivery: Delivery) -> int: ...

    def event_of(self, delivery: Delivery) -> Event: ...

    def record(
        self, delivery: Delivery, sub: Subscription, place: int, result: Any, error: Optional[BaseException]
    ) -> None: ...


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
        "_bus",
        "_claim",
        "active",
        "concurrent",
        "handler",
        "is_async",
        "loop",
        "name",
        "names",
        "once",
        "order",
        "pass_event",
        "plain",
        "simple",
    )  # fmt: skip

    def __init__(
        self,
        bus: Deliverer,
        names: Sequence[str],
        handler: Handler,
        order: int,
        loop: Optional[AbstractEventLoop],
        is_async: bool,
        pass_event: bool,
        concurrent: bool,
        once: bool,
    ) -> None:
        self.name: str = names[0] if len(names) == 1 else " | ".join(names)
        self.names: Sequence[str] = names
        self.plain: bool = not is_async and not concurrent
        self.simple: bool = self.plain and not once and not pass_event
        self.handler: Handler = handler
        self.pass_event: bool = pass_event
        self.concurrent: bool = concurrent
        self.once: bool = once
        self.order: int = order
        self.loop: Optional[AbstractEventLoop] = loop
        self.is_async: bool = is_async
        self._bus = bus
        self.active: bool = True  # until it is cancelled
        self._claim = threading.Lock() if once else None

    def __repr__(self) -> str:
        return f"<Subscription {self.name!r} {name_of(self.handler)}{'' if self.active else ' cancelled'}>"

    def cancel(self) -> None:
        """Have no further call started, for events that are queued already too; one that runs may finish (E10)."""
        self._bus.unsubscribe(self)

    def __enter__(self) -> Subscription:
        return self

    def __exit__(
        self, kind: Optional[type[BaseException]], error: Optional[BaseException], trace: Optional[TracebackType]
    ) -> None:
        self.cancel()

    def switch_off(self) -> bool:
        """No further call may start; False if that was so already."""
        was, self.active = self.active, False
        return was

    def may_start(self) -> bool:
        """Asked right before a call: not cancelled, and for `once` the first to ask."""
        if not self.active:
            return False
        if self._claim is not None:
            if not self._claim.acquire(False):
                return False
            self._bus.unsubscribe(self)
        return True


class Cause:
    """Why events are emitted in this context: a handler at work, an agent's call, a `run` block.

    `lane` is where the events go that it causes; None: to be found by `Bus.lane_of`. `number` is that of the event
    behind it, None for a run block. `handled` says that a handler of this event is at work. `depth` counts the
    handlers at work, one caused by the other.
    """

    __slots__ = ("bus", "depth", "handled", "lane", "name", "number", "outer")

    def __init__(
        self, bus: Any, outer: Optional[Cause], lane: Optional[Lane], number: Optional[int], name: str, handled: bool
    ) -> None:
        self.bus: Any = bus
        self.outer: Optional[Cause] = outer
        self.lane: Optional[Lane] = lane
        self.number: Optional[int] = number
        self.name: str = name
        self.handled: bool = handled
        self.depth: int = (0 if outer is None else outer.depth) + handled


class Lane:
    """The order within a run, or a thread or task outside of any: its events are delivered one at a time (E2)."""

    __slots__ = ("__weakref__", "_bus", "_returning", "holder", "parked", "queue", "run_id", "scheduled", "turn")

    def __init__(self, bus: Deliverer, run_id: Optional[str]) -> None:
        self.run_id: Optional[str] = run_id
        self._bus = bus
        self.begin()

    def begin(self) -> None:
        """Nothing is queued, nobody is at work."""
        self.queue: deque[Delivery] = deque()
        self.turn: Any = threading.Lock()
        self.scheduled: bool = False  # a worker is at work here, or on its way
        self.parked: Optional[tuple[Delivery, int]] = None  # waits for an async handler; the turn's holder's own
        self.holder: Union[Owner, Away, None] = None  # who has the turn, and isn't about to lend it; only to be shown
        self._returning: deque[Loan] = deque()  # of handlers that had lent the lane, and want it back

    def run(self) -> None:
        """A worker comes."""
        if self.turn.acquire(False):
            self._work()

    def resume(self) -> None:
        """The async handler that was waited for has ended."""
        parked, self.parked = self.parked, None
        self._work(parked)

    def resume_later(self, parked: tuple[Delivery, int]) -> None:
        """The turn is the caller's: a worker is to go on there."""
        self.parked = parked
        self._bus.workers.submit(self.resume)

    def forget(self) -> None:
        """After a fork in a handler: it goes on in the child, and nothing comes after it."""
        self.queue.clear()
        self._returning.clear()

    def _work(self, parked: Optional[tuple[Delivery, int]] = None) -> None:
        """Deliver, in turn, until nothing is left or an async handler is to be waited for. The turn is ours.

        The handlers that are left of a `parked` event come first.
        """
        bus = self._bus
        me = self.holder = this_thread()
        before, me.lane = me.lane, self
        try:
            if parked is not None and not bus.handle(*parked):
                return
            while True:
                if self._returning and self._hand_back():
                    return
                context = Context()
                found = context.run(bus.deliver, self.queue, self._returning, context)
                if found is EMPTY:
                    if self._let_go():
                        bus.look_for_idle(self.run_id)
                        return
                elif found is AWAY:
                    return  # whoever ends the async handler has `resume` run
                elif not self._returning and bus.workers.backlog:
                    bus.workers.submit(self.resume)  # others wait for a worker: to the end of their line
                    return
        finally:
            me.lane = before
            if self.holder is me:
                self.holder = None

    def _hand_back(self) -> bool:
        """Give the turn to a handler that wants it back; False if it has it already."""
        try:
            loan = self._returning.popleft()
        except IndexError:
            return False
        loan.ring()
        return True

    def _let_go(self) -> bool:
        """Nothing is left: the turn is free again. False if something has come meanwhile, and it is ours still."""
        self.turn.release()
        self.scheduled = False
        if (self.queue or self._returning) and self.turn.acquire(False):
            self.scheduled = True
            return False
        return True

    # -- lending (E16) ------------------------------------------------------------------------------------

    def lend(self) -> Loan:
        """The handler at work waits: let later events go on meanwhile."""
        loan = Loan(self._bus, self.parked)
        self.parked = None
        if self.queue or self._returning or not self._let_go():
            self._bus.workers.submit(self._work)
        return loan

    def _wants_back(self, loan: Loan, bell: Bell) -> bool:
        """The handler goes on; False: when the bell rings, the turn is its own."""
        loan.bell = bell
        self._returning.append(loan)
        if not self.turn.acquire(False):
            return False
        self._returning.remove(loan)  # nobody else can have taken it: they would need the turn
        loan.given = True
        self.scheduled = True
        return True

    def take_back(self, loan: Loan) -> None:
        """Wait for the turn on this thread."""
        bell = ThreadBell()
        if not self._wants_back(loan, bell):
            bell.sleep(self._bus.clock, None)
        self.parked = loan.parked

    async def take_back_async(self, loan: Loan) -> None:
        """Wait for the turn on this loop; a cancellation comes after that, since the lane must be taken back."""
        bell = TaskBell()
        cancelled: Optional[CancelledError] = None
        if not self._wants_back(loan, bell):
            while True:
                try:
                    await bell.sleep(self._bus.clock, None)
                    break
                except CancelledError as error:
                    cancelled = error
        self.parked = loan.parked
        if cancelled is not None:
            raise cancelled

    def reclaim(self, loan: Loan) -> None:
        """The loop on which the handler waits has been closed: go on after it, as soon as it is its turn (E8)."""
        bell = _Resumption(self, loan.parked)
        with self._bus.mutex:
            loan.reclaimed = True
            asked = loan.bell is not None
            given = loan.given
            loan.bell = bell
        if given or (not asked and self._wants_back(loan, bell)):
            bell.ring()


class Loan:
    """A lane that a waiting handler has lent, and the bell by which it comes back."""

    __slots__ = ("_bus", "bell", "given", "parked", "reclaimed")

    def __init__(self, bus: Deliverer, parked: Any) -> None:
        self._bus = bus
        self.parked: Any = parked  # the handler's own, if it runs on a loop: where its event goes on afterwards
        self.bell: Optional[Bell] = None  # since it wants the turn back
        self.given: bool = False  # it has it
        self.reclaimed: bool = False  # its loop has been closed: it will never go on

    def ring(self) -> bool:
        """The turn is its own."""
        with self._bus.mutex:
            self.given = True
            bell = self.bell
        return bell is not None and bell.ring()


class _Resumption:
    """Rung in place of a handler that will never go on: its event goes on to the next handler."""

    __slots__ = ("_lane", "_parked")

    def __init__(self, lane: Lane, parked: Any) -> None:
        self._lane = lane
        self._parked = parked

    def ring(self) -> bool:
        """The turn is ours."""
        self._lane.resume_later(self._parked)
        return True


class Route:
    """Who listens to a name, at one time: what the events that are emitted then have in common."""

    __slots__ = ("bus", "heard", "name", "sole", "subs")

    def __init__(self, bus: Deliverer, name: str, subs: tuple[Subscription, ...]) -> None:
        self.bus: Deliverer = bus
        self.name: str = name
        self.subs: tuple[Subscription, ...] = subs
        self.heard: bool = bool(subs)
        self.sole: Optional[Subscription] = subs[0] if len(subs) == 1 and subs[0].simple else None


class Details:
    """What few want to know of an event: made for one that something has caused, or when somebody looks."""

    __slots__ = ("event", "inner", "outer")

    def __init__(self, outer: Optional[Cause]) -> None:
        self.outer: Optional[Cause] = outer  # why it was emitted
        self.inner: Optional[Cause] = None  # why its handlers emit what they emit
        self.event: Optional[Event] = None


class Delivery:
    """The handling of one event: what `emit` returns (E4). Waiting for it is optional.

    >>> from agentdiff import Coordinator
    >>> with Coordinator() as coord:
    ...     sub = coord.on("question", lambda data: data * 2)
    ...     coord.emit("question", 21).wait(timeout=5).results
    (42,)
    """

    # Set by `emit`. They are few, so that a pending event is small and quick to make; and none of them is left out
    # where somebody may look, since it costs much to find that out.
    __slots__ = ("data", "details", "lane", "outcomes", "route", "sender", "serial", "time")

    route: Route
    data: Any
    sender: Optional[str]
    time: float
    serial: Optional[int]
    details: Optional[Details]
    lane: Lane  # the last two only where somebody hears it
    outcomes: Optional[Sequence[Outcome]]  # None: queued; a list: it has begun; a tuple: it has ended

    def __repr__(self) -> str:
        return f"<Delivery of {self.name!r} {'done' if self.done else 'pending'}>"

    @property
    def name(self) -> str:
        """The event's name."""
        return self.route.name

    @property
    def bus(self) -> Deliverer:
        """Whose event it is."""
        return self.route.bus

    @property
    def event(self) -> Event:
        """The event that is being delivered."""
        details = self._look()
        if details.event is None:
            details.event = self.bus.event_of(self)
        return details.event

    def _look(self) -> Details:
        if self.details is None:
            with self.bus.mutex:
                if self.details is None:
                    self.details = Details(None)
        return self.details

    @property
    def number(self) -> int:
        """What its event's id is made of; given when somebody asks."""
        return self.route.bus.number_of(self) if self.serial is None else self.serial

    @property
    def outer(self) -> Optional[Cause]:
        """Why it was emitted."""
        return None if self.details is None else self.details.outer

    @property
    def done(self) -> bool:
        """Whether every handler has ended."""
        return not self.route.heard or type(self.outcomes) is tuple

    @property
    def results(self) -> tuple[Any, ...]:
        """What the handlers have returned so far, in registration order; without those that raised."""
        return tuple(result for _, result, error in self._outcomes_so_far() if error is None)

    @property
    def errors(self) -> tuple[BaseException, ...]:
        """What the handlers have raised so far, in registration order."""
        return tuple(error for _, _, error in self._outcomes_so_far() if error is not None)

    def _outcomes_so_far(self) -> list[Outcome]:
        return sorted(self.outcomes or (), key=_by_place) if self.route.heard else []

    def add_outcome(self, place: int, result: Any, error: Optional[BaseException]) -> None:
        """A handler has ended."""
        with self.bus.mutex:
            self.outcomes = [*(self.outcomes or ()), (place, result, error)]

    def wait(self, timeout: Optional[float] = None) -> Delivery:
        """Block this thread until every handler has ended. In a handler, others go on meanwhile (E16).

        Args:
            timeout: seconds; None waits.

        Returns:
            The delivery itself.

        Raises:
            CoordinationTimeoutError: it took longer.
            DeadlockError: called in a handler of this very event, or of one that this event caused (E16); or its
                handlers wait, in the end, for this thread (L5).
        """
        timeout = check_timeout(timeout)
        self._refuse_own()
        if not self.done:
            wait = self.bus.waits.for_delivery(self)
            self.bus.waits.sleep(self._add_bell, self._drop_bell, self._is_over, timeout, wait, lane_too=True)
            if not self.done:
                raise CoordinationTimeoutError(
                    f"event {self.name!r} was not handled within {timeout:g} s", name=self.name, timeout=timeout
                )
        return self

    def __await__(self) -> Generator[Any, None, Delivery]:
        return self._wait_async().__await__()

    async def _wait_async(self) -> Delivery:
        self._refuse_own()
        while not self.done:
            bell = TaskBell()
            self._add_bell(bell)
            try:
                if not self.done:
                    wait = self.bus.waits.for_delivery(self)
                    await self.bus.waits.sleep_async(bell, self._is_over, None, wait, lane_too=True)
            finally:
                self._drop_bell(bell)
        return self

    def _refuse_own(self) -> None:
        cause = cause_here()
        while cause is not None and not self.done:
            if cause is self.as_cause():
                raise DeadlockError(
                    f"a handler of event {self.name!r}, or one that this event caused, waits for this event's "
                    "handlers to end: it would wait for itself",
                    name=self.name,
                    cycle=(f"the delivery of {self.name!r} waits for its handlers", "one of them waits for it"),
                )
            cause = cause.outer

    def _is_over(self) -> bool:
        return self.done

    def _add_bell(self, bell: Bell) -> None:
        with self.bus.mutex:
            self.bus.bells.setdefault(self, []).append(bell)

    def _drop_bell(self, bell: Bell) -> None:
        with self.bus.mutex:
            bells = self.bus.bells.get(self, [])
            if bell in bells:
                bells.remove(bell)
            if not bells:
                self.bus.bells.pop(self, None)

    def ring(self) -> None:
        """Every handler has ended: wake those who wait for that."""
        with self.bus.mutex:
            bells = self.bus.bells.pop(self, ())
        for bell in bells:
            bell.ring()

    def as_cause(self) -> Cause:
        """Why its handlers emit what they emit; made when the first of them does."""
        details = self.details
        if details is None or details.inner is None:
            with self.bus.mutex:
                details = self._look()
                if details.inner is None:
                    lane = None if self.lane.run_id is None else self.lane
                    details.inner = Cause(self.bus, details.outer, lane, self.number, self.name, True)
        return details.inner

    # -- handlers beside each other (E1) --------------------------------------------------------------------

    def begin_beside(self) -> None:
        """Another handler runs beside the others."""
        with self.bus.mutex:
            self.bus.beside[self] = self.bus.beside.get(self, 0) + 1

    def end_beside(self) -> bool:
        """One of them has ended, or those that go one after another have; True for the last."""
        beside = self.bus.beside
        with self.bus.mutex:
            left = beside[self] = beside[self] - 1
            if left == -1:
                del beside[self]
        return left == -1

    @property
    def at_work(self) -> int:
        """How many of its handlers are, while it is handled; those that go one after another count as one."""
        return 1 + self.bus.beside.get(self, 0)

    @property
    def has_beside(self) -> bool:
        """Whether a handler was started beside the others."""
        return self in self.bus.beside


def cause_here() -> Optional[Cause]:
    """The innermost cause in this context, of whichever bus."""
    found: Any = CAUSE.get()
    return found.as_cause() if found.__class__ is Delivery else found


class Away:
    """A handler that runs on a loop; it reports back exactly once, even if the loop is closed beneath it (E8)."""

    __slots__ = ("_argument", "_delivery", "_place", "_reported", "_then", "loan", "loop", "subscription", "task")

    def __init__(
        self,
        delivery: Delivery,
        subscription: Subscription,
        place: int,
        loop: AbstractEventLoop,
        argument: Any,
        then: Callable[[], None],
    ) -> None:
        self.subscription: Subscription = subscription
        self.loop: AbstractEventLoop = loop
        self.task: Optional[Task[Any]] = None
        self.loan: Optional[Loan] = None  # while it waits for others (E16)
        self._delivery = delivery
        self._place = place
        self._argument = argument  # what the handler takes, or a coroutine that it has given already
        self._then = then
        self._reported = threading.Lock()

    @property
    def delivery(self) -> Delivery:
        """What it handles."""
        return self._delivery

    @property
    def party(self) -> Party:
        """Who must go on for it to end."""
        return self.task or self.loop

    @property
    def lane(self) -> Optional[Lane]:
        """The lane that waits for it; None for one that runs beside the others."""
        return None if self.subscription.concurrent else self._delivery.lane

    def start(self) -> None:
        """On the loop."""
        Context().run(self._start)

    def _start(self) -> None:
        CAUSE.set(self._delivery)
        if inspect.iscoroutine(self._argument):
            coroutine = self._argument
        elif not self.subscription.may_start():
            return self.skip()
        else:
            try:
                coroutine = self.subscription.handler(self._argument)
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
            if self.task is None and inspect.iscoroutine(self._argument):
                self._argument.close()  # its loop is closed: it will never run
            bus = self._delivery.bus
            bus.away.discard(self)
            bus.record(self._delivery, self.subscription, self._place, result, error)
            if self.loan is not None and self.lane is not None:
                self.lane.reclaim(self.loan)
            else:
                self._then()

    def skip(self) -> None:
        """It was cancelled before it began."""
        if self._reported.acquire(False):
            self._delivery.bus.away.discard(self)
            self._then()


def _by_place(outcome: Outcome) -> int:
    return outcome[0]


def name_of(handler: Any) -> str:
    """What to call a handler."""
    try:
        name = getattr(handler, "__qualname__", None) or getattr(handler, "__name__", None)
        return str(name) if name else repr(handler)
    except Exception:
        return f"a {type(handler).__name__}"
