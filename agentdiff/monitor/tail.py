"""Events as lines of text, as they come or as a tree of causes."""

from __future__ import annotations

import json
import time
from collections import deque
from collections.abc import Iterable, Iterator
from typing import Any, Callable, Optional

import attrs

from ..events import Event
from ..stores import Store
from .history import as_text, data_of, seconds, short

POLL = 0.1
"""Seconds between two looks at a store that is followed."""

_LONGEST = 160
_DEEPEST = 24  # columns would run out


def as_line(event: Event) -> str:
    """An event on one line: when, what, with what, in which run. Nothing in it can move a terminal's cursor."""
    moment = time.strftime("%H:%M:%S", time.localtime(event.time)) + f".{int(event.time % 1 * 1000):03d}"
    run = f"  [{event.run_id}]" if event.run_id is not None else ""
    return printable(f"{moment}  {event.name}  {short(_told(event), _LONGEST)}{run}")


def as_json(event: Event) -> str:
    """An event as one line of JSON."""
    return json.dumps(attrs.asdict(event, recurse=False), default=repr)


def _told(event: Event) -> str:
    data = data_of(event)
    if not data or event.sender is None or data.get("agent") != event.sender:
        if event.name == "handler_failed" and data:
            return f"{data.get('handler')}: {data.get('error_type')}: {data.get('error')}"
        return "" if event.data is None else as_text(event.data)
    parts = []
    if isinstance(data.get("args"), (list, tuple)):
        parts += [as_text(value) for value in data["args"]]
    if isinstance(data.get("kwargs"), dict):
        parts += [f"{key}={as_text(value)}" for key, value in data["kwargs"].items()]
    if "error" in data:
        parts.append(f"{data.get('error_type')}: {data['error']}")
    if data.get("result") is not None:
        parts.append(f"-> {as_text(data['result'])}")
    if isinstance(data.get("duration"), (int, float)):
        wait = data.get("lock_wait")
        waited = f", {seconds(wait)} of it waiting for {as_text(data.get('lock'))}" if isinstance(wait, float) else ""
        parts.append(f"({seconds(data['duration'])}{waited})")
    return ", ".join(parts[:-1]) + (" " if len(parts) > 1 else "") + parts[-1] if parts else ""


def printable(text: str) -> str:
    """Control characters and what a terminal may take for them, as escapes."""
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def as_tree(events: Iterable[Event]) -> Iterator[str]:
    """A line for each event, beneath the one that caused it; what nobody among them caused stands at the left."""
    events = list(events)
    known = {event.id for event in events}
    caused: dict[Optional[str], list[Event]] = {}
    for event in events:
        parent = event.parent_id if event.parent_id in known and event.parent_id != event.id else None
        caused.setdefault(parent, []).append(event)
    stack = [(event, "", "") for event in reversed(caused.pop(None, []))]
    while stack or caused:
        if not stack:  # events that claim to have caused each other
            stack = [(event, "", "") for event in reversed(caused.pop(next(iter(caused))))]
        event, mine, below = stack.pop()
        deep = len(below) // 3
        yield (mine if deep <= _DEEPEST else f"{mine[: 3 * _DEEPEST]}(+{deep - _DEEPEST}) ") + as_line(event)
        children = caused.pop(event.id, [])
        for place, child in enumerate(reversed(children)):
            last = place == 0
            stack.append((child, below + ("└─ " if last else "├─ "), below + ("   " if last else "│  ")))


def last_events(events: Iterable[Event], number: int) -> list[Event]:
    """The last so many; 0: all."""
    return list(deque(events, number or None))


def follow(store: Store, seen: Optional[str], wait: Callable[[], bool], **query: Any) -> Iterator[Event]:
    """The events that are written after the one that was seen, as they come, until `wait` says that nobody looks."""
    while True:
        for event in store.read(after=seen, **query):
            seen = event.id
            yield event
        if not wait():
            return
