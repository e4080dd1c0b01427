"""The handles that users hold: `coord.lock("a")` and `coord.lock("a", "b")`."""

from __future__ import annotations

from types import TracebackType
from typing import Any, Callable, Optional

from ._clock import check_timeout
from ._owner import HOLDS, LOCAL, Owner, current_owner, current_task_of, running_loop
from ._table import LockTable, Slot
from .errors import NotHeldError


def check_name(name: object) -> str:
    """Refuse what can't name a lock (L10)."""
    if not isinstance(name, str):
        raise TypeError(f"a lock's name must be a string, not {type(name).__name__}: {name!r}")
    if not name:
        raise ValueError("a lock's name must not be empty")
    return name


def _patience(table: LockTable, own: Any, blocking: bool = True, timeout: Any = ...) -> Optional[float]:
    """How long to wait: what the call says, else what the handle says, else what the coordinator says."""
    if timeout is ... and blocking:
        timeout = table.timeout if own is ... else own
        return None if timeout is None else float(timeout)
    if timeout is ...:
        return 0
    if not blocking:
        raise ValueError("a timeout makes no sense with blocking=False")
    return check_timeout(timeout)


def _no_task(what: str) -> RuntimeError:
    return RuntimeError(f"awaiting {what} needs a running asyncio task (trio is not supported)")


def _by_hand(slot: Optional[Slot]) -> bool:
    if slot is not None:
        slot.count_by_hand()
    return slot is not None


def _never(name: str, me: Owner) -> Optional[Slot]:
    """The quick way of a lock that doesn't lend: none, since a slot taken so is in its context for others to find."""
    return None


class Lock:
    """A handle to a named lock: `with` and `async with`, `acquire` and `release`.

    Cheap, without state of its own, and shareable by all threads and tasks (L10). Reentrant for its
    holder, first come first served for everybody else (L2, L3).

    >>> from agentdiff import Coordinator
    >>> with Coordinator() as coord:
    ...     customer = coord.lock("customer_123")
    ...     with customer:
    ...         customer.locked()
    True
    """

    __slots__ = ("_entries", "_lend", "_name", "_quick", "_slots", "_table", "_timeout")

    def __init__(self, table: LockTable, name: str, timeout: Any = ..., lend: bool = True) -> None:
        self._table = table
        self._slots = table.slots
        self._entries = table.entries
        self._quick: Callable[[str, Owner], Optional[Slot]] = table.quick if lend else _never
        self._name = name
        self._timeout = timeout
        self._lend = lend

    @property
    def name(self) -> str:
        """The name that it stands for."""
        return self._name

    def __repr__(self) -> str:
        return f"<Lock {self._name!r}{' locked' if self.locked() else ''}>"

    def locked(self) -> bool:
        """Whether anybody holds it at this moment."""
        return self._name in self._slots

    def acquire(self, blocking: bool = True, timeout: Any = ...) -> bool:
        """Take the lock; wait for it on this thread where need be (L3, L4).

        Args:
            blocking: False tries once and never waits.
            timeout: seconds: None waits, 0 tries once; if left out, the handle's own timeout.

        Returns:
            Whether the lock was taken.

        Raises:
            TypeError, ValueError: the timeout is no number, negative or NaN, or given with `blocking=False`.
        """
        patience = _patience(self._table, self._timeout, blocking, timeout)
        me = current_owner()
        return _by_hand(self._quick(self._name, me) or self._table.acquire(self._name, patience, me, lend=self._lend))

    async def acquire_async(self, blocking: bool = True, timeout: Any = ...) -> bool:
        """Take the lock; the task waits for it where need be, the loop goes on (L3, L4).

        Args, Returns, Raises: as for `acquire`; `RuntimeError` outside asyncio (L13).
        """
        patience = _patience(self._table, self._timeout, blocking, timeout)
        me = current_task_of(running_loop())
        if me is None:
            raise _no_task(f"lock {self._name!r}")
        return _by_hand(
            self._quick(self._name, me) or await self._table.acquire_async(self._name, patience, me, lend=self._lend)
        )

    def _enter_slowly(self, me: Owner) -> Slot:
        timeout = _patience(self._table, self._timeout)
        slot = self._table.acquire(self._name, timeout, me, lend=self._lend)
        if slot is None:
            raise self._table.timeout_error(self._name, timeout or 0, me)
        return slot

    async def _enter_slowly_async(self, me: Owner) -> Slot:
        timeout = _patience(self._table, self._timeout)
        slot = await self._table.acquire_async(self._name, timeout, me, lend=self._lend)
        if slot is None:
            raise self._table.timeout_error(self._name, timeout or 0, me)
        return slot

    def release(self) -> None:
        """End one entry of the caller's.

        Raises:
            NotHeldError: the calling thread or task doesn't hold it; nothing was changed (L8).
        """
        self._table.release(self._name, current_owner())

    # The four methods below are the product's hottest path: flat on purpose, each call within them shows.

    def __enter__(self) -> Slot:
        me = LOCAL.me if running_loop() is None else current_owner()
        quick = self._quick
        slot = quick(self._name, me)
        return slot if slot is not None else self._enter_slowly(me)

    def __exit__(
        self, kind: Optional[type[BaseException]], error: Optional[BaseException], trace: Optional[TracebackType]
    ) -> None:
        slot: Optional[Slot] = HOLDS.get()  # what this context entered last is this block's, if it is inside at all
        name = self._name
        slots = self._slots
        if slot is not None and slots.get(name) is slot and name not in self._entries:
            if slot.depth > 1:
                slot.depth -= 1
                return
            del slots[name]
            slot.owner = None
            if name in self._entries:
                self._table.pass_on(name)
        else:
            self._table.release(name, current_owner(), True)

    async def __aenter__(self) -> Slot:
        me = current_task_of(running_loop())
        if me is None:
            raise _no_task(f"lock {self._name!r}")
        quick = self._quick
        slot = quick(self._name, me)
        return slot if slot is not None else await self._enter_slowly_async(me)

    async def __aexit__(
        self, kind: Optional[type[BaseException]], error: Optional[BaseException], trace: Optional[TracebackType]
    ) -> None:
        self.__exit__(kind, error, trace)


