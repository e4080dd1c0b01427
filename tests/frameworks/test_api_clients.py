"""The official clients against a server with hard limits: what obeys a limit is not refused, and not slowed down.

What needs `openai` or `anthropic` is skipped where they are not installed; CONTRIBUTING says how to run these. With
AGENTDIFF_TRIES=20 in the environment each measurement is made so many times, and `pytest -rP` shows what came of them.
"""

from __future__ import annotations

import asyncio
import functools
import gc
import http.client
import importlib
import json
import os
import threading
from collections.abc import AsyncIterator, Iterator
from typing import Any, Callable

import pytest
from api_server import ANSWER_TOKENS, PROMPT_TOKENS, TOKENS, WORDS, ApiServer
from support import eventually, join_all, start_all

from agentdiff import Coordinator

TRIES = range(int(os.environ.get("AGENTDIFF_TRIES", "1")))
THREADS, EACH = 12, 3
CALLS = THREADS * EACH
SERVICE_TIME = 0.03
RESERVED = 400
ASK: dict[str, Any] = {"model": "small", "max_tokens": RESERVED, "messages": [{"role": "user", "content": "hello"}]}
TEXT = "".join(WORDS)
LIMITS: dict[str, dict[str, Any]] = {
    "one at once": {"concurrency": 1},
    "three at once": {"concurrency": 3},
    "20 a second": {"requests": 20, "per": 1.0},
    "three at once and 20 a second": {"concurrency": 3, "requests": 20, "per": 1.0},
}

both_clients = pytest.mark.parametrize("kind", ["openai", "anthropic"])
each_limit = pytest.mark.parametrize("limits", LIMITS.values(), ids=LIMITS)
each_try = pytest.mark.parametrize("attempt", TRIES)


class Api:
    """One of the two clients, which never repeats a call by itself."""

    def __init__(self, kind: str, url: str, asynchronous: bool = False) -> None:
        self.package = importlib.import_module(kind)
        self.openai = kind == "openai"
        name = ("Async" if asynchronous else "") + ("OpenAI" if self.openai else "Anthropic")
        http_client = getattr(self.package, f"Default{'Async' if asynchronous else ''}HttpxClient")(trust_env=False)
        self.client = getattr(self.package, name)(
            api_key="none", base_url=f"{url}/v1" if self.openai else url, max_retries=0, http_client=http_client
        )
        self.create = self.client.chat.completions.create if self.openai else self.client.messages.create
        self.stream = functools.partial(self.create, stream=True)
        self.refusal: type[Exception] = self.package.RateLimitError

    def used(self, response: Any) -> int:
        """How many tokens it has used."""
        usage = response.usage
        return usage.total_tokens if self.openai else usage.input_tokens + usage.output_tokens

    def text(self, piece: Any) -> str:
        """What a streamed piece says."""
        if self.openai:
            return piece.choices[0].delta.content if piece.choices else ""
        return piece.delta.text if piece.type == "content_block_delta" else ""


@functools.cache
def warmed_up(kind: str) -> bool:
    """A client's first call imports half of it: that takes longer than any margin."""
    with ApiServer() as server:
        api = Api(kind, server.url)
        with api.client:
            return bool(api.create(**ASK))


@pytest.fixture
def ready(kind: str) -> str:
    """A client that is installed, and warmed up."""
    pytest.importorskip(kind)
    assert warmed_up(kind)
    return kind


def all_at_once(work: Callable[[], Any], threads: int = THREADS, times: int = 1) -> list[Any]:
    """What the threads have got: results and exceptions."""
    together = threading.Barrier(threads)
    got: list[Any] = []

    def run() -> None:
        together.wait()
        for _ in range(times):
            try:
                got.append(work())
            except Exception as error:
                got.append(error)

    join_all(start_all(*[run] * threads))
    return got


def permitted(calls: int, concurrency: int = CALLS, requests: int = CALLS, per: float = 1.0) -> float:
    """How many seconds the limits need at least, from the first arrival to the end of the last call."""
    starts: list[float] = []
    for number in range(calls):
        rate = starts[number - requests] + per if number >= requests else 0.0
        starts.append(max(rate, starts[number - concurrency] + SERVICE_TIME if number >= concurrency else 0.0))
    return starts[-1] + SERVICE_TIME


