"""Nothing here reaches beyond this machine, and the frameworks' own warnings are theirs."""

from __future__ import annotations

import asyncio
import functools
import ipaddress
import socket
from collections.abc import Callable, Iterator
from typing import Any

import pytest

pytest.register_assert_rewrite("framework_contract")

THEIRS = "default:::(?!agentdiff|framework_contract|api_server|test_|conftest|support)"  # ours stay errors
reached: list[str] = []


def is_here(host: Any) -> bool:
    """Whether it names this machine without a look-up."""
    name = host.decode() if isinstance(host, bytes) else host
    if name in {None, "", "localhost", socket.gethostname()}:
        return True
    try:
        return ipaddress.ip_address(name).is_loopback
    except ValueError:
        return False


def refuse(what: str, host: Any) -> None:
    if not is_here(host):
        reached.append(f"{what} {host!r}")
        raise OSError(f"the tests of the frameworks have no network: {what} {host!r}")


def guarded(owner: Any, name: str, host_of: Callable[..., Any]) -> None:
    real = getattr(owner, name)

    @functools.wraps(real)
    def call(*args: Any, **kwargs: Any) -> Any:
        refuse(name, host_of(*args, **kwargs))
        return real(*args, **kwargs)

    setattr(owner, name, call)


def host_of_address(connecting: socket.socket, address: Any) -> Any:
    return address[0] if connecting.family in {socket.AF_INET, socket.AF_INET6} else None


# from the first import of a framework on, look-ups and connections to elsewhere fail, and are remembered
for look_up in ("getaddrinfo", "gethostbyname", "gethostbyname_ex"):
    guarded(socket, look_up, lambda host, *args, **kwargs: host)
for connect in ("connect", "connect_ex"):
    guarded(socket.socket, connect, host_of_address)


@pytest.fixture(autouse=True)
def no_network() -> Iterator[list[str]]:
    """What has been tried; a thread of the framework's in the background counts too."""
    yield reached
    tried, reached[:] = reached[:], []
    assert not tried


@pytest.fixture(autouse=True)
def loop_of_the_thread() -> Iterator[None]:
    """For `run_sync` of frameworks, which would make one and leave it open."""
    loop = asyncio.new_event_loop()
    asyncio.set_event_loop(loop)
    yield
    asyncio.set_event_loop(None)
    loop.close()


def pytest_collection_modifyitems(items: list[Any]) -> None:
    for item in items:
        if "frameworks" in item.path.parts:
            item.add_marker(pytest.mark.filterwarnings(THEIRS), append=False)
