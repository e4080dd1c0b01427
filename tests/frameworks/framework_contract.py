"""What holds in every framework, written once: each file here runs `Contract` over an adapter to its framework."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import http.client
import inspect
import os
import re
import socket
import subprocess
import sys
import threading
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path
from typing import Any, Literal, Optional

import pytest
from api_server import WORDS, ApiServer
from support import ROOT

from agentdiff import Coordinator, Event

CALLS = 12
TEXT = "".join(WORDS)
Depth = Literal["short", "long"]  # a type that only this module knows by name
Ask = tuple[str, int]  # the tool that the model asks for, and its argument

# how the framework is entered, and what kind of function its tool is
KINDS = ["sync run, sync tool", "async run, sync tool", "async run, async tool"]
each_kind = pytest.mark.parametrize("kind", KINDS)


class Framework:
    """An adapter: how a framework wraps functions, and how an agent of it runs them, told by a model that is a fake."""

    control_flow: type[BaseException]

    def native(self, body: Callable[..., Any]) -> Callable[..., Any]:
        """`body` in the form that the framework wants its functions in."""
        return body

    def tool(self, function: Callable[..., Any]) -> Any:
        """What the framework's own decorator makes of the function."""
        raise NotImplementedError

    def schema(self, tool: Any) -> Any:
        """What the model is told of a tool."""
        raise NotImplementedError

    async def arun(self, functions: list[Callable[..., Any]], asked: list[Ask]) -> list[str]:
        """Let an agent with these functions as tools run all that its model asks for at once; the tools' answers."""
        raise NotImplementedError

    def run(self, functions: list[Callable[..., Any]], asked: list[Ask]) -> list[str]:
        """The same through the framework's own way for programs without a loop, where it has one."""
        return asyncio.run(self.arun(functions, asked))

    def stream(self, verses: Callable[[], AsyncIterator[str]]) -> AsyncIterator[str]:
        """The pieces that the framework streams, from a model that streams `verses`."""
        raise NotImplementedError

    def interrupt(self, agent: Callable[[Callable[..., Any]], Callable[..., Any]], asynchronous: bool) -> None:
        """Run a function made by `agent` that the framework's control flow leaves early."""
        raise NotImplementedError


class Work:
    """Something that only one may do at a time, and that notices if two do."""

    def __init__(self) -> None:
        self.mutex = threading.Lock()
        self.inside = self.peak = self.done = 0

    @contextlib.contextmanager
    def going_on(self) -> Iterator[None]:
        with self.mutex:
            self.inside += 1
            self.peak = max(self.peak, self.inside)
        try:
            yield
        finally:
            with self.mutex:
                self.inside -= 1
                self.done += 1

    def lookup(self) -> None:
        with self.going_on():
            threading.Event().wait(0.005)

    async def lookup_async(self) -> None:
        with self.going_on():
            await asyncio.sleep(0.005)


def call(server: ApiServer) -> None:
    """One call to the API."""
    connection = http.client.HTTPConnection("127.0.0.1", server.server_port, timeout=20)
    try:
        connection.request("POST", "/v1/chat/completions", "{}")
        connection.getresponse().read()
    finally:
        connection.close()


async def call_async(server: ApiServer) -> None:
    await asyncio.to_thread(call, server)


def looking_up(kind: str, work: Callable[[], Any], work_async: Callable[[], Any]) -> Callable[..., Any]:
    """A tool with a signature worth keeping."""

    def lookup(x: int, depth: Depth = "short", note: Optional[str] = None) -> int:
        """Look something up."""
        work()
        return x

    async def lookup_async(x: int, depth: Depth = "short", note: Optional[str] = None) -> int:
        """Look something up."""
        await work_async()
        return x

    lookup_async.__name__ = lookup_async.__qualname__ = "lookup"
    return lookup_async if kind.endswith("async tool") else lookup


