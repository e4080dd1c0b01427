"""What users can rely on about limits: places, requests and tokens in any window of time, and pauses that an API wants.

Time is the test's. Windows and margins are sums of powers of two, so that no rounding blurs when they end.
"""

from __future__ import annotations

import asyncio
import contextlib
import gc
import threading
from collections.abc import AsyncIterator, Iterator
from contextvars import Context, copy_context
from email.utils import formatdate
from types import SimpleNamespace
from typing import Any, Callable, Optional

import pytest
from support import eventually, join_all, start_all
from visitors import (
    PER,
    CountingClock,
    Visitor,
    attempt,
    by_acquire_async,
    closed_loop,
    drop,
    enters,
    in_thread,
    info,
    inside,
    line,
    nothing_left,
    queued,
    until,
)

import agentdiff
from agentdiff import CoordinationTimeoutError, Coordinator, DeadlockError, NotHeldError, Slot
from agentdiff._table import LockTable
from agentdiff.limits import retry_after
from agentdiff.locks import Lock
from agentdiff.testing import FakeClock


@pytest.fixture
def coord(timed: Coordinator) -> Coordinator:
    return timed


# -- every way in -------------------------------------------------------------------------------------------

Body = Callable[[], Any]
Way = Callable[[Coordinator, int, Body], Any]


HANDLES: dict[str, Callable[[Coordinator, int], Any]] = {
    "lock": lambda coord, tokens: coord.lock("api", tokens=tokens),
    "lock that does not lend": lambda coord, tokens: coord.lock("api", tokens=tokens, lend=False),
    "group": lambda coord, tokens: coord.lock("z", "api", "b", tokens=tokens),
}


def by_with(lock: Any, body: Body = int) -> None:
    with lock:
        body()


def by_acquire(lock: Any, body: Body = int) -> None:
    assert lock.acquire()
    try:
        body()
    finally:
        lock.release()


async def by_async_with(lock: Any, body: Body = int) -> None:
    async with lock:
        await asyncio.sleep(0)
        body()


def agents(coord: Coordinator, body: Body, **how: Any) -> dict[str, Callable[[], Any]]:
    """An agent of each kind, and what runs it: it does this while it is inside."""
    decorate = coord.coordinate("agent", **{"lock_name": "api", **how})

    @decorate
    def function() -> None:
        body()

    @decorate
    async def coroutine() -> None:
        await asyncio.sleep(0)
        body()

    @decorate
    def generator() -> Iterator[int]:
        yield 1
        body()
        yield 2

    @decorate
    async def async_generator() -> AsyncIterator[int]:
        yield 1
        body()
        yield 2

    async def drain() -> None:
        assert [item async for item in async_generator()] == [1, 2]

    return {
        "function": function,
        "coroutine": lambda: asyncio.run(coroutine()),
        "generator": lambda: list(generator()),
        "async generator": lambda: asyncio.run(drain()),
    }


AGENTS = ["function", "coroutine", "generator", "async generator"]


def way_of_lock(handle: str, how: Any) -> Way:
    def way(coord: Coordinator, tokens: int, body: Body) -> None:
        entering = how(HANDLES[handle](coord, tokens), body)
        if entering is not None:
            asyncio.run(entering)

    return way


def way_of_agent(kind: str, **how: Any) -> Way:
    return lambda coord, tokens, body: agents(coord, body, tokens=tokens, **how)[kind]()


def by_agent_that_is_heard(coord: Coordinator, tokens: int, body: Body) -> None:
    coord.on("agent_*", lambda data: None)
    agents(coord, body, tokens=tokens)["function"]()


WAYS: dict[str, Way] = {
    **{
        f"{handle} {how.__name__}": way_of_lock(handle, how)
        for handle in HANDLES
        for how in (by_with, by_acquire, by_async_with, by_acquire_async)
    },
    **{kind: way_of_agent(kind) for kind in AGENTS},
    "agent on several": way_of_agent("function", lock_name=["z", "api"]),
    "agent that is heard": by_agent_that_is_heard,
}
each_way = pytest.mark.parametrize("way", WAYS.values(), ids=WAYS)


@each_way
def test_R1_every_way_in_takes_one_place_one_request_and_its_tokens(coord: Coordinator, way: Way) -> None:
    """`with`, `acquire`, groups and agents of every kind obey the limit, with no change to what they do."""
    coord.limit("api", concurrency=2, requests=10, tokens=1000, per=PER, margin=0)
    seen: list[Any] = []
    way(coord, 30, lambda: seen.append(info(coord)))
    (during,) = seen
    assert (during.places_taken, during.requests_used, during.tokens_used) == (1, 1, 30)
    after = info(coord)
    assert (after.places_taken, after.requests_used, after.tokens_used) == (0, 1, 30)


@each_way
def test_R2_every_way_in_waits_for_a_place(coord: Coordinator, way: Way) -> None:
    """With all places taken nobody comes in, and the first who leaves lets the next one in."""
    coord.limit("api", concurrency=2)
    first, second = (Visitor(coord.lock("api")).entered() for _ in range(2))
    done = threading.Event()
    threads = start_all(lambda: way(coord, 0, done.set))
    eventually(lambda: line(coord))
    assert not done.is_set()
    first.go()
    join_all(threads)
    assert done.is_set()
    second.go()


@each_way
def test_R2_every_way_in_waits_for_its_time(coord: Coordinator, clock: CountingClock, way: Way) -> None:
    """With all requests of the window used it sleeps until the first of them is over, and no shorter."""
    coord.limit("api", requests=1, per=PER, margin=0.5)
    with coord.lock("api"):
        pass
    seen: list[float] = []
    threads = start_all(lambda: way(coord, 0, lambda: seen.append(clock.now)))
    start = clock.now
    clock.wait_for_sleepers(1)
    assert clock.timers == [PER + 0.5]
    clock.advance(PER)
    assert line(coord)
    clock.advance(0.5)
    join_all(threads)
    assert seen == [start + PER + 0.5]


@each_way
def test_R3_whatever_ends_the_block_keeps_the_reservation(coord: Coordinator, clock: CountingClock, way: Way) -> None:
    """After an exception the place is free, and the tokens count as reserved until their window is over."""
    coord.limit("api", concurrency=1, tokens=100, per=PER, margin=0)

    def fail() -> None:
        raise ValueError("mine")

    with pytest.raises(ValueError, match="mine"):
        way(coord, 30, fail)
    after = info(coord)
    assert (after.places_taken, after.tokens_used) == (0, 30)
    assert nothing_left(coord)
    clock.advance(PER)
    assert info(coord).tokens_used == 0


@each_way
def test_R5_more_tokens_than_the_limit_can_ever_give_are_refused_at_once(coord: Coordinator, way: Way) -> None:
    """A `ValueError` that says so, wherever the tokens are named, and even if there is no place; nothing is taken."""
    coord.limit("api", concurrency=1, tokens=100, per=PER)
    with Visitor(coord.lock("api")):
        with pytest.raises(ValueError, match=r"101 tokens can never be had from limit 'api': it allows 100 in 64 s"):
            way(coord, 101, lambda: None)
        assert line(coord) == []
        assert info(coord).tokens_used == 0


# -- R2: places ---------------------------------------------------------------------------------------------


class Crowd:
    """Counts who is inside at once."""

    def __init__(self) -> None:
        self.mutex = threading.Lock()
        self.now = self.most = self.entered = 0

    def __enter__(self) -> None:
        with self.mutex:
            self.now += 1
            self.entered += 1
            self.most = max(self.most, self.now)

    def __exit__(self, *error: Any) -> None:
        with self.mutex:
            self.now -= 1


