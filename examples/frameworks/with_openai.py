"""Twelve agents share one OpenAI client, of which two calls at once are allowed: with a limit, none is refused.

Offline it asks a server of its own, which refuses a third call; with OPENAI_API_KEY set, the real API.
"""

from __future__ import annotations

import json
import os
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from agentdiff import Coordinator

try:
    import openai
except ImportError:
    raise SystemExit("This example needs the OpenAI SDK: pip install openai") from None


class Api(BaseHTTPRequestHandler):
    places = threading.Semaphore(2)

    def do_POST(self) -> None:
        self.rfile.read(int(self.headers["content-length"]))
        message = {"role": "assistant", "content": "Bees make honey."}
        body: dict[str, Any] = {"id": "1", "object": "chat.completion", "created": 1, "model": "offline"}
        free = self.places.acquire(blocking=False)
        if free:
            time.sleep(0.02)
            self.places.release()
        body["choices"] = [{"index": 0, "message": message, "finish_reason": "stop"}]
        self.send_response(200 if free else 429)
        self.send_header("content-type", "application/json")
        self.end_headers()
        self.wfile.write(json.dumps(body).encode())

    def log_message(self, *args: Any) -> None: ...


with ThreadingHTTPServer(("127.0.0.1", 0), Api) as server, Coordinator() as coord, ThreadPoolExecutor(12) as pool:
    threading.Thread(target=server.serve_forever, daemon=True).start()
    offline = {"api_key": "none", "base_url": f"http://127.0.0.1:{server.server_port}"}
    client = openai.OpenAI(max_retries=0, **({} if os.environ.get("OPENAI_API_KEY") else offline))
    coord.limit("openai_api", concurrency=2)

    @coord.coordinate("researcher", lock_name="openai_api", throttle_on=openai.RateLimitError)
    def research(topic: str) -> str:
        asked: Any = [{"role": "user", "content": f"One sentence about {topic}."}]
        return str(client.chat.completions.create(model="gpt-4o-mini", messages=asked).choices[0].message.content)

    answers = list(pool.map(research, ["bees"] * 12))
    print(f"{len(answers)} of 12 calls answered: {answers[0]}")
    client.close()
    server.shutdown()
