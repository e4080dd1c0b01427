"""AutoGen: AssistantAgent with function tools, streams, and cancellation."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import pytest
from framework_contract import Ask, Contract, Framework, assert_docs_hold

from agentdiff import Coordinator

pytest.importorskip("autogen_agentchat")

from autogen_agentchat.agents import AssistantAgent
from autogen_agentchat.messages import ModelClientStreamingChunkEvent, ToolCallExecutionEvent
from autogen_core import CancellationToken, FunctionCall
from autogen_core.exceptions import CantHandleException
from autogen_core.models import ChatCompletionClient, CreateResult, ModelInfo, RequestUsage
from autogen_core.tools import FunctionTool, StaticWorkbench

CONTEXT = Coordinator()
USAGE = RequestUsage(prompt_tokens=1, completion_tokens=1)


class FakeClient(ChatCompletionClient):
    """Asks for its tools once, then is done; streams its verses."""

    def __init__(self, asked: list[Ask], verses: Any = None) -> None:
        self.asked, self.verses = asked, verses

    async def create(self, messages: Any, **kwargs: Any) -> CreateResult:
        calls = [FunctionCall(f"c{x}", f'{{"x": {x}}}', name) for name, x in self.asked]
        answered = any(type(message).__name__ == "FunctionExecutionResultMessage" for message in messages)
        return CreateResult(
            finish_reason="stop" if answered else "function_calls",
            content="done" if answered else calls,
            usage=USAGE,
            cached=False,
        )

    async def create_stream(self, messages: Any, **kwargs: Any) -> Any:
        text = ""
        async for verse in self.verses():
            text += verse
            yield verse
        yield CreateResult(finish_reason="stop", content=text, usage=USAGE, cached=False)

    async def close(self) -> None: ...

    def actual_usage(self) -> RequestUsage:
        return USAGE

    def total_usage(self) -> RequestUsage:
        return USAGE

    def count_tokens(self, messages: Any, **kwargs: Any) -> int:
        return 1

    def remaining_tokens(self, messages: Any, **kwargs: Any) -> int:
        return 1

    @property
    def capabilities(self) -> Any:
        return self.model_info

    @property
    def model_info(self) -> ModelInfo:
        return ModelInfo(vision=False, function_calling=True, json_output=False, family="fake", structured_output=False)


class AutoGen(Framework):
    control_flow = CantHandleException

    def tool(self, function: Callable[..., Any]) -> Any:
        return FunctionTool(function, description="Look something up.")

    def schema(self, tool: Any) -> Any:
        return tool.schema

    async def arun(self, functions: list[Callable[..., Any]], asked: list[Ask]) -> list[str]:
        # its sync tools run on a pool that loses the context: carry takes it along
        tools = [
            self.tool(function if asyncio.iscoroutinefunction(function) else CONTEXT.carry(function))
            for function in functions
        ]
        agent = AssistantAgent("asker", FakeClient(asked), tools=tools)
        result = await agent.run(task="hello")
        done = [message for message in result.messages if isinstance(message, ToolCallExecutionEvent)]
        return [one.content for message in done for one in message.content]

    async def stream(self, verses: Callable[[], AsyncIterator[str]]) -> AsyncIterator[str]:
        agent = AssistantAgent("poet", FakeClient([], verses), model_client_stream=True)
        async for message in agent.run_stream(task="hello"):
            if isinstance(message, ModelClientStreamingChunkEvent):
                yield message.content

    def interrupt(self, agent: Callable[[Callable[..., Any]], Callable[..., Any]], asynchronous: bool) -> None:
        @agent
        def lookup(x: int) -> int:
            raise CantHandleException("somebody else's")

        @agent
        async def lookup_async(x: int) -> int:
            raise CantHandleException("somebody else's")

        function = FunctionTool(lookup_async if asynchronous else lookup, description="Look something up.")
        with pytest.raises(CantHandleException):
            asyncio.run(function.run_json({"x": 1}, CancellationToken()))


class TestAutoGen(Contract):
    framework = AutoGen()


def test_A2_a_tool_whose_token_is_cancelled_is_cancelled(coord: Coordinator) -> None:
    """A call that its CancellationToken ends frees the lock of the tool that was running."""
    heard: list[str] = []
    coord.on("lookup_*", lambda event: heard.append(event.name), pass_event=True)

    async def main() -> None:
        token = CancellationToken()

        @coord.coordinate("lookup", lock_name="customer_1")
        async def lookup(x: int) -> int:
            """Look something up."""
            token.cancel()
            await asyncio.Event().wait()
            return x

        workbench = StaticWorkbench([FunctionTool(lookup, description="Look something up.")])
        with pytest.raises(asyncio.CancelledError):
            await workbench.call_tool("lookup", {"x": 1}, cancellation_token=token)

    asyncio.run(main())
    coord.join(20)
    assert heard == ["lookup_started", "lookup_cancelled"]
    assert coord.snapshot().locks == ()


def test_the_docs_hold(tmp_path: Path) -> None:
    """Its blocks in docs/frameworks.md."""
    assert_docs_hold("autogen", tmp_path)
