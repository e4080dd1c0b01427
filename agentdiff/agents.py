"""What stands behind `@coordinate`: one wrapper for each kind of function, and the life of one call.

A wrapper is a real function of the same kind as what it wraps. Where nobody listens to the agent's
events it does no more than take the lock and call; else a `_Call` tells each step of its life.
"""

from __future__ import annotations

import builtins
import functools
import inspect
import string
import sys
import types
from collections.abc import Mapping, Sequence
from contextlib import suppress
from types import AsyncGeneratorType, CodeType, CoroutineType, GeneratorType
from typing import Any, Callable, Optional, TypeVar, Union, cast

from ._clock import Clock, check_timeout
from ._lanes import Cause, Lane, cause_here
from ._log import about, logger
from ._owner import AGENT_CODES, HOLDS, GeneratorOwner, Owner, current_owner
from ._places import Door, How, Slot
from ._table import LockTable
from .bus import Bus
from .dependencies import Dependencies, Running
from .errors import check_amount, text_of
from .events import CAUSE
from .limits import retry_after
from .locks import check_name as check_lock_name

F = TypeVar("F", bound=Callable[..., Any])
LockNames = Callable[[tuple[Any, ...], dict[str, Any]], Sequence[str]]
LockSpec = Union[None, str, Sequence[str], Callable[..., Any]]

_LIVE = frozenset({CoroutineType, GeneratorType, AsyncGeneratorType})
_FRAMEWORK_METHODS = ("invoke", "ainvoke", "kickoff", "run")


class Agent:
    """One `@coordinate`d function: its name, what it locks, and whether anybody listens."""

    __slots__ = (
        "after",
        "bus",
        "cancelled",
        "clock",
        "collect",
        "complete",
        "control_flow",
        "dependencies",
        "failed",
        "name",
        "names_of",
        "started",
        "table",
        "throttle_on",
        "timeout_given",
        "tokens_of",
        "unheard_at",
    )  # fmt: skip

    def __init__(
        self,
        name: str,
        table: LockTable,
        bus: Bus,
        *,
        timeout: Any,
        tokens: Union[float, Callable[..., float]],
        dependencies: Dependencies,
        after: tuple[str, ...],
        throttle_on: tuple[type[BaseException], ...],
        control_flow: tuple[type[BaseException], ...],
        collect: Optional[Callable[[list[Any]], Any]],
    ) -> None:
        self.name: str = name
        self.tokens_of: Union[float, Callable[..., float]] = tokens
        self.dependencies: Dependencies = dependencies
        self.after: tuple[str, ...] = after
        self.throttle_on: tuple[type[BaseException], ...] = throttle_on
        self.timeout_given: Any = timeout
        self.control_flow: tuple[type[BaseException], ...] = control_flow
        self.collect: Optional[Callable[[list[Any]], Any]] = collect
        self.table: LockTable = table
        self.bus: Bus = bus
        self.clock: Clock = bus.clock
        self.names_of: Optional[LockNames] = None
        self.unheard_at: int = -1  # the version of the bus at which nobody listened to any of the four
        self.started: str = f"{name}_started"
        self.complete: str = f"{name}_complete"
        self.failed: str = f"{name}_failed"
        self.cancelled: str = f"{name}_cancelled"

    @property
    def timeout(self) -> Optional[float]:
        """How long it waits for its locks: what `@coordinate` said, else what the coordinator says."""
        return self.table.patience(self.timeout_given)

    def how(self, args: tuple[Any, ...], kwargs: dict[str, Any], counted: Mapping[str, Any]) -> How:
        """How a call with these arguments takes its locks: with so many tokens, if it hasn't been counted (R3)."""
        tokens = 0 if counted else self.tokens_of
        if callable(tokens):
            tokens = check_amount(f"what tokens= of agent {self.name!r} gives", tokens(*args, **kwargs))
        return How(self.timeout_given, self.name, tokens=tokens, counted=counted)

    def is_heard(self) -> bool:
        """Whether anybody listens to this agent, or waits for its end; asked again only when subscriptions change."""
        version = self.bus.version
        if version == self.unheard_at:
            return False
        if self.after or self.name in self.dependencies.named:
            return True
        if any(map(self.bus.hears, (self.started, self.complete, self.failed, self.cancelled))):
            return True
        self.unheard_at = version
        return False


