"""Random traffic under a limit, against a small model of it (R1 to R5, L3, L4, L7).

Tasks on a loop call, enter again, leave, fail and are cancelled; threads try once; others commit, want a pause and
change the limit. Time is the test's. The model knows no times to come and computes none: it counts, at each second
anew, what the windows hold. So whoever is let in too early, too late or out of turn is noticed in that very second.

Others may act while the loop sleeps, and time may pass then: whoever was let in enters when it wakes up.
"""

from __future__ import annotations

import asyncio
import itertools
import random
from contextvars import Context
from typing import Any, Optional

import attrs
import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, precondition, rule, run_state_machine_as_test
from support import join_all, start_all

from agentdiff import CoordinationTimeoutError, Coordinator, Slot
from agentdiff.limits import Limit
from agentdiff.testing import FakeClock

NEVER = float("inf")
CROWD = 12
TURNS = 6  # of the loop, after which nothing happens any more


# -- the model ------------------------------------------------------------------------------------------------


@attrs.define(eq=False)
class Call:
    """One entry: it waits, is let in, is inside, and then over; within another one, if its task enters again."""

    number: int
    tokens: int  # reserved, then used
    deadline: float
    within: Optional[Call]
    state: str = "waits"
    at: Optional[float] = None  # when its block was entered, as long as a window may hold it


NOBODY = Call(0, 0, NEVER, None)


class Model:
    def __init__(self, limit: Limit) -> None:
        self.limit = limit
        self.calls: list[Call] = []
        self.resume_at = 0.0
        self.seen: set[tuple[int, str]] = set()

    def those(self, *states: str) -> list[Call]:
        return [call for call in self.calls if call.state in states]

    def counts(self, call: Call, now: float) -> bool:
        """Whether it has been let in, or has entered within the last `per` seconds and the margin."""
        return call.state == "let in" or (call.at is not None and call.at + self.limit.per + self.limit.margin > now)

    def window(self, now: float) -> list[Call]:
        """What counts at this moment. Any window that holds too many does so when the last of them enters."""
        return [call for call in self.calls if self.counts(call, now)]

    def is_impossible(self, tokens: int) -> bool:
        return self.limit.tokens is not None and tokens > self.limit.tokens

    def fits(self, call: Call, now: float) -> bool:
        limit, window = self.limit, self.window(now)
        places = sum(other.within is None for other in self.those("let in", "inside"))
        return (
            now >= self.resume_at
            and (limit.concurrency is None or call.within is not None or places < limit.concurrency)
            and (limit.requests is None or len(window) < limit.requests)
            and (limit.tokens is None or sum(other.tokens for other in window) + call.tokens <= limit.tokens)
        )

    def serve(self, now: float) -> None:
        """Let in whoever is first, one after another: those who enter again come before the line."""
        for call in sorted(self.those("waits"), key=lambda call: call.within is None):
            if not self.fits(call, now):
                return
            call.state = "let in"

    def wake(self, now: float) -> None:
        """The loop goes on: all enter that have been let in, and whoever's time is up stops waiting."""
        self.forget(now)
        self.serve(now)
        late = [call for call in self.those("waits") if call.deadline <= now]
        for call in sorted(late, key=lambda call: call.deadline):
            if call.state == "waits":
                self.end(call, "late")
                self.serve(now)
        for call in self.those("let in"):
            self.enter(call, now)

    def enter(self, call: Call, now: float) -> None:
        call.state = "inside"
        self.count(call, now)
        self.seen.add((call.number, "enters"))

    def count(self, call: Call, now: float) -> None:
        """It enters; where no rate is declared that is not remembered."""
        rated = self.limit.requests is not None or self.limit.tokens is not None
        call.at = now if rated else None

    def end(self, call: Call, how: str) -> None:
        call.state = "over"
        self.seen.add((call.number, how))

    def forget(self, now: float) -> None:
        """What no window can hold any more is forgotten, even if windows are longer later."""
        for call in self.calls:
            if not self.counts(call, now):
                call.at = None
        self.calls = [call for call in self.calls if call.state != "over" or call.at is not None]

    def pause(self, seconds: float, now: float) -> None:
        self.serve(now)  # whose time has come is let in before anything changes
        self.resume_at = max(self.resume_at, now + seconds)
        self.serve(now)

    def change(self, limit: Limit, now: float) -> None:
        self.serve(now)
        self.forget(now)
        self.limit = limit
        for call in self.those("waits"):
            if self.is_impossible(call.tokens):
                self.end(call, "refused")
        self.serve(now)


