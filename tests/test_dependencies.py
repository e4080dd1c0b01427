from __future__ import annotations

import asyncio
import contextlib
import itertools
import pickle
import threading

import pytest
from support import eventually, join_all, start_all, yielding_at_opcodes

from agentdiff import CoordinationTimeoutError, Coordinator, DeadlockError, DependencyFailedError
from agentdiff.testing import FakeClock


@pytest.fixture
def order():
    return []


def waits(coord, name):
    """Whether an agent of this name is waiting for another."""
    return any(agent.name == name and agent.waits_for for agent in coord.snapshot().agents)


def agents_of(coord, order):
    """Two researchers, and an analyst that comes after both."""

    @coord.coordinate("analyst", after=("researcher", "fact_checker"))
    def analyst():
        order.append("analyst")

    @coord.coordinate("researcher")
    def researcher():
        order.append("researcher")

    @coord.coordinate("fact_checker")
    def fact_checker():
        order.append("fact_checker")

    return researcher, fact_checker, analyst


def in_run(coord, run, work):
    """What a thread of a run does."""

    def job():
        with coord.run(run):
            work()

    return job


# -- never too early ----------------------------------------------------------------------------------------


def test_A5_an_agent_does_not_start_before_those_it_comes_after(coord):
    """100 runs, their threads started in every order; each run only looks at its own agents."""
    orders = {}
    threads = []
    with contextlib.ExitStack() as runs:
        for number in range(100):
            orders[number] = order = []
            jobs = list(itertools.permutations(agents_of(coord, order)))[number % 6]
            runs.enter_context(coord.run(f"r{number}"))  # open until its threads have ended, however late they start
            threads += start_all(*(in_run(coord, f"r{number}", job) for job in jobs))
            if number % 10 == 9:
                join_all(threads)
    assert all(sorted(order[:2]) == ["fact_checker", "researcher"] for order in orders.values())
    assert all(order[2:] == ["analyst"] for order in orders.values())


def test_A5_nothing_is_missed_whatever_the_threads_do(order):
    """The end of the dependency meets the beginning of the wait at every step."""
    for seed in range(25):
        with Coordinator() as coord, yielding_at_opcodes(0.1, seed):
            researcher, fact_checker, analyst = agents_of(coord, order)
            with coord.run("r"):
                join_all(start_all(*(in_run(coord, "r", job) for job in (analyst, researcher, fact_checker))))
    assert order[2::3] == ["analyst"] * 25


def test_A5_what_has_completed_before_is_remembered_within_the_run(coord, order):
    """Without waiting; also for who comes later and later."""
    researcher, fact_checker, analyst = agents_of(coord, order)
    with coord.run("r"):
        researcher()
        fact_checker()
        analyst()
        analyst()
    assert order == ["researcher", "fact_checker", "analyst", "analyst"]


def test_A5_what_another_run_has_completed_does_not_count(coord, order):
    """It waits until its time is over; the error says for whom."""
    researcher, fact_checker, _ = agents_of(coord, order)
    analyst = coord.coordinate("impatient", after=("researcher", "fact_checker"), timeout=0)(order.append)
    with coord.run("a"):
        researcher()
        fact_checker()
        with coord.run("b"), pytest.raises(CoordinationTimeoutError, match="'researcher', 'fact_checker'") as caught:
            analyst("too early")
        analyst("a")
    assert "too early" not in order
    assert order[-1] == "a"
    assert (caught.value.name, caught.value.timeout) == ("researcher", 0)


def test_A5_outside_a_run_agents_wait_for_each_other_too(coord, order):
    """All that is outside of any run is one."""
    researcher, fact_checker, analyst = agents_of(coord, order)
    threads = start_all(analyst)
    eventually(lambda: waits(coord, "analyst"))
    fact_checker()
    assert order == ["fact_checker"]
    researcher()
    join_all(threads)
    assert order == ["fact_checker", "researcher", "analyst"]


def test_A5_tasks_wait_without_blocking_their_loop(coord, order):
    """Coroutine functions, all in one loop, in any order."""

    @coord.coordinate("analyst", after="researcher")
    async def analyst():
        order.append("analyst")

    @coord.coordinate("researcher")
    async def researcher():
        await asyncio.sleep(0)
        order.append("researcher")

    async def main():
        with coord.run("r"):
            await asyncio.gather(analyst(), analyst(), researcher())

    asyncio.run(main())
    assert order == ["researcher", "analyst", "analyst"]


