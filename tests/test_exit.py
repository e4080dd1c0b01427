from __future__ import annotations

import os
import signal
import subprocess
import sys
import textwrap
import threading
import time

import pytest
from support import ROOT, run_script

NO_THREADS_AT_EXIT = pytest.mark.skipif(
    (3, 12, 0) <= sys.version_info[:3] <= (3, 12, 1), reason="this CPython starts no threads at exit"
)
POSIX = pytest.mark.skipif(os.name != "posix", reason="sends signals")

STAGES = """
import asyncio, concurrent.futures, os, sys, threading, time
from agentdiff import Coordinator, configure, coordinate, emit, when

count, pause, kind = int(sys.argv[1]), float(sys.argv[2]), sys.argv[3]

def say(number):
    sys.stdout.write(f"stage {number}\\n")
    sys.stdout.flush()

def work(number):
    time.sleep(pause)
    say(number)

def in_pool(number):
    with concurrent.futures.ThreadPoolExecutor(2) as pool:
        pool.submit(work, number).result()

async def in_task(number):
    await asyncio.sleep(pause)
    say(number)

async def in_thread_of_task(number):
    await asyncio.to_thread(work, number)

for number in range(count):
    @coordinate(f"stage{number}")
    def stage(number=number):
        {"sync": work, "pool": in_pool}[kind](number)

    @coordinate(f"stage{number}")
    async def stage_async(number=number):
        await {"async": in_task, "to_thread": in_thread_of_task}[kind](number)

    chosen = stage if kind in ("sync", "pool") else stage_async
    if number == 0:
        first = chosen
    elif chosen is stage:
        @when(f"stage{number - 1}_complete")
        def start_next(data, stage=stage):
            stage()
    else:
        @when(f"stage{number - 1}_complete")
        async def start_next_async(data, stage_async=stage_async):
            await stage_async()
"""


def run(source, *args):
    """A script in a process of its own; one that hangs fails the test."""
    return run_script(source, *args, timeout=20)


def stages(last_lines, count, pause, kind):
    return run(STAGES + textwrap.dedent(last_lines), str(count), str(pause), kind)


def numbers(done):
    return [int(line.split()[1]) for line in done.stdout.splitlines()]


def run_clean(source):
    """Run a script that is to end well and to say nothing on stderr; give what it printed."""
    done = run(source)
    assert (done.returncode, done.stderr) == (0, "")
    return done.stdout.split()


# -- chains --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "count", "pause"),
    [
        *[(kind, *size) for kind in ("sync", "async") for size in ((3, 0.1), (5, 0.1), (20, 0.02))],
        *[
            pytest.param(kind, *size, marks=NO_THREADS_AT_EXIT)
            for kind in ("pool", "to_thread")
            for size in ((3, 0.1), (20, 0.02))
        ],
    ],
)
def test_E6_a_script_whose_last_line_starts_a_chain_runs_all_of_it(kind, count, pause):
    """At any depth, with sync and async handlers, with pools and threads of their own; no sleep, no join."""
    last = "asyncio.run(first())" if kind in ("async", "to_thread") else "first()"
    done = stages(last, count, pause, kind)
    assert (done.returncode, done.stderr) == (0, "")
    assert numbers(done) == list(range(count))


def test_E6_threads_started_on_the_last_lines_are_part_of_the_chain():
    """Three plain threads, each with a chain of its own."""
    done = stages("for _ in range(3): threading.Thread(target=first).start()", 5, 0.05, "sync")
    assert (done.returncode, done.stderr) == (0, "")
    assert sorted(numbers(done)) == sorted(list(range(5)) * 3)


@pytest.mark.parametrize(
    ("ending", "code", "said"),
    [
        ('raise ValueError("mine")', 1, "ValueError: mine"),
        ("sys.exit(3)", 3, ""),
        ('sys.exit("said why")', 1, "said why"),
        ("sys.exit()", 0, ""),
    ],
)
def test_E6_the_exit_code_is_what_it_would_have_been(ending, code, said):
    """Whatever ends the script: the chain runs, and neither code nor message changes."""
    done = stages(f"first()\n{ending}", 5, 0.02, "sync")
    assert done.returncode == code
    assert said in done.stderr
    assert numbers(done) == list(range(5))
    if not said:
        assert done.stderr == ""


@pytest.mark.parametrize("kind", ["def", "async def"])
def test_E6_a_coordinator_that_nobody_holds_finishes_its_work(kind):
    """It was made within a function that is over."""
    source = f"""
        import asyncio, time
        from agentdiff import Coordinator

        def main():
            coord = Coordinator()

            @coord.on("a")
            {kind} handler(data):
                {"await asyncio" if kind == "async def" else "time"}.sleep(0.05)
                print(data, flush=True)
                if data:
                    coord.emit("a", data - 1)

            coord.emit("a", 3)

        main()
    """
    assert run_clean(source) == ["3", "2", "1", "0"]