def assert_not_slow(measure: Callable[[], float], best: float) -> None:
    """What limits permit may take 1.3 times as long, in one of three measurements; decided on a quiet machine only.

    So without AGENTDIFF_MEASURE it is told, and nothing fails by it.
    """
    ratios = []
    for _ in range(3):
        ratios.append(round(measure() / best, 3))
        if ratios[-1] <= 1.3:
            break
    print(f"took {ratios} times what the limits permit")
    assert ratios[-1] <= 1.3 or not os.environ.get("AGENTDIFF_MEASURE"), f"took {ratios} times what the limits permit"


def span(server: ApiServer) -> float:
    """From the first arrival to the end of the last call, as the server saw it."""
    return server.arrivals[-1] - server.arrivals[0] + SERVICE_TIME


# -- the server itself; needs no client -------------------------------------------------------------------------


def post(server: ApiServer, path: str = "/v1/chat/completions", **asked: Any) -> tuple[int, dict[str, str], bytes]:
    """A call without any client: status, headers, body."""
    connection = http.client.HTTPConnection("127.0.0.1", server.server_port, timeout=10)
    try:
        connection.request("POST", path, json.dumps(asked))
        response = connection.getresponse()
        return response.status, dict(response.getheaders()), response.read()
    finally:
        connection.close()


def test_the_server_refuses_what_is_beyond_each_of_its_limits() -> None:
    """By number at once, by rate, by tokens, and while it pauses; until the limit allows more."""
    with ApiServer(concurrency=1, service_time=0.1) as server:
        statuses = [status for status, _, _ in all_at_once(lambda: post(server), threads=4)]
        assert sorted(statuses) == [200, 429, 429, 429]
        assert (server.answers, server.peak, len(server.arrivals)) == ({200: 1, 429: 3}, 1, 4)
    for limit in ({"requests": 2}, {"tokens": 2 * TOKENS + 1}):
        with ApiServer(**limit, per=30, service_time=0) as server:
            assert [post(server)[0] for _ in range(3)] == [200, 200, 429]
            assert 29 <= float(post(server)[1]["retry-after"]) <= 30
            server.per = 1e-9  # the window is over
            assert post(server)[0] == 200
    with ApiServer(service_time=0) as server:
        server.pause(30)
        status, headers, _ = post(server)
        assert (status, headers["retry-after"]) == (429, "30")
        assert 29_000 < int(headers["retry-after-ms"]) <= 30_000


def test_the_server_answers_whole_and_in_pieces() -> None:
    """As the two APIs do."""
    with ApiServer(service_time=0) as server:
        assert json.loads(post(server)[2])["usage"]["total_tokens"] == TOKENS
        usage = json.loads(post(server, "/v1/messages")[2])["usage"]
        assert usage == {"input_tokens": PROMPT_TOKENS, "output_tokens": ANSWER_TOKENS}
        assert post(server, stream=True)[2].endswith(b"data: [DONE]\n\n")
        assert b"event: message_stop" in post(server, "/v1/messages", stream=True)[2]


# -- R2: none is refused, and none waits longer than it must ----------------------------------------------------


@each_try
@each_limit
@both_clients
def test_without_a_coordinator_many_are_refused(ready: str, limits: dict[str, Any], attempt: int) -> None:
    """The server is as strict as it must be for the other tests to mean anything."""
    with ApiServer(**limits, service_time=SERVICE_TIME) as server:
        api = Api(ready, server.url)
        with api.client:
            got = all_at_once(lambda: api.create(**ASK), times=EACH)
    refused = [one for one in got if isinstance(one, api.refusal)]
    print(f"{len(refused)} of {sum(server.answers.values())} refused")
    assert len(refused) == server.answers[429] > 0
    assert len(got) == sum(server.answers.values()) == CALLS


@each_try
@each_limit
@both_clients
def test_R2_none_of_36_calls_is_refused_and_none_waits_too_long(
    ready: str, limits: dict[str, Any], attempt: int
) -> None:
    """Twelve threads that share a client, each with three calls."""

    def measure() -> float:
        with ApiServer(**limits, service_time=SERVICE_TIME) as server, Coordinator() as coord:
            coord.limit("api", **limits)
            api = Api(ready, server.url)
            ask = coord.coordinate("asker", lock_name="api")(lambda: api.used(api.create(**ASK)))
            with api.client:
                got = all_at_once(ask, times=EACH)
        print(f"{server.answers[429]} of {sum(server.answers.values())} refused")
        assert got == [TOKENS] * CALLS
        assert server.answers == {200: CALLS}
        return span(server)

    assert_not_slow(measure, permitted(CALLS, **limits))


# -- streams ----------------------------------------------------------------------------------------------------