# -- the traffic ----------------------------------------------------------------------------------------------


class Failure(Exception):
    """The call within the block has failed."""


class Caller:
    """A task that is inside until it is told to enter again, to leave or to fail."""

    def __init__(self, traffic: LimitTraffic, call: Call, timeout: Optional[float]) -> None:
        self.traffic = traffic
        self.calls: list[Call] = []  # the innermost last
        self.last = call  # a commit is about this one
        self.slot: Optional[Slot] = None
        self.order: Any = None
        self.task = Context().run(traffic.loop.create_task, self.visit(call, timeout))

    async def visit(self, call: Call, timeout: Optional[float]) -> None:
        traffic, how = self.traffic, "left"
        self.calls.append(call)
        try:
            async with traffic.coord.lock("api", tokens=call.tokens, timeout=timeout) as self.slot:
                traffic.seen.add((call.number, "enters"))
                self.last = call
                while True:
                    self.order = traffic.loop.create_future()
                    again = await self.order
                    if again is None:
                        break
                    await self.visit(*again)
        except CoordinationTimeoutError:
            how = "late"
        except ValueError:
            how = "refused"
        except Failure:
            how = "failed"
        except asyncio.CancelledError:
            how = "cancelled"
            raise
        finally:
            traffic.seen.add((call.number, how))
            self.calls.pop()
            self.last = self.calls[-1] if self.calls else self.last

    def takes_orders(self) -> bool:
        return self.order is not None and not self.order.done()


def pick(callers: list[Caller], number: int) -> Caller:
    return callers[number % len(callers)]


TOKENS = st.sampled_from([0, 1, 2, 5, 5, 8, 10])
TIMEOUTS = st.none() | st.integers(0, 8)
SOMEBODY = st.integers(0, CROWD - 1)
LIMITS = st.builds(
    lambda parts, per, margin: Limit(**parts, per=per, margin=margin),
    st.fixed_dictionaries(
        {},
        optional={"concurrency": st.integers(1, 3), "requests": st.integers(1, 4), "tokens": st.integers(5, 10)},
    ).filter(bool),
    per=st.integers(1, 8),
    margin=st.integers(0, 2),
)


