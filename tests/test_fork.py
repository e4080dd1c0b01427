"""After a fork the child has its subscriptions and limits and nothing else (L13)."""

from __future__ import annotations

import os
from contextvars import Context

import pytest
from support import run_script

from agentdiff._owner import current_owner
from agentdiff._places import Door, How
from agentdiff._table import LockTable
from agentdiff.limits import Limit
from agentdiff.testing import FakeClock

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="this system has no fork")

CHILD = """
import os, sys, threading, warnings
warnings.simplefilter("ignore", DeprecationWarning)  # fork beside threads is what is tested
from agentdiff import Coordinator, NotHeldError

coord = Coordinator(name="forked")

def in_child(check):
    sys.stdout.flush()
    pid = os.fork()
    if pid == 0:
        code = 1
        try:
            check()
            code = 0
        except BaseException:
            import traceback
            traceback.print_exc()
        finally:
            sys.stdout.flush()
            os._exit(code)
    assert os.waitpid(pid, 0)[1] == 0
"""


def ends_well(body: str) -> str:
    result = run_script(CHILD + body)
    assert result.returncode == 0, result.stderr
    assert result.stderr == ""
    return result.stdout


def test_L13_a_forked_child_has_no_holds_and_no_waiters() -> None:
    """What another thread of the parent held is free in the child, even while the table's mutex was taken."""
    ends_well("""
held, leave = threading.Event(), threading.Event()
def holder():
    with coord.lock("a"):
        held.set()
        leave.wait(10)
threads = [threading.Thread(target=holder)]
threads[0].start()
held.wait(10)
threads += [threading.Thread(target=coord.lock("a").acquire, kwargs={"timeout": 5}, daemon=True)]
threads[1].start()

def check():
    assert coord.snapshot().locks == ()
    with coord.lock("a", timeout=1):
        pass
    assert coord.snapshot().locks == ()

coord._table._mutex.acquire()
try:
    in_child(check)
finally:
    coord._table._mutex.release()
leave.set()
""")


def test_L13_a_block_that_spans_the_fork_ends_quietly_in_the_child() -> None:
    """The parent's hold is the parent's; the child leaves the block without an error, and can take the lock anew."""
    ends_well("""
with coord.lock("a"):
    with coord.lock("a"):
        pid = os.fork()
    if pid == 0:
        assert not coord.lock("a").locked()
if pid == 0:
    with coord.lock("a"):
        pass
    try:
        coord.lock("a").release()
    except NotHeldError:
        os._exit(0)
    os._exit(1)
assert os.waitpid(pid, 0)[1] == 0
assert coord.snapshot().locks == ()
""")


def test_L13_the_loop_that_ran_at_the_fork_does_not_run_in_the_child() -> None:
    """The child is a thread, until it runs a loop of its own: then its tasks exclude each other."""
    ends_well("""
import asyncio
from agentdiff._owner import current_owner, this_thread

async def hold(inside):
    async with coord.lock("a"):
        inside.append(1)
        await asyncio.sleep(0)
        assert len(inside) == 1, "two at once"
        inside.pop()

async def both(inside):
    await asyncio.gather(hold(inside), hold(inside))

def check():
    assert current_owner() is this_thread()
    asyncio.run(both([]))

async def parent():
    async with coord.lock("a"):
        pass
    in_child(check)
asyncio.run(parent())
""")


def test_L13_a_forked_child_delivers_its_own_events_and_none_of_the_parents() -> None:
    """Subscriptions live on; what the parent had pending stays the parent's; threads are made anew."""
    ends_well("""
got, entered, leave = [], threading.Event(), threading.Event()
def handler(data):
    if data == "block":
        entered.set()
        leave.wait(10)
    got.append(data)
coord.on("x", handler)
async def later(data):
    got.append(("async", data))
coord.on("y", later)
with coord.run("r"):
    coord.emit("x", "block")
    coord.emit("x", "parent's")
    coord.emit("y", 0)
    entered.wait(10)

    def check():
        assert coord.snapshot().pending == 0
        coord.emit("x", "child's")
        coord.emit("y", 1)
        coord.join(10)
        assert got == ["child's", ("async", 1)], got
        coord.close()

    in_child(check)
leave.set()
coord.close()
assert got == ["block", "parent's", ("async", 0)], got
""")


def test_L13_after_a_fork_limits_stay_and_places_are_empty() -> None:
    """What was used counts on; holds, waiters and what was taken but not entered are the parent's."""
    ends_well("""
coord.limit("api", concurrency=2, requests=3, tokens=100, per=600)
coord.limit("other", requests=1, per=600)
held, leave = threading.Event(), threading.Event()

def hold():
    with coord.lock("api", tokens=10):
        held.set()
        leave.wait(10)

def group():
    with coord.lock("api", "b", tokens=20):
        pass

def waits(name):
    while not any(lock.name == name and lock.waiters for lock in coord.snapshot().locks):
        pass

threads = [threading.Thread(target=target, daemon=True) for target in (hold, group, coord.lock("api").acquire)]
with coord.lock("other"):
    threads[0].start()
    held.wait(10)
    with coord.lock("b"):
        threads[1].start()
        waits("b")
        threads[2].start()
        waits("api")
        pid = os.fork()
        if pid == 0:
            assert coord.snapshot().locks == ()
    if pid == 0:
        api, other = coord.snapshot().limits
        assert (api.places_taken, api.requests_used, api.tokens_used, api.waiting) == (0, 1, 10, 0), api
        assert (other.places_taken, other.requests_used) == (0, 1), other
if pid == 0:
    with coord.lock("api", tokens=90, timeout=0) as slot:
        slot.commit(tokens=1)
    coord.lock("api").acquire(timeout=0)
    assert coord.lock("api").locked()
    coord.lock("api").release()
    try:
        coord.lock("other").release()
    except NotHeldError:
        (api, other) = coord.snapshot().limits
        assert (api.places_taken, api.requests_used, api.tokens_used) == (0, 3, 11), api
        os._exit(0)
    os._exit(1)
assert os.waitpid(pid, 0)[1] == 0
leave.set()
threads[0].join()
threads[1].join()
assert coord.snapshot().limits[0].requests_used == 3
""")


def test_L13_a_place_that_was_taken_before_a_fork_and_is_entered_after_it_counts_nothing() -> None:
    """The child of a fork amid a loop that goes on there: what was on its way was the parent's."""
    table = LockTable(FakeClock())
    table.limit("a", Limit(concurrency=1, requests=2, tokens=10))
    me = current_owner()
    slot = Context().run(lambda: table.acquire(table.claim(Door(table, "a", How(tokens=5)), me), me, None, False))
    assert slot is not None
    table.forget(forked=True)
    table.all_taken([slot])
    (found,) = table.limits()
    assert (found.places_taken, found.requests_used, found.tokens_used) == (0, 0, 0)
    assert table.is_free("a")