def test_E6_several_coordinators_drain_into_each_other():
    """A chain may go from one to the other and back."""
    source = """
        import time
        from agentdiff import Coordinator
        one, two = Coordinator(), Coordinator()

        def relay(to):
            def handler(data):
                time.sleep(0.03)
                print(data, flush=True)
                if data:
                    to.emit("a", data - 1)
            return handler

        one.on("a", relay(two))
        two.on("a", relay(one))
        one.emit("a", 5)
    """
    assert run_clean(source) == ["5", "4", "3", "2", "1", "0"]


def test_E6_concurrent_handlers_are_waited_for():
    """Exit doesn't cut them off."""
    source = """
        import time
        from agentdiff import emit, when
        when("a", lambda data: (time.sleep(0.2), print("done")), concurrent=True)
        emit("a")
    """
    assert run_clean(source) == ["done"]


def test_E6_idle_workers_that_have_ended_are_no_problem():
    """The chain begins long after the last event: no worker is there any more."""
    source = """
        import time
        from agentdiff import _workers, emit, when
        from agentdiff.default import default_coordinator
        _workers.PARK_FOR = 0.001
        @when("a")
        def handler(data):
            time.sleep(0.02)
            print(data)
            if data:
                emit("a", data - 1)
        emit("a", 0).wait(10)
        while default_coordinator()._bus.workers.threads:
            time.sleep(0.001)
        emit("a", 3)
    """
    assert run_clean(source) == ["0", "3", "2", "1", "0"]


@pytest.mark.parametrize("kind", ["thread", "executor"])
def test_E6_who_emits_late_is_part_of_the_chain(kind):
    """A plain thread, or an executor's job, that still runs when the script is over."""
    start = {
        "thread": "threading.Thread(target=late).start()",
        "executor": "concurrent.futures.ThreadPoolExecutor(1).submit(late)",
    }[kind]
    source = f"""
        import concurrent.futures, threading, time
        from agentdiff import emit, when

        @when("a")
        def handler(data):
            time.sleep(0.02)
            print(data, flush=True)
            if data:
                emit("a", data - 1)

        @when("b")
        async def handler_async(data):
            print("async", flush=True)

        def late():
            time.sleep(0.3)
            emit("a", 3)
            emit("b")

        {start}
    """
    assert sorted(run_clean(source)) == ["0", "1", "2", "3", "async"]


@NO_THREADS_AT_EXIT
@pytest.mark.parametrize("kind", ["thread", "executor"])
def test_E6_what_a_late_emitter_causes_may_use_thread_pools(kind):
    """The executors are shut down after the drain, not before."""
    start = {
        "thread": "threading.Thread(target=late).start()",
        "executor": "concurrent.futures.ThreadPoolExecutor(1).submit(late)",
    }[kind]
    source = f"""
        import concurrent.futures, threading, time
        from agentdiff import emit, when

        @when("a")
        def handler(data):
            with concurrent.futures.ThreadPoolExecutor(1) as pool:
                print(pool.submit(lambda: "pooled").result())

        def late():
            time.sleep(0.3)
            emit("a")

        {start}
    """
    assert run_clean(source) == ["pooled"]


@pytest.mark.parametrize("kind", ["last line", "executor"])
def test_E6_a_handler_that_waits_for_another_event_needs_no_thread_that_cannot_start(kind):
    """Some CPythons start no threads at exit: who drains lends a hand, if all workers there are wait."""
    start = {
        "last line": "emit('a')",
        "executor": "concurrent.futures.ThreadPoolExecutor(1).submit(late)",
    }[kind]
    source = f"""
        import concurrent.futures, time
        from agentdiff import emit, when

        @when("a")
        def ask(data):
            time.sleep(0.2)
            print(emit("b").wait().results[0])

        @when("b")
        def answer(data):
            return "answer"

        def late():
            time.sleep(0.3)
            emit("a")

        {start}
    """
    assert run_clean(source) == ["answer"]


def test_E6_work_emitted_by_other_exit_handlers_is_done():
    """`atexit` functions registered after ours run before it."""
    source = """
        import atexit
        from agentdiff import emit, when
        when("a", lambda data: print("done"))
        atexit.register(emit, "a")
    """
    assert run_clean(source) == ["done"]


