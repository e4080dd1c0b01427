"""Threads that come and go with the work, a loop for those who bring none, and the drain at the process's exit.

`submit` costs two deque operations and never waits: nobody takes a mutex unless a thread is to start or
to end. The rules by which no job is left lying: who submits adds the job first and looks for a
parked worker afterwards; who parks says so first and looks for a job afterwards.
"""

from __future__ import annotations

import asyncio
import atexit
import os
import signal
import sys
import threading
import time
import traceback
import weakref
from collections import deque
from contextlib import suppress
from itertools import count
from typing import Any, Callable, Optional, Protocol

from ._log import about, logger
from ._owner import ThreadOwner, all_frames, this_thread

Job = Callable[[], Any]

PARK_FOR = 1.0
"""After so many idle seconds a worker ends."""


class Workers:
    """At most `limit` daemon threads that run jobs in the order of their submission."""

    def __init__(self, name: str, limit: int) -> None:
        self.limit: int = limit
        self.watch: Callable[[], bool] = lambda: False  # asked by an idle worker: is there a reason to stay?
        self._name = name
        self._jobs: deque[Job] = deque()
        self._parked: deque[threading.Lock] = deque()
        self._mutex = threading.RLock()
        self._threads: set[threading.Thread] = set()
        self.owners: set[ThreadOwner] = set()  # the same, as those who wait
        self._ending: list[threading.Thread] = []  # no workers any more, but not yet gone
        self._numbers = count(1)
        self._stopping = False
        self.short_of_threads: bool = False  # no thread could be started when one was wanted

    @property
    def threads(self) -> int:
        """How many threads there are now."""
        return len(self._threads)

    @property
    def backlog(self) -> int:
        """How many jobs no worker has taken yet."""
        return len(self._jobs)

    def submit(self, job: Job) -> None:
        """Have a worker run the job as soon as one is free."""
        self._jobs.append(job)
        try:
            self._parked.pop().release()
        except IndexError:
            if len(self._threads) < self.limit:
                self._start()
        except RuntimeError:
            pass  # rung twice: by somebody who took his time, see `_unpark`

    def _call_another(self) -> None:
        """Ring for a parked worker, if there is one; one that has been rung already comes anyway."""
        with suppress(IndexError, RuntimeError):
            self._parked.pop().release()

    def _start(self) -> None:
        thread = threading.Thread(target=self._work, name=f"{self._name}-worker-{next(self._numbers)}", daemon=True)
        try:
            with self._mutex:
                if len(self._threads) >= self.limit or not self._jobs:
                    return
                self._threads.add(thread)
            thread.start()
        except RuntimeError:  # the interpreter is shutting down: whoever drains, or waits, runs the jobs (E6)
            self._threads.discard(thread)
            self.short_of_threads = True
        except BaseException:  # Ctrl-C: if it has been started all the same, it counts itself
            if thread.ident is None:
                self._threads.discard(thread)
            raise

    def _work(self) -> None:
        me = this_thread()
        me.workers = self
        self.owners.add(me)
        try:
            self._serve()
        finally:
            self.owners.discard(me)

    def _serve(self) -> None:
        bell = threading.Lock()
        bell.acquire()
        self._threads.add(threading.current_thread())
        while True:
            self.run_jobs(while_wanted=True)
            if len(self._threads) > self.limit and self._retire(surplus=True):
                if self._jobs:  # for which it may have been called
                    self._call_another()
                return
            self._parked.append(bell)
            if self._jobs:
                self._unpark(bell)
            elif self._stopping or not bell.acquire(timeout=PARK_FOR):
                self._unpark(bell)
                if (self._stopping or not self.watch()) and self._retire():
                    return
            elif bell in self._parked:  # a late ring, meant for the sleep before: nobody is to ring here for this one
                self._unpark(bell)

    def _unpark(self, bell: threading.Lock) -> None:
        """Stop being parked. If somebody has taken the bell meanwhile, he will ring it, unless Ctrl-C has come between.

        So nobody waits for it: a ring that is late ends the next sleep too soon, which does no harm.
        """
        try:
            self._parked.remove(bell)
        except ValueError:
            bell.acquire(False)

    def _retire(self, surplus: bool = False) -> bool:
        """End this thread, unless a job has come: whoever submitted it may have counted on it."""
        me = threading.current_thread()
        with self._mutex:
            if surplus and len(self._threads) <= self.limit:
                return False
            self._threads.discard(me)
            if self._jobs and not surplus:
                self._threads.add(me)
                return False
            self._ending = [thread for thread in self._ending if thread.is_alive()]
            self._ending.append(me)
        return True

    def lend(self) -> None:
        """One of the threads is going to wait: another may work meanwhile (E16)."""
        with self._mutex:
            self.limit += 1
        if self._jobs and not self._parked:
            self._start()

    def take_back(self) -> None:
        """It goes on. There may be one thread too many for a while; it goes when it has done its job."""
        with self._mutex:
            self.limit -= 1

    def run_jobs(self, while_wanted: bool = False) -> None:
        """Run what is there, on this thread; `while_wanted` ends that when there are more threads than are allowed."""
        while not (while_wanted and len(self._threads) > self.limit):
            try:
                job = self._jobs.popleft()
            except IndexError:
                return
            try:
                job()
            except KeyboardInterrupt:
                raise
            except BaseException:  # a job reports failures of users' code itself: this is a fault of ours
                logger.critical("a job of %s failed; please report this", self._name, exc_info=True, extra=about())

    def forget(self) -> None:
        """After a fork: the threads and jobs are the parent's."""
        self._jobs.clear()
        self._parked.clear()
        self._threads.clear()
        self.owners.clear()
        self._mutex = threading.RLock()

    def stop(self) -> None:
        """Let the workers end as soon as they have nothing to do, and wait for it. A later job starts one again."""
        self._stopping = True
        try:
            ended = {threading.current_thread()}
            while True:
                while self._parked:
                    self._call_another()
                with self._mutex:
                    others = {*self._threads, *self._ending} - ended
                if not others:
                    return
                other = others.pop()
                try:
                    other.join()
                    ended.add(other)
                except RuntimeError:  # it is just being started
                    time.sleep(0.0001)
        finally:
            self._stopping = False


