"""A CrewAI agent calls a tool eight times at once; the API behind it takes one call at a time, and a handler follows.

`@coordinate` goes beneath `@tool`. Offline the model is a fake; with OPENAI_API_KEY set, it is real.
"""

from __future__ import annotations

import os
import threading
import time
from typing import Any

from agentdiff import Coordinator

os.environ.setdefault("CREWAI_DISABLE_TELEMETRY", "true")
os.environ.setdefault("CREWAI_TRACING_ENABLED", "false")
try:
    from crewai import Agent, BaseLLM, Crew, Task
    from crewai.tools import tool
except ImportError:
    raise SystemExit("This example needs CrewAI: pip install crewai") from None

TOPICS = ["bees", "ants", "wasps", "moths", "flies", "beetles", "crickets", "mantises"]
api = threading.Lock()
found: list[str] = []


class FakeLLM(BaseLLM):
    def supports_function_calling(self) -> bool:
        return True

    def call(self, messages: Any, *args: Any, **kwargs: Any) -> Any:
        if any(message["role"] == "tool" for message in messages):
            return "All looked up."
        asked = [{"name": "look_up", "arguments": f'{{"topic": "{topic}"}}'} for topic in TOPICS]
        return [{"id": call["arguments"], "type": "function", "function": call} for call in asked]


with Coordinator() as coord:
    coord.on("researcher_complete", lambda data: found.append(data["result"]))

    @tool
    @coord.coordinate("researcher", lock_name="search_api")
    def look_up(topic: str) -> str:
        """Look a topic up."""
        if not api.acquire(blocking=False):
            raise RuntimeError("429: one call at a time")
        time.sleep(0.005)
        api.release()
        return f"facts about {topic}"

    llm: Any = "gpt-4o-mini" if os.environ.get("OPENAI_API_KEY") else FakeLLM(model="fake")
    agent = Agent(role="researcher", goal="look topics up", backstory="thorough", llm=llm, tools=[look_up])
    task = Task(description=f"Look up, all in one go: {TOPICS}", expected_output="a word", agent=agent)
    print(Crew(agents=[agent], tasks=[task]).kickoff().raw)
print(f"{len(found)} of {len(TOPICS)} calls answered")
