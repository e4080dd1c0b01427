"""The pytest plugin: fixtures for tests of coordinated code (T1). pytest finds it where agentdiff is installed."""

from __future__ import annotations

from collections.abc import Generator, Iterator
from typing import Any

import pytest

from .coordinator import Coordinator
from .default import default_coordinator
from .testing import EventRecorder, InlineCoordinator


def _checked(coordinator: Coordinator, request: pytest.FixtureRequest) -> Coordinator:
    request.node.stash.setdefault(_TO_CHECK, []).append(coordinator)
    return coordinator


def _end(coordinator: Coordinator) -> None:
    """With its threads, unless something is left that may never end."""
    if coordinator.snapshot().pending:
        coordinator.quit()
    else:
        coordinator.close()


_TO_CHECK: pytest.StashKey[list[Coordinator]] = pytest.StashKey()


@pytest.fixture
def coordinator(request: pytest.FixtureRequest) -> Iterator[Coordinator]:
    """A coordinator of this test's own. The test fails if it leaves a lock held, an event unhandled, a join unmet."""
    coord = Coordinator(name=request.node.name)
    yield _checked(coord, request)
    _end(coord)


@pytest.fixture
def inline_coordinator(request: pytest.FixtureRequest) -> Iterator[InlineCoordinator]:
    """The same, but every event is handled before `emit` returns, on the thread that emits."""
    coord = InlineCoordinator(name=request.node.name)
    _checked(coord, request)
    yield coord
    _end(coord)


@pytest.fixture
def fresh_default_coordinator(request: pytest.FixtureRequest) -> Iterator[Coordinator]:
    """The default coordinator behind `coordinate`, `when`, `emit`, as at the program's start, for this test alone.

    Handlers and agents that were registered on import are there; what the test adds is gone after it.
    """
    with default_coordinator().isolated() as coord:
        yield _checked(coord, request)


@pytest.fixture
def recorder(coordinator: Coordinator) -> EventRecorder:
    """Records every event of the test's `coordinator`."""
    return EventRecorder(coordinator)


@pytest.hookimpl(hookwrapper=True)
def pytest_runtest_call(item: pytest.Item) -> Generator[None, Any, None]:
    """After the test itself: what has it left behind?"""
    outcome = yield
    if outcome.excinfo is not None:
        return
    leaks = [leak for coord in item.stash.get(_TO_CHECK, []) for leak in coord.leaks()]
    if leaks:
        text = "the test leaves something behind:\n" + "\n".join(f"  - {leak}" for leak in leaks)
        outcome.force_exception(pytest.fail.Exception(text, pytrace=False))
