"""Shared values with versions: an agent that reads, thinks, and writes is told if another wrote meanwhile (W1, W2)."""

from __future__ import annotations

import threading
from collections.abc import Awaitable
from itertools import count
from types import CoroutineType
from typing import Any, Callable, NamedTuple, Optional, Union

import attrs

from ._clock import Clock
from ._owner import current_owner
from .deadlock import age, named
from .errors import StaleWriteError
from .locks import Lock

_TIMES_TRIED = 100


class Versioned(NamedTuple):
    """What `read()` gives: a value, and the version that it has (W1).

    Attributes:
        value: the very object that was written, or the default.
        version: for `write`; 0 where nobody has written.
    """

    value: Any
    version: int


@attrs.frozen
class Written:
    """One value of a name, and who wrote it when. Version 0 is what nobody has written."""

    value: Any = None
    version: int = 0
    writer: Optional[str] = None
    at: float = 0.0
    run: Optional[str] = None


class StateTable:
    """The shared values of one coordinator.

    Args:
        clock: the time.
        run_here: the id of the run that the caller is in, None outside of any.
    """

    def __init__(self, clock: Clock, run_here: Callable[[], Optional[str]]) -> None:
        self._clock = clock
        self._run_here = run_here
        self._values: dict[str, Written] = {}
        self._versions = count(1)
        self._mutex = threading.RLock()  # re-entrant for a signal's handler, or a collected object, that writes too

    def forget(self) -> None:
        """After a fork: somebody in the parent may have had the mutex. The values stay."""
        self._mutex = threading.RLock()

    def copy(self) -> dict[str, Written]:
        """All values, for `restore`."""
        return dict(self._values)

    def restore(self, values: dict[str, Written]) -> None:
        """All values are what they were."""
        with self._mutex:
            self._values = dict(values)

    def read(self, name: str) -> Written:
        """What has been written last."""
        return self._values.get(name, Written())

    def write(self, name: str, value: Any, version: int) -> Optional[Written]:
        """Write, if `version` is still that of the name; None if it is not."""
        written = Written(value, next(self._versions), named(current_owner()), self._clock.time(), self._run_here())
        with self._mutex:
            before = self.read(name)  # lives on until after the mutex: its value's end may be the users' code
            if before.version != version:
                return None
            self._values[name] = written
        return written

    def delete(self, name: str, version: int) -> bool:
        """Forget the value, if `version` is still its own."""
        with self._mutex:
            before = self.read(name)
            if before.version != version:
                return False
            self._values.pop(name, None)
        return True

    def stale(self, name: str, version: int) -> StaleWriteError:
        """What to say to who wrote too late."""
        now = self.read(name)
        what = f"state {name!r} is not at version {version} any more"
        if now.writer is None:
            state = "nobody has written it, or it has been deleted, so its version is 0"
        else:
            run = f" in run {now.run!r}" if now.run is not None else ""
            state = f"{now.writer} wrote version {now.version} {age(max(self._clock.time() - now.at, 0.0))} ago{run}"
        return StaleWriteError(
            f"{what}: {state}; nothing was changed. Read it again, or use update()",
            name=name,
            version=version,
            current=now.version,
            writer=now.writer,
            written_at=now.at if now.writer is not None else None,
            run=now.run,
        )


class State:
    """A handle to a shared value: cheap, and for all threads and tasks (W1, W2).

    Between `read` and `write` an agent may think for as long as it likes, and holds no lock:

    >>> from agentdiff import Coordinator, StaleWriteError
    >>> coord = Coordinator()
    >>> customer = coord.state("customer_123", default={})
    >>> value, version = customer.read()
    >>> customer.update(lambda old: {**old, "status": "active"})  # somebody else, meanwhile
    {'status': 'active'}
    >>> try:
    ...     customer.write({"status": "closed"}, version=version)
    ... except StaleWriteError as error:
    ...     print(error.current - error.version, "write too late")
    1 write too late
    >>> coord.close()
    """

    __slots__ = ("_default", "_lock", "_name", "_table")

    def __init__(self, table: StateTable, name: str, lock: Lock, default: Any) -> None:
        self._table = table
        self._name = name
        self._lock = lock
        self._default = default

    @property
    def name(self) -> str:
        """The name of the value, and of its lock."""
        return self._name

    def __repr__(self) -> str:
        return f"<State {self._name!r} version {self._table.read(self._name).version}>"

    def read(self) -> Versioned:
        """The value and its version; the default and 0, where nobody has written. Never waits.

        The value is the very object that was written: change a copy, not the object.
        """
        written = self._table.read(self._name)
        return Versioned(written.value if written.version else self._default, written.version)

    def write(self, value: Any, *, version: int) -> int:
        """Write, if nobody else has since the given version was read (W1). Never waits.

        Args:
            value: anything.
            version: what `read` gave with the old value.

        Returns:
            The new version.

        Raises:
            StaleWriteError: somebody has; it says who, when, in which run. Nothing was changed.
        """
        _check_version(version)
        written = self._table.write(self._name, value, version)
        if written is None:
            raise self._table.stale(self._name, version)
        return written.version

    def delete(self, *, version: int) -> None:
        """Forget the value, if nobody else has written since the given version was read (W1).

        Args:
            version: what `read` gave with the value.

        Raises:
            StaleWriteError: somebody has. Nothing was changed.
        """
        _check_version(version)
        if not self._table.delete(self._name, version):
            raise self._table.stale(self._name, version)

    def update(self, change: Callable[[Any], Any]) -> Any:
        """Read, change, and write under the name's lock; no update is lost (W2).

        Args:
            change: takes the value and gives the new one. It is called again, should somebody `write` meanwhile
                without the lock.

        Returns:
            The new value.

        Raises:
            CoordinationTimeoutError: the lock was not free within the coordinator's `lock_timeout`.
            StaleWriteError: each of a hundred times somebody wrote meanwhile: `change` itself, most likely.
            TypeError: `change` is a coroutine function; that is for `update_async`.
            Exception: whatever `change` raises; then nothing is written.
        """
        _check_change(change)
        with self._lock:
            for _ in range(_TIMES_TRIED):
                before = self.read()
                value = change(before.value)
                if isinstance(value, CoroutineType):
                    value.close()
                    raise TypeError(f"update takes a plain function; for {change!r} there is update_async")
                if self._table.write(self._name, value, before.version) is not None:
                    return value
        raise self._table.stale(self._name, before.version)

    async def update_async(self, change: Callable[[Any], Union[Any, Awaitable[Any]]]) -> Any:
        """`update` on a loop, which goes on meanwhile; `change` may be a coroutine function (W2)."""
        _check_change(change)
        async with self._lock:
            for _ in range(_TIMES_TRIED):
                before = self.read()
                value = change(before.value)
                if isinstance(value, Awaitable):
                    value = await value
                if self._table.write(self._name, value, before.version) is not None:
                    return value
        raise self._table.stale(self._name, before.version)


def _check_version(version: Any) -> None:
    if isinstance(version, bool) or not isinstance(version, int):
        raise TypeError(f"a version is a whole number, as read() gives it, not {type(version).__name__}: {version!r}")


def _check_change(change: Any) -> None:
    if not callable(change):
        raise TypeError(f"update takes a function of the value, not {type(change).__name__}: {change!r}")
