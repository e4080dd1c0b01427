from __future__ import annotations

import asyncio
import contextlib
import sys
import threading
import time
import weakref
from collections import deque

import pytest
from support import eventually, join_all, start_all

from agentdiff import _workers
from agentdiff._workers import OwnLoop, Workers


def ours(name: str = "w") -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name.startswith(f"{name}-")]


@pytest.fixture
def workers():
    made = Workers("w", 4)
    yield made
    made.stop()
    eventually(lambda: not ours())


class At(deque):
    """A deque that calls `before[name]` or `after[name]`, once, around one of its operations."""

    def __init__(self, *items):
        super().__init__(*items)
        self.before = {}
        self.after = {}

    def _around(self, name, *args):
        self.before.pop(name, lambda: None)()
        try:
            return getattr(deque, name)(self, *args)
        finally:
            self.after.pop(name, lambda: None)()

    def append(self, item):
        return self._around("append", item)

    def popleft(self):
        return self._around("popleft")

    def remove(self, item):
        return self._around("remove", item)


class AtSet(set):
    """The same for a set."""

    def __init__(self, *items):
        super().__init__(*items)
        self.before = {}
        self.after = {}

    def discard(self, item):
        self.before.pop("discard", lambda: None)()
        super().discard(item)
        self.after.pop("discard", lambda: None)()


def run_one(workers: Workers) -> None:
    done = threading.Event()
    workers.submit(done.set)
    assert done.wait(10)


# -- Workers -------------------------------------------------------------------------------------------------


def test_E2_jobs_start_in_the_order_of_their_submission():
    """One worker: strictly one after another."""
    workers = Workers("w", 1)
    order = []
    for number in range(200):
        workers.submit(lambda number=number: order.append(number))
    workers.stop()
    assert order == list(range(200))


@pytest.mark.parametrize("limit", [1, 3])
def test_E2_there_are_no_more_threads_than_allowed(limit):
    """The jobs beyond that wait: `backlog` tells how many."""
    workers = Workers("w", limit)
    gate = threading.Event()
    for _ in range(limit + 5):
        workers.submit(gate.wait)
    eventually(lambda: workers.backlog == 5)
    assert workers.threads == limit == len(ours())
    gate.set()
    workers.stop()
    assert workers.backlog == workers.threads == 0


def test_E2_an_idle_worker_is_used_again(workers):
    """One job after another needs one thread."""
    for _ in range(50):
        run_one(workers)
        eventually(lambda: workers._parked)
    assert workers.threads == 1


def test_F2_no_job_no_thread():
    """Making workers starts nothing; their threads are daemons, so that they can't keep a process alive."""
    workers = Workers("w", 4)
    assert not ours()
    run_one(workers)
    assert [thread.daemon for thread in ours()] == [True]
    workers.stop()


def test_E6_an_idle_worker_ends(workers, monkeypatch):
    """After `PARK_FOR` idle seconds no thread is left, and the next job gets a new one."""
    monkeypatch.setattr(_workers, "PARK_FOR", 0.001)
    for _ in range(3):
        run_one(workers)
        eventually(lambda: not workers.threads and not ours())


def test_E8_a_worker_that_has_something_to_watch_stays(workers, monkeypatch):
    """As long as `watch` says so an idle worker asks again, and ends afterwards."""
    monkeypatch.setattr(_workers, "PARK_FOR", 0.001)
    answers = [False, True, True, True]
    workers.watch = lambda: bool(answers) and answers.pop()
    run_one(workers)
    eventually(lambda: not workers.threads)
    assert not answers


def test_E6_a_job_submitted_right_before_a_worker_parks_is_done(workers, monkeypatch):
    """The worker has found no job and hasn't parked yet; whoever submits finds nobody parked and no thread to start."""
    monkeypatch.setattr(_workers, "PARK_FOR", 60)  # or the end of its idle time would help out
    workers.limit = 1
    workers._parked = parked = At()
    done = threading.Event()
    parked.before["append"] = lambda: workers.submit(done.set)
    run_one(workers)
    assert done.wait(10)


def test_E6_a_job_submitted_right_after_a_worker_parked_is_done(workers, monkeypatch):
    """The worker is parked, so it is rung for, but sees the job by itself: it takes the ring, and parks again."""
    monkeypatch.setattr(_workers, "PARK_FOR", 60)  # or the end of its idle time would help out
    workers.limit = 1
    workers._parked = parked = At()
    done = threading.Event()
    parked.after["append"] = lambda: workers.submit(done.set)
    run_one(workers)
    assert done.wait(10)
    eventually(lambda: len(parked) == 1)
    run_one(workers)


