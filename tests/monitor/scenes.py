"""Events made by hand, at times that a test chooses, as they come out of a store."""

from __future__ import annotations

from itertools import count
from typing import Any, Optional

from agentdiff import Event

EPOCH = 1_700_000_000.0


class Scene:
    """Collects events; times are seconds since its beginning."""

    def __init__(self) -> None:
        self.events: list[Event] = []
        self._ids = count(1)

    def emit(self, name: str, at: float, data: Any = None, **more: Optional[str]) -> Event:
        """An event of any kind."""
        what: dict[str, Any] = {"sender": None, "run_id": None, "parent_id": None, **more}
        event = Event(name=name, data=data, id=f"e{next(self._ids)}", time=EPOCH + at, **what)
        self.events.append(event)
        return event

    def start(self, agent: str, at: float, *args: Any, lock: Any = None, after: Any = None, **more: Any) -> Event:
        """A call's beginning."""
        data = {"agent": agent, "args": list(args), "kwargs": {}, "timestamp": EPOCH + at}
        data.update({key: value for key, value in (("lock", lock), ("after", after)) if value})
        return self.emit(f"{agent}_started", at, data, sender=agent, **more)

    def end(self, started: Event, at: float, how: str = "complete", **data: Any) -> Event:
        """The end of that call."""
        told = {"agent": started.sender, "duration": EPOCH + at - started.time, **data}
        if "lock" in started.data:
            told = {"lock": started.data["lock"], "lock_wait": 0.0, **told}
        name = f"{started.sender}_{how}"
        return self.emit(name, at, told, sender=started.sender, run_id=started.run_id, parent_id=started.id)


def story() -> Scene:
    """Three agents: two want one lock, one of those fails once, the third comes after both."""
    scene = Scene()
    first = scene.start("writer", 0, "On bees", after=["researcher", "critic"], run_id="r1")
    research = scene.start("researcher", 0.1, "bees", lock="api", run_id="r1")
    check = scene.start("critic", 0.2, "bees", lock="api", run_id="r1")
    again = scene.start("researcher", 0.3, "ants", lock="api", run_id="r2")
    scene.emit("source_found", 0.5, {"url": "x"}, run_id="r1", parent_id=research.id)
    scene.end(research, 1.1, result="facts")
    scene.end(check, 2.1, lock_wait=0.9, result="fine")
    scene.end(again, 2.6, "failed", lock_wait=1.8, error="no sources", error_type="ValueError")
    done = scene.end(first, 3.1, after_wait=2.1, result="a report")
    ready = scene.emit("report_ready", 3.15, "a report", run_id="r1", parent_id=done.id)
    data = {"handler": "publish", "error": "away", "error_type": "ConnectionError", "event": {"name": "report_ready"}}
    scene.emit("handler_failed", 3.2, data, sender="publish", run_id="r1", parent_id=ready.id)
    scene.start("critic", 3.25, "wasps", lock="api", run_id="r3")
    return scene


def crowd(calls: int) -> Scene:
    """Two events for each call, of twenty agents who want five locks; some fail."""
    scene = Scene()
    free = [0.0] * 5
    for number in range(calls):
        lock, asked = number % 5, number * 0.01
        entered = max(asked, free[lock])
        started = scene.start(
            f"agent {number % 20}", asked, f"piece {number}", lock=f"lock {lock}", run_id=f"r{number // 50}"
        )
        free[lock] = entered + 0.03 + number % 7 * 0.005
        how = "failed" if number % 97 == 0 else "complete"
        scene.end(started, free[lock], how, lock_wait=entered - asked, result="words " * 20)
    return scene
