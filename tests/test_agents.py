"""The wrapper behind `@coordinate`: what it must not change (A1, A3), what it tells (A2), what it locks (A4)."""

from __future__ import annotations

import abc
import asyncio
import contextlib
import copy
import functools
import gc
import inspect
import logging
import pickle
import random
import sys
import threading
import traceback
import types
import typing
import weakref
from contextvars import Context, copy_context
from typing import Any, Callable

import pytest
from support import eventually, join_all, start_all

from agentdiff import (
    CoordinationTimeoutError,
    Coordinator,
    QueueFullError,
    coordinate,
    default_coordinator,
    when,
)
from agentdiff.default import reset_default

Inside = Callable[[Any], Any]
Decorator = Callable[[Any], Any]


# -- tools ----------------------------------------------------------------------------------------------------


class Heard:
    """What an agent told, in the order in which handlers were called; `free` says that `lock` was free then."""

    def __init__(self, coord: Coordinator, agent: str = "agent", lock: str = "x") -> None:
        self.coord = coord
        self.agent = agent
        self.events: list[Any] = []
        self.free: list[bool] = []
        self._lock = coord.lock(lock)
        coord.on(f"{agent}_*", self._hear, pass_event=True)

    def _hear(self, event: Any) -> None:
        self.free.append(not self._lock.locked())
        self.events.append(event)

    @property
    def names(self) -> list[str]:
        self.coord.join(20)
        return [event.name.split("_")[-1] for event in self.events]

    @property
    def last(self) -> dict[str, Any]:
        self.coord.join(20)
        data: dict[str, Any] = self.events[-1].data
        return data


