"""Plays for a stage: a few parties around the name "a", a lock or a limit; and crowds of threads and tasks."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import os
import random
import time
from collections.abc import Iterator
from contextvars import Context, copy_context
from typing import Any, Callable, Optional

from support import Stage, StageClock, StageDict, StageMutex, join_all, start_all

from agentdiff import CoordinationTimeoutError, Coordinator, Slot
from agentdiff._places import How
from agentdiff._table import LockTable
from agentdiff.locks import Lock, LockGroup

SECONDS = float(os.environ.get("AGENTDIFF_STRESS_SECONDS", "0"))

Program = Callable[[], None]
Scene = Callable[[Any], list[Program]]


class Play:
    """Parties around the name "a". It notes whenever more are inside than may be, borrowers not counted."""

    entries: type[StageDict] = StageDict

    def __init__(self, stage: Stage) -> None:
        self.stage = stage
        storage = iter([StageDict(stage), self.entries(stage)])
        self.table = LockTable(StageClock(stage), slow_after=None, storage=lambda: next(storage))
        self.table._mutex = StageMutex(stage)
        self.lock = Lock(self.table, "a")
        self.allowed = 1
        self.inside: list[int] = []
        self.wrong: list[str] = []
        self.parent: dict[int, int] = {}
        self.context: dict[int, Context] = {}

    def party(
        self,
        me: int,
        body: Program = lambda: None,
        lock: Any = None,
        timeout: Optional[float] = None,
        slotted: Callable[[Slot], None] = lambda slot: None,
    ) -> Program:
        """Enters, is inside for a while, leaves; whoever it starts there has its context."""

        def program() -> None:
            handle = lock or self.lock
            if timeout is None:
                slotted(handle.__enter__())
            elif not handle.acquire(timeout=timeout):
                return
            self.inside.append(me)
            self.look()
            self.context[me] = copy_context()
            body()
            self.stage.point()
            self.inside.remove(me)
            if timeout is None:
                handle.__exit__(None, None, None)
            else:
                handle.release()

        return program

    def look(self) -> None:
        """So many of whom none can have borrowed from another need a place each."""
        for some in itertools.combinations(self.inside, self.allowed + 1):
            if not any(self.related(one, other) for one, other in itertools.combinations(some, 2)):
                self.wrong.append(f"{some} are inside, and {self.allowed} may be")

    def child(self, parent: int, me: int, **how: Any) -> Program:
        """A party that `parent` starts while it is inside."""
        self.parent[me] = parent
        inner = self.party(me, **how)

        def program() -> None:
            self.stage.point(lambda: parent in self.context)
            self.context[parent].copy().run(inner)

        return program

    def related(self, one: int, other: int) -> bool:
        return one in self.line_of(other) or other in self.line_of(one)

    def line_of(self, one: int) -> Iterator[int]:
        yield one
        if one in self.parent:
            yield from self.line_of(self.parent[one])

    def again(self) -> None:
        self.lock.__enter__()
        self.stage.point()
        self.lock.__exit__(None, None, None)

    def end(self, told: str) -> None:
        """All have left: what must be, and what may be left?"""
        raise NotImplementedError


def perform(play: Play, scene: Scene) -> Stage:
    """Play it to its end: nobody was wrong, nobody is stuck."""
    stage = play.stage
    stage.play(*scene(play))
    told = f"schedule {stage.plan}: {play.wrong} {stage.errors}"
    assert not play.wrong, told
    assert not stage.errors, told
    assert not stage.stuck, f"{told}: nobody can go on"
    play.end(told)
    return stage


# -- scenes that are the same for both ------------------------------------------------------------------------


def strangers(play: Play) -> list[Program]:
    return [play.party(0), play.party(1), play.party(2), play.party(3)]


def one_borrower(play: Play) -> list[Program]:
    return [play.party(0), play.child(0, 1), play.party(2)]


def siblings(play: Play) -> list[Program]:
    return [play.party(0), play.child(0, 1), play.child(0, 2), play.party(3)]


def grandchild(play: Play) -> list[Program]:
    return [play.party(0), play.child(0, 1), play.child(1, 2), play.child(0, 3), play.party(4)]


def time_runs_out(play: Play) -> list[Program]:
    return [play.party(0), play.child(0, 1, timeout=1), play.party(2, timeout=1), play.party(3)]


def trying_once(play: Play) -> list[Program]:
    return [play.party(0), play.child(0, 1, timeout=0), play.party(2, timeout=0), play.party(3)]


def over_and_over(play: Play) -> list[Program]:
    def twice(me: int) -> Program:
        once = play.party(me)
        return lambda: (once(), once())[0]

    return [twice(0), twice(1), play.party(2, timeout=1)]


def entering_again(play: Play) -> list[Program]:
    return [play.party(0, play.again), play.child(0, 1, body=play.again), play.child(0, 2, timeout=1), play.party(3)]


def not_lending(play: Play) -> list[Program]:
    selfish = Lock(play.table, "a", How(lend=False))
    return [play.party(0), play.child(0, 1, lock=selfish), play.party(2, lock=selfish), play.party(3)]


def groups(play: Play) -> list[Program]:
    ab, ba = LockGroup(play.table, ("a", "b")), LockGroup(play.table, ("b", "a"))
    return [
        play.party(0, lock=ab, timeout=9),
        play.party(1, lock=ba, timeout=9),
        play.party(2, lock=ab, timeout=1),
        play.party(3),
    ]


SCENES = [
    strangers,
    one_borrower,
    siblings,
    grandchild,
    time_runs_out,
    trying_once,
    over_and_over,
    entering_again,
    not_lending,
    groups,
]


# -- many at once ---------------------------------------------------------------------------------------------


class Refused(Exception):
    """The call within the block has failed."""


class Crowd:
    """Threads and tasks of two loops that come and go for a while; tasks are cancelled at any time."""

    names = ("a", "b")
    patience = 0.004  # after which a task may be cancelled, at the most
    least = 100  # so many are to enter, however slow the machine is

    def __init__(self, coord: Coordinator, span: float) -> None:
        self.coord = coord
        self.span = span
        self.end = time.monotonic() + span
        self.errors: list[BaseException] = []

    def visits(self) -> int:
        """How many have entered."""
        raise NotImplementedError

    def one_thread_visit(self, dice: random.Random, name: str) -> None:
        raise NotImplementedError

    async def one_task_visit(self, dice: random.Random, name: str) -> None:
        raise NotImplementedError

    def play(self) -> None:
        visits = [lambda seed=seed: self._by_threads(seed) for seed in range(3)]
        visits += [lambda seed=seed: asyncio.run(self._by_tasks(seed)) for seed in range(2)]
        join_all(start_all(*map(self.watched, visits)), self.span + 60)
        assert not self.errors, self.errors

    def watched(self, work: Callable[[], Any]) -> Program:
        def run() -> None:
            try:
                work()
            except BaseException as error:
                self.errors.append(error)

        return run

    def _goes_on(self) -> bool:
        return (time.monotonic() < self.end or self.visits() <= self.least) and not self.errors

    def _by_threads(self, seed: int) -> None:
        dice = random.Random(seed)
        while self._goes_on():
            with contextlib.suppress(Refused, CoordinationTimeoutError):
                self.one_thread_visit(dice, dice.choice(self.names))

    async def _by_tasks(self, seed: int) -> None:
        await asyncio.gather(*(self._one_task(random.Random(seed * 100 + number)) for number in range(4)))

    async def _one_task(self, dice: random.Random) -> None:
        loop = asyncio.get_running_loop()
        while self._goes_on():
            task = asyncio.ensure_future(self.one_task_visit(dice, dice.choice(self.names)))
            if dice.random() < 0.4:
                loop.call_later(dice.random() * self.patience, task.cancel)
            await asyncio.wait([task])
            if not task.cancelled():
                with contextlib.suppress(Refused, CoordinationTimeoutError):
                    task.result()
