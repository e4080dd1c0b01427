"""Random interleavings of events, runs, times and cancellations against a small model of `all_of` (E13).

The model keeps a plain list of sets, and finds where an event belongs by looking through it.
"""

from __future__ import annotations

import contextlib
import itertools
from typing import Any, Optional

import attrs
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule, run_state_machine_as_test

from agentdiff import Subscription, all_of
from agentdiff.testing import FakeClock, InlineCoordinator

RUNS = (None, "r", "s")
NAMES = ("a", "b", "c")
WANTED = (("a", "b"), ("b", "c", "a"), ("c",), ("a", "c"))
MAX_JOINS = 5


@attrs.define(eq=False)
class Half:
    join: int
    run: Optional[str]
    since: float
    came: dict[str, int] = attrs.field(factory=dict)


class JoinsMachine(RuleBasedStateMachine):
    def __init__(self) -> None:
        super().__init__()
        self.clock = FakeClock()
        self.coord = InlineCoordinator(clock=self.clock, max_joins=MAX_JOINS)
        self.subs: dict[int, Subscription] = {}
        self.wanted: dict[int, tuple[tuple[str, ...], Optional[float], bool]] = {}
        self.halves: list[Half] = []  # the oldest first
        self.dropped = 0
        self.events = 0
        self.fired: list[Any] = []
        self.told: list[Any] = []
        self.should_fire: list[Any] = []
        self.should_tell: list[Any] = []
        self.coord.on("join_timeout", lambda data: self.told.append((data["join"], data["run"], data["came"])))

    def teardown(self) -> None:
        self.coord.close()

    @precondition(lambda self: len(self.subs) < 4)
    @rule(
        names=st.sampled_from(WANTED),
        timeout=st.sampled_from([None, 5.0, 8.0]),
        once=st.sampled_from([False] * 3 + [True]),
    )
    def subscribe(self, names: tuple[str, ...], timeout: Optional[float], once: bool) -> None:
        number = len(self.wanted)
        self.wanted[number] = (names, timeout, once)
        self.subs[number] = self.coord.on(
            all_of(*names), lambda data: self.fired.append((number, data)), timeout=timeout, once=once
        )

    @precondition(lambda self: self.subs)
    @rule(data=st.data())
    def cancel(self, data: Any) -> None:
        number = data.draw(st.sampled_from(sorted(self.subs)))
        self.subs[number].cancel()
        self.forget(number)

    @rule(name=st.sampled_from(NAMES), run=st.sampled_from(RUNS))
    def emit(self, name: str, run: Optional[str]) -> None:
        self.events += 1
        with self.coord.run(run) if run is not None else contextlib.nullcontext():
            self.coord.emit(name, self.events)
        for number in sorted(self.subs):
            if name in self.wanted[number][0]:
                self.put(number, run, name)

    def put(self, number: int, run: Optional[str], name: str) -> None:
        names, _, once = self.wanted[number]
        lacking = (half for half in self.halves if (half.join, half.run) == (number, run) and name not in half.came)
        half = next(lacking, None)
        if half is None:
            half = Half(number, run, self.clock.now)
            self.halves.append(half)
        half.came[name] = self.events
        if set(half.came) == set(names):
            self.halves.remove(half)
            self.should_fire.append((number, {name: half.came[name] for name in names}))
            if once:
                self.forget(number)
        elif len(self.halves) > MAX_JOINS:
            self.tell(self.halves[0])
            self.dropped += 1

    @rule(seconds=st.sampled_from([1.0, 4.0, 9.0]))
    def time_passes(self, seconds: float) -> None:
        self.clock.advance(seconds)
        self.coord._bus.joins._watch()
        over = []
        for half in self.halves:
            timeout = self.wanted[half.join][1]
            if timeout is not None and half.since + timeout <= self.clock.now:
                over.append((half.since + timeout, half))
        for _, half in sorted(over, key=lambda one: one[0]):
            self.tell(half)

    def tell(self, half: Half) -> None:
        self.halves.remove(half)
        self.should_tell.append((str(all_of(*self.wanted[half.join][0])), half.run, half.came))

    def forget(self, number: int) -> None:
        del self.subs[number]
        self.halves = [half for half in self.halves if half.join != number]

    @invariant()
    def what_fired_and_was_told_is_what_should_have(self) -> None:
        assert self.fired == self.should_fire
        order = lambda told: (told[0], str(told[1]), sorted(told[2].items()))  # noqa: E731
        assert sorted(self.told, key=order) == sorted(self.should_tell, key=order)  # some end at the same moment
        assert self.coord.snapshot().counts.joins_dropped == self.dropped

    @invariant()
    def the_snapshot_shows_what_is_half_full(self) -> None:
        shown = [(one.run, set(one.came), one.waiting_for) for one in self.coord.snapshot().joins]
        assert shown == [(half.run, set(half.came), self.clock.now - half.since) for half in self.halves]

    @invariant()
    def nothing_else_is_kept(self) -> None:
        joins = self.coord._bus.joins
        timed = sum(self.wanted[half.join][1] is not None for half in self.halves)
        assert sum(map(len, joins._timed.values())) == timed
        assert sum(len(line.sets) for lines in joins._lines.values() for line in lines.values()) == len(self.halves)


@pytest.mark.time_limit(600)
def test_E13_random_programs_agree_with_the_model() -> None:
    """Sets, their order, bounds, times, cancellations: after every step."""
    run_state_machine_as_test(  # type: ignore[no-untyped-call]
        JoinsMachine,
        settings=settings(
            max_examples=100, stateful_step_count=40, deadline=None, suppress_health_check=list(HealthCheck)
        ),
    )


@settings(max_examples=30, deadline=None, suppress_health_check=list(HealthCheck))
@given(st.data())
def test_E13_however_runs_are_interleaved_each_has_its_own_pairs(data: Any) -> None:
    """Fifty runs, two events of each of two names, in any order: two pairs for each run, in the order of coming."""
    coord = InlineCoordinator()
    pairs: list[Any] = []
    coord.on(all_of("a", "b"), pairs.append, pass_event=True)
    numbers = {(run, name): itertools.count() for run in range(50) for name in "ab"}
    for run, name in data.draw(st.permutations([(run, name) for run in range(50) for name in "aabb"])):
        with coord.run(f"r{run}"):
            coord.emit(name, next(numbers[run, name]))
    assert {pair["a"].run_id == pair["b"].run_id for pair in pairs} == {True}
    assert {pair["a"].data == pair["b"].data for pair in pairs} == {True}
    assert sorted((pair["a"].run_id, pair["a"].data) for pair in pairs) == sorted(
        (f"r{run}", number) for run in range(50) for number in range(2)
    )
    assert coord.snapshot().joins == ()
    coord.close()