@each_try
@both_clients
def test_R2_none_of_20_tasks_is_refused_half_of_them_streaming(ready: str, attempt: int) -> None:
    """A streamed answer has its place for as long as the server has it in flight."""
    limits: dict[str, Any] = {"concurrency": 3, "requests": 15, "per": 1.0}

    async def main(server: ApiServer) -> list[str]:
        api = Api(ready, server.url, asynchronous=True)
        async with api.client, Coordinator() as coord:
            coord.limit("api", **limits)

            @coord.coordinate("asker", lock_name="api")
            async def ask() -> str:
                return TEXT if api.used(await api.create(**ASK)) == TOKENS else ""

            @coord.coordinate("poet", lock_name="api")
            async def verses() -> AsyncIterator[str]:
                async with await api.stream(**ASK) as pieces:
                    async for piece in pieces:
                        yield api.text(piece)

            async def listen() -> str:
                return "".join([verse async for verse in verses()])

            return await asyncio.gather(*(work() for _ in range(10) for work in (ask, listen)))

    with ApiServer(**limits, service_time=0.01) as server:
        assert asyncio.run(main(server)) == [TEXT] * 20
    print(f"{server.answers[429]} of {sum(server.answers.values())} refused")
    assert server.answers == {200: 20}
    assert server.peak == 3


@pytest.mark.parametrize("end", ["ends", "is closed", "is abandoned"])
@both_clients
def test_A1_a_stream_holds_its_place_until_it(ready: str, end: str) -> None:
    """Whoever waits comes in then, and the server has room for it."""
    with ApiServer(concurrency=1, service_time=0.005) as server, Coordinator() as coord:
        coord.limit("api", concurrency=1)
        api = Api(ready, server.url)

        @coord.coordinate("poet", lock_name="api")
        def verses() -> Iterator[str]:
            with api.stream(**ASK) as pieces:
                for piece in pieces:
                    yield api.text(piece)

        with api.client:
            stream: Any = verses()
            next(stream)
            answers: list[str] = []
            waiting = start_all(lambda: answers.append("".join(verses())))
            eventually(lambda: coord.snapshot().limits[0].waiting == 1)
            assert (coord.snapshot().limits[0].places_taken, len(server.arrivals)) == (1, 1)
            if end == "ends":
                list(stream)
            elif end == "is closed":
                stream.close()
            del stream
            join_all(waiting)
    assert answers == [TEXT]
    assert server.answers == {200: 2}


@pytest.mark.parametrize("end", ["ends", "is closed", "is abandoned"])
@both_clients
def test_A1_an_async_stream_holds_its_place_until_it(ready: str, end: str) -> None:
    """The same on a loop, which closes what is abandoned by itself."""

    async def main(server: ApiServer) -> list[str]:
        api = Api(ready, server.url, asynchronous=True)
        async with api.client, Coordinator() as coord:
            coord.limit("api", concurrency=1)

            @coord.coordinate("poet", lock_name="api")
            async def verses() -> AsyncIterator[str]:
                async with await api.stream(**ASK) as pieces:
                    async for piece in pieces:
                        yield api.text(piece)

            async def listen() -> list[str]:
                return [verse async for verse in verses()]

            stream: Any = verses()
            await stream.__anext__()
            waiting = asyncio.create_task(listen())
            while not coord.snapshot().limits[0].waiting:
                await asyncio.sleep(0)
            assert (coord.snapshot().limits[0].places_taken, len(server.arrivals)) == (1, 1)
            if end == "ends":
                async for _ in stream:
                    assert not waiting.done()
            elif end == "is closed":
                await stream.aclose()
            del stream
            gc.collect()
            return await waiting

    with ApiServer(concurrency=1, service_time=0.005) as server:
        assert "".join(asyncio.run(main(server))) == TEXT
    assert server.answers == {200: 2}


# -- R3: what is settled counts, and not what was reserved ------------------------------------------------------


@each_try
@both_clients
def test_R3_ten_calls_that_use_less_than_they_reserve_take_a_window_and_not_four(ready: str, attempt: int) -> None:
    """Each reserves 400 of the 1,000 tokens a second and uses 100: the reservations alone would need four seconds."""
    limits: dict[str, Any] = {"tokens": 1000, "per": 1.0}

    def measure() -> float:
        with ApiServer(**limits, service_time=SERVICE_TIME) as server, Coordinator() as coord:
            coord.limit("api", **limits)
            api = Api(ready, server.url)

            @coord.coordinate("asker", lock_name="api", tokens=RESERVED)
            def ask() -> int:
                used = api.used(api.create(**ASK))
                coord.slot("api").commit(tokens=used)
                return used

            with api.client:
                assert all_at_once(ask, threads=10) == [TOKENS] * 10
        print(f"{server.answers[429]} of {sum(server.answers.values())} refused")
        assert server.answers == {200: 10}
        return span(server)

    # the eighth would be the 1,100th token: it waits until the first has left the window, and two more follow it
    assert_not_slow(measure, 1.0 + SERVICE_TIME)


