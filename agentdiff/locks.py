"""The handles that users hold: `coord.lock("a")` and `coord.lock("a", "b")`."""

from __future__ import annotations

from functools import wraps
from types import TracebackType
from typing import TYPE_CHECKING, Any, Callable, Optional

from ._clock import check_timeout
from ._owner import current_owner, running_task
from ._places import PLAIN, Door, How, Slot
from ._table import LockTable
from .errors import NotHeldError


def check_name(name: object) -> str:
    """Refuse what can't name a lock (L10)."""
    if not isinstance(name, str):
        raise TypeError(f"a lock's name must be a string, not {type(name).__name__}: {name!r}")
    if not name:
        raise ValueError("a lock's name must not be empty")
    return name


def _patience(table: LockTable, how: How, blocking: bool, timeout: Any) -> Optional[float]:
    """How long to wait: what the call says, else what the handle says, else what the coordinator says."""
    if timeout is ... and blocking:
        return table.patience(how.timeout)
    if timeout is ...:
        return 0
    if not blocking:
        raise ValueError("a timeout makes no sense with blocking=False")
    return check_timeout(timeout)


def _by_hand(slot: Optional[Slot]) -> bool:
    if slot is not None:
        slot.count_by_hand()
    return slot is not None


def _own(name: str) -> Any:
    return property(lambda cls: lambda handle, *args: getattr(handle, name)(*args))


class _Handles(type):
    """Classes of which each instance has its own `__enter__` and so on: closures, so that `with` calls no method first.

    Who asks the class for them, as `ExitStack` does, is given what finds the instance's.
    """

    __enter__: Any = _own("__enter__")
    __exit__: Any = _own("__exit__")
    __aenter__: Any = _own("__aenter__")
    __aexit__: Any = _own("__aexit__")


def _on_first_use(way: int) -> Any:
    def find(handle: Any) -> Any:
        ways = handle._table.async_ways(handle._door, handle.__enter__)
        handle._enter_async, handle._leave_async = ways
        handle.__class__ = _AsyncLock
        return ways[way]

    return property(find)


class Lock(metaclass=_Handles):
    """A handle to a named lock: `with` and `async with`, `acquire` and `release`.

    Cheap, without state of its own, and shareable by all threads and tasks (L10). Reentrant for its
    holder, first come first served for everybody else (L2, L3). Its blocks yield a `Slot`, and raise
    `CoordinationTimeoutError` where `acquire` would return False (L4).

    >>> from agentdiff import Coordinator
    >>> with Coordinator() as coord:
    ...     customer = coord.lock("customer_123")
    ...     with customer:
    ...         customer.locked()
    True
    """

    __slots__ = ("__enter__", "__exit__", "_door", "_enter_async", "_leave_async", "_table")

    def __init__(self, table: LockTable, name: str, how: How = PLAIN) -> None:
        self._table = table
        self._door = door = Door(table, name, how)
        self.__enter__, self.__exit__ = table.ways(door)  # type: ignore[method-assign]

    @property
    def name(self) -> str:
        """The name that it stands for."""
        return self._door.name

    def __repr__(self) -> str:
        return f"<Lock {self._door.name!r}{' locked' if self.locked() else ''}>"

    def locked(self) -> bool:
        """Whether somebody holds it at this moment; under a limit, whether nobody new would get in at once."""
        return not self._table.is_free(self._door.name)

    def acquire(self, blocking: bool = True, timeout: Any = ...) -> bool:
        """Take the lock; wait for it on this thread where need be (L3, L4).

        Args:
            blocking: False tries once and never waits.
            timeout: seconds: None waits, 0 tries once; if left out, the handle's own timeout.

        Returns:
            Whether the lock was taken.

        Raises:
            DeadlockError: the wait could never end (L5).
            ValueError: more tokens than the limit can ever give (R5).
            TypeError, ValueError: the timeout is no number, negative or NaN, or given with `blocking=False`.
        """
        patience = _patience(self._table, self._door.how, blocking, timeout)
        me = current_owner()
        return _by_hand(self._table.acquire(self._table.claim(self._door, me), me, patience))

    async def acquire_async(self, blocking: bool = True, timeout: Any = ...) -> bool:
        """Take the lock; the task waits for it where need be, the loop goes on (L3, L4).

        Args, Returns, Raises: as for `acquire`; `RuntimeError` outside asyncio (L13).
        """
        patience = _patience(self._table, self._door.how, blocking, timeout)
        me = running_task(f"lock {self.name!r}")
        return _by_hand(await self._table.acquire_async(self._table.claim(self._door, me), me, patience))

    def release(self) -> None:
        """End one entry of the caller's.

        Raises:
            NotHeldError: the calling thread or task doesn't hold it; nothing was changed (L8).
        """
        self._table.release(self._door.name, current_owner())

    if TYPE_CHECKING:

        def __enter__(self) -> Slot: ...

        def __exit__(
            self, kind: Optional[type[BaseException]], error: Optional[BaseException], trace: Optional[TracebackType]
        ) -> None: ...

        async def __aenter__(self) -> Slot: ...

        async def __aexit__(
            self, kind: Optional[type[BaseException]], error: Optional[BaseException], trace: Optional[TracebackType]
        ) -> None: ...

    else:
        __aenter__ = _on_first_use(0)
        __aexit__ = _on_first_use(1)


