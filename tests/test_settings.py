"""The environment configures the default coordinator, with no code (F3)."""

from __future__ import annotations

import logging
import os
import re
import threading
from pathlib import Path
from typing import Any

import pytest
from redis_server import RedisServer
from support import join_all, run_script, start_all

from agentdiff import (
    CoordinationTimeoutError,
    Coordinator,
    StoreError,
    configure,
    default_coordinator,
    emit,
    lock,
    when,
)
from agentdiff.default import reset_default
from agentdiff.settings import from_environment, make_coordinator, store_url
from agentdiff.stores import open_store

WORKERS = "AGENTDIFF_COORDINATION_WORKERS"
LOCK_TIMEOUT = "AGENTDIFF_COORDINATION_LOCK_TIMEOUT"
LOG_LEVEL = "AGENTDIFF_COORDINATION_LOG_LEVEL"


def var(name: str) -> str:
    return "AGENTDIFF_COORDINATION_" + name


BACKEND, DISABLE, DATA_DIR = var("PERSISTENCE_BACKEND"), var("DISABLE_PERSISTENCE"), var("DATA_DIR")
URL, PASSWORD, DB, KEYS = var("REDIS_URL"), var("REDIS_PASSWORD"), var("REDIS_DB"), var("REDIS_PREFIX")


@pytest.fixture
def first_use(monkeypatch: pytest.MonkeyPatch) -> Any:
    """The default coordinator has not been made, and no variable is set."""
    for name in [name for name in os.environ if name.startswith(var(""))]:
        monkeypatch.delenv(name)
    reset_default()
    level = logging.getLogger("agentdiff").level
    yield monkeypatch
    logging.getLogger("agentdiff").setLevel(level)
    for name in [name for name in os.environ if name.startswith(var(""))]:
        monkeypatch.delenv(name)
    default_coordinator().close()
    reset_default()


@pytest.mark.parametrize(
    ("variables", "settings"),
    [
        ({}, {}),
        ({"HOME": "/", "WORKERS": "3"}, {}),
        ({WORKERS: "3"}, {"workers": 3}),
        ({WORKERS: " 3 "}, {"workers": 3}),
        ({WORKERS: ""}, {}),
        ({WORKERS: "  "}, {}),
        ({LOCK_TIMEOUT: "30"}, {"lock_timeout": 30.0}),
        ({LOCK_TIMEOUT: "0.5"}, {"lock_timeout": 0.5}),
        ({LOCK_TIMEOUT: "0"}, {"lock_timeout": 0.0}),
        ({LOCK_TIMEOUT: "None"}, {"lock_timeout": None}),
        ({LOG_LEVEL: "debug"}, {"log_level": "DEBUG"}),
        ({LOG_LEVEL: " WARNING "}, {"log_level": "WARNING"}),
        (
            {var("MAX_PENDING"): "7", var("MAX_DEPTH"): "8", var("MAX_JOINS"): "9"},
            {"max_pending": 7, "max_depth": 8, "max_joins": 9},
        ),
        (
            {var("SLOW_AFTER"): "none", var("EXIT_TIMEOUT"): "1", var("FLUSH_TIMEOUT"): "0.5"},
            {"slow_after": None, "exit_timeout": 1.0, "flush_timeout": 0.5},
        ),
        (
            {var("REDACT"): " password, api_key ,", var("MAX_PAYLOAD"): "256"},
            {"redact": ("password", "api_key"), "max_payload": 256},
        ),
        (
            {BACKEND: "File", DISABLE: "NO", DATA_DIR: "/a b"},
            {"backend": "file", "disabled": False, "data_dir": "/a b"},
        ),
        ({DISABLE: "1"}, {"disabled": True}),
        (
            {URL: " rediss://h:1/2 ", PASSWORD: " p ", DB: "0", KEYS: "app:"},
            {"redis_url": "rediss://h:1/2", "redis_password": " p ", "redis_db": 0, "redis_prefix": "app:"},
        ),
        (
            {WORKERS: "2", LOCK_TIMEOUT: "1", LOG_LEVEL: "ERROR"},
            {"workers": 2, "lock_timeout": 1, "log_level": "ERROR"},
        ),
    ],
)
def test_F3_variables_become_settings(variables: dict[str, str], settings: dict[str, Any]) -> None:
    """Each variable is read as what it means; one that is empty or unknown says nothing."""
    assert from_environment(variables) == settings


