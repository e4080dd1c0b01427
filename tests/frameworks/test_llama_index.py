"""LlamaIndex workflows: steps in parallel, streams, and steps that wait for an event."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable
from typing import Any

import pytest
from framework_contract import CALLS, Ask, Contract, Framework

pytest.importorskip("workflows")

from workflows import Context, Workflow, step
from workflows.events import Event, HumanResponseEvent, InputRequiredEvent, StartEvent, StopEvent
from workflows.runtime.types.results import WaitingForEvent


class Look(Event):
    x: int


class Found(Event):
    x: int


class Piece(Event):
    text: str


def as_method(function: Callable[..., Any]) -> Callable[..., Any]:
    """One that is defined in a class's body, by its name."""
    function.__qualname__ = f"Researchers.{function.__name__}"
    return function


class LlamaIndex(Framework):
    """Its functions are steps: they take an event and give one."""

    control_flow = WaitingForEvent

    def native(self, body: Callable[..., Any]) -> Callable[..., Any]:
        if asyncio.iscoroutinefunction(body):

            async def lookup_async(self: Any, event: Look) -> Found:
                return Found(x=await body(event.x))

            return as_method(lookup_async)

        def lookup(self: Any, event: Look) -> Found:
            return Found(x=body(event.x))

        return as_method(lookup)

    def tool(self, function: Callable[..., Any]) -> Any:
        return step(num_workers=CALLS)(function)

    def schema(self, tool: Any) -> Any:
        config = tool._step_config
        return config.accepted_events, config.return_types, config.event_name, config.num_workers

    async def arun(self, functions: list[Callable[..., Any]], asked: list[Ask]) -> list[str]:
        class Researchers(Workflow):
            lookup = self.tool(functions[0])

            @step
            async def begin(self, context: Context, event: StartEvent) -> Look | None:
                for _, x in asked:
                    context.send_event(Look(x=x))
                return None

            @step
            async def collect(self, context: Context, event: Found) -> StopEvent | None:
                found = context.collect_events(event, [Found] * len(asked))
                return StopEvent(result=[str(one.x) for one in found]) if found else None

        answers: list[str] = await Researchers(timeout=None).run()
        return answers

    async def stream(self, verses: Callable[[], AsyncIterator[str]]) -> AsyncIterator[str]:
        class Poet(Workflow):
            @step
            async def recite(self, context: Context, event: StartEvent) -> StopEvent:
                async with contextlib.aclosing(verses()) as pieces:
                    async for piece in pieces:
                        context.write_event_to_stream(Piece(text=piece))
                return StopEvent(result="done")

        handler = Poet(timeout=None).run()
        try:
            async for event in handler.stream_events():
                if isinstance(event, Piece):
                    yield event.text
        finally:
            await handler.cancel_run()
            with contextlib.suppress(Exception):
                await handler

    def interrupt(self, agent: Callable[[Callable[..., Any]], Callable[..., Any]], asynchronous: bool) -> None:
        async def wait(context: Context) -> str:
            answer = await context.wait_for_event(HumanResponseEvent, waiter_event=InputRequiredEvent())
            return str(answer.response)

        class Asker(Workflow):  # the step itself is the agent
            @step
            @agent
            async def ask(self, context: Context, event: StartEvent) -> StopEvent:
                return StopEvent(result=await wait(context))

        class AsksWithin(Workflow):  # the step calls the agent
            @step
            async def ask(self, context: Context, event: StartEvent) -> StopEvent:
                return StopEvent(result=await agent(wait)(context))

        async def main() -> Any:
            handler = (Asker if asynchronous else AsksWithin)(timeout=None).run()
            async for event in handler.stream_events():
                if isinstance(event, InputRequiredEvent):
                    handler.ctx.send_event(HumanResponseEvent(response="yes"))
            return await handler

        assert asyncio.run(main()) == "yes"


class TestLlamaIndex(Contract):
    framework = LlamaIndex()
