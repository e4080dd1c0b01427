"""What an event is, which run it belongs to, and which names a pattern means."""

from __future__ import annotations

import re
from contextvars import ContextVar
from typing import Any, Optional

import attrs


@attrs.frozen(kw_only=True)
class Event:
    """A named, immutable fact (E14).

    Attributes:
        name: its name, such as `researcher_complete`.
        data: what was emitted with it: the very object, not a copy.
        sender: who emitted it, where said: lifecycle events say the agent's name.
        id: unique; also the id of the run that its handlers start when it belongs to none.
        time: when it was emitted, in seconds since the epoch.
        run_id: the run that it belongs to; None outside of any.
        parent_id: the id of the event whose handler, or whose agent call, emitted it; None at the start of a chain.
    """

    name: str
    data: Any
    sender: Optional[str]
    id: str
    time: float
    run_id: Optional[str]
    parent_id: Optional[str]


@attrs.frozen(kw_only=True)
class Run:
    """All that one piece of work causes (E12): what `with coord.run(...) as run` yields.

    Attributes:
        id: the run's name; its events carry it as `run_id`.
    """

    id: str


CAUSE: ContextVar[Any] = ContextVar("agentdiff_cause", default=None)
"""The innermost cause in this context, of whichever bus: each reads only its own."""


def check_name(name: object) -> str:
    """Refuse what can't name an event."""
    if not isinstance(name, str):
        raise TypeError(f"an event's name must be a string, not {type(name).__name__}: {name!r}")
    if not name:
        raise ValueError("an event's name must not be empty")
    return name


def is_pattern(name: str) -> bool:
    """Whether a subscription's name means more than one event (E9)."""
    return "*" in name or "?" in name


def as_regex(pattern: str) -> str:
    """The regular expression for a pattern: `*` is any characters, `?` is any one, all else is literal (E9)."""
    return "".join({"*": ".*", "?": "."}.get(c) or re.escape(c) for c in pattern)
