from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any, Callable

import pytest
from redis_server import RedisServer

from agentdiff.stores import Store, open_store
from agentdiff.stores.memory import MemoryStore


def memory(request: Any) -> Store:
    return MemoryStore()


def sqlite(request: Any) -> Store:
    folder: Path = request.getfixturevalue("tmp_path")
    return open_store(f"sqlite:///{folder}/events.db")


def redis(request: Any) -> Store:
    server: RedisServer = request.getfixturevalue("redis_server")
    return open_store(server.url)


STORES: dict[str, Callable[[Any], Store]] = {"memory": memory, "redis": redis, "sqlite": sqlite}


@pytest.fixture(params=sorted(STORES))
def store(request: Any) -> Iterator[Store]:
    """A store of each kind, empty."""
    with STORES[request.param](request) as made:
        yield made
