"""Limits under the schedules of a few parties, and under many threads, tasks and loops at once."""

from __future__ import annotations

import asyncio
import contextlib
import random
import threading
import time
from collections.abc import Iterator
from contextvars import Context, copy_context
from typing import Any, Callable, Optional

import pytest
from plays import SCENES, SECONDS, Crowd, Play, Program, Refused, Scene, perform
from support import (
    Stage,
    eager_switching,
    eventually,
    explore,
    join_all,
    start_all,
    yielding_at_opcodes,
)

from agentdiff import Coordinator
from agentdiff._clock import Clock
from agentdiff._limited import LimitEntry
from agentdiff._places import How, Slot
from agentdiff._table import LockTable
from agentdiff.limits import Limit
from agentdiff.locks import Lock, LockGroup

LIMIT = int(SECONDS * 60) or 120
SPAN = SECONDS or 1.0


# -- every schedule -----------------------------------------------------------------------------------------

ONE, TWO, THREE = (Limit(concurrency=number) for number in (1, 2, 3))


class LimitPlay(Play):
    """Parties around a name that is a limit, or becomes one."""

    def __init__(self, stage: Stage, limit: Optional[Limit] = None) -> None:
        super().__init__(stage)
        if limit is not None:
            self.declare(limit)

    def declare(self, limit: Limit) -> None:
        """Who is inside stays, and who comes obeys: the most that was ever allowed may be inside."""
        self.allowed = max(self.allowed, limit.concurrency or 99)
        self.table.limit("a", limit)

    def declaring(self, *limits: Limit) -> Program:
        """Somebody who declares them, one after another."""

        def program() -> None:
            for limit in limits:
                self.declare(limit)
                self.stage.point()

        return program

    def after_waiting(self, waiting: int, program: Program) -> Program:
        """It begins when so many stand in line, or when nobody will any more."""

        def begin() -> None:
            self.stage.point(lambda: len(self.table.book.waiting) >= waiting or self.stage.is_nearly_over())
            program()

        return begin

    def end(self, told: str) -> None:
        check_nothing_left(self.table, told)


def run_scene(scene: Scene, plan: dict[int, int], limit: Optional[Limit], opcodes: frozenset[str]) -> Stage:
    return perform(LimitPlay(Stage(plan, opcodes), limit), scene)


def check_nothing_left(table: LockTable, told: str = "") -> None:
    """Nobody is inside or in line, and nothing is granted that nobody has entered."""
    for name, entry in dict(table.entries).items():
        assert isinstance(entry, LimitEntry), f"{told}: {name} is left"
        entry.serve()
        info = entry.info()
        assert (info.places_taken, info.waiting) == (0, 0), f"{told}: {info}"
        assert not entry.account.open, told
        assert not entry.inside(), told
        assert not entry.hopeful, told
        assert not entry._owners, told
        assert not entry._sides, told
    left = [name for name, slot in dict(table.slots).items() if slot.owner is not None]
    assert not left, f"{told}: left {left}"
    assert not table.book.waiting, told
    assert not table.book.woken, told


QUICK = frozenset({"enter", "leave", "live"})
SLOW = QUICK | {
    "__init__", "loans", "inside", "_mend", "_close", "_limited", "serve", "settle", "tidy", "pass_on", "free",
}  # fmt: skip


@pytest.mark.parametrize("limit", [ONE, TWO])
@pytest.mark.parametrize("scene", SCENES)
@pytest.mark.time_limit(900)
def test_R2_no_schedule_of_a_few_parties_lets_too_many_in(scene: Scene, limit: Limit) -> None:
    """Strangers, borrowers, re-entry, timeouts: never too many inside, nobody waits for ever, nothing is left."""
    explore(lambda plan: run_scene(scene, plan, limit, frozenset()), 3, LIMIT)


# a lock becomes a limit, and a limit another one


def held_the_quick_way(play: LimitPlay) -> list[Program]:
    return [play.party(0), play.declaring(TWO), play.party(1)]


def held_the_quick_way_and_again(play: LimitPlay) -> list[Program]:
    return [play.party(0, play.again), play.declaring(ONE), play.party(1)]


def held_and_wanted(play: LimitPlay) -> list[Program]:
    return [play.party(0), play.party(1), play.after_waiting(1, play.declaring(TWO)), play.party(2, timeout=1)]


def held_and_lent(play: LimitPlay) -> list[Program]:
    return [play.party(0), play.child(0, 1), play.declaring(TWO), play.party(2)]


def held_and_lent_and_wanted(play: LimitPlay) -> list[Program]:
    return [play.party(0), play.child(0, 1), play.child(0, 2), play.declaring(ONE), play.party(3)]


