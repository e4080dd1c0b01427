"""Who is asking: the running asyncio task, else the thread (L2), and the words to say so.

A thread's owner is an object of ours that lives as long as the thread's local storage: thread
numbers are reused by the system, so they identify nobody (L8). A task is its own identity.
"""

from __future__ import annotations

import gc
import os
import sys
import threading
from _thread import get_ident
from asyncio import AbstractEventLoop, BaseEventLoop, Task, _get_running_loop, current_task
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from types import CodeType, FrameType
from typing import Any, Optional, Protocol, Union

import attrs


@attrs.define(eq=False)
class ThreadOwner:
    """A thread as an owner of locks.

    By the others, waits of all kinds tell those who have work for this thread, or for the events that come after the
    one it handles.
    """

    thread: threading.Thread
    workers: Optional[Lender] = None  # whose thread this is
    lane: Any = None  # whose events this thread is handling


@attrs.define(eq=False)
class GeneratorOwner:
    """A coordinated generator as an owner: its hold is its own, whoever drives it (L2).

    `driver` is who took the latest step, which goes on while it is `stepping`; `guests` counts, per driver, the
    entries it made within.
    """

    agent: str
    driver: Optional[Owner] = None
    stepping: bool = False
    guests: dict[Any, int] = attrs.field(factory=dict)


Owner = Union[ThreadOwner, GeneratorOwner, "Task[Any]"]


class Lender(Protocol):
    """Workers that put another thread to work while one of theirs waits (E16)."""

    def lend(self) -> None: ...

    def take_back(self) -> None: ...


HERE = threading.local()
"""`HERE.me` is the calling thread's owner, once somebody has asked for it: see `this_thread`. Hot paths read it here
when no loop runs; a `threading.local` that has no class of its own answers sooner."""


def this_thread() -> ThreadOwner:
    """The calling thread as an owner."""
    try:
        me: ThreadOwner = HERE.me
    except AttributeError:
        me = HERE.me = ThreadOwner(threading.current_thread())
    return me


@contextmanager
def lent_worker() -> Iterator[None]:
    """Around a wait: if this thread is a worker, another may work meanwhile."""
    workers = this_thread().workers
    if workers is None:
        yield
        return
    workers.lend()
    try:
        yield
    finally:
        workers.take_back()


if sys.version_info < (3, 14):
    from asyncio.tasks import _current_tasks  # type: ignore[attr-defined]

    TASKS: Any = _current_tasks

    current_task_of = TASKS.get
else:
    TASKS = (...,)  # there is no such dict: it may be any

    def current_task_of(loop: Any) -> Optional[Task[Any]]:
        """The task that `loop`, the running one or None, is running."""
        return current_task(loop) if loop is not None else None


"""`TASKS` is false where no task of any loop runs at this moment: quicker to ask than for the running loop."""


running_loop = _get_running_loop

if sys.version_info >= (3, 12):
    task_loop = running_loop
else:  # there, asyncio asks the system for the number of this process each time, for 100 to 200 ns
    _latest: Any = None

    def task_loop() -> Optional[AbstractEventLoop]:
        """The running loop, for who asks within a task: most often it is the only one that runs any, found before."""
        global _latest
        loop: Optional[AbstractEventLoop] = _latest
        if loop not in TASKS or len(TASKS) > 1 or loop._thread_id != get_ident():  # type: ignore[union-attr]
            loop = running_loop()
            if isinstance(loop, BaseEventLoop):
                _latest = loop
        return loop

    def _forget_loop() -> None:
        global _latest
        _latest = None

    if hasattr(os, "register_at_fork"):
        os.register_at_fork(after_in_child=_forget_loop)  # the parent's loop doesn't run in the child


HOLDS: ContextVar[Any] = ContextVar("agentdiff_holds", default=None)
"""The slot entered last in this context; its `outer` is the one before. What a holder starts copies
its context, and so knows from whom it may borrow (L2). Slots that have ended are ignored."""


def current_owner() -> Owner:
    """Who is asking now: the running task, or the thread where there is none."""
    if not TASKS:  # asked once: a task may begin to run meanwhile, on another thread
        return this_thread()
    return current_task_of(task_loop()) or this_thread()


def running_task(what: str) -> Task[Any]:
    """The task that is running.

    Raises:
        RuntimeError: there is none, so that nothing can be awaited (L13).
    """
    task: Optional[Task[Any]] = current_task_of(task_loop())
    if task is None:
        raise RuntimeError(f"awaiting {what} needs a running asyncio task (trio is not supported)")
    return task


def has_ended(owner: Owner) -> bool:
    """Whether the thread or task is over, so that it can't release anything any more (L8)."""
    if isinstance(owner, ThreadOwner):
        return not owner.thread.is_alive()
    if isinstance(owner, GeneratorOwner):
        return False
    return owner.done() or owner.get_loop().is_closed()


def in_words(owner: Owner) -> str:
    """The owner as a person would call it: `thread "MainThread"`, `task "Task-3"`, `a generator of ...`."""
    if isinstance(owner, ThreadOwner):
        return f'thread "{owner.thread.name}"'
    if isinstance(owner, GeneratorOwner):
        by = f", last driven by {in_words(owner.driver)}" if owner.driver is not None else ""
        return f"a generator{by}"
    return f'task "{owner.get_name()}"'


AGENT_CODES: set[CodeType] = set()
"""The code of the wrappers behind `@coordinate`: a frame running one of them has a local `agent`."""


if sys.version_info[:2] == (
    3,
    11,
):  # there, a garbage collection inside `_current_frames` hangs the process (gh-106883)
    _stacks_mutex = threading.RLock()

    def all_frames() -> dict[int, FrameType]:
        """The innermost frame of each thread, by its number."""
        with _stacks_mutex:
            enabled = gc.isenabled()
            gc.disable()
            try:
                return sys._current_frames()
            finally:
                if enabled:
                    gc.enable()

else:
    all_frames = sys._current_frames


def current_frame(owner: Owner) -> Optional[FrameType]:
    """The innermost frame of a thread or task, if it can be had; only to be shown."""
    if isinstance(owner, GeneratorOwner):
        return current_frame(owner.driver) if owner.driver is not None else None
    if isinstance(owner, ThreadOwner):
        ident = owner.thread.ident
        return all_frames().get(ident) if ident is not None else None
    stack = owner.get_stack(limit=1)
    return stack[-1] if stack else None


def agent_of(owner: Owner) -> Optional[str]:
    """The name of the agent that the owner is running at this moment, read off its stack.

    Costs the agents nothing: only who is waiting, or looking, pays.
    """
    if isinstance(owner, GeneratorOwner):
        return owner.agent
    if isinstance(owner, ThreadOwner):
        frame = current_frame(owner)
        while frame is not None:
            if frame.f_code in AGENT_CODES:
                return str(frame.f_locals["agent"].name)
            frame = frame.f_back
        return None
    found: Optional[str] = None
    awaited: Any = owner.get_coro()
    while awaited is not None:  # from the outermost coroutine to what it awaits: the innermost agent counts
        frame = getattr(awaited, "cr_frame", None) or getattr(awaited, "ag_frame", None)
        if frame is not None and frame.f_code in AGENT_CODES and "agent" in frame.f_locals:
            found = str(frame.f_locals["agent"].name)
        awaited = getattr(awaited, "cr_await", None) or getattr(awaited, "ag_await", None)
    return found


def loop_of(owner: Owner) -> Optional[AbstractEventLoop]:
    """The loop that must run for this owner to go on; None for a thread."""
    if isinstance(owner, (ThreadOwner, GeneratorOwner)):
        return None
    return owner.get_loop()