class LimitTraffic(RuleBasedStateMachine):
    def __init__(self) -> None:
        super().__init__()
        self.clock = FakeClock()
        self.loop = asyncio.new_event_loop()
        self.coord = Coordinator(clock=self.clock, slow_after=None)
        self.awake = True
        self.number = 0
        self.callers: list[Caller] = []
        self.cancelled: list[Call] = []
        self.seen: set[tuple[int, str]] = set()
        self.declare(limit=Limit(concurrency=1))  # a program may end before it begins

    @initialize(limit=LIMITS)
    def declare(self, limit: Limit) -> None:
        self.model = Model(limit)
        self.coord.limit("api", **attrs.asdict(limit))

    def run_loop(self) -> None:
        async def turns() -> None:
            for _ in range(TURNS):
                await asyncio.sleep(0)

        self.loop.run_until_complete(turns())

    def settle(self) -> None:
        """The loop goes on, if it is awake, until nothing happens any more: then all is as the model says."""
        if not self.awake:
            return
        self.run_loop()
        for call in self.cancelled:
            self.model.end(call, "cancelled")
            self.model.seen.discard((call.number, "refused"))  # it was not told any more
        self.cancelled.clear()
        self.model.wake(self.clock.now)
        assert self.seen == self.model.seen
        self.seen.clear()
        self.model.seen.clear()

    def ask(self, tokens: int, timeout: Optional[int], within: Optional[Call] = None) -> tuple[Call, Optional[float]]:
        """Timeouts end between two seconds, one at a time: nobody's time comes just then."""
        self.number += 1
        exactly = timeout + self.number / 65536 if timeout else timeout
        call = Call(self.number, tokens, NEVER if exactly is None else self.clock.now + exactly, within)
        if self.model.is_impossible(tokens):
            self.model.end(call, "refused")
        else:
            self.model.calls.append(call)
        return call, exactly

    def who_is_inside(self) -> list[Caller]:
        return [caller for caller in self.callers if caller.takes_orders()] if self.awake else []

    # what tasks do

    @precondition(lambda self: self.awake)
    @rule(asked=st.lists(st.tuples(TOKENS, TIMEOUTS), min_size=1, max_size=4))
    def call(self, asked: list[tuple[int, Optional[int]]]) -> None:
        """Some come, one after another."""
        live = [caller for caller in self.callers if not caller.task.done()]
        if len(self.callers) > 2 * CROWD:
            self.callers = live.copy()
        for tokens, timeout in asked[: CROWD - len(live)]:
            self.callers.append(Caller(self, *self.ask(tokens, timeout)))
            self.settle()

    @precondition(who_is_inside)
    @rule(number=SOMEBODY, tokens=TOKENS, timeout=TIMEOUTS)
    def enter_again(self, number: int, tokens: int, timeout: Optional[int]) -> None:
        caller = pick(self.who_is_inside(), number)
        caller.order.set_result(self.ask(tokens, timeout, caller.calls[-1]))
        self.settle()

    @precondition(who_is_inside)
    @rule(number=SOMEBODY, fails=st.booleans())
    def leave(self, number: int, fails: bool) -> None:
        caller = pick(self.who_is_inside(), number)
        self.model.end(caller.calls[-1], "failed" if fails else "left")
        if fails:
            caller.order.set_exception(Failure())
        else:
            caller.order.set_result(None)
        self.settle()

    # what others do, on threads, while the loop goes on or sleeps

    @precondition(lambda self: self.callers)
    @rule(number=SOMEBODY)
    def cancel(self, number: int) -> None:
        caller = pick(self.callers, number)
        self.callers.remove(caller)
        self.cancelled += caller.calls
        caller.task.cancel()
        self.settle()

    @rule(tokens=TOKENS)
    def try_once(self, tokens: int) -> None:
        """A thread enters if it can, and leaves at once."""
        call, _ = self.ask(tokens, 0)
        now = self.clock.now
        self.model.serve(now)
        got: list[bool] = []

        def visit() -> None:
            lock = self.coord.lock("api", tokens=tokens)
            try:
                got.append(lock.acquire(blocking=False))
            except ValueError:
                self.seen.add((call.number, "refused"))
            if any(got):
                lock.release()

        join_all(start_all(visit))
        assert any(got) is (call.state == "let in")
        if any(got):
            call.state = "over"
            self.model.count(call, now)
        elif call.state == "waits":
            self.model.calls.remove(call)
        self.model.serve(now)
        self.settle()

    @precondition(lambda self: self.callers)
    @rule(number=SOMEBODY, tokens=TOKENS)
    def commit(self, number: int, tokens: int) -> None:
        """At any time, and after the block too; the last word counts."""
        caller = pick(self.callers, number)
        if caller.slot is not None and not any(call.state == "let in" for call in caller.calls):
            caller.slot.commit(tokens=tokens)
            caller.last.tokens = tokens
            self.model.serve(self.clock.now)
            self.settle()

    @precondition(lambda self: self.callers)
    @rule(number=SOMEBODY, seconds=st.integers(0, 8))
    def pause(self, number: int, seconds: int) -> None:
        slot = pick(self.callers, number).slot
        if slot is not None:
            slot.throttled(retry_after=seconds)
            self.model.pause(seconds, self.clock.now)
            self.settle()

    @precondition(lambda self: self.awake)
    @rule()
    def look(self) -> None:
        """The account is exact, and says when the next may enter if nothing happens until then."""
        model, now = self.model, self.clock.now
        (found,) = self.coord.snapshot().limits
        window, waiting = model.window(now), model.those("waits")
        places = sum(call.within is None for call in model.those("inside"))
        assert (found.places_taken, found.waiting) == (places, len(waiting))
        assert (found.requests_used, found.tokens_used) == (len(window), sum(call.tokens for call in window))
        first = min(waiting, key=lambda call: call.within is None, default=NOBODY)
        times = (half / 2 for half in range(60) if model.fits(first, now + half / 2))
        assert found.next_free == next(times, None)

    @rule(limit=LIMITS)
    def change(self, limit: Limit) -> None:
        self.coord.limit("api", **attrs.asdict(limit))
        self.model.change(limit, self.clock.now)
        self.settle()

    @rule(seconds=st.sampled_from([1, 1, 2, 3, 5, 10]))
    def pass_time(self, seconds: int) -> None:
        for _ in range(2 * seconds):
            self.clock.advance(0.5)
            self.settle()

    @precondition(lambda self: self.awake and self.model.those("waits"))
    @rule()
    def sleep(self) -> None:
        self.awake = False

    @precondition(lambda self: not self.awake)
    @rule()
    def wake_up(self) -> None:
        self.awake = True
        self.settle()

    def teardown(self) -> None:
        """When everybody has left and all windows are over, nothing is left."""
        self.awake = True
        while self.callers:
            self.cancel(number=0)
        try:
            self.settle()
        finally:
            self.loop.close()
        assert self.coord.snapshot().locks == ()
        assert not self.clock._alarms
        (found,) = self.coord.snapshot().limits
        self.clock.advance(found.per + found.margin + found.held_back_for)
        (found,) = self.coord.snapshot().limits
        assert (found.places_taken, found.requests_used, found.tokens_used, found.next_free) == (0, 0, 0, 0)
        self.coord.close()


