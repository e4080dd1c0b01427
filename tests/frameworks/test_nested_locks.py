"""An agent that holds a lock and runs a tool which takes the same lock ends, in real frameworks (L2).

Skipped where a framework is not installed; CONTRIBUTING says how to run these.
"""

from __future__ import annotations

import asyncio
import operator
import threading
from typing import Annotated, Any, TypedDict

import pytest

from agentdiff import Coordinator

TOOL_CALLS = 4


class Work:
    """Something that only one may do at a time, and that notices if two do."""

    def __init__(self) -> None:
        self.mutex = threading.Lock()
        self.inside = self.peak = self.done = 0

    def enter(self) -> None:
        with self.mutex:
            self.inside += 1
            self.peak = max(self.peak, self.inside)

    def leave(self) -> None:
        with self.mutex:
            self.inside -= 1
            self.done += 1

    def sync(self) -> None:
        self.enter()
        threading.Event().wait(0.005)
        self.leave()

    async def on_the_loop(self) -> None:
        self.enter()
        await asyncio.sleep(0.005)
        self.leave()


class State(TypedDict):
    messages: Annotated[list[Any], operator.add]


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", ["sync", "async"])
def test_L2_a_langgraph_node_that_holds_its_tools_lock_ends(kind: str) -> None:
    """Four parallel tool calls of a ToolNode, inside a node that holds their lock: all run, one at a time."""
    graphs = pytest.importorskip("langgraph.graph")
    prebuilt = pytest.importorskip("langgraph.prebuilt")
    messages = pytest.importorskip("langchain_core.messages")
    tools = pytest.importorskip("langchain_core.tools")
    coord, work = Coordinator(lock_timeout=20), Work()

    @tools.tool
    @coord.coordinate("lookup", lock_name="customer_1")
    def lookup(x: int) -> int:
        """Look something up."""
        work.sync()
        return x

    calls = [{"name": "lookup", "args": {"x": n}, "id": str(n), "type": "tool_call"} for n in range(TOOL_CALLS)]
    asked = {"messages": [messages.AIMessage(content="", tool_calls=calls)]}

    def graph(node: Any) -> Any:
        built = graphs.StateGraph(State)
        built.add_node("node", node)
        built.add_edge(graphs.START, "node")
        built.add_edge("node", graphs.END)
        return built.compile()

    inner = graph(prebuilt.ToolNode([lookup]))

    @coord.coordinate("outer", lock_name="customer_1")
    def outer(state: State) -> Any:
        return {"messages": inner.invoke(asked)["messages"]}

    @coord.coordinate("outer", lock_name="customer_1")
    async def outer_async(state: State) -> Any:
        return {"messages": (await inner.ainvoke(asked))["messages"]}

    if kind == "sync":
        result = graph(outer).invoke({"messages": []})
    else:
        result = asyncio.run(graph(outer_async).ainvoke({"messages": []}))
    assert len(result["messages"]) == TOOL_CALLS + 1
    assert (work.done, work.peak) == (TOOL_CALLS, 1)
    coord.close()


@pytest.mark.filterwarnings("ignore")
def test_L2_a_pydantic_ai_run_that_holds_its_tools_lock_ends() -> None:
    """A sync tool on a worker thread and an async one on the loop, inside a run that holds their lock."""
    pydantic_ai = pytest.importorskip("pydantic_ai")
    test_models = pytest.importorskip("pydantic_ai.models.test")
    coord, work = Coordinator(lock_timeout=20), Work()
    agent = pydantic_ai.Agent(test_models.TestModel())

    @agent.tool_plain
    @coord.coordinate("on_a_thread", lock_name="customer_1")
    def on_a_thread(x: int) -> int:
        """Run on a thread."""
        work.sync()
        return x

    @agent.tool_plain
    @coord.coordinate("on_the_loop", lock_name="customer_1")
    async def on_the_loop(x: int) -> int:
        """Run on the loop."""
        await work.on_the_loop()
        return x

    @coord.coordinate("outer", lock_name="customer_1")
    async def outer() -> Any:
        return (await agent.run("hello")).output

    assert asyncio.run(outer())
    assert (work.done, work.peak) == (2, 1)
    coord.close()