class OwnLoop:
    """An asyncio loop on a daemon thread, made when somebody needs it: for async handlers that bring no loop (E8)."""

    def __init__(self, name: str) -> None:
        self._name = name
        self._mutex = threading.Lock()
        self._loop: Optional[asyncio.AbstractEventLoop] = None
        self._thread: Optional[threading.Thread] = None

    def get(self) -> asyncio.AbstractEventLoop:
        """The loop, running."""
        loop = self._loop
        return loop if loop is not None else self._make()

    def _make(self) -> asyncio.AbstractEventLoop:
        with self._mutex:
            if self._loop is None:
                loop = asyncio.new_event_loop()
                thread = threading.Thread(target=self._run, args=(loop,), name=f"{self._name}-loop", daemon=True)
                try:
                    thread.start()
                except RuntimeError:
                    loop.close()
                    raise
                self._loop, self._thread = loop, thread
            return self._loop

    def _run(self, loop: asyncio.AbstractEventLoop) -> None:
        asyncio.set_event_loop(loop)
        try:
            loop.run_forever()
            tasks = asyncio.all_tasks(loop)
            for task in tasks:
                task.cancel()
            loop.run_until_complete(asyncio.gather(*tasks, return_exceptions=True))
            loop.run_until_complete(loop.shutdown_asyncgens())
            loop.run_until_complete(loop.shutdown_default_executor())
        finally:
            asyncio.set_event_loop(None)
            loop.close()

    def forget(self) -> None:
        """After a fork: the thread is the parent's, and so is the loop."""
        self._mutex = threading.Lock()
        self._loop = self._thread = None

    def stop(self) -> None:
        """Cancel what still runs, end the thread, close the loop. A later `get` makes a new one."""
        with self._mutex:
            loop, thread = self._loop, self._thread
            self._loop = self._thread = None
        if loop is not None and thread is not None:
            loop.call_soon_threadsafe(loop.stop)
            if thread is not threading.current_thread():
                thread.join()


# -- fork (L13) ----------------------------------------------------------------------------------------------


class Forgetful(Protocol):
    """Something whose threads, holds and queues a forked child doesn't have."""

    def forget(self) -> None:
        """Begin anew, in the child."""


_to_forget: weakref.WeakSet[Any] = weakref.WeakSet()
_fork_hooked = threading.Lock()


def forget_after_fork(what: Forgetful) -> None:
    """Have `what` begin anew in each forked child."""
    _to_forget.add(what)
    if _fork_hooked.acquire(False) and hasattr(os, "register_at_fork"):
        os.register_at_fork(after_in_child=_forget_all)


def _forget_all() -> None:
    for what in list(_to_forget):
        what.forget()


# -- the exit of the process (E6) ---------------------------------------------------------------------------


class Drainable(Protocol):
    """Something with work that is to be done before the process ends."""

    exit_timeout: Optional[float]

    begun: int
    """How much work has been begun since the first drain."""

    def drain(self, timeout: Optional[float]) -> bool:
        """Let the work go on for `timeout` seconds, lending a hand where no thread can; True when all is done."""

    @property
    def only_waits(self) -> bool:
        """Whether none of the work can go on by itself."""

    def end_waits(self) -> None:
        """Nobody else lives: what is left waits for something that nobody will do."""

    def abandon(self, why: str) -> None:
        """Say what will not be done."""


_to_drain: weakref.WeakSet[Any] = weakref.WeakSet()
_to_stop: weakref.WeakSet[Any] = weakref.WeakSet()
_drain_mutex = threading.Lock()
_hooked = threading.Lock()
_POLL = 0.05
_draining = False


