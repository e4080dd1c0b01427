"""Headless Chromium, driven over its pipe of debugging messages: nothing but the standard library is needed."""

from __future__ import annotations

import base64
import fcntl
import json
import os
import shutil
import subprocess
import tempfile
import threading
from pathlib import Path
from typing import Any, Optional

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)


class Browser:
    """One page of a browser of its own. A context manager; what the page asks for and complains of is kept.

    Attributes:
        requests: the URLs of all that was asked for.
        complaints: errors and warnings of its console.
    """

    def __init__(self) -> None:
        assert CHROMIUM is not None
        self.requests: list[str] = []
        self.complaints: list[str] = []
        self._events: list[str] = []
        self._number = 0
        self._session: Optional[str] = None
        self._home = tempfile.mkdtemp()
        self._unread = b""
        self._in, write_there = os.pipe()
        read_there, self._out = os.pipe()
        options = "--headless=new --no-sandbox --disable-gpu --no-first-run --hide-scrollbars "
        options += f"--remote-debugging-pipe --disable-dev-shm-usage --user-data-dir={self._home}"
        ends = [fcntl.fcntl(end, fcntl.F_DUPFD_CLOEXEC, 10) for end in (read_there, write_there)]

        def place() -> None:
            os.dup2(ends[0], 3)
            os.dup2(ends[1], 4)

        self._process = subprocess.Popen(
            [CHROMIUM, *options.split()],
            close_fds=False,
            preexec_fn=place,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        for end in (read_there, write_there, *ends):
            os.close(end)
        self._watch = threading.Timer(50, self._process.kill)  # a browser that hangs ends the wait for its messages
        self._watch.start()
        target = self("Target.createTarget", url="about:blank")["targetId"]
        self._session = self("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Log", "Network"):
            self(f"{domain}.enable")

    def __call__(self, method: str, **params: Any) -> Any:
        """One call of the protocol."""
        self._number += 1
        mine = self._number
        message: dict[str, Any] = {"id": mine, "method": method, "params": params}
        if self._session is not None:
            message["sessionId"] = self._session
        os.write(self._out, json.dumps(message).encode() + b"\0")
        while True:
            answer = self._next()
            if answer.get("id") == mine:
                assert "error" not in answer, answer
                return answer["result"]

    def _next(self) -> Any:
        while b"\0" not in self._unread:
            more = os.read(self._in, 1 << 20)
            assert more, "the browser has ended"
            self._unread += more
        text, _, self._unread = self._unread.partition(b"\0")
        message = json.loads(text)
        self._note(message.get("method"), message.get("params", {}))
        return message

    def _note(self, method: Optional[str], params: Any) -> None:
        if method == "Network.requestWillBeSent":
            self.requests.append(params["request"]["url"])
        elif method == "Runtime.exceptionThrown":
            self.complaints.append(json.dumps(params["exceptionDetails"])[:500])
        elif method == "Runtime.consoleAPICalled" and params["type"] in ("error", "warning", "assert"):
            self.complaints.append(json.dumps(params["args"])[:500])
        elif method == "Log.entryAdded" and params["entry"]["level"] in ("error", "warning"):
            self.complaints.append(params["entry"]["text"])
        if method is not None:
            self._events.append(method)

    def open(self, path: Path) -> None:
        """Load a file, and wait until it is there and drawn."""
        self._events.clear()
        self("Page.navigate", url=path.as_uri())
        while "Page.loadEventFired" not in self._events:
            self._next()
        self.drawn()

    def drawn(self) -> None:
        """Wait until the next picture."""
        self.run("new Promise((done) => requestAnimationFrame(() => requestAnimationFrame(done)))")

    def run(self, script: str) -> Any:
        """The value of an expression in the page."""
        found = self("Runtime.evaluate", expression=script, awaitPromise=True, returnByValue=True)
        assert "exceptionDetails" not in found, found
        return found["result"].get("value")

    def look(self, width: int, height: int, *, dark: bool = False) -> None:
        """How large the window is, and which colours it likes."""
        self("Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=False)
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self("Emulation.setEmulatedMedia", features=[scheme])
        self.drawn()

    def mouse(self, kind: str, x: float, y: float, **more: Any) -> None:
        """One thing that a mouse does: mouseMoved, mousePressed, mouseReleased, mouseWheel."""
        self("Input.dispatchMouseEvent", type=kind, x=x, y=y, **more)
        self.drawn()

    def key(self, key: str) -> None:
        """Press a key."""
        text = {"text": key} if len(key) == 1 else {}
        for kind in ("keyDown", "keyUp"):
            self("Input.dispatchKeyEvent", type=kind, key=key, **(text if kind == "keyDown" else {}))
        self.drawn()

    def screenshot(self, path: Path) -> None:
        """A picture of the whole page."""
        found = self("Page.captureScreenshot", captureBeyondViewport=True)
        path.write_bytes(base64.b64decode(found["data"]))

    def __enter__(self) -> Browser:
        return self

    def __exit__(self, *error: object) -> None:
        self._watch.cancel()
        self._process.kill()
        self._process.wait()
        os.close(self._in)
        os.close(self._out)
        shutil.rmtree(self._home, ignore_errors=True)
