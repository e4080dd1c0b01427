"""The background writer: between those who emit, who never wait, and a store, which may hang (S1, S2).

Whoever emits puts the event at the end of a deque and looks at its length. One thread takes batches from the other
end, makes records of them, and writes. Where the store is away, events wait; beyond `size` the oldest go, and are
counted. `mark` is the length from which on whoever puts has to attend: -1 while the thread sleeps.
"""

from __future__ import annotations

import threading
from collections import deque
from operator import itemgetter
from typing import Any, Callable, Optional

from .._clock import Clock
from .._log import about, logger
from .._waitqueue import Bell, TaskBell, ThreadBell
from .base import Record, Store

FLUSH_EVERY = 0.1
"""Seconds that events gather before they are written."""
BUFFER = 100_000
"""Events that wait for a store, at most."""
BATCH = 1000
_FIRST_RETRY = 0.05
_LAST_RETRY = 1.0
_by_time = itemgetter(2)


class _Countdown:
    """How long to wait still, in seconds; None: for ever."""

    def __init__(self, clock: Clock, timeout: Optional[float], begun: Optional[float] = None) -> None:
        self.clock = clock
        begun = clock.monotonic() if begun is None else begun
        self._end = None if timeout is None else begun + timeout

    @property
    def left(self) -> Optional[float]:
        return None if self._end is None else max(0.0, self._end - self.clock.monotonic())