def taken_over_and_over(play: LimitPlay) -> list[Program]:
    once = play.party(0)
    return [lambda: (once(), once(), once())[0], play.declaring(ONE), play.party(1, timeout=0)]


def left_by_hand(play: LimitPlay) -> list[Program]:
    return [play.party(0, timeout=0), play.declaring(TWO), play.party(1, timeout=1), play.party(2)]


def held_back(play: LimitPlay) -> list[Program]:
    """The first to say that the API wants a pause makes it a limit."""
    return [play.party(0, slotted=lambda slot: slot.throttled(retry_after=5)), play.party(1), play.party(2, timeout=9)]


def held_back_for_a_moment(play: LimitPlay) -> list[Program]:
    """The pause is over at once: the name becomes a lock again while others come and go."""
    once = play.party(0, slotted=lambda slot: slot.throttled(retry_after=0))
    other = play.party(1)
    return [lambda: (once(), once())[0], lambda: (other(), other())[0], play.party(2, timeout=1)]


def held_back_and_lent(play: LimitPlay) -> list[Program]:
    holding_back = play.party(0, slotted=lambda slot: slot.throttled(retry_after=0))
    return [holding_back, play.child(0, 1), play.party(2), play.party(3, timeout=0)]


def more_and_less(play: LimitPlay) -> list[Program]:
    return [play.party(0), play.party(1), play.party(2), play.declaring(ONE, THREE, TWO)]


def more_while_they_wait(play: LimitPlay) -> list[Program]:
    return [
        play.party(0),
        play.party(1),
        play.party(2, timeout=1),
        play.after_waiting(1, play.declaring(ONE, TWO)),
        play.child(0, 3),
    ]


CHANGES = [
    held_the_quick_way,
    held_the_quick_way_and_again,
    held_and_wanted,
    held_and_lent,
    held_and_lent_and_wanted,
    taken_over_and_over,
    left_by_hand,
    held_back,
    held_back_for_a_moment,
    held_back_and_lent,
    more_and_less,
    more_while_they_wait,
]


@pytest.mark.parametrize("opcodes", [frozenset(), SLOW], ids=["accesses", "opcodes"])
@pytest.mark.parametrize("scene", CHANGES)
@pytest.mark.time_limit(900)
def test_R1_no_schedule_of_a_few_parties_breaks_a_change(scene: Scene, opcodes: frozenset[str]) -> None:
    """A lock becomes a limit, a limit another one, and one that was held back a lock again."""
    explore(lambda plan: run_scene(scene, plan, None, opcodes), 3, LIMIT)


# rates: a sleep until the next time ends when its actor is let go on, and then so much time has passed

RATE = Limit(concurrency=2, requests=2, tokens=10, per=10.0, margin=1.0)


class Rated(LimitPlay):
    """It notes when the blocks were entered, by the table's clock."""

    def __init__(self, stage: Stage) -> None:
        super().__init__(stage, RATE)
        self.slots: list[tuple[Slot, Any]] = []

    def lock_of(self, tokens: float) -> Lock:
        return Lock(self.table, "a", How(tokens=tokens))

    def noting(self, used: Optional[float] = None) -> Callable[[Slot], None]:
        def note(slot: Slot) -> None:
            self.slots.append((slot, slot.charges[-1]))
            if used is not None:
                slot.commit(tokens=used)

        return note

    def again_noted(self) -> None:
        with self.lock as slot:
            self.noting()(slot)

    def end(self, told: str) -> None:
        window = RATE.per + RATE.margin
        charges = sorted((charge for _, charge in self.slots), key=lambda charge: charge.at)
        for first in charges:
            within = [charge for charge in charges if first.at <= charge.at < first.at + window - 1e-6]
            assert len(within) <= (RATE.requests or 0), f"{told}: {[charge.at for charge in within]}"
            assert sum(charge.tokens for charge in within) <= (RATE.tokens or 0), told
        super().end(told)


def rated_strangers(play: Rated) -> list[Program]:
    return [play.party(me, slotted=play.noting()) for me in range(4)]


def rated_tokens(play: Rated) -> list[Program]:
    return [play.party(me, lock=play.lock_of(tokens), slotted=play.noting()) for me, tokens in enumerate([6, 9, 1, 4])]


def rated_commits(play: Rated) -> list[Program]:
    return [play.party(me, lock=play.lock_of(8), slotted=play.noting(2)) for me in range(4)]


def rated_borrowers(play: Rated) -> list[Program]:
    return [
        play.party(0, slotted=play.noting(), body=play.again_noted),
        play.child(0, 1, slotted=play.noting()),
        play.child(0, 2, slotted=play.noting()),
        play.party(3, slotted=play.noting()),
    ]


