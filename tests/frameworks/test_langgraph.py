"""LangGraph and LangChain: agents, nodes, ToolNode, batch, streams and interrupt()."""

from __future__ import annotations

import asyncio
import operator
import uuid
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Annotated, Any, TypedDict

import pytest
from api_server import ApiServer
from framework_contract import (
    CALLS,
    TEXT,
    Ask,
    Contract,
    Framework,
    Work,
    assert_docs_hold,
    call,
    call_async,
    run_example,
)

from agentdiff import Coordinator

pytest.importorskip("langgraph")
pytest.importorskip("langchain")

from langchain.agents import create_agent
from langchain_core.language_models import BaseChatModel
from langchain_core.messages import AIMessage, AIMessageChunk, ToolMessage
from langchain_core.outputs import ChatGeneration, ChatGenerationChunk, ChatResult
from langchain_core.runnables import RunnableGenerator, RunnableLambda
from langchain_core.tools import tool
from langchain_core.utils.function_calling import convert_to_openai_tool
from langgraph.checkpoint.memory import InMemorySaver
from langgraph.config import get_stream_writer
from langgraph.errors import GraphBubbleUp
from langgraph.graph import END, START, MessagesState, StateGraph
from langgraph.prebuilt import ToolNode
from langgraph.types import Command, interrupt


def tool_calls(asked: list[Ask]) -> AIMessage:
    calls = [{"name": name, "args": {"x": x}, "id": f"{name}-{x}", "type": "tool_call"} for name, x in asked]
    return AIMessage(content="", tool_calls=calls)


class FakeModel(BaseChatModel):
    """Asks for its tools once, then is done; streams its verses."""

    asked: Any = ()
    verses: Any = None

    @property
    def _llm_type(self) -> str:
        return "fake"

    def bind_tools(self, tools: Any, **kwargs: Any) -> Any:
        return self

    def _generate(self, messages: Any, *args: Any, **kwargs: Any) -> ChatResult:
        answered = any(isinstance(message, ToolMessage) for message in messages)
        answer = AIMessage(content="done") if answered else tool_calls(self.asked)
        return ChatResult(generations=[ChatGeneration(message=answer)])

    async def _agenerate(self, messages: Any, *args: Any, **kwargs: Any) -> ChatResult:
        return self._generate(messages)

    async def _astream(self, *args: Any, **kwargs: Any) -> AsyncIterator[ChatGenerationChunk]:
        async for verse in self.verses():
            yield ChatGenerationChunk(message=AIMessageChunk(content=verse))


class StreamingModel(FakeModel):
    """Streams whatever it is asked."""


class NotStreamingModel(FakeModel):
    disable_streaming: Any = True


class LangGraph(Framework):
    control_flow = GraphBubbleUp

    def tool(self, function: Callable[..., Any]) -> Any:
        return tool(function)

    def schema(self, tool: Any) -> Any:
        return convert_to_openai_tool(tool)

    def _agent(self, functions: list[Callable[..., Any]], asked: list[Ask]) -> Any:
        return create_agent(NotStreamingModel(asked=asked), [self.tool(function) for function in functions])

    def _answers(self, state: Any) -> list[str]:
        return [message.content for message in state["messages"] if isinstance(message, ToolMessage)]

    def run(self, functions: list[Callable[..., Any]], asked: list[Ask]) -> list[str]:
        return self._answers(self._agent(functions, asked).invoke({"messages": [("user", "hello")]}))

    async def arun(self, functions: list[Callable[..., Any]], asked: list[Ask]) -> list[str]:
        return self._answers(await self._agent(functions, asked).ainvoke({"messages": [("user", "hello")]}))

    async def stream(self, verses: Callable[[], AsyncIterator[str]]) -> AsyncIterator[str]:
        agent = create_agent(StreamingModel(verses=verses), [])
        stream = agent.astream({"messages": [("user", "hello")]}, stream_mode="messages")
        async for chunk, _ in stream:
            if chunk.content:
                yield chunk.content

    def interrupt(self, agent: Callable[[Callable[..., Any]], Callable[..., Any]], asynchronous: bool) -> None:
        @agent
        def ask(state: MessagesState) -> Any:
            return {"messages": [AIMessage(content=interrupt("sure?"))]}

        @agent
        async def ask_async(state: MessagesState) -> Any:
            return {"messages": [AIMessage(content=interrupt("sure?"))]}

        graph = one_node(MessagesState, ask_async if asynchronous else ask, InMemorySaver())
        config: Any = {"configurable": {"thread_id": str(uuid.uuid4())}}

        def go(value: Any) -> Any:
            return asyncio.run(graph.ainvoke(value, config)) if asynchronous else graph.invoke(value, config)

        assert go({"messages": []})["__interrupt__"][0].value == "sure?"
        assert go(Command(resume="yes"))["messages"][-1].content == "yes"