def test_E6_a_job_submitted_while_a_worker_unparks_is_done(workers, monkeypatch):
    """Its idle time is over; before it takes its bell back somebody rings it."""
    monkeypatch.setattr(_workers, "PARK_FOR", 0.001)
    workers.limit = 1
    workers._parked = parked = At()
    done = threading.Event()
    parked.before["remove"] = lambda: workers.submit(done.set)
    run_one(workers)
    assert done.wait(10)


@pytest.mark.parametrize("moment", ["before", "after"])
def test_E6_a_job_submitted_while_a_worker_retires_is_done(workers, monkeypatch, moment):
    """The worker has decided to end: either it sees the job, or the submitter sees that it has gone."""
    monkeypatch.setattr(_workers, "PARK_FOR", 0.001)
    workers.limit = 1
    workers._threads = threads = AtSet()
    done = threading.Event()
    submitted = threading.Event()

    def submit_elsewhere():
        def submit():
            workers._jobs.append(done.set)  # what submit does, up to where it would need the mutex
            submitted.set()
            if not workers._parked and len(threads) < workers.limit:
                workers._start()

        start_all(submit)
        assert submitted.wait(10)

    getattr(threads, moment)["discard"] = submit_elsewhere
    run_one(workers)
    assert done.wait(10)
    eventually(lambda: not workers.threads)


def test_E6_a_job_that_comes_when_nobody_retired_after_all_starts_no_second_thread(workers, monkeypatch):
    """The worker that stays for a late job counts again: the limit holds."""
    monkeypatch.setattr(_workers, "PARK_FOR", 0.001)
    workers.limit = 1
    workers._threads = threads = AtSet()
    gate, began = threading.Event(), threading.Event()
    threads.after["discard"] = lambda: workers._jobs.append(lambda: (began.set(), gate.wait()))
    run_one(workers)
    assert began.wait(10)
    assert workers.threads == 1
    workers.submit(lambda: None)
    assert len(ours()) == 1
    gate.set()


@pytest.mark.parametrize("error", [ValueError, SystemExit, GeneratorExit])
def test_E3_a_job_that_fails_ends_no_worker(workers, caplog, error):
    """It is logged, with its traceback, and the next one is done by the same worker."""
    workers.limit = 1

    def job():
        raise error("broken")

    workers.submit(job)
    run_one(workers)
    assert workers.threads == 1
    assert [record.levelname for record in caplog.records] == ["CRITICAL"]
    assert "broken" in caplog.text
    assert "Traceback" in caplog.text


def test_E6_where_no_thread_can_start_the_job_stays(workers, monkeypatch):
    """At shutdown the interpreter refuses threads: nothing is raised, and whoever drains runs the job."""

    def refuse(self):
        raise RuntimeError("can't create new thread at interpreter shutdown")

    ran = []
    with monkeypatch.context() as patch:
        patch.setattr(threading.Thread, "start", refuse)
        workers.submit(lambda: ran.append(threading.current_thread()))
    assert (workers.threads, workers.backlog) == (0, 1)
    workers.run_jobs()
    assert ran == [threading.current_thread()]


def test_E7_stop_waits_for_running_jobs_and_for_what_is_queued(workers):
    """When it returns all is done, and no thread is left."""
    gate, began = threading.Event(), threading.Event()
    done = []
    workers.limit = 1
    workers.submit(lambda: (began.set(), gate.wait()))
    for number in range(5):
        workers.submit(lambda number=number: done.append(number))
    assert began.wait(10)
    stopper = start_all(workers.stop)
    gate.set()
    join_all(stopper)
    assert done == list(range(5))
    assert not ours()


def test_E7_after_stop_no_thread_of_ours_is_alive():
    """Not even one that is just about to end."""
    for _ in range(100):
        workers = Workers("w", 8)
        barrier = threading.Barrier(8)
        for _ in range(8):
            workers.submit(barrier.wait)
        workers.stop()
        assert not ours()


def test_E7_stop_waits_for_a_worker_that_was_just_ending(monkeypatch):
    """A worker has left the books, but its thread is still on its way out."""
    monkeypatch.setattr(_workers, "PARK_FOR", 0.001)
    workers = Workers("w", 1)
    leaving, go = threading.Event(), threading.Event()
    retire = workers._retire

    def slowly():
        left = retire()
        leaving.set()
        go.wait(10)
        return left

    monkeypatch.setattr(workers, "_retire", slowly)
    run_one(workers)
    assert leaving.wait(10)
    stopper = start_all(workers.stop)
    stopper[0].join(0.05)
    go.set()
    join_all(stopper)
    assert not ours()


