"""The background writer: between those who emit, who never wait, and a store, which may hang (S1, S2).

Whoever emits puts the event at the end of a deque and looks at its length. One thread takes batches from the other
end, makes records of them, and writes. Where the store is away, events wait; beyond `size` the oldest go, and are
counted. `mark` is the length from which on whoever puts has to attend: -1 while the thread sleeps.
"""

from __future__ import annotations

import threading
from asyncio import get_running_loop
from collections import deque
from operator import itemgetter
from typing import Any, Callable, Optional, Union

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
        self.flush_timeout = flush_timeout
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
        self._thread: Optional[threading.Thread] = None
        self._ending = False
        self._stopped = False  # or is just being stopped
        self._hurried = False  # somebody waits: no time to gather
        self._down: Optional[float] = None  # since when the store is away
        self._told = False  # of what has been lost lately
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

    def flush(self, timeout: Optional[float], clock: Optional[Clock] = None) -> bool:
        """Wait on this thread until what has been put in so far is written, or lost; False: not in time."""
        clock = clock or self._clock
        deadline = None if timeout is None else clock.monotonic() + timeout
        is_done = self._aim()
        while True:
            bell = ThreadBell()
            if is_done(bell):
                return True
            left = None if deadline is None else deadline - clock.monotonic()
            if left is not None and left <= 0:
                self._drop(bell)
                return False
            self.hurry()
            bell.sleep(clock, left)
            self._drop(bell)

    async def flush_async(self, timeout: Optional[float]) -> bool:
        """The same on a loop, which goes on meanwhile."""
        clock = self._clock
        deadline = None if timeout is None else clock.monotonic() + timeout
        is_done = self._aim()
        get_running_loop()
        while True:
            bell = TaskBell()
            if is_done(bell):
                return True
            try:
                left = None if deadline is None else deadline - clock.monotonic()
                if left is not None and left <= 0:
                    return False
                self.hurry()
                await bell.sleep(clock, left)
            finally:
                self._drop(bell)

    def _aim(self) -> Callable[[Bell], bool]:
        """What asks whether all that is here now is done; if not, the bell is rung when there is something to see."""
        with self._mutex:
            hand = self._hand
            target = self._done + len(hand) + len(self._buffer)

        def is_done(bell: Bell) -> bool:
            with self._mutex:
                if self._done >= target and (not hand or self._hand is not hand):
                    return True
                self._bells.append(bell)
                return False

        return is_done

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

    def stop(self, timeout: Union[float, Any, None] = ..., clock: Optional[Clock] = None) -> None:
        """Have everything written and the thread ended, within `flush_timeout`; what is not is counted as lost."""
        clock = clock or self._clock
        timeout = self.flush_timeout if timeout is ... else timeout
        self._stopped = True
        begun = clock.monotonic()
        done = self.flush(timeout, clock)
        self.end()
        if not done:
            self._give_up(timeout or 0)
        thread = self._thread
        while thread is not None and thread is not threading.current_thread() and thread.is_alive():
            bell = ThreadBell()
            with self._mutex:
                self._bells.append(bell)
                if self._thread is None:
                    break
            left = None if timeout is None else timeout - (clock.monotonic() - begun)
            if left is not None and left <= 0:
                return
            self._wake.ring()
            bell.sleep(clock, left)
        if thread is not None and self._thread is None:
            thread.join()

    def stop_by(self, begun: float) -> None:
        """The same at the exit of the process; others may have used up some of the time since `begun`."""
        if self._stopped:
            return
        clock = Clock()
        left = None if self.flush_timeout is None else self.flush_timeout - (clock.monotonic() - begun)
        self.stop(None if left is None else max(left, 0), clock)

    async def stop_async(self) -> None:
        """The same on a loop, which goes on while events are being written."""
        begun = self._clock.monotonic()
        await self.flush_async(self.flush_timeout)
        left = None if self.flush_timeout is None else self.flush_timeout - (self._clock.monotonic() - begun)
        self.stop(None if left is None else max(left, 0))

    def _give_up(self, timeout: float) -> None:
        with self._mutex:
            lost = len(self._buffer)
            if self._given_up is not self._hand:
                self._given_up = self._hand
                lost += len(self._hand)
            self._buffer.clear()
            self.dropped += lost
        if lost:
            logger.error(
                "%d events are lost: %s did not take them within %.3g s", lost, self.store, timeout, extra=about()
            )

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
                if self._buffer and not self._ending and not self._hurried:
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
        self._ring()

    def _take(self) -> bool:
        with self._mutex:
            self.mark = self._size // 2
            number = min(len(self._buffer), BATCH)
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
                if len(records) > 1:
                    self._one_by_one(hand, records)
                else:
                    self._refuse(hand, records[0], error)
                return
            except BaseException as error:
                self._tell_down(error)
                if self._ending:
                    self._lose_all(hand)
                    return
                self._wake.sleep(self._clock, delay)
                if self._given_up is hand:
                    return
                delay = min(2 * delay, _LAST_RETRY)
            else:
                self._count_stored(hand)
                self._tell_up()
                return

    def _count_stored(self, hand: list[Any]) -> None:
        with self._mutex:
            if self._given_up is hand:  # it has been counted as lost
                self.dropped -= len(hand)
                self._given_up = []
            self.stored += len(hand)
            self._hand = []

    def _one_by_one(self, hand: list[Any], records: list[Record]) -> None:
        """One of them can't be kept, ever: find out which, so that the others are."""
        by_id = {record.id: item for record, item in zip(map(self._record_of, hand), hand)}
        for record in records:
            self._hand = [by_id[record.id]]
            self._write(self._hand)

    def _refuse(self, hand: list[Any], record: Record, error: BaseException) -> None:
        with self._mutex:
            self._hand = []
            if self._given_up is not hand:
                self.dropped += 1
        logger.error(
            "event %r (%s) can't be kept by %s: %s",
            record.name,
            record.id,
            self.store,
            error,
            extra=about(event=record.name, agent=record.sender, run=record.run_id),
        )

    def _lose_all(self, hand: list[Any]) -> None:
        """The end has come, and the store is away: one attempt was all."""
        with self._mutex:
            lost = len(self._buffer)
            if self._given_up is not hand:
                lost += len(hand)
            self._buffer.clear()
            self._hand = []
            self.dropped += lost
        if lost:
            logger.error("%d events are lost: %s is away", lost, self.store, extra=about())

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
