"""Puts the parts together: a `Coordinator` owns one lock table and one event bus."""

from __future__ import annotations

import functools
from asyncio import AbstractEventLoop
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from contextvars import copy_context
from copy import copy
from types import TracebackType
from typing import TYPE_CHECKING, Any, Callable, Optional, TypeVar, Union, cast, overload

import attrs

from . import agents
from ._clock import Clock, check_timeout
from ._lanes import Delivery, Handler, Subscription
from ._owner import current_owner, in_words
from ._places import PLAIN, How, Slot
from ._table import LockTable
from ._workers import OwnLoop, Workers, forget_after_fork
from .agents import LockSpec
from .bus import Bus, RunBlock
from .deadlock import LimitInfo, LockInfo, age, at, explain_locks, explain_waits
from .dependencies import AgentInfo, Dependencies, explain_agents
from .errors import ClosedError, CoordinationTimeoutError, NotHeldError, check_amount
from .events import Event
from .events import check_name as check_event_name
from .joins import AllOf, AnyOf, JoinInfo, Names
from .limits import Limit
from .locks import Lock, LockGroup, by_name, check_name
from .state import State, StateTable
from .waiting import Expected

if TYPE_CHECKING:
    from .stores import Store
    from .stores.writer import Writer

F = TypeVar("F", bound=Callable[..., Any])

_HANDLES_KEPT = 1024
_JOINS_SHOWN = 10
WORKERS = 16
MAX_PENDING = 1_000_000
MAX_DEPTH = 1000
MAX_JOINS = 10_000
MAX_PAYLOAD = 64 * 1024
FLUSH_TIMEOUT = 5.0


@attrs.frozen(kw_only=True)
class Counts:
    """What has gone wrong so far, in numbers (E3, E5).

    Attributes:
        handlers_failed: calls of handlers that raised.
        events_refused: lifecycle events that could not be queued.
        joins_dropped: unfinished sets of `all_of` that were given up, because there were too many (E13).
        events_stored: events that the store has taken; 0 without a store (S1).
        events_dropped: events that were lost on the way to the store (S2).
    """

    handlers_failed: int
    events_refused: int
    joins_dropped: int
    events_stored: int = 0
    events_dropped: int = 0


@attrs.frozen(kw_only=True)
class Snapshot:
    """The state of a coordinator at one moment, frozen (L11).

    Attributes:
        locks: every lock that is held or waited for, by name.
        limits: every name with a limit: what it allows, and what is used.
        agents: every running agent that others come after, or that comes after others (A5).
        joins: every set of `all_of` that is not full yet.
        pending: how many events are queued or being delivered.
        counts: what has gone wrong so far.
    """

    locks: tuple[LockInfo, ...]
    limits: tuple[LimitInfo, ...]
    agents: tuple[AgentInfo, ...]
    joins: tuple[JoinInfo, ...]
    pending: int
    counts: Counts

    def as_dict(self) -> dict[str, Any]:
        """The same in dicts, tuples, texts and numbers: for `json.dumps`, and dashboards of your own."""
        return attrs.asdict(self)


