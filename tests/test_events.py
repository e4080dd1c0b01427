from __future__ import annotations

import re

import attrs
import pytest

from agentdiff import Event, Run
from agentdiff.events import as_regex, check_name, is_pattern


def make_event(**changes: object) -> Event:
    facts = {"name": "a", "data": 1, "sender": None, "id": "1", "time": 0.0, "run_id": None, "parent_id": None}
    return Event(**{**facts, **changes})  # type: ignore[arg-type]


def matches(pattern: str, name: str) -> bool:
    return re.compile(as_regex(pattern), re.DOTALL).fullmatch(name) is not None


def test_E14_an_event_is_frozen():
    """No handler can change the event that the next one gets."""
    event = make_event()
    with pytest.raises(attrs.exceptions.FrozenInstanceError):
        event.name = "b"  # type: ignore[misc]


def test_E14_an_event_has_these_fields():
    """The fields and their order are promised; all are given by name."""
    fields = [field.name for field in attrs.fields(Event)]
    assert fields == ["name", "data", "sender", "id", "time", "run_id", "parent_id"]
    with pytest.raises(TypeError):
        Event("a", 1, None, "1", 0.0, None, None)  # type: ignore[misc]


def test_E12_a_run_is_a_frozen_id():
    """What `with coord.run(...) as run` gives is a value."""
    run = Run(id="r")
    assert run == Run(id="r")
    with pytest.raises(attrs.exceptions.FrozenInstanceError):
        run.id = "s"  # type: ignore[misc]


@pytest.mark.parametrize(
    ("pattern", "name", "expected"),
    [
        ("*", "", True),
        ("*", "anything.at all\nwith lines", True),
        ("*_complete", "researcher_complete", True),
        ("*_complete", "researcher_complete_not", False),
        ("team.*", "team.a.b", True),
        ("team.*", "teamXa", False),
        ("a?c", "abc", True),
        ("a?c", "a\nc", True),
        ("a?c", "ac", False),
        ("a?c", "abbc", False),
        ("x[1]*", "x[1]y", True),
        ("x[1]*", "x1y", False),
        ("[ab]?", "a1", False),
        ("(a|b)+*", "a", False),
        ("(a|b)+*", "(a|b)+c", True),
        ("*", "ä☃", True),
        ("a*b*c", "a-b-b-c", True),
        ("*a", "b", False),
        ("^a$*", "^a$!", True),
        ("A*", "a", False),
    ],
)
def test_E9_a_pattern_means_these_names(pattern, name, expected):
    """`*` is any characters, dots and line ends too, `?` is any one; everything else is literal."""
    assert matches(pattern, name) is expected


@pytest.mark.parametrize(("name", "expected"), [("a", False), ("a*", True), ("?", True), ("a[b]", False), ("", False)])
def test_E9_only_stars_and_question_marks_make_a_pattern(name, expected):
    """A bracket makes no pattern."""
    assert is_pattern(name) is expected


@pytest.mark.parametrize("name", [None, 1, b"a", ["a"]])
def test_E9_a_name_that_is_no_string_is_refused(name):
    """The error says what it got."""
    with pytest.raises(TypeError, match=type(name).__name__):
        check_name(name)


def test_E9_an_empty_name_is_refused():
    """An empty name would be a slip."""
    with pytest.raises(ValueError, match="empty"):
        check_name("")
    assert check_name("a") == "a"
