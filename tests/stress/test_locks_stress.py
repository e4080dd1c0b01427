"""The lock table under the schedules of a few parties, and under many threads, tasks and loops at once."""

from __future__ import annotations

import asyncio
import random
import threading
import time
from collections.abc import Iterator
from contextvars import Context, copy_context
from typing import Any, Callable

import pytest
from plays import SCENES, SECONDS, Crowd, Play, Program, Scene, perform
from support import (
    Stage,
    StageDict,
    eager_switching,
    explore,
    join_all,
    run_script,
    start_all,
    yielding_at_opcodes,
)

from agentdiff import Coordinator
from agentdiff.locks import Lock

LIMIT = int(SECONDS * 60) or 300
SPAN = SECONDS or 1.5


# -- every schedule -----------------------------------------------------------------------------------------


class Entries(StageDict):
    """Tells a holder that comes to leave what it would have told it before: that nobody is there."""

    def __init__(self, stage: Stage) -> None:
        super().__init__(stage)
        self.looked_before: set[int] = set()

    def __len__(self) -> int:
        if threading.get_ident() in self.looked_before:
            self.looked_before.remove(threading.get_ident())
            return 0
        return super().__len__()


class LockPlay(Play):
    """Parties around a lock, with a holder that leaves the quick way while others come."""

    entries = Entries

    def __init__(self, stage: Stage) -> None:
        super().__init__(stage)
        self.going = False

    def late(self, waiting: int) -> Program:
        """Party 0: it looked for others before they came, and leaves when 1 is inside and so many stand in line."""

        def stay() -> None:
            self.stage.point(lambda: self.is_lent(waiting))
            self.table.entries.looked_before.add(threading.get_ident())  # type: ignore[attr-defined]
            self.going = True

        return self.party(0, stay)

    def is_lent(self, waiting: int) -> bool:
        entry = dict.get(self.table.entries, "a")
        return self.going or (1 in self.context and (not waiting or (entry is not None and len(entry.line) >= waiting)))

    def stay(self) -> None:
        """What 1 does inside."""
        self.stage.point(lambda: self.going)

    def after(self, waiting: int, program: Program) -> Program:
        """It begins when 1 is inside and so many stand in line."""

        def begin() -> None:
            self.stage.point(lambda: self.is_lent(waiting))
            program()

        return begin

    def end(self, told: str) -> None:
        left = [*dict(self.table.slots), *dict(self.table.entries)]
        assert not left, f"{told}: left {left}"


def borrower_and_two_strangers(play: LockPlay) -> list[Program]:
    return [play.party(0), play.child(0, 1), play.party(2), play.party(3)]


def hand_over_hand(play: LockPlay) -> list[Program]:
    other = Lock(play.table, "b")

    def program() -> None:
        other.acquire()
        play.party(0, other.release)()

    return [program, play.child(0, 1), play.child(0, 2)]


def late_with_a_newcomer(play: LockPlay) -> list[Program]:
    return [play.late(0), play.child(0, 1, body=play.stay), play.after(0, play.party(2))]


def late_with_one_who_tries(play: LockPlay) -> list[Program]:
    return [play.late(0), play.child(0, 1, body=play.stay), play.after(0, play.party(2, timeout=0))]


def late_with_one_in_line(play: LockPlay) -> list[Program]:
    return [
        play.late(1),
        play.child(0, 1, body=play.stay),
        play.after(0, play.party(2)),
        play.after(1, play.party(3, timeout=0)),
    ]


def late_with_a_sibling_in_line(play: LockPlay) -> list[Program]:
    return [play.late(1), play.child(0, 1, body=play.stay), play.after(0, play.child(0, 2))]


LOCK_SCENES = [
    *SCENES,
    borrower_and_two_strangers,
    hand_over_hand,
    late_with_a_newcomer,
    late_with_one_who_tries,
    late_with_one_in_line,
    late_with_a_sibling_in_line,
]
OPCODES = frozenset({"enter", "live", "leave", "_wait_of", "wait_of", "hops_to", "serve", "place", "inside", "_leave"})


def run_scene(scene: Scene, plan: dict[int, int], opcodes: frozenset[str]) -> Stage:
    return perform(LockPlay(Stage(plan, opcodes)), scene)


@pytest.mark.parametrize("scene", LOCK_SCENES)
@pytest.mark.time_limit(900)
def test_L1_no_schedule_of_a_few_parties_breaks_the_table(scene: Scene) -> None:
    """However they meet at the two dicts: no two strangers inside, nobody waits for ever, nothing is left."""
    explore(lambda plan: run_scene(scene, plan, frozenset()), 3, LIMIT)


