"""Random lock programs against a small model of the table (L1 to L8).

The table's decisions are made without blocking, so that a program of many owners runs on one thread here: an owner
is an object, its context a `Context` of its own, and it sleeps by being in line. The model knows nothing of graphs:
whether a wait can end it finds out by letting everybody who can run release all that they hold, again and again.
"""

from __future__ import annotations

import copy
import threading
from asyncio import CancelledError
from contextvars import Context
from typing import Any, Optional

import attrs
import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)

from agentdiff import DeadlockError, NotHeldError, Slot
from agentdiff._owner import HOLDS, ThreadOwner
from agentdiff._places import Door
from agentdiff._table import LockTable
from agentdiff.testing import FakeClock

NAMES = ("a", "b", "c")
OFTEN_A = ("a", "a", "a", "b", "b", "c")


# -- the model ------------------------------------------------------------------------------------------------


@attrs.define
class Hold:
    owner: int
    number: int
    depth: int = 1


@attrs.define
class Wait:
    owner: int
    ancestors: tuple[int, ...]  # numbers of the holds that it may borrow from, the nearest first


@attrs.define
class Model:
    inside: dict[str, list[Hold]] = attrs.field(factory=lambda: {name: [] for name in NAMES})
    line: dict[str, list[Wait]] = attrs.field(factory=lambda: {name: [] for name in NAMES})
    holds: int = 0

    def waits(self, owner: int) -> Optional[str]:
        return next((name for name in NAMES for wait in self.line[name] if wait.owner == owner), None)

    def mine(self, owner: int, name: str) -> Optional[Hold]:
        return next((hold for hold in self.inside[name] if hold.owner == owner), None)

    def enter(self, owner: int, name: str) -> Hold:
        self.holds += 1
        hold = Hold(owner, self.holds)
        self.inside[name].append(hold)
        return hold

    def may_enter(self, name: str, ancestors: tuple[int, ...]) -> bool:
        numbers = [hold.number for hold in self.inside[name]]
        if not numbers:
            return True
        nearest = next((number for number in ancestors if number in numbers), None)
        return nearest == numbers[-1]

    def serve(self) -> list[tuple[int, str, Hold]]:
        """Who comes in now: the first in line to a free name, borrowers to the place that their lender has free."""
        served = []
        for name in NAMES:
            going = True
            while going:
                going = False
                for wait in self.line[name]:
                    first = wait is self.line[name][0]
                    if self.may_enter(name, wait.ancestors) and (self.inside[name] or first):
                        self.line[name].remove(wait)
                        served.append((wait.owner, name, self.enter(wait.owner, name)))
                        going = True
                        break
        return served

    def can_ever_end(self, owner: int) -> bool:
        """Let everybody who can run release everything, for as long as that changes anything."""
        world = copy.deepcopy(self)
        changed = True
        while changed:
            changed = False
            asleep = {wait.owner for line in world.line.values() for wait in line}
            for name in NAMES:
                stay = [hold for hold in world.inside[name] if hold.owner in asleep]
                changed = changed or len(stay) < len(world.inside[name])
                world.inside[name] = stay
            changed = bool(world.serve()) or changed
        return world.waits(owner) is None


# -- the program ----------------------------------------------------------------------------------------------


class Bell:
    loop = None

    def __init__(self) -> None:
        self.rung = False

    def ring(self) -> bool:
        self.rung = True
        return True


@attrs.define(eq=False)
class Party:
    """An owner with its context; `held` is what it has entered, in order; `known` what its context knows of holds."""

    number: int
    me: ThreadOwner
    context: Context
    known: list[int]
    slots: dict[int, Slot] = attrs.field(factory=dict)
    waiter: Any = None
    bell: Any = None


