from __future__ import annotations

import faulthandler
import os
import signal
import threading
from collections.abc import Iterator
from typing import Any

import pytest
from redis_server import RedisServer
from visitors import CountingClock, nothing_left

from agentdiff import Coordinator
from agentdiff.default import default_coordinator, reset_default

TIME_LIMIT = 60.0
REAL_STDERR = pytest.StashKey[int]()  # pytest redirects the other one, and a dump must be seen


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "time_limit(seconds): how long this test may take, if not 60 s")
    config.stash[REAL_STDERR] = os.dup(2)  # here it is not redirected; while this file was imported it was
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's job in the background is born deaf to Ctrl-C


@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol(item: Any) -> Any:
    """A test that hangs is a failure: every thread's stack is dumped, and the run ends."""
    marker = item.get_closest_marker("time_limit")
    seconds = marker.args[0] if marker else TIME_LIMIT
    faulthandler.dump_traceback_later(seconds, exit=True, file=item.config.stash[REAL_STDERR])
    try:
        return (yield)
    finally:
        faulthandler.cancel_dump_traceback_later()


@pytest.fixture
def clock() -> CountingClock:
    return CountingClock()


@pytest.fixture
def timed(clock: CountingClock) -> Iterator[Coordinator]:
    """A coordinator whose time is the test's; nobody is inside or waits at its end, and no timer is left."""
    with Coordinator(name="timed", clock=clock, slow_after=None) as coordinator:
        yield coordinator
        assert nothing_left(coordinator)
        assert clock.timers == []


@pytest.fixture
def coord() -> Iterator[Coordinator]:
    """A coordinator; at the end all its events are delivered and no thread of it is left."""
    before = set(threading.enumerate())
    coordinator = Coordinator(name="test")
    yield coordinator
    coordinator.close()
    left = [t for t in threading.enumerate() if t not in before and t.name.startswith("test-")]
    assert not left


@pytest.fixture
def fresh_default() -> Iterator[Coordinator]:
    """The facades act on a default coordinator of this test's own."""
    reset_default()
    yield default_coordinator()
    default_coordinator().close()
    reset_default()


@pytest.fixture
def redis_server() -> Iterator[RedisServer]:
    """A real Redis of this test's own."""
    with RedisServer() as server:
        yield server
