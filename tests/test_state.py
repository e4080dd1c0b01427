from __future__ import annotations

import asyncio
import copy
import pickle
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
from support import eager_switching, join_all, run_script, start_all, yielding_at_opcodes

from agentdiff import Coordinator, DeadlockError, StaleWriteError


def add_one(value):
    return value + 1


# -- W1: read, think, write ---------------------------------------------------------------------------------


def test_W1_a_value_that_nobody_has_written_has_its_default_and_version_0(coord):
    """And the default is the handle's own: it is not written."""
    assert coord.state("n", default=7).read() == (7, 0)
    assert coord.state("n").read() == (None, 0)


def test_W1_a_write_with_the_version_that_was_read_gives_a_new_version(coord):
    """Handles of one name are one value, and versions never come again."""
    state = coord.state("n")
    first = state.write("a", version=0)
    assert coord.state("n").read() == ("a", first)
    second = coord.state("n").write("b", version=first)
    assert second > first
    assert state.read() == ("b", second)
    assert state.read().value == "b"
    assert state.read().version == second


def test_W1_who_writes_late_is_told_who_wrote_when_and_in_which_run(coord):
    """Two agents read, think and write: the second is refused, and nothing is changed."""
    customer = coord.state("customer_123", default={})
    both_have_read, first_has_written = threading.Barrier(2), threading.Event()
    caught = []

    @coord.coordinate("quick")
    def quick():
        version = customer.read().version
        both_have_read.wait(10)
        with coord.run("report-42"):
            customer.write({"by": "quick"}, version=version)
        first_has_written.set()

    @coord.coordinate("slow")
    def slow():
        version = customer.read().version
        both_have_read.wait(10)
        assert first_has_written.wait(10)
        try:
            customer.write({"by": "slow"}, version=version)
        except StaleWriteError as error:
            caught.append(error)

    join_all(start_all(quick, slow))
    (error,) = caught
    assert customer.read().value == {"by": "quick"}
    assert (error.name, error.version, error.run) == ("customer_123", 0, "report-42")
    assert error.current == customer.read().version
    assert "quick" in error.writer
    assert error.written_at is not None
    assert "'customer_123'" in str(error)
    assert "agent 'quick'" in str(error)
    assert "in run 'report-42'" in str(error)
    assert "nothing was changed" in str(error)


def test_W1_of_many_who_read_the_same_version_exactly_one_may_write(coord):
    """Whatever the threads do."""
    with yielding_at_opcodes(0.2):
        for _ in range(30):
            state = coord.state("n")
            version = state.read().version
            outcomes = []

            def write(state=state, version=version, outcomes=outcomes):
                try:
                    outcomes.append(state.write("mine", version=version))
                except StaleWriteError:
                    outcomes.append(None)

            join_all(start_all(*[write] * 4))
            assert sorted(map(bool, outcomes)) == [False, False, False, True]


def test_W1_deleting_is_writing(coord):
    """It takes the version that was read; what is deleted is as if nobody had written, but for its history."""
    state = coord.state("n", default="none")
    version = state.write("a", version=0)
    with pytest.raises(StaleWriteError, match="is not at version 0 any more"):
        state.delete(version=0)
    state.delete(version=version)
    assert state.read() == ("none", 0)
    with pytest.raises(StaleWriteError, match="or it has been deleted"):
        state.write("b", version=version)
    assert state.write("c", version=0) > version


def test_W1_a_version_from_the_future_is_stale_too(coord):
    """Where nobody has written, the error says so."""
    with pytest.raises(
        StaleWriteError, match="not at version 5 any more: nobody has written it, or it has been deleted"
    ) as caught:
        coord.state("n").write("a", version=5)
    assert caught.value.writer is None


def test_W1_the_error_can_be_pickled_and_copied(coord):
    """With all its facts."""
    state = coord.state("n")
    state.write("a", version=0)
    with pytest.raises(StaleWriteError) as caught:
        state.write("b", version=0)
    for error in (pickle.loads(pickle.dumps(caught.value)), copy.copy(caught.value)):
        assert str(error) == str(caught.value)
        assert vars(error) == vars(caught.value)


