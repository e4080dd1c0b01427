"""The environment configures the default coordinator, with no code (F3)."""

from __future__ import annotations

import logging
import re
import threading
from typing import Any

import pytest
from support import join_all, run_script, start_all

from agentdiff import CoordinationTimeoutError, Coordinator, default_coordinator, emit, lock, when
from agentdiff.default import reset_default
from agentdiff.settings import from_environment, make_coordinator

WORKERS = "AGENTDIFF_COORDINATION_WORKERS"
LOCK_TIMEOUT = "AGENTDIFF_COORDINATION_LOCK_TIMEOUT"
LOG_LEVEL = "AGENTDIFF_COORDINATION_LOG_LEVEL"


@pytest.fixture
def first_use(monkeypatch: pytest.MonkeyPatch) -> Any:
    """The default coordinator has not been made, and no variable is set."""
    for name in (WORKERS, LOCK_TIMEOUT, LOG_LEVEL):
        monkeypatch.delenv(name, raising=False)
    reset_default()
    level = logging.getLogger("agentdiff").level
    yield monkeypatch
    logging.getLogger("agentdiff").setLevel(level)
    for name in (WORKERS, LOCK_TIMEOUT, LOG_LEVEL):
        monkeypatch.delenv(name, raising=False)
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
