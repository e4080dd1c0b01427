"""Pydantic AI: tools, runs, streams, and calls that wait for approval."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from typing import Any

import pytest
from framework_contract import Ask, Contract, Framework

from agentdiff import Coordinator

pytest.importorskip("pydantic_ai")

from pydantic_ai import Agent, DeferredToolRequests, DeferredToolResults, ModelRetry, RunContext, Tool
from pydantic_ai.exceptions import ApprovalRequired
from pydantic_ai.messages import ModelMessage, ModelRequest, ModelResponse, TextPart, ToolCallPart, ToolReturnPart
from pydantic_ai.models.function import AgentInfo, FunctionModel


def answers(messages: list[ModelMessage]) -> list[Any]:
    requests = [message for message in messages if isinstance(message, ModelRequest)]
    return [part.content for request in requests for part in request.parts if isinstance(part, ToolReturnPart)]


def asks_once(asked: list[Ask]) -> FunctionModel:
    def answer(messages: list[ModelMessage], info: AgentInfo) -> ModelResponse:
        if len(messages) > 1:
            return ModelResponse(parts=[TextPart("done")])
        return ModelResponse(parts=[ToolCallPart(name, {"x": x}) for name, x in asked])

    return FunctionModel(answer)


class PydanticAI(Framework):
    control_flow = ApprovalRequired

    def tool(self, function: Callable[..., Any]) -> Any:
        return Tool(function)

    def schema(self, tool: Any) -> Any:
        return tool.tool_def

    def _agent(self, functions: list[Callable[..., Any]], asked: list[Ask]) -> Agent[None, str]:
        return Agent(asks_once(asked), tools=[self.tool(function) for function in functions])

    def run(self, functions: list[Callable[..., Any]], asked: list[Ask]) -> list[str]:
        return answers(self._agent(functions, asked).run_sync("hello").all_messages())

    async def arun(self, functions: list[Callable[..., Any]], asked: list[Ask]) -> list[str]:
        return answers((await self._agent(functions, asked).run("hello")).all_messages())

    async def stream(self, verses: Callable[[], AsyncIterator[str]]) -> AsyncIterator[str]:
        async def answer(messages: list[ModelMessage], info: AgentInfo) -> AsyncIterator[str]:
            async for verse in verses():
                yield verse

        async with Agent(FunctionModel(stream_function=answer)).run_stream("hello") as result:
            async for piece in result.stream_text(delta=True, debounce_by=None):
                yield piece

    def interrupt(self, agent: Callable[[Callable[..., Any]], Callable[..., Any]], asynchronous: bool) -> None:
        @agent
        def delete(ctx: RunContext[None], x: int) -> str:
            """Delete something."""
            if not ctx.tool_call_approved:
                raise ApprovalRequired
            return f"deleted {x}"

        @agent
        async def delete_async(ctx: RunContext[None], x: int) -> str:
            """Delete something."""
            if not ctx.tool_call_approved:
                raise ApprovalRequired
            return f"deleted {x}"

        name = "delete_async" if asynchronous else "delete"
        asker: Agent[None, Any] = Agent(
            asks_once([(name, 1)]), output_type=[str, DeferredToolRequests], tools=[delete, delete_async]
        )
        stopped = asker.run_sync("hello")
        assert isinstance(stopped.output, DeferredToolRequests)
        approved = DeferredToolResults(approvals={call.tool_call_id: True for call in stopped.output.approvals})
        went_on = asker.run_sync(message_history=stopped.all_messages(), deferred_tool_results=approved)
        assert answers(went_on.all_messages()) == ["deleted 1"]


class TestPydanticAI(Contract):
    framework = PydanticAI()


def test_A2_a_tool_that_asks_the_model_to_try_again_is_no_failure(coord: Coordinator) -> None:
    """ModelRetry in `control_flow=`: `_cancelled`, and the second call completes."""
    heard: list[str] = []
    coord.on("guess_*", lambda event: heard.append(event.name), pass_event=True)
    tries = iter([True, False])

    @coord.coordinate("guess", lock_name="game", control_flow=ModelRetry)
    async def guess(x: int) -> str:
        """Guess."""
        if next(tries):
            raise ModelRetry("higher")
        return "yes"

    def answer(messages: list[ModelMessage], info: AgentInfo) -> ModelResponse:
        return ModelResponse(parts=[TextPart("done") if len(messages) > 3 else ToolCallPart("guess", {"x": 1})])

    result = asyncio.run(Agent(FunctionModel(answer), tools=[guess]).run("hello"))
    assert answers(result.all_messages())[-1] == "yes"
    coord.join(20)
    assert heard == ["guess_started", "guess_cancelled", "guess_started", "guess_complete"]