class LockPrograms(RuleBasedStateMachine):
    def __init__(self) -> None:
        super().__init__()
        self.clock = FakeClock()
        self.table = LockTable(self.clock)
        self.enter = {name: self.table.ways(Door(self.table, name))[0] for name in NAMES}
        self.model = Model()
        self.parties: list[Party] = []
        for _ in range(2):
            self.add_party(Context(), [])

    def add_party(self, context: Context, known: list[int]) -> None:
        me = ThreadOwner(threading.current_thread())
        self.parties.append(Party(len(self.parties), me, context, known))

    def live(self, party: Party) -> tuple[int, ...]:
        return tuple(reversed(party.known))

    def pick(self, number: int, awake: Optional[bool] = None) -> Party:
        fitting = [p for p in self.parties if awake is None or (p.waiter is None) == awake]
        return fitting[number % len(fitting)]

    def somebody(self, awake: bool) -> bool:
        return any((p.waiter is None) == awake for p in self.parties)

    @precondition(lambda self: self.somebody(awake=True))
    @rule(number=st.integers(0, 9), name=st.sampled_from(OFTEN_A), patient=st.booleans())
    def acquire(self, number: int, name: str, patient: bool) -> None:
        party = self.pick(number, awake=True)
        bell = Bell()
        expected: Any
        hold = self.model.mine(party.number, name)
        if hold is not None:
            hold.depth += 1
            expected = "in"
        elif self.model.may_enter(name, self.live(party)) and (self.model.inside[name] or not self.model.line[name]):
            party.known.append(self.model.enter(party.number, name).number)
            expected = "in"
        elif not patient:
            expected = "no"
        else:
            wait = Wait(party.number, self.live(party))
            self.model.line[name].append(wait)
            expected = "waits"
            if not self.model.can_ever_end(party.number):
                self.model.line[name].remove(wait)
                expected = "refused"
        waiter: Any = None

        def slowly(claim: Slot, me: Any) -> Any:
            nonlocal waiter
            waiter, slot = self.table._decide(claim, me, None, bell if patient else None)
            return slot

        try:
            got = party.context.run(self.enter[name], party.me, slowly)
        except DeadlockError:
            assert expected == "refused", expected
            return
        if got is not None:
            assert expected == "in", expected
        elif not patient:
            assert expected == "no", expected
        else:
            assert expected == "waits", expected
            party.waiter, party.bell = waiter, bell

    @precondition(lambda self: self.somebody(awake=True))
    @rule(number=st.integers(0, 9), name=st.sampled_from(OFTEN_A))
    def release(self, number: int, name: str) -> None:
        party = self.pick(number, awake=True)
        hold = self.model.mine(party.number, name)
        try:
            party.context.run(self.table.release, name, party.me)
            assert hold is not None
        except NotHeldError:
            assert hold is None
            return
        hold.depth -= 1
        if not hold.depth:
            self.model.inside[name].remove(hold)
        self.wake()

    def wake(self) -> None:
        """Whoever the model serves has been served, and nobody else; they go on."""
        for owner, _, hold in self.model.serve():
            party = self.parties[owner]
            assert party.waiter is not None
            assert party.waiter.served
            assert party.bell.rung
            assert party.context.run(self.table._wake_up, party.waiter) is party.waiter.claim
            party.known.append(hold.number)
            party.waiter = None
        assert not any(p.waiter is not None and p.waiter.served for p in self.parties)

    @precondition(lambda self: self.somebody(awake=False))
    @rule(number=st.integers(0, 9), by_cancel=st.booleans())
    def stop_waiting(self, number: int, by_cancel: bool) -> None:
        """A timeout, or a cancellation."""
        party = self.pick(number, awake=False)
        if by_cancel:
            self.table._give_up(party.waiter, CancelledError())
        else:
            assert party.context.run(self.table._wake_up, party.waiter) is None
        party.waiter = None
        for line in self.model.line.values():
            line[:] = [wait for wait in line if wait.owner != party.number]
        self.wake()

    @precondition(lambda self: self.holders() and len(self.parties) < 9)
    @rule(number=st.integers(0, 9), children=st.integers(1, 3))
    def start_others(self, number: int, children: int) -> None:
        """What is started copies the context, and may borrow what its starter holds now."""
        holders = self.holders()
        parent = holders[number % len(holders)]
        for _ in range(children):
            self.add_party(parent.context.copy(), list(parent.known))

    def holders(self) -> list[Party]:
        holding = {hold.owner for holds in self.model.inside.values() for hold in holds}
        return [party for party in self.parties if party.waiter is None and party.number in holding]

    @invariant()
    def the_table_is_as_the_model_says(self) -> None:
        for name in NAMES:
            entry = self.table.entries.get(name)
            root = self.table.slots.get(name)
            inside = ([root] if root is not None else []) + (entry.chain if entry is not None else [])
            assert [slot.owner for slot in inside] == [self.parties[h.owner].me for h in self.model.inside[name]]
            assert [slot.depth for slot in inside] == [hold.depth for hold in self.model.inside[name]]
            line = list(entry.line) if entry is not None else []
            assert [w.owner for w in line] == [self.parties[w.owner].me for w in self.model.line[name]]

    def teardown(self) -> None:
        """When everybody has left, nothing is left."""
        for party in self.parties:
            if party.waiter is not None:
                self.table._give_up(party.waiter, CancelledError())
        for name in NAMES:
            for hold in list(self.model.inside[name]):
                for _ in range(hold.depth):
                    self.table.release(name, self.parties[hold.owner].me)
        assert not self.table.slots
        assert not self.table.entries
        assert not self.table.book.waiting
        HOLDS.set(None)


@pytest.mark.time_limit(600)
def test_L5_random_programs_are_refused_exactly_when_they_can_never_end() -> None:
    """1,000 random programs of up to 11 owners: order, lending, depth, refusals and leftovers are the model's."""
    run_state_machine_as_test(
        LockPrograms,
        settings=settings(
            max_examples=1000, stateful_step_count=50, deadline=None, suppress_health_check=list(HealthCheck)
        ),
    )
