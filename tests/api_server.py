"""A local server that stands in for a model's API: it answers as OpenAI and Anthropic do, and its limits are hard.

It refuses with 429 what comes while `concurrency` calls are in flight, and what would be more than `requests` answered
calls, or more than `tokens`, in any window of `per` seconds, by the times at which it has read them.
"""

from __future__ import annotations

import contextlib
import json
import math
import select
import socket
import threading
import time
from collections import Counter
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, Optional

PROMPT_TOKENS, ANSWER_TOKENS, TOKENS = 60, 40, 100
WORDS = ["busy ", "bees ", "make ", "honey"]


class ApiServer(ThreadingHTTPServer):
    """`concurrency`, `requests`, `tokens` and `per` may be set at any time.

    Attributes:
        url: where it is.
        service_time: how long a call takes; the pieces of a stream come that far apart.
        arrivals: when the calls have arrived, those refused included.
        answers: how many calls were answered with which status.
        peak: how many were in flight at most.
    """

    daemon_threads = False  # closing waits for them
    request_queue_size = 128

    def __init__(
        self,
        *,
        concurrency: Optional[int] = None,
        requests: Optional[int] = None,
        tokens: Optional[int] = None,
        per: float = 1.0,
        service_time: float = 0.03,
    ) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server_port}"
        self.concurrency, self.requests, self.tokens, self.per = concurrency, requests, tokens, per
        self.service_time = service_time
        self.arrivals: list[float] = []
        self.answers: Counter[int] = Counter()
        self.peak = 0
        self._taken: list[float] = []  # when those arrived that were not refused
        self._in_flight: set[socket.socket] = set()
        self._connections: list[socket.socket] = []
        self._paused_until = 0.0
        self._mutex = threading.Lock()
        self._thread = threading.Thread(target=self.serve_forever, args=(0.01,), name="api-server")

    def __enter__(self) -> ApiServer:
        self._thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self.shutdown()
        self._thread.join()
        for connection in self._connections:
            with contextlib.suppress(OSError):
                connection.shutdown(socket.SHUT_RDWR)
        self.server_close()

    def process_request(self, request: Any, client_address: Any) -> None:
        self._connections.append(request)
        super().process_request(request, client_address)

    def pause(self, seconds: float) -> None:
        """Refuse everything from now on for so long."""
        self._paused_until = time.monotonic() + seconds

    def admit(self, connection: socket.socket) -> Optional[float]:
        """A call has arrived: None if it is to be answered, else in how many seconds to come again."""
        with self._mutex:
            now = time.monotonic()
            self.arrivals.append(now)
            wait = self._wait(now)
            self.answers[429 if wait > 0 else 200] += 1
            if wait <= 0:
                self._taken.append(now)
                self._in_flight.add(connection)
                self.peak = max(self.peak, len(self._in_flight))
            return wait if wait > 0 else None

    def _wait(self, now: float) -> float:
        waits = [self._paused_until - now]
        if self.concurrency is not None and len(self._in_flight) >= self.concurrency:
            self._in_flight -= {connection for connection in self._in_flight if has_left(connection)}
            if len(self._in_flight) >= self.concurrency:
                waits.append(self.service_time)
        for allowed in (self.requests, self.tokens and self.tokens // TOKENS):
            if allowed is not None and len(self._taken) >= allowed:
                waits.append(self._taken[-allowed] + self.per - now)
        return max(waits)

    def leave(self, connection: socket.socket) -> None:
        """The call of this connection is over: said before its last bytes are sent, since the next may follow them."""
        with self._mutex:
            self._in_flight.discard(connection)


def has_left(connection: socket.socket, within: float = 0.0) -> bool:
    """Whether the client has hung up, or does so within that time."""
    try:
        return bool(select.select([connection], [], [], within)[0] and not connection.recv(1, socket.MSG_PEEK))
    except (OSError, ValueError):
        return True


class Handler(BaseHTTPRequestHandler):
    """One connection: its calls, one after another."""

    server: ApiServer
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True

    def handle(self) -> None:
        with contextlib.suppress(OSError):  # the client has hung up
            super().handle()
        self.server.leave(self.connection)

    def log_message(self, *args: Any) -> None:
        pass

    def do_POST(self) -> None:
        asked = json.loads(self.rfile.read(int(self.headers["content-length"])))
        wait = self.server.admit(self.connection)
        body, pieces = (OPENAI, openai_pieces) if self.path == "/v1/chat/completions" else (ANTHROPIC, anthropic_pieces)
        if wait is not None:
            self._answer(429, {"type": "error", "error": {"type": "rate_limit_error", "message": "too many"}}, wait)
        elif asked.get("stream"):
            self._stream(pieces())
        elif not has_left(self.connection, self.server.service_time):
            self.server.leave(self.connection)
            self._answer(200, body)

    def _answer(self, status: int, body: dict[str, Any], wait: float = 0.0) -> None:
        content = json.dumps(body).encode()
        self.send_response(status)
        self.send_header("content-type", "application/json")
        self.send_header("content-length", str(len(content)))
        if wait:
            self.send_header("retry-after", str(math.ceil(wait)))
            self.send_header("retry-after-ms", str(math.ceil(wait * 1000)))
        self.end_headers()
        self.wfile.write(content)

    def _stream(self, pieces: list[str]) -> None:
        self.send_response(200)
        self.send_header("content-type", "text/event-stream")
        self.send_header("transfer-encoding", "chunked")
        self.end_headers()
        for piece in pieces:
            if piece is pieces[-1]:
                self.server.leave(self.connection)
            self.wfile.write(f"{len(piece):x}\r\n{piece}\r\n".encode())
            if piece is not pieces[-1] and has_left(self.connection, self.server.service_time):
                return
        self.wfile.write(b"0\r\n\r\n")


OPENAI = {
    **{"id": "chatcmpl-1", "object": "chat.completion", "created": 1, "model": "small"},
    "choices": [{"index": 0, "message": {"role": "assistant", "content": "".join(WORDS)}, "finish_reason": "stop"}],
    "usage": {"prompt_tokens": PROMPT_TOKENS, "completion_tokens": ANSWER_TOKENS, "total_tokens": TOKENS},
}
ANTHROPIC = {
    **{"id": "msg_1", "type": "message", "role": "assistant", "model": "small", "stop_reason": "end_turn"},
    "content": [{"type": "text", "text": "".join(WORDS)}],
    "usage": {"input_tokens": PROMPT_TOKENS, "output_tokens": ANSWER_TOKENS},
}


def openai_pieces() -> list[str]:
    choices: list[list[Any]] = [[{"index": 0, "delta": {"content": word}, "finish_reason": None}] for word in WORDS]
    chunk = {**OPENAI, "object": "chat.completion.chunk", "usage": None}
    chunks = [{**chunk, "choices": one} for one in choices] + [{**chunk, "choices": [], "usage": OPENAI["usage"]}]
    return [f"data: {json.dumps(one)}\n\n" for one in chunks] + ["data: [DONE]\n\n"]


def anthropic_pieces() -> list[str]:
    events: list[tuple[str, dict[str, Any]]] = [
        ("message_start", {"message": {**ANTHROPIC, "content": [], "stop_reason": None}}),
        ("content_block_start", {"index": 0, "content_block": {"type": "text", "text": ""}}),
        *(("content_block_delta", {"index": 0, "delta": {"type": "text_delta", "text": word}}) for word in WORDS),
        ("content_block_stop", {"index": 0}),
        ("message_delta", {"delta": {"stop_reason": "end_turn"}, "usage": {"output_tokens": ANSWER_TOKENS}}),
        ("message_stop", {}),
    ]
    return [f"event: {kind}\ndata: {json.dumps({'type': kind, **data})}\n\n" for kind, data in events]