@pytest.mark.time_limit(600)
def test_R2_random_traffic_is_let_in_when_its_windows_allow_it_and_neither_earlier_nor_later() -> None:
    """200 random programs: windows, places, order, timeouts, pauses, refusals and the account are the model's."""
    run_state_machine_as_test(
        LimitTraffic,
        settings=settings(
            max_examples=200,
            stateful_step_count=50,
            deadline=None,
            derandomize=True,
            suppress_health_check=list(HealthCheck),
        ),
    )


@pytest.mark.time_limit(600)
def test_R3_after_10_000_random_calls_the_account_is_exact() -> None:
    """Commits, failures, cancellations, timeouts, re-entries, in one long program under one limit after another."""
    traffic, dice = LimitTraffic(), random.Random(3)
    limits = itertools.cycle([
        Limit(concurrency=3, requests=5, tokens=30, per=8, margin=1),
        Limit(requests=1, per=3, margin=0),
        Limit(concurrency=2, tokens=13, per=5, margin=1),
    ])  # fmt: skip

    def tokens() -> int:
        return dice.choice([0, 1, 2, 5, 13])

    def call() -> None:
        traffic.call(asked=[(tokens(), dice.choice([None, None, 0, 3, 8]))])

    def others() -> None:
        if traffic.callers:
            act = dice.choice([traffic.cancel, lambda number: traffic.commit(number=number, tokens=tokens())])
            act(number=dice.randrange(CROWD))

    def insiders() -> None:
        if traffic.who_is_inside():
            number = dice.randrange(CROWD)
            if dice.random() < 0.4:
                traffic.enter_again(number=number, tokens=tokens(), timeout=4)
            else:
                traffic.leave(number=number, fails=dice.random() < 0.3)

    def pass_time() -> None:
        traffic.pass_time(seconds=dice.choice([1, 1, 2, 10]))

    def sleep() -> None:
        traffic.sleep()
        pass_time()
        traffic.try_once(tokens=tokens())
        pass_time()
        others()
        traffic.wake_up()
        pass_time()

    acts = [call, call, call, insiders, insiders, others, pass_time, sleep, traffic.look]
    while traffic.number < 10_000:
        traffic.change(limit=next(limits))
        for _ in range(200):
            dice.choice(acts)()
    traffic.teardown()