def test_A5_threads_and_tasks_wait_for_each_other(coord, order):
    """A task comes after a thread, and a thread after the task."""

    @coord.coordinate("second", after="first")
    async def second():
        order.append("second")

    @coord.coordinate("third", after="second")
    def third():
        order.append("third")

    @coord.coordinate("first")
    def first():
        order.append("first")

    async def main():
        with coord.run("r"):
            await second()

    with coord.run("r"):
        threads = start_all(in_run(coord, "r", third), lambda: asyncio.run(main()))
        eventually(lambda: waits(coord, "second") and waits(coord, "third"))
        first()
        join_all(threads)
    assert order == ["first", "second", "third"]


def test_A5_a_generator_completes_when_its_stream_ends(coord, order):
    """And may itself come after others."""

    @coord.coordinate("stream")
    def stream():
        yield 1
        yield 2

    @coord.coordinate("reader", after="stream")
    def reader():
        order.append("reader")
        yield from ()

    with coord.run("r"):
        items = stream()
        assert next(items) == 1
        threads = start_all(in_run(coord, "r", lambda: list(reader())))
        eventually(lambda: waits(coord, "reader"))
        assert order == []
        assert list(items) == [2]
        join_all(threads)
    assert order == ["reader"]


# -- failures -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("error", [ValueError("no facts"), KeyboardInterrupt("stop")], ids=["failed", "cancelled"])
@pytest.mark.parametrize("before", [True, False], ids=["before", "meanwhile"])
def test_A5_who_comes_after_one_that_failed_is_told(coord, order, error, before):
    """Whether it failed before, or while somebody waits for it; the agent itself ends as failed."""
    failed = []
    coord.on("analyst_failed", lambda data: failed.append(data["error_type"]))
    caught = []

    @coord.coordinate("researcher")
    def researcher():
        raise error

    @coord.coordinate("analyst", after="researcher")
    def analyst():
        order.append("analyst")

    def attempt():
        try:
            analyst()
        except DependencyFailedError as refused:
            caught.append(refused)

    with coord.run("r"):
        threads = [] if before else start_all(in_run(coord, "r", attempt))
        eventually(lambda: before or waits(coord, "analyst"))
        with pytest.raises(type(error)):
            researcher()
        threads += start_all(in_run(coord, "r", attempt)) if before else []
        join_all(threads)
    coord.join(10)
    (refused,) = caught
    assert (refused.agent, refused.dependency, refused.run) == ("analyst", "researcher", "r")
    assert str(error) in refused.error
    assert "'researcher'" in str(refused)
    assert str(pickle.loads(pickle.dumps(refused))) == str(refused)
    assert (order, failed) == ([], ["DependencyFailedError"])


def test_A5_a_dependency_that_failed_may_be_run_again(coord, order):
    """Its last end counts."""
    tries = []

    @coord.coordinate("researcher")
    def researcher():
        tries.append(1)
        if len(tries) == 1:
            raise ValueError

    @coord.coordinate("analyst", after="researcher")
    def analyst():
        order.append("analyst")

    with coord.run("r"):
        with pytest.raises(ValueError):  # noqa: PT011
            researcher()
        with pytest.raises(DependencyFailedError):
            analyst()
        researcher()
        analyst()
    assert order == ["analyst"]


def test_A5_a_timeout_bounds_the_wait():
    """In seconds of the coordinator's clock; the agent ends as failed, and nothing is left."""
    clock = FakeClock()
    coord = Coordinator(clock=clock)
    caught = []

    @coord.coordinate("analyst", after="researcher", timeout=30)
    def analyst():
        raise AssertionError("it must not start")

    def attempt():
        try:
            analyst()
        except CoordinationTimeoutError as error:
            caught.append(error)

    async def main():
        async def attempt():
            await late()

        with pytest.raises(CoordinationTimeoutError, match="'late' did not start: within 5 s, 'researcher'"):
            await attempt()

    @coord.coordinate("late", after="researcher", timeout=5)
    async def late():
        raise AssertionError("it must not start")

    threads = start_all(attempt, lambda: asyncio.run(main()))
    clock.wait_for_sleepers(2)
    clock.advance(5)
    clock.wait_for_sleepers(1)
    clock.advance(24.9)
    assert caught == []
    clock.advance(0.1)
    join_all(threads)
    assert "'analyst' did not start: within 30 s, 'researcher'" in str(caught[0])
    assert coord.snapshot().agents == ()
    coord.close()


