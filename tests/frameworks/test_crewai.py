"""CrewAI: agents with tools in a crew, and flows."""

from __future__ import annotations

import json
import typing
import warnings
from collections.abc import AsyncIterator, Callable
from typing import Any

import pytest
from api_server import ApiServer
from framework_contract import CALLS, Ask, Contract, Framework, call, call_async, run_example

from agentdiff import Coordinator

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # its imports' own
    pytest.importorskip("crewai")
    from crewai import Agent, BaseLLM, Crew, Task
    from crewai.flow.async_feedback import HumanFeedbackPending, PendingFeedbackContext
    from crewai.flow.flow import Flow, start
    from crewai.flow.persistence import FlowPersistence
    from crewai.tools import tool


class FakeLLM(BaseLLM):
    """Asks for its tools once, then is done."""

    asked: Any = ()
    verses: Any = None

    def supports_function_calling(self) -> bool:
        return True

    def call(self, messages: Any, tools: Any = None, *args: Any, **kwargs: Any) -> Any:
        if any(message.get("role") == "tool" for message in messages):
            return "done"
        return [
            {"id": f"c{n}", "type": "function", "function": {"name": name, "arguments": json.dumps({"x": x})}}
            for n, (name, x) in enumerate(self.asked)
        ]

    async def acall(self, *args: Any, **kwargs: Any) -> Any:
        if self.verses is None:
            return self.call(*args, **kwargs)
        text = ""
        async for verse in self.verses():
            text += verse
            self._emit_stream_chunk_event(verse)
        return text


class CrewAI(Framework):
    control_flow = HumanFeedbackPending

    def native(self, body: Callable[..., Any]) -> Callable[..., Any]:
        """Its tools want types: names of types it finds in no module."""
        body.__annotations__ = typing.get_type_hints(body)
        return body

    def tool(self, function: Callable[..., Any]) -> Any:
        return tool(function)

    def schema(self, tool: Any) -> Any:
        return tool.name, tool.description, tool.args_schema.model_json_schema()

    def _crew(self, functions: list[Callable[..., Any]], asked: list[Ask]) -> Crew:
        llm: Any = FakeLLM(model="fake", asked=asked)
        tools = [self.tool(function) for function in functions]
        agent = Agent(role="asker", goal="ask", backstory="asks", llm=llm, tools=tools)
        return Crew(agents=[agent], tasks=[Task(description="look", expected_output="all", agent=agent)])

    def run(self, functions: list[Callable[..., Any]], asked: list[Ask]) -> list[str]:
        return tool_answers(self._crew(functions, asked).kickoff())

    async def arun(self, functions: list[Callable[..., Any]], asked: list[Ask]) -> list[str]:
        return tool_answers(await self._crew(functions, asked).akickoff())

    async def stream(self, verses: Callable[[], AsyncIterator[str]]) -> AsyncIterator[str]:
        class Poet(Flow[Any]):
            stream = True

            @start()
            async def recite(self) -> str:
                return str(await FakeLLM(model="fake", verses=verses).acall("go"))

        pieces: Any = await Poet(suppress_flow_events=True).kickoff_async()
        try:
            async for piece in pieces:
                if piece.content:
                    yield piece.content
        finally:
            await pieces.aclose()

    def interrupt(self, agent: Callable[[Callable[..., Any]], Callable[..., Any]], asynchronous: bool) -> None:
        def pending() -> HumanFeedbackPending:
            return HumanFeedbackPending(
                PendingFeedbackContext(
                    flow_id="f", flow_class="Asker", method_name="ask", method_output="", message="sure?"
                )
            )

        class Asker(Flow[Any]):
            @start()
            @agent
            def ask(self) -> str:
                raise pending()

        class AsyncAsker(Flow[Any]):
            @start()
            @agent
            async def ask(self) -> str:
                raise pending()

        flow: Any = (AsyncAsker if asynchronous else Asker)(persistence=Kept(), suppress_flow_events=True)
        assert isinstance(flow.kickoff(), HumanFeedbackPending)


class Kept(FlowPersistence):
    """Nothing is kept."""

    def init_db(self) -> None: ...

    def save_state(self, *args: Any, **kwargs: Any) -> None: ...

    def load_state(self, flow_uuid: str) -> None: ...


def tool_answers(output: Any) -> list[str]:
    messages = output.tasks_output[0].messages
    return [message["content"] for message in messages if message["role"] == "tool"]


class TestCrewAI(Contract):
    framework = CrewAI()


@pytest.mark.parametrize("kind", ["sync", "async"])
def test_R2_a_flow_s_parallel_starts_under_a_limit_of_one_earn_no_429(coord: Coordinator, kind: str) -> None:
    """Twelve `@start` methods, `@coordinate` beneath."""
    coord.limit("api", concurrency=1)
    with ApiServer(concurrency=1, service_time=0.005) as server:

        def asks(name: str) -> Callable[..., Any]:
            def ask(self: Any) -> None:
                call(server)

            async def ask_async(self: Any) -> None:
                await call_async(server)

            function = ask if kind == "sync" else ask_async
            function.__name__ = name
            return start()(coord.coordinate("asker", lock_name="api")(function))

        methods = {f"ask_{n}": asks(f"ask_{n}") for n in range(CALLS)}
        flow: Any = type("Fan", (Flow,), methods)(suppress_flow_events=True)
        flow.kickoff()
        assert server.answers == {200: CALLS}


def test_the_example_has_every_call_answered() -> None:
    """Eight tool calls at once, an API that takes one."""
    assert run_example("with_crewai.py") == "All looked up.\n8 of 8 calls answered\n"
