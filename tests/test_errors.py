"""The error tree: one root, facts as fields, and pickling that keeps them."""

from __future__ import annotations

import copy
import inspect
import pickle
from typing import Any

import pytest

import agentdiff
from agentdiff import (
    CascadeError,
    ClosedError,
    CoordinationError,
    CoordinationTimeoutError,
    DeadlockError,
    DependencyFailedError,
    LoopClosedError,
    NotHeldError,
    QueueFullError,
    StaleWriteError,
    StoreError,
    errors,
)

EXAMPLES: list[tuple[CoordinationError, dict[str, Any]]] = [
    (CoordinationError("text"), {}),
    (
        CoordinationTimeoutError("text", name="x", timeout=1.5, holder="thread 'T'", held_for=2.0, waiting=3),
        {"name": "x", "timeout": 1.5, "holder": "thread 'T'", "held_for": 2.0, "waiting": 3},
    ),
    (
        CoordinationTimeoutError("text"),
        {"name": "", "timeout": None, "holder": None, "held_for": None, "waiting": 0},
    ),
    (DeadlockError("text", name="x", cycle=("a waits", "b waits")), {"name": "x", "cycle": ("a waits", "b waits")}),
    (NotHeldError("text", name="x", holder="task 'T'"), {"name": "x", "holder": "task 'T'"}),
    (ClosedError("text"), {}),
    (QueueFullError("text", name="e", pending=3, max_pending=2), {"name": "e", "pending": 3, "max_pending": 2}),
    (
        StaleWriteError("text", name="x", version=1, current=2, writer="thread 'T'", written_at=3.0, run="r"),
        {"name": "x", "version": 1, "current": 2, "writer": "thread 'T'", "written_at": 3.0, "run": "r"},
    ),
    (
        DependencyFailedError("text", agent="a", dependency="b", error="no", run="r"),
        {"agent": "a", "dependency": "b", "error": "no", "run": "r"},
    ),
    (LoopClosedError("text"), {}),
    (StoreError("text", store="<MemoryStore>"), {"store": "<MemoryStore>"}),
    (CascadeError("text", name="e", depth=3, loop=("e", "f", "e")), {"name": "e", "depth": 3, "loop": ("e", "f", "e")}),
]
every_error = pytest.mark.parametrize(("error", "fields"), EXAMPLES, ids=lambda v: type(v).__name__)


def defined() -> set[Any]:
    return {value for value in vars(errors).values() if inspect.isclass(value) and issubclass(value, BaseException)}


def test_L4_every_error_is_in_the_tree_and_public() -> None:
    """Whoever catches `CoordinationError` catches all; every error has a public name, and an example in this file."""
    assert all(issubclass(error, CoordinationError) for error in defined())
    assert {error.__name__ for error in defined()} <= set(agentdiff.__all__)
    assert {type(error) for error, _ in EXAMPLES} == defined()


@pytest.mark.parametrize(
    ("error", "kind"),
    [
        (CoordinationTimeoutError, TimeoutError),
        (DeadlockError, RuntimeError),
        (NotHeldError, RuntimeError),
        (ClosedError, RuntimeError),
        (LoopClosedError, RuntimeError),
        (StoreError, OSError),
    ],
)
def test_L4_errors_are_also_what_the_standard_library_would_raise(error: Any, kind: Any) -> None:
    """A timeout is a `TimeoutError`, misuse is a `RuntimeError`."""
    with pytest.raises(kind):
        raise error("text")


@every_error
def test_L4_errors_have_fields_and_text(error: CoordinationError, fields: dict[str, Any]) -> None:
    """The facts are fields, the text is the text."""
    assert (str(error), error.args) == ("text", ("text",))
    assert vars(error) == fields


@every_error
@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
def test_L4_errors_pickle_with_their_fields(error: CoordinationError, fields: dict[str, Any], protocol: int) -> None:
    """Through any pickle protocol come class, text and fields."""
    again = pickle.loads(pickle.dumps(error, protocol))
    assert type(again) is type(error)
    assert (str(again), again.args, vars(again)) == (str(error), error.args, fields)


@every_error
def test_L4_errors_can_be_copied(error: CoordinationError, fields: dict[str, Any]) -> None:
    """Copies keep text and fields, and what others have noted on the error."""
    error.seen_by = "a monitor"  # type: ignore[attr-defined]
    try:
        for again in (copy.copy(error), copy.deepcopy(error), pickle.loads(pickle.dumps(error))):
            assert (type(again), str(again)) == (type(error), str(error))
            assert vars(again) == {**fields, "seen_by": "a monitor"}
    finally:
        del error.seen_by  # type: ignore[attr-defined]


class Mine(CoordinationTimeoutError):
    """What a user derives."""

    def __init__(self, code: int) -> None:
        super().__init__(f"code {code}", name="mine")
        self.code = code


def test_L4_derived_errors_pickle_too() -> None:
    """A user's own error below the tree pickles, even if its constructor takes something else."""
    again = pickle.loads(pickle.dumps(Mine(7)))
    assert (type(again), str(again), again.code, again.name) == (Mine, "code 7", 7, "mine")
