"""A LangGraph agent calls a tool twelve times at once; the tool updates one customer, one call at a time.

`@coordinate` goes beneath `@tool`. The model is a fake; with OPENAI_API_KEY set (and langchain-openai), it is real.
"""

from __future__ import annotations

import os
import time
from typing import Any

from agentdiff import Coordinator

try:
    from langchain.agents import create_agent
    from langchain_core.language_models import BaseChatModel
    from langchain_core.messages import AIMessage, ToolMessage
    from langchain_core.outputs import ChatGeneration, ChatResult
    from langchain_core.tools import tool
except ImportError:
    raise SystemExit("This example needs LangGraph: pip install langgraph langchain") from None

VISITS = 12
customer = {"visits": 0}


class FakeModel(BaseChatModel):
    _llm_type = "fake"  # type: ignore[assignment]

    def bind_tools(self, tools: Any, **kwargs: Any) -> Any:
        return self

    def _generate(self, messages: Any, *args: Any, **kwargs: Any) -> ChatResult:
        done = isinstance(messages[-1], ToolMessage)
        calls = [{"name": "add_visit", "args": {"customer_id": 7}, "id": str(n)} for n in range(0 if done else VISITS)]
        return ChatResult(
            generations=[ChatGeneration(message=AIMessage("All counted." if done else "", tool_calls=calls))]
        )


with Coordinator() as coord:

    @tool
    @coord.coordinate("clerk", lock_name="customer_{customer_id}")
    def add_visit(customer_id: int) -> int:
        """Count one visit of a customer."""
        visits = customer["visits"]
        time.sleep(0.005)  # a database would take its time here, and others would read the old value
        customer["visits"] = visits + 1
        return visits + 1

    model: Any = "openai:gpt-4o-mini" if os.environ.get("OPENAI_API_KEY") else FakeModel()
    asked = f"Customer 7 came {VISITS} times: call add_visit {VISITS} times, all in one go."
    answer = create_agent(model, [add_visit]).invoke({"messages": [("user", asked)]})["messages"][-1]
    print(f"{customer['visits']} of {VISITS} visits counted: {answer.text}")