@pytest.mark.parametrize("version", [None, "1", 1.0, True])
def test_W1_what_is_no_version_is_refused(coord, version):
    """At once, for writing and deleting."""
    with pytest.raises(TypeError, match="a version is a whole number"):
        coord.state("n").write("a", version=version)
    with pytest.raises(TypeError, match="a version is a whole number"):
        coord.state("n").delete(version=version)


@pytest.mark.parametrize(("name", "error"), [("", ValueError), (None, TypeError), (3, TypeError)])
def test_W1_what_can_not_name_a_value_is_refused(coord, name, error):
    """As for locks."""
    with pytest.raises(error):
        coord.state(name)


def test_W1_coordinators_share_no_values(coord):
    """The same name elsewhere is another value."""
    coord.state("n").write(1, version=0)
    with Coordinator() as other:
        assert other.state("n").read() == (None, 0)


def test_W1_a_handle_shows_itself(coord):
    """Name and version."""
    state = coord.state("n")
    assert state.name == "n"
    assert repr(state) == "<State 'n' version 0>"


# -- W2: update ---------------------------------------------------------------------------------------------


def test_W2_no_update_is_lost_over_threads_and_tasks(coord):
    """8 threads and 100 tasks, each adding one."""
    counter = coord.state("n", default=0)

    async def tasks():
        await asyncio.gather(*(counter.update_async(add_one) for _ in range(100)))

    def threads():
        for _ in range(50):
            counter.update(add_one)

    with eager_switching(), yielding_at_opcodes(0.01):
        join_all(start_all(*[threads] * 8, lambda: asyncio.run(tasks())))
    assert counter.read().value == 500


def test_W2_an_update_and_a_write_do_not_lose_each_other(coord):
    """A write doesn't wait for the lock: an update that meets one is made again, on the new value."""
    state = coord.state("n", default=0)
    seen = []

    def change(value):
        seen.append(value)
        if len(seen) == 1:
            state.write(100, version=state.read().version)
        return value + 1

    assert state.update(change) == 101
    assert seen == [0, 100]

    async def change_async(value):
        seen.append(value)
        if len(seen) == 3:
            state.write(200, version=state.read().version)
        return value + 1

    assert asyncio.run(state.update_async(change_async)) == 201
    assert seen == [0, 100, 101, 200]


def test_W2_an_update_holds_the_lock_of_the_name(coord):
    """So that who has the lock for longer is not disturbed, and may update itself."""
    state = coord.state("n", default=0)
    with coord.lock("n"):
        threads = start_all(lambda: state.update(add_one))
        while not coord.snapshot().locks[0].waiters:
            pass
        assert state.read().value == 0
        assert state.update(lambda value: value + 10) == 10
    join_all(threads)
    assert state.read().value == 11


def test_W2_what_change_raises_comes_out_and_nothing_is_written(coord):
    """Sync and async; the lock is free again."""
    state = coord.state("n", default=0)

    def fails(value):
        raise KeyError("mine")

    async def fails_async(value):
        raise KeyError("mine")

    with pytest.raises(KeyError, match="mine"):
        state.update(fails)
    with pytest.raises(KeyError, match="mine"):
        asyncio.run(state.update_async(fails_async))
    assert state.read() == (0, 0)
    assert not coord.lock("n").locked()


def test_W2_an_update_within_an_update_of_the_same_value(coord):
    """The inner one comes first, and the outer one is made again on what it wrote."""
    state = coord.state("n", default=1)
    calls = []

    def outer(value):
        calls.append(value)
        if len(calls) == 1:
            state.update(lambda inner: inner * 10)
        return value + 1

    assert state.update(outer) == 11
    assert calls == [1, 10]