def drain_at_exit(what: Drainable) -> None:
    """Have the work of `what` done before the process ends, as long as somebody else holds on to it."""
    with _drain_mutex:
        _to_drain.add(what)
    if _hooked.acquire(False):
        # The interpreter calls these hooks last in, first out. The executors' comes with their import: ours is
        # to run before it, since a drained handler may use a thread pool.
        import concurrent.futures.thread  # noqa: F401

        with suppress(RuntimeError, AttributeError):
            threading._register_atexit(_drain_with_threads)  # type: ignore[attr-defined]
        atexit.register(_drain_the_rest)


class Stoppable(Protocol):
    """Something that has to write down what has been done, when nothing more is done."""

    def hurry(self) -> None:
        """Begin with it."""

    def stop_by(self, begun: float) -> None:
        """Wait for it, but not for ever: `begun` is when the waiting began."""


def stop_at_exit(what: Stoppable) -> None:
    """Have `what` stopped when everything is drained; together, so that several that hang take no longer than one."""
    with _drain_mutex:
        _to_stop.add(what)


def _stop_all() -> None:
    with _drain_mutex:
        found = list(_to_stop)
        _to_stop.clear()
    begun = time.monotonic()
    for what in found:
        what.hurry()
    for what in found:
        what.stop_by(begun)


def _members() -> list[Any]:
    with _drain_mutex:
        return list(_to_drain)


def _was_interrupted() -> bool:
    """Whether the program has ended by Ctrl-C: then nobody wants its work done."""
    return not sys.flags.interactive and getattr(sys, "last_type", None) is KeyboardInterrupt


def _drain_with_threads() -> None:
    """First part, while executors and non-daemon threads live: what they still emit is part of the chain."""
    if _was_interrupted():
        for what in _members():
            what.abandon("interrupted")
        return
    main = threading.main_thread()
    # Some threads end when the main thread has; it has, but for what we do here. To them it is over already.
    main.is_alive = lambda: False  # type: ignore[method-assign]
    main.join = lambda timeout=None: None  # type: ignore[method-assign]
    try:
        _drain(lambda started: _drain_all(started) and not _wait_for_threads(started))
    finally:
        del main.is_alive, main.join


def _drain_the_rest() -> None:
    """Second part, after them: what came too late for the first."""
    try:
        if not _was_interrupted():
            _drain(_drain_all)
    finally:
        _stop_all()


def _drain(is_done: Callable[[float], bool]) -> None:
    global _draining
    started = time.monotonic()
    _draining = True
    try:
        while not is_done(started):
            pass
    except KeyboardInterrupt:
        _die_of_interrupt()
    finally:
        _draining = False
    for what in _members():
        if not what.drain(0):
            what.abandon(f"exit_timeout of {what.exit_timeout:g} s is over")


def _drain_all(started: float) -> bool:
    """One round; True if all is done, but for what has no time left, and nothing new has come meanwhile."""
    members = [what for what in _members() if not _is_late(what, started)]
    before = [what.begun for what in members]
    done = [what.drain(_POLL) for what in members]
    if not all(done):
        look_whether_all_wait()
    return all(done) and all(what.drain(0) for what in members) and before == [what.begun for what in members]


def look_whether_all_wait() -> None:
    """Called now and then at the exit: if nobody is left but those who wait for others, that has an end (E6)."""
    members = _members()
    if _draining and all(what.only_waits for what in members) and not any(map(_may_emit, threading.enumerate())):
        for what in members:
            what.end_waits()


def _is_late(what: Any, started: float) -> bool:
    return what.exit_timeout is not None and time.monotonic() - started >= what.exit_timeout


def _wait_for_threads(started: float) -> bool:
    """Wait a moment for other threads, which may still emit; False if there are none."""
    if all(_is_late(what, started) for what in _members()):
        return False
    others = [thread for thread in threading.enumerate() if _may_emit(thread)]
    if others:
        others[0].join(_POLL)
    return bool(others)


def _may_emit(thread: threading.Thread) -> bool:
    """Not the main thread, no daemon, and no executor's thread that only waits: that ends after us."""
    from concurrent.futures import thread as executors

    if thread.daemon or thread is threading.main_thread():
        return False
    if thread in getattr(sys.modules.get("concurrent.futures.process"), "_threads_wakeups", ()):
        return False
    frame = all_frames().get(thread.ident or 0)
    jobs = executors._threads_queues.get(thread)
    if jobs is not None:
        return not jobs.empty() or (frame is not None and frame.f_code is not executors._worker.__code__)
    while frame is not None:
        if frame.f_code is threading.Thread.join.__code__ and frame.f_locals.get("self") is threading.main_thread():
            return False  # it sleeps until the main thread ends
        frame = frame.f_back
    return True


def _die_of_interrupt() -> None:
    """Ctrl-C at exit: the traceback, other exit handlers, and the death that a shell expects (E6)."""
    traceback.print_exc()
    for what in _members():
        what.abandon("interrupted")
    with _drain_mutex:
        _to_drain.clear()
    with suppress(BaseException):
        _stop_all()
    with suppress(BaseException):
        atexit._run_exitfuncs()
    for stream in (sys.stdout, sys.stderr):
        with suppress(Exception):
            stream.flush()
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    os.kill(os.getpid(), signal.SIGINT)
