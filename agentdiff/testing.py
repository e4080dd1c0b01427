"""For tests of coordinated code (T1): an inline coordinator, a recorder of events, a clock that stands still.

The fixtures that use them are in the pytest plugin, which comes with the package: see `docs/testing.md`.
"""

from __future__ import annotations

import asyncio
import threading
from contextlib import suppress
from operator import attrgetter
from typing import Any, Callable, Optional

from ._clock import Clock
from ._lanes import Subscription
from ._owner import running_loop
from ._workers import Job, OwnLoop, Workers
from .coordinator import Coordinator
from .events import Event

__all__ = ["EventRecorder", "FakeClock", "InlineCoordinator"]

_A_MOMENT = 0.001


class _InlineWorkers(Workers):
    """No threads: whoever submits a job runs it, and all that it submits, before it goes on."""

    def __init__(self, name: str, limit: int) -> None:
        super().__init__(name, limit)
        self.short_of_threads = True  # so who waits runs jobs too
        self.pump: Callable[[], bool] = lambda: False  # let async handlers go on; False if there are none
        self._turn = threading.Lock()

    def submit(self, job: Job) -> None:
        self._jobs.append(job)
        while self._jobs and self._turn.acquire(False):
            try:
                self.run_jobs()
                while self.pump():
                    self.run_jobs()
            finally:
                self._turn.release()


class _InlineLoop(OwnLoop):
    """A loop without a thread: it runs while somebody pumps."""

    def _make(self) -> asyncio.AbstractEventLoop:
        self._loop = asyncio.new_event_loop()
        return self._loop

    def step(self) -> None:
        """Let its tasks go on for a moment."""
        loop = self.get()
        if running_loop() is None:
            loop.run_until_complete(asyncio.sleep(_A_MOMENT))
            return
        thread = threading.Thread(target=loop.run_until_complete, args=(asyncio.sleep(_A_MOMENT),))
        thread.start()  # two loops can't run on one thread
        thread.join()

    def stop(self) -> None:
        loop, self._loop = self._loop, None
        if loop is not None:
            loop.close()


class InlineCoordinator(Coordinator):
    """A coordinator that handles every event before `emit` returns, on the thread that emits: deterministic (T1).

    What a handler emits is handled after it, and before the first `emit` returns. Async handlers that are registered
    outside a loop run to their end as well; those of a loop of yours run there, and are to be awaited.

    >>> coord = InlineCoordinator()
    >>> seen = []
    >>> sub = coord.on("ready", seen.append)
    >>> _ = coord.emit("ready", 1)
    >>> seen
    [1]
    >>> coord.close()

    Args: as for `Coordinator`; `workers` means nothing.
    """

    _make_workers = _InlineWorkers
    _make_loop = _InlineLoop

    def __init__(self, **settings: Any) -> None:
        super().__init__(**settings)
        workers, loop, away = self._bus.workers, self._bus.loop, self._bus.away
        assert isinstance(workers, _InlineWorkers)
        assert isinstance(loop, _InlineLoop)
        own_loop = loop

        def pump() -> bool:
            waiting = any(one.loop is own_loop.get() for one in list(away))
            if waiting:
                own_loop.step()
            return waiting

        workers.pump = pump


