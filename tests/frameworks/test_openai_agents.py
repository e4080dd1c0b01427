"""The OpenAI Agents SDK: function tools, runs, streams, guardrails."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from typing import Any

import pytest
from framework_contract import Ask, Contract, Framework, run_example

pytest.importorskip("agents")

from agents import (
    Agent,
    FunctionTool,
    GuardrailFunctionOutput,
    InputGuardrail,
    InputGuardrailTripwireTriggered,
    Model,
    ModelResponse,
    Runner,
    Usage,
    function_tool,
)
from agents.items import ToolCallOutputItem
from openai.types.responses import (
    Response,
    ResponseCompletedEvent,
    ResponseFunctionToolCall,
    ResponseOutputMessage,
    ResponseOutputText,
    ResponseTextDeltaEvent,
)


def says(text: str) -> ResponseOutputMessage:
    content = ResponseOutputText(text=text, type="output_text", annotations=[])
    return ResponseOutputMessage(id="m1", content=[content], role="assistant", status="completed", type="message")


class FakeModel(Model):
    """Asks for its tools once, then is done; streams its verses."""

    def __init__(self, asked: list[Ask] = [], verses: Any = None) -> None:  # noqa: B006
        self.asked, self.verses = asked, verses

    async def get_response(self, system_instructions: Any, input: Any, *args: Any, **kwargs: Any) -> ModelResponse:
        answered = not isinstance(input, str) and any(item.get("type") == "function_call_output" for item in input)
        calls: list[Any] = [
            ResponseFunctionToolCall(arguments=f'{{"x": {x}}}', call_id=f"c{n}", name=name, type="function_call")
            for n, (name, x) in enumerate(self.asked)
        ]
        return ModelResponse(output=[says("done")] if answered or not calls else calls, usage=Usage(), response_id=None)

    async def stream_response(self, *args: Any, **kwargs: Any) -> AsyncIterator[Any]:
        text, number = "", 0
        async for verse in self.verses():
            text, number = text + verse, number + 1
            yield ResponseTextDeltaEvent(
                content_index=0,
                delta=verse,
                item_id="m1",
                logprobs=[],
                output_index=0,
                sequence_number=number,
                type="response.output_text.delta",
            )
        response = Response(
            id="r1",
            created_at=1,
            model="small",
            object="response",
            output=[says(text)],
            parallel_tool_calls=True,
            tool_choice="auto",
            tools=[],
        )
        yield ResponseCompletedEvent(response=response, sequence_number=number + 1, type="response.completed")


def answers(result: Any) -> list[str]:
    return [item.output for item in result.new_items if isinstance(item, ToolCallOutputItem)]


class OpenAIAgents(Framework):
    control_flow = InputGuardrailTripwireTriggered

    def tool(self, function: Callable[..., Any]) -> Any:
        return function_tool(function, failure_error_function=None)

    def schema(self, tool: FunctionTool) -> Any:
        return tool.name, tool.description, tool.params_json_schema

    def _agent(self, functions: list[Callable[..., Any]], asked: list[Ask]) -> Any:
        return Agent(name="asker", model=FakeModel(asked), tools=[self.tool(function) for function in functions])

    def run(self, functions: list[Callable[..., Any]], asked: list[Ask]) -> list[str]:
        return answers(Runner.run_sync(self._agent(functions, asked), "hello"))

    async def arun(self, functions: list[Callable[..., Any]], asked: list[Ask]) -> list[str]:
        return answers(await Runner.run(self._agent(functions, asked), "hello"))

    async def stream(self, verses: Callable[[], AsyncIterator[str]]) -> AsyncIterator[str]:
        result = Runner.run_streamed(Agent(name="poet", model=FakeModel(verses=verses)), "hello")
        try:
            async for event in result.stream_events():
                if event.type == "raw_response_event" and isinstance(event.data, ResponseTextDeltaEvent):
                    yield event.data.delta
        finally:
            result.cancel()

    def interrupt(self, agent: Callable[[Callable[..., Any]], Callable[..., Any]], asynchronous: bool) -> None:
        def refuses(context: Any, guarded: Any, asked: Any) -> GuardrailFunctionOutput:
            return GuardrailFunctionOutput(output_info="no", tripwire_triggered=True)

        guarded: Any = Agent(name="guarded", model=FakeModel(), input_guardrails=[InputGuardrail(refuses)])

        @agent
        def ask(text: str) -> Any:
            return Runner.run_sync(guarded, text).final_output

        @agent
        async def ask_async(text: str) -> Any:
            return (await Runner.run(guarded, text)).final_output

        with pytest.raises(InputGuardrailTripwireTriggered):
            asyncio.run(ask_async("hello")) if asynchronous else ask("hello")


class TestOpenAIAgents(Contract):
    framework = OpenAIAgents()


def test_the_example_of_the_client_has_every_call_answered() -> None:
    """Twelve threads, an API that allows two at once."""
    assert run_example("with_openai.py") == "12 of 12 calls answered: Bees make honey.\n"