# -- R4: one refusal is enough ----------------------------------------------------------------------------------


def until_answered(ask: Callable[[], Any], refusal: type[Exception]) -> Any:
    """Agents repeat nothing: their caller does, and each time waits its turn."""
    while True:
        try:
            return ask()
        except refusal:
            pass


@each_try
@pytest.mark.parametrize("in_flight", [1, 3])
@pytest.mark.parametrize("told", ["by the agent", "by hand"])
@both_clients
def test_R4_a_server_that_tightens_its_limit_refuses_once(ready: str, told: str, in_flight: int, attempt: int) -> None:
    """One 429, or one for each call that was in flight, tells everybody; the tighter limit is declared then."""
    with ApiServer(concurrency=in_flight, requests=40, service_time=0.005) as server, Coordinator() as coord:
        coord.limit("api", concurrency=in_flight, requests=40, per=1)
        api = Api(ready, server.url)

        def tighten() -> None:
            coord.limit("api", concurrency=in_flight, requests=15, per=1)

        @coord.coordinate("asker", lock_name="api", throttle_on=api.refusal)
        def ask() -> int:
            return api.used(api.create(**ASK))

        def ask_by_hand() -> int:
            with coord.lock("api") as slot:
                try:
                    return api.used(api.create(**ASK))
                except api.refusal as error:
                    headers = error.response.headers  # type: ignore[attr-defined]
                    slot.throttled(retry_after=int(headers["retry-after-ms"]) / 1000)
                    tighten()
                    raise

        coord.on("asker_failed", lambda data: tighten())
        work = ask if told == "by the agent" else ask_by_hand
        with api.client:
            assert all_at_once(work) == [TOKENS] * THREADS
            server.requests = 15
            assert all_at_once(lambda: until_answered(work, api.refusal), times=EACH - 1) == [TOKENS] * (
                CALLS - THREADS
            )
    print(f"{server.answers[429]} of {sum(server.answers.values())} refused")
    assert server.answers[200] == CALLS
    assert 1 <= server.answers[429] <= in_flight


@each_try
@pytest.mark.parametrize("in_flight", [1, 3])
@both_clients
def test_R4_a_server_that_wants_a_pause_refuses_once(ready: str, in_flight: int, attempt: int) -> None:
    """Nobody calls before the time that its `retry-after` has named."""
    with ApiServer(concurrency=in_flight, service_time=0.005) as server, Coordinator() as coord:
        coord.limit("api", concurrency=in_flight)
        api = Api(ready, server.url)

        @coord.coordinate("asker", lock_name="api", throttle_on=api.refusal)
        def ask() -> int:
            return api.used(api.create(**ASK))

        with api.client:
            assert all_at_once(ask) == [TOKENS] * THREADS
            server.pause(0.5)
            assert all_at_once(lambda: until_answered(ask, api.refusal)) == [TOKENS] * THREADS
    print(f"{server.answers[429]} of {sum(server.answers.values())} refused")
    assert server.answers[200] == 2 * THREADS
    assert 1 <= server.answers[429] <= in_flight


@both_clients
def test_R4_tenacity_goes_around_the_agent(ready: str) -> None:
    """Each attempt takes a place of its own, in turn, and none before the API wants calls again."""
    tenacity = pytest.importorskip("tenacity")
    with ApiServer(concurrency=1, service_time=0.005) as server, Coordinator() as coord:
        coord.limit("api", concurrency=1)
        api = Api(ready, server.url)

        @tenacity.retry(
            retry=tenacity.retry_if_exception_type(api.refusal), stop=tenacity.stop_after_attempt(3), reraise=True
        )
        @coord.coordinate("asker", lock_name="api", throttle_on=api.refusal)
        def ask() -> int:
            return api.used(api.create(**ASK))

        with api.client:
            server.pause(0.3)
            assert all_at_once(ask) == [TOKENS] * THREADS
    assert server.answers == {200: THREADS, 429: 1}