def rated_with_little_time(play: Rated) -> list[Program]:
    return [
        play.party(0, slotted=play.noting()),
        play.party(1, slotted=play.noting()),
        play.party(2, timeout=5),
        play.party(3, slotted=play.noting()),
        play.party(4, timeout=0),
    ]


def rated_groups(play: Rated) -> list[Program]:
    """Who has the one and not the other yet has not entered: its window begins when it has both."""
    both = LockGroup(play.table, ("a", "b"))

    def group(me: int) -> Program:
        def program() -> None:
            with both as slots:
                play.noting()(slots[0])
                play.stage.point()

        return program

    return [group(0), group(1), play.party(2, lock=both, timeout=1), play.party(3, slotted=play.noting())]


def rated_and_held_back(play: Rated) -> list[Program]:
    def hold_back(slot: Slot) -> None:
        play.noting()(slot)
        slot.throttled(retry_after=30)

    return [play.party(0, slotted=hold_back), *(play.party(me, slotted=play.noting()) for me in range(1, 4))]


RATED = [
    rated_strangers,
    rated_tokens,
    rated_commits,
    rated_borrowers,
    rated_with_little_time,
    rated_groups,
    rated_and_held_back,
]


@pytest.mark.parametrize("scene", RATED)
@pytest.mark.time_limit(900)
def test_R2_no_schedule_of_a_few_parties_fills_a_window_too_much(scene: Scene) -> None:
    """Whoever is put off between its turn and its block, and for however long."""
    explore(lambda plan: perform(Rated(Stage(plan)), scene), 3, LIMIT)


# -- many at once -------------------------------------------------------------------------------------------


class WakingClock(Clock):
    """Knows when each thread has come out of its last sleep."""

    def __init__(self) -> None:
        super().__init__()
        self.awake = threading.local()

    def wait(self, lock: Any, timeout: Optional[float]) -> bool:
        try:
            return super().wait(lock, timeout)
        finally:
            self.awake.since = time.monotonic()


API = Limit(concurrency=3, requests=30, tokens=200, per=0.1, margin=0.1)
FEW = Limit(concurrency=2)
ALLOWED = {"api": 3, "few": 2}
PATIENCE = 0.02


