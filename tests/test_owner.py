"""Who is asking: task, else thread; never a number that the system uses again."""

from __future__ import annotations

import asyncio
import gc
import threading
import weakref
from typing import Any

import pytest
from support import join_all, start_all

from agentdiff import _owner
from agentdiff._owner import (
    GeneratorOwner,
    current_owner,
    has_ended,
    in_words,
    loop_of,
    task_loop,
    this_thread,
)


def ask(into: list[Any]) -> None:
    into.append(current_owner())


def test_L2_the_owner_is_the_thread_where_no_task_runs() -> None:
    """The same thread is the same owner, another thread another."""
    others: list[Any] = []
    join_all(start_all(lambda: ask(others)))
    assert current_owner() is current_owner() is this_thread()
    assert others[0] is not current_owner()


def test_L2_a_task_that_begins_elsewhere_while_we_ask_changes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tasks run or not from one moment to the next: the owner is the thread either way."""

    class Beginning(dict[Any, Any]):
        def __bool__(self) -> bool:
            self.asked = getattr(self, "asked", 0) + 1
            return self.asked > 1

    monkeypatch.setattr(_owner, "TASKS", Beginning())
    assert current_owner() is this_thread()
    assert current_owner() is this_thread()


def test_L2_the_owner_is_the_running_task() -> None:
    """Two tasks of one loop are two owners; outside them its thread is itself."""

    async def main() -> None:
        me = asyncio.current_task()
        assert current_owner() is me
        assert await asyncio.gather(child()) != [me]
        assert loop_of(current_owner()) is asyncio.get_running_loop() is task_loop()
        assert current_owner() is me

    async def child() -> Any:
        assert current_owner() is asyncio.current_task()
        return current_owner()

    asyncio.run(main())
    assert current_owner() is this_thread()
    assert loop_of(this_thread()) is None


def test_L2_the_running_loop_is_that_of_the_thread_that_asks() -> None:
    """A loop that runs on another thread, has stopped, or has moved to another thread, is not this thread's."""
    loop, other = asyncio.new_event_loop(), asyncio.new_event_loop()
    elsewhere: list[Any] = []

    async def here() -> None:
        assert task_loop() is asyncio.get_running_loop()

    async def meanwhile(run: Any) -> None:
        assert task_loop() is asyncio.get_running_loop()
        join_all(start_all(run))
        assert task_loop() is asyncio.get_running_loop()

    loop.run_until_complete(here())
    assert task_loop() is None
    loop.run_until_complete(meanwhile(lambda: other.run_until_complete(here())))
    loop.run_until_complete(meanwhile(lambda: elsewhere.append(task_loop())))
    join_all(start_all(lambda: loop.run_until_complete(meanwhile(lambda: elsewhere.append(task_loop())))))
    assert task_loop() is None
    assert elsewhere == [None, None]
    loop.close()
    other.close()


@pytest.mark.parametrize("outer_is", ["a task", "a callback"])
def test_L2_a_loop_within_a_loop_is_the_one_that_runs(outer_is: str) -> None:
    """Some patch asyncio so that loops nest on one thread: the tasks of the inner one are still told apart."""
    outer, inner = asyncio.new_event_loop(), asyncio.new_event_loop()
    found: list[Any] = []

    async def owner() -> None:
        await asyncio.sleep(0)
        found.append((task_loop(), current_owner(), asyncio.current_task()))

    def nest() -> None:
        assert task_loop() is outer
        asyncio._set_running_loop(None)
        try:
            inner.run_until_complete(owner())
        finally:
            asyncio._set_running_loop(outer)
        found.append((task_loop(), current_owner(), asyncio.current_task() or this_thread()))

    async def task() -> None:
        nest()

    if outer_is == "a task":
        outer.run_until_complete(task())
    else:
        outer.call_soon(nest)
        outer.call_soon(outer.stop)
        outer.run_forever()
    (within, owner_within, task_within), (without, owner_without, task_without) = found
    assert (within, without) == (inner, outer)
    assert (owner_within, owner_without) == (task_within, task_without)
    inner.close()
    outer.close()


def test_L2_a_callback_of_the_loop_belongs_to_its_thread() -> None:
    """A loop runs, but no task does: the thread asks."""
    seen: list[Any] = []
    loop = asyncio.new_event_loop()
    loop.call_soon(ask, seen)
    loop.call_soon(loop.stop)
    loop.run_forever()
    loop.close()
    assert seen == [this_thread()]


def test_L8_an_ended_thread_or_task_is_told_from_one_that_lives() -> None:
    """Only who has ended can't release any more; a generator is never over by itself."""
    seen: list[Any] = []
    join_all(start_all(lambda: ask(seen)))

    async def main() -> None:
        task = asyncio.ensure_future(asyncio.sleep(0))
        assert not has_ended(task)
        await task
        assert has_ended(task)

    asyncio.run(main())
    assert has_ended(seen[0])
    assert not has_ended(this_thread())
    assert not has_ended(GeneratorOwner("writer"))


def test_L8_a_later_thread_with_the_same_number_is_another_owner() -> None:
    """The system uses thread numbers again; an owner is an object."""
    seen: list[Any] = []
    idents: list[int] = []

    def look() -> None:
        idents.append(threading.get_ident())
        ask(seen)

    for _ in range(50):
        join_all(start_all(look))
    assert len({id(owner) for owner in seen}) == 50  # they are kept alive in `seen`: no id is used twice


def test_L9_an_owner_goes_with_its_thread() -> None:
    """A thread that is over leaves no owner behind."""
    refs: list[Any] = []
    join_all(start_all(lambda: refs.append(weakref.ref(current_owner()))))
    gc.collect()
    assert refs[0]() is None


def test_L4_owners_are_named_in_words() -> None:
    """A message calls a thread, a task and a generator by what a person knows."""
    seen: list[Any] = []

    async def main() -> None:
        asyncio.current_task().set_name("Poet")  # type: ignore[union-attr]
        seen.append(in_words(current_owner()))

    thread = threading.Thread(target=lambda: seen.append(in_words(current_owner())), name="Worker")
    thread.start()
    thread.join(10)
    asyncio.run(main())
    assert seen == ['thread "Worker"', 'task "Poet"']
    assert in_words(GeneratorOwner("writer")) == "a generator"
    assert 'last driven by thread "' in in_words(GeneratorOwner("writer", driver=this_thread()))
