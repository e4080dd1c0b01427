"""Every error that agentdiff raises on its own account, under one root.

Each error carries its facts as fields, and a sentence for a person. All of them pickle.
"""

from __future__ import annotations

import sys
from typing import Any, Optional


def _restore(cls: type[CoordinationError], args: tuple[Any, ...], fields: dict[str, Any]) -> CoordinationError:
    error = cls.__new__(cls, *args)
    error.args = args
    error.__dict__.update(fields)
    return error


def text_of(error: BaseException) -> str:
    """What an error says, even if it can't say anything."""
    try:
        return str(error)
    except Exception:
        return f"<{type(error).__name__} without words>"


def check_amount(what: str, amount: Any) -> float:
    """Refuse what is no amount of anything: a finite number, 0 or more."""
    if isinstance(amount, bool) or not isinstance(amount, (int, float)):
        raise TypeError(f"{what} must be a number, not {type(amount).__name__}: {amount!r}")
    if not 0 <= amount <= sys.float_info.max:  # whole numbers may be too large to be reckoned with times
        raise ValueError(f"{what} must be 0 or more, and finite, not {amount!r}")
    return amount


class CoordinationError(Exception):
    """The root of the tree: catch it to catch whatever agentdiff itself raises."""

    def __reduce__(self) -> tuple[Any, ...]:
        return _restore, (type(self), self.args, dict(self.__dict__))


class CoordinationTimeoutError(CoordinationError, TimeoutError):
    """A wait took longer than its `timeout` (L4). Nobody's fault: somebody else was busy for longer than you allowed.

    Attributes:
        name: what was waited for: the lock's name, or the event's.
        timeout: how long the wait was allowed to take, in seconds.
        holder: who held the lock, in words (agent name and thread or task); None where no lock is concerned.
        held_for: for how long the holder had held it, in seconds; None where no lock is concerned.
        waiting: how many others were waiting for the same thing.
    """

    def __init__(
        self,
        message: str = "",
        *,
        name: str = "",
        timeout: Optional[float] = None,
        holder: Optional[str] = None,
        held_for: Optional[float] = None,
        waiting: int = 0,
    ) -> None:
        super().__init__(message)
        self.name = name
        self.timeout = timeout
        self.holder = holder
        self.held_for = held_for
        self.waiting = waiting


class DeadlockError(CoordinationError, RuntimeError):
    """A wait that could never end was refused before it began (L5, E16). The program's fault: the text names each hop.

    Attributes:
        name: what was about to be waited for.
        cycle: one sentence for each hop of the ring.
    """

    def __init__(self, message: str = "", *, name: str = "", cycle: tuple[str, ...] = ()) -> None:
        super().__init__(message)
        self.name = name
        self.cycle = cycle


class NotHeldError(CoordinationError, RuntimeError):
    """A lock was released by somebody who doesn't hold it (L8). The caller's fault; nothing was changed.

    Attributes:
        name: the lock's name.
        holder: who does hold it, in words; None if nobody does.
    """

    def __init__(self, message: str = "", *, name: str = "", holder: Optional[str] = None) -> None:
        super().__init__(message)
        self.name = name
        self.holder = holder


class ClosedError(CoordinationError, RuntimeError):
    """The coordinator has been closed (E7). The caller's fault: it went on using what it, or somebody, had closed."""


class QueueFullError(CoordinationError):
    """`emit` refused an event because `max_pending` events are waiting already (E5). Handlers are slower than emitters.

    Attributes:
        name: the event's name.
        pending: how many events were pending.
        max_pending: how many are allowed.
    """

    def __init__(self, message: str = "", *, name: str = "", pending: int = 0, max_pending: int = 0) -> None:
        super().__init__(message)
        self.name = name
        self.pending = pending
        self.max_pending = max_pending


class CascadeError(CoordinationError, RecursionError):
    """Handlers have caused one another `max_depth` times over (E11). The program's fault: the text shows the loop.

    Attributes:
        name: the event that was refused.
        depth: how many handlers had caused one another.
        loop: the names of events that lead to this one, from its last occurrence on.
    """

    def __init__(self, message: str = "", *, name: str = "", depth: int = 0, loop: tuple[str, ...] = ()) -> None:
        super().__init__(message)
        self.name = name
        self.depth = depth
        self.loop = loop


class StaleWriteError(CoordinationError):
    """A value was written by somebody else since it was read (W1). Nobody's fault: read again, think again.

    Attributes:
        name: the value's name.
        version: the version that had been read.
        current: the version that it has now.
        writer: who wrote that, in words (agent name and thread or task); None if it was deleted.
        written_at: when, in seconds since the epoch.
        run: in which run; None outside of any.
    """

    def __init__(
        self,
        message: str = "",
        *,
        name: str = "",
        version: int = 0,
        current: int = 0,
        writer: Optional[str] = None,
        written_at: Optional[float] = None,
        run: Optional[str] = None,
    ) -> None:
        super().__init__(message)
        self.name = name
        self.version = version
        self.current = current
        self.writer = writer
        self.written_at = written_at
        self.run = run


class DependencyFailedError(CoordinationError):
    """An agent did not start, because one that it comes after has failed or was cancelled in its run (A5).

    Attributes:
        agent: the agent that did not start.
        dependency: the one that failed.
        error: what that said.
        run: the run; None outside of any.
    """

    def __init__(
        self,
        message: str = "",
        *,
        agent: str = "",
        dependency: str = "",
        error: str = "",
        run: Optional[str] = None,
    ) -> None:
        super().__init__(message)
        self.agent = agent
        self.dependency = dependency
        self.error = error
        self.run = run


class LoopClosedError(CoordinationError, RuntimeError):
    """An async handler could not run, or not to its end: its event loop has been closed (E8)."""


class StoreError(CoordinationError, OSError):
    """A store can't be opened, written or read: the disk's, the server's or the file's fault (S1, S2).

    Attributes:
        store: which, in words, without a password.
    """

    def __init__(self, message: str = "", *, store: str = "") -> None:
        super().__init__(message)
        self.store = store
