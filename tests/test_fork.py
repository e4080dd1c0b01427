"""After a fork the child has its subscriptions and nothing else (L13)."""

from __future__ import annotations

import os

import pytest
from support import run_script

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