class Contract:
    """The matrix: each of these is run for each framework."""

    framework: Framework

    def run(self, kind: str, function: Callable[..., Any], calls: int) -> list[str]:
        asked = [("lookup", n) for n in range(calls)]
        if kind.startswith("sync run"):
            return self.framework.run([function], asked)
        return asyncio.run(self.framework.arun([function], asked))

    @each_kind
    def test_A1_what_the_framework_reads_of_a_function_stays(self, coord: Coordinator, kind: str) -> None:
        """Name, description, types, defaults: the model is told the same with @coordinate and without."""
        plain = self.framework.native(looking_up(kind, threading.Event().set, asyncio.Event().wait))
        agent = coord.coordinate("lookup", lock_name="customer_1")(plain)
        assert inspect.signature(agent) == inspect.signature(plain)
        assert inspect.iscoroutinefunction(agent) == inspect.iscoroutinefunction(plain)
        assert self.framework.schema(self.framework.tool(agent)) == self.framework.schema(self.framework.tool(plain))

    def test_nothing_reaches_beyond_this_machine(self) -> None:
        """A look-up, and a connection to an address, are refused and remembered."""
        for host in ("example.com", "192.0.2.1"):
            with pytest.raises(OSError, match="no network"):
                socket.create_connection((host, 80), timeout=1)
        assert len(self.reached) == 2
        self.reached.clear()

    @pytest.fixture(autouse=True)
    def _reached(self, no_network: list[str]) -> None:
        self.reached = no_network

    @each_kind
    def test_R2_twelve_calls_at_once_under_a_limit_of_one_earn_no_429(self, coord: Coordinator, kind: str) -> None:
        """Each is answered, one at a time; the same calls without the limit are refused, so they do come at once."""
        coord.limit("api", concurrency=1)
        with ApiServer(concurrency=1, service_time=0.02) as server:
            body = looking_up(kind, lambda: call(server), lambda: call_async(server))
            self.run(kind, self.framework.native(body), CALLS)
            assert server.answers[429] > 0
            server.answers.clear()
            agent = coord.coordinate("lookup", lock_name="api")(self.framework.native(body))
            answers = self.run(kind, agent, CALLS)
            assert sorted(map(int, answers)) == list(range(CALLS))
            assert server.answers == {200: CALLS}

    @each_kind
    def test_L2_an_agent_that_holds_its_tools_lock_ends(self, kind: str) -> None:
        """Four tool calls at once, inside an agent that holds their lock: all run, one at a time."""
        work = Work()
        coord = Coordinator(lock_timeout=20)
        agent = coord.coordinate("lookup", lock_name="customer_1")(
            self.framework.native(looking_up(kind, work.lookup, work.lookup_async))
        )
        asked = [("lookup", n) for n in range(4)]

        @coord.coordinate("outer", lock_name="customer_1")
        def outer() -> list[str]:
            return self.framework.run([agent], asked)

        @coord.coordinate("outer", lock_name="customer_1")
        async def outer_async() -> list[str]:
            return await self.framework.arun([agent], asked)

        answers = outer() if kind.startswith("sync run") else asyncio.run(outer_async())
        assert sorted(map(int, answers)) == [0, 1, 2, 3]
        assert (work.done, work.peak) == (4, 1)
        assert coord.snapshot().locks == ()
        coord.close()

    @each_kind
    def test_E12_the_run_s_id_reaches_tools_and_handlers(self, coord: Coordinator, kind: str) -> None:
        """What the tools' calls tell, and what a tool emits itself, belongs to the run that the agent was called in."""
        heard: list[Event] = []
        coord.on("lookup_*", heard.append, pass_event=True)
        coord.on("found", heard.append, pass_event=True)

        async def found_async() -> None:
            coord.emit("found")

        agent = coord.coordinate("lookup")(
            self.framework.native(looking_up(kind, lambda: coord.emit("found"), found_async))
        )
        with coord.run("report-42"):
            self.run(kind, agent, 4)
        coord.join(20)
        assert sorted(event.name for event in heard) == sorted(["found", "lookup_complete", "lookup_started"] * 4)
        assert {event.run_id for event in heard} == {"report-42"}

    @pytest.mark.parametrize("asynchronous", [False, True], ids=["sync", "async"])
    def test_A2_the_framework_s_control_flow_is_no_failure(self, coord: Coordinator, asynchronous: bool) -> None:
        """With its exception types in `control_flow=` the agent is `_cancelled`; without, `_failed`."""
        heard: list[str] = []
        coord.on("asker_*", lambda event: heard.append(event.name), pass_event=True)
        told = coord.coordinate("asker", lock_name="customer_1", control_flow=self.framework.control_flow)
        self.framework.interrupt(told, asynchronous)
        coord.join(20)
        assert heard[:2] == ["asker_started", "asker_cancelled"]
        assert "asker_failed" not in heard
        heard.clear()
        self.framework.interrupt(coord.coordinate("asker", lock_name="customer_1"), asynchronous)
        coord.join(20)
        assert heard[:2] == ["asker_started", "asker_failed"]
        assert coord.snapshot().locks == ()

    def poet(self, coord: Coordinator, work: Work) -> Callable[[], AsyncIterator[str]]:
        coord.limit("api", concurrency=1)

        @coord.coordinate("poet", lock_name="api", collect="".join)
        async def verses() -> AsyncIterator[str]:
            with work.going_on():
                for word in WORDS:
                    await asyncio.sleep(0.001)
                    yield word

        return verses

    def test_A1_streams_hold_their_place_to_the_end(self, coord: Coordinator) -> None:
        """Three streams under a limit of one come one after another, whole; each tells its text when it ends."""
        work = Work()
        results: list[str] = []
        coord.on("poet_complete", lambda data: results.append(data["result"]))
        verses = self.poet(coord, work)

        async def listen() -> str:
            return "".join([piece async for piece in self.framework.stream(verses)])

        async def main() -> list[str]:
            return await asyncio.gather(listen(), listen(), listen())

        assert asyncio.run(main()) == [TEXT] * 3
        coord.join(20)
        assert results == [TEXT] * 3
        assert (work.done, work.peak) == (3, 1)

    def test_A1_a_stream_that_is_left_early_gives_its_place_back(self, coord: Coordinator) -> None:
        """Whoever stops listening after the first piece leaves no hold: the next stream comes whole."""
        work = Work()
        verses = self.poet(coord, work)

        async def main() -> str:
            stream: Any = self.framework.stream(verses)
            assert await stream.__anext__() in TEXT
            await stream.aclose()
            del stream
            gc.collect()
            while coord.snapshot().limits[0].places_taken:  # some leave it to the loop to close what is abandoned
                await asyncio.sleep(0)
            return "".join([piece async for piece in self.framework.stream(verses)])

        assert asyncio.run(asyncio.wait_for(main(), 20)) == TEXT
        assert (work.done, work.peak) == (2, 1)
        assert coord.snapshot().locks == ()


def run_script(script: Path) -> str:
    """What a script prints, in a Python of its own with this one's environment."""
    done = subprocess.run(
        [sys.executable, str(script)],
        capture_output=True,
        text=True,
        timeout=55,
        check=False,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def run_example(name: str) -> str:
    """What an example prints, offline."""
    return run_script(ROOT / "examples" / "frameworks" / name)


def assert_docs_hold(framework: str, directory: Path) -> None:
    """What docs/frameworks.md shows for it runs, in one process in order, and prints what the text blocks say."""
    page = (ROOT / "docs" / "frameworks.md").read_text(encoding="utf-8")
    shown = re.findall(
        rf"<!-- run in the environment of: {framework} -->\n```python\n(.*?)^```\n\n```text\n(.*?)^```",
        page,
        re.M | re.S,
    )
    assert shown
    script = directory / "page.py"
    script.write_text("".join(code for code, _ in shown), encoding="utf-8")
    assert run_script(script) == "".join(printed for _, printed in shown)