def test_E6_with_nothing_to_do_the_script_ends_at_once():
    """Subscriptions, sync and async, and idle threads keep no process alive."""
    source = """
        import time
        from agentdiff import emit, when

        @when("a")
        def handler(data): pass

        @when("*")
        async def handler_async(data): pass

        emit("a").wait()
        print(time.time())
    """
    (ended,) = run_clean(source)
    assert time.time() - float(ended) < 5


@pytest.mark.parametrize("wait", ["main.join()", "while main.is_alive(): time.sleep(0.01)"])
@pytest.mark.parametrize("began", ["before the end", "at the end"])
def test_E6_a_thread_that_waits_for_the_main_thread_to_end_is_not_waited_for(wait, began):
    """A watchdog, say: it would have ended with the script, so the drain must not wait for it for ever."""
    source = f"""
        import os, threading, time
        from agentdiff import emit, when
        main = threading.main_thread()
        when("a", lambda data: os.write(1, data.encode() + bytes([10])))  # in one piece

        def watchdog():
            time.sleep({0 if began == "before the end" else 0.3})
            {wait}
            emit("a", "bye")

        threading.Thread(target=watchdog).start()
        time.sleep(0.1)
        emit("a", "handled")
    """
    assert sorted(run_clean(source)) == ["bye", "handled"]


@pytest.mark.parametrize("kind", ["Thread", "Process"])
def test_E6_an_executor_that_is_left_open_keeps_no_process_alive(kind):
    """Its threads wait for the interpreter's own hook, which comes after ours."""
    source = f"""
        from concurrent.futures import {kind}PoolExecutor as Pool
        from agentdiff import emit, when

        if __name__ == "__main__":
            pool = Pool(1)
            when("a", lambda data: print(data))
            emit("a", pool.submit(abs, -3).result())
    """
    assert run_clean(source) == ["3"]


def test_E6_a_failing_handler_at_exit_is_logged_and_changes_no_code():
    """Its error is on stderr, by logging's last resort; the rest of the chain runs."""
    done = run("""
        from agentdiff import emit, when
        @when("a")
        def broken(data): raise ValueError("broken")
        when("a", lambda data: print("the rest"))
        emit("a")
    """)
    assert (done.returncode, done.stdout) == (0, "the rest\n")
    assert "ValueError: broken" in done.stderr


# -- time ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["def", "async def"])
def test_E6_exit_timeout_bounds_the_exit_and_says_what_was_abandoned(kind):
    """The handler hangs; the process ends, with its code, and tells how much is left."""
    done = run(f"""
        import asyncio, sys, threading
        from agentdiff import configure, emit, when
        configure(exit_timeout=0.3)
        @when("stuck")
        {kind} handler(data):
            {"await asyncio.Event" if kind == "async def" else "threading.Event"}().wait()
        for _ in range(3):
            emit("stuck")
        sys.exit(3)
    """)
    assert done.returncode == 3
    assert "3 events are abandoned" in done.stderr
    assert "exit_timeout of 0.3 s" in done.stderr


def test_E6_work_that_ends_within_exit_timeout_is_done_in_silence():
    """Nothing is abandoned, nothing is said."""
    source = """
        import time
        from agentdiff import configure, emit, when
        configure(exit_timeout=30)
        when("a", lambda data: (time.sleep(0.2), print("done")))
        emit("a")
    """
    assert run_clean(source) == ["done"]


def test_E6_after_exit_timeout_nothing_is_lost_in_silence():
    """A thread outlives the timeout and emits then: the event is handled, or it is said that it was not."""
    done = run("""
        import threading, time
        from agentdiff import configure, emit, when
        configure(exit_timeout=0.1)

        @when("late")
        def handler(data):
            time.sleep(0.5)
            print("handled")

        def late():
            time.sleep(0.5)
            emit("late")

        threading.Thread(target=late).start()
    """)
    assert done.returncode == 0
    assert "handled" in done.stdout or "abandoned" in done.stderr


# -- Ctrl-C --------------------------------------------------------------------------------------------------


def interrupted(source, *args, after=1):
    """Run a script, send SIGINT when it has printed so many lines; tell its code, output and errors.

    The script starts with Ctrl-C as Python sets it up, even if this process was started to ignore it.
    """
    source = "import signal; signal.signal(signal.SIGINT, signal.default_int_handler)\n" + textwrap.dedent(source)
    with subprocess.Popen(
        [sys.executable, "-c", source, *args],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    ) as process:
        hangs = threading.Timer(20, process.kill)
        hangs.start()
        try:
            lines = [process.stdout.readline() for _ in range(after)]
            time.sleep(0.1)  # until the main thread is where it stays: in a finalizer, Python would lose the interrupt
            process.send_signal(signal.SIGINT)
            out, err = process.communicate()
        finally:
            hangs.cancel()
            process.kill()
    return process.returncode, "".join(lines) + out, err