WRONG = [
    (WORKERS, "0", "whole number"),
    (WORKERS, "-1", "at least 1"),
    (WORKERS, "2.5", "whole number"),
    (WORKERS, "many", "whole number"),
    (LOCK_TIMEOUT, "-1", "seconds"),
    (LOCK_TIMEOUT, "nan", "seconds"),
    (LOCK_TIMEOUT, "soon", "seconds"),
    (LOG_LEVEL, "LOUD", "DEBUG"),
    (LOG_LEVEL, "10", "CRITICAL"),
    (var("MAX_PENDING"), "0", "at least 1"),
    (var("MAX_DEPTH"), "x", "whole number"),
    (var("MAX_JOINS"), "-3", "at least 1"),
    (var("SLOW_AFTER"), "-1", "none"),
    (var("EXIT_TIMEOUT"), "nan", "seconds"),
    (var("FLUSH_TIMEOUT"), "soon", "seconds"),
    (var("MAX_PAYLOAD"), "255", "at least 256"),
    (BACKEND, "kafka", "none or file or redis"),
    (DISABLE, "perhaps", "true or 1 or yes or on or false"),
    (URL, "localhost:6379", "redis:// or rediss:// or unix://"),
    (URL, "redis://localhost:port", "redis:// or rediss:// or unix://"),
    (DB, "-1", "at least 0"),
    (DB, "first", "whole number"),
]


@pytest.mark.parametrize(("variable", "value", "allowed"), WRONG)
def test_F3_a_wrong_value_is_refused_on_first_use(first_use: Any, variable: str, value: str, allowed: str) -> None:
    """The error names variable, value and what is allowed; each use refuses until it is right; then all is well."""
    first_use.setenv(variable, value)
    for use in (default_coordinator, lambda: emit("e"), lambda: lock("x"), lambda: when("e", print)):
        with pytest.raises(ValueError, match=re.escape(variable)) as caught:
            use()
        assert repr(value) in str(caught.value)
        assert allowed in str(caught.value)
        assert caught.value.__suppress_context__
    first_use.delenv(variable)
    assert isinstance(default_coordinator(), Coordinator)


def test_F3_import_succeeds_with_a_wrong_value() -> None:
    """A wrong variable is no reason for an import to fail: it is refused where it is used."""
    result = run_script("import agentdiff; print('imported')", **{WORKERS: "many"})
    assert (result.stdout, result.returncode) == ("imported\n", 0)


def test_F3_workers_bounds_the_handlers_at_once(first_use: Any) -> None:
    """With one worker, handlers of different lanes don't overlap."""
    first_use.setenv(WORKERS, "1")
    inside: list[int] = []
    seen: list[int] = []

    @when("e")
    def handle(data: Any) -> None:
        inside.append(1)
        threading.Event().wait(0.002)
        seen.append(len(inside))
        inside.pop()

    join_all(start_all(*[lambda: emit("e")] * 6))
    default_coordinator().join(20)
    assert seen == [1] * 6


def test_F3_lock_timeout_is_the_default_of_all_locks(first_use: Any) -> None:
    """`LOCK_TIMEOUT=0` lets nobody wait who names no timeout of his own."""
    first_use.setenv(LOCK_TIMEOUT, "0")
    errors: list[Any] = []

    def attempt() -> None:
        try:
            with lock("x"):
                pass
        except CoordinationTimeoutError as error:
            errors.append(error)

    with lock("x"):
        join_all(start_all(attempt))
    assert [error.timeout for error in errors] == [0]


def test_F3_log_level_is_set_on_first_use_and_only_if_told(first_use: Any) -> None:
    """The level of the logger `agentdiff` is as the variable says; without it, it is left alone."""
    logger = logging.getLogger("agentdiff")
    logger.setLevel(17)
    default_coordinator().close()
    assert logger.level == 17
    reset_default()
    first_use.setenv(LOG_LEVEL, "error")
    default_coordinator()
    assert logger.level == logging.ERROR
    assert logger.handlers == []


def test_F3_the_environment_is_read_when_it_is_needed(first_use: Any) -> None:
    """A variable set after the import and before the first use counts; coordinators that users make ignore it."""
    first_use.setenv(LOCK_TIMEOUT, "0")
    with Coordinator() as own, make_coordinator() as made:
        for coord, waits in ((own, True), (made, False)):
            got: list[bool] = []
            coord.lock("x").acquire()
            threads = start_all(lambda coord=coord, got=got: got.append(coord.lock("x").acquire()))
            if waits:
                while not coord.snapshot().locks[0].waiters:
                    pass
            else:
                join_all(threads)
            coord.lock("x").release()
            join_all(threads)
            assert got == [waits]