class _Call:
    """One call of an agent, from `_started` to its end (A2). Nothing here raises into the agent (A3), but `enter`.

    `tell` is False for a call that is told of only because it had not ended when somebody began to listen.
    """

    __slots__ = (
        "agent", "args", "asked", "before", "begun", "cause", "counted", "heard", "inner", "kwargs", "lane", "names",
        "over", "owner", "ready", "running", "slots", "waited",
    )  # fmt: skip

    def __init__(self, agent: Agent, args: tuple[Any, ...], kwargs: dict[str, Any], tell: bool = True) -> None:
        self.agent = agent
        self.args = args
        self.kwargs = kwargs
        self.slots: Sequence[Slot] = ()
        self.owner: Optional[Owner] = None
        self.names: Optional[Sequence[str]] = None  # of its locks, once known
        self.counted: dict[str, Any] = {}  # what it has cost under their limits, if it takes them again
        self.ready: Optional[float] = None  # when those that it comes after had completed
        self.asked: Optional[float] = None  # when it got in line
        self.waited: Optional[float] = None
        self.begun = agent.clock.monotonic() if tell else None
        self.cause: Optional[Cause] = None
        self.lane: Optional[Lane] = None
        self.before: Any = None  # the cause outside of the agent's own code
        self.inner: Any = None  # and the one inside
        self.over = False
        self.running: Optional[Running] = None  # if others come after it, or it after others
        self.heard = tell and agent.is_heard()
        if self.heard:
            self._tell_start()

    def _tell_start(self) -> None:
        agent = self.agent
        bus = agent.bus
        outer = bus.own_cause(cause_here())
        self.lane = bus.lane_of(outer)
        data = {"args": self.args, "kwargs": self.kwargs, "agent": agent.name, "timestamp": agent.clock.time()}
        if agent.after:
            data["after"] = agent.after
        elif agent.names_of is not None:
            with suppress(Exception):  # it is asked again where the lock is taken, and raises there, into the agent
                data["lock"] = self._locks()
        if agent.after or agent.name in agent.dependencies.named:
            self.running = agent.dependencies.begin(agent.name, self.lane.run_id, current_owner())
        started = bus.emit_lifecycle(agent.started, data, agent.name, outer, self.lane)
        if started is not None:
            self.cause = bus.call_cause(started)

    # -- the lock ---------------------------------------------------------------------------------------

    def _names(self) -> Sequence[str]:
        if self.names is None:
            self.names = () if self.agent.names_of is None else self.agent.names_of(self.args, self.kwargs)
        return self.names

    def _locks(self) -> Union[str, Sequence[str], None]:
        """How events say what it locks: one name, or several."""
        names = self._names()
        return names[0] if len(names) == 1 else tuple(names) or None

    def runs_on(self, owner: Owner) -> None:
        """Who must go on for this call to go on (L5)."""
        if self.running is not None:
            self.running.owner = owner

    def enter(self, owner: Optional[Owner] = None) -> None:
        """Wait for those that it comes after, then take the locks, on this thread."""
        agent = self.agent
        self.runs_on(current_owner())
        if agent.after and self.running is not None:
            agent.dependencies.wait(self.running, agent.after, agent.timeout)
            self.ready = agent.clock.monotonic()
        names = self._names()
        if names:
            self.owner = owner or current_owner()
            asked = self.asked = agent.clock.monotonic()
            how = agent.how(self.args, self.kwargs, self.counted)
            self._entered(*agent.table.acquire_all(names, how, self.owner, agent.timeout), asked)

    async def enter_async(self, owner: Optional[Owner] = None) -> None:
        """Wait for those that it comes after, then take the locks, on this loop."""
        agent = self.agent
        self.runs_on(current_owner())
        if agent.after and self.running is not None:
            await agent.dependencies.wait_async(self.running, agent.after, agent.timeout)
            self.ready = agent.clock.monotonic()
        names = self._names()
        if names:
            self.owner = owner or current_owner()
            asked = self.asked = agent.clock.monotonic()
            how = agent.how(self.args, self.kwargs, self.counted)
            self._entered(*await agent.table.acquire_all_async(names, how, self.owner, agent.timeout), asked)

    def _entered(self, slots: Sequence[Slot], missed: Optional[str], asked: float) -> None:
        self.waited = self.agent.clock.monotonic() - asked
        if missed is not None:
            raise self.agent.table.timeout_error(missed, self.agent.timeout or 0, current_owner())
        self.slots = slots

    def pause(self) -> None:
        """Release what it holds until what the function has returned begins to run; it has been counted (R1)."""
        self.counted = {slot.name: slot.charges[-1] for slot in self.slots if hasattr(slot, "charges")}
        self.leave()

    def leave(self, collected: bool = False) -> None:
        """Release what it holds. Not twice; and in a garbage collection without waiting for anybody."""
        slots, self.slots = self.slots, ()
        owner = self.owner
        if not slots or owner is None:
            return
        table = self.agent.table
        try:
            if collected or isinstance(owner, GeneratorOwner):
                for slot in reversed(slots):
                    table.free_collected(slot, owner)
            else:
                table.free_all(slots, owner)
        except Exception:
            logger.exception("the lock of agent %r could not be released", self.agent.name, extra=self.about())

    def throttle(self, error: Optional[BaseException]) -> None:
        """The API wants a pause, from everyone who would call it (R4): before the next one gets this call's place."""
        if error is None or not self.slots or not isinstance(error, self.agent.throttle_on):
            return
        try:
            seconds = retry_after(error, self.agent.clock.time())
            for slot in self.slots:
                slot.throttled(retry_after=seconds)
        except Exception:
            logger.exception("what agent %r was told to wait could not be kept", self.agent.name, extra=self.about())

    def about(self) -> dict[str, Any]:
        """What log records about this call carry."""
        run = self.lane.run_id if self.lane is not None else self.agent.bus.run_here()
        return about(agent=self.agent.name, run=run)

    # -- around the agent's own code --------------------------------------------------------------------

    def step_in(self) -> None:
        """From here on the agent's own code runs: what it emits is caused by this call."""
        if self.cause is not None:
            self.before = CAUSE.get()
            CAUSE.set(self.inner or self.cause)

    def step_out(self) -> None:
        """The agent's own code doesn't run any more, or pauses: a run that it has entered goes on in its next step."""
        if self.cause is not None:
            self.inner = CAUSE.get()
            CAUSE.set(self.before)
            self.before = None

    # -- the end ------------------------------------------------------------------------------------------

    def end(self, result: Any = None, error: Optional[BaseException] = None, collected: bool = False) -> None:
        """Release, then tell how it ended: once, and by exactly one of complete, failed, cancelled."""
        if self.over:
            return
        self.over = True
        self.throttle(error)
        self.leave(collected or isinstance(error, GeneratorExit))
        agent = self.agent
        if not self.heard:
            if not agent.is_heard():
                return
            self.cause = agent.bus.own_cause(cause_here())  # somebody has begun to listen meanwhile
            if agent.name in agent.dependencies.named:
                self.running = agent.dependencies.begin(agent.name, agent.bus.run_here(), current_owner())
        try:
            if self.running is not None:  # before the event, so that its handlers find it
                words = None if error is None else f"{type(error).__name__}: {text_of(error)}"
                agent.dependencies.record(self.running, words)
            self._tell_end(result, error)
        finally:
            if self.running is not None:
                agent.dependencies.end(self.running)

    def _tell_end(self, result: Any, error: Optional[BaseException]) -> None:
        agent = self.agent
        now = agent.clock.monotonic()
        data: dict[str, Any] = {
            "agent": agent.name,
            "timestamp": agent.clock.time(),
            "duration": None if self.begun is None else now - self.begun,
        }
        if agent.after and self.begun is not None:
            data["after_wait"] = (now if self.ready is None else self.ready) - self.begun
        if self.asked is not None:
            data["lock"] = self._locks()
            data["lock_wait"] = (
                now - self.asked if self.waited is None else self.waited
            )  # cancelled, or refused, in line
        if error is None:
            data["result"] = result
            name = agent.complete
        else:
            data.update(error=text_of(error), error_type=type(error).__name__, exception=error)
            plain = isinstance(error, Exception) and not isinstance(error, agent.control_flow)
            name = agent.failed if plain else agent.cancelled
        agent.bus.emit_lifecycle(name, data, agent.name, self.cause, self.lane)
        self.args, self.kwargs = (), {}