class LockGroup:
    """A handle to several locks: all or none, always taken in the same order, so that two groups can't deadlock (L6).

    A timeout covers the whole: what the first lock leaves of it is for the others. A name given twice counts once.
    """

    __slots__ = ("_lend", "_names", "_table", "_timeout")

    def __init__(self, table: LockTable, names: tuple[str, ...], timeout: Any = ..., lend: bool = True) -> None:
        self._table = table
        self._names = tuple(sorted(set(names)))
        self._timeout = timeout
        self._lend = lend

    @property
    def names(self) -> tuple[str, ...]:
        """The names, in the order in which they are taken."""
        return self._names

    def __repr__(self) -> str:
        return f"<LockGroup {', '.join(map(repr, self._names))}>"

    def locked(self) -> bool:
        """Whether anybody holds any of them at this moment."""
        return any(name in self._table.slots for name in self._names)

    def acquire(self, blocking: bool = True, timeout: Any = ...) -> bool:
        """Take all, or none: see `Lock.acquire`."""
        patience = _patience(self._table, self._timeout, blocking, timeout)
        slots, missed = self._table.acquire_all(self._names, patience, current_owner(), lend=self._lend)
        return all(map(_by_hand, slots)) and missed is None

    async def acquire_async(self, blocking: bool = True, timeout: Any = ...) -> bool:
        """Take all, or none: see `Lock.acquire_async`."""
        patience = _patience(self._table, self._timeout, blocking, timeout)
        slots, missed = await self._table.acquire_all_async(self._names, patience, self._task(), lend=self._lend)
        return all(map(_by_hand, slots)) and missed is None

    def release(self) -> None:
        """End one entry of the caller's to each.

        Raises:
            NotHeldError: the caller doesn't hold all of them; nothing was changed (L8).
        """
        me = current_owner()
        missing = [name for name in self._names if not self._table.holds(name, me)]
        for name in missing or reversed(self._names):
            self._table.release(name, me)

    def __enter__(self) -> tuple[Slot, ...]:
        me = current_owner()
        timeout = _patience(self._table, self._timeout)
        slots, missed = self._table.acquire_all(self._names, timeout, me, lend=self._lend)
        if missed is not None:
            raise self._table.timeout_error(missed, timeout or 0, me)
        return tuple(slots)

    def __exit__(
        self, kind: Optional[type[BaseException]], error: Optional[BaseException], trace: Optional[TracebackType]
    ) -> None:
        missed: Optional[NotHeldError] = None
        for name in reversed(self._names):
            try:
                self._table.release(name, current_owner(), True)
            except NotHeldError as not_held:  # released inside: the others are still to be let go
                missed = not_held
        if missed is not None:
            raise missed

    async def __aenter__(self) -> tuple[Slot, ...]:
        me = self._task()
        timeout = _patience(self._table, self._timeout)
        slots, missed = await self._table.acquire_all_async(self._names, timeout, me, lend=self._lend)
        if missed is not None:
            raise self._table.timeout_error(missed, timeout or 0, me)
        return tuple(slots)

    async def __aexit__(
        self, kind: Optional[type[BaseException]], error: Optional[BaseException], trace: Optional[TracebackType]
    ) -> None:
        self.__exit__(kind, error, trace)

    def _task(self) -> Owner:
        me: Optional[Owner] = current_task_of(running_loop())
        if me is None:
            raise _no_task(repr(self))
        return me