def test_A5_a_cancelled_wait_leaves_nothing(coord):
    """The task is gone from the snapshot and from the graph."""

    @coord.coordinate("analyst", after="researcher")
    async def analyst():
        raise AssertionError("it must not start")

    async def main():
        task = asyncio.ensure_future(analyst())
        while not waits(coord, "analyst"):
            await asyncio.sleep(0)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task

    asyncio.run(main())
    assert coord.snapshot().agents == ()
    assert not coord._table.book.elsewhere


# -- rings (L5) -----------------------------------------------------------------------------------------------


def test_L5_two_agents_that_wait_for_each_other_are_refused(coord):
    """The second to come gets the error; the first one learns that its dependency has failed."""
    ends = []

    def agent(name, other):
        @coord.coordinate(name, after=other)
        def run():
            raise AssertionError("neither may start")

        def job():
            try:
                run()
            except (DeadlockError, DependencyFailedError) as error:
                ends.append(error)

        return in_run(coord, "r", job)

    a = agent("a", "b")
    with coord.run("r"):
        threads = start_all(a)
        eventually(lambda: waits(coord, "a"))
        join_all(threads + start_all(agent("b", "a")))
    deadlock, failed = ends
    assert type(deadlock) is DeadlockError
    assert "agent 'a'" in str(deadlock)
    assert "agent 'b'" in str(deadlock)
    assert len(deadlock.cycle) == 2
    assert type(failed) is DependencyFailedError
    assert failed.dependency == "b"


def test_L5_a_ring_through_a_lock_is_refused(coord):
    """Who comes after somebody who waits for a lock that he holds would wait for ever."""
    ends = []

    @coord.coordinate("writer", lock_name="record")
    def writer():
        pass

    @coord.coordinate("reader", after="writer")
    def reader():
        pass

    with coord.run("r"), coord.lock("record"):
        threads = start_all(in_run(coord, "r", writer))
        eventually(lambda: coord.snapshot().locks[0].waiters)
        with pytest.raises(DeadlockError) as caught:
            reader()
        ends.append(caught.value)
    join_all(threads)
    assert "lock 'record'" in str(ends[0])
    assert "agent 'writer'" in str(ends[0])


def test_L5_a_dependency_that_is_not_running_yet_is_waited_for(coord, order):
    """It may begin any time, so that is no ring, even if the one that waits holds a lock."""
    researcher, fact_checker, _ = agents_of(coord, order)
    late = coord.coordinate("late", after=("researcher", "fact_checker"))(lambda: order.append("late"))

    def holding():
        with coord.lock("l"):
            late()

    with coord.run("r"):
        threads = start_all(in_run(coord, "r", holding))
        eventually(lambda: waits(coord, "late"))
        researcher()
        fact_checker()
        join_all(threads)
    assert order[-1] == "late"


# -- looking, remembering, forgetting ---------------------------------------------------------------------


def test_L11_who_waits_for_which_agents_is_shown_and_explained(coord, order):
    """What is running, what has not started, in which run, for how long."""
    begun, go = threading.Event(), threading.Event()

    @coord.coordinate("researcher")
    def researcher():
        begun.set()
        assert go.wait(10)

    analyst = coord.coordinate("analyst", after=("researcher", "fact_checker"))(order.append)
    fact_checker = coord.coordinate("fact_checker")(order.append)
    with coord.run("r"):
        threads = start_all(in_run(coord, "r", researcher))
        assert begun.wait(10)
        threads += start_all(in_run(coord, "r", lambda: analyst("analyst")))
        eventually(lambda: waits(coord, "analyst"))
        shown = {agent.name: agent for agent in coord.snapshot().agents}
        assert shown["analyst"].waits_for == ("researcher", "fact_checker")
        assert shown["researcher"].waits_for == ()
        assert {agent.run for agent in shown.values()} == {"r"}
        assert "test_dependencies.py" in shown["researcher"].where
        text = coord.explain()
        assert "Agent 'analyst'" in text
        assert "'researcher' (running), 'fact_checker' (not started) in run 'r'" in text
        go.set()
        fact_checker("fact_checker")
        join_all(threads)
    assert coord.snapshot().agents == ()


