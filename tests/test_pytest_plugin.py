"""The plugin meets pytest itself: each test here runs a user's test suite, with the plugin found as installed."""

from __future__ import annotations

import re

import pytest
from support import ROOT

pytest_plugins = ["pytester"]


@pytest.fixture
def suite(pytester):
    """Runs tests of a user's; in a process of its own where they leave threads, or need a default coordinator."""

    def run(source, *, apart=False):
        pytester.makepyfile(source)
        runs = pytester.runpytest_subprocess if apart else pytester.runpytest_inprocess
        return runs("-p", "no:cacheprovider")

    return run


def test_T1_the_suite_that_the_docs_show_passes(pytester):
    """Module and tests as they stand there."""
    page = (ROOT / "docs" / "testing.md").read_text(encoding="utf-8")
    agents, tests = re.findall(r"```python\n(# (?:test_)?agents\.py\n.*?)```", page, re.S)
    pytester.makepyfile(agents=agents, test_agents=f"from agents import make_agents\n{tests}")
    pytester.runpytest_subprocess("-p", "no:cacheprovider").assert_outcomes(passed=3)


def test_T1_clean_tests_pass(suite):
    """Whatever they use, and whether their coordinator is closed or not."""
    suite(
        """
        import asyncio

        def test_locks_and_events(coordinator, recorder):
            @coordinator.coordinate("writer", lock_name="report")
            def write(text):
                return text

            write("bees")
            recorder.assert_order("writer_started", "writer_complete")
            assert coordinator.name == "test_locks_and_events"

        def test_inline(inline_coordinator):
            seen = []
            inline_coordinator.on("ready", seen.append)
            inline_coordinator.emit("ready", 1)
            assert seen == [1]

        def test_events_that_take_a_moment_are_waited_for(coordinator):
            coordinator.on("slow", lambda data: __import__("time").sleep(0.05))
            coordinator.emit("slow")

        def test_a_closed_one(coordinator):
            coordinator.close()

        def test_async(coordinator):
            async def main():
                async with coordinator.lock("a"):
                    pass
            asyncio.run(main())
        """
    ).assert_outcomes(passed=5)


LEAKS = {
    "lock": (
        'coordinator.lock("record").acquire()',
        ["*lock 'record' is still held by thread \"MainThread\"*"],
    ),
    "waiter": (
        """
    import threading
    threading.Thread(target=lambda: coordinator.lock("record").acquire(), daemon=True).start()
    while not coordinator.snapshot().locks:
        pass
    threading.Thread(target=lambda: coordinator.lock("record").acquire(), daemon=True, name="late").start()
    while not coordinator.snapshot().locks[0].waiters:
        pass
        """,
        ["*lock 'record' is still held by thread*", "*thread \"late\" still waits for lock 'record'*"],
    ),
    "event": (
        """
    import threading
    gate = threading.Event()
    coordinator.on("question", lambda data: gate.wait(5))
    coordinator.emit("question")
        """,
        ["*1 event(s) are not handled: question*"],
    ),
    "agent": (
        """
    import threading
    analyst = coordinator.coordinate("analyst", after="researcher")(print)
    threading.Thread(target=analyst, daemon=True).start()
    while not any(agent.waits_for for agent in coordinator.snapshot().agents):
        pass
        """,
        ["*agent 'analyst' (thread *still waits for 'researcher'*"],
    ),
    "join": (
        """
    from agentdiff import all_of
    coordinator.on(all_of("facts", "style"), print)
    coordinator.emit("facts")
        """,
        ["*all_of('facts', 'style') still waits for 'style'*"],
    ),
}


@pytest.mark.parametrize(
    ("leak", "fixture"),
    [*((leak, "coordinator") for leak in LEAKS), ("lock", "inline_coordinator"), ("join", "inline_coordinator")],
)
def test_T1_a_test_that_leaves_something_behind_fails(suite, leak, fixture):
    """And the message says what: a lock, a waiter, an event, a join, an agent."""
    code, lines = LEAKS[leak]
    result = suite(
        f"def test_leaks({fixture}):\n    coordinator = {fixture}\n    {code.strip()}\n",
        apart=leak in {"waiter", "agent"},
    )
    result.assert_outcomes(failed=1)
    result.stdout.fnmatch_lines(["*the test leaves something behind:*", *lines])


def test_T1_a_test_that_fails_by_itself_says_so_and_nothing_else(suite):
    """Its own failure is what counts."""
    result = suite(
        """
        def test_fails(coordinator):
            coordinator.lock("record").acquire()
            assert 1 == 2
        """
    )
    result.assert_outcomes(failed=1)
    result.stdout.no_fnmatch_line("*leaves something behind*")
    result.stdout.fnmatch_lines(["*assert 1 == 2*"])


def test_T1_the_facades_get_a_fresh_default_coordinator_for_one_test(suite):
    """What was registered on import is there; what a test adds, declares, writes, and leaves is gone after it."""
    suite(
        """
        import threading
        from agentdiff import coordinate, default_coordinator, emit, limit, lock, when

        seen = []

        @when("writer_complete")
        def on_complete(data):
            seen.append(data["result"])

        @coordinate("writer")
        def write(text):
            return text

        def test_registered_on_import(fresh_default_coordinator):
            write("one")
            default_coordinator().join(5)
            assert seen == ["one"]

        def test_adds(fresh_default_coordinator):
            when("writer_complete", lambda data: seen.append("added"))
            limit("api", concurrency=2)
            fresh_default_coordinator.state("n").write(1, version=0)
            write("two")
            fresh_default_coordinator.join(5)
            assert seen == ["one", "two", "added"]

        def test_finds_nothing_of_the_other(fresh_default_coordinator):
            write("three")
            fresh_default_coordinator.join(5)
            assert seen == ["one", "two", "added", "three"]
            assert fresh_default_coordinator.snapshot().limits == ()
            assert fresh_default_coordinator.state("n").read() == (None, 0)
            assert fresh_default_coordinator is default_coordinator()
        """,
        apart=True,
    ).assert_outcomes(passed=3)


def test_T1_a_leak_into_the_default_coordinator_fails_its_test_only(suite):
    """The next test finds a lock that is free."""
    result = suite(
        """
        from agentdiff import lock

        def test_leaks(fresh_default_coordinator):
            lock("record").acquire()

        def test_next(fresh_default_coordinator):
            assert not lock("record").locked()
        """,
        apart=True,
    )
    result.assert_outcomes(failed=1, passed=1)
    result.stdout.fnmatch_lines(["*lock 'record' is still held by*"])


def test_T1_a_fixtures_threads_end_with_its_test(suite):
    """A suite of a thousand tests doesn't gather a thousand threads."""
    suite(
        """
        import threading

        def test_one(coordinator):
            async def handler(data):
                pass
            coordinator.on("a", handler)
            coordinator.on("a", print)
            coordinator.emit("a").wait(5)

        def test_two():
            assert [t.name for t in threading.enumerate() if t.name.startswith("test_one")] == []
        """
    ).assert_outcomes(passed=2)
