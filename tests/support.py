"""What the tests share: schedulers that are out to hurt, scripts in processes of their own."""

from __future__ import annotations

import contextlib
import contextvars
import dis
import functools
import os
import random
import subprocess
import sys
import textwrap
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Callable, Optional

from agentdiff._clock import Clock

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = str(ROOT / "agentdiff") + os.sep


def eventually(condition: Callable[[], Any], timeout: float = 10.0) -> None:
    """Until the condition holds: for what another thread or process does in its own time."""
    deadline = time.monotonic() + timeout
    while not condition():
        assert time.monotonic() < deadline, f"never came true: {condition}"
        threading.Event().wait(0.001)


@contextlib.contextmanager
def eager_switching() -> Iterator[None]:
    """Threads switch as often as the interpreter can: finds races on 3.9 and 3.10."""
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        yield
    finally:
        sys.setswitchinterval(before)


@contextlib.contextmanager
def yielding_at_opcodes(chance: float = 0.05, seed: int = 0) -> Iterator[None]:
    """Threads started within give way at opcodes of our package: finds races on 3.11 and later."""
    dice = random.Random(seed)
    spin = dice.random

    def trace(frame: Any, event: str, arg: Any) -> Any:
        if event == "call":
            if not frame.f_code.co_filename.startswith(PACKAGE):
                return None
            frame.f_trace_opcodes = True
            frame.f_trace_lines = False
            return trace
        if event == "opcode" and spin() < chance:
            time.sleep(0)
        return trace

    before = threading._trace_hook  # type: ignore[attr-defined]  # coverage's, say
    threading.settrace(trace)
    try:
        yield
    finally:
        threading.settrace(before)


def run_script(source: str, *args: str, timeout: float = 60, **env: str) -> subprocess.CompletedProcess[str]:
    """Run a script in a Python of its own, with the package on its path."""
    return subprocess.run(
        [sys.executable, "-c", textwrap.dedent(source), *args],
        capture_output=True,
        text=True,
        timeout=timeout,
        check=False,
        env={**os.environ, "PYTHONPATH": str(ROOT), **env},
    )


def start_all(*targets: Callable[[], Any]) -> list[threading.Thread]:
    """Start a thread for each; they are daemons, so that a failing test can't hang the run."""
    threads = [threading.Thread(target=target, daemon=True) for target in targets]
    for thread in threads:
        thread.start()
    return threads


def join_all(threads: list[threading.Thread], timeout: float = 30.0) -> None:
    """Wait for them; one that doesn't end fails the test."""
    deadline = time.monotonic() + timeout
    for thread in threads:
        thread.join(max(0.0, deadline - time.monotonic()))
        assert not thread.is_alive(), f"{thread.name} did not end"


class Interrupt:
    """Ctrl-C in our package, on this thread, at one of the places where Python looks for it: after a call."""

    def __init__(self, step: int) -> None:
        self.left = step
        self.before: dict[Any, int] = {}  # the instruction that each frame has executed last

    def __call__(self, frame: Any, event: str, arg: Any) -> Optional[Interrupt]:
        if event == "call":
            if not frame.f_code.co_filename.startswith(PACKAGE) or frame.f_code.co_name == "repair":
                return None
            frame.f_trace = self  # 3.12 and later ask for it first
            frame.f_trace_opcodes = True
            frame.f_trace_lines = False
        elif event == "opcode":
            before = self.before.get(frame)
            self.before[frame] = frame.f_lasti
            if before is not None and dis.opname[frame.f_code.co_code[before]].startswith("CALL"):
                self.left -= 1
                if self.left < 0:
                    raise KeyboardInterrupt
        return self


def interrupted(step: int, work: Callable[[], Any], first: Callable[[], Any] = lambda: None) -> bool:
    """Whether Ctrl-C came in the work; on a thread of its own, since CPython 3.11 leaves there what was being handled.

    What is done `first` is done on the same thread, and isn't interrupted.
    """
    hit = []

    def run() -> None:
        first()
        sys.settrace(Interrupt(step))
        try:
            work()
        except KeyboardInterrupt:
            hit.append(step)
        finally:
            sys.settrace(None)

    join_all(start_all(functools.partial(contextvars.copy_context().run, run)))
    return bool(hit)


class Stuck(BaseException):
    """Ends an actor of a `Stage` on which nobody can go on."""


class _Actor:
    def __init__(self, number: int) -> None:
        self.number = number
        self.go = threading.Semaphore(0)
        self.ready: Callable[[], bool] = lambda: True
        self.done = False