def test_A5_a_run_is_forgotten_when_it_is_over(coord, order):
    """When its last block has ended and nothing of it is pending: so a year of runs takes no memory."""
    gate = threading.Event()
    coord.on("fact_checker_complete", lambda data: gate.wait(10))
    researcher, fact_checker, analyst = agents_of(coord, order)
    for number in range(20):
        with coord.run(f"r{number}"):
            researcher()
            fact_checker()
            analyst()
        assert gate.is_set() or coord._dependencies._runs  # its events are not handled yet
        gate.set()
    coord.join(10)
    assert coord._dependencies._runs == {}


def test_A5_a_run_that_is_entered_again_goes_on_while_anything_of_it_does(coord, order):
    """Another block of the same id, in another thread, continues it."""
    researcher, fact_checker, analyst = agents_of(coord, order)
    with coord.run("r"):
        join_all(start_all(in_run(coord, "r", researcher)))
        join_all(start_all(in_run(coord, "r", fact_checker)))
        analyst()
    assert order[-1] == "analyst"


def test_A5_an_agent_is_remembered_from_when_it_is_named(coord, order):
    """What completed before anybody's `after=` named it has left nothing."""
    researcher = coord.coordinate("researcher")(lambda: order.append("researcher"))
    with coord.run("r"):
        researcher()
        analyst = coord.coordinate("analyst", after="researcher", timeout=0)(lambda: order.append("analyst"))
        with pytest.raises(CoordinationTimeoutError):
            analyst()
        researcher()
        analyst()
    assert order == ["researcher", "researcher", "analyst"]


@pytest.mark.parametrize("after", ["", ("a", ""), 3, ("a", 3), {"a"}])
def test_A5_what_names_no_agent_is_refused_when_decorating(coord, after):
    """And so is an agent that would come after itself."""
    with pytest.raises(TypeError, match="after must be the name of an agent"):
        coord.coordinate("analyst", after=after)
    with pytest.raises(ValueError, match="analyst"):
        coord.coordinate("analyst", after=("researcher", "analyst"))


def test_A5_a_call_that_was_running_when_it_was_named_is_remembered(coord, order):
    """Completions count from when an `after=` names the agent, whenever the call had begun."""
    analysts = []

    @coord.coordinate("researcher")
    def researcher():
        analysts.append(coord.coordinate("analyst", after="researcher", timeout=0)(lambda: order.append("analyst")))

    with coord.run("r"):
        researcher()
        analysts[0]()
    assert order == ["analyst"]


def test_A5_what_an_agents_end_sets_going_still_knows_of_it(coord, order):
    """A run whose block is over goes on with the handlers of its last agent's end."""
    researcher = coord.coordinate("researcher")(lambda: order.append("researcher"))
    analyst = coord.coordinate("analyst", after="researcher", timeout=0)(lambda: order.append("analyst"))
    handled = coord.on("researcher_complete", lambda data: analyst())
    with coord.run("r"):
        work = coord.carry(researcher)
    work()
    coord.join(10)
    handled.cancel()
    assert order == ["researcher", "analyst"]
    assert coord._dependencies._runs.keys() <= {None}


def test_L5_trying_once_is_not_refused_for_a_dependency(coord, order):
    """Who doesn't wait can't deadlock: with timeout 0 it is the dependency that is missing, and no ring."""
    late = coord.coordinate("late", after="outer", timeout=0)(lambda: order.append("late"))

    @coord.coordinate("outer")
    def outer():
        late()

    with coord.run("r"), pytest.raises(CoordinationTimeoutError):
        outer()