def test_W2_an_update_that_writes_its_own_value_each_time_is_told(coord):
    """It could never come to an end: the error names who keeps writing, and the lock is free again."""
    state = coord.state("n", default=0)

    def outer(value):
        state.update(add_one)
        return value + 1

    async def outer_async(value):
        await state.update_async(add_one)
        return value + 1

    with pytest.raises(StaleWriteError, match="MainThread"):
        state.update(outer)
    with pytest.raises(StaleWriteError):
        asyncio.run(state.update_async(outer_async))
    assert not coord.lock("n").locked()


def test_W1_a_value_whose_end_writes_too_hangs_nobody(coord):
    """What is replaced is let go of outside of the mutex, and a write within a write is possible."""
    state, log = coord.state("n"), coord.state("log", default=0)

    class Last:
        def __del__(self):
            log.update(add_one)

    version = state.write(Last(), version=0)
    version = state.write(Last(), version=version)
    state.delete(version=version)
    assert log.read().value == 2


def test_W2_a_coroutine_function_is_refused_by_the_plain_update(coord):
    """Else the coroutine would be the value."""
    state = coord.state("n", default=0)

    async def change(value):
        return value + 1

    with pytest.raises(TypeError, match="update_async"):
        state.update(change)
    assert state.read() == (0, 0)
    assert not coord.lock("n").locked()


def test_W2_updates_that_would_wait_for_each_other_are_refused(coord):
    """Two values, updated crosswise: one of the two threads is told (L5)."""
    a, b = coord.state("a", default=0), coord.state("b", default=0)
    inside = threading.Barrier(2)
    refused = []

    def crosswise(first, second):
        def change(value):
            inside.wait(10)
            second.update(add_one)
            return value + 1

        try:
            first.update(change)
        except DeadlockError as error:
            refused.append(error)

    join_all(start_all(lambda: crosswise(a, b), lambda: crosswise(b, a)))
    assert len(refused) == 1
    assert a.read().value + b.read().value == 2


@pytest.mark.parametrize("change", [None, 3, "text"])
def test_W2_what_is_no_function_is_refused(coord, change):
    """Before anything is taken."""
    with pytest.raises(TypeError, match="update takes a function"):
        coord.state("n").update(change)
    with pytest.raises(TypeError, match="update takes a function"):
        asyncio.run(coord.state("n").update_async(change))


def test_W2_update_async_takes_plain_functions_too(coord):
    """The loop goes on while it waits for the lock."""
    state = coord.state("n", default=0)

    async def main():
        async with coord.lock("n"):
            waiting = asyncio.ensure_future(asyncio.to_thread(state.update, add_one))
            other = start_all(lambda: asyncio.run(state.update_async(add_one)))
            while not coord.snapshot().locks[0].waiters:
                await asyncio.sleep(0)
            assert await waiting == 1  # what the holder starts may enter
        join_all(other)

    asyncio.run(main())
    assert state.read().value == 2


def test_W2_with_a_bare_dict_the_same_program_loses_updates():
    """What the tests above would see if `update` didn't work: the model of the fault finds it."""
    values = {"n": 0}
    everybody_has_read = threading.Barrier(4)

    def work(_):
        read = values["n"]
        everybody_has_read.wait(10)
        values["n"] = read + 1

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(work, range(4)))
    assert values["n"] == 1


def test_L13_after_a_fork_the_values_are_there(tmp_path):
    """And can be written, even if the parent was writing at that moment."""
    done = run_script(
        """
        import os
        from agentdiff import Coordinator

        coord = Coordinator()
        state = coord.state("n", default=0)
        state.update(lambda value: value + 1)
        coord._values._mutex.acquire()  # another thread of the parent's
        pid = os.fork()
        if pid == 0:
            assert state.update(lambda value: value + 1) == 2
            os._exit(7)
        assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 7
        coord._values._mutex.release()
        assert state.read().value == 1
        """
    )
    assert (done.returncode, done.stderr) == (0, "")