def one_node(state: Any, node: Any, checkpointer: Any = None) -> Any:
    graph = StateGraph(state)
    graph.add_node("node", node)
    graph.add_edge(START, "node")
    graph.add_edge("node", END)
    return graph.compile(checkpointer=checkpointer)


class TestLangGraph(Contract):
    framework = LangGraph()

    def test_A2_an_agent_goes_on_after_its_interrupt(self, coord: Coordinator) -> None:
        """The node runs once more when it is resumed, and completes then."""
        heard: list[str] = []
        coord.on("asker_*", lambda event: heard.append(event.name), pass_event=True)
        self.framework.interrupt(coord.coordinate("asker", control_flow=GraphBubbleUp), False)
        coord.join(20)
        assert heard == ["asker_started", "asker_cancelled", "asker_started", "asker_complete"]


class State(TypedDict):
    topics: list[int]
    found: Annotated[list[int], operator.add]


@pytest.mark.parametrize("kind", ["sync", "async"])
def test_R2_parallel_nodes_and_batches_under_a_limit_of_one_earn_no_429(coord: Coordinator, kind: str) -> None:
    """A graph whose nodes fan out, and a Runnable's batch: no call is refused."""
    coord.limit("api", concurrency=1)
    with ApiServer(concurrency=1, service_time=0.005) as server:

        @coord.coordinate("asker", lock_name="api")
        def ask(state: State) -> Any:
            call(server)
            return {"found": [1]}

        @coord.coordinate("asker", lock_name="api")
        async def ask_async(state: State) -> Any:
            await call_async(server)
            return {"found": [1]}

        graph = StateGraph(State)
        for n in range(CALLS):
            graph.add_node(f"node-{n}", ask if kind == "sync" else ask_async)
            graph.add_edge(START, f"node-{n}")
        fan = graph.compile()
        runnable = RunnableLambda(ask if kind == "sync" else ask_async)
        empty: Any = {"topics": [], "found": []}
        if kind == "sync":
            found = fan.invoke(empty)
            batch = runnable.batch([empty] * CALLS)
        else:
            found = asyncio.run(fan.ainvoke(empty))
            batch = asyncio.run(runnable.abatch([empty] * CALLS))
        assert found["found"] == [1] * CALLS
        assert batch == [{"found": [1]}] * CALLS
        assert server.answers == {200: 2 * CALLS}


@pytest.mark.parametrize("kind", ["sync", "async"])
def test_L2_a_node_that_holds_the_lock_of_its_toolnode_s_tools_ends(kind: str) -> None:
    """Four parallel calls of a ToolNode in a graph within a node that holds their lock."""
    coord, work = Coordinator(lock_timeout=20), Work()

    @tool
    @coord.coordinate("lookup", lock_name="customer_{x}")
    def lookup(x: int) -> int:
        """Look something up."""
        work.lookup()
        return x

    inner = one_node(MessagesState, ToolNode([lookup]))
    asked: Any = {"messages": [tool_calls([("lookup", 1)] * 4)]}

    @coord.coordinate("outer", lock_name="customer_1")
    def outer(state: MessagesState) -> Any:
        return {"messages": inner.invoke(asked)["messages"]}

    @coord.coordinate("outer", lock_name="customer_1")
    async def outer_async(state: MessagesState) -> Any:
        return {"messages": (await inner.ainvoke(asked))["messages"]}

    nothing: Any = {"messages": []}
    if kind == "sync":
        one_node(MessagesState, outer).invoke(nothing)
    else:
        asyncio.run(one_node(MessagesState, outer_async).ainvoke(nothing))
    assert (work.done, work.peak) == (4, 1)
    coord.close()


def test_A1_a_generator_stays_one_for_runnables_and_nodes_write_to_streams(coord: Coordinator) -> None:
    """A RunnableGenerator streams a coordinated generator's items; a coordinated node has the graph's stream writer."""
    ended: list[Any] = []
    coord.on("poet_complete", lambda data: ended.append(data["result"]))

    @coord.coordinate("poet", lock_name="poem", collect="".join)
    def verses(given: Any) -> Any:
        for word in TEXT.split():
            yield word
            assert coord.lock("poem").locked()

    assert list(RunnableGenerator(verses).stream("go")) == TEXT.split()

    @coord.coordinate("writer", lock_name="poem")
    def write(state: MessagesState) -> Any:
        for word in TEXT.split():
            get_stream_writer()(word)
        return {"messages": []}

    nothing: Any = {"messages": []}
    assert list(one_node(MessagesState, write).stream(nothing, stream_mode="custom")) == TEXT.split()
    coord.join(20)
    assert ended == [TEXT.replace(" ", "")]


def test_the_example_counts_every_visit() -> None:
    """Twelve calls of a tool that updates one customer."""
    assert run_example("with_langgraph.py") == "12 of 12 visits counted: All counted.\n"


def test_the_docs_hold(tmp_path: Path) -> None:
    """Its blocks in docs/frameworks.md."""
    assert_docs_hold("langgraph", tmp_path)