class _Stream:
    """The call of a generator: it owns its hold itself, and each step is a visit of whoever drives it (L2, A1)."""

    __slots__ = ("call", "count", "held_before", "holding", "holds", "items", "owner")

    def __init__(self, call: _Call) -> None:
        self.call = call
        self.owner = GeneratorOwner(call.agent.name)
        self.items: Optional[list[Any]] = [] if call.agent.collect is not None and call.heard else None
        self.count = 0
        self.holding = False
        self.holds: Any = None
        self.held_before: Any = None

    def enter(self) -> None:
        """Take the locks, waiting on this thread."""
        before = HOLDS.get()
        self.owner.driver = current_owner()
        self.call.enter(self.owner)
        self._keep(before)

    async def enter_async(self) -> None:
        """Take the locks, waiting on this loop."""
        before = HOLDS.get()
        self.owner.driver = current_owner()
        await self.call.enter_async(self.owner)
        self._keep(before)

    def _keep(self, before: Any) -> None:
        if self.call.slots:  # the hold is the generator's: it shows in the context during its steps only
            self.holding = True
            self.holds = HOLDS.get()
            HOLDS.set(before)

    def step_in(self) -> None:
        """The generator's own code runs, driven by whoever runs this."""
        self.call.step_in()
        if self.call.running is not None:
            self.call.runs_on(current_owner())
        if self.holding:
            self.owner.driver = current_owner()
            self.owner.stepping = True
            self.held_before = HOLDS.get()
            HOLDS.set(self.holds)

    def step_out(self) -> None:
        """The generator pauses, or is over: anybody may take its next step."""
        self.call.step_out()
        self.call.runs_on(self.owner)
        if self.holding:
            self.owner.stepping = False
            self.holds = HOLDS.get()
            HOLDS.set(self.held_before)
            self.held_before = None

    def got(self, item: Any) -> None:
        """The generator gave an item."""
        self.count += 1
        if self.items is not None:
            self.items.append(item)

    def end(self, error: Optional[BaseException] = None) -> None:
        """Release, then tell how it ended; once, however often it ends."""
        call = self.call
        if call.over:
            return
        call.throttle(error)
        call.leave(collected=True)  # a collection may have closed it
        result: Any = self.count
        if error is None and self.items is not None and call.agent.collect is not None:
            try:
                result = call.agent.collect(self.items)
            except Exception:
                logger.exception("`collect` of agent %r failed", call.agent.name, extra=call.about())
            except BaseException as interrupt:
                call.end(error=interrupt)
                raise
        call.end(result, error)