class Writer:
    """Writes what is put into it, in the background.

    Args:
        store: where to.
        record_of: makes a record of what has been put; called on the writer's thread.
        clock: time.
        name: how the thread is called.
        flush_timeout: how long `stop` waits for the store.
        owns: whether the store is to be closed at the end.
        size: how many events may wait.
    """

    def __init__(
        self,
        store: Store,
        record_of: Callable[[Any], Record],
        clock: Clock,
        *,
        name: str,
        flush_timeout: Optional[float],
        owns: bool,
        size: int = BUFFER,
    ) -> None:
        self.store = store
        self._flush_timeout = flush_timeout
        self.mark: int = -1
        self._record_of = record_of
        self._clock = clock
        self._name = name
        self._owns = owns
        self._size = size
        self._buffer: deque[Any] = deque()
        self._begin()

    def _begin(self) -> None:
        self._mutex = threading.RLock()  # re-entrant, since a collected generator emits
        self._wake = ThreadBell()
        self._bells: list[Bell] = []
        self._hand: list[Any] = []  # what is being written
        self._given_up: list[Any] = []  # what was being written when nobody wanted to wait any longer
        self._singly = 0  # how many are to be written one by one
        self._thread: Optional[threading.Thread] = None
        self._ending = False
        self._stopped = False  # or is just being stopped
        self._hurried = False  # somebody waits: no time to gather
        self._down: Optional[float] = None  # since when the store is away
        self._lost = 0  # lately
        self.stored: int = 0
        self.dropped: int = 0
        self.mark = -1
        self._buffer.clear()

    def forget(self) -> None:
        """After a fork: nothing of the parent's is written here, the thread is new, the store opens again (L13)."""
        self._begin()
        self.store.forget()

    # -- for those who emit ---------------------------------------------------------------------------------

    def keeper(self) -> Callable[[Any], None]:
        """What puts something in: never waits, never raises."""
        append, buffer, attend = self._buffer.append, self._buffer, self._attend

        def keep(item: Any) -> None:
            append(item)
            if len(buffer) > self.mark:
                attend()

        return keep

    def _attend(self) -> None:
        """Wake the writer, or make room."""
        with self._mutex:
            if self.mark < self._size:
                self.mark = self._size // 2 if self.mark < 0 else self._size
                self._wake.ring()
            while len(self._buffer) > self._size:
                self._buffer.popleft()
                self._lost += 1
                self.dropped += 1
            self.start()

    def start(self) -> None:
        """Have the thread there."""
        with self._mutex:
            if self._thread is not None or self._ending:
                return
            thread = threading.Thread(target=self._run, name=f"{self._name}-store", daemon=True)
            self._thread = thread
        try:
            thread.start()
        except RuntimeError:  # the interpreter is shutting down
            self._thread = None

    # -- for those who wait ---------------------------------------------------------------------------------

    def flush(self, timeout: Optional[float]) -> bool:
        """Wait on this thread until what has been put in so far is written, or lost; False: not in time."""
        return self._wait(self._aim(), _Countdown(self._clock, timeout))

    def _wait(self, is_over: Callable[[], bool], countdown: _Countdown) -> bool:
        while True:
            bell = ThreadBell()
            if self._ask(is_over, bell):
                return True
            left = countdown.left
            if left == 0:
                self._drop(bell)
                return False
            self.hurry()
            bell.sleep(countdown.clock, left)
            self._drop(bell)

    async def _flush_async(self, countdown: _Countdown) -> None:
        """The same on a loop, which goes on meanwhile."""
        is_over = self._aim()
        while True:
            bell = TaskBell()
            if self._ask(is_over, bell):
                return
            try:
                left = countdown.left
                if left == 0:
                    return
                self.hurry()
                await bell.sleep(countdown.clock, left)
            finally:
                self._drop(bell)

    def _aim(self) -> Callable[[], bool]:
        """What tells, under the mutex, whether all that is here now is done."""
        with self._mutex:
            hand = self._hand
            target = self._done + len(hand) + len(self._buffer)
        return lambda: self._done >= target and (not hand or self._hand is not hand)

    def _ask(self, is_over: Callable[[], bool], bell: Bell) -> bool:
        """Whether it is over; if not, the bell is rung when there is something new to see."""
        with self._mutex:
            if is_over():
                return True
            self._bells.append(bell)
            return False

    @property
    def _done(self) -> int:
        return self.stored + self.dropped

    def _drop(self, bell: Bell) -> None:
        with self._mutex:
            if bell in self._bells:
                self._bells.remove(bell)

    def hurry(self) -> None:
        """Have what is there written now."""
        self._hurried = True
        self.start()
        if self._thread is None:  # there can't be one any more: who waits does the work
            self._work()
        self._wake.ring()

    def _ring(self) -> None:
        with self._mutex:
            bells, self._bells = self._bells, []
        for bell in bells:
            bell.ring()

    # -- the end ----------------------------------------------------------------------------------------------

    def end(self) -> None:
        """Have the thread write what is there, and end. Waits for nobody."""
        with self._mutex:
            self._ending = True
        self._wake.ring()

    def stop(self) -> None:
        """Have everything written and the thread ended, within `flush_timeout`; what is not is counted as lost."""
        self._stop(_Countdown(self._clock, self._flush_timeout))

    def stop_by(self, begun: float) -> None:
        """The same at the exit of the process; others may have used up some of the time since `begun`."""
        if not self._stopped:
            self._stop(_Countdown(Clock(), self._flush_timeout, begun))

    async def stop_async(self) -> None:
        """The same on a loop, which goes on while events are being written."""
        countdown = _Countdown(self._clock, self._flush_timeout)
        await self._flush_async(countdown)
        self._stop(countdown)

    def _stop(self, countdown: _Countdown) -> None:
        self._stopped = True
        done = self._wait(self._aim(), countdown)
        self.end()
        if not done:
            self._lose_all(f"{self.store} did not take them within {self._flush_timeout:.3g} s")
        thread = self._thread
        if thread is not None and self._wait(lambda: self._thread is None, countdown):
            thread.join()

    def _lose_all(self, why: str) -> None:
        """What waits, and what is being written, is given up."""
        with self._mutex:
            lost = len(self._buffer)
            self._buffer.clear()
            if self._given_up is not self._hand:
                self._given_up = self._hand
                lost += len(self._hand)
            self.dropped += lost
        if lost:
            logger.error("%d events are lost: %s", lost, why, extra=about())

    # -- the thread -------------------------------------------------------------------------------------------

    def _run(self) -> None:
        try:
            while True:
                with self._mutex:
                    unrung = self.mark < 0 and bool(self._buffer)  # it came while nobody slept, and woke nobody
                    if unrung:
                        self.mark = self._size // 2
                if not unrung:
                    if self._ending and not self._buffer:
                        break
                    self._wake.sleep(self._clock, None)
                if self._buffer and not (self._hurried or self._ending):
                    self._wake.sleep(self._clock, FLUSH_EVERY)
                self._work()
                self.mark = -1
        finally:
            if self._owns:
                try:
                    self.store.close()
                except Exception as error:
                    logger.warning("%s could not be closed: %s", self.store, error, extra=about())
            with self._mutex:
                self._thread = None
            self._ring()

    def _work(self) -> None:
        """Write until nothing is left."""
        self._hurried = False
        while self._take():
            self._write(self._hand)
            self._ring()
        self._tell_lost()

    def _take(self) -> bool:
        with self._mutex:
            self.mark = self._size // 2
            number = min(len(self._buffer), 1 if self._singly else BATCH)
            self._singly = max(0, self._singly - number)
            self._hand = [self._buffer.popleft() for _ in range(number)]
            return bool(number)

    def _write(self, hand: list[Any]) -> None:
        """Write a batch; as long as the store is away, again and again (S2)."""
        records = sorted(map(self._record_of, hand), key=_by_time)  # who emits first may be the second to put it here
        delay = _FIRST_RETRY
        while True:
            try:
                self.store.write(records)
            except (TypeError, ValueError) as error:
                self._refused(hand, records, error)
                return
            except BaseException as error:
                self._tell_down(error)
                if self._ending:
                    self._lose_all(f"{self.store} is away")
                    return
                self._wake.sleep(self._clock, delay)
                delay = min(2 * delay, _LAST_RETRY)
            else:
                self._count_stored(hand)
                self._tell_up()
                return

    def _count_stored(self, hand: list[Any]) -> None:
        with self._mutex:
            if self._given_up is hand:  # it has been counted as lost
                self.dropped -= len(hand)
            self.stored += len(hand)
            self._hand = []

    def _refused(self, hand: list[Any], records: list[Record], error: BaseException) -> None:
        """One of them can't be kept, ever: they go back, to be written one by one, so that the others are kept."""
        with self._mutex:
            self._hand = []
            if self._given_up is hand:
                return
            if len(hand) > 1:
                self._buffer.extendleft(reversed(hand))
                self._singly = len(hand)
                return
            self.dropped += 1
        (record,) = records
        logger.error(
            "event %r (%s) can't be kept by %s: %s",
            record.name,
            record.id,
            self.store,
            error,
            extra=about(event=record.name, agent=record.sender, run=record.run_id),
        )

    def _tell_down(self, error: BaseException) -> None:
        if self._down is None:
            self._down = self._clock.monotonic()
            logger.error(
                "%s is away (%s: %s): up to %d events wait for it, then the oldest are lost",
                self.store, type(error).__name__, error, self._size, extra=about(),
            )  # fmt: skip

    def _tell_up(self) -> None:
        if self._down is not None:
            since, self._down = self._down, None
            lost = self._reset_lost()
            logger.warning(
                "%s is back after %.1f s; %d events were lost",
                self.store,
                self._clock.monotonic() - since,
                lost,
                extra=about(),
            )

    def _tell_lost(self) -> None:
        if self._lost:
            logger.warning(
                "%d events were lost: %s is slower than those who emit", self._reset_lost(), self.store, extra=about()
            )

    def _reset_lost(self) -> int:
        with self._mutex:
            lost, self._lost = self._lost, 0
        return lost
