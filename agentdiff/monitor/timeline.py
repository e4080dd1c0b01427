"""A run as a picture: one HTML file that needs no network, and in which no text of an event can become markup.

The page's script and style are allowed by their hashes and everything else is forbidden, so that even a flaw in the
escaping would run nothing and send nothing anywhere.
"""

from __future__ import annotations

import base64
import hashlib
import html
import json
import pkgutil
import re
from collections.abc import Iterable
from typing import Any, Optional

from ..events import Event
from .history import UNFINISHED, Call, History, as_text, data_of, seconds, short
from .lanes import lay_out

_LONGEST = 400
_BUDGET = 2_500_000  # characters of details: what is shown of each event is cut so that all fit
_SHOWN_APART = frozenset(
    {"agent", "timestamp", "duration", "lock", "lock_wait", "after", "after_wait", "error", "error_type", "exception"}
)


def timeline(events: Iterable[Event], *, title: str = "agentdiff timeline") -> str:
    """An HTML page that shows what happened: to be written with the encoding UTF-8.

    Args:
        events: of a store, or of anywhere else.
        title: what stands above it.
    """
    script, style = _part("timeline.js"), _part("timeline.css")
    policy = f"default-src 'none'; script-src '{_hash(script)}'; style-src '{_hash(style)}'; "
    policy += "base-uri 'none'; form-action 'none'"
    parts = {
        "policy": policy,
        "title": html.escape(_printable(title)),
        "style": style,
        "script": script,
        "data": _as_json(_picture(History(events), title)),
    }
    return re.sub(r"\{\{(\w+)\}\}", lambda found: parts[found.group(1)], _part("timeline.html"))


def _part(name: str) -> str:
    found = pkgutil.get_data(__name__, name)
    assert found is not None
    return found.decode("utf-8").replace("\r\n", "\n")


def _hash(text: str) -> str:
    return "sha256-" + base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()


def _printable(text: str) -> str:
    return text.encode("utf-8", "backslashreplace").decode()


def _as_json(value: Any) -> str:
    """JSON that can stand in a script element: nothing in it ends that, or begins a comment."""
    text = json.dumps(value, ensure_ascii=False, separators=(",", ":"), allow_nan=False)
    for character in "<>&\u2028\u2029\x7f":
        text = text.replace(character, f"\\u{ord(character):04x}")
    return _printable(text)


def _picture(history: History, title: str) -> dict[str, Any]:
    lanes = lay_out(history)
    number = len(history.calls) + len(history.others)
    most = max(min(_LONGEST, _BUDGET // (3 * number or 1)), 24)
    number_of = {id(call): number for number, call in enumerate(history.calls)}

    def at(time: float) -> float:
        return round(time - history.begin, 6)

    def causes(found: list[tuple[int, float, float]]) -> list[list[float]]:
        return [[thing, at(time), at(until)] for thing, time, until in found]

    calls = []
    for place, call in enumerate(history.calls):
        inside, behind = history.waited_for(call)
        calls.append(
            [
                *lanes.places[place],
                at(call.begin),
                at(call.begin + call.after_wait),
                at(call.entered),
                at(call.end),
                call.outcome,
                short(call.label, min(most, 60)),
                _details(call, most, behind),
                causes(lanes.causes_of_call(place)),
                [number_of[id(one)] for one in inside],
            ]
        )
    marks = [
        [
            *lanes.marks[place],
            at(event.time),
            short(event.name, most),
            _mark_details(event, most),
            causes(lanes.causes_of_mark(place)),
        ]
        for place, event in enumerate(history.others)
    ]
    return {
        "title": title,
        "began": history.begin,
        "span": max(at(history.end), 0.001),
        "story": [short(line, 500) for line in history.story()],
        "lanes": [[name, rows] for name, rows in lanes.lanes],
        "calls": calls,
        "marks": marks,
    }


def _details(call: Call, most: int, behind: int) -> list[list[str]]:
    found: list[tuple[str, Optional[str]]] = [("run", call.run), ("error", call.error)]
    for event in (call.started, call.ended):
        found += [(key, as_text(value)) for key, value in data_of(event).items() if key not in _SHOWN_APART and value]
        if event is not None and not data_of(event):
            found.append((event.name, as_text(event.data)))
    if call.outcome == UNFINISHED:
        found.append(("end", "not recorded: it was still waiting or running"))
    if call.after:
        found.append(("came after", f"{', '.join(call.after)}; waited {seconds(call.after_wait)}"))
    if call.locks:
        wait = f"; waited {seconds(call.lock_wait)}" if call.waited else ""
        found.append(("lock", f"{', '.join(call.locks)}{wait}{f', behind {behind} call(s)' if behind else ''}"))
    return [[short(key, most), text[:most] + "…" * (len(text) > most)] for key, text in found if text]


def _mark_details(event: Event, most: int) -> list[list[str]]:
    found = [("run", event.run_id), ("sender", event.sender)]
    data = data_of(event)
    if event.name == "handler_failed" and data:
        found += [(key, as_text(data[key])) for key in ("handler", "error_type", "error") if key in data]
    elif event.data is not None:
        found.append(("data", as_text(event.data)))
    return [[key, text[:most] + "…" * (len(text) > most)] for key, text in found if text]