class Coordinator:
    """Named locks, events and coordinated agents that belong together. Two coordinators share nothing (L1).

    >>> with Coordinator() as coord:
    ...     @coord.coordinate("researcher", lock_name="openai_api")
    ...     def research(topic):
    ...         return f"all about {topic}"
    ...
    ...     @coord.on("researcher_complete")
    ...     def analyse(data):
    ...         print(data["result"])
    ...
    ...     _ = research("bees")
    all about bees

    Args:
        name: how its threads are called.
        workers: how many handlers may run at once; sync ones on as many threads, made when needed (E2, E8).
        lock_timeout: how long whoever names no timeout waits for a lock, in seconds; None waits (L4).
        max_pending: how many events may be queued or being delivered; beyond that `emit` raises (E5).
        max_depth: how many handlers may have caused one another; beyond that `emit` raises and shows the loop (E11).
        max_joins: how many unfinished sets of `all_of` are kept; beyond that the oldest is dropped, and told of (E13).
        slow_after: after how many seconds a wait for a lock logs one warning that explains it; None: never (L12).
        exit_timeout: how long the end of the process waits for pending events, in seconds; None: for all (E6).
        store: where every event is written down: a URL as for `agentdiff.stores.open_store`, or a store (S1).
        flush_timeout: how long `close` and the end of the process wait for the store, in seconds; None: for ever (E6).
        redact: names of keys, fields and parameters whose values are masked in the store, at any depth (S4).
        max_payload: how many bytes of an event's data are stored; what is longer is cut (S4).
        clock: another source of time, for tests.

    Raises:
        TypeError, ValueError: an argument that makes no sense.
        StoreError: the store can't be opened.
    """

    def __init__(
        self,
        *,
        name: str = "agentdiff",
        workers: int = WORKERS,
        lock_timeout: Optional[float] = None,
        max_pending: int = MAX_PENDING,
        max_depth: int = MAX_DEPTH,
        max_joins: int = MAX_JOINS,
        slow_after: Optional[float] = 30.0,
        exit_timeout: Optional[float] = None,
        store: Union[str, Store, None] = None,
        flush_timeout: Optional[float] = FLUSH_TIMEOUT,
        redact: Sequence[str] = (),
        max_payload: int = MAX_PAYLOAD,
        clock: Optional[Clock] = None,
    ) -> None:
        if not isinstance(name, str):
            raise TypeError(f"name must be a string, not {name!r}")
        self.name = name
        clock = clock or Clock()
        self._table = LockTable(clock, check_timeout(lock_timeout), check_timeout(slow_after))
        self._bus = Bus(
            clock,
            workers=self._make_workers(name, _at_least_one("workers", workers)),
            loop=self._make_loop(name),
            graph=self._table,
            max_pending=_at_least_one("max_pending", max_pending),
            max_depth=_at_least_one("max_depth", max_depth),
            max_joins=_at_least_one("max_joins", max_joins),
            exit_timeout=check_timeout(exit_timeout),
        )
        self._dependencies = Dependencies(clock, self._table, self._bus.is_going_on)
        self._bus.end_of_run = self._dependencies.sweep
        self._values = StateTable(clock, self._bus.run_here)
        self._handles: dict[str, Lock] = {}
        if type(self).lock is Coordinator.lock:  # by a copy: who refers to itself goes only with a collection
            self.lock = by_name(self._handles, copy(self).lock)  # type: ignore[method-assign]
        self._clock = clock
        self._writer: Optional[Writer] = None
        self._store: Union[str, Store, None] = None
        self._store_settings: dict[str, Any] = {
            "flush_timeout": check_timeout(flush_timeout),
            "redact": redact,
            "max_payload": max_payload,
        }
        self._set_store(store)
        self._shorten()
        forget_after_fork(self)

    _make_workers: type[Workers] = Workers
    _make_loop: type[OwnLoop] = OwnLoop

    def __repr__(self) -> str:
        return f"<{type(self).__name__} {self.name!r}{' closed' if self._bus.closed else ''}>"

    def _change_store(self, store: Any, settings: dict[str, Any]) -> None:
        old, before = self._writer, self._store_settings
        if store is ...:
            store = self._store
        if "flush_timeout" in settings:
            settings["flush_timeout"] = check_timeout(settings["flush_timeout"])
        self._store_settings = {**before, **settings}
        try:
            self._set_store(store)
        except BaseException:
            self._store_settings = before
            raise
        self._shorten()
        if old is not None:
            old.stop()

    def _set_store(self, store: Union[str, Store, None]) -> None:
        if store is None:
            self._bus.give_to(None)
            self._writer = self._store = None
            return
        from ._recording import start_writing

        self._writer = start_writing(self._bus, self._clock, store, name=self.name, **self._store_settings)
        self._store = store

    # -- locks ------------------------------------------------------------------------------------------

    @overload
    def lock(self, name: str, *, timeout: Any = ..., lend: bool = True, tokens: float = 0) -> Lock: ...

    @overload
    def lock(
        self, name: str, second: str, /, *more: str, timeout: Any = ..., lend: bool = True, tokens: float = 0
    ) -> LockGroup: ...

    def lock(
        self, name: str, *more: str, timeout: Any = ..., lend: bool = True, tokens: float = 0
    ) -> Union[Lock, LockGroup]:
        """A handle to the lock of this name, or to several: all or none (L6, L10).

        Args:
            name: a non-empty string.
            more: others; a name given twice counts once.
            timeout: how long `with` waits, in seconds: None waits, 0 tries once; left out: the coordinator's
                `lock_timeout`.
            lend: whether what the holder starts while holding may enter too, one at a time (L2).
            tokens: how many the call will need at most; reserved where the name has a limit of tokens (R3).

        Raises:
            TypeError, ValueError: no string, an empty one, or a timeout or number of tokens that makes no sense.
            ClosedError: the coordinator has been closed.
        """
        if self._bus.closed:
            raise ClosedError(f"{self!r} gives no more locks")
        check_name(name)
        if timeout is not ...:
            timeout = check_timeout(timeout)
        how = PLAIN
        if timeout is not ... or not lend or tokens:
            how = How(timeout=timeout, lend=lend, tokens=check_amount("tokens", tokens))
        if more:
            return LockGroup(self._table, (name, *map(check_name, more)), how)
        if how is not PLAIN:
            return Lock(self._table, name, how)
        handle = self._handles.get(name)
        if handle is None:
            if len(self._handles) >= _HANDLES_KEPT:
                self._handles.clear()
            handle = self._handles[name] = Lock(self._table, name)
        return handle

    def limit(
        self,
        name: str,
        *,
        concurrency: Optional[int] = None,
        requests: Optional[int] = None,
        tokens: Optional[int] = None,
        per: float = 60.0,
        margin: float = 0.1,
    ) -> None:
        """Say what a name allows; `coord.lock(name)` and `lock_name=name` obey it from now on (R1, R2).

        Without `concurrency` any number may be inside at once. Said again, it takes effect at once, for those who wait
        too; what has been used before still counts.

        Args:
            name: the lock's name.
            concurrency: how many may be inside at once.
            requests: how many may enter in any `per` seconds (providers call it RPM, where `per` is 60).
            tokens: how many tokens they may use in any `per` seconds (TPM): see `coord.lock(name, tokens=...)`.
            per: the window, in seconds.
            margin: seconds by which the window is kept longer, for calls that reach the server sooner or later than
                they were sent. An exact window still earns refusals; jitter beyond the margin is not covered.

        Raises:
            TypeError, ValueError: what can't be a limit (R5).
        """
        self._table.limit(check_name(name), Limit(concurrency, requests, tokens, per, margin))

    def state(self, name: str, *, default: Any = None) -> State:
        """A handle to the shared value of this name: `read`, `write` with a version, `update` (W1, W2).

        Args:
            name: a non-empty string; `update` takes the lock of the same name.
            default: what `read` gives as long as nobody has written.
        """
        return State(self._values, check_name(name), self.lock(name), default)

    def slot(self, name: str) -> Slot:
        """The slot by which the caller is inside this name: for `commit` and `throttled` within an agent (R3, R4).

        Args:
            name: the lock's name.

        Raises:
            NotHeldError: the calling thread or task is not inside.
        """
        me = current_owner()
        slot = self._table.innermost(check_name(name), me)
        if slot is None:
            raise NotHeldError(f"{in_words(me)} is not inside {name!r}", name=name)
        return slot

    # -- events -----------------------------------------------------------------------------------------

    @overload
    def on(
        self,
        name: Names,
        handler: None = ...,
        *,
        loop: Optional[AbstractEventLoop] = ...,
        pass_event: bool = ...,
        concurrent: bool = ...,
        once: bool = ...,
        timeout: Optional[float] = ...,
    ) -> Callable[[F], F]: ...

    @overload
    def on(
        self,
        name: Names,
        handler: Handler,
        *,
        loop: Optional[AbstractEventLoop] = ...,
        pass_event: bool = ...,
        concurrent: bool = ...,
        once: bool = ...,
        timeout: Optional[float] = ...,
    ) -> Subscription: ...

    def on(
        self,
        name: Names,
        handler: Optional[Handler] = None,
        *,
        loop: Optional[AbstractEventLoop] = None,
        pass_event: bool = False,
        concurrent: bool = False,
        once: bool = False,
        timeout: Optional[float] = None,
    ) -> Union[Subscription, Callable[[F], F]]:
        """Have a handler called for each event of this name: a decorator, or a call that gives a `Subscription`.

        Args:
            name: the event's name; `*` stands for any characters, `?` for any one (E9). Or several:
                `any_of("a", "b")` for each of them, `all_of("a", "b")` for each full set within a run (E13).
            handler: takes the event's data; for `all_of` a dict from name to data. Sync handlers run on worker
                threads, async ones on a loop (E8).
            loop: where an async handler runs; else the loop that runs now, else one of the coordinator's own.
            pass_event: give the handler the whole `Event` (E14).
            concurrent: later handlers and events don't wait for this one (E1). Not for `all_of`.
            once: called for one event only, or one set, and then cancelled (E10).
            timeout: for `all_of`: after how many seconds a set that is not full is given up, and told of by an event
                `join_timeout`; None: it is kept.

        Returns:
            The subscription; as a decorator, the function itself.

        Raises:
            TypeError, ValueError: no name, or a handler that can't be called with one argument.
            ClosedError: the coordinator has been closed.
        """
        bus = self._bus
        if not isinstance(name, (AllOf, AnyOf)):
            check_event_name(name)
        if isinstance(name, AllOf):
            timeout = check_timeout(timeout)
            if concurrent:
                raise ValueError("concurrent makes no sense for all_of: its events are sorted in the order of coming")
        elif timeout is not None:
            raise ValueError("timeout is for all_of: how long an unfinished set is kept")

        def subscribe(function: Handler) -> Subscription:
            if isinstance(name, AllOf):
                return bus.subscribe_all(name, function, loop=loop, pass_event=pass_event, once=once, timeout=timeout)
            names = name.names if isinstance(name, AnyOf) else (name,)
            return bus.subscribe(names, function, loop=loop, pass_event=pass_event, concurrent=concurrent, once=once)

        if handler is not None:
            return subscribe(handler)

        def decorate(function: F) -> F:
            subscribe(function)
            return function

        return decorate

    def emit(self, name: str, data: Any = None, *, sender: Optional[str] = None) -> Delivery:
        """Send an event to those who are subscribed now; never waits for them (E4).

        Args:
            name: a non-empty string.
            data: anything; handlers get this very object (E14).
            sender: who says so, for those who look at the whole event.

        Returns:
            The delivery: it can be waited for, and holds results and errors.

        Raises:
            QueueFullError: `max_pending` events are pending (E5).
            ClosedError: the coordinator has been closed.
            TypeError, ValueError: the name is no string, or empty.
        """
        return self._bus.emit(name, data, sender=sender)

    def expect(self, name: str) -> Expected:
        """A block that begins to wait for an event before something is done that causes it, so that none slips through.

        `with coord.expect("answer") as expected: ask(); event = expected.wait(timeout=10)`: the first event of this
        name since the block began, ahead of its handlers (E15).

        Args:
            name: the event's name, or a pattern.
        """
        return Expected(self._bus, name)

    def wait_for(self, name: str, timeout: Optional[float] = None) -> Event:
        """Block this thread until the next event of this name is emitted (E15); in a handler, others go on (E16).

        Args:
            name: the event's name, or a pattern.
            timeout: seconds; None waits.

        Returns:
            The event.

        Raises:
            CoordinationTimeoutError: it did not come in time.
            ClosedError: the coordinator has been closed meanwhile.
            DeadlockError: nobody is left who could emit it: the process is ending (E6).
        """
        with self.expect(name) as expected:
            return expected.wait(timeout)

    async def wait_for_async(self, name: str, timeout: Optional[float] = None) -> Event:
        """`wait_for` on a loop, which goes on meanwhile (E15)."""
        with self.expect(name) as expected:
            return await expected.wait_async(timeout)

    def run(self, id: Optional[str] = None) -> RunBlock:
        """A block whose events belong to one run, and so are delivered one at a time in emit order (E2, E12).

        Args:
            id: the run's name; an id entered again continues that run. None makes a new one.
        """
        return RunBlock(self._bus, id)

    # -- agents -----------------------------------------------------------------------------------------

    def coordinate(
        self,
        name: str,
        lock_name: LockSpec = None,
        *,
        timeout: Any = ...,
        after: Union[str, Sequence[str]] = (),
        tokens: Union[float, Callable[..., float]] = 0,
        throttle_on: Union[type[BaseException], tuple[type[BaseException], ...]] = (),
        control_flow: Union[type[BaseException], tuple[type[BaseException], ...]] = (),
        collect: Optional[Callable[[list[Any]], Any]] = None,
    ) -> Callable[[F], F]:
        """Make a function an agent: it holds its lock while it runs, and tells its life as events (A1, A2, A3).

        Works on functions, coroutine functions, generators, async generators, methods, partials and callable
        instances. Events: `{name}_started`, then one of `{name}_complete`, `{name}_failed`, `{name}_cancelled`.

        Args:
            name: the agent's name.
            lock_name: a lock's name, a template over the call's arguments (`"customer_{customer_id}"`), a list of
                those, or a function of the call's arguments (A4).
            timeout: how long to wait for the lock, in seconds; left out: the coordinator's `lock_timeout` (L4).
            after: the names of agents that must have completed in this run before it starts: it waits, on its thread or
                its loop, for `timeout` seconds at most (A5).
            tokens: how many tokens a call will need at most: a number, or a function of the call's arguments (R3).
            throttle_on: exception types by which the API says "too many requests", such as `openai.RateLimitError`:
                everyone on the agent's lock waits for as long as the error's response says in `retry-after-ms` or
                `retry-after`, else one second (R4). The call itself is not repeated.
            control_flow: exception types that mean "interrupted" and not "failed" (A2).
            collect: makes a generator's `result` of the list of its items, such as `"".join`; else it is their number.

        Returns:
            A decorator: what it makes of a function is of the same kind, and looks the same.

        Raises:
            TypeError, ValueError: on decorating: what is no function, or a template that names no parameter.
            CoordinationTimeoutError: on calling: the lock was not free in time, or an agent in `after` not complete.
            DeadlockError: on calling: the wait for a lock, or for an agent in `after`, could never end (L5, A5).
            DependencyFailedError: on calling: an agent in `after` has failed in this run, or was cancelled.
        """

        def agent() -> agents.Agent:
            return agents.make_agent(
                self._table,
                self._bus,
                name,
                timeout=timeout,
                dependencies=self._dependencies,
                after=after,
                tokens=tokens,
                throttle_on=throttle_on,
                control_flow=control_flow,
                collect=collect,
            )

        agent()  # what makes no sense is refused here, not when the decorator is applied

        def decorate(function: F) -> F:
            made = agent()
            self._bus.be_noticed(self._dependencies.named, made.after)
            self._dependencies.declare(name, made.after)
            return agents.coordinate(made, lock_name, function)

        return decorate

    # -- looking ----------------------------------------------------------------------------------------

    def snapshot(self) -> Snapshot:
        """The state at this moment: who holds what since when, who waits (L11)."""
        return Snapshot(
            locks=self._table.snapshot(),
            limits=self._table.limits(),
            agents=self._dependencies.snapshot(),
            joins=self._bus.joins.snapshot(),
            pending=self._bus.pending,
            counts=Counts(
                handlers_failed=self._bus.failed,
                events_refused=self._bus.refused,
                joins_dropped=self._bus.joins.dropped,
                events_stored=self._writer.stored if self._writer is not None else 0,
                events_dropped=self._writer.dropped if self._writer is not None else 0,
            ),
        )

    def explain(self) -> str:
        """Why is everything standing still? Who waits for whom, for how long, where in the code, what to do (L11)."""
        snapshot = self.snapshot()
        told = [explain_locks(snapshot.locks, snapshot.limits)] if any(lock.waiters for lock in snapshot.locks) else []
        told += [
            f"Lock {lock.name!r} is held by {holder.who}, which has ended without releasing. Nobody waits for it yet."
            for lock in snapshot.locks
            for holder in lock.holders
            if holder.orphaned and not lock.waiters
        ]
        told += explain_agents(snapshot.agents)
        told += explain_waits(self._table.other_waits(), self._clock.monotonic())
        told += [
            f"{join.join}{f' in run {join.run!r}' if join.run is not None else ''} has waited for "
            f"{age(join.waiting_for)} for {', '.join(map(repr, join.missing))}; {', '.join(map(repr, join.came))} came."
            for join in snapshot.joins[:_JOINS_SHOWN]
        ]
        if len(snapshot.joins) > _JOINS_SHOWN:
            told.append(f"{len(snapshot.joins) - _JOINS_SHOWN} more sets of events are not full yet.")
        if snapshot.pending:
            told.append(f"{snapshot.pending} event(s) are queued or being handled.")
        return "\n\n".join(told) or "Nobody waits for a lock, and no event is pending."

    def carry(self, function: F) -> F:
        """Take this context along where it would be lost: its run, and the locks that may be borrowed (L2, E12).

        `loop.run_in_executor(pool, coord.carry(fn))` runs `fn` in a copy of the context of the call to `carry`;
        `asyncio.to_thread` does so by itself.

        Raises:
            TypeError: what is given can't be called.
        """
        if not callable(function):
            raise TypeError(f"carry takes a function, not {function!r}")
        context = copy_context()

        @functools.wraps(function)
        def carried(*args: Any, **kwargs: Any) -> Any:
            return context.copy().run(function, *args, **kwargs)

        agents.keep_types(carried, function)
        return cast(F, carried)

    def leaks(self, timeout: float = 1.0) -> tuple[str, ...]:
        """What is still going on that a finished piece of work leaves behind, in words: for tests (T1).

        Args:
            timeout: how long to wait for events that are being handled, in seconds.

        Returns:
            A sentence for each lock that is held or waited for, for events that are not handled, for each set of events
            that is not full, and for each agent that still waits for others.
        """
        with suppress(CoordinationTimeoutError):
            self.join(timeout)
        snapshot = self.snapshot()
        found = [
            f"lock {lock.name!r} is still held by {holder.who}, for {age(holder.held_for)}{at(holder.where)}"
            for lock in snapshot.locks
            for holder in lock.holders
        ]
        found += [
            f"{waiter.who} still waits for lock {lock.name!r}{at(waiter.where)}"
            for lock in snapshot.locks
            for waiter in lock.waiters
        ]
        if snapshot.pending:
            found.append(f"{snapshot.pending} event(s) are not handled: {', '.join(self._bus.pending_names())}")
        found += [f"{join.join} still waits for {', '.join(map(repr, join.missing))}" for join in snapshot.joins]
        found += [
            f"agent {agent.name!r} ({agent.who}) still waits for {', '.join(map(repr, agent.waits_for))}"
            for agent in snapshot.agents
            if agent.waits_for
        ]
        return tuple(found)

    @contextmanager
    def isolated(self) -> Iterator[Coordinator]:
        """A block that begins with nothing going on, and after which all is as before: for tests (T1).

        What has been registered and declared before is there inside; what is registered, declared, written inside is
        gone afterwards.
        """
        subs, limits, values = self._bus.subscriptions(), self._table.declared(), self._values.copy()
        agents_declared = self._dependencies.copy()
        self._forget_work()
        try:
            yield self
        finally:
            for sub in self._bus.subscriptions() - subs:
                sub.cancel()
            self._forget_work()
            for name in self._table.declared():
                self._table.unlimit(name)
            for name, limit in limits.items():
                self._table.limit(name, limit)
            self._values.restore(values)
            self._dependencies.restore(agents_declared)

    def _forget_work(self) -> None:
        self._table.forget()
        self._bus.forget_work()
        self._dependencies.forget()

    # -- the end ----------------------------------------------------------------------------------------

    def forget(self) -> None:
        """After a fork: the child has the subscriptions and settings, and nothing else (L13)."""
        self._table.forget(forked=True)
        self._values.forget()
        self._dependencies.forget()
        self._bus.forget()
        if self._writer is not None:
            self._writer.forget()
        self._shorten()

    def _shorten(self) -> None:
        if type(self).emit is Coordinator.emit:
            self.emit = self._bus.emit  # type: ignore[method-assign]  # the same without a call in between

    def join(self, timeout: Optional[float] = None, *, run: Optional[str] = None) -> None:
        """Wait until every event is handled, with all that the handlers emit (E7).

        Args:
            timeout: seconds; None waits.
            run: the id of a run: wait for its events only.

        Raises:
            CoordinationTimeoutError: it took longer.
            DeadlockError: called in a handler.
        """
        self._bus.join(check_timeout(timeout), run)

    async def join_async(self, timeout: Optional[float] = None, *, run: Optional[str] = None) -> None:
        """`join` on a loop, which goes on meanwhile (E7)."""
        await self._bus.join_async(check_timeout(timeout), run)

    def flush(self, timeout: Any = ...) -> None:
        """Wait until every event emitted so far is in the store; without a store: nothing (S1).

        Args:
            timeout: seconds; None waits; left out: `flush_timeout`.

        Raises:
            CoordinationTimeoutError: the store did not take them in time.
        """
        writer = self._writer
        seconds = self._store_settings["flush_timeout"] if timeout is ... else check_timeout(timeout)
        if writer is not None and not writer.flush(seconds):
            raise CoordinationTimeoutError(
                f"{writer.store} has not taken every event within {seconds:g} s", name="flush", timeout=seconds
            )

    def close(self) -> None:
        """Wait until every event is handled, then refuse new ones and end the threads (E7). Again: nothing.

        Raises:
            DeadlockError: called in a handler.
        """
        if not self._bus.closed:
            self._bus.join()
            self._shut()
            if self._writer is not None:
                self._writer.stop()

    async def close_async(self) -> None:
        """`close` on a loop, which goes on meanwhile (E7)."""
        if not self._bus.closed:
            await self._bus.join_async()
            self._shut()
            if self._writer is not None:
                await self._writer.stop_async()

    def _shut(self) -> None:
        self._handles.clear()
        self._bus.close()
        self._bus.stop()

    def quit(self, why: str = "the coordinator was told to quit") -> None:
        """Refuse new events, and deliver nothing of what is queued; what runs may finish. Waits for nobody.

        Args:
            why: what the log says about events that are abandoned.
        """
        self._handles.clear()
        self._bus.quit(why)
        if self._writer is not None:
            self._writer.end()

    def __enter__(self) -> Coordinator:
        return self

    def __exit__(
        self, kind: Optional[type[BaseException]], error: Optional[BaseException], trace: Optional[TracebackType]
    ) -> None:
        if error is None or isinstance(error, Exception):
            self.close()
        else:
            self.quit("its block was left by an interrupt")

    async def __aenter__(self) -> Coordinator:
        return self

    async def __aexit__(
        self, kind: Optional[type[BaseException]], error: Optional[BaseException], trace: Optional[TracebackType]
    ) -> None:
        if error is None or isinstance(error, Exception):
            await self.close_async()
        else:
            self.quit("its block was left by an interrupt")

    def configure(
        self,
        *,
        workers: Optional[int] = None,
        lock_timeout: Any = ...,
        max_pending: Optional[int] = None,
        exit_timeout: Any = ...,
        store: Any = ...,
        flush_timeout: Any = ...,
        redact: Any = ...,
        max_payload: Any = ...,
    ) -> None:
        """Change settings in place; what is registered stays registered (F3). What is left out stays as it is.

        The arguments are those of `Coordinator`. Of a store: what has been emitted before goes to the old one, for
        which this waits `flush_timeout` at most.

        Raises:
            TypeError, ValueError: an argument that makes no sense.
            StoreError: the store can't be opened; the old one stays.
        """
        about_store = {"flush_timeout": flush_timeout, "redact": redact, "max_payload": max_payload}
        checked = check_timeout(lock_timeout) if lock_timeout is not ... else self._table.timeout
        checked_exit = check_timeout(exit_timeout) if exit_timeout is not ... else self._bus.exit_timeout
        self._bus.resize(
            None if workers is None else _at_least_one("workers", workers),
            None if max_pending is None else _at_least_one("max_pending", max_pending),
        )
        self._table.timeout = checked
        self._bus.exit_timeout = checked_exit
        given = {what: value for what, value in about_store.items() if value is not ...}
        if store is not ... or given:
            self._change_store(store, given)


def _at_least_one(what: str, number: Any) -> int:
    if isinstance(number, bool) or not isinstance(number, int):
        raise TypeError(f"{what} must be a whole number, not {number!r}")
    if number < 1:
        raise ValueError(f"{what} must be at least 1, not {number}")
    return number