def test_L5_more_ways_than_can_be_looked_at_refuse_nobody(coord, order):
    """An agent is not refused while one of many calls that could bring what it waits for can go on."""
    names = [f"part-{n}" for n in range(8)]
    leave = threading.Event()
    analyst = coord.coordinate("analyst", after=names)(lambda: order.append("analyst"))
    stuck = [coord.coordinate(name, "held")(lambda: None) for name in names]
    free = [coord.coordinate(name)(lambda: leave.wait(10)) for name in names]
    with coord.run("r"), coord.lock("held"):
        threads = start_all(*(in_run(coord, "r", part) for part in stuck))
        eventually(lambda: len(coord.snapshot().locks[0].waiters) == len(names))
        threads += start_all(*(in_run(coord, "r", part) for part in free))
        eventually(lambda: len(coord.snapshot().agents) == 2 * len(names))

        def let_go():
            eventually(lambda: waits(coord, "analyst"))
            leave.set()

        threads += start_all(let_go)
        analyst()
    join_all(threads)
    assert order == ["analyst"]


def test_T1_an_agent_that_still_waits_is_a_leak(coord, order):
    """`leaks` names it, and what it waits for."""
    researcher = coord.coordinate("researcher")(lambda: order.append("researcher"))
    analyst = coord.coordinate("analyst", after="researcher")(lambda: order.append("analyst"))
    threads = start_all(analyst)
    eventually(lambda: waits(coord, "analyst"))
    (leak,) = coord.leaks(timeout=0)
    assert leak.startswith("agent 'analyst' (thread ")
    assert leak.endswith("still waits for 'researcher'")
    researcher()
    join_all(threads)
    assert coord.leaks(timeout=0) == ()


@pytest.mark.parametrize("size", [2, 3, 5])
def test_L5_a_ring_of_agents_that_have_not_started_is_refused(coord, order, size):
    """Whoever comes first is told, and needs nobody else to run for it; the error names each hop."""
    names = [f"agent-{n}" for n in range(size)]
    agents = [
        coord.coordinate(name, after=(names[(n + 1) % size], "free"))(lambda: order.append("never"))
        for n, name in enumerate(names)
    ]
    coord.coordinate("free")(lambda: None)
    with coord.run("r"), pytest.raises(DeadlockError, match="would never end") as caught:
        agents[0]()
    assert caught.value.name == "agent-1"
    assert caught.value.cycle == tuple(
        f"agent {name!r} comes after agent {names[(n + 1) % size]!r}" for n, name in enumerate(names)
    )
    assert order == []
    assert coord.snapshot().agents == ()


def test_L5_a_ring_that_one_function_of_a_name_can_break_is_no_ring(coord, order):
    """Where another function of the name comes after nobody, it may complete."""
    first = coord.coordinate("first", after="second")(lambda: order.append("first"))
    coord.coordinate("second", after="first")(lambda: order.append("never"))
    other = coord.coordinate("second")(lambda: order.append("second"))
    threads = start_all(in_run(coord, "r", first))
    eventually(lambda: waits(coord, "first"))
    with coord.run("r"):
        other()
    join_all(threads)
    assert order == ["second", "first"]


def test_L5_what_isolated_declares_is_no_ring_afterwards(coord, order):
    """One test's agents say nothing about those of the next."""
    with coord.isolated():
        coord.coordinate("second", after="first")(lambda: order.append("never"))
    first = coord.coordinate("first", after="second", timeout=0)(lambda: order.append("first"))
    with coord.run("r"), pytest.raises(CoordinationTimeoutError):
        first()
    clock = FakeClock()
    coord._dependencies._clock = clock
    late = coord.coordinate("first", after="second", timeout=5)(lambda: order.append("first"))
    failed = []

    def job():
        with coord.run("r"):
            try:
                late()
            except CoordinationTimeoutError as error:
                failed.append(error)

    threads = start_all(job)
    clock.wait_for_sleepers(1)
    clock.advance(6)
    join_all(threads)
    assert len(failed) == 1


def test_L5_a_stream_that_pauses_may_be_driven_on_by_anybody(coord, order):
    """Who took its first step may wait for its end: that is no ring."""

    @coord.coordinate("stream")
    def stream():
        yield 1

    reader = coord.coordinate("reader", after="stream")(lambda: order.append("reader"))
    with coord.run("r"):
        items = stream()
        assert next(items) == 1

        def drive_on():
            eventually(lambda: waits(coord, "reader"))
            order.extend(items)
            order.append("over")

        threads = start_all(drive_on)
        reader()
    join_all(threads)
    assert sorted(order) == ["over", "reader"]