@pytest.mark.parametrize("moment", ["not begun", "half begun"])
def test_E7_stop_waits_for_a_worker_that_is_just_starting(workers, monkeypatch, moment):
    """It is in the books, but its thread isn't alive yet: somebody else is in the middle of starting it."""
    starting, go = threading.Event(), threading.Event()
    start = threading.Thread.start

    class Started(threading.Event):
        def set(self):
            starting.set()
            go.wait(10)
            super().set()

    def slowly(thread):
        if thread.name.startswith("w-") and moment == "half begun":
            thread._started = Started()
        elif thread.name.startswith("w-"):
            starting.set()
            go.wait(10)
        start(thread)

    monkeypatch.setattr(threading.Thread, "start", slowly)
    threads = start_all(lambda: workers.submit(lambda: None))
    assert starting.wait(10)
    threads += start_all(workers.stop)
    threads[1].join(0.05)
    go.set()
    join_all(threads)
    assert not ours()


def test_E7_stop_stands_workers_that_leave_meanwhile(workers, monkeypatch):
    """The set of threads changes while `stop` looks at it."""
    barrier = threading.Barrier(4)
    for _ in range(3):
        workers.submit(barrier.wait)
    barrier.wait(10)
    threads = list(workers._threads)
    is_alive = threading.Thread.is_alive

    def leave(thread):
        with contextlib.suppress(KeyError):
            workers._threads.remove(next(other for other in threads if other is not thread))
        return is_alive(thread)

    with monkeypatch.context() as patch:
        patch.setattr(threading.Thread, "is_alive", leave)
        workers.stop()
    join_all(threads)


def test_E7_two_can_stop_at_once(workers):
    """Neither hangs nor fails."""
    gate = threading.Event()
    for _ in range(4):
        workers.submit(gate.wait)
    stoppers = start_all(workers.stop, workers.stop)
    gate.set()
    join_all(stoppers)
    assert not ours()


def test_E7_after_stop_a_job_starts_a_thread_again(workers):
    """Stopping is no end for good: a late event is still handled."""
    run_one(workers)
    workers.stop()
    run_one(workers)
    assert workers.threads == 1


# -- OwnLoop -------------------------------------------------------------------------------------------------


@pytest.fixture
def own():
    made = OwnLoop("w")
    yield made
    made.stop()
    assert not ours()


def test_E8_the_own_loop_is_made_once(own):
    """However many threads ask for it first."""
    assert not ours()
    found = []
    barrier = threading.Barrier(8)

    def ask():
        barrier.wait()
        found.append(own.get())

    join_all(start_all(*[ask] * 8))
    assert len(set(found)) == 1
    assert [thread.name for thread in ours()] == ["w-loop"]
    assert asyncio.run_coroutine_threadsafe(asyncio.sleep(0, "ran"), own.get()).result(10) == "ran"


def test_E8_stopping_the_own_loop_cancels_what_runs_and_closes_it(own):
    """Tasks are cancelled and run to their end, thread and loop are gone; later there is a new one."""
    loop = own.get()
    ended = []

    async def long():
        try:
            await asyncio.Event().wait()
        finally:
            ended.append(threading.current_thread().name)

    task = asyncio.run_coroutine_threadsafe(long(), loop)
    asyncio.run_coroutine_threadsafe(asyncio.sleep(0), loop).result(10)
    own.stop()
    assert task.cancelled()
    assert ended == ["w-loop"]
    assert loop.is_closed()
    assert not ours()
    assert own.get() is not loop


def test_E8_stopping_what_never_ran_does_nothing(own):
    """Nor does stopping twice."""
    own.stop()
    own.get()
    own.stop()
    own.stop()


def test_E8_the_own_loop_leaves_nothing_open_when_no_thread_can_start(own, monkeypatch):
    """The error is told, and the loop that was made for nothing is closed."""
    made = []
    new = asyncio.new_event_loop

    def refuse(self):
        raise RuntimeError("can't start new thread")

    with monkeypatch.context() as patch:
        patch.setattr(asyncio, "new_event_loop", lambda: made.append(new()) or made[-1])
        patch.setattr(threading.Thread, "start", refuse)
        with pytest.raises(RuntimeError):
            own.get()
    assert [loop.is_closed() for loop in made] == [True]


# -- the drain -----------------------------------------------------------------------------------------------


class Drained:
    """Something to drain that is done after so many rounds."""

    def __init__(self, rounds, exit_timeout=None):
        self.rounds = rounds
        self.exit_timeout = exit_timeout
        self.said = []
        self.begun = 0

    def drain(self, timeout):
        self.rounds -= 1
        return self.rounds <= 0

    only_waits = False

    def end_waits(self):
        self.said.append("nobody is left")

    def abandon(self, why):
        self.said.append(why)


