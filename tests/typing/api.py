"""A user's view, for the type checker alone: `mypy --strict` must find nothing to complain about here.

Each wrong use carries the error that it must give: an `ignore` that isn't needed is an error too.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterator
from typing import TYPE_CHECKING, Any, Callable, Optional

import agentdiff
import agentdiff_coordination
from agentdiff import (
    CoordinationTimeoutError,
    Coordinator,
    DeadlockError,
    Delivery,
    Event,
    Lock,
    LockGroup,
    LockInfo,
    NotHeldError,
    Run,
    Slot,
    Subscription,
    configure,
    coordinate,
    default_coordinator,
    emit,
    lock,
    when,
)
from agentdiff.stores import open_store

if TYPE_CHECKING:
    from typing_extensions import assert_type


def decorated_functions_keep_their_types(coord: Coordinator) -> None:
    @coord.coordinate("researcher", lock_name="openai_api", timeout=3)
    def research(topic: str, *, depth: int = 1) -> list[str]:
        return [topic] * depth

    assert_type(research("bees", depth=2), "list[str]")
    research(3)  # type: ignore[arg-type]
    research("bees", width=2)  # type: ignore[call-arg]

    @coordinate("analyst", lock_name="customer_{customer_id}")
    def analyse(customer_id: int) -> Optional[str]:
        return None

    assert_type(analyse(1), Optional[str])

    @coord.coordinate("words", collect="".join)
    def words() -> Iterator[str]:
        yield "a"

    assert_type(words(), Iterator[str])

    @coord.coordinate("stream", ["a", "b"], control_flow=KeyError)
    async def stream(n: int) -> AsyncIterator[bytes]:
        yield b""

    assert_type(stream(1), AsyncIterator[bytes])

    plain: Callable[[int], str] = coord.coordinate("plain", lambda x: f"lock_{x}", timeout=None)(str)
    assert_type(plain(1), str)


async def coroutine_functions_too(coord: Coordinator) -> None:
    @coord.coordinate("fetch", control_flow=(KeyError, ValueError))
    async def fetch(url: str) -> bytes:
        return url.encode()

    assert_type(await fetch("x"), bytes)
    len(fetch("x"))  # type: ignore[arg-type]


class Team:
    coord = Coordinator()

    @coord.coordinate("member", lock_name="{self}")
    def member(self, x: int) -> str:
        return str(x)

    @coord.coordinate("async_member")
    async def async_member(self) -> int:
        return 1

    @staticmethod
    @coord.coordinate("static")
    def static(x: int) -> int:
        return x

    @classmethod
    @coord.coordinate("of_class")
    def of_class(cls, x: int) -> int:
        return x


async def methods_too(team: Team) -> None:
    assert_type(team.member(1), str)
    assert_type(await team.async_member(), int)
    assert_type(Team.static(1), int)
    assert_type(Team.of_class(1), int)
    team.member("1")  # type: ignore[arg-type]


def locks(coord: Coordinator) -> None:
    handle = coord.lock("x", timeout=3, lend=False)
    assert_type(handle, Lock)
    assert_type(handle.acquire(timeout=1), bool)
    assert_type(handle.acquire(blocking=False), bool)
    assert_type(handle.locked(), bool)
    assert_type(handle.name, str)
    handle.release()
    with handle as slot:
        assert_type(slot, Slot)
    group = coord.lock("x", "y", "z")
    assert_type(group, LockGroup)
    with group as slots:
        assert_type(slots, "tuple[Slot, ...]")
    assert_type(lock("x"), Lock)
    assert_type(lock("x", "y"), LockGroup)
    coord.lock(3)  # type: ignore[call-overload]
    coord.lock()  # type: ignore[call-overload]


async def async_locks(coord: Coordinator) -> None:
    async with coord.lock("x") as slot:
        assert_type(slot, Slot)
    async with coord.lock("x", "y") as slots:
        assert_type(slots, "tuple[Slot, ...]")
    assert_type(await coord.lock("x").acquire_async(timeout=3), bool)


async def events(coord: Coordinator) -> None:
    @coord.on("e", pass_event=True, concurrent=True, once=True)
    def handle(event: Event) -> str:
        return event.name

    assert_type(handle(coord.emit("e").event), str)

    @when("e")
    async def handle_async(data: dict[str, Any]) -> None: ...

    await handle_async({})
    assert_type(coord.on("e", print), Subscription)
    assert_type(when("e", handle_async), Subscription)
    with coord.on("e", print) as subscription:
        assert_type(subscription.active, bool)
    delivery = coord.emit("e", {"a": 1}, sender="me")
    assert_type(delivery, Delivery)
    assert_type(delivery.wait(3), Delivery)
    assert_type(await delivery, Delivery)
    assert_type(delivery.results, "tuple[Any, ...]")
    assert_type(delivery.errors, "tuple[BaseException, ...]")
    assert_type(emit("e").event.run_id, Optional[str])
    with coord.run("report") as run:
        assert_type(run, Run)
        assert_type(run.id, str)
    coord.emit(3)  # type: ignore[arg-type]
    delivery.event.name = "other"  # type: ignore[misc]


async def the_rest(coord: Coordinator) -> None:
    assert_type(default_coordinator(), Coordinator)
    snapshot = coord.snapshot()
    assert_type(snapshot.locks[0], LockInfo)
    assert_type(snapshot.pending, int)
    assert_type(snapshot.locks[0].holders[0].held_for, float)
    assert_type(snapshot.locks[0].waiters[0].timeout, Optional[float])
    assert_type(coord.explain(), str)
    coord.join(3)
    await coord.join_async()
    configure(workers=3, lock_timeout=None, max_pending=10)
    coord.configure(workers="3")  # type: ignore[arg-type]
    with Coordinator(name="mine", workers=2, lock_timeout=3.5) as own:
        assert_type(own, Coordinator)
    async with Coordinator() as own:
        assert_type(own, Coordinator)

    def tool(x: int) -> str:
        return str(x)

    assert_type(coord.carry(tool)(1), str)
    assert_type(agentdiff.__version__, str)


def errors() -> None:
    try:
        pass
    except CoordinationTimeoutError as error:
        assert_type(error.timeout, Optional[float])
        assert_type(error.holder, Optional[str])
        assert_type(error.waiting, int)
        timeout: TimeoutError = error
        raise timeout from None
    except DeadlockError as error:
        assert_type(error.cycle, "tuple[str, ...]")
    except NotHeldError as error:
        assert_type(error.name, str)


def the_old_names() -> None:
    @agentdiff_coordination.coordinate("a", lock_name="x")
    def agent(x: int) -> str:
        return str(x)

    @agentdiff_coordination.when("a_complete")
    def handle(data: Any) -> int:
        return 1

    assert_type(agent(1), str)
    assert_type(handle({}), int)
    assert_type(agentdiff_coordination.emit("e", 1, "me"), str)
    agentdiff_coordination.configure_broker("inmemory")


def stores(coord: Coordinator) -> None:
    store = open_store("memory://")
    with Coordinator(store=store, flush_timeout=None, redact=("password",), max_payload=1024) as other:
        other.configure(store="memory://")
        coord.flush(1)
        assert_type(list(store.read(name="a*", since=1, limit=3)), list[Event])
    assert_type(coord.snapshot().counts.events_dropped, int)