def run(agent: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """Call an agent of any kind and run it to its end: what it returned, or the list of its items."""
    live = agent(*args, **kwargs)
    if inspect.isgenerator(live):
        return list(live)
    return asyncio.run(_finish(live)) if inspect.iscoroutine(live) or inspect.isasyncgen(live) else live


async def _finish(live: Any) -> Any:
    while inspect.isawaitable(live):
        live = await live
    return (
        [item async for item in live] if inspect.isasyncgen(live) else list(live) if inspect.isgenerator(live) else live
    )


def taken_elsewhere(coord: Coordinator, name: str = "x") -> bool:
    """Whether a thread that has nothing to do with this one finds the lock taken."""
    got: list[bool] = []

    def attempt() -> None:
        got.append(coord.lock(name).acquire(timeout=0))
        if got[0]:
            coord.lock(name).release()

    join_all(start_all(attempt))
    return not got[0]


def function(dec: Decorator, inside: Inside) -> Any:
    @dec
    def agent(x: int, *, extra: str = "") -> int:
        """Say x."""
        return inside(x)

    return agent


def coroutine(dec: Decorator, inside: Inside) -> Any:
    @dec
    async def agent(x: int, *, extra: str = "") -> int:
        """Say x."""
        await asyncio.sleep(0)
        return inside(x)

    return agent


def generator(dec: Decorator, inside: Inside) -> Any:
    @dec
    def agent(x: int, *, extra: str = "") -> typing.Iterator[int]:
        """Say x."""
        yield inside(x)

    return agent


def async_generator(dec: Decorator, inside: Inside) -> Any:
    @dec
    async def agent(x: int, *, extra: str = "") -> typing.AsyncIterator[int]:
        """Say x."""
        await asyncio.sleep(0)
        yield inside(x)

    return agent


def method(dec: Decorator, inside: Inside) -> Any:
    class Team:
        @dec
        def agent(self, x: int) -> int:
            assert isinstance(self, Team)
            return inside(x)

    return Team().agent


def async_method(dec: Decorator, inside: Inside) -> Any:
    class Team:
        @dec
        async def agent(self, x: int) -> int:
            assert isinstance(self, Team)
            return inside(x)

    return Team().agent


def generator_method(dec: Decorator, inside: Inside) -> Any:
    class Team:
        @dec
        def agent(self, x: int) -> typing.Iterator[int]:
            assert isinstance(self, Team)
            yield inside(x)

    return Team().agent


def static_beneath(dec: Decorator, inside: Inside) -> Any:
    class Team:
        @staticmethod
        @dec
        def agent(x: int) -> int:
            return inside(x)

    return Team().agent


def static_above(dec: Decorator, inside: Inside) -> Any:
    class Team:
        @dec
        @staticmethod
        def agent(x: int) -> int:
            return inside(x)

    assert isinstance(vars(Team)["agent"], staticmethod)
    return Team.agent


def class_beneath(dec: Decorator, inside: Inside) -> Any:
    class Team:
        @classmethod
        @dec
        def agent(cls, x: int) -> int:
            assert cls is Team
            return inside(x)

    return Team.agent


def class_above(dec: Decorator, inside: Inside) -> Any:
    class Team:
        @dec
        @classmethod
        def agent(cls, x: int) -> int:
            assert issubclass(cls, Team)
            return inside(x)

    assert isinstance(vars(Team)["agent"], classmethod)
    return type("Sub", (Team,), {})().agent


def async_static_above(dec: Decorator, inside: Inside) -> Any:
    class Team:
        @dec
        @staticmethod
        async def agent(x: int) -> int:
            return inside(x)

    return Team().agent


def partial(dec: Decorator, inside: Inside) -> Any:
    def agent(before: str, x: int) -> int:
        assert before == "before"
        return inside(x)

    return dec(functools.partial(agent, "before"))


def async_partial(dec: Decorator, inside: Inside) -> Any:
    async def agent(before: str, x: int) -> int:
        return inside(x)

    return dec(functools.partial(functools.partial(agent), "before"))


def generator_partial(dec: Decorator, inside: Inside) -> Any:
    def agent(before: str, x: int) -> typing.Iterator[int]:
        yield inside(x)

    return dec(functools.partial(agent, "before"))


def instance(dec: Decorator, inside: Inside) -> Any:
    class Agent:
        def __call__(self, x: int) -> int:
            return inside(x)

    return dec(Agent())


def async_instance(dec: Decorator, inside: Inside) -> Any:
    class Agent:
        async def __call__(self, x: int) -> int:
            return inside(x)

    return dec(Agent())


def async_generator_instance(dec: Decorator, inside: Inside) -> Any:
    class Agent:
        async def __call__(self, x: int) -> typing.AsyncIterator[int]:
            yield inside(x)

    return dec(Agent())


def partial_of_async_instance(dec: Decorator, inside: Inside) -> Any:
    class Agent:
        async def __call__(self, before: str, x: int) -> int:
            return inside(x)

    return dec(functools.partial(Agent(), "before"))


def bound_method(dec: Decorator, inside: Inside) -> Any:
    class Team:
        def agent(self, x: int) -> int:
            return inside(x)

    return dec(Team().agent)


def async_bound_method(dec: Decorator, inside: Inside) -> Any:
    class Team:
        async def agent(self, x: int) -> int:
            return inside(x)

    return dec(Team().agent)


def gives_coroutine(dec: Decorator, inside: Inside) -> Any:
    async def inner(x: int) -> int:
        await asyncio.sleep(0)
        return inside(x)

    return dec(lambda x: inner(x))


def gives_generator(dec: Decorator, inside: Inside) -> Any:
    def inner(x: int) -> typing.Iterator[int]:
        yield inside(x)

    return dec(lambda x: inner(x))


def gives_async_generator(dec: Decorator, inside: Inside) -> Any:
    async def inner(x: int) -> typing.AsyncIterator[int]:
        yield inside(x)

    return dec(lambda x: inner(x))


def awaited_gives_async_generator(dec: Decorator, inside: Inside) -> Any:
    async def inner(x: int) -> typing.AsyncIterator[int]:
        yield inside(x)

    @dec
    async def agent(x: int) -> Any:
        return inner(x)

    return agent


def awaited_gives_generator(dec: Decorator, inside: Inside) -> Any:
    def inner(x: int) -> typing.Iterator[int]:
        yield inside(x)

    @dec
    async def agent(x: int) -> Any:
        return inner(x)

    return agent


def gives_coroutine_that_gives_async_generator(dec: Decorator, inside: Inside) -> Any:
    async def inner(x: int) -> typing.AsyncIterator[int]:
        yield inside(x)

    async def outer(x: int) -> Any:
        return inner(x)

    return dec(lambda x: outer(x))


STREAMS = [
    generator,
    async_generator,
    generator_method,
    generator_partial,
    async_generator_instance,
    gives_generator,
    gives_async_generator,
    awaited_gives_async_generator,
    awaited_gives_generator,
    gives_coroutine_that_gives_async_generator,
]
CALLS = [
    function,
    coroutine,
    method,
    async_method,
    static_beneath,
    static_above,
    class_beneath,
    class_above,
    async_static_above,
    partial,
    async_partial,
    instance,
    async_instance,
    partial_of_async_instance,
    bound_method,
    async_bound_method,
    gives_coroutine,
]
every_kind = pytest.mark.parametrize("kind", CALLS + STREAMS, ids=lambda kind: kind.__name__)


def keep(x: Any) -> Any:
    return x


# -- A1: every kind ---------------------------------------------------------------------------------------------


@every_kind
@pytest.mark.parametrize("heard", [False, True])
def test_A1_lock_and_events_span_the_actual_running(coord: Coordinator, kind: Any, heard: bool) -> None:
    """The lock is held while the agent's own code runs, and free before and after, whether anybody listens or not."""
    told = Heard(coord) if heard else None

    def inside(x: int) -> int:
        if told is not None:
            eventually(lambda: len(told.events) == 2 * x - 1)
        assert taken_elsewhere(coord)
        assert coord.snapshot().locks[0].holders[0].agent == "agent"
        return x + 1

    agent = kind(coord.coordinate("agent", "x"), inside)
    for x in (1, 2):
        result = run(agent, x)
        assert result == ([x + 1] if kind in STREAMS else x + 1)
        assert coord.snapshot().locks == ()
        if told is not None:
            assert told.names == ["started", "complete"] * x
    if told is not None:
        assert [event.data["result"] for event in told.events[1::2]] == ([1, 1] if kind in STREAMS else [2, 3])


@every_kind
def test_A1_the_agents_own_code_may_take_its_lock_again(coord: Coordinator, kind: Any) -> None:
    """The lock is re-entrant for the agent's own code, as a block, as another agent, and in a thread that it starts."""

    @coord.coordinate("helper", "x", timeout=10)
    def helper(x: int) -> int:
        return x

    def inside(x: int) -> int:
        for _ in range(2):
            with coord.lock("x", timeout=10):
                assert helper(x) == x
            assert taken_elsewhere(coord)
        context = copy_context()
        got: list[int] = []
        join_all(start_all(lambda: got.append(context.run(helper, x))))
        return got[0]

    assert run(kind(coord.coordinate("agent", "x"), inside), 5) == ([5] if kind in STREAMS else 5)
    assert coord.snapshot().locks == ()


@every_kind
@pytest.mark.parametrize("error", [ValueError("bad"), KeyboardInterrupt("now"), SystemExit(3)], ids=repr)
def test_A2_A3_every_kind_raises_its_own_error_unchanged(coord: Coordinator, kind: Any, error: BaseException) -> None:
    """The very exception comes out, its traceback ends where it was raised; one end event tells it after release."""
    told = Heard(coord)
    error = type(error)(*error.args)

    def inside(x: int) -> int:
        raise error

    agent = kind(coord.coordinate("agent", "x"), inside)
    with pytest.raises(type(error)) as caught:
        run(agent, 1)
    assert caught.value is error
    assert (error.__cause__, error.__context__, error.__suppress_context__) == (None, None, False)
    assert traceback.extract_tb(error.__traceback__)[-1].name == "inside"
    assert told.names == ["started", "failed" if isinstance(error, Exception) else "cancelled"]
    assert told.free[1]
    assert told.last["exception"] is error
    assert coord.snapshot().locks == ()


PREDICATES = [
    inspect.isfunction,
    inspect.isroutine,
    inspect.iscoroutinefunction,
    inspect.isgeneratorfunction,
    inspect.isasyncgenfunction,
]


@pytest.mark.parametrize("kind", [function, coroutine, generator, async_generator], ids=lambda k: k.__name__)
@pytest.mark.parametrize("lock", [None, "x", "x_{x}", ["a", "b"]], ids=str)
def test_A1_a_wrapper_looks_like_what_it_wraps(coord: Coordinator, kind: Any, lock: Any) -> None:
    """It is a real function of the same kind, with its name, doc, signature and annotations."""
    plain = kind(keep, keep)
    wrapped = kind(coord.coordinate("agent", lock), keep)
    assert type(wrapped) is types.FunctionType
    assert [p(wrapped) for p in PREDICATES] == [p(plain) for p in PREDICATES]
    for attribute in ("__name__", "__qualname__", "__module__", "__doc__"):
        assert getattr(wrapped, attribute) == getattr(plain, attribute)
    assert wrapped.__annotations__.keys() == plain.__annotations__.keys()
    assert inspect.signature(wrapped) == inspect.signature(plain)
    assert typing.get_type_hints(wrapped) == typing.get_type_hints(plain)
    assert inspect.getsource(wrapped) == inspect.getsource(kind(coord.coordinate("other"), keep))
    assert inspect.unwrap(wrapped).__code__ is plain.__code__
    assert wrapped.__wrapped__.__code__ is plain.__code__


Depth = typing.Literal["short", "long"]  # a type that only this module knows


class Agent:
    """One that the wrapper's module knows too, by another meaning."""


def test_A1_types_of_the_function_s_module_are_found_from_the_wrapper(coord: Coordinator) -> None:
    """Who looks a name up in the module of the wrapper, as some frameworks do, finds the function's types."""

    def plain(x: int, depth: Depth, agent: Agent, later: NotYetThere) -> bytes:  # type: ignore[name-defined]  # noqa: F821
        return b""

    for wrapper in (coord.coordinate("agent")(plain), coord.carry(plain), coord.carry(coord.coordinate("a")(plain))):
        hints = dict(wrapper.__annotations__)
        assert hints.pop("later") == "NotYetThere"
        wrapper.__annotations__ = hints
        found = typing.get_type_hints(wrapper, wrapper.__globals__)
        assert found == {"x": int, "depth": Depth, "agent": Agent, "return": bytes}
        assert inspect.signature(wrapper) == inspect.signature(plain)


@pytest.mark.parametrize("kind", [coroutine, generator, async_generator], ids=lambda k: k.__name__)
def test_A1_what_a_wrapper_gives_has_the_type_and_name_of_the_original(coord: Coordinator, kind: Any) -> None:
    """Coroutines and generators from a wrapper are called as those from the plain function."""
    plain, live = kind(keep, keep)(1), kind(coord.coordinate("agent", "x"), keep)(1)
    assert type(live) is type(plain)
    assert (live.__name__, live.__qualname__) == (plain.__name__, plain.__qualname__)
    for one in (plain, live):
        if not inspect.isasyncgen(one):
            one.close()


@pytest.mark.parametrize("kind", [gives_coroutine, gives_generator, gives_async_generator], ids=lambda k: k.__name__)
def test_A1_what_a_plain_function_gives_keeps_its_type_and_name(coord: Coordinator, kind: Any) -> None:
    """A coroutine or generator that a plain function returns is still one, under its own name."""
    plain, live = kind(keep, keep)(1), kind(coord.coordinate("agent", "x"), keep)(1)
    assert type(live) is type(plain)
    assert (live.__name__, live.__qualname__) == (plain.__name__, plain.__qualname__)
    asyncio.run(_finish(plain))
    asyncio.run(_finish(live))


@pytest.mark.parametrize(
    ("kind", "predicate"),
    [
        (async_method, inspect.iscoroutinefunction),
        (async_static_above, inspect.iscoroutinefunction),
        (async_partial, inspect.iscoroutinefunction),
        (async_instance, inspect.iscoroutinefunction),
        (partial_of_async_instance, inspect.iscoroutinefunction),
        (async_bound_method, inspect.iscoroutinefunction),
        (generator_method, inspect.isgeneratorfunction),
        (generator_partial, inspect.isgeneratorfunction),
        (async_generator_instance, inspect.isasyncgenfunction),
    ],
    ids=lambda v: v.__name__,
)
def test_A1_partials_instances_and_methods_give_functions_of_their_kind(
    coord: Coordinator, kind: Any, predicate: Any
) -> None:
    """What isn't a function is wrapped by a function of the kind that it calls, with its signature and a name."""
    plain = kind(keep, keep)
    wrapped = kind(coord.coordinate("agent", "x"), keep)
    assert predicate(wrapped)
    assert inspect.isroutine(wrapped)
    assert inspect.signature(wrapped) == inspect.signature(plain)
    assert wrapped.__name__ in ("agent", "Agent")


def test_A1_partials_and_instances_keep_doc_and_annotations(coord: Coordinator) -> None:
    """A wrapper of a partial or an instance has the doc, module and annotations of what it calls."""

    def work(a: int, b: str) -> bytes:
        """Do the work."""
        return b""

    class Agent:
        """An agent."""

        def __call__(self, a: int) -> bytes:
            return b""

    dec = coord.coordinate("agent")
    for wrapped, name, doc in (
        (dec(functools.partial(work, 1)), "work", "Do the work."),
        (dec(Agent()), "Agent", "An agent."),
    ):
        assert (wrapped.__name__, wrapped.__doc__, wrapped.__module__) == (name, doc, __name__)
        assert wrapped.__qualname__.endswith(f"<locals>.{name}")
        assert wrapped.__annotations__["return"] == "bytes"
        assert callable(wrapped.__wrapped__)


def test_A1_sync_kinds_stay_sync(coord: Coordinator) -> None:
    """A wrapper of what is not async is no coroutine function and no generator function."""
    for kind in (function, method, static_above, class_above, partial, instance, bound_method, gives_coroutine):
        wrapped = kind(coord.coordinate("agent", "x"), keep)
        assert not any(p(wrapped) for p in PREDICATES[2:])


def test_A1_attributes_of_a_function_are_carried_over(coord: Coordinator) -> None:
    """What others have put on the function (marks, abstractness) is on the wrapper too."""

    class Base(abc.ABC):
        @coord.coordinate("agent", "x")
        @abc.abstractmethod
        def work(self) -> None: ...

    assert inspect.isabstract(Base)

    def marked() -> None: ...

    marked.mark = "slow"  # type: ignore[attr-defined]
    assert coord.coordinate("agent")(marked).mark == "slow"  # type: ignore[attr-defined]


def test_A1_a_builtin_can_be_an_agent(coord: Coordinator) -> None:
    """Functions written in C are wrapped as well."""
    told = Heard(coord)
    length = coord.coordinate("agent", "x")(len)
    assert (length("abc"), length.__name__, inspect.signature(length)) == (3, "len", inspect.signature(len))
    assert told.names == ["started", "complete"]


def test_A1_super_and_private_names_work_in_methods(coord: Coordinator) -> None:
    """Methods are found, overridden and called through `super()` as without the decorator."""

    class Base:
        @coord.coordinate("base", "x", timeout=10)
        def work(self, x: int) -> str:
            return f"base {x}"

    class Sub(Base):
        @coord.coordinate("sub", "x", timeout=10)
        def work(self, x: int) -> str:
            return "sub " + super().work(x)

    assert Sub().work(1) == "sub base 1"
    assert Base.work(Sub(), 2) == "base 2"


_pickled = Coordinator(name="pickled")


@_pickled.coordinate("module_level", "x_{x}")
def module_level(x: int) -> int:
    return x


class Pickled:
    @_pickled.coordinate("in_class", "x")
    async def in_class(self) -> int:
        return 1

    @_pickled.coordinate("static", "x")
    @staticmethod
    def static() -> int:
        return 2


def test_A1_what_pickles_by_qualified_name_still_does_and_copies_are_itself() -> None:
    """Module-level agents, methods and static methods pickle as before; a copy is the function itself."""
    for agent in (module_level, Pickled.in_class, Pickled.static):
        for protocol in range(pickle.HIGHEST_PROTOCOL + 1):
            assert pickle.loads(pickle.dumps(agent, protocol)) is agent
        assert copy.copy(agent) is agent
        assert copy.deepcopy(agent) is agent


class Tool:
    def __call__(self, x: int) -> int:
        return x

    def invoke(self, x: int) -> int:
        return x


class AsyncTool:
    async def ainvoke(self, x: int) -> int:
        return x


class Crew:
    def kickoff(self) -> None: ...


class Runner:
    def run(self) -> None: ...


@pytest.mark.parametrize("tool", [Tool(), AsyncTool(), Crew(), Runner()], ids=lambda t: type(t).__name__)
def test_A1_tool_objects_are_refused_with_advice(coord: Coordinator, tool: Any) -> None:
    """A framework's object is refused when decorating, and the message says where the decorator belongs."""
    with pytest.raises(TypeError, match="beneath"):
        coord.coordinate("agent")(tool)


@pytest.mark.parametrize("what", [int, Tool, 3, None, "name", property(keep)], ids=repr)
def test_A1_classes_and_what_cant_be_called_are_refused(coord: Coordinator, what: Any) -> None:
    """Classes and things that can't be called are refused when decorating."""
    with pytest.raises(TypeError, match="functions, not"):
        coord.coordinate("agent")(what)


@pytest.mark.parametrize(
    ("args", "kwargs", "kind"),
    [
        ((keep,), {}, TypeError),  # written without parentheses
        ((3,), {}, TypeError),
        (("",), {}, ValueError),
        (("a", ""), {}, ValueError),
        (("a", []), {}, ValueError),
        (("a", ["x", ""]), {}, ValueError),
        (("a", ["x", 3]), {}, TypeError),
        (("a", 3), {}, TypeError),
        (("a", "x{"), {}, ValueError),
        (("a", "{}"), {}, ValueError),
        (("a", "{0}"), {}, ValueError),
        (("a", "x"), {"timeout": -1}, ValueError),
        (("a", "x"), {"timeout": float("nan")}, ValueError),
        (("a", "x"), {"timeout": True}, TypeError),
        (("a", "x"), {"timeout": "3"}, TypeError),
        (("a",), {"control_flow": "ValueError"}, TypeError),
        (("a",), {"control_flow": (ValueError, 3)}, TypeError),
        (("a",), {"collect": 3}, TypeError),
    ],
)
def test_A1_bad_arguments_are_refused_when_decorating(coord: Coordinator, args: Any, kwargs: Any, kind: Any) -> None:
    """What makes no sense is refused before anything runs."""
    with pytest.raises(kind):
        coord.coordinate(*args, **kwargs)(lambda x: x)


def test_A1_generator_based_coroutines_can_still_be_awaited(coord: Coordinator) -> None:
    """A `types.coroutine` stays awaitable, and its lock spans the awaiting."""

    @coord.coordinate("agent", "x")
    @types.coroutine
    def pause() -> Any:
        assert coord.lock("x").locked()
        yield
        return 7

    async def main() -> int:
        return await pause()

    assert asyncio.run(main()) == 7
    assert coord.snapshot().locks == ()


def test_A1_one_decorator_can_serve_two_functions(coord: Coordinator) -> None:
    """A decorator that is kept in a variable and used twice locks each function by its own parameters."""
    agent = coord.coordinate("agent", "x_{a}")
    locked = lambda: [lock.name for lock in coord.snapshot().locks]  # noqa: E731

    @agent
    def first(a: int, b: int) -> list[str]:
        return locked()

    @agent
    def second(b: int, a: int) -> list[str]:
        return locked()

    assert first(1, 2) == ["x_1"]
    assert second(1, 2) == ["x_2"]


# -- A1: generators, step by step ---------------------------------------------------------------------------------


class Body:
    """A generator that does what dice say: yields, returns, raises, catches, ignores; logs what it sees."""

    def __init__(self, seed: int) -> None:
        self.dice = random.Random(seed)
        self.log: list[Any] = []
        self.left = 12

    def before_yield(self) -> Any:
        self.left -= 1
        self.log.append(("exc_info", sys.exc_info()[0]))
        roll = self.dice.random()
        if self.left <= 0 or roll < 0.08:
            return "return"
        if roll < 0.14:
            raise ValueError("own")
        if roll < 0.17:
            raise StopIteration("leaks") if roll < 0.155 else StopAsyncIteration("leaks")
        return None

    def caught(self, error: BaseException) -> Any:
        self.log.append(("caught", type(error), error.args))
        roll = self.dice.random()
        if roll < 0.35:
            raise error
        if roll < 0.5:
            raise OSError("instead")
        if roll < 0.6:
            raise LookupError("because") from error
        return "return" if roll < 0.75 else None

    def finish(self) -> None:
        self.log.append("finally")
        if self.dice.random() < 0.1:
            raise ArithmeticError("in finally")

    def run(self) -> Any:
        try:
            while True:
                if self.before_yield():
                    return self.dice.randrange(100)
                try:
                    self.log.append(("sent", (yield self.dice.randrange(100))))
                except BaseException as error:
                    if self.caught(error):
                        return f"after {type(error).__name__}"
        finally:
            self.finish()

    async def run_async(self) -> Any:
        try:
            while True:
                if self.before_yield():
                    return
                try:
                    self.log.append(("sent", (yield self.dice.randrange(100))))
                    await asyncio.sleep(0)
                except BaseException as error:
                    await asyncio.sleep(0)
                    if self.caught(error) or isinstance(error, GeneratorExit):
                        return  # one that ignores its closing can never be ended again, decorated or not
        finally:
            await asyncio.sleep(0)
            self.finish()


THROWN = [KeyError("k"), KeyError, GeneratorExit("g"), GeneratorExit, StopIteration("s"), KeyboardInterrupt("i")]


def script(seed: int) -> list[tuple[str, Any]]:
    """What the driver will do: at the end it closes for as long as the generator refuses to."""
    dice = random.Random(-seed - 1)
    steps: list[tuple[str, Any]] = []
    for _ in range(dice.randrange(1, 8)):
        step = dice.choice(["next", "next", "next", "send", "send", "throw", "throw", "close"])
        steps.append((step, {"send": dice.randrange(9), "throw": dice.choice(THROWN)}.get(step)))
    return steps + [("close", None)] * 14


def outcome_of(error: BaseException) -> tuple[Any, ...]:
    causes = []
    while error is not None and len(causes) < 6:
        causes.append((type(error), error.args, type(error.__cause__), error.__suppress_context__))
        error = error.__context__  # type: ignore[assignment]
    return tuple(causes)


def drive(live: Any, steps: list[tuple[str, Any]]) -> list[Any]:
    moves = {"next": lambda _: next(live), "send": live.send, "throw": live.throw, "close": lambda _: live.close()}
    seen: list[Any] = []
    for step, argument in steps:
        if isinstance(argument, BaseException):
            argument = type(argument)(*argument.args)  # with no traceback of another run
        try:
            seen.append((step, moves[step](argument)))
        except BaseException as error:
            seen.append((step, outcome_of(error)))
    return seen


async def drive_async(live: Any, steps: list[tuple[str, Any]]) -> list[Any]:
    moves = {
        "next": lambda _: live.__anext__(),
        "send": live.asend,
        "throw": live.athrow,
        "close": lambda _: live.aclose(),
    }
    seen: list[Any] = []
    for step, argument in steps:
        if isinstance(argument, BaseException):
            argument = type(argument)(*argument.args)
        try:
            seen.append((step, await moves[step](argument)))
        except BaseException as error:
            seen.append((step, outcome_of(error)))
    return seen


def options() -> Any:
    """Ways of decorating, each a coordinator's decorator: with a lock or without, heard or not, given by a function."""
    return pytest.mark.parametrize(
        ("lock", "heard", "given"),
        [(None, False, False), ("x", False, False), (None, True, False), ("x", True, False), ("x", True, True)],
        ids=["bare", "lock", "heard", "both", "given"],
    )


SEEDS = 400


@options()
def test_A1_a_generator_behaves_as_without_the_decorator(
    coord: Coordinator, lock: Any, heard: bool, given: bool
) -> None:
    """Random scripts of next, send, throw and close see the same items, values and errors, decorated or not."""
    told = Heard(coord) if heard else None
    dec = coord.coordinate("agent", lock)
    for seed in range(SEEDS):
        plain, wrapped = Body(seed), Body(seed)
        agent = dec((lambda w=wrapped: w.run()) if given else wrapped.run)
        steps = script(seed)
        assert drive(agent(), steps) == drive(plain.run(), steps), f"seed {seed}: {steps}"
        assert wrapped.log == plain.log, f"seed {seed}: {steps}"
        assert coord.snapshot().locks == (), f"seed {seed}"
        if told is not None:
            names = told.names
            assert len(names) in (0, 2), f"seed {seed}: {names}"
            assert names[:1] in ([], ["started"])
            told.events.clear()


@options()
def test_A1_an_async_generator_behaves_as_without_the_decorator(
    coord: Coordinator, lock: Any, heard: bool, given: bool
) -> None:
    """The same for anext, asend, athrow and aclose."""
    told = Heard(coord) if heard else None
    dec = coord.coordinate("agent", lock)

    async def main() -> None:
        for seed in range(SEEDS):
            plain, wrapped = Body(seed), Body(seed)
            agent = dec((lambda w=wrapped: w.run_async()) if given else wrapped.run_async)
            steps = script(seed)
            live = agent()
            got = await drive_async(live, steps)
            assert got == await drive_async(plain.run_async(), steps), f"seed {seed}: {steps}"
            assert wrapped.log == plain.log, f"seed {seed}: {steps}"
            del live
            assert coord.snapshot().locks == (), f"seed {seed}"
            if told is not None:
                await coord.join_async()
                assert len(told.events) in (0, 2), f"seed {seed}: {told.events}"
                told.events.clear()

    asyncio.run(main())


def test_A1_generators_that_ignore_being_closed(coord: Coordinator) -> None:
    """Closing one that goes on raises what it always raised, and its lock is freed when it really ends."""

    @coord.coordinate("agent", "x")
    def stubborn() -> Any:
        for left in (2, 1):
            with contextlib.suppress(GeneratorExit):
                yield left

    live = stubborn()
    next(live)
    with pytest.raises(RuntimeError, match="ignored GeneratorExit"):
        live.close()
    live.close()
    assert list(live) == []
    assert coord.snapshot().locks == ()


def test_A1_the_value_of_close_is_what_it_was(coord: Coordinator) -> None:
    """`close()` gives what the generator returned, where the interpreter does so (3.13)."""

    def plain() -> Any:
        try:
            yield 1
        except GeneratorExit:
            return "closed"

    one, other = plain(), coord.coordinate("agent", "x")(plain)()
    next(one)
    next(other)
    assert other.close() == one.close()


def test_A1_yield_from_and_context_managers_work_on_top(coord: Coordinator) -> None:
    """`yield from`, `@contextmanager` and `@asynccontextmanager` over a decorated generator act as over a plain one."""

    @coord.coordinate("inner", "x")
    def inner() -> Any:
        got = yield 1
        return got * 2

    def outer() -> Any:
        return (yield from inner()) + 1

    live = outer()
    assert next(live) == 1
    with pytest.raises(StopIteration) as stop:
        live.send(20)
    assert stop.value.value == 41

    @contextlib.contextmanager
    @coord.coordinate("block", "x")
    def block() -> Any:
        with contextlib.suppress(KeyError):
            yield taken_elsewhere(coord)

    with block() as taken:
        assert taken
        raise KeyError("suppressed")
    for error in (ValueError("through"), StopIteration("through"), RuntimeError("through")):
        with pytest.raises(type(error)) as caught, block():
            raise error
        assert caught.value is error
    assert coord.snapshot().locks == ()

    @contextlib.asynccontextmanager
    @coord.coordinate("block", "x")
    async def async_block() -> Any:
        with contextlib.suppress(KeyError):
            yield taken_elsewhere(coord)

    async def main() -> None:
        async with async_block() as taken:
            assert taken
            raise KeyError("suppressed")
        for error in (ValueError("through"), StopAsyncIteration("through")):
            with pytest.raises(type(error)) as caught:
                async with async_block():
                    raise error
            assert caught.value is error

    asyncio.run(main())
    assert coord.snapshot().locks == ()


def test_A1_a_suspended_generator_keeps_no_item_alive(coord: Coordinator) -> None:
    """What a generator has yielded lives no longer than without the decorator."""

    class Item:
        pass

    @coord.coordinate("agent", "x")
    def items() -> Any:
        for _ in range(2):
            yield Item()

    live = items()
    seen = weakref.ref(next(live))
    gc.collect()
    assert seen() is None
    live.close()


@pytest.mark.parametrize("started", [False, True])
@pytest.mark.parametrize("end", ["close", "drop", "cycle", "elsewhere"])
@pytest.mark.parametrize("kind", [generator, gives_generator], ids=lambda k: k.__name__)
def test_A1_a_stream_closed_early_or_abandoned_frees_its_lock(
    coord: Coordinator, kind: Any, started: bool, end: str
) -> None:
    """Closed, dropped, collected in a cycle or closed on another thread: the lock is free, and `_cancelled` is told."""
    told = Heard(coord)
    live = kind(coord.coordinate("agent", "x"), keep)(1)
    if started:
        assert next(live) == 1
        assert taken_elsewhere(coord)
    if end == "close":
        live.close()
    elif end == "elsewhere":
        join_all(start_all(live.close))
    elif end == "cycle":
        ring: list[Any] = [live]
        ring.append(ring)
        del ring
    del live
    gc.collect()
    begun = started or kind is gives_generator
    assert told.names == (["started", "cancelled"] if begun else [])
    if begun:
        assert told.last["error_type"] == "GeneratorExit"
        assert told.free[-1]
    assert coord.snapshot().locks == ()


@pytest.mark.parametrize("waits", [False, True])
def test_A1_a_call_may_be_collected_while_others_wait(coord: Coordinator, waits: bool) -> None:
    """A collection that comes upon the lock table at work neither hangs nor loses the lock's turn."""
    for kind in (generator, gives_generator, coroutine):
        live = kind(coord.coordinate("agent", "x"), keep)(1)

        async def begin(live: Any = live) -> None:
            live.send(None)

        asyncio.run(begin())
        del begin
        got: list[Any] = []
        threads = start_all(lambda got=got: got.append(coord.lock("x").acquire(timeout=20))) if waits else []
        if waits:
            eventually(lambda: coord.snapshot().locks[0].waiters)
        box = [live]
        done = threading.Event()

        def collect(box: Any = box, done: Any = done) -> None:
            with coord._table._mutex:  # as if the collector struck in there
                box.clear()
            coord.lock("y").acquire(timeout=0)
            coord.lock("y").release()
            coord.snapshot()
            done.set()

        del live
        start_all(collect)
        assert done.wait(10), "the collection waits for a mutex that its own thread holds"
        join_all(threads)
        assert got == ([True] if waits else [])
        eventually(lambda: all(lock.holders[0].orphaned for lock in coord.snapshot().locks))
        with coord._table._mutex:
            coord._table.slots.pop("x", None)  # what the ended thread has left


@pytest.mark.parametrize("kind", [async_generator, gives_async_generator], ids=lambda k: k.__name__)
def test_A1_an_async_stream_whose_loop_is_closed_frees_its_lock(coord: Coordinator, kind: Any) -> None:
    """An abandoned async generator whose loop has been closed is ended by its collection."""
    told = Heard(coord)
    live = kind(coord.coordinate("agent", "x"), keep)(1)

    async def first(live: Any = live) -> Any:
        return await live.__anext__()

    loop = asyncio.new_event_loop()
    try:
        assert loop.run_until_complete(first()) == 1
    finally:
        loop.close()
    assert taken_elsewhere(coord)
    del live, first
    gc.collect()
    assert told.names == ["started", "cancelled"]
    assert told.free[-1]
    assert coord.snapshot().locks == ()


@pytest.mark.parametrize("kind", [async_generator, gives_async_generator], ids=lambda k: k.__name__)
@pytest.mark.parametrize("end", ["aclose", "drop", "task"])
def test_A1_an_async_stream_closed_early_frees_its_lock(coord: Coordinator, kind: Any, end: str) -> None:
    """Closed by its task or another, or dropped on a running loop: the lock is free, and `_cancelled` is told."""
    told = Heard(coord)

    async def main() -> None:
        live = kind(coord.coordinate("agent", "x"), keep)(1)
        async for _ in live:
            break
        assert coord.lock("x").locked()
        if end == "aclose":
            await live.aclose()
        elif end == "task":
            await _in_task(live.aclose)
        del live
        while coord.lock("x").locked():
            await asyncio.sleep(0)

    asyncio.run(main())
    assert told.names == ["started", "cancelled"]
    assert told.free[-1]
    assert coord.snapshot().locks == ()


async def _in_task(fn: Callable[[], Any]) -> Any:
    async def call() -> Any:
        return await fn()

    return await asyncio.create_task(call())


@pytest.mark.parametrize("decorated", [False, True])
def test_A1_a_loop_that_ends_closes_its_streams_in_peace(coord: Coordinator, decorated: bool) -> None:
    """`asyncio.run` closes streams left open: their cleanup runs to its end under the lock, and nothing is reported."""
    told = Heard(coord)
    reported: list[Any] = []
    cleaned: list[bool] = []

    async def stream() -> Any:
        try:
            yield 1
        finally:
            for _ in range(3):
                await asyncio.sleep(0)
            cleaned.append(coord.lock("x").locked())

    agent = coord.coordinate("agent", "x")(stream) if decorated else stream
    kept = []

    async def main() -> None:
        asyncio.get_running_loop().set_exception_handler(lambda _, context: reported.append(context))
        for _ in range(4 if not decorated else 1):
            kept.append(agent())
            await kept[-1].__anext__()

    for _ in range(8):  # the order in which a loop closes its streams is the one of a set
        asyncio.run(main())
        assert reported == []
        coord.join(10)  # the next one's events come in another lane
    assert cleaned == [decorated] * (8 if decorated else 32)
    assert told.names == (["started", "cancelled"] * 8 if decorated else [])


def test_A1_a_coroutine_that_never_runs_frees_its_lock(coord: Coordinator) -> None:
    """A coroutine given by a plain function, and then dropped, closed or cancelled before its first step, is over."""
    told = Heard(coord)
    agent = gives_coroutine(coord.coordinate("agent", "x"), keep)

    async def main() -> None:
        task = asyncio.ensure_future(agent(1))
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task

    asyncio.run(main())
    gc.collect()
    assert told.names == ["started", "cancelled"]
    assert coord.snapshot().locks == ()
    with pytest.warns(RuntimeWarning, match="inner' was never awaited") as warned:  # as without the decorator
        agent(1)
    assert len(warned) == 1
    del warned  # it holds on to the coroutine
    gc.collect()
    assert told.names == ["started", "cancelled"] * 2
    assert coord.snapshot().locks == ()


def test_A1_L2_generator_and_consumer_may_take_the_same_lock(coord: Coordinator) -> None:
    """Re-entrant for whoever drives it: the body, the consumer between steps, and agents that either calls."""

    @coord.coordinate("helper", "x", timeout=10)
    def helper() -> bool:
        return taken_elsewhere(coord)

    @coord.coordinate("agent", "x")
    def agent() -> Any:
        with coord.lock("x", timeout=10):
            assert helper()
            yield 1
            assert helper()
        yield helper()

    for _ in agent():
        with coord.lock("x", timeout=10):
            assert helper()
    assert coord.snapshot().locks == ()


def test_A1_L2_a_consumer_inside_outlives_the_generator(coord: Coordinator) -> None:
    """A consumer's own block goes on holding the lock when the generator ends inside it."""

    @coord.coordinate("agent", "x")
    def agent() -> Any:
        yield 1

    live = agent()
    next(live)
    with coord.lock("x", timeout=10):
        live.close()
        assert taken_elsewhere(coord)
    assert not taken_elsewhere(coord)


@pytest.mark.parametrize("kind", [generator, gives_generator], ids=lambda k: k.__name__)
def test_A1_L2_another_thread_may_drive_it(coord: Coordinator, kind: Any) -> None:
    """Begun on one thread and driven on another, without any context: its body may take the lock, others may not."""

    def inside(x: int) -> bool:
        with coord.lock("x", timeout=10):
            return taken_elsewhere(coord)

    box = [kind(coord.coordinate("agent", "x"), inside)(1)]
    got: list[Any] = []
    join_all(start_all(lambda: got.extend(box[0])))
    assert got == [True]
    assert coord.snapshot().locks == ()


def test_A1_L2_the_consumer_may_change(coord: Coordinator) -> None:
    """Whoever made the latest step may take the lock between steps; who drove it before may not any more."""

    @coord.coordinate("agent", "x")
    def agent() -> Any:
        yield from range(3)

    live = agent()
    next(live)
    got: list[bool] = []

    def drive_on() -> None:
        next(live)
        got.append(coord.lock("x").acquire(timeout=0))
        coord.lock("x").release()

    join_all(start_all(drive_on))
    assert got == [True]
    assert not coord.lock("x").acquire(timeout=0)
    next(live)
    assert coord.lock("x").acquire(timeout=0)
    coord.lock("x").release()
    live.close()
    assert coord.snapshot().locks == ()


def test_A1_L2_streams_under_one_lock_may_be_nested(coord: Coordinator) -> None:
    """A consumer between steps may run another stream under the same lock, as it may run any agent."""

    @coord.coordinate("agent", "x", timeout=5)
    def agent(x: int) -> Any:
        yield from range(x)

    got: list[Any] = []
    join_all(start_all(lambda: got.extend((a, b) for a in agent(2) for b in agent(2))))
    assert got == [(0, 0), (0, 1), (1, 0), (1, 1)]
    assert coord.snapshot().locks == ()


@pytest.mark.parametrize("outer", [None, "x"])
def test_A1_L2_blocks_in_a_generator_lend_after_a_step_too(coord: Coordinator, outer: Any) -> None:
    """A lock that the body holds across a `yield` is lent to what it starts in a later step, decorated or not."""

    @coord.coordinate("agent", outer)
    def agent() -> Any:
        with coord.lock("y"):
            yield 1
            context = copy_context()
            got: list[bool] = []
            join_all(start_all(lambda: got.append(context.run(coord.lock("y").acquire, timeout=0))))
            yield got[0]

    assert list(agent()) == [1, True]


@pytest.mark.parametrize("heard", [False, True])
def test_A1_E12_a_run_in_a_generator_goes_on_after_a_step(coord: Coordinator, heard: bool) -> None:
    """A `run` block around a `yield` still names the run in the next step, whether anybody listens or not."""
    if heard:
        Heard(coord)

    @coord.coordinate("agent")
    def agent() -> Any:
        with coord.run("report"):
            yield coord.emit("e").event.run_id
            yield coord.emit("e").event.run_id

    assert list(agent()) == ["report", "report"]
    assert coord.emit("e").event.run_id is None


def test_A1_a_stream_leaves_nothing_in_its_drivers_context(coord: Coordinator) -> None:
    """Between steps the driver's context knows nothing of the stream: what it starts then may not borrow."""
    Heard(coord)

    @coord.coordinate("agent", "x")
    def agent() -> Any:
        yield coord.emit("inside").event.parent_id
        yield 2

    live = agent()
    assert next(live) is not None
    assert coord.emit("outside").event.parent_id is None
    context = copy_context()
    got: list[bool] = []
    join_all(start_all(lambda: got.append(context.run(coord.lock("x").acquire, timeout=0))))
    assert got == [False]
    live.close()


def test_A1_a_stream_holds_its_lock_until_it_ends(coord: Coordinator) -> None:
    """A streamed answer keeps everybody else out between its items."""

    @coord.coordinate("agent", "x")
    def agent() -> Any:
        yield from "abc"

    for _ in agent():
        assert taken_elsewhere(coord)
    assert not taken_elsewhere(coord)


# -- A1: under one lock ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", CALLS + STREAMS, ids=lambda kind: kind.__name__)
def test_A1_an_outer_block_keeps_its_own_name(coord: Coordinator, kind: Any) -> None:
    """An agent called by the lock's holder leaves no trace on the hold that goes on after it."""
    agent = kind(coord.coordinate("agent", "x"), keep)
    with coord.lock("x"):
        run(agent, 1)
        assert coord.snapshot().locks[0].holders[0].agent is None
        assert coord.snapshot().locks[0].holders[0].entries == 1


@pytest.mark.parametrize("kind", [coroutine, async_generator, gives_coroutine, gives_async_generator])
def test_A1_tasks_made_by_one_task_never_meet(coord: Coordinator, kind: Any) -> None:
    """Calls that one task makes and gathers run under their lock one at a time, whoever gave the coroutine."""
    inside = []
    Heard(coord)

    async def work(x: int) -> None:
        inside.append(x)
        await asyncio.sleep(0)
        assert inside == [x]
        await asyncio.sleep(0)
        inside.remove(x)

    async def stream(x: int) -> Any:
        await work(x)
        yield x

    dec = coord.coordinate("agent", "x", timeout=20)
    if kind is coroutine:
        agent = dec(work)
    elif kind is gives_coroutine:
        agent = dec(lambda x: work(x))
    else:
        agent = dec(stream) if kind is async_generator else dec(lambda x: stream(x))

    async def main() -> None:
        await asyncio.gather(*[_finish(live) for live in [agent(x) for x in range(5)]])

    asyncio.run(main())
    assert coord.snapshot().locks == ()


def test_A1_streams_given_by_one_thread_may_run_one_after_another(coord: Coordinator) -> None:
    """Calls made ahead, and iterated later in any order, don't hold each other up."""
    agent = gives_generator(coord.coordinate("agent", "x", timeout=5), lambda x: (x, taken_elsewhere(coord)))
    made = [agent(x) for x in range(3)]
    assert [list(live) for live in reversed(made)] == [[(2, True)], [(1, True)], [(0, True)]]
    assert coord.snapshot().locks == ()


def test_A1_async_kinds_under_one_lock_never_meet(coord: Coordinator) -> None:
    """Coroutines, async generators and threads under one lock: never two inside."""
    inside = 0
    calls = 0

    def enter() -> None:
        nonlocal inside, calls
        inside += 1
        calls += 1
        assert inside == 1

    def leave() -> None:
        nonlocal inside
        inside -= 1

    @coord.coordinate("one", "x")
    async def one() -> None:
        enter()
        await asyncio.sleep(0)
        leave()

    @coord.coordinate("stream", "x")
    async def stream() -> Any:
        enter()
        yield 1
        await asyncio.sleep(0)
        yield 2
        leave()

    @coord.coordinate("given", "x")
    def given() -> Any:
        return one.__wrapped__()  # type: ignore[attr-defined]

    @coord.coordinate("sync", "x")
    def sync() -> None:
        enter()
        threading.Event().wait(0)
        leave()

    async def consume() -> None:
        async for _ in stream():
            await asyncio.sleep(0)

    async def main() -> None:
        await asyncio.wait_for(asyncio.gather(*[f() for _ in range(50) for f in (one, consume)]), 30)

    threads = start_all(*[lambda: asyncio.run(main())] * 2, *[lambda: [sync() for _ in range(200)]] * 2)
    join_all(threads)
    assert (inside, calls) == (0, 600)
    assert coord.snapshot().locks == ()
    assert run(given) is None


@pytest.mark.parametrize("kind", [coroutine, async_generator], ids=lambda k: k.__name__)
@pytest.mark.parametrize("where", ["waiting", "running"])
def test_A1_L7_cancelling_frees_the_lock(coord: Coordinator, kind: Any, where: str) -> None:
    """An agent cancelled while it waits for its lock, or while it runs, leaves the lock to the next."""
    told = Heard(coord)
    never: list[Any] = []

    async def main() -> None:
        gate = asyncio.Event()

        @coord.coordinate("agent", "x")
        async def agent() -> None:
            never.append(1)
            await gate.wait()

        @coord.coordinate("agent", "x")
        async def stream() -> Any:
            never.append(1)
            await gate.wait()
            yield 1

        async def start() -> Any:
            return await (agent() if kind is coroutine else stream().__anext__())

        async with coord.lock("x") if where == "waiting" else contextlib.AsyncExitStack():
            task = _fresh_task(start())
            while not (coord.snapshot().locks and (where == "running" or coord.snapshot().locks[0].waiters)):
                await asyncio.sleep(0)
            await asyncio.sleep(0)
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task
        assert not coord.lock("x").locked()
        await coord.join_async()

    asyncio.run(main())
    assert told.names == ["started", "cancelled"]
    assert told.last["error_type"] == "CancelledError"
    assert len(never) == (where == "running")
    assert coord.snapshot().locks == ()


def _fresh_task(coro: Any) -> asyncio.Task[Any]:
    """A task that may not borrow what this one holds."""
    return Context().run(asyncio.get_running_loop().create_task, coro)


# -- A2: what it tells ------------------------------------------------------------------------------------------


def test_A2_events_carry_their_data(coord: Coordinator, clock: Any) -> None:
    """Each event has the keys that the promise names, no more and no less, with the agent as sender."""
    with Coordinator(name="test", clock=clock) as timed:
        told = Heard(timed)

        @timed.coordinate("agent", "x", control_flow=LookupError)
        def agent(x: int, *, then: Any) -> int:
            clock.advance(2)
            if then:
                raise then
            return x

        agent(1, then=None)
        for error in (ValueError("bad"), KeyError("flow")):
            with pytest.raises(type(error)):
                agent(1, then=error)
        assert told.names == ["started", "complete", "started", "failed", "started", "cancelled"]
        started, complete, _, failed, _, cancelled = (event.data for event in told.events)
        about = {"agent": "agent", "lock": "x"}
        assert started == {**about, "args": (1,), "kwargs": {"then": None}, "timestamp": 1_001_000.0}
        ends = {**about, "timestamp": 1_001_002.0, "duration": 2.0, "lock_wait": 0.0}
        assert complete == {**ends, "result": 1}
        common = {"agent", "timestamp", "duration", "lock", "lock_wait", "error", "error_type", "exception"}
        assert set(failed) == set(cancelled) == common
        assert (failed["error"], failed["error_type"]) == ("bad", "ValueError")
        assert (cancelled["error_type"], type(cancelled["exception"])) == ("KeyError", KeyError)
        assert {event.sender for event in told.events} == {"agent"}
        assert [event.parent_id for event in told.events[:2]] == [None, told.events[0].id]


def test_A2_without_a_lock_there_is_no_lock_wait(coord: Coordinator) -> None:
    """`lock_wait` is there only where a lock was waited for."""
    told = Heard(coord)
    run(function(coord.coordinate("agent"), keep), 1)
    assert "lock_wait" not in told.last


def test_A2_started_is_told_before_the_lock_is_waited_for(coord: Coordinator) -> None:
    """An agent that stands in line has told that it started; how long it stood there is in its last event."""
    told = Heard(coord)
    agent = function(coord.coordinate("agent", "x"), keep)
    coord.lock("x").acquire()
    threads = start_all(lambda: agent(1))
    eventually(lambda: coord.snapshot().locks[0].waiters)
    assert told.names == ["started"]
    coord.lock("x").release()
    join_all(threads)
    assert told.names == ["started", "complete"]
    assert told.last["lock_wait"] > 0


def test_A2_the_events_say_which_locks_and_how_long_it_waited_in_vain(coord: Coordinator) -> None:
    """One name as it is, several as a tuple, in both events; the wait of a call that never got its lock counts too."""
    told = Heard(coord)

    @coord.coordinate("agent", ["b_{n}", "a"], timeout=0)
    def agent(n: int) -> None:
        """Takes two locks."""

    agent(1)
    assert told.names == ["started", "complete"]
    assert [event.data["lock"] for event in told.events] == [("a", "b_1")] * 2
    coord.lock("a").acquire()

    def refused() -> None:
        with pytest.raises(CoordinationTimeoutError):
            agent(2)

    join_all(start_all(refused))
    coord.lock("a").release()
    assert told.names[2:] == ["started", "failed"]
    assert (told.last["lock"], told.last["lock_wait"] >= 0) == (("a", "b_2"), True)


def test_A2_a_call_cancelled_in_line_says_how_long_it_stood_there(coord: Coordinator) -> None:
    """`lock_wait` is known of a wait that never ended well, too."""
    told = Heard(coord)

    @coord.coordinate("agent", "x")
    async def agent() -> None:
        """Never runs."""

    async def hold(held: asyncio.Event, enough: asyncio.Event) -> None:
        async with coord.lock("x"):
            held.set()
            await enough.wait()

    async def main() -> None:
        held, enough = asyncio.Event(), asyncio.Event()
        holder = asyncio.create_task(hold(held, enough))
        await held.wait()
        call = asyncio.create_task(agent())
        while not coord.snapshot().locks[0].waiters:
            await asyncio.sleep(0)
        call.cancel()
        with pytest.raises(asyncio.CancelledError):
            await call
        enough.set()
        await holder

    asyncio.run(main())
    assert told.names == ["started", "cancelled"]
    assert (told.last["lock"], told.last["lock_wait"] > 0) == ("x", True)


def test_A2_a_lock_name_that_fails_fails_the_agent(coord: Coordinator) -> None:
    """What goes wrong in a `lock_name` function is the agent's failure, and `_started` is told all the same."""
    told = Heard(coord)

    @coord.coordinate("agent", lambda: 1 // 0)
    def agent() -> None:
        """Never runs."""

    with pytest.raises(ZeroDivisionError):
        agent()
    assert told.names == ["started", "failed"]
    assert "lock" not in told.events[0].data


def test_A5_the_events_say_whom_the_agent_came_after_and_for_how_long(coord: Coordinator) -> None:
    """`after` in `_started`, `after_wait` in the last event."""
    told = Heard(coord)

    @coord.coordinate("first")
    def first() -> None:
        """Comes first."""

    @coord.coordinate("agent", after="first")
    def agent() -> None:
        """Comes second."""

    with coord.run("r"):
        first()
        agent()
    assert told.names == ["started", "complete"]
    mine = [event.data for event in told.events]
    assert mine[0]["after"] == ("first",)
    assert mine[1]["after_wait"] >= 0


@every_kind
def test_A2_a_lock_timeout_fails_the_agent(coord: Coordinator, kind: Any) -> None:
    """No lock in time: `CoordinationTimeoutError` is raised, `_failed` is told, and the agent's code never ran."""
    told = Heard(coord)
    ran: list[Any] = []
    agent = kind(coord.coordinate("agent", "x", timeout=0), ran.append)
    release = threading.Event()
    taken = threading.Event()

    def holder() -> None:
        with coord.lock("x"):
            taken.set()
            release.wait(20)

    threads = start_all(holder)
    assert taken.wait(10)
    with pytest.raises(CoordinationTimeoutError, match="'x'") as caught:
        run(agent, 1)
    release.set()
    join_all(threads)
    assert told.names == ["started", "failed"]
    assert told.last["exception"] is caught.value
    assert caught.value.name == "x"
    assert ran == []


def test_A2_the_coordinators_lock_timeout_is_for_those_who_name_none() -> None:
    """`lock_timeout` holds for agents without a `timeout` of their own, as it is at the time of the call."""
    with Coordinator(lock_timeout=0) as coord:
        brief = function(coord.coordinate("brief", "x"), keep)
        patient = function(coord.coordinate("patient", "x", timeout=20), keep)
        coord.lock("x").acquire()
        failed: list[BaseException] = []

        def attempt() -> None:
            try:
                brief(1)
            except CoordinationTimeoutError as error:
                failed.append(error)

        join_all(start_all(attempt))
        assert len(failed) == 1
        coord.configure(lock_timeout=20)
        threads = start_all(lambda: brief(1), lambda: patient(1))
        eventually(lambda: len(coord.snapshot().locks[0].waiters) == 2)
        coord.lock("x").release()
        join_all(threads)


class Interrupt(Exception):
    """A framework's way of saying: pause here."""


@pytest.mark.parametrize("control_flow", [Interrupt, (KeyError, Interrupt)], ids=str)
@pytest.mark.parametrize("kind", [function, coroutine, generator, async_generator], ids=lambda k: k.__name__)
def test_A2_control_flow_is_no_failure(coord: Coordinator, kind: Any, control_flow: Any) -> None:
    """An exception type named in `control_flow=`, or one derived from it, is told as `_cancelled`."""
    told = Heard(coord)

    class Pause(Interrupt):
        pass

    def inside(x: Any) -> Any:
        raise Pause("here")

    with pytest.raises(Pause):
        run(kind(coord.coordinate("agent", "x", control_flow=control_flow), inside), 1)
    assert told.names == ["started", "cancelled"]
    assert told.last["error_type"] == "Pause"


@pytest.mark.parametrize("kind", STREAMS, ids=lambda k: k.__name__)
def test_A2_a_streams_result_is_a_count_or_what_collect_makes(coord: Coordinator, kind: Any) -> None:
    """`result` is the number of items, or what `collect=` makes of the list of them; never something live."""
    told = Heard(coord)
    run(kind(coord.coordinate("agent"), keep), 5)
    assert told.last["result"] == 1
    assert run(kind(coord.coordinate("agent", "x", collect=tuple), keep), 5) == [5]
    assert told.last["result"] == (5,)
    assert told.names == ["started", "complete"] * 2


def test_A2_a_count_counts_the_items(coord: Coordinator) -> None:
    """Items are counted in the order of coming, whatever they are; `collect` sees them all."""
    told = Heard(coord)

    def words() -> Any:
        yield from ("a", None, "b")

    list(coord.coordinate("agent")(words)())
    assert told.last["result"] == 3
    list(coord.coordinate("agent", collect=list)(words)())
    assert told.last["result"] == ["a", None, "b"]


@every_kind
def test_A2_the_lock_is_free_when_the_end_is_told(coord: Coordinator, kind: Any) -> None:
    """A handler of the end event finds the agent's lock released, and can take it."""
    told = Heard(coord)
    took: list[bool] = []

    @coord.on("agent_complete")
    def next_one(data: Any) -> None:
        took.append(coord.lock("x").acquire(timeout=0))
        coord.lock("x").release()

    agent = kind(coord.coordinate("agent", "x"), keep)
    for _ in range(5):
        run(agent, 1)
        coord.join(20)
    assert told.names == ["started", "complete"] * 5
    assert told.free[1::2] == took == [True] * 5


def test_A2_a_thousand_calls_start_before_they_end(coord: Coordinator) -> None:
    """Over 1,000 calls from many threads and tasks, each call's `_started` is handled before its one end event."""
    told = Heard(coord)

    @coord.coordinate("agent", "x_{key}")
    def agent(key: Any) -> Any:
        if key[0] % 7 == 3:
            raise ValueError(key)
        return key

    @coord.coordinate("agent", "x_{key}")
    async def async_agent(key: Any) -> Any:
        await asyncio.sleep(0)
        return key

    def calls(worker: int) -> None:
        for i in range(125):
            with contextlib.suppress(ValueError):
                agent((i, worker))

    async def tasks(worker: int) -> None:
        await asyncio.gather(*(async_agent((i, worker)) for i in range(125)))

    workers = [functools.partial(calls, n) for n in range(4)]
    workers += [lambda n=n: asyncio.run(tasks(n)) for n in range(4, 8)]
    join_all(start_all(*workers))
    coord.join(30)
    begun: dict[str, Any] = {}
    ended = set()
    for event in told.events:
        if event.name == "agent_started":
            begun[event.id] = event.data["args"][0]
        else:
            assert event.parent_id in begun
            assert event.parent_id not in ended
            ended.add(event.parent_id)
            key = begun[event.parent_id]
            assert event.data.get("result", key) == key
    assert len(begun) == len(ended) == 1000


@pytest.mark.parametrize("in_run", [False, True])
def test_A2_E2_all_events_of_a_call_go_into_one_lane(coord: Coordinator, in_run: bool) -> None:
    """A stream begun on one thread and ended on another tells its end in the lane of its start."""
    gate = threading.Event()
    order: list[str] = []

    @coord.on("agent_started")
    def slow(data: Any) -> None:
        gate.wait(20)
        order.append("started")

    @coord.on("agent_complete")
    def fast(data: Any) -> None:
        order.append("complete")

    live = generator(coord.coordinate("agent"), keep)(1)
    with coord.run("report") if in_run else contextlib.nullcontext():
        next(live)
    join_all(start_all(lambda: list(live)))
    probe = coord.on("probe", lambda data: order.append("probe"))
    start_all(lambda: coord.emit("probe"))
    eventually(lambda: order)
    assert order == ["probe"]
    gate.set()
    coord.join(20)
    assert order == ["probe", "started", "complete"]
    probe.cancel()


def test_A2_the_events_of_a_call_carry_its_run(coord: Coordinator) -> None:
    """Both events belong to the run in which the agent was called, and so does what the agent emits."""
    told = Heard(coord)
    ids: list[Any] = []
    agent = function(coord.coordinate("agent", "x"), lambda x: ids.append(coord.emit("mine").event))
    with coord.run("report"):
        agent(1)
    assert told.names == ["started", "complete"]
    assert {event.run_id for event in told.events} == {"report"} == {ids[0].run_id}
    assert ids[0].parent_id == told.events[0].id == told.events[1].parent_id


@pytest.mark.parametrize("lock", [None, "x", ["x", "y"]], ids=str)
@pytest.mark.parametrize("kind", [function, coroutine, generator, async_generator], ids=lambda k: k.__name__)
def test_A2_who_subscribes_while_an_agent_runs_hears_its_end(coord: Coordinator, kind: Any, lock: Any) -> None:
    """The end event goes to those who listen when the agent ends, also if nobody did when it began."""
    heard: list[Any] = []
    agent = kind(coord.coordinate("agent", lock), lambda x: coord.on("agent_complete", heard.append) and x)
    run(agent, 1)
    coord.join(20)
    assert len(heard) == 1


def test_A2_subscribing_and_cancelling_is_seen_by_the_next_call(coord: Coordinator) -> None:
    """An agent that nobody listened to is heard as soon as somebody does, by name or by pattern, and no longer."""
    heard: list[Any] = []
    agent = function(coord.coordinate("agent", "x"), keep)
    agent(0)
    for pattern in ("agent_complete", "*_complete", "agent*"):
        with coord.on(pattern, heard.append):
            agent(1)
            coord.join(20)
        assert heard
        heard.clear()
        agent(2)
        coord.join(20)
        assert not heard


# -- A3: nothing that coordination does gets at the agent --------------------------------------------------------


@contextlib.contextmanager
def logged(caplog: Any) -> Any:
    """What the logger says within."""
    caplog.clear()
    with caplog.at_level(logging.DEBUG, logger="agentdiff"):
        yield lambda: " ".join(record.getMessage() for record in caplog.records)


@pytest.mark.parametrize("kind", [function, coroutine, generator, async_generator], ids=lambda k: k.__name__)
@pytest.mark.parametrize("fails", [False, True])
def test_A3_E5_a_full_queue_is_counted_and_logged_only(caplog: Any, kind: Any, fails: bool) -> None:
    """Lifecycle events that find no room are counted and logged; result and exception are what they are."""
    gate = threading.Event()
    error = ValueError("mine")

    def inside(x: int) -> int:
        if fails:
            raise error
        return x

    with Coordinator(max_pending=1) as coord, logged(caplog) as text:
        coord.on("block", lambda data: gate.wait(20))
        Heard(coord)
        agent = kind(coord.coordinate("agent", "x"), inside)
        coord.emit("block")
        try:
            with pytest.raises(QueueFullError):
                coord.emit("block")
            if fails:
                with pytest.raises(ValueError, match="mine") as caught:
                    run(agent, 1)
                assert caught.value is error
                assert error.__context__ is None
            else:
                assert run(agent, 1) in (1, [1])
            assert coord.snapshot().counts.events_refused == 2
            assert coord.snapshot().locks == ()
        finally:
            gate.set()
        assert "agent_started" in text()


@every_kind
def test_A3_a_closed_coordinator_changes_nothing(kind: Any) -> None:
    """After `close()` agents still run, and still lock."""
    coord = Coordinator()
    Heard(coord)
    agent = kind(coord.coordinate("agent", "x"), lambda x: bool(coord.snapshot().locks))
    coord.close()
    assert run(agent, 1) in (True, [True])


@every_kind
def test_A3_closing_while_an_agent_runs_changes_nothing(kind: Any, caplog: Any) -> None:
    """The coordinator is closed before the agent ends: the result is unchanged, what can't be told is logged."""
    coord = Coordinator()
    Heard(coord)

    def inside(x: int) -> int:
        join_all(start_all(coord.close))
        return x

    agent = kind(coord.coordinate("agent", "x"), inside)
    with logged(caplog) as text:
        assert run(agent, 1) in (1, [1])
    assert "agent_complete" in text()
    assert coord.snapshot().locks == ()


def test_A3_closing_just_before_an_agent_starts_changes_nothing() -> None:
    """A coordinator that is closed while an agent finds out who listens doesn't raise into the agent."""
    coord = Coordinator()
    agent = function(coord.coordinate("agent", "x"), keep)
    got: list[Any] = []

    def attempt() -> None:
        try:
            got.append(agent(1))
        except BaseException as error:
            got.append(error)

    with coord._bus.mutex:  # the agent is stopped where it looks for listeners, until the coordinator is closed
        threads = start_all(attempt)
        eventually(lambda: got or _is_in(threads[0], "find_route"))
        coord.close()
    join_all(threads)
    assert got == [1]


def _is_in(thread: threading.Thread, name: str) -> bool:
    gc.disable()  # a collection inside `_current_frames` hangs 3.11
    try:
        frame = sys._current_frames().get(thread.ident or 0)
    finally:
        gc.enable()
    while frame is not None:
        if frame.f_code.co_name.lstrip("_") == name:
            return True
        frame = frame.f_back
    return False


@pytest.mark.parametrize("kind", [generator, async_generator], ids=lambda k: k.__name__)
def test_A3_a_failing_collect_is_logged_only(coord: Coordinator, kind: Any, caplog: Any) -> None:
    """`collect=` that raises doesn't reach the agent: its items come, `_complete` is told with their number."""
    told = Heard(coord)
    with logged(caplog) as text:
        assert run(kind(coord.coordinate("agent", "x", collect=lambda items: 1 / 0), keep), 1) == [1]
        assert told.last["result"] == 1
    assert "collect" in text()
    assert told.names == ["started", "complete"]


@pytest.mark.parametrize("kind", [generator, async_generator], ids=lambda k: k.__name__)
def test_L8_an_interrupt_in_collect_frees_the_lock(coord: Coordinator, kind: Any) -> None:
    """Ctrl-C while `collect=` works ends the stream: the lock is free, and one end event is told."""
    told = Heard(coord)

    def interrupt(items: Any) -> Any:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(kind(coord.coordinate("agent", "x", collect=interrupt), keep), 1)
    assert coord.snapshot().locks == ()
    assert len(told.names) == 2


def test_A2_collect_works_after_the_lock_is_released(coord: Coordinator) -> None:
    """`collect=` is not the agent's own code: it doesn't hold up the next in line."""
    Heard(coord)
    locked: list[bool] = []
    run(generator(coord.coordinate("agent", "x", collect=lambda _: locked.append(coord.lock("x").locked())), keep), 1)
    assert locked == [False]


class Unspeakable(Exception):
    def __str__(self) -> str:
        raise OSError("no words")


@every_kind
def test_A3_an_error_that_has_no_words_comes_through(coord: Coordinator, kind: Any) -> None:
    """An exception whose `str()` fails is raised on unchanged, and told."""
    told = Heard(coord)
    error = Unspeakable()

    def inside(x: int) -> int:
        raise error

    with pytest.raises(Unspeakable) as caught:
        run(kind(coord.coordinate("agent", "x"), inside), 1)
    assert caught.value is error
    assert told.names == ["started", "failed"]
    assert isinstance(told.last["error"], str)


def test_A3_a_failing_handler_does_not_reach_the_agent(coord: Coordinator) -> None:
    """Handlers that raise leave result and exception alone."""
    coord.on("agent_*", lambda data: 1 / 0)
    assert run(function(coord.coordinate("agent", "x"), keep), 1) == 1
    coord.join(20)
    assert coord.snapshot().counts.handlers_failed == 2


def test_A3_a_release_that_fails_does_not_replace_the_result(coord: Coordinator, caplog: Any) -> None:
    """An agent whose own code has given its lock away still returns what it returns."""

    def inside(x: int) -> int:
        coord.lock("x").release()
        return x

    for heard in (False, True):
        if heard:
            Heard(coord)
        assert function(coord.coordinate("agent", "x"), inside)(1) == 1
        assert coord.snapshot().locks == ()


def test_A3_results_are_passed_through_by_identity(coord: Coordinator) -> None:
    """What an agent returns, sends and receives is the very object."""
    thing = object()
    for heard in (False, True):
        if heard:
            Heard(coord)
        for kind in (function, coroutine, instance, partial):
            assert run(kind(coord.coordinate("agent", "x"), lambda x: x), thing) is thing


def test_A3_what_a_plain_function_returns_is_left_alone(coord: Coordinator) -> None:
    """Futures, iterators, awaitables of its own kind: only live coroutines and generators are taken along."""
    Heard(coord)

    class Awaitable:
        def __await__(self) -> Any:
            return iter(())

    for thing in (Awaitable(), iter([1]), range(3), map(str, [1]), None):
        assert coord.coordinate("agent", "x")(lambda thing=thing: thing)() is thing
    assert coord.snapshot().locks == ()


# -- A4: what it locks ------------------------------------------------------------------------------------------


class Customer:
    def __init__(self, id: int) -> None:
        self.id = id
        self.tags = {"plan": "gold"}


def locks_of(coord: Coordinator) -> list[str]:
    return [lock.name for lock in coord.snapshot().locks]


@pytest.mark.parametrize(
    ("spec", "call", "names"),
    [
        ("x", lambda f: f(1), ["x"]),
        ("x{{y}}", lambda f: f(1), ["x{y}"]),
        ("c_{a}", lambda f: f(7), ["c_7"]),
        ("c_{a}", lambda f: f(a=7), ["c_7"]),
        ("c_{b}", lambda f: f(1), ["c_default"]),
        ("c_{b}", lambda f: f(1, "z"), ["c_z"]),
        ("{a}_{b}", lambda f: f(1, b="z"), ["1_z"]),
        ("c_{a.id}", lambda f: f(Customer(4)), ["c_4"]),
        ("c_{a.tags[plan]}", lambda f: f(Customer(4)), ["c_gold"]),
        ("c_{a[0]}", lambda f: f(["q"]), ["c_q"]),
        ("c_{a!r}", lambda f: f("q"), ["c_'q'"]),
        ("c_{a:03d}", lambda f: f(7), ["c_007"]),
        ("c_{a:{b}}", lambda f: f(7, "03d"), ["c_007"]),
        ("c_{rest}", lambda f: f(1, "b", 2, 3), ["c_(2, 3)"]),
        ("c_{anything}", lambda f: f(1, anything=5), ["c_5"]),
        (["y", "x", "y"], lambda f: f(1), ["x", "y"]),
        (("x_{a}", "x_{b}"), lambda f: f(2, 1), ["x_1", "x_2"]),
        (["x_{a}", "x_{b}"], lambda f: f(1, 1), ["x_1"]),
        (lambda a, *rest, **more: f"f_{a}", lambda f: f(1, 2), ["f_1"]),
        (lambda *args, **kwargs: [f"f_{arg}" for arg in args], lambda f: f(2, 1), ["f_1", "f_2"]),
        (lambda *args, **kwargs: {"s"}, lambda f: f(2), ["s"]),
        (lambda *args, **kwargs: None, lambda f: f(2), []),
        (lambda *args, **kwargs: [], lambda f: f(2), []),
    ],
)
@pytest.mark.parametrize("kind", ["function", "coroutine", "generator", "async generator"])
def test_A4_lock_names_come_from_the_call(coord: Coordinator, kind: str, spec: Any, call: Any, names: Any) -> None:
    """Templates, lists and functions name the locks of each call, by its arguments and their defaults."""
    dec = coord.coordinate("agent", spec)
    if kind == "function":

        @dec
        def agent(a: Any, b: str = "default", *rest: Any, **more: Any) -> Any:
            return locks_of(coord)

    elif kind == "coroutine":

        @dec
        async def agent(a: Any, b: str = "default", *rest: Any, **more: Any) -> Any:
            return locks_of(coord)

    elif kind == "generator":

        @dec
        def agent(a: Any, b: str = "default", *rest: Any, **more: Any) -> Any:
            yield from locks_of(coord)

    else:

        @dec
        async def agent(a: Any, b: str = "default", *rest: Any, **more: Any) -> Any:
            for name in locks_of(coord):
                yield name

    assert run(functools.partial(call, agent)) == names
    assert locks_of(coord) == []


def test_A4_a_template_may_name_self_and_cls(coord: Coordinator) -> None:
    """A method's template sees the object, a class method's the class, a partial's what is left of the arguments."""

    class Team:
        name = "red"

        @coord.coordinate("agent", "{self.name}_{x}")
        def method(self, x: int) -> Any:
            return locks_of(coord)

        @coord.coordinate("agent", "{cls.__name__}_{x}")
        @classmethod
        def of_class(cls, x: int) -> Any:
            return locks_of(coord)

        @coord.coordinate("agent", "s_{x}")
        @staticmethod
        def static(x: int) -> Any:
            return locks_of(coord)

        def __call__(self, x: int) -> Any:
            return locks_of(coord)

    assert Team().method(1) == ["red_1"]
    assert Team.of_class(2) == ["Team_2"]
    assert Team.static(3) == Team().static(3) == ["s_3"]
    assert coord.coordinate("agent", "i_{x}")(Team())(4) == ["i_4"]
    plain = Team.method.__wrapped__  # type: ignore[attr-defined]
    assert coord.coordinate("agent", "p_{x}")(functools.partial(plain, Team()))(5) == ["p_5"]
    assert coord.coordinate("agent", "p_{x}")(functools.partial(plain, x=6))(Team()) == ["p_6"]


@pytest.mark.parametrize("spec", ["c_{nobody}", ["x", "c_{nobody}"], "{nobody.id}", "{x:{nobody}}"], ids=str)
@pytest.mark.parametrize("kind", [function, coroutine, generator, async_generator, method, static_above, class_above])
def test_A4_a_placeholder_that_is_no_parameter_is_refused(coord: Coordinator, kind: Any, spec: Any) -> None:
    """A template that names no parameter is refused when decorating, and the message names it."""
    with pytest.raises(ValueError, match="nobody"):
        kind(coord.coordinate("agent", spec), keep)


@pytest.mark.parametrize("lock", [None, "x", "c_{a}", ["x", "c_{a}"], ["x", "y"]], ids=str)
@pytest.mark.parametrize("heard", [False, True])
def test_A4_a_wrong_call_is_a_type_error_as_ever(coord: Coordinator, lock: Any, heard: bool) -> None:
    """Missing, unknown and surplus arguments raise `TypeError`, and no lock is left."""
    if heard:
        Heard(coord)
    dec = coord.coordinate("agent", lock)

    def plain(a: int) -> Any: ...

    async def co(a: int) -> Any: ...

    def gen(a: int) -> Any:
        yield

    async def agen(a: int) -> Any:
        yield

    for fn in (plain, co, gen, agen):
        for args, kwargs in (((), {}), ((1, 2), {}), ((1,), {"b": 2}), ((1,), {"a": 2})):
            with pytest.raises(TypeError):
                run(dec(fn), *args, **kwargs)
    assert locks_of(coord) == []


def test_A4_a_template_over_kwargs_that_are_not_given_is_a_type_error(coord: Coordinator) -> None:
    """Where `**kwargs` may bring the parameter and the call doesn't, the call is refused and says what is missing."""

    @coord.coordinate("agent", "c_{customer}")
    def agent(**options: Any) -> Any:
        return locks_of(coord)

    assert agent(customer=1) == ["c_1"]
    with pytest.raises(TypeError, match="customer"):
        agent(other=1)


@pytest.mark.parametrize("bad", [3, "", ["x", ""], [3], b"x"], ids=repr)
def test_A4_a_function_that_names_no_lock_is_refused(coord: Coordinator, bad: Any) -> None:
    """What a `lock_name` function gives is checked: no string, or an empty one, fails the call."""
    told = Heard(coord)
    agent = function(coord.coordinate("agent", lambda *args, **kwargs: bad), keep)
    with pytest.raises((TypeError, ValueError)):
        agent(1)
    assert told.names == ["started", "failed"]


@pytest.mark.parametrize(
    "spec", [["b", "a"], ["a", "b"], ["{x}", "a"], lambda x: ["b", "a"], lambda x: ("a", "b")], ids=str
)
def test_A4_L6_several_locks_are_taken_in_one_order(coord: Coordinator, spec: Any) -> None:
    """However an agent names its locks, it takes them in the same order, and waits for the second with the first."""
    agent = coord.coordinate("agent", spec)(lambda x: locks_of(coord))
    got: list[Any] = []
    for held, first in (("b", True), ("a", False)):
        with coord.lock(held):
            threads = start_all(lambda: got.append(agent("b")))
            eventually(lambda held=held: coord.snapshot().locks[-1 if held == "b" else 0].waiters)
            assert locks_of(coord) == (["a", "b"] if first else ["a"])
        join_all(threads)
    assert got == [["a", "b"]] * 2


def test_A4_L6_all_locks_are_taken_or_none(coord: Coordinator) -> None:
    """Agents that name the same locks in opposite orders don't hold each other up for ever; all or none is taken."""
    calls: list[int] = []
    one = function(coord.coordinate("one", ["a", "b"]), calls.append)
    other = function(coord.coordinate("other", ["b", "a"]), calls.append)
    join_all(start_all(*[lambda f=f: [f(1) for _ in range(300)] for f in (one, other)]))
    assert len(calls) == 600
    hasty = function(coord.coordinate("hasty", ["a", "b"], timeout=0), calls.append)
    coord.lock("b").acquire()
    failed: list[Any] = []

    def attempt() -> None:
        try:
            hasty(1)
        except CoordinationTimeoutError as error:
            failed.append((error.name, coord.lock("a").locked()))

    join_all(start_all(attempt))
    assert failed == [("b", False)]
    coord.lock("b").release()
    assert locks_of(coord) == []


def test_A1_the_default_coordinator_is_used_by_the_facade(fresh_default: Coordinator) -> None:
    """`agentdiff.coordinate` is the same decorator on the default coordinator."""
    heard: list[Any] = []
    when("agent_complete", lambda data: heard.append(data["result"]))
    assert run(generator(coordinate("agent", "x", collect=list), keep), 1) == [1]
    default_coordinator().join(20)
    assert heard == [[1]]
    reset_default()