@pytest.fixture
def to_drain(monkeypatch):
    """The books of this test's own; the process's hooks are left alone."""
    books = weakref.WeakSet()
    monkeypatch.setattr(_workers, "_to_drain", books)
    return books


def test_E6_draining_goes_on_until_all_is_done(to_drain):
    """Round after round, all of them, however many it takes."""
    one, two = Drained(3), Drained(7)
    to_drain.update([one, two])
    _workers._drain_with_threads()
    assert one.rounds <= 0
    assert two.rounds <= 0
    assert one.said == two.said == []


@pytest.mark.parametrize("left", ["still to do", "done already"])
def test_E6_work_that_comes_back_to_what_was_drained_makes_another_round(monkeypatch, left):
    """Whether it is still there at the end of the round, or has come and gone since, and may have caused more."""
    first, second = Drained(0), Drained(0)
    monkeypatch.setattr(_workers, "_members", lambda: [first, second])
    rounds = []

    def drain(timeout):
        rounds.append(timeout)
        if len(rounds) == 1:
            if left == "still to do":
                first.rounds = 2
            else:
                first.begun += 1
        return True

    second.drain = drain
    assert not _workers._drain_all(time.monotonic())
    assert _workers._drain_all(time.monotonic())


def test_E6_an_exit_timeout_bounds_one_and_not_the_other(to_drain):
    """Who has used up its time is told to say what it abandons; the others go on."""
    hasty, patient = Drained(10**9, exit_timeout=0.0), Drained(5)
    to_drain.update([hasty, patient])
    _workers._drain_with_threads()
    assert len(hasty.said) == 1
    assert "exit_timeout of 0 s" in hasty.said[0]
    assert patient.rounds <= 0
    assert patient.said == []


def test_E6_draining_waits_for_threads_that_may_still_emit(to_drain):
    """A non-daemon thread that lives is waited for, and what it adds is drained."""
    item = Drained(1)
    to_drain.add(item)
    gate, began = threading.Event(), threading.Event()

    def late():
        began.set()
        gate.wait(10)
        item.rounds = 3

    thread = threading.Thread(target=late, daemon=False)
    thread.start()
    assert began.wait(10)
    rounds = []
    drain = item.drain
    item.drain = lambda timeout: (rounds.append(1), len(rounds) == 2 and gate.set(), drain(timeout))[-1]
    _workers._drain_with_threads()
    assert not thread.is_alive()
    assert item.rounds <= 0


def test_E6_after_ctrl_c_in_the_program_nothing_is_drained(to_drain, monkeypatch):
    """Neither before the executors end nor after; it says what is left undone."""
    monkeypatch.setattr(sys, "last_type", KeyboardInterrupt, raising=False)
    item = Drained(5)
    to_drain.add(item)
    _workers._drain_with_threads()
    assert item.said == ["interrupted"]
    _workers._drain_the_rest()
    assert item.rounds == 5


def test_E6_others_may_begin_while_we_drain(monkeypatch):
    """A coordinator made by a thread that still lives doesn't disturb the drain."""
    late = Drained(1)
    adding = []

    class Crowded(weakref.WeakSet):
        def __iter__(self):
            for item in super().__iter__():
                if not adding:
                    adding.extend(start_all(lambda: _workers.drain_at_exit(late)))
                    adding[0].join(0.1)
                yield item

    kept = [Drained(3) for _ in range(5)]
    monkeypatch.setattr(_workers, "_to_drain", Crowded(kept))
    while not _workers._drain_all(time.monotonic()):
        pass
    join_all(adding)
    assert all(item.rounds <= 0 for item in kept)


def test_E5_a_late_ring_leaves_no_bell_of_a_worker_that_has_gone(monkeypatch):
    """Else the next job would ring there, and nobody would come."""
    monkeypatch.setattr(_workers, "PARK_FOR", 0.002)
    workers = _workers.Workers("late", 1)
    stay = threading.Event()
    workers.watch = lambda: not stay.is_set()
    workers.submit(lambda: None)
    bells = []

    def take_bell():
        with contextlib.suppress(IndexError):
            bells.append(workers._parked.popleft())
        return bells

    eventually(take_bell)
    eventually(lambda: workers._parked)  # it slept its time, and sleeps again
    bells[0].release()
    eventually(bells[0].locked)
    stay.set()
    eventually(lambda: not workers.threads)
    assert not workers._parked
    workers.stop()