class _Abandoned:
    """Lives in the frame of what is still to run: if the frame goes without an end, the call ends with it (A1).

    So it is for a coroutine that nobody awaits, and for an async generator that is collected when its loop is closed.
    """

    __slots__ = ("call", "live")

    def __init__(self, call: _Call, live: Any = None) -> None:
        self.call = call
        self.live = live

    def __del__(self) -> None:
        if not self.call.over:
            if isinstance(self.live, CoroutineType):
                self.live.close()  # else Python would say of it too that it was never awaited
            self.call.end(error=GeneratorExit("abandoned before its end"), collected=True)


# -- one wrapper for each kind ------------------------------------------------------------------------------


def _wrap_function(agent: Agent, fn: Callable[..., Any]) -> Callable[..., Any]:
    bus = agent.bus
    if agent.names_of is None:

        @functools.wraps(fn)
        def free(*args: Any, **kwargs: Any) -> Any:
            version = agent.unheard_at
            if bus.version != version:
                return _call(agent, fn, args, kwargs)
            try:
                result = fn(*args, **kwargs)
            except BaseException as error:
                if bus.version != version:
                    _Call(agent, args, kwargs, tell=False).end(error=error)
                raise
            if bus.version != version or type(result) in _LIVE:
                return _ended(_Call(agent, args, kwargs, tell=False), result)
            return result

        return free
    only = getattr(agent.names_of, "only", None)
    if only is None or agent.throttle_on or agent.tokens_of:

        @functools.wraps(fn)
        def locking(*args: Any, **kwargs: Any) -> Any:
            return _call(agent, fn, args, kwargs)

        return locking
    enter, leave = agent.table.ways(Door(agent.table, only, How(agent.timeout_given, agent.name)))

    @functools.wraps(fn)
    def quickly_locking(*args: Any, **kwargs: Any) -> Any:
        version = agent.unheard_at
        if bus.version != version:
            return _call(agent, fn, args, kwargs)
        slot = None
        try:
            slot = enter()
            result = fn(*args, **kwargs)
        except BaseException as error:
            if slot is not None:
                leave(None, None, None, slot)
            if bus.version != version:
                _Call(agent, args, kwargs, tell=False).end(error=error)
            raise
        if type(result) in _LIVE:
            call = _Call(agent, args, kwargs, tell=False)
            call.slots, call.owner = (slot,), current_owner()
            return _ended(call, result)
        leave(None, None, None, slot)
        if bus.version != version:
            return _ended(_Call(agent, args, kwargs, tell=False), result)
        return result

    return quickly_locking