@POSIX
@pytest.mark.parametrize("kind", ["sync", "async"])
def test_E6_ctrl_c_in_the_middle_of_the_drain_ends_it(kind):
    """Soon, with the traceback, and as killed by SIGINT; it says how much is left undone."""
    last = "asyncio.run(first())" if kind == "async" else "first()"
    code, out, err = interrupted(STAGES + last, "40", "0.2", kind, after=3)
    assert code == -signal.SIGINT
    assert out.count("stage") < 40
    assert "Traceback (most recent call last)" in err
    assert "KeyboardInterrupt" in err
    assert "abandoned: interrupted" in err


@POSIX
@pytest.mark.parametrize("where", ["first()", "asyncio.run(wait())", "delivery.wait()", "time.sleep(20)"])
def test_E6_ctrl_c_while_the_script_still_runs_drains_nothing(where):
    """Whoever interrupts the program doesn't want the rest of it either."""
    code, out, err = interrupted(
        f"""
        import asyncio, time
        from agentdiff import coordinate, emit, when

        @when("slow")
        def slow(data):
            print("begins", flush=True)
            time.sleep(1000)

        @coordinate("first")
        def first():
            time.sleep(20)

        async def wait():
            await delivery

        delivery = emit("slow")
        {where}
        """
    )
    assert code == -signal.SIGINT
    assert out == "begins\n"
    assert "KeyboardInterrupt" in err


@POSIX
def test_E6_ctrl_c_while_the_draining_thread_lends_a_hand_ends_it():
    """The main thread itself runs the handler, as it does where no thread can start."""
    code, out, err = interrupted(
        """
        import threading, time
        from agentdiff import emit, when

        def refuse(self):
            raise RuntimeError("can't create new thread at interpreter shutdown")

        threading.Thread.start = refuse

        @when("a")
        def handler(data):
            print("begins", flush=True)
            time.sleep(20)
            print("ends", flush=True)

        emit("a")
        emit("a")
        """
    )
    assert code == -signal.SIGINT
    assert out == "begins\n"
    assert "KeyboardInterrupt" in err


@POSIX
def test_E6_ctrl_c_while_waiting_for_a_thread_that_may_still_emit_ends_it():
    """Nothing is pending; a plain thread runs on and on."""
    code, _, err = interrupted(
        """
        import threading, time
        from agentdiff import when
        when("a", print)
        over = threading.Event()
        threading._register_atexit(over.set)  # runs before ours
        def endless():
            over.wait()
            print("begins", flush=True)
            time.sleep(1000)
        threading.Thread(target=endless).start()
        """
    )
    assert code == -signal.SIGINT
    assert "KeyboardInterrupt" in err


@POSIX
def test_E6_ctrl_c_at_exit_runs_other_exit_handlers():
    """And what was printed is not lost in a buffer."""
    code, out, _ = interrupted(
        """
        import atexit, time
        from agentdiff import emit, when
        atexit.register(print, "goodbye")
        when("a", lambda data: (print("begins", flush=True), time.sleep(1000)))
        emit("a")
        """
    )
    assert code == -signal.SIGINT
    assert out == "begins\ngoodbye\n"


@POSIX
def test_E3_ctrl_c_in_an_async_handler_on_the_main_threads_loop_ends_the_program():
    """It is the program's own loop: Ctrl-C is not just one more error of a handler."""
    code, out, err = interrupted(
        """
        import asyncio, time
        from agentdiff import emit, when
        loop = asyncio.new_event_loop()

        async def busy(data):
            print("begins", flush=True)
            time.sleep(1000)

        async def main():
            await emit("a")
            print("went on", flush=True)

        when("a", busy, loop=loop)
        loop.run_until_complete(main())
        """
    )
    assert code == -signal.SIGINT
    assert out == "begins\n"
    assert "KeyboardInterrupt" in err


@POSIX
def test_E7_what_ctrl_c_in_the_block_has_abandoned_is_not_drained_at_exit():
    """The block said that it abandons its events; that the script then ends in good order changes nothing."""
    code, out, err = interrupted(
        """
        import sys, time
        from agentdiff import Coordinator
        try:
            with Coordinator() as coord:
                @coord.on("a")
                def handler(data):
                    print(data, flush=True)
                    time.sleep(1000)
                for number in range(10):
                    coord.emit("a", number)
                time.sleep(20)
        except KeyboardInterrupt:
            sys.exit(3)
        """
    )
    assert code == 3
    assert "abandoned" in err
    assert out == "0\n"