class EventRecorder:
    """Records events, and says what it misses in words (T1).

    >>> with Coordinator() as coord:
    ...     recorder = EventRecorder(coord)
    ...     _ = coord.emit("ready", 1)
    ...     recorder.assert_emitted("ready", data=1)

    Args:
        coord: whose events.
        name: which of them: a name or a pattern.
        timeout: how long an assertion waits until everything is handled, in seconds.
    """

    def __init__(self, coord: Coordinator, name: str = "*", *, timeout: float = 5.0) -> None:
        self._coord = coord
        self._timeout = timeout
        self._events: list[Event] = []
        self.subscription: Subscription = coord.on(name, self._events.append, pass_event=True)

    @property
    def events(self) -> tuple[Event, ...]:
        """All so far, in the order of their emission; waits until everything is handled."""
        with suppress(TimeoutError):
            self._coord.join(self._timeout)
        return tuple(sorted(self._events, key=attrgetter("time")))

    @property
    def names(self) -> tuple[str, ...]:
        """The names of all so far."""
        return tuple(event.name for event in self.events)

    def of(self, name: str) -> tuple[Event, ...]:
        """All so far of this name."""
        return tuple(event for event in self.events if event.name == name)

    def clear(self) -> None:
        """Forget them."""
        self._events.clear()

    def assert_emitted(self, name: str, *, times: Optional[int] = None, data: Any = ...) -> None:
        """Such an event has been emitted: at least once or exactly so often, with this data where it is given."""
        found = self.of(name)
        if data is not ...:
            fitting = tuple(event for event in found if event.data == data)
            if not fitting:
                came = ", ".join(repr(event.data) for event in found) or "none at all"
                raise AssertionError(f"no event {name!r} with data {data!r}; there were: {came}; {self._told()}")
            found = fitting
        if times is None and not found:
            raise AssertionError(f"no event {name!r}; {self._told()}")
        if times is not None and len(found) != times:
            raise AssertionError(f"event {name!r} was emitted {len(found)} times, not {times}; {self._told()}")

    def assert_not_emitted(self, name: str) -> None:
        """No such event has been emitted."""
        self.assert_emitted(name, times=0)

    def assert_order(self, *names: str) -> None:
        """These events have been emitted in this order; others may have come between."""
        left = list(names)
        for name in self.names:
            if left and name == left[0]:
                left.pop(0)
        if left:
            done = len(names) - len(left)
            after = f" after {names[done - 1]!r}" if done else ""
            raise AssertionError(f"no event {left[0]!r}{after}; {self._told()}")

    def _told(self) -> str:
        return f"recorded: {', '.join(self.names) or 'nothing'}"


class FakeClock(Clock):
    """Time stands still until a test moves it; then the waits whose time is over end, in order (T1).

    >>> clock = FakeClock()
    >>> with Coordinator(clock=clock) as coord:
    ...     coord.limit("api", requests=1, per=60)
    ...     with coord.lock("api"):
    ...         pass
    ...     clock.advance(61)
    ...     with coord.lock("api", timeout=0):
    ...         print("a minute of waiting takes no time")
    a minute of waiting takes no time
    """

    def __init__(self) -> None:
        self.now: float = 1000.0
        self.monotonic: Callable[[], float] = lambda: self.now
        self.time: Callable[[], float] = lambda: self.now + 1_000_000.0
        self._changed = threading.Condition()
        self._alarms: list[tuple[float, int, Callable[[], Any]]] = []
        self._count = 0

    def _add(self, delay: float, ring: Callable[[], Any]) -> tuple[float, int, Callable[[], Any]]:
        with self._changed:
            self._count += 1
            alarm = (self.now + delay, self._count, ring)
            self._alarms.append(alarm)
            self._changed.notify_all()
        return alarm

    def _remove(self, alarm: tuple[float, int, Callable[[], Any]]) -> None:
        with self._changed:
            if alarm in self._alarms:
                self._alarms.remove(alarm)

    def wait(self, lock: Any, timeout: Optional[float]) -> bool:
        """Wait until somebody releases `lock`, or until `advance` has passed so many seconds."""
        if timeout is None:
            return bool(lock.acquire())
        if timeout <= 0:
            return bool(lock.acquire(False))
        expired = []

        def ring() -> None:
            expired.append(True)
            with suppress(RuntimeError):
                lock.release()

        alarm = self._add(timeout, ring)
        lock.acquire()
        self._remove(alarm)
        return not expired

    def call_later(self, loop: asyncio.AbstractEventLoop, delay: float, call: Callable[[], Any]) -> Any:
        """Have the loop make the call when `advance` has passed so many seconds."""

        def ring() -> None:
            with suppress(RuntimeError):  # the loop has been closed, and its timers with it
                loop.call_soon_threadsafe(call)

        alarm = self._add(delay, ring)
        clock = self

        class Timer:
            def cancel(self) -> None:
                clock._remove(alarm)

        return Timer()

    def wait_for_sleepers(self, number: int, timeout: float = 10.0) -> None:
        """Until so many waits with a timeout have begun.

        Args:
            number: how many.
            timeout: seconds of real time.

        Raises:
            TimeoutError: they have not, by then.
        """
        with self._changed:
            if not self._changed.wait_for(lambda: len(self._alarms) >= number, timeout):
                raise TimeoutError(f"{len(self._alarms)} waits have begun, not {number}")

    def advance(self, seconds: float) -> None:
        """Let time pass.

        Args:
            seconds: how much.
        """
        with self._changed:
            self.now += seconds
            due = sorted(alarm for alarm in self._alarms if alarm[0] <= self.now)
            for alarm in due:
                self._alarms.remove(alarm)
        for _, _, ring in due:
            ring()