@pytest.mark.parametrize("url", ["http://:hidden@host:1/0", "redis:/:hidden@host", "redis://:hidden/a@host"])
def test_F3_a_refused_url_shows_no_password(url: str) -> None:
    """The variable is named, and of its value what is before the password."""
    with pytest.raises(ValueError, match="REDIS_URL") as caught:
        from_environment({URL: url})
    assert "hidden" not in str(caught.value)


@pytest.mark.parametrize(
    ("settings", "url"),
    [
        ({}, None),
        ({"data_dir": "/x", "redis_url": "redis://h"}, None),
        ({"backend": "none"}, None),
        ({"backend": "redis", "disabled": True}, None),
        ({"backend": "redis"}, "redis://localhost:6379"),
        ({"backend": "redis", "redis_url": "redis://h/1", "redis_db": 0}, "redis://h/1?db=0"),
        (
            {"backend": "redis", "redis_url": "unix:///s?db=1", "redis_password": "p&/:@ #", "redis_prefix": "a:"},
            "unix:///s?db=1&password=p%26%2F%3A%40+%23&prefix=a%3A",
        ),
    ],
)
def test_F3_settings_of_stores_become_a_url(settings: dict[str, Any], url: Any) -> None:
    """No store is the default, and may be forced; passwords may hold any character."""
    assert store_url(**settings) == url


def test_F3_the_file_backend_keeps_events_in_the_data_directory(first_use: Any, tmp_path: Path) -> None:
    """SQLite, made with its folder; in the home directory if none is named."""
    first_use.setenv("HOME", str(tmp_path))
    first_use.setenv("USERPROFILE", str(tmp_path))
    first_use.setenv(BACKEND, "file")
    for folder in (tmp_path / ".agentdiff" / "coordination", tmp_path / "a" / "b"):
        emit("e", str(folder))
        default_coordinator().close()
        with open_store(f"sqlite:///{folder / 'events.db'}") as store:
            (event,) = store.read()
        assert event.data == str(folder)
        reset_default()
        first_use.setenv(DATA_DIR, str(tmp_path / "a" / "b"))


def test_F3_a_data_directory_that_cannot_be_is_refused_on_first_use(first_use: Any, tmp_path: Path) -> None:
    """The error names the file; where persistence is disabled, nobody looks."""
    (tmp_path / "file").write_text("")
    first_use.setenv(BACKEND, "file")
    first_use.setenv(DATA_DIR, str(tmp_path / "file"))
    with pytest.raises(StoreError, match=r"events\.db"):
        emit("e")
    first_use.setenv(DISABLE, "true")
    emit("e").wait(10)


def test_F3_the_redis_backend_takes_url_password_database_and_prefix(first_use: Any) -> None:
    """As the published library's programs have set them."""
    RedisStore = pytest.importorskip("agentdiff.stores.redis").RedisStore
    with RedisServer("--requirepass", "p@ss/:?") as server:
        first_use.setenv(BACKEND, "redis")
        first_use.setenv(URL, f"redis://127.0.0.1:{server.port}")
        first_use.setenv(PASSWORD, "p@ss/:?")
        first_use.setenv(DB, "2")
        first_use.setenv(KEYS, "app:")
        emit("e", 1)
        default_coordinator().flush(10)
        store = RedisStore(f"redis://127.0.0.1:{server.port}/2?prefix=app:", password="p@ss/:?")
        with store:
            assert [event.data for event in store.read()] == [1]
        default_coordinator().close()
        reset_default()
        first_use.delenv(BACKEND)


def test_F3_configure_in_code_wins(first_use: Any, tmp_path: Path) -> None:
    """Before the first use, what the environment says isn't even tried; after it, the store changes in place."""
    (tmp_path / "file").write_text("")
    first_use.setenv(BACKEND, "file")
    first_use.setenv(DATA_DIR, str(tmp_path / "file"))
    first_use.setenv(WORKERS, "3")
    seen: list[Any] = []
    configure(store=None, lock_timeout=0)
    when("e")(seen.append)
    emit("e", 1)
    memory = open_store("memory://")
    configure(store=memory)
    emit("e", 2)
    configure(store=None)
    emit("e", 3).wait(10)
    default_coordinator().join(10)
    assert seen == [1, 2, 3]
    assert [event.data for event in memory.read()] == [2]