class _AsyncLock(Lock):
    """What a handle becomes by its first `async with`: most have none, and cost less without what it needs."""

    __slots__ = ()

    __aenter__, __aexit__ = vars(Lock)["_enter_async"], vars(Lock)["_leave_async"]


def by_name(handles: dict[str, Lock], make: Callable[..., Any]) -> Any:
    """`coord.lock`, which makes handles, as it is for most names: there is one already."""

    @wraps(make)
    def lock(name: str, *more: str, **how: Any) -> Any:
        if not more and not how:
            try:
                return handles[name]
            except (KeyError, TypeError):  # a new one, or no name at all
                pass
        return make(name, *more, **how)

    return lock


class LockGroup:
    """A handle to several locks: all or none, always taken in the same order, so that two groups can't deadlock (L6).

    A timeout covers the whole: what the first lock leaves of it is for the others. A name given twice counts once.
    """

    __slots__ = ("_how", "_names", "_table")

    def __init__(self, table: LockTable, names: tuple[str, ...], how: How = PLAIN) -> None:
        self._table = table
        self._names = tuple(sorted(set(names)))
        self._how = how

    @property
    def names(self) -> tuple[str, ...]:
        """The names, in the order in which they are taken."""
        return self._names

    def __repr__(self) -> str:
        return f"<LockGroup {', '.join(map(repr, self._names))}>"

    def locked(self) -> bool:
        """Whether anybody holds any of them at this moment."""
        return not all(map(self._table.is_free, self._names))

    def acquire(self, blocking: bool = True, timeout: Any = ...) -> bool:
        """Take all, or none: see `Lock.acquire`."""
        patience = _patience(self._table, self._how, blocking, timeout)
        slots, missed = self._table.acquire_all(self._names, self._how, current_owner(), patience)
        return missed is None and all(map(_by_hand, slots))

    async def acquire_async(self, blocking: bool = True, timeout: Any = ...) -> bool:
        """Take all, or none: see `Lock.acquire_async`."""
        patience = _patience(self._table, self._how, blocking, timeout)
        slots, missed = await self._table.acquire_all_async(self._names, self._how, running_task(repr(self)), patience)
        return missed is None and all(map(_by_hand, slots))

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
        timeout = self._table.patience(self._how.timeout)
        slots, missed = self._table.acquire_all(self._names, self._how, me, timeout)
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
        me = running_task(repr(self))
        timeout = self._table.patience(self._how.timeout)
        slots, missed = await self._table.acquire_all_async(self._names, self._how, me, timeout)
        if missed is not None:
            raise self._table.timeout_error(missed, timeout or 0, me)
        return tuple(slots)

    async def __aexit__(
        self, kind: Optional[type[BaseException]], error: Optional[BaseException], trace: Optional[TracebackType]
    ) -> None:
        self.__exit__(kind, error, trace)
