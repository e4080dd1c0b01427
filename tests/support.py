"""What the tests share: a clock that tests own, schedulers that are out to hurt, scripts in processes of their own."""

from __future__ import annotations

import contextlib
import os
import random
import subprocess
import sys
import textwrap
import threading
import time
from pathlib import Path
from typing import Any, Callable, Iterator, Optional

from agentdiff._clock import Clock

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = str(ROOT / "agentdiff") + os.sep


class FakeClock(Clock):
    """Time stands still until a test moves it; then the waits whose time is over end, in order."""

    def __init__(self) -> None:
        self.now = 1000.0
        self.monotonic = lambda: self.now
        self.time = lambda: self.now + 1_000_000.0
        self._mutex = threading.Condition()
        self._alarms: list[tuple[float, int, Callable[[], Any]]] = []
        self._count = 0

    def _add(self, delay: float, ring: Callable[[], Any]) -> tuple[float, int, Callable[[], Any]]:
        with self._mutex:
            self._count += 1
            alarm = (self.now + delay, self._count, ring)
            self._alarms.append(alarm)
            self._mutex.notify_all()
        return alarm

    def _remove(self, alarm: tuple[float, int, Callable[[], Any]]) -> None:
        with self._mutex:
            if alarm in self._alarms:
                self._alarms.remove(alarm)

    def wait(self, lock: Any, timeout: Optional[float]) -> bool:
        if timeout is None:
            return bool(lock.acquire())
        expired = []

        def ring() -> None:
            expired.append(True)
            with contextlib.suppress(RuntimeError):
                lock.release()

        alarm = self._add(timeout, ring)
        lock.acquire()
        self._remove(alarm)
        return not expired

    def call_later(self, loop: Any, delay: float, call: Callable[[], Any]) -> Any:
        alarm = self._add(delay, lambda: loop.call_soon_threadsafe(call))
        clock = self

        class Timer:
            def cancel(self) -> None:
                clock._remove(alarm)

        return Timer()

    def wait_for_sleepers(self, number: int) -> None:
        """Until so many waits with a timeout have begun."""
        with self._mutex:
            assert self._mutex.wait_for(lambda: len(self._alarms) >= number, 10)

    def advance(self, seconds: float) -> None:
        """Let time pass."""
        with self._mutex:
            self.now += seconds
            due = sorted(alarm for alarm in self._alarms if alarm[0] <= self.now)
            for alarm in due:
                self._alarms.remove(alarm)
        for _, _, ring in due:
            ring()


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

    threading.settrace(trace)
    try:
        yield
    finally:
        threading.settrace(None)  # type: ignore[arg-type]


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
