"""The line and the bells: they decide nothing, and lose nothing."""

from __future__ import annotations

import asyncio
import threading
from typing import Any

import pytest
from support import eventually, join_all, start_all

from agentdiff._clock import Clock
from agentdiff._waitqueue import TaskBell, ThreadBell, Waiter, WaitQueue
from agentdiff.testing import FakeClock


def test_L3_the_line_keeps_the_order_of_coming() -> None:
    """Whoever leaves, from wherever, the others keep their order; each place is an object, not a value."""
    line: WaitQueue[Any] = WaitQueue()
    ones: list[Waiter[Any]] = [Waiter() for _ in range(5)]
    for one in ones:
        line[one] = None
    assert list(line) == ones
    for gone in (ones[2], ones[0]):
        del line[gone]
    assert list(line) == [ones[1], ones[3], ones[4]]
    line[ones[0]] = None
    assert list(line)[-1] is ones[0]


@pytest.mark.parametrize("kind", [ThreadBell, None])
def test_L3_a_bell_can_be_rung_again(kind: Any, clock: FakeClock) -> None:
    """A waiter that was woken only to look again sleeps until the next ring."""

    async def main() -> None:
        bell = TaskBell()
        bell.ring()
        await bell.sleep(clock, None)
        sleep = asyncio.ensure_future(bell.sleep(clock, None))
        await asyncio.sleep(0)
        assert not sleep.done()
        bell.ring()
        await sleep

    if kind is None:
        asyncio.run(main())
        return
    bell = kind()
    bell.ring()
    bell.sleep(clock, None)
    threads = start_all(lambda: bell.sleep(clock, None))
    assert threads[0].is_alive()
    bell.ring()
    join_all(threads)


@pytest.mark.parametrize("timeout", [None, 5.0])
def test_L7_a_thread_bell_rung_before_the_sleep_ends_it_at_once(timeout: Any, clock: FakeClock) -> None:
    """A hand-over that comes before the waiter sleeps isn't lost; ringing twice does no harm."""
    bell = ThreadBell()
    assert bell.ring()
    assert bell.ring()
    bell.sleep(clock, timeout)


def test_L4_a_thread_bell_sleeps_until_it_is_rung_or_the_time_is_over(clock: FakeClock) -> None:
    """The sleep ends by the ring or by the clock, whichever comes first."""
    rung, timed = ThreadBell(), ThreadBell()
    threads = start_all(lambda: rung.sleep(clock, None), lambda: timed.sleep(clock, 5))
    clock.wait_for_sleepers(1)
    clock.advance(4.9)
    assert threads[1].is_alive()
    clock.advance(0.1)
    join_all(threads[1:])
    assert threads[0].is_alive()
    rung.ring()
    join_all(threads)


@pytest.mark.parametrize("timeout", [None, 5.0])
@pytest.mark.parametrize("foreign", [False, True])
def test_L7_a_task_bell_rung_before_the_sleep_ends_it_at_once(timeout: Any, foreign: bool, clock: FakeClock) -> None:
    """Likewise on a loop, rung from the loop itself or from another thread."""

    async def main() -> None:
        bell = TaskBell()
        if foreign:
            join_all(start_all(bell.ring))
        else:
            assert bell.ring()
        await asyncio.wait_for(bell.sleep(clock, timeout), 10)
        assert bell.ring()

    asyncio.run(main())


def test_L4_a_task_bell_sleeps_until_the_time_is_over(clock: FakeClock) -> None:
    """The clock ends the sleep, and the loop goes on meanwhile."""

    async def main() -> None:
        bell = TaskBell()
        sleeper = asyncio.ensure_future(bell.sleep(clock, 5))
        while not clock._alarms:
            await asyncio.sleep(0)
        clock.advance(5)
        await asyncio.wait_for(sleeper, 10)

    asyncio.run(main())
    assert not clock._alarms


def test_L7_a_cancelled_sleep_takes_its_alarm_along(clock: FakeClock) -> None:
    """A cancelled wait leaves no timer behind, and a ring for it does no harm."""

    async def main() -> None:
        bell = TaskBell()
        sleeper = asyncio.ensure_future(bell.sleep(clock, 5))
        while not clock._alarms:
            await asyncio.sleep(0)
        sleeper.cancel()
        await asyncio.wait([sleeper])
        assert sleeper.cancelled()
        assert bell.ring()

    asyncio.run(main())
    assert not clock._alarms


def test_L7_a_bell_of_a_closed_loop_says_so() -> None:
    """Nobody will ever run a task that sleeps there again: whoever rings must be told. One that has woken is awake."""
    loop = asyncio.new_event_loop()

    async def main() -> tuple[TaskBell, TaskBell, Any]:
        woken, asleep = TaskBell(), TaskBell()
        woken.ring()
        await woken.sleep(Clock(), None)
        sleeper = asleep.sleep(Clock(), None)
        sleeper.send(None)
        return woken, asleep, sleeper

    woken, asleep, sleeper = loop.run_until_complete(main())
    loop.close()
    assert asleep.ring() is False
    assert woken.ring() is True
    sleeper.close()


@pytest.mark.parametrize("timeout", [-1.0, 0.0, 0.001])
def test_L4_the_system_clock_takes_short_and_late_timeouts(timeout: float) -> None:
    """What is left of a timeout may be nothing, or less."""
    lock = threading.Lock()
    lock.acquire()
    assert Clock().wait(lock, timeout) is False
    lock.release()
    assert Clock().wait(lock, timeout) is True


def test_L4_the_system_clock_takes_endless_timeouts() -> None:
    """A wait longer than the system allows is a long wait, not an error, on threads and loops alike."""
    clock, bell = Clock(), ThreadBell()
    threads = start_all(lambda: bell.sleep(clock, 1e300))

    async def main() -> None:
        task_bell = TaskBell()
        sleeper = asyncio.ensure_future(task_bell.sleep(clock, 1e300))
        await asyncio.sleep(0)
        task_bell.ring()
        await asyncio.wait_for(sleeper, 10)

    asyncio.run(main())
    bell.ring()
    eventually(lambda: not threads[0].is_alive())
