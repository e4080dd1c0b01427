"""The free path of an event: from `emit` into its lane, and from there to its handler, without a mutex.

The product's other hottest path, beside `_quick.py`, and as flat on purpose: each call and each attribute looked up
within shows in the figures. What is rare is a method of the bus.
"""

from __future__ import annotations

from collections import deque
from contextvars import Context
from itertools import repeat
from typing import Any, Callable, Optional, Protocol

from ._lanes import AWAY, EMPTY, ENOUGH, Cause, Deliverer, Delivery, Details, Lane, Loan, Route, Subscription
from ._owner import TASKS, task_loop
from .events import CAUSE

Emit = Callable[..., Delivery]

BEGUN: list[Any] = []
"""The outcomes of a delivery that has just begun."""

NOTHING = ((1, None, None),)
"""What most deliveries hold in the end."""

_TURNS_BEFORE_OTHERS = 64
_why = CAUSE.get


class Traffic(Deliverer, Protocol):
    """The bus: where everything goes that is not plain."""

    live: set[Delivery]
    odd: list[str]
    max_pending: int
    routes: dict[str, Route]

    def find_route(self, name: str) -> Route: ...

    def own_cause(self, cause: Any) -> Optional[Cause]: ...

    def lane_of(self, cause: Optional[Cause]) -> Lane: ...

    def lane_for(self, name: str, cause: Optional[Cause], lane: Optional[Lane] = None) -> Lane: ...

    def make_room(self, delivery: Delivery) -> None: ...

    def tell_expecting(self, delivery: Delivery) -> None: ...

    def repair(self, delivery: Delivery) -> None: ...

    def skips(self, delivery: Delivery) -> bool: ...

    def finish(self, delivery: Delivery) -> None: ...

    def has_raised(self, delivery: Delivery, sub: Subscription, place: int, error: BaseException) -> None: ...

    def has_returned(
        self, delivery: Delivery, sub: Subscription, place: int, result: Any, then: Optional[Callable[[], None]]
    ) -> bool: ...


def make_emit(bus: Traffic, outside: Any) -> tuple[Emit, Emit]:  # noqa: PLR0915  (closures, flat on purpose)
    """Closures, since every attribute looked up on this path shows in the figures."""
    now = bus.clock.time
    routes = bus.routes
    live = bus.live
    submit = bus.workers.submit

    def emit(name: str, data: Any = None, *, sender: Optional[str] = None) -> Delivery:
        """Send an event on its way; never waits for a handler (E4)."""
        try:
            route = routes[name]
        except (KeyError, TypeError):
            route = None
        if route is None:  # a new name, one that can't be hashed, or somebody expects events
            return emit_in(name, data, sender, bus.own_cause(_why()), None)
        delivery = Delivery()
        delivery.route = route
        delivery.data = data
        delivery.sender = sender
        delivery.time = now()
        delivery.serial = None
        cause = _why()
        if cause is None:
            delivery.details = None
        else:
            cause = bus.own_cause(cause)
            delivery.details = Details(cause)
        if route.heard:
            if cause is not None or (TASKS and task_loop() is not None):
                lane = bus.lane_for(name, cause)
            else:
                try:
                    lane = outside.lane
                except AttributeError:
                    lane = bus.lane_of(None)
            delivery.lane = lane
            delivery.outcomes = None
            try:
                live.add(delivery)
                if len(live) > bus.max_pending:
                    bus.make_room(delivery)
                lane.queue.append(delivery)
                if not lane.scheduled:
                    lane.scheduled = True
                    submit(lane.run)
            except BaseException:  # Ctrl-C, at any of these steps
                bus.repair(delivery)
                raise
        return delivery

    def emit_in(name: str, data: Any, sender: Optional[str], cause: Optional[Cause], lane: Optional[Lane]) -> Delivery:
        """The same, where it is known what causes the event, and into which lane it belongs."""
        delivery = Delivery()
        route = delivery.route = bus.find_route(name)
        delivery.data = data
        delivery.sender = sender
        delivery.time = now()
        delivery.serial = None
        delivery.details = Details(cause)
        if not route.heard:
            bus.tell_expecting(delivery)
            return delivery
        lane = delivery.lane = bus.lane_for(name, cause, lane)
        delivery.outcomes = None
        try:
            live.add(delivery)
            if len(live) > bus.max_pending:
                bus.make_room(delivery)
            bus.tell_expecting(delivery)
            lane.queue.append(delivery)
            if not lane.scheduled:
                lane.scheduled = True
                submit(lane.run)
        except BaseException:  # Ctrl-C, at any of these steps
            bus.repair(delivery)
            raise
        return delivery

    return emit, emit_in


def make_deliver(bus: Traffic) -> Callable[[deque[Delivery], deque[Loan], Context], int]:
    """The other half of the hot path: also a closure, and flat, for most handlers of most events."""
    cause = CAUSE.set
    handle = bus.handle
    forget = bus.live.discard
    bells = bus.bells
    odd = bus.odd
    skips = bus.skips

    def deliver(queue: deque[Delivery], returning: deque[Loan], context: Context) -> int:  # noqa: PLR0912
        """Deliver what a lane holds, one after another, in a context made for that; tell why it has paused.

        Each handler finds a context that says why it is called, and nothing else (E12): so as soon as one has left
        something in it, another is to be made.
        """
        take = queue.popleft
        for _ in repeat(None, _TURNS_BEFORE_OTHERS):
            if returning:
                return ENOUGH
            try:
                delivery = take()
            except IndexError:
                return EMPTY
            if odd and skips(delivery):
                continue
            sub = delivery.route.sole
            if sub is None or not sub.active:
                if not handle(delivery, 0):
                    return AWAY
                continue
            handler = sub.handler  # first, since Python is slower at calling what is no method as one
            delivery.outcomes = BEGUN
            cause(delivery)
            try:
                result = handler(delivery.data)
            except BaseException as error:
                bus.has_raised(delivery, sub, 1, error)
                bus.finish(delivery)
            else:
                if result is None:  # most handlers of most events
                    delivery.outcomes = NOTHING
                    if bells:
                        delivery.ring()
                    forget(delivery)
                elif bus.has_returned(delivery, sub, 1, result, None):
                    bus.finish(delivery)
                else:
                    return AWAY
            if len(context) != 1:
                return ENOUGH
        return ENOUGH

    return deliver


def keeping(emit: Emit, emit_in: Emit, keep: Callable[[Delivery], None]) -> tuple[Emit, Emit]:
    """Both ways to emit where there is a store; where there is none, nothing of this is on the way."""

    def emit_and_keep(name: str, data: Any = None, *, sender: Optional[str] = None) -> Delivery:
        """Send an event on its way, and have it written down; never waits for a handler or a store (E4, S1)."""
        delivery = emit(name, data, sender=sender)
        keep(delivery)
        return delivery

    def emit_in_and_keep(
        name: str, data: Any, sender: Optional[str], cause: Optional[Cause], lane: Optional[Lane]
    ) -> Delivery:
        """The same, where it is known what causes the event, and into which lane it belongs."""
        delivery = emit_in(name, data, sender, cause, lane)
        keep(delivery)
        return delivery

    return emit_and_keep, emit_in_and_keep