class Stage:
    """Threads that run one at a time and change only where a plan says so: one schedule, the same each time.

    `plan` maps the number of a step to the actor that goes on there; else whoever runs goes on while it can.
    A step is a call of `point`: the tools below make one at each access to what the actors share. With
    `opcodes`, the names of functions of our package, there is one at each opcode of those too.
    """

    def __init__(self, plan: dict[int, int], opcodes: frozenset[str] = frozenset()) -> None:
        self.plan = plan
        self.opcodes = opcodes
        self.history: list[tuple[tuple[int, ...], int]] = []  # for each step: who could go on, and who did
        self.errors: list[str] = []
        self.stuck = False
        self._actors: list[_Actor] = []
        self._by_thread: dict[int, _Actor] = {}
        self._over = threading.Event()

    def play(self, *programs: Callable[[], Any]) -> None:
        """Run them all to their ends, the first one first."""
        self._actors = [_Actor(number) for number in range(len(programs))]
        threads = start_all(*(lambda a=a, p=p: self._act(a, p) for a, p in zip(self._actors, programs)))
        self._actors[0].go.release()
        assert self._over.wait(20), "the stage hangs"
        join_all(threads)

    def point(self, ready: Callable[[], bool] = lambda: True) -> None:
        """A step of the actor that calls: others may go on here; it does only when it is `ready`."""
        me = self._by_thread.get(threading.get_ident())
        if me is None:
            return
        if not self.stuck:
            me.ready = ready
            self._next(me)
        if self.stuck:
            raise Stuck

    def is_nearly_over(self) -> bool:
        """Whether all but one have ended."""
        return sum(not actor.done for actor in self._actors) <= 1

    def _next(self, me: _Actor) -> None:
        there = [actor for actor in self._actors if not actor.done]
        if not there:
            self._over.set()
            return
        able = [actor for actor in there if actor.ready()]
        if not able:
            self.stuck, able = True, there
        wanted = self.plan.get(len(self.history))
        chosen = next((actor for actor in able if actor.number == wanted), me if me in able else able[0])
        self.history.append((tuple(actor.number for actor in able), chosen.number))
        if chosen is not me:
            chosen.go.release()
            if not me.done:
                me.go.acquire()

    def _act(self, actor: _Actor, program: Callable[[], Any]) -> None:
        self._by_thread[threading.get_ident()] = actor
        actor.go.acquire()
        if self.opcodes:
            sys.settrace(self._trace)
        try:
            program()
        except Stuck:
            pass
        except BaseException as error:
            self.errors.append(f"actor {actor.number}: {error!r}")
        finally:
            if self.opcodes:
                sys.settrace(None)
            actor.done = True
            self._next(actor)

    def _trace(self, frame: Any, event: str, arg: Any) -> Any:
        if event == "call":
            if frame.f_code.co_name not in self.opcodes or not frame.f_code.co_filename.startswith(PACKAGE):
                return None
            frame.f_trace_opcodes = True
            frame.f_trace_lines = False
        elif event == "opcode":
            self.point()
        return self._trace


class StageDict(dict):  # type: ignore[type-arg]
    """A dict that actors share: each access is a step."""

    def __init__(self, stage: Stage) -> None:
        super().__init__()
        self.point = stage.point

    def __len__(self) -> int:
        self.point()
        return super().__len__()

    def __contains__(self, key: object) -> bool:
        self.point()
        return super().__contains__(key)

    def __getitem__(self, key: Any) -> Any:
        self.point()
        return super().__getitem__(key)

    def __setitem__(self, key: Any, value: Any) -> None:
        self.point()
        super().__setitem__(key, value)

    def __delitem__(self, key: Any) -> None:
        self.point()
        super().__delitem__(key)

    def get(self, key: Any, default: Any = None) -> Any:
        self.point()
        return super().get(key, default)

    def setdefault(self, key: Any, default: Any = None) -> Any:
        self.point()
        return super().setdefault(key, default)

    def pop(self, key: Any, *default: Any) -> Any:
        self.point()
        return super().pop(key, *default)


class StageMutex:
    """A mutex that actors share."""

    def _is_owned(self) -> bool:
        return False  # no collection comes upon an actor inside

    def __init__(self, stage: Stage) -> None:
        self.point = stage.point
        self.held = False

    def acquire(self, blocking: bool = True) -> bool:
        if blocking:
            self.point(lambda: not self.held)
        elif self.held:
            return False
        self.held = True
        return True

    def release(self) -> None:
        self.held = False

    def __enter__(self) -> None:
        self.acquire()

    def __exit__(self, *error: Any) -> None:
        self.release()


class StageClock(Clock):
    """A wait with a timeout ends when its actor is let go on: the time ran out if nobody had released the lock."""

    def __init__(self, stage: Stage) -> None:
        super().__init__()
        self.point = stage.point
        self.passed = 0.0
        self.monotonic = lambda: time.monotonic() + self.passed

    def wait(self, lock: Any, timeout: Optional[float]) -> bool:
        self.point(lambda: timeout is not None or not lock.locked())
        released = bool(lock.acquire(False))
        if not released and timeout is not None:
            self.passed += timeout
        return released


def explore(play: Callable[[dict[int, int]], Stage], changes: int, limit: int, seed: int = 0) -> int:
    """Play the schedules with up to so many changes that nobody had to make: all, or `limit` of them by choice.

    `play` plays one and raises if it finds anything wrong. Returns how many were played.
    """
    dice = random.Random(seed)
    plans: list[list[dict[int, int]]] = [[{}]] + [[] for _ in range(changes)]
    for played in range(limit):
        levels = [level for level in plans if level]
        if not levels:
            return played
        level = plans[0] or dice.choice(levels)
        place = dice.randrange(len(level))
        level[place], level[-1] = level[-1], level[place]
        plan = level.pop()
        stage = play(plan)
        if len(plan) < changes:
            for step in range(max(plan, default=-1) + 1, len(stage.history)):
                able, chosen = stage.history[step]
                plans[len(plan) + 1] += [{**plan, step: other} for other in able if other != chosen]
    return limit