@pytest.mark.parametrize(("threads", "tasks"), [(8, 0), (0, 8), (4, 4)])
def test_R2_never_more_than_concurrency_at_once(coord: Coordinator, threads: int, tasks: int) -> None:
    """Threads, tasks of two loops, and both: as many as allowed, and none more."""
    coord.limit("api", concurrency=3)
    crowd = Crowd()
    full = threading.Event()

    def visit() -> None:
        for _ in range(50):
            with coord.lock("api"), crowd:
                if crowd.now == 3:
                    full.set()
                full.wait(10)

    async def visit_async() -> None:
        for _ in range(50):
            async with coord.lock("api"):
                with crowd:
                    if crowd.now == 3:
                        full.set()
                    while not full.is_set():
                        await asyncio.sleep(0)
                    await asyncio.sleep(0)

    async def loop() -> None:
        await asyncio.gather(*(visit_async() for _ in range(tasks // 2)))

    loops = [lambda: asyncio.run(loop())] * (2 if tasks else 0)
    join_all(start_all(*[visit] * threads, *loops))
    assert (crowd.most, crowd.entered) == (3, 400)


def test_R2_without_concurrency_any_number_is_inside(coord: Coordinator) -> None:
    """A limit of requests alone is no lock."""
    coord.limit("api", requests=100)
    visitors = [Visitor(coord.lock("api")) for _ in range(20)]
    for visitor in visitors:
        visitor.entered()
    assert info(coord).places_taken == 20
    for visitor in visitors:
        visitor.go()


def test_R2_limits_of_two_names_are_two(coord: Coordinator) -> None:
    """What is used of one is not used of another, nor of the same name in another coordinator."""
    coord.limit("api", concurrency=1, requests=1)
    coord.limit("other", concurrency=1, requests=1)
    with Coordinator() as elsewhere, coord.lock("api"):
        assert enters(coord.lock("other"))
        assert enters(elsewhere.lock("api"))
        assert not enters(coord.lock("api"))


# -- L3: order ----------------------------------------------------------------------------------------------


def test_R1_a_big_request_at_the_head_is_not_overtaken_and_does_not_starve(
    coord: Coordinator, clock: CountingClock
) -> None:
    """Small ones that would fit wait behind it; it comes in as soon as its tokens are there."""
    coord.limit("api", tokens=100, per=PER, margin=0)
    for _ in range(4):
        with coord.lock("api", tokens=20):
            clock.advance(8)
    big = queued(coord, coord.lock("api", tokens=70), "Big")
    small = queued(coord, coord.lock("api", tokens=10), "Small")
    assert not enters(coord.lock("api"))
    assert not enters(coord.lock("api", tokens=1))
    clock.wait_for_sleepers(1)
    assert clock.timers == [PER - 16]  # when the third of the four is over: 20 are left then
    clock.advance(PER - 16 - 1)
    assert line(coord) == ['thread "Big"', 'thread "Small"']
    clock.advance(1)
    big.entered()
    small.entered()
    assert info(coord).tokens_used == 20 + 70 + 10
    big.go()
    small.go()


# -- R2: requests per window --------------------------------------------------------------------------------


def test_R2_a_burst_at_the_end_of_a_minute_leaves_none_for_the_beginning_of_the_next(
    coord: Coordinator, clock: CountingClock
) -> None:
    """No fixed minutes: a window slides."""
    coord.limit("api", requests=10, margin=0)
    clock.advance(59)
    assert [enters(coord.lock("api")) for _ in range(11)] == [True] * 10 + [False]
    clock.advance(1)
    assert not enters(coord.lock("api"))
    clock.advance(58.5)
    assert not enters(coord.lock("api"))
    clock.advance(0.5)
    assert [enters(coord.lock("api")) for _ in range(11)] == [True] * 10 + [False]


def test_R2_margin_is_kept_beyond_the_window(coord: Coordinator, clock: CountingClock) -> None:
    """60 s and 0.1 s where nothing is said."""
    coord.limit("api", requests=1)
    assert (info(coord).per, info(coord).margin) == (60, 0.1)
    assert enters(coord.lock("api"))
    clock.advance(60.0625)
    assert not enters(coord.lock("api"))
    clock.advance(0.0625)
    assert enters(coord.lock("api"))


@pytest.mark.parametrize("waits", [False, True])
def test_R2_the_window_of_a_group_begins_when_all_its_locks_are_taken(
    coord: Coordinator, clock: CountingClock, waits: bool
) -> None:
    """The request is reserved while it waits for the other lock, and counts from the block's beginning on."""
    coord.limit("api", requests=1, per=PER, margin=0)
    with Visitor(coord.lock("b")) as other:
        if waits:
            assert enters(coord.lock("api"))
        group = Visitor(coord.lock("api", "b"))
        if waits:
            clock.wait_for_sleepers(1)
            clock.advance(PER)
        eventually(lambda: line(coord, "b"))
        assert not enters(coord.lock("api"))
        clock.advance(3 * PER)
        assert not enters(coord.lock("api"))
        other.leave.set()
        group.entered()
    clock.advance(PER - 1)
    assert not enters(coord.lock("api"))
    clock.advance(1)
    assert enters(coord.lock("api"))
    group.go()


def test_R2_a_long_call_is_out_of_the_window_before_it_is_over(coord: Coordinator, clock: CountingClock) -> None:
    """Its request was made when it began; what it commits afterwards is not counted against a later window."""
    coord.limit("api", concurrency=2, requests=1, tokens=10, per=PER, margin=0)
    with coord.lock("api", tokens=10) as slot:
        clock.advance(PER)
        assert (info(coord).requests_used, info(coord).tokens_used) == (0, 0)
        slot.commit(tokens=7)
        assert info(coord).tokens_used == 0
        assert enters(coord.lock("api", tokens=10))
    clock.advance(PER)


# -- R3: tokens ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("said", [[30], [10], [0], [250], [10, 60, 20], [250, 0], [0.5]])
@pytest.mark.parametrize("when", ["inside", "afterwards", "both", "from another thread"])
def test_R3_the_last_word_about_what_was_used_counts(
    coord: Coordinator, clock: CountingClock, said: list[float], when: str
) -> None:
    """Less, more, nothing, several times, within the block or after it, by whoever: until the window is over."""
    coord.limit("api", tokens=100, per=PER, margin=0)
    with coord.lock("api", tokens=30) as slot:
        assert info(coord).tokens_used == 30
        for tokens in said if when in ("inside", "both") else []:
            slot.commit(tokens=tokens)
            assert info(coord).tokens_used == tokens
        if when == "from another thread":
            in_thread(lambda: [slot.commit(tokens=tokens) for tokens in said])
    for tokens in said if when in ("afterwards", "both") else []:
        slot.commit(tokens=tokens)
        assert info(coord).tokens_used == tokens
    assert info(coord).tokens_used == said[-1]
    clock.advance(PER - 1)
    assert info(coord).tokens_used == said[-1]
    clock.advance(1)
    assert info(coord).tokens_used == 0
    slot.commit(tokens=500)
    assert info(coord).tokens_used == 0


def test_R3_a_commit_of_less_lets_the_next_one_in_at_once(coord: Coordinator) -> None:
    """The rest of the reservation is free for others, those in line too."""
    coord.limit("api", tokens=100, per=PER)
    with coord.lock("api", tokens=80) as slot:
        waiter = queued(coord, coord.lock("api", tokens=60))
        slot.commit(tokens=41)
        assert line(coord)
        slot.commit(tokens=40)
        waiter.entered().go()


@pytest.mark.parametrize(("used", "seconds"), [(100, [0] * 7 + [1] * 3), (400, [0, 0, 1, 1, 2, 2, 3, 3, 4, 4])])
def test_R3_calls_need_the_time_of_what_they_use_and_not_of_what_they_reserve(
    coord: Coordinator, clock: CountingClock, used: int, seconds: list[float]
) -> None:
    """Ten that reserve 400 of 1,000 a second: with 100 used, seven go on at once, the others when a window is over."""
    coord.limit("api", tokens=1000, per=1, margin=0)
    start, entered = clock.now, []

    async def call() -> None:
        async with coord.lock("api", tokens=400) as slot:
            entered.append(clock.now - start)
            slot.commit(tokens=used)

    async def main() -> None:
        calls = [asyncio.ensure_future(call()) for _ in range(10)]
        while len(entered) < 10:
            await until(lambda: clock.timers or len(entered) == 10)
            clock.advance(min(clock.timers, default=0))
        await asyncio.gather(*calls)

    asyncio.run(main())
    assert entered == seconds


@pytest.mark.parametrize("tokens", [-1, float("nan"), float("inf"), 10**400, True, "5", None])
def test_R3_what_is_no_number_of_tokens_is_refused(coord: Coordinator, tokens: Any) -> None:
    """Wherever tokens are named; nothing is changed."""
    coord.limit("api", tokens=100, per=PER)
    kind = ValueError if isinstance(tokens, (int, float)) and tokens is not True else TypeError
    with coord.lock("api", tokens=5) as slot:
        with pytest.raises(kind, match="tokens"):
            slot.commit(tokens=tokens)
        assert info(coord).tokens_used == 5
    if tokens is None:
        return
    with pytest.raises(kind, match="tokens"):
        coord.lock("api", tokens=tokens)
    with pytest.raises(kind, match="tokens"):
        coord.lock("api", "b", tokens=tokens)
    with pytest.raises(kind, match="tokens"):
        coord.coordinate("agent", lock_name="api", tokens=tokens)

    @coord.coordinate("agent", lock_name="api", tokens=lambda: tokens)
    def agent() -> None:
        raise AssertionError("it is not called")

    with pytest.raises(kind, match="tokens= of agent 'agent'"):
        agent()


def test_R3_tokens_without_a_limit_of_tokens_are_ignored(coord: Coordinator) -> None:
    """Under a plain lock and under a limit of something else: reserved, committed, however many."""
    coord.limit("api", concurrency=1, requests=3)
    for name in ("api", "plain"):
        with coord.lock(name, tokens=10**9) as slot:
            slot.commit(tokens=10**12)
        slot.commit(tokens=5)
        assert coord.lock(name, tokens=10**9).acquire(timeout=0)
        coord.lock(name).release()
    assert info(coord).tokens is None


def test_R3_tokens_of_an_agent_may_depend_on_its_arguments(coord: Coordinator) -> None:
    """A number, or a function of the call's arguments; `coord.slot` commits from within."""
    coord.limit("api", tokens=1000, per=PER)

    @coord.coordinate("agent", lock_name="api", tokens=lambda prompt, limit=100: len(prompt) + limit)
    def agent(prompt: str, limit: int = 100) -> None:
        seen.append(info(coord).tokens_used)
        coord.slot("api").commit(tokens=7)

    seen: list[float] = []
    agent("hello", limit=20)
    agent("hello")
    assert seen == [25, 7 + 105]
    assert info(coord).tokens_used == 14
    for refused in ({"tokens": 5}, {"throttle_on": ValueError}):
        with pytest.raises(ValueError, match="name it by lock_name"):
            coord.coordinate("agent", **refused)(lambda: None)


@pytest.mark.parametrize("end", ["timeout", "cancel", "refused", "deadlock"])
def test_R3_a_group_that_gets_not_all_gives_everything_back(coord: Coordinator, clock: CountingClock, end: str) -> None:
    """Place, request and tokens of the limit that it had got already: the next in line there comes in at once."""
    coord.limit("api", concurrency=1, requests=2, tokens=100, per=PER, margin=0)
    coord.limit("b", concurrency=1, tokens=50)
    assert enters(coord.lock("api"))
    seen: list[BaseException] = []

    async def take() -> None:
        async with coord.lock("api", "b", tokens=40, timeout=4 if end == "timeout" else None):
            raise AssertionError("b is not free")

    async def main() -> None:
        holder = Visitor(coord.lock("b"))
        holder.entered()
        task = asyncio.ensure_future(take())
        await until(lambda: line(coord, "b"))
        assert (info(coord).places_taken, info(coord).requests_used, info(coord).tokens_used) == (1, 2, 40)
        waiter = queued(coord, coord.lock("api", tokens=90))
        if end == "timeout":
            clock.advance(4)
        elif end == "cancel":
            task.cancel()
        elif end == "refused":
            coord.limit("b", concurrency=1, tokens=39)
        await asyncio.wait([task])
        seen.append(asyncio.CancelledError() if task.cancelled() else task.exception() or AssertionError())
        waiter.entered().go()
        holder.go()

    def cross() -> None:
        with coord.lock("b"):
            waiter = Visitor(coord.lock("api", "b", tokens=40), "Group")
            eventually(lambda: line(coord, "b"))
            with pytest.raises(DeadlockError):
                coord.lock("api").acquire()
        waiter.entered().go()
        seen.append(DeadlockError())

    if end == "deadlock":
        cross()
        assert (info(coord).requests_used, info(coord).tokens_used) == (2, 40)
    else:
        asyncio.run(main())
        assert (info(coord).requests_used, info(coord).tokens_used) == (2, 90)
    kinds = {"timeout": CoordinationTimeoutError, "cancel": asyncio.CancelledError, "refused": ValueError}
    assert isinstance(seen[0], kinds.get(end, DeadlockError))


def test_R5_a_group_refuses_impossible_tokens_before_it_waits(coord: Coordinator) -> None:
    """At once, and not when it has waited for its first lock."""
    coord.limit("api", tokens=10)

    async def main() -> None:
        async with coord.lock("a", "api", tokens=11):
            pass

    with Visitor(coord.lock("a")):
        with pytest.raises(ValueError, match="11 tokens"), coord.lock("a", "api", tokens=11):
            pass
        with pytest.raises(ValueError, match="11 tokens"):
            asyncio.run(main())


def test_R3_fractions_of_tokens_hold_up_nobody(coord: Coordinator, clock: CountingClock) -> None:
    """Sums of fractions drift; whoever asks for all that there is gets it when the others' windows are over."""
    coord.limit("api", tokens=1, per=PER, margin=0)
    for _ in range(2):
        clock.advance(PER)
        assert info(coord).tokens_used == 0
        for tokens in (0.1, 0.2, 0.3, 0.1):
            assert enters(coord.lock("api", tokens=tokens))
        assert info(coord).tokens_used == pytest.approx(0.7)
    clock.advance(8)
    assert enters(coord.lock("api"))  # of no tokens: its window holds up nobody either
    waiter = queued(coord, coord.lock("api", tokens=1))
    clock.wait_for_sleepers(1)
    assert clock.timers == [PER - 8]
    clock.advance(PER - 8)
    waiter.entered().go()
    assert info(coord).tokens_used == 1


# -- R1, L2: entering again, and borrowing ------------------------------------------------------------------


def test_R1_entering_again_takes_no_second_place_and_counts_as_a_request(coord: Coordinator) -> None:
    """The slot is the same; request and tokens are those of one more call; a commit is about the innermost entry."""
    coord.limit("api", concurrency=1, requests=10, tokens=100, per=PER)
    with coord.lock("api", tokens=10) as outer:
        with coord.lock("api", tokens=20) as inner:
            assert inner is outer
            assert (info(coord).places_taken, info(coord).requests_used, info(coord).tokens_used) == (1, 2, 30)
            inner.commit(tokens=5)
            assert info(coord).tokens_used == 15
        outer.commit(tokens=1)
        assert info(coord).tokens_used == 6
        assert coord.snapshot().locks[0].holders[0].entries == 1
    outer.commit(tokens=2)
    assert info(coord).tokens_used == 7


@pytest.mark.parametrize("kind", ["task", "to_thread"])
def test_R1_a_borrower_takes_no_second_place_and_counts_as_a_request(coord: Coordinator, kind: str) -> None:
    """A tool inside an agent inside one limit doesn't hang, and its call is counted."""
    coord.limit("api", concurrency=1, requests=10, tokens=100, per=PER)
    seen: list[Any] = []

    def tool() -> None:
        with coord.lock("api", tokens=20) as slot:
            seen.append((info(coord).places_taken, info(coord).requests_used, info(coord).tokens_used))
            slot.commit(tokens=5)

    async def async_tool() -> None:
        async with coord.lock("api", tokens=20) as slot:
            seen.append((info(coord).places_taken, info(coord).requests_used, info(coord).tokens_used))
            slot.commit(tokens=5)

    async def main() -> None:
        async with coord.lock("api", tokens=10):
            waiter = queued(coord, coord.lock("api"))
            if kind == "task":
                await asyncio.gather(async_tool(), async_tool())
            else:
                await asyncio.gather(asyncio.to_thread(tool), asyncio.to_thread(tool))
            assert line(coord) == ['thread "Waiter"']
        waiter.entered().go()

    asyncio.run(asyncio.wait_for(main(), 20))
    assert seen == [(1, 2, 30), (1, 3, 35)]
    assert (info(coord).requests_used, info(coord).tokens_used) == (4, 20)


def test_R1_a_borrower_whose_lenders_place_is_lent_takes_a_free_one_else_it_queues(coord: Coordinator) -> None:
    """The first child shares its lender's place, the second takes the free one, the third waits for either."""
    coord.limit("api", concurrency=2)
    lock = coord.lock("api")
    with lock:
        context = copy_context()
        first = Visitor(lock, "First", context).entered()
        assert info(coord).places_taken == 1
        second = Visitor(lock, "Second", context).entered()
        assert info(coord).places_taken == 2
        third = queued(coord, lock, "Third", context)
        fourth = queued(coord, lock, "Fourth", context)
        second.go()
        third.entered()
        assert line(coord) == ['thread "Fourth"']
        first.go()
        fourth.entered()
        assert info(coord).places_taken == 2
        third.go()
    assert info(coord).places_taken == 1
    fourth.go()


def test_R1_a_child_in_a_place_of_its_own_lends_it_to_its_own_children(coord: Coordinator) -> None:
    """Each borrows from its nearest ancestor that is inside, and a place is free when all who share it have left."""
    coord.limit("api", concurrency=2)
    lock = coord.lock("api")
    with lock:
        first = Visitor(lock, "First", copy_context()).entered()
        second = Visitor(lock, "Second", copy_context()).entered()
        grandchild = Visitor(lock, "Grandchild", second.context).entered()
        loans = [(holder.who[8:-1], holder.borrowed) for holder in coord.snapshot().locks[0].holders[1:]]
        assert loans == [("First", True), ("Second", False), ("Grandchild", True)]
        stranger = queued(coord, lock, "Stranger")
        second.go()
        assert not stranger.inside.is_set()
        grandchild.go()
        stranger.entered()
        first.go()
    stranger.go()


def test_R1_a_free_place_goes_to_the_line_before_it_goes_to_a_borrower(coord: Coordinator) -> None:
    """A borrower that needs a place of its own stands in line like anybody."""
    coord.limit("api", concurrency=2)
    lock = coord.lock("api")
    with lock:
        context = copy_context()
        other = Visitor(lock, "Other").entered()
        child = Visitor(lock, "Child", context).entered()
        stranger = queued(coord, lock, "Stranger")
        sibling = queued(coord, lock, "Sibling", context)
        other.go()
        stranger.entered()
        assert line(coord) == ['thread "Sibling"']
        child.go()
        sibling.entered().go()
        stranger.go()


def test_R1_a_borrower_that_waits_for_its_time_is_served_before_the_line(
    coord: Coordinator, clock: CountingClock
) -> None:
    """It needs no place, and nobody can leave before it has come in."""
    coord.limit("api", concurrency=1, requests=2, per=PER, margin=0)
    assert enters(coord.lock("api"))
    lock = coord.lock("api")
    with lock:
        stranger = queued(coord, lock, "Stranger")
        child = queued(coord, lock, "Child", copy_context())
        clock.wait_for_sleepers(1)
        clock.advance(PER)
        child.entered().go()
    stranger.entered().go()


def test_R1_children_of_one_block_come_in_a_few_at_a_time(coord: Coordinator) -> None:
    """Very many tasks started inside one block, under the same limit: as many at once as places allow, and all end."""
    coord.limit("api", concurrency=4)
    crowd = Crowd()

    async def child() -> None:
        async with coord.lock("api"):
            with crowd:
                await asyncio.sleep(0)

    async def main() -> None:
        async with coord.lock("api"):
            await asyncio.gather(*(child() for _ in range(300)))

    asyncio.run(main())
    assert (crowd.most, crowd.entered) == (4, 300)  # three beside the one who shares the lender's place


# -- generators ---------------------------------------------------------------------------------------------


def test_L2_a_generator_holds_its_place_between_its_steps(coord: Coordinator) -> None:
    """Until its end, its close or its collection, on whatever thread; one request, however many steps."""
    coord.limit("api", concurrency=2, requests=10, tokens=100, per=PER)

    @coord.coordinate("stream", lock_name="api", tokens=10)
    def stream() -> Iterator[int]:
        yield from range(3)

    lock = coord.lock("api")
    with Visitor(lock):
        streams = [stream() for _ in range(3)]
        ends: list[Any] = [list, lambda items: items.close(), None]
        for end in ends:
            items = streams.pop()
            assert in_thread(lambda items=items: next(items)) == 0
            assert not enters(lock)
            if end is not None:
                end(items)
            else:
                del items
                gc.collect()
            assert info(coord).places_taken == 1
    assert (info(coord).requests_used, info(coord).tokens_used) == (4, 30)


def test_L2_a_collected_generator_lets_the_next_one_in(coord: Coordinator) -> None:
    """Found by the collector on a thread that is inside the table's mutex."""
    coord.limit("api", concurrency=1)

    @coord.coordinate("stream", lock_name="api")
    def stream() -> Iterator[int]:
        yield 1

    items: list[Any] = [stream()]
    next(items[0])
    waiter = queued(coord, coord.lock("api"))
    items.append(items)
    gc.disable()
    try:
        del items
        with coord._table._mutex:
            gc.collect()
    finally:
        gc.enable()
    coord.snapshot()
    waiter.entered().go()


def test_L2_a_generator_is_reentrant_for_its_driver(coord: Coordinator) -> None:
    """What its step calls enters by its place, and `coord.slot` there is the generator's."""
    coord.limit("api", concurrency=1, requests=10, tokens=100, per=PER)
    slots: list[Slot] = []

    @coord.coordinate("stream", lock_name="api", tokens=10)
    def stream() -> Iterator[int]:
        with coord.lock("api", timeout=0, tokens=20) as slot:
            slots.extend((slot, coord.slot("api")))
            yield 1
        coord.slot("api").commit(tokens=1)
        yield 2

    assert list(stream()) == [1, 2]
    assert slots[0] is slots[1]
    assert (info(coord).requests_used, info(coord).tokens_used) == (2, 21)


def test_R3_slot_within_a_generator_is_the_generators_even_if_its_driver_is_inside(coord: Coordinator) -> None:
    """An agent that streams from another one under the same limit: each settles its own call."""
    coord.limit("api", concurrency=1, tokens=100, per=PER)

    @coord.coordinate("stream", lock_name="api", tokens=10)
    def stream() -> Iterator[int]:
        yield 1
        coord.slot("api").commit(tokens=3)

    @coord.coordinate("agent", lock_name="api", tokens=40)
    def agent() -> None:
        assert list(stream()) == [1]
        assert info(coord).tokens_used == 43
        coord.slot("api").commit(tokens=20)

    agent()
    assert info(coord).tokens_used == 23


@pytest.mark.parametrize("others", [0, 2])
def test_L8_a_block_in_an_abandoned_async_generator_is_released(coord: Coordinator, others: int) -> None:
    """The loop closes it by a task of its own: that ends the entry of whoever made it, beside others inside."""
    coord.limit("api", concurrency=3)

    async def stream() -> AsyncIterator[int]:
        async with coord.lock("api"):
            yield 1
            yield 2

    async def consume() -> None:
        async for _ in stream():
            break
        gc.collect()
        await until(lambda: info(coord).places_taken == others)

    problems: list[Any] = []

    async def main() -> None:
        asyncio.get_running_loop().set_exception_handler(lambda loop, context: problems.append(context))
        visitors = [Visitor(coord.lock("api")).entered() for _ in range(others)]
        await asyncio.ensure_future(consume())
        for visitor in visitors:
            visitor.go()

    asyncio.run(main())
    assert problems == []


# -- R4: pauses ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("declared", [{"concurrency": 3}, {"requests": 100}, {"tokens": 100}, None])
def test_R4_throttled_holds_back_everyone(coord: Coordinator, clock: CountingClock, declared: Any) -> None:
    """Newcomers, those in line, whoever enters again, and borrowers; until then and no longer; a plain lock too."""
    if declared:
        coord.limit("api", **declared)
    lock = coord.lock("api")
    with lock as slot:
        slot.throttled(retry_after=16)
        assert not enters(lock)
        assert lock.acquire(timeout=0) is False
        context = copy_context()
        assert in_thread(lambda: context.run(lambda: lock.acquire(timeout=0))) is False
        assert lock.locked()
    assert lock.locked()
    waiters = [queued(coord, lock, f"W{number}") for number in range(3)]
    clock.wait_for_sleepers(1)
    assert clock.timers == [16]
    clock.advance(15)
    assert len(line(coord)) == 3
    clock.advance(1)
    for waiter in waiters:
        waiter.leave.set()
    for waiter in waiters:
        waiter.entered().go()
    assert enters(lock)


def test_R4_the_longest_pause_counts(coord: Coordinator, clock: CountingClock) -> None:
    """A shorter one said later changes nothing; None is a second."""
    coord.limit("api", requests=1000)
    lock = coord.lock("api")
    with lock as slot:
        slot.throttled()
        assert info(coord).held_back_for == 1
        slot.throttled(retry_after=20)
        slot.throttled(retry_after=5)
        slot.throttled()
        slot.throttled(retry_after=0)
        assert info(coord).held_back_for == 20
    waiter = queued(coord, lock)
    clock.wait_for_sleepers(1)
    clock.advance(10)
    slot.throttled(retry_after=20)  # from now, and after the block
    assert info(coord).held_back_for == 20
    eventually(lambda: clock.timers == [20])
    clock.advance(20)
    waiter.entered().go()
    slot.throttled(retry_after=0)
    assert enters(lock)


@pytest.mark.parametrize("wrong", [-1, float("nan"), float("inf"), 10**400, True, "5"])
def test_R4_a_pause_that_makes_no_sense_is_refused(coord: Coordinator, wrong: Any) -> None:
    """What is no finite number, 0 or more; nothing is changed, a plain lock stays one."""
    kind = ValueError if isinstance(wrong, (int, float)) and wrong is not True else TypeError
    with coord.lock("api") as slot, pytest.raises(kind, match="retry_after"):
        slot.throttled(retry_after=wrong)
    assert coord.snapshot().limits == ()
    assert enters(coord.lock("api"))


def test_R4_a_lock_held_back_and_then_limited_stays_limited(coord: Coordinator, clock: CountingClock) -> None:
    """What was declared stays, and the pause goes on."""
    with coord.lock("api") as slot:
        slot.throttled(retry_after=5)
    coord.limit("api", concurrency=2)
    assert not enters(coord.lock("api"))
    clock.advance(5)
    with Visitor(coord.lock("api")):
        assert enters(coord.lock("api"))
    assert info(coord).concurrency == 2


@pytest.mark.parametrize("occasion", ["entry", "try", "look", "snapshot", "other name"])
def test_L9_a_lock_that_was_held_back_costs_nothing_when_that_is_over(
    coord: Coordinator, clock: CountingClock, occasion: str
) -> None:
    """Until then it is shown among the limits; then the next occasion makes it a lock like any other."""
    lock, table = coord.lock("api"), coord._table
    occasions: dict[str, Callable[[], Any]] = {
        "entry": lambda: enters(lock),
        "try": lambda: lock.acquire(timeout=0) and lock.release(),
        "look": lock.locked,
        "snapshot": coord.snapshot,
        "other name": lambda: table.hold_back("other", 0),
    }
    with lock as slot:
        slot.throttled(retry_after=16)
        slot.throttled(retry_after=8)
    waiter = queued(coord, lock)
    clock.wait_for_sleepers(1)
    clock.advance(8)
    occasions[occasion]()
    assert info(coord).held_back_for == 8
    clock.advance(8)
    waiter.entered()
    occasions[occasion]()
    assert inside(coord) == ['thread "Waiter"']
    waiter.go()
    assert table.entries == table.slots == {}
    slot.throttled(retry_after=4)
    clock.advance(4)
    occasions[occasion]()
    assert table.entries == table.slots == {}
    assert enters(lock)


def test_L9_ten_thousand_locks_held_back_one_after_another_leave_no_table(
    coord: Coordinator, clock: CountingClock
) -> None:
    """Each makes those go whose pause is over."""
    for number in range(10_000):
        with coord.lock(f"api-{number}") as slot:
            slot.throttled(retry_after=4)
        clock.advance(1)
        assert len(coord._table.entries) <= 4
    clock.advance(4)
    assert nothing_left(coord)


def test_L9_a_lock_becomes_one_again_only_when_whoever_took_it_meanwhile_has_seen_that_it_was_none() -> None:
    """It is taken the quick way in the very moment in which it is held back, between its holder's leaving and that."""
    closing, gone, taken, held_back, leave = (threading.Event() for _ in range(5))

    def who() -> str:
        return threading.current_thread().name

    class Slots(dict):  # type: ignore[type-arg]
        def __delitem__(self, key: Any) -> None:
            if who() == "Former" and not closing.is_set():  # it has seen nobody
                others["Pause"].start()
                assert closing.wait(10)
            super().__delitem__(key)
            gone.set()

        def setdefault(self, key: Any, default: Any = None) -> Any:
            if who() == "Pause" and not closing.is_set():
                closing.set()
                assert taken.wait(10)
            found = super().setdefault(key, default)
            if who() == "Newcomer" and not taken.is_set():  # it looks now whether anybody is there
                taken.set()
                assert held_back.wait(10)
            return found

    def pause() -> None:
        table.hold_back("api", 0)
        held_back.set()

    def visit() -> None:
        assert gone.wait(10)
        with lock:
            entered.set()
            assert leave.wait(10)

    storage = iter([Slots(), {}])
    table = LockTable(FakeClock(), slow_after=None, storage=lambda: next(storage))
    lock, entered = Lock(table, "api"), threading.Event()
    programs = {"Former": lambda: by_with(lock), "Pause": pause, "Newcomer": visit}
    others = {name: threading.Thread(target=run, name=name, daemon=True) for name, run in programs.items()}
    others["Former"].start()
    others["Newcomer"].start()
    assert entered.wait(10)
    assert not enters(lock)
    leave.set()
    join_all(list(others.values()))
    assert enters(lock)
    assert table.entries == table.slots == {}


def test_R4_a_lock_held_back_is_no_limit_that_was_declared(coord: Coordinator) -> None:
    """What `isolated` brings back is what was declared."""
    with coord.lock("api") as slot:
        slot.throttled(retry_after=5)
    with coord.isolated():
        assert coord._table.declared() == {}
    assert coord._table.declared() == {}


class TooManyRequests(Exception):
    def __init__(self, **headers: Any) -> None:
        super().__init__("429")
        self.response = SimpleNamespace(headers={name.replace("_", "-"): said for name, said in headers.items()})


def nonsense(**fields: Any) -> Exception:
    error = Exception("429")
    error.__dict__.update(fields)
    return error


class Broken:
    @property
    def headers(self) -> Any:
        raise RuntimeError("no headers were read")


NOW = 1_001_000.0  # what the fake clock says the date is


@pytest.mark.parametrize(
    ("error", "seconds"),
    [
        (TooManyRequests(retry_after="20"), 20),
        (TooManyRequests(retry_after="0.5"), 0.5),
        (TooManyRequests(retry_after=7), 7),
        (TooManyRequests(retry_after=b"8"), 8),
        (TooManyRequests(retry_after="0"), 0),
        (TooManyRequests(retry_after_ms="1500"), 1.5),
        (TooManyRequests(retry_after_ms="1500", retry_after="2"), 1.5),
        (TooManyRequests(retry_after_ms="soon", retry_after="2"), 2),
        (TooManyRequests(retry_after=formatdate(NOW + 90, usegmt=True)), 90),
        (TooManyRequests(retry_after=formatdate(NOW + 90)), 90),
        (TooManyRequests(retry_after=formatdate(NOW - 90, usegmt=True)), 0),
        (TooManyRequests(retry_after="in a while"), None),
        (TooManyRequests(retry_after=""), None),
        (TooManyRequests(retry_after="-5"), None),
        (TooManyRequests(retry_after="nan"), None),
        (TooManyRequests(retry_after="inf"), None),
        (TooManyRequests(retry_after="9" * 400), None),
        (TooManyRequests(retry_after="Fri, 99 Nov 2026 99:00:00 GMT"), None),
        (TooManyRequests(retry_after=["20"]), None),
        (TooManyRequests(), None),
        (nonsense(), None),
        (nonsense(response=None), None),
        (nonsense(response=SimpleNamespace(headers=None)), None),
        (nonsense(response=SimpleNamespace(headers=[("retry-after", "5")])), None),
        (nonsense(response=Broken()), None),
    ],
)
def test_R4_how_long_is_read_off_the_errors_response(
    coord: Coordinator, error: Exception, seconds: Optional[float]
) -> None:
    """Milliseconds, seconds, a date; a second where nothing can be read; the error goes on unchanged."""
    assert retry_after(error, NOW) == seconds
    coord.limit("api", requests=1000)

    @coord.coordinate("agent", lock_name="api", throttle_on=(KeyError, Exception))
    def agent() -> None:
        raise error

    with pytest.raises(Exception, match="429") as caught:
        agent()
    assert caught.value is error
    assert info(coord).held_back_for == (1 if seconds is None else seconds)


@pytest.mark.parametrize("kind", AGENTS)
@pytest.mark.parametrize("heard", [False, True])
def test_R4_nobody_comes_in_between_the_429_and_the_pause(
    coord: Coordinator, clock: CountingClock, kind: str, heard: bool
) -> None:
    """The next in line stands there when the error comes; it gets the place after the pause, not at once."""
    coord.limit("api", concurrency=1)
    subscription = coord.on("agent_failed", lambda data: None) if heard else None
    waiters: list[Visitor] = []

    def fail() -> None:
        raise TooManyRequests(retry_after="20")

    call = agents(coord, fail, throttle_on=TooManyRequests)[kind]
    with contextlib.ExitStack() as stack:
        stack.enter_context(Visitor(coord.lock("api")))
        threads = start_all(lambda: pytest.raises(TooManyRequests, call))  # noqa: RUF061
        eventually(lambda: line(coord))
        waiters.append(queued(coord, coord.lock("api"), "Next"))
    join_all(threads)
    assert line(coord) == ['thread "Next"']
    assert info(coord).held_back_for == 20
    clock.wait_for_sleepers(1)
    clock.advance(20)
    waiters[0].entered().go()
    if subscription is not None:
        subscription.cancel()


def test_R4_other_errors_and_waits_hold_back_nobody(coord: Coordinator) -> None:
    """Only the types that were named, and only what the agent itself raised inside."""
    coord.limit("api", concurrency=1)

    @coord.coordinate("agent", lock_name="api", throttle_on=(TooManyRequests, CoordinationTimeoutError), timeout=0)
    def agent(error: Exception) -> None:
        raise error

    with pytest.raises(ValueError, match="mine"):
        agent(ValueError("mine"))
    with Visitor(coord.lock("api")), pytest.raises(CoordinationTimeoutError):
        agent(ValueError("never called"))
    assert info(coord).held_back_for == 0
    for wrong in ("TooManyRequests", [TooManyRequests], None, 429, TooManyRequests()):
        with pytest.raises(TypeError, match="throttle_on"):
            coord.coordinate("agent", lock_name="api", throttle_on=wrong)  # type: ignore[arg-type]


# -- R5: what is no limit -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("declared", "error", "says"),
    [
        ({}, ValueError, "at least one of concurrency, requests and tokens"),
        ({"per": 5}, ValueError, "at least one of"),
        *[({part: 0}, ValueError, f"{part} must be at least 1") for part in ("concurrency", "requests", "tokens")],
        *[({part: -3}, ValueError, f"{part} must be at least 1") for part in ("concurrency", "requests", "tokens")],
        *[
            ({part: wrong}, TypeError, f"{part} must be a whole number or None")
            for part in ("concurrency", "requests", "tokens")
            for wrong in (True, 1.0, "4", float("inf"), [1])
        ],
        ({"requests": 1, "concurrency": 0}, ValueError, "concurrency must be"),
        ({"requests": 1, "per": 0}, ValueError, "per must be more than 0"),
        ({"requests": 1, "per": -1}, ValueError, "per must be"),
        ({"requests": 1, "per": float("nan")}, ValueError, "per must be"),
        ({"requests": 1, "per": float("inf")}, ValueError, "per must be"),
        ({"requests": 1, "per": 10**400}, ValueError, "per must be"),
        ({"requests": 1, "per": "60"}, TypeError, "per must be a number"),
        ({"requests": 1, "per": None}, TypeError, "per must be a number"),
        ({"requests": 1, "per": True}, TypeError, "per must be a number"),
        ({"requests": 1, "margin": -0.1}, ValueError, "margin must be"),
        ({"requests": 1, "margin": float("inf")}, ValueError, "margin must be"),
        ({"requests": 1, "margin": None}, TypeError, "margin must be a number"),
    ],
)
def test_R5_bad_limits_are_refused_where_they_are_declared(
    coord: Coordinator, declared: dict[str, Any], error: type[Exception], says: str
) -> None:
    """Each with what is wrong about it, and nothing is changed: neither a lock nor a limit that was there."""
    with pytest.raises(error, match=says):
        coord.limit("api", **declared)
    assert coord.snapshot().limits == ()
    coord.limit("api", concurrency=7)
    with pytest.raises(error, match=says):
        coord.limit("api", **declared)
    assert info(coord).concurrency == 7


@pytest.mark.parametrize(("name", "error"), [("", ValueError), (None, TypeError), (3, TypeError), (b"api", TypeError)])
def test_R5_a_limits_name_is_a_non_empty_string(coord: Coordinator, name: Any, error: type[Exception]) -> None:
    """As for a lock."""
    with pytest.raises(error, match="name must"):
        coord.limit(name, concurrency=1)
    with pytest.raises(error, match="name must"):
        coord.slot(name)


def test_R5_exactly_what_the_limit_allows_is_possible(coord: Coordinator) -> None:
    """The whole of a window in one call."""
    coord.limit("api", tokens=1_234_567)
    assert enters(coord.lock("api", tokens=1_234_567))
    with pytest.raises(ValueError, match="1234568 tokens can never be had from limit 'api': it allows 1234567 in 60 s"):
        coord.lock("api", tokens=1_234_568).acquire(timeout=0)


# -- changing a limit ---------------------------------------------------------------------------------------


def test_R1_another_rate_takes_effect_at_once_for_those_who_wait(coord: Coordinator, clock: CountingClock) -> None:
    """More requests, a shorter window, fewer requests; what was used before still counts."""
    coord.limit("api", requests=1, per=PER, margin=0)
    assert enters(coord.lock("api"))
    waiters = [queued(coord, coord.lock("api"), f"W{number}") for number in range(4)]
    clock.wait_for_sleepers(1)
    coord.limit("api", requests=2, per=PER, margin=0)
    waiters[0].entered().go()
    eventually(lambda: clock.timers == [PER])
    coord.limit("api", requests=2, per=2 * PER, margin=0.5)
    eventually(lambda: clock.timers == [2 * PER + 0.5])
    clock.advance(16)
    coord.limit("api", requests=2, per=16, margin=0)
    waiters[1].entered().go()
    waiters[2].entered().go()
    eventually(lambda: clock.timers == [16])
    coord.limit("api", tokens=100, concurrency=5)
    waiters[3].entered().go()


def test_L11_a_limit_that_was_lowered_says_when_enough_have_left_its_window(
    coord: Coordinator, clock: CountingClock
) -> None:
    """All but one of those that entered under the old one must be out."""
    coord.limit("api", requests=3, per=PER, margin=0)
    for _ in range(3):
        assert enters(coord.lock("api"))
        clock.advance(8)
    coord.limit("api", requests=1, per=PER, margin=0)
    assert info(coord).next_free == PER - 8


def test_R5_tokens_that_have_become_impossible_are_refused_in_the_waiter(coord: Coordinator) -> None:
    """The limit is lowered while threads and tasks wait: those who can never come in are told, the others go on."""
    coord.limit("api", tokens=100, per=PER)
    lock = coord.lock("api")

    async def main() -> None:
        with coord.lock("api", tokens=60) as slot:
            thread = queued(coord, coord.lock("api", tokens=50), "Thread")
            task = Context().run(asyncio.ensure_future, coord.lock("api", tokens=45).acquire_async(timeout=1000))
            await until(lambda: len(line(coord)) == 2)
            small = queued(coord, coord.lock("api", tokens=35), "Small")
            coord.limit("api", tokens=40, per=PER)
            with pytest.raises(ValueError, match="45 tokens can never be had from limit 'api': it allows 40"):
                await task
            error = thread.ended()
            assert isinstance(error, ValueError)
            assert "50 tokens" in str(error)
            assert line(coord) == ['thread "Small"']
            slot.commit(tokens=5)
            small.entered().go()

    asyncio.run(main())
    assert lock.locked() is False


def test_R1_a_lock_becomes_a_limit_while_it_is_held_and_waited_for(coord: Coordinator) -> None:
    """The holder has one of the places, borrowers share it, and as many of the line come in as there is room for."""
    lock = coord.lock("api")
    with lock as slot:
        child = Visitor(lock, "Child", copy_context()).entered()
        sibling = queued(coord, lock, "Sibling", copy_context())
        strangers = [queued(coord, lock, f"S{number}") for number in range(3)]
        coord.limit("api", concurrency=2, requests=100, per=PER)
        sibling.entered()
        assert info(coord).places_taken == 2
        assert [holder.borrowed for holder in coord.snapshot().locks[0].holders] == [False, True, False]
        slot.commit(tokens=5)
        with lock as again:
            assert again is slot
        assert len(line(coord)) == 3
    child.go()
    strangers[0].entered()
    sibling.go()
    strangers[1].entered()
    for visitor in strangers:
        visitor.go()
    assert info(coord).requests_used == 5  # whoever came in when it was a lock is not counted


@pytest.mark.parametrize("borrowers", [0, 1])
@pytest.mark.parametrize("limit", [{"concurrency": 1}, {"concurrency": 2}, {"requests": 100}])
def test_R1_a_holder_may_leave_the_quick_way_just_after_its_lock_has_become_a_limit(
    borrowers: int, limit: dict[str, Any]
) -> None:
    """It has looked for others before the limit was there: its place is free, or stays its borrower's."""
    hooks: list[Callable[[], Any]] = []

    class Slots(dict):  # type: ignore[type-arg]
        def __delitem__(self, key: Any) -> None:
            while hooks:
                hooks.pop()()
            super().__delitem__(key)

    storage = iter([Slots(), {}])
    coord = Coordinator(clock=FakeClock())
    coord._table = LockTable(FakeClock(), slow_after=None, storage=lambda: next(storage))
    del coord.lock  # the short way, to the table that was there
    lock = coord.lock("api")
    visitors: list[Visitor] = []

    def happen() -> None:
        if borrowers:
            visitors.append(Visitor(lock, "Child", context).entered())
        coord.limit("api", **limit)
        assert info(coord).places_taken == 1
        if limit == {"concurrency": 1}:
            visitors.append(queued(coord, lock, "Stranger"))
        else:
            visitors.append(Visitor(lock, "Stranger").entered())

    lock.acquire()
    context = copy_context()
    hooks.append(happen)
    lock.__exit__(None, None, None)
    assert info(coord).places_taken == (2 if borrowers and limit != {"concurrency": 1} else 1)
    for visitor in visitors:
        visitor.go()
    assert nothing_left(coord)
    assert enters(lock)


def test_R1_one_who_was_let_in_when_it_was_a_lock_may_give_up_when_it_is_a_limit(coord: Coordinator) -> None:
    """Cancelled between its turn and its waking up, with the limit declared in between: the place is free."""
    lock = coord.lock("api")

    async def main() -> None:
        await lock.acquire_async()
        task = Context().run(asyncio.ensure_future, lock.acquire_async())
        await until(lambda: line(coord))
        lock.release()
        coord.limit("api", concurrency=1)
        assert info(coord).places_taken == 1
        task.cancel()
        await asyncio.wait([task])
        assert info(coord).places_taken == 0

    asyncio.run(main())
    assert enters(lock)


def test_R1_a_limit_may_be_declared_before_during_and_after(coord: Coordinator) -> None:
    """Handles made before obey it, agents decorated before too."""
    lock = coord.lock("api")
    seen: list[int] = []

    @coord.coordinate("agent", lock_name="api")
    def agent() -> None:
        seen.append(info(coord).places_taken if coord.snapshot().limits else -1)

    agent()
    with lock:
        coord.limit("api", concurrency=3)
    agent()
    coord.limit("api", requests=2)
    agent()
    agent()
    assert seen == [-1, 1, 1, 1]
    assert lock.locked()


# -- L4: time -----------------------------------------------------------------------------------------------


def test_L4_a_thread_waits_for_its_time_or_its_timeout_whichever_comes_first(
    coord: Coordinator, clock: CountingClock
) -> None:
    """And no longer; tasks likewise, as random traffic shows."""
    coord.limit("api", requests=1, per=PER, margin=0)
    assert enters(coord.lock("api"))
    answers: list[bool] = []
    for timeout, slept in ((16, 16), (1000, PER - 16)):
        threads = start_all(lambda timeout=timeout: answers.append(attempt(coord.lock("api"), timeout)))
        clock.wait_for_sleepers(1)
        assert clock.timers == [slept]
        clock.advance(slept)
        join_all(threads)
    assert answers == [False, True]


def test_L4_whoevers_time_comes_in_the_moment_of_its_timeout_gets_in(coord: Coordinator, clock: CountingClock) -> None:
    """However late it wakes up: its time had come."""
    coord.limit("api", requests=1, per=PER, margin=0)
    assert enters(coord.lock("api"))
    answers: list[bool] = []
    threads = start_all(lambda: answers.append(attempt(coord.lock("api"), PER + 1)))
    clock.wait_for_sleepers(1)
    clock.advance(2 * PER)
    join_all(threads)
    assert answers == [True]


def test_L4_the_error_says_what_is_used_and_who_is_inside(coord: Coordinator, clock: CountingClock) -> None:
    """With no place: a holder, since when, how many; with places, but no time: when the next may enter."""
    coord.limit("api", concurrency=1, requests=500, tokens=30_000, margin=0)
    with Visitor(coord.lock("api", tokens=29_000), "Holder"):
        clock.advance(7)
        with pytest.raises(CoordinationTimeoutError) as caught:
            coord.lock("api", timeout=0).__enter__()
    assert str(caught.value) == (
        'lock \'api\' is not free for thread "MainThread": held for 7 s by thread "Holder"; 1 of 1 places are taken; '
        "1 of 500 requests in 60 s are used; 29000 of 30000 tokens in 60 s are used; the next may enter when somebody "
        "leaves"
    )
    assert (caught.value.held_for, caught.value.holder, caught.value.timeout) == (7, 'thread "Holder"', 0)
    coord.limit("api", concurrency=2, requests=1, margin=0)
    other = queued(coord, coord.lock("api"))
    with pytest.raises(CoordinationTimeoutError) as caught:
        coord.lock("api", timeout=0).__enter__()
    assert str(caught.value) == (
        "lock 'api' is not free for thread \"MainThread\": 0 of 2 places are taken; 1 of 1 requests in 60 s are used; "
        "the next may enter in 53 s; 1 other waiting"
    )
    assert (caught.value.held_for, caught.value.holder, caught.value.waiting) == (None, None, 1)
    clock.wait_for_sleepers(1)
    clock.advance(53)
    other.entered().go()


# -- A1: functions that return a coroutine or a generator ---------------------------------------------------


Kind = Callable[[Body], Any]


def a_coroutine(body: Body) -> Any:
    async def run() -> Any:
        return body()

    return run()


def a_generator(body: Body) -> Any:
    return (body() for _ in range(1))


def an_async_generator(body: Body) -> Any:
    async def run() -> AsyncIterator[Any]:
        yield body()

    return run()


def run_it(live: Any) -> None:
    """Await it, or iterate over it."""

    async def to_the_end() -> None:
        if hasattr(live, "__aiter__"):
            async for _ in live:
                pass
        else:
            await live

    if hasattr(live, "__next__"):
        list(live)
    else:
        asyncio.run(to_the_end())


def returning(coord: Coordinator, kind: Kind, way: str, body: Body = int) -> Callable[[], Any]:
    """An agent that is a plain function and returns such a thing: unheard, heard, or with tokens that it reckons."""
    if way == "heard":
        coord.on("agent_complete")(lambda data: None)
    tokens: dict[str, Any] = {"tokens": lambda: 10} if way == "tokens" else {}
    agent: Callable[[], Any] = coord.coordinate("agent", lock_name="api", **tokens)(lambda: kind(body))
    return agent


KINDS = [a_coroutine, a_generator, an_async_generator]


@pytest.mark.parametrize("way", ["quick", "heard", "tokens"])
@pytest.mark.parametrize("kind", KINDS)
def test_A1_a_function_that_returns_a_coroutine_or_a_generator_counts_once(
    coord: Coordinator, clock: CountingClock, kind: Kind, way: str
) -> None:
    """Where it is called; what it returns takes a place while it runs, and settles what was reserved."""
    coord.limit("api", concurrency=1, requests=2, tokens=10, per=PER, margin=0)
    seen: list[Any] = []

    def body() -> None:
        seen.append(info(coord).places_taken)
        coord.slot("api").commit(tokens=3)

    live = returning(coord, kind, way, body)()
    assert (info(coord).places_taken, info(coord).requests_used) == (0, 1)
    assert info(coord).tokens_used == (10 if way == "tokens" else 0)
    clock.advance(PER / 2)
    run_it(live)
    assert seen == [1]
    assert (info(coord).places_taken, info(coord).requests_used, info(coord).tokens_used) == (0, 1, 3)
    clock.advance(PER / 2)
    assert (info(coord).requests_used, info(coord).tokens_used) == (0, 0)


@pytest.mark.parametrize("way", ["quick", "heard"])
@pytest.mark.parametrize("kind", KINDS)
def test_A1_what_has_been_counted_waits_for_no_time_and_for_a_place_before_the_line(
    coord: Coordinator, clock: CountingClock, kind: Kind, way: str
) -> None:
    """It was let in once: those in line wait for their first."""
    coord.limit("api", concurrency=1, requests=2, per=PER, margin=0)
    order: list[str] = []
    lives = [returning(coord, kind, way, lambda: order.append("returned"))() for _ in range(2)]
    waiter = queued(coord, coord.lock("api"))
    run_it(lives[0])
    assert order == ["returned"]
    clock.wait_for_sleepers(1)
    clock.advance(PER)
    waiter.entered()
    assert enters(coord.lock("api")) is False
    other = queued(coord, coord.lock("api"))
    runner = start_all(lambda: run_it(lives[1]))
    eventually(lambda: len(line(coord)) == 2)
    waiter.go()
    join_all(runner)
    other.entered().go()
    assert info(coord).requests_used == 2


def test_L5_what_has_been_counted_waits_for_those_only_who_have_the_places(coord: Coordinator) -> None:
    """A group that waits for me has the last request, which I don't need any more; somebody else has a place."""
    coord.limit("api", concurrency=2, requests=3)

    async def main() -> None:
        live = returning(coord, a_coroutine, "heard")()
        other = Visitor(coord.lock("api")).entered()
        async with coord.lock("b"):
            group = Visitor(coord.lock("api", "b"))
            await until(lambda: line(coord, "b"))
            coord.limit("api", concurrency=2, requests=1)
            helper = start_all(lambda: (eventually(lambda: line(coord)), other.go()))
            await live
        join_all(helper)
        group.entered().go()

    asyncio.run(main())


def test_A1_within_a_block_it_counts_beside_the_block(coord: Coordinator) -> None:
    """What it commits is its own."""
    coord.limit("api", concurrency=1, tokens=100)

    @coord.coordinate("agent", lock_name="api", tokens=20)
    def agent() -> Iterator[None]:
        return (coord.slot("api").commit(tokens=5) for _ in range(1))

    with coord.lock("api", tokens=30) as slot:
        live = agent()
        assert info(coord).tokens_used == 50
        run_it(live)
        assert info(coord).tokens_used == 35
        slot.commit(tokens=1)
    assert (info(coord).requests_used, info(coord).tokens_used) == (2, 6)


@pytest.mark.filterwarnings("ignore:coroutine .* was never awaited")
@pytest.mark.parametrize("kind", KINDS)
def test_A1_what_is_never_run_counts_where_the_function_was_called(coord: Coordinator, kind: Kind) -> None:
    """It leaves no place taken."""
    coord.limit("api", concurrency=1, requests=2)
    live = returning(coord, kind, "heard")()
    del live
    gc.collect()
    assert enters(coord.lock("api"))
    assert info(coord).requests_used == 2


# -- L3: no polling -----------------------------------------------------------------------------------------


def test_L3_only_the_head_of_the_tasks_in_line_has_a_timer(coord: Coordinator, clock: CountingClock) -> None:
    """On a loop likewise."""
    coord.limit("api", tokens=10, per=PER, margin=0)
    assert enters(coord.lock("api", tokens=10))

    async def main() -> None:
        tasks = [asyncio.ensure_future(by_acquire_async(coord.lock("api", tokens=10))) for _ in range(50)]
        await until(lambda: len(line(coord)) == 50)
        for task in tasks:
            await until(lambda: clock.timers == [PER])
            clock.advance(PER)
            await task

    asyncio.run(main())
    assert clock.waits[True] == 50


def test_L3_waiting_for_a_place_needs_no_timer(coord: Coordinator, clock: CountingClock) -> None:
    """However long, and whatever happens at other names."""
    coord.limit("api", concurrency=1, requests=100, per=PER)
    coord.limit("other", requests=100, per=PER)
    with Visitor(coord.lock("api")):
        waiters = [queued(coord, coord.lock("api")) for _ in range(5)]
        for _ in range(10):
            assert enters(coord.lock("other"))
            clock.advance(PER)
        eventually(lambda: sum(clock.waits.values()) == 5)
        assert clock.waits[True] == 0
    for waiter in waiters:
        waiter.leave.set()
    for waiter in waiters:
        waiter.go()


# -- L3: who watches the clock ------------------------------------------------------------------------------


def busy_loop(lock: Any) -> tuple[threading.Event, list[threading.Thread]]:
    """A task waits on a loop that is busy then, until the event is set."""
    busy, free = threading.Event(), threading.Event()

    async def main() -> None:
        task = asyncio.ensure_future(by_acquire_async(lock))
        await asyncio.sleep(0)
        busy.set()
        assert free.wait(30)
        await task

    threads = start_all(lambda: asyncio.run(main()))
    assert busy.wait(10)
    return free, threads


@pytest.mark.parametrize("behind", ["thread", "loop"])
@pytest.mark.parametrize("limit", [{"requests": 2}, {"tokens": 20}])
def test_L3_a_busy_loop_at_the_head_holds_up_nobody_whose_time_has_come(
    coord: Coordinator, clock: CountingClock, limit: dict[str, int], behind: str
) -> None:
    """The first of every loop, and the first thread, watches the clock: whoever is awake lets all of them in."""
    coord.limit("api", **limit, per=PER, margin=0)
    lock = coord.lock("api", tokens=10)
    assert enters(lock)
    assert enters(lock)
    free, threads = busy_loop(lock)
    waiter = start_all((lambda: asyncio.run(by_acquire_async(lock))) if behind == "loop" else lambda: by_with(lock))
    clock.wait_for_sleepers(2)
    clock.advance(PER)
    join_all(waiter)
    assert info(coord).requests_used == 2  # the busy one has been let in, too
    free.set()
    join_all(threads)


@pytest.mark.parametrize("behind", ["thread", "loop"])
def test_L3_a_closed_loop_at_the_head_is_passed_over_when_its_time_comes(
    coord: Coordinator, clock: CountingClock, behind: str
) -> None:
    """Nobody but the waiters behind it is there to see that."""
    coord.limit("api", requests=1, per=PER, margin=0)
    lock = coord.lock("api")
    assert enters(lock)
    tasks = [closed_loop(lock) for _ in range(3)]
    waiter = start_all((lambda: asyncio.run(by_acquire_async(lock))) if behind == "loop" else lambda: by_with(lock))
    eventually(lambda: len(line(coord)) == 4)
    eventually(lambda: clock.timers == [PER] * 4)
    clock.advance(PER)
    join_all(waiter)
    drop(tasks)


def test_L3_one_whose_loop_was_closed_before_it_could_enter_gives_its_turn_back(
    coord: Coordinator, clock: CountingClock
) -> None:
    """Its request, its tokens and its place are the next one's, as soon as anybody looks."""
    coord.limit("api", concurrency=1, requests=1, tokens=10, per=PER, margin=0)
    lock = coord.lock("api", tokens=10)
    loop = asyncio.new_event_loop()
    with Visitor(lock):
        task = loop.create_task(lock.acquire_async())
        loop.run_until_complete(asyncio.sleep(0))
        clock.advance(PER)
    assert inside(coord) == [f'task "{task.get_name()}"']
    assert info(coord).tokens_used == 10
    loop.close()
    assert enters(lock)
    assert inside(coord) == []
    drop([task])


# -- L11: what a snapshot and explain() say -----------------------------------------------------------------


def test_L12_a_slow_wait_for_a_time_is_logged_once(caplog: pytest.LogCaptureFixture, clock: CountingClock) -> None:
    """With what is used, and when the next may enter; and then the wait goes on."""
    with Coordinator(clock=clock, slow_after=16) as coord:
        coord.limit("api", requests=1, per=PER, margin=0)
        assert enters(coord.lock("api"))
        waiter = queued(coord, coord.lock("api"))
        clock.wait_for_sleepers(1)
        clock.advance(16)
        eventually(lambda: clock.timers == [PER - 16])
        clock.advance(PER - 16)
        waiter.entered().go()
    (record,) = caplog.records
    assert "has waited 16 s for lock 'api'" in record.getMessage()
    assert "the next may enter in 48 s" in record.getMessage()


@pytest.mark.parametrize("limit", [{"concurrency": 1}, {"requests": 1}, {"tokens": 10}])
def test_L10_locked_says_whether_nobody_new_would_get_in(
    coord: Coordinator, clock: CountingClock, limit: dict[str, int]
) -> None:
    """Whichever part is exhausted; and a group if any of its locks is."""
    coord.limit("api", **limit, per=PER, margin=0)
    lock = coord.lock("api", tokens=10)
    assert not lock.locked()
    with lock:
        assert lock.locked() is ("tokens" not in limit)
        assert coord.lock("api", "b").locked() is ("tokens" not in limit)
        assert repr(lock) == ("<Lock 'api'>" if "tokens" in limit else "<Lock 'api' locked>")
    assert lock.locked() is ("requests" in limit)
    clock.advance(PER)
    assert not lock.locked()
    with coord.lock("api", tokens=5) as slot:
        if "tokens" in limit:
            slot.commit(tokens=11)
            assert lock.locked()
    clock.advance(PER)
    assert not lock.locked()


def test_L11_next_free_is_when_the_head_of_the_line_can_enter(coord: Coordinator, clock: CountingClock) -> None:
    """With the tokens that it asks for, or None while it waits for a place; without a line, a call without tokens."""
    coord.limit("api", concurrency=2, tokens=100, per=PER, margin=0)
    assert enters(coord.lock("api", tokens=60))
    clock.advance(16)
    assert info(coord).next_free == 0
    with Visitor(coord.lock("api", tokens=40)) as first:
        assert info(coord).next_free == 0
        waiter = queued(coord, coord.lock("api", tokens=80))
        assert info(coord).next_free == PER  # both must be over
        first.slot.commit(tokens=10)
        assert info(coord).next_free == PER - 16
        assert "the next may enter in 48 s" in coord.explain()
        coord.limit("api", concurrency=1, tokens=100, per=PER, margin=0)
        assert info(coord).next_free is None
        first.slot.throttled(retry_after=128)
        assert info(coord).next_free is None
    eventually(lambda: clock.timers == [128])
    clock.advance(16)
    assert info(coord).next_free == 112
    clock.advance(112)
    waiter.entered().go()
    assert info(coord).next_free == 0


# -- coord.slot, the facade, fork ---------------------------------------------------------------------------


def test_R3_slot_gives_the_callers_slot(coord: Coordinator) -> None:
    """Of a limit and of a plain lock, on threads and tasks; who is not inside is told so."""
    coord.limit("api", concurrency=2)
    for name in ("api", "plain"):
        with pytest.raises(NotHeldError, match=f"not inside '{name}'") as caught:
            coord.slot(name)
        assert caught.value.name == name
        with coord.lock(name) as slot:
            assert coord.slot(name) is slot
            assert in_thread(lambda name=name: pytest.raises(NotHeldError, coord.slot, name))  # noqa: RUF061
            with Visitor(coord.lock(name), "Child", copy_context()) as child:
                assert child.slot is not slot
                assert coord.slot(name) is slot

        async def main(name: str = name) -> None:
            async with coord.lock(name) as slot:
                assert coord.slot(name) is slot

        asyncio.run(main())
    assert coord._table.entries.keys() == {"api"}


def test_F1_limit_acts_on_the_default_coordinator(fresh_default: Coordinator) -> None:
    """The facade takes what the method takes."""
    agentdiff.limit("api", concurrency=1, requests=2, tokens=3, per=4, margin=0.5)
    found = info(fresh_default)
    assert (found.concurrency, found.requests, found.tokens, found.per, found.margin) == (1, 2, 3, 4, 0.5)
    with agentdiff.lock("api", tokens=3) as slot:
        assert not enters(agentdiff.lock("api"))
        slot.commit(tokens=1)
    assert info(fresh_default).tokens_used == 1
    with pytest.raises(ValueError, match="at least one of"):
        agentdiff.limit("api")