class Callers(Crowd):
    """They call an API; who is at it, and when each entered."""

    names = ("api", "api", "few")
    patience = PATIENCE
    least = 30

    def __init__(self, span: float) -> None:
        self.clock = WakingClock()
        super().__init__(Coordinator(name="test", clock=self.clock), span)
        self.coord.limit("api", concurrency=3, requests=30, tokens=200, per=0.1, margin=0.1)
        self.coord.limit("few", concurrency=2)
        self.mutex = threading.Lock()
        self.busy = {"api": 0, "few": 0}
        self.peak = {"api": 0, "few": 0}
        self.entered: list[tuple[Any, float]] = []  # each charge, and when its block was seen to be entered

    def visits(self) -> int:
        return len(self.entered)

    @contextlib.contextmanager
    def call(self, dice: random.Random, tokens: float, slot: Slot, *others: Slot) -> Iterator[None]:
        """What is done in a block: it may fail, and may tell what it has used, never more than it said."""
        for one in (slot, *others):
            with self.mutex:
                self.busy[one.name] += 1
                self.peak[one.name] = max(self.peak[one.name], self.busy[one.name])
        try:
            yield
            if dice.random() < 0.3:
                slot.commit(tokens=tokens * dice.random())
            if dice.random() < 0.2:
                raise Refused
        finally:
            for one in (slot, *others):
                with self.mutex:
                    self.busy[one.name] -= 1

    def note(self, slot: Slot, since: float) -> None:
        """The block has just been entered."""
        now = time.monotonic()
        if slot.name == "api":
            charge = slot.charges[-1]
            assert since <= charge.at <= now
            self.entered.append((charge, now))

    def note_here(self, slot: Slot, since: float) -> None:
        """The same, on a thread: its window begins when it is awake, not when it was its turn."""
        self.note(slot, max(since, getattr(self.clock.awake, "since", 0.0)))

    def check(self) -> None:
        window = API.per + API.margin
        by_charge = sorted((charge.at, charge.tokens) for charge, _ in self.entered)
        self.check_windows(by_charge, window - 1e-6)
        seen = sorted((now, charge.tokens) for charge, now in self.entered if now - charge.at < API.margin)
        self.check_windows(seen, API.per)  # what is later than the margin isn't covered
        for name, allowed in ALLOWED.items():
            assert 0 < self.peak[name] <= allowed  # how many meet is luck; that all places are given, test_limits shows

    @staticmethod
    def check_windows(entries: list[tuple[float, float]], window: float) -> None:
        last = 0
        for first, (begin, _) in enumerate(entries):
            while last < len(entries) and entries[last][0] < begin + window:
                last += 1
            assert last - first <= (API.requests or 0)
            assert sum(tokens for _, tokens in entries[first:last]) <= (API.tokens or 0) + 1e-6

    def one_thread_visit(self, dice: random.Random, name: str) -> None:
        tokens, kind, since = dice.choice([0, 1, 5, 12.5, 0.1]), dice.randrange(6), time.monotonic()
        lock = self.coord.lock(name, tokens=tokens)
        if kind == 0:
            if lock.acquire(timeout=dice.choice([0, dice.random() * PATIENCE])):
                try:
                    slot = self.coord.slot(name)
                    self.note_here(slot, since)
                    with self.call(dice, tokens, slot):
                        time.sleep(0)
                finally:
                    lock.release()
        elif kind == 1:
            with self.coord.lock("few", "api", tokens=tokens, timeout=dice.random() * PATIENCE) as slots:
                for slot in slots:
                    self.note_here(slot, since)
                with self.call(dice, tokens, *slots):
                    time.sleep(0)
        elif kind == 2:  # children in threads; they may outlive the block
            children = []
            try:
                with lock as slot:
                    self.note_here(slot, since)
                    visits = (self.borrower(copy_context(), random.Random(dice.random()), name) for _ in range(2))
                    children = start_all(*visits)
                    if dice.random() < 0.5:
                        join_all(children)
            finally:
                join_all(children)
        elif kind == 3:
            with lock as slot:
                self.note_here(slot, since)
                since = time.monotonic()
                with lock as again:
                    assert again is slot
                    self.note_here(slot, since)
                    with self.call(dice, tokens, slot):
                        time.sleep(0)
        else:
            self.visit_now(dice, name, tokens)

    def visit_now(self, dice: random.Random, name: str, tokens: float) -> None:
        since = time.monotonic()
        with self.coord.lock(name, tokens=tokens, lend=dice.random() < 0.8) as slot:
            self.note_here(slot, since)
            with self.call(dice, tokens, slot):
                time.sleep(0)

    def borrower(self, context: Context, dice: random.Random, name: str) -> Callable[[], None]:
        def visit() -> None:
            with contextlib.suppress(Refused):
                self.visit_now(dice, name, 1)

        return self.watched(lambda: context.run(visit))

    async def one_task_visit(self, dice: random.Random, name: str) -> None:
        tokens, kind, since = dice.choice([0, 1, 5, 12.5, 0.1]), dice.randrange(6), time.monotonic()
        lock = self.coord.lock(name, tokens=tokens)
        if kind == 0:
            if await lock.acquire_async(timeout=dice.choice([0, dice.random() * PATIENCE])):
                try:
                    slot = self.coord.slot(name)
                    self.note(slot, since)
                    with self.call(dice, tokens, slot):
                        await asyncio.sleep(0)
                finally:
                    lock.release()
        elif kind == 1:
            async with self.coord.lock("few", "api", tokens=tokens, timeout=dice.random() * PATIENCE) as slots:
                for slot in slots:
                    self.note(slot, since)
                with self.call(dice, tokens, *slots):
                    await asyncio.sleep(0)
        elif kind == 2:
            async with lock as slot:
                self.note(slot, since)
                await asyncio.gather(*(self.visit(dice, name, 1) for _ in range(3)), return_exceptions=True)
        elif kind == 3:
            async with lock as slot:
                self.note(slot, since)
                await asyncio.to_thread(self.borrower(copy_context(), random.Random(dice.random()), name))
        else:
            await self.visit(dice, name, tokens)

    async def visit(self, dice: random.Random, name: str, tokens: float) -> None:
        since = time.monotonic()
        async with self.coord.lock(name, tokens=tokens) as slot:
            self.note(slot, since)
            with self.call(dice, tokens, slot):
                await asyncio.sleep(0)


@pytest.mark.parametrize("hostile", [eager_switching, yielding_at_opcodes])
@pytest.mark.time_limit(900)
def test_R2_threads_and_tasks_of_two_loops_never_call_too_often(hostile: Any) -> None:
    """Timeouts, cancellations, failures, groups, borrowers: no window is too full, nobody hangs, nothing is left."""
    with hostile():
        crowd = Callers(SPAN)
        crowd.play()
    crowd.check()
    check_nothing_left(crowd.coord._table)
    eventually(lambda: all(info.requests_used == 0 and info.tokens_used == 0 for info in crowd.coord.snapshot().limits))
    crowd.coord.close()