def _call(agent: Agent, fn: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    call = _Call(agent, args, kwargs)
    try:
        call.enter()
        call.step_in()
        try:
            result = fn(*args, **kwargs)
        finally:
            call.step_out()
    except BaseException as error:
        call.end(error=error)
        raise
    return _ended(call, result)


def _ended(call: _Call, result: Any, guard: Optional[_Abandoned] = None) -> Any:
    """The function has returned. Where it gave a coroutine or generator, lock and events span its running too (A1).

    The lock is let go until that begins, wherever it does: it may never, and it may be somebody else who runs it.
    """
    if type(result) not in _LIVE:
        call.end(result)
        return result
    call.pause()
    guard = guard or _Abandoned(call, result)
    if isinstance(result, CoroutineType):
        prolonged: Any = _run_on(call, result, guard)
    else:
        wrap = _wrap_generator if isinstance(result, GeneratorType) else _wrap_async_generator
        prolonged = wrap(call.agent, lambda guard: result, _Stream(call))(guard)
    prolonged.__name__ = result.__name__
    prolonged.__qualname__ = result.__qualname__
    return prolonged


async def _run_on(call: _Call, coroutine: Any, guard: _Abandoned) -> Any:
    try:
        try:
            await call.enter_async()
        except BaseException:
            coroutine.close()
            raise
        call.step_in()
        try:
            result = await coroutine
        finally:
            call.step_out()
    except BaseException as error:
        call.end(error=error)
        raise
    return _ended(call, result, guard)


def _wrap_coroutine(agent: Agent, fn: Callable[..., Any]) -> Callable[..., Any]:
    bus = agent.bus
    if agent.names_of is None:

        @functools.wraps(fn)
        async def free(*args: Any, **kwargs: Any) -> Any:
            version = agent.unheard_at
            if bus.version != version:
                return await _call_async(agent, fn, args, kwargs)
            try:
                result = await fn(*args, **kwargs)
            except BaseException as error:
                if bus.version != version:
                    _Call(agent, args, kwargs, tell=False).end(error=error)
                raise
            if bus.version != version or type(result) in _LIVE:
                return _ended(_Call(agent, args, kwargs, tell=False), result)
            return result

        return free

    @functools.wraps(fn)
    async def locking(*args: Any, **kwargs: Any) -> Any:
        return await _call_async(agent, fn, args, kwargs)

    return locking


async def _call_async(agent: Agent, fn: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    call = _Call(agent, args, kwargs)
    try:
        await call.enter_async()
        call.step_in()
        try:
            result = await fn(*args, **kwargs)
        finally:
            call.step_out()
    except BaseException as error:
        call.end(error=error)
        raise
    return _ended(call, result)


def _wrap_generator(agent: Agent, fn: Callable[..., Any], begun: Optional[_Stream] = None) -> Callable[..., Any]:
    """Drive the generator as `yield from` would, with the stream's context set around each step only.

    `begun` is a stream whose call has been told already; its guard is the only argument then.
    """

    @functools.wraps(fn)
    def streaming(*args: Any, **kwargs: Any) -> Any:
        stream = begun or _Stream(_Call(agent, args, kwargs))
        guard = args[0] if begun else _Abandoned(stream.call)  # noqa: F841  (lives as long as this frame)
        given: list[Any] = []  # holds an item until it is given away: this frame is to keep none alive
        try:
            stream.enter()
            live = fn(*args, **kwargs)
            del args, kwargs
            step: Callable[[Any], Any] = live.send
            value: Any = None
            thrown: Optional[BaseException] = None
            while True:
                stream.step_in()
                try:
                    given.append(step(value))
                except StopIteration as stop:
                    result = stop.value
                    break
                finally:
                    stream.step_out()
                stream.got(given[0])
                thrown = None
                try:
                    value = yield given.pop()
                except BaseException as error:
                    thrown = error
                if thrown is None:
                    step = live.send
                else:  # a close as well: what ignores it goes on, as it would by itself
                    value, step = thrown, live.throw
            stream.end(thrown if isinstance(thrown, GeneratorExit) else None)
        except BaseException as error:
            stream.end(error)
            raise
        finally:
            thrown = value = None
        return result

    return streaming


def _wrap_async_generator(agent: Agent, fn: Callable[..., Any], begun: Optional[_Stream] = None) -> Callable[..., Any]:
    """The same for an async generator; `async for` has no `yield from`, so the two can't share their loop."""

    @functools.wraps(fn)
    async def streaming(*args: Any, **kwargs: Any) -> Any:
        stream = begun or _Stream(_Call(agent, args, kwargs))
        guard = args[0] if begun else _Abandoned(stream.call)  # noqa: F841  (lives as long as this frame)
        given: list[Any] = []
        try:
            await stream.enter_async()
            live = fn(*args, **kwargs)
            del args, kwargs
            step: Callable[[Any], Any] = functools.partial(_first_step, live)
            value: Any = None
            thrown: Optional[BaseException] = None
            while True:
                stream.step_in()
                try:
                    given.append(await step(value))
                except StopAsyncIteration:
                    break
                finally:
                    stream.step_out()
                stream.got(given[0])
                thrown = None
                try:
                    value = yield given.pop()
                except BaseException as error:
                    thrown = error
                if thrown is None:
                    step = live.asend
                else:
                    value, step = thrown, live.athrow
            stream.end(thrown if isinstance(thrown, GeneratorExit) else None)
        except BaseException as error:
            stream.end(error)
            raise
        finally:
            thrown = value = None

    return streaming


def _first_step(live: Any, value: None) -> Any:
    """The loop is not to know of the inner generator: at its end it would close that beside ours, and the two clash."""
    hooks = sys.get_asyncgen_hooks()
    sys.set_asyncgen_hooks(None, None)
    try:
        return live.asend(value)
    finally:
        sys.set_asyncgen_hooks(*hooks)


def _code_of(fn: Callable[..., Any]) -> CodeType:
    code: CodeType = fn.__code__
    return code


AGENT_CODES.update(map(_code_of, (_call, _call_async)))


# -- decorating ---------------------------------------------------------------------------------------------


def coordinate(agent: Agent, lock_name: LockSpec, function: F) -> F:
    """Wrap `function` for `agent` by a real function of the same kind (A1)."""
    fn: Any = function
    if isinstance(fn, (staticmethod, classmethod)):
        return cast(F, type(fn)(coordinate(agent, lock_name, fn.__func__)))
    _refuse_what_is_no_function(fn)
    agent.names_of = _lock_names(lock_name, fn)
    agent.bus.parameters.setdefault(agent.started, set()).add(_parameter_names(fn))
    if agent.names_of is None and (agent.throttle_on or agent.tokens_of):
        raise ValueError("tokens and throttle_on are about the limit of a lock: name it by lock_name")
    plain = fn
    while isinstance(plain, functools.partial):
        plain = plain.func
    kind = plain if inspect.isroutine(plain) else type(plain).__call__
    if inspect.isasyncgenfunction(kind):
        wrapper = _wrap_async_generator(agent, fn)
    elif inspect.iscoroutinefunction(kind) or inspect.iscoroutinefunction(fn):
        wrapper = _wrap_coroutine(agent, fn)
    elif inspect.isgeneratorfunction(kind):
        wrapper = _wrap_generator(agent, fn)
        if _code_of(inspect.unwrap(kind)).co_flags & inspect.CO_ITERABLE_COROUTINE:
            wrapper = types.coroutine(wrapper)
    else:
        wrapper = _wrap_function(agent, fn)
    if not hasattr(fn, "__name__"):  # a partial or a callable instance: called after what it calls
        named = plain if hasattr(plain, "__name__") else type(plain)
        wrapper.__name__ = named.__name__
        wrapper.__qualname__ = getattr(named, "__qualname__", named.__name__)
        wrapper.__module__ = named.__module__
        wrapper.__doc__ = getattr(plain, "__doc__", None)
        hints = getattr(kind, "__annotations__", {})
        wrapper.__annotations__ = dict(hints)
    keep_types(wrapper, plain)
    AGENT_CODES.add(_code_of(wrapper))
    return cast(F, wrapper)


def keep_types(wrapper: Any, function: Any) -> None:
    """Let the wrapper's string annotations that name something of the function's module be what they name.

    Some frameworks look such names up in the module of what they are given, and the wrapper's is another.
    """
    module = getattr(inspect.unwrap(function), "__globals__", {})
    hints = dict(wrapper.__annotations__)
    for parameter, hint in hints.items():
        if isinstance(hint, str):
            with suppress(Exception):
                code = compile(hint, "<annotation>", "eval")
                if not set(code.co_names) <= set(dir(builtins)):
                    hints[parameter] = eval(code, module)
    wrapper.__annotations__ = hints


def _refuse_what_is_no_function(fn: Any) -> None:
    if isinstance(fn, type):
        raise TypeError(f"@coordinate wraps functions, not classes: put it on a method of {fn.__name__}")
    if not inspect.isroutine(fn) and not isinstance(fn, functools.partial):
        for method in _FRAMEWORK_METHODS:
            if hasattr(fn, method):
                raise TypeError(
                    f"@coordinate wraps functions, not a {type(fn).__name__} (it has .{method}): put @coordinate "
                    "beneath the framework's decorator, directly on the function"
                )
    if not callable(fn):
        raise TypeError(f"@coordinate wraps functions, not {type(fn).__name__}: {fn!r}")


class _One:
    """The same single lock for every call."""

    __slots__ = ("_names", "only")

    def __init__(self, name: str) -> None:
        self.only = name
        self._names = (name,)

    def __call__(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Sequence[str]:
        return self._names


def _lock_names(spec: LockSpec, fn: Callable[..., Any]) -> Optional[LockNames]:
    """What to lock, from the call's arguments (A4)."""
    if spec is None:
        return None
    if isinstance(spec, str):
        check_lock_name(spec)
        fields = _placeholders(spec)
        if not fields:
            return _One(spec.format())
        return _template([spec], fields, fn)
    if callable(spec):
        choose = spec
        return lambda args, kwargs: _checked(choose(*args, **kwargs))
    if isinstance(spec, (list, tuple)):
        if not spec:
            raise ValueError("lock_name must not be an empty list: leave it out if nothing is to be locked")
        names = [check_lock_name(name) for name in spec]
        fields = [field for name in names for field in _placeholders(name)]
        if not fields:
            fixed = tuple(sorted({name.format() for name in names}))
            return lambda args, kwargs: fixed
        return _template(names, fields, fn)
    raise TypeError(
        f"lock_name must be a name, a template, a list of names, or a function of the call's arguments, not {spec!r}"
    )


def _parameter_names(fn: Callable[..., Any]) -> tuple[str, ...]:
    """What its positional arguments are called, for stores that mask some of them (S4); `*args` is the last."""
    try:
        parameters = inspect.signature(fn).parameters.values()
    except (ValueError, TypeError):  # a builtin that doesn't tell
        return ()
    names = [p.name for p in parameters if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD, p.VAR_POSITIONAL)]
    return tuple(names)


def _placeholders(template: str) -> list[str]:
    fields: list[str] = []
    parts = [template]
    try:
        while parts:
            for _, field, spec, _ in string.Formatter().parse(parts.pop()):
                if field is not None:
                    fields.append(field)
                    parts.append(spec or "")  # a format may hold a field of its own
    except ValueError as error:
        raise ValueError(f"lock_name {template!r} is no valid template: {error}") from None
    roots = [field.replace("[", ".").split(".", 1)[0] for field in fields]
    for root in roots:
        if not root.isidentifier():
            raise ValueError(
                f"lock_name {template!r}: name the parameter in the braces, as in 'customer_{{customer_id}}'"
            )
    return roots


def _template(templates: Sequence[str], fields: Sequence[str], fn: Callable[..., Any]) -> LockNames:
    signature = inspect.signature(fn)
    extra = [p.name for p in signature.parameters.values() if p.kind is p.VAR_KEYWORD]
    for field in fields:
        if field not in signature.parameters and not extra:
            raise ValueError(
                f"lock_name {list(templates)} names {field!r}, which is no parameter of "
                f"{getattr(fn, '__qualname__', fn)}{signature}"
            )

    def names(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Sequence[str]:
        bound = signature.bind(*args, **kwargs)
        bound.apply_defaults()
        values = dict(bound.arguments)
        for name in extra:
            values = {**values.pop(name), **values}
        try:
            return _checked([template.format_map(values) for template in templates])
        except KeyError as error:
            raise TypeError(
                f"lock_name {list(templates)} needs the argument {error}, which this call doesn't give"
            ) from None

    return names


def _checked(names: Any) -> Sequence[str]:
    if isinstance(names, str):
        return (check_lock_name(names),)
    if names is None:
        return ()
    if not isinstance(names, (list, tuple, set, frozenset)):
        raise TypeError(f"the function given as lock_name must return a name or a list of names, not {names!r}")
    return sorted({check_lock_name(name) for name in names})


def _agent_names(name: str, after: Any) -> tuple[str, ...]:
    names = (after,) if isinstance(after, str) else after
    if not isinstance(names, (tuple, list)) or not all(isinstance(other, str) and other for other in names):
        raise TypeError(f"after must be the name of an agent, or a tuple of names, not {after!r}")
    if name in names:
        raise ValueError(f"agent {name!r} can't come after itself")
    return tuple(dict.fromkeys(names))


def _exception_types(what: str, given: Any) -> tuple[type[BaseException], ...]:
    kinds = given if isinstance(given, tuple) else (given,)
    for kind in kinds:
        if not (isinstance(kind, type) and issubclass(kind, BaseException)):
            raise TypeError(f"{what} must be an exception type or a tuple of them, not {given!r}")
    return kinds


def make_agent(
    table: LockTable,
    bus: Bus,
    name: str,
    *,
    timeout: Any,
    dependencies: Dependencies,
    after: Any,
    tokens: Union[float, Callable[..., float]],
    throttle_on: Any,
    control_flow: Any,
    collect: Optional[Callable[[list[Any]], Any]],
) -> Agent:
    """Check what `@coordinate` was given."""
    if not isinstance(name, str):
        raise TypeError(f'@coordinate needs the agent\'s name, a string, not {name!r}: write @coordinate("researcher")')
    if not name:
        raise ValueError("an agent's name must not be empty")
    if not callable(tokens):
        check_amount("tokens", tokens)
    if collect is not None and not callable(collect):
        raise TypeError(f"collect must be a function of the list of items, not {collect!r}")
    return Agent(
        name,
        table,
        bus,
        timeout=timeout if timeout is ... else check_timeout(timeout),
        dependencies=dependencies,
        after=_agent_names(name, after),
        tokens=tokens,
        throttle_on=_exception_types("throttle_on", throttle_on),
        control_flow=_exception_types("control_flow", control_flow),
        collect=collect,
    )
