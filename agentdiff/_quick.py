"""The free path of a lock: taken and let go without a mutex, as long as nobody else wants the name (see `_table.py`).

The product's hottest path, flat on purpose: each call and each attribute looked up within shows in the figures. So a
name has closures of its own, made once for its handle, and not methods.
"""

from __future__ import annotations

from collections.abc import Iterator
from types import TracebackType, coroutine
from typing import Any, Callable, Optional, Protocol

from ._owner import HERE, HOLDS, TASKS, Owner, current_owner, current_task_of, running_task, task_loop, this_thread
from ._places import Book, Door, Limiter, Slot, live

Ways = tuple[Callable[..., Any], Callable[..., Any]]
"""`__enter__` and `__exit__` of a name, or `__aenter__` and `__aexit__`."""


@coroutine
def _nothing() -> Iterator[None]:
    return
    yield


DONE = _nothing()
"""What a way out that waits for nothing gives to `await`: it has ended, so there is no frame to be made and run."""
next(DONE, None)


held = HOLDS.get
hold = HOLDS.set


class Table(Limiter, Protocol):
    """Where those go who can't go the quick way."""

    book: Book

    def claim(self, door: Door, me: Owner) -> Slot: ...

    def settle(self, slot: Slot) -> None: ...

    def enter(self, claim: Slot, me: Owner) -> Slot: ...

    async def enter_async(self, claim: Slot, me: Owner) -> Slot: ...

    def release(self, name: str, me: Owner, of_block: bool = False) -> None: ...

    def free(self, slot: Slot, me: Owner) -> None: ...

    def pass_on(self, name: str) -> None: ...

    def hand_over(self, slot: Slot) -> bool: ...


def make_ways(table: Table) -> tuple[Callable[[Door], Ways], Callable[[Door, Any], Ways]]:  # noqa: PLR0915  (closures)
    """What makes, for a door, the ways in and out of `with`; and those of `async with`, which few doors need."""
    slots, entries, now = table.book.slots, table.book.entries, table.book.now
    slowly, slowly_async = table.enter, table.enter_async
    setdefault = slots.setdefault
    find = slots.get

    def ways(door: Door) -> Ways:
        name = door.name

        def enter(me: Optional[Owner] = None, otherwise: Callable[[Slot, Owner], Any] = slowly) -> Any:
            """The slot of a name that is free, or the caller's already; else what `otherwise` makes of the claim."""
            if me is None:
                try:
                    me = current_owner() if TASKS else HERE.me
                except AttributeError:  # the first time in this thread
                    me = this_thread()
            outer: Optional[Slot] = held()
            if outer is not None:
                owner = outer.owner
                if owner is None:
                    outer = outer.outer
                elif owner is me and find(name) is outer:
                    outer.depth += 1
                    return outer
                if outer is not None and (outer.outer is not None or outer.owner is None):
                    outer = live(outer)
            slot = Slot()
            slot.door = door
            slot.owner = me
            slot.depth = 1
            slot.since = now()
            slot.outer = outer
            try:
                found = setdefault(name, slot)
                if found is slot:
                    if not entries or name not in entries:  # here and below: most often there is none at all
                        hold(slot)
                        return slot
                    table.settle(slot)
            except BaseException:  # Ctrl-C in just this moment
                if slot.owner is not None:
                    table.settle(slot)
                raise
            if found.owner is me:
                found.depth += 1
                return found
            slot.owner = me
            return otherwise(slot, me)

        if not door.how.lend:  # a slot taken the quick way is in its context for others to find

            def enter(me: Optional[Owner] = None, otherwise: Callable[[Slot, Owner], Any] = slowly) -> Any:
                me = me or current_owner()
                return otherwise(table.claim(door, me), me)

        return enter, leaving(door, None)

    def leaving(door: Door, done: Any) -> Callable[..., Any]:
        name = door.name

        def leave(
            kind: Optional[type[BaseException]] = None,
            error: Optional[BaseException] = None,
            trace: Optional[TracebackType] = None,
            kept: Optional[Slot] = None,
        ) -> Any:
            """End the block that this context has entered last; or an entry to a slot that was kept, if it is there."""
            try:
                slot: Optional[Slot] = slots[name]
            except KeyError:
                slot = None
            if slot is not None and (
                slot is (kept or held()) or (kept is None and slot.owner is current_owner())  # another was taken within
            ):
                depth = slot.depth
                if depth > 1:
                    slot.depth = depth - 1
                    return done
                if not entries or name not in entries:
                    del slots[name]
                    slot.owner = None
                    if entries and name in entries:
                        table.pass_on(name)
                    return done
                if table.hand_over(slot):
                    return done
            if kept is not None:
                table.free(kept, current_owner())
            else:
                table.release(name, current_owner(), True)
            return done

        return leave

    def async_ways(door: Door, enter: Any) -> Ways:
        name = door.name

        async def enter_async() -> Slot:
            me = current_task_of(task_loop()) or running_task(f"lock {name!r}")
            slot = enter(me, slowly_async)
            return slot if slot.__class__ is Slot else await slot

        return enter_async, leaving(door, DONE)

    return ways, async_ways
