"""The main job: 20 researchers count their progress, ask one API, and hand on to a writer. How much of it arrives?"""

from __future__ import annotations

import threading
import time
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Callable

from agentdiff import Coordinator

TOPICS = [f"topic {n}" for n in range(20)]


class Office:
    """What the agents share: a count, an API that serves one call at a time and refuses others, a desk."""

    def __init__(self) -> None:
        self.counted: int = 0
        self.answered: list[str] = []
        self.written: list[str] = []
        self.api: Any = threading.Lock()

    def count(self) -> None:
        """Note progress: read, think, write."""
        seen = self.counted
        time.sleep(0.004)  # who counts in this moment is overwritten
        self.counted = seen + 1

    def ask(self, topic: str) -> None:
        """Call the API."""
        if self.api.acquire(blocking=False):  # else: 429, too many requests
            time.sleep(0.004)
            self.answered.append(topic)
            self.api.release()

    def write(self, topic: str) -> None:
        """Write the report."""
        if topic in self.answered:  # else: nothing to write about yet
            self.written.append(topic)


def start(*agents: Callable[[str], Any]) -> None:
    """All agents on all topics, at once."""
    together = threading.Barrier(len(TOPICS) * len(agents))
    with ThreadPoolExecutor(together.parties) as pool:
        for results in [pool.map(lambda t, agent=agent: (together.wait(), agent(t)), TOPICS) for agent in agents]:
            list(results)


def with_plain_threads() -> Office:
    """The job as one writes it first."""
    office = Office()

    def research(topic: str) -> None:
        office.count()
        office.ask(topic)

    start(research, office.write)
    return office


def with_agentdiff(**settings: Any) -> Office:
    """The same with two locks, a decorator and a handler."""
    office = Office()
    with Coordinator(**settings) as coord:
        coord.on("researcher_complete", lambda data: office.write(data["result"]))

        @coord.coordinate("researcher")
        def research(topic: str) -> str:
            with coord.lock("progress"):
                office.count()
            with coord.lock("api"):
                office.ask(topic)
            return topic

        start(research)
    return office


def main(**settings: Any) -> str:
    """Run both, and compare."""
    plain, office = with_plain_threads(), with_agentdiff(**settings)
    return "\n".join(
        (
            "out of 20                plain threads    agentdiff",
            f"updates kept         {plain.counted:17}{office.counted:13}",
            f"API calls answered   {len(plain.answered):17}{len(office.answered):13}",
            f"reports written      {len(plain.written):17}{len(office.written):13}",
        )
    )