@pytest.mark.parametrize("scene", LOCK_SCENES)
@pytest.mark.time_limit(900)
def test_L1_no_schedule_within_the_hot_functions_breaks_the_table(scene: Scene) -> None:
    """The same, changing over at any opcode of the functions that run without the mutex or meet those that do."""
    explore(lambda plan: run_scene(scene, plan, OPCODES), 2, LIMIT // 5)


@pytest.mark.time_limit(900)
def test_L2_children_of_one_holder_may_enter_at_once_while_it_leaves_another_lock() -> None:
    """Two children walk the same chain of their parent's slots and shorten it, at any opcode."""
    explore(lambda plan: run_scene(hand_over_hand, plan, frozenset({"live"})), 2, LIMIT * 2)


def holder_of_the_next_lock_leaves(play: LockPlay) -> list[Program]:
    """0 holds "a" and waits for "b"; while 1 comes to wait for "a", and looks for a ring, 2 leaves "b"."""
    b = Lock(play.table, "b")
    there: list[int] = []

    def want_b() -> None:
        play.stage.point(lambda: bool(there))
        b.acquire()
        b.release()

    def hold_b() -> None:
        b.__enter__()
        there.append(2)
        play.stage.point(lambda: bool(play.table.book.waiting))
        there.append(2)
        play.table.entries.looked_before.add(threading.get_ident())  # type: ignore[attr-defined]
        b.__exit__(None, None, None)

    def want_a() -> None:
        play.stage.point(lambda: bool(play.table.book.waiting) or len(there) > 1)
        play.party(1)()

    return [play.party(0, want_b), want_a, hold_b]


@pytest.mark.time_limit(900)
def test_L5_a_holder_may_leave_while_a_ring_is_looked_for() -> None:
    """At any opcode of the search a holder that it passes may be gone."""
    opcodes = frozenset({"_wait_of", "wait_of", "hops_to", "leave"})
    explore(lambda plan: run_scene(holder_of_the_next_lock_leaves, plan, opcodes), 2, LIMIT)


# -- many at once -------------------------------------------------------------------------------------------


class Counting(Crowd):
    """They count up what a lock guards, by a read, a pause and a write."""

    def __init__(self, coord: Coordinator, span: float) -> None:
        super().__init__(coord, span)
        self.count = {"a": 0, "b": 0}
        self.expected = {"a": 0, "b": 0}
        self.mutex = threading.Lock()
        self.entered = 0

    def visits(self) -> int:
        return self.entered

    def step(self, *names: str) -> Iterator[None]:
        """Count up, with a pause in the middle."""
        before = [self.count[name] for name in names]
        yield
        for name, value in zip(names, before):
            self.count[name] = value + 1
        with self.mutex:
            self.entered += 1
            for name in names:
                self.expected[name] += 1

    def step_now(self, *names: str) -> None:
        for _ in self.step(*names):
            time.sleep(0)

    async def step_async(self, *names: str) -> None:
        for _ in self.step(*names):
            await asyncio.sleep(0)

    def one_thread_visit(self, dice: random.Random, name: str) -> None:
        lock, kind = self.coord.lock(name), dice.randrange(6)
        if kind == 0:
            if lock.acquire(timeout=dice.choice([0, dice.random() * 0.002])):
                try:
                    self.step_now(name)
                finally:
                    lock.release()
        elif kind == 1:
            with self.coord.lock("b", "a", timeout=dice.random() * 0.005):
                self.step_now("a", "b")
        elif kind == 2:  # children in threads, one at a time; they may outlive the block
            with lock:
                children = start_all(*(self.borrower(copy_context(), name) for _ in range(2)))
                if dice.random() < 0.5:
                    join_all(children)
            join_all(children)
        elif kind == 3:
            with self.coord.lock(name, lend=False), lock:
                self.step_now(name)
        else:
            with lock:
                self.step_now(name)

    def borrower(self, context: Context, name: str) -> Callable[[], None]:
        def visit() -> None:
            with self.coord.lock(name):
                self.step_now(name)

        return self.watched(lambda: context.run(visit))

    async def one_task_visit(self, dice: random.Random, name: str) -> None:
        lock, kind = self.coord.lock(name), dice.randrange(6)
        if kind == 0:
            if await lock.acquire_async(timeout=dice.choice([0, dice.random() * 0.002])):
                try:
                    await self.step_async(name)
                finally:
                    lock.release()
        elif kind == 1:
            async with self.coord.lock("b", "a", timeout=dice.random() * 0.005):
                await self.step_async("a", "b")
        elif kind == 2:
            async with lock:
                await asyncio.gather(*(self.visit(name) for _ in range(3)))
        elif kind == 3:
            async with lock:
                await asyncio.to_thread(self.borrower(copy_context(), name))
        else:
            await self.visit(name)

    async def visit(self, name: str) -> None:
        async with self.coord.lock(name):
            await self.step_async(name)


@pytest.mark.parametrize("hostile", [eager_switching, yielding_at_opcodes])
@pytest.mark.time_limit(900)
def test_L1_threads_and_tasks_of_two_loops_lose_no_count(hostile: Any, coord: Coordinator) -> None:
    """Timeouts, cancellations, groups, borrowers: nobody is in another's way, nobody hangs, nothing is left."""
    with hostile():
        crowd = Counting(coord, SPAN)
        crowd.play()
    assert crowd.count == crowd.expected
    assert coord.snapshot().locks == ()
    assert not coord._table.slots
    assert not coord._table.entries


LOOKING = """
    import faulthandler, sys, threading, time
    from agentdiff import Coordinator

    faulthandler.dump_traceback_later(20, exit=True)
    sys.setswitchinterval(1e-5)

    class Garbage:
        def __init__(self):
            self.me = self

        def __del__(self):
            for _ in range(300):
                pass

    def start_threads():
        while time.monotonic() < end:
            thread = threading.Thread(target=int)
            thread.start()
            thread.join()

    end = time.monotonic() + 3
    for _ in range(2):
        threading.Thread(target=start_threads, daemon=True).start()
    with Coordinator() as coord:
        with coord.lock("a"):
            while time.monotonic() < end:
                [Garbage() for _ in range(30)]
                coord.snapshot()
    print("looked")
"""


def test_L11_looking_does_not_hang_while_threads_start_and_garbage_is_collected() -> None:
    """On CPython 3.11 `sys._current_frames` can stop the whole process if a collection begins within (gh-106883)."""
    result = run_script(LOOKING)
    assert result.stdout.strip() == "looked", result.stderr[-3000:]
