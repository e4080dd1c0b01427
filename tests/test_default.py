"""The one department of global state: the default coordinator and the facades on it (F1, F2, F3)."""

from __future__ import annotations

import threading
from typing import Any

import pytest
from support import eventually, join_all, run_script, start_all, yielding_at_opcodes

import agentdiff
from agentdiff import ClosedError, Coordinator, configure, coordinate, default, default_coordinator, emit, lock, when
from agentdiff.default import reset_default


def test_F1_facades_act_on_one_default(fresh_default: Coordinator) -> None:
    """What one facade does, the others and `default_coordinator()` see."""
    heard: list[Any] = []
    assert default_coordinator() is fresh_default is default_coordinator()

    @when("agent_complete")
    def handle(data: Any) -> None:
        heard.append(data["result"])

    @coordinate("agent", "x", timeout=10)
    def agent() -> bool:
        assert [held.name for held in fresh_default.snapshot().locks] == ["x"]
        return lock("x").locked() and fresh_default.lock("x").locked()

    assert agent() is True
    assert emit("mine", 1, sender="me").wait(10).event.sender == "me"
    fresh_default.join(10)
    assert heard == [True]
    subscription = when("mine", heard.append)
    emit("mine", 2).wait(10)
    subscription.cancel()
    assert heard == [True, 2]
    assert lock("x") is lock("x", timeout=..., lend=True) is fresh_default.lock("x")
    with lock("a", "b") as slots:
        assert [slot.name for slot in slots] == ["a", "b"]


def test_F1_facades_take_what_the_methods_take(fresh_default: Coordinator) -> None:
    """Each facade has the parameters of the method that it stands for, with the same defaults."""
    import inspect

    for facade, method in (
        (coordinate, Coordinator.coordinate),
        (when, Coordinator.on),
        (emit, Coordinator.emit),
        (lock, Coordinator.lock),
        (configure, Coordinator.configure),
    ):
        ours = [(p.name, p.kind, p.default) for p in inspect.signature(facade).parameters.values()]
        theirs = [(p.name, p.kind, p.default) for p in inspect.signature(method).parameters.values()][1:]
        assert ours == theirs, facade


def test_F1_first_use_is_thread_safe(monkeypatch: pytest.MonkeyPatch) -> None:
    """However many threads come first, one coordinator is made, and all get it."""
    make = default.make_coordinator
    made: list[Coordinator] = []

    def slowly() -> Coordinator:
        made.append(make())
        threading.Event().wait(0.01)
        return made[-1]

    monkeypatch.setattr(default, "make_coordinator", slowly)
    reset_default()
    barrier = threading.Barrier(16)
    got: list[Coordinator] = []

    def use() -> None:
        barrier.wait(10)
        got.append(default_coordinator())

    with yielding_at_opcodes():
        join_all(start_all(*[use] * 16))
    assert len(got) == 16
    assert {id(one) for one in got} == {id(made[0])}
    assert len(made) == 1
    made[0].close()
    reset_default()


def test_F1_reset_gives_a_new_default(fresh_default: Coordinator) -> None:
    """After a reset, which is for tests, the facades act on another coordinator."""
    lock("x").acquire()
    reset_default()
    assert default_coordinator() is not fresh_default
    assert not lock("x").locked()
    fresh_default.lock("x").release()
    fresh_default.close()


def test_F1_after_close_the_facades_refuse(fresh_default: Coordinator) -> None:
    """A closed default says so, and is not made anew behind the user's back."""
    fresh_default.close()
    for use in (lambda: emit("e"), lambda: lock("x"), lambda: when("e", print)):
        with pytest.raises(ClosedError):
            use()
    assert default_coordinator() is fresh_default


def test_F1_import_makes_no_coordinator() -> None:
    """The default is made by the first use, not by the import."""
    result = run_script(
        """
        from agentdiff import default
        assert default._default is None
        first = default.default_coordinator()
        assert default._default is first
        """
    )
    assert result.returncode == 0, result.stderr


def test_F3_configure_in_place_keeps_handlers(fresh_default: Coordinator) -> None:
    """Handlers registered, agents decorated and locks held before `configure` go on after it."""
    heard: list[Any] = []
    when("e", heard.append)
    agent = coordinate("agent", "x")(lambda: lock("x").locked())
    with lock("y"):
        configure(workers=2, lock_timeout=5, max_pending=10, exit_timeout=1)
        assert default_coordinator() is fresh_default
        assert lock("y").locked()
    assert agent() is True
    emit("e", 1).wait(10)
    assert heard == [1]


def test_F3_configure_takes_effect(fresh_default: Coordinator) -> None:
    """New settings count for what comes after, and what is left out stays as it was."""
    gate = threading.Event()
    when("e", lambda data: gate.wait(20))
    configure(max_pending=2)
    configure(lock_timeout=0)
    try:
        emit("e")
        emit("e")
        with pytest.raises(agentdiff.QueueFullError) as caught:
            emit("e")
        assert (caught.value.pending, caught.value.max_pending) == (2, 2)
        got: list[bool] = []
        with lock("x"):
            join_all(start_all(lambda: got.append(lock("x").acquire())))
        assert got == [False]
        configure(max_pending=3)
        emit("e")
    finally:
        gate.set()


def test_F3_more_workers_take_effect_in_place(fresh_default: Coordinator) -> None:
    """With a higher `workers`, more handlers run at once than before."""
    configure(workers=1)
    inside: list[int] = []
    gate = threading.Event()

    @when("e")
    def handle(data: Any) -> None:
        inside.append(1)
        gate.wait(20)

    try:
        join_all(start_all(lambda: emit("e"), lambda: emit("e")))
        eventually(lambda: inside)
        configure(workers=3)
        join_all(start_all(lambda: emit("e")))
        eventually(lambda: len(inside) > 1)
    finally:
        gate.set()


@pytest.mark.parametrize(
    ("wrong", "kind"),
    [
        ({"workers": 0}, ValueError),
        ({"workers": True}, TypeError),
        ({"workers": 2.0}, TypeError),
        ({"lock_timeout": -1}, ValueError),
        ({"lock_timeout": "1"}, TypeError),
        ({"max_pending": 0}, ValueError),
        ({"exit_timeout": float("nan")}, ValueError),
        ({"nonsense": 1}, TypeError),
    ],
)
def test_F3_a_wrong_setting_changes_nothing(fresh_default: Coordinator, wrong: dict[str, Any], kind: Any) -> None:
    """`configure` checks all before it changes any."""
    fine: dict[str, Any] = {"workers": 3, "lock_timeout": 0, "max_pending": 1, "exit_timeout": 1}
    with pytest.raises(kind):
        configure(**{**fine, **wrong})
    gate = threading.Event()
    when("e", lambda data: gate.wait(20))
    emit("e")
    emit("e")  # max_pending is what it was
    gate.set()
    got: list[bool] = []
    lock("x").acquire()
    threads = start_all(lambda: got.append(lock("x").acquire()))
    eventually(lambda: fresh_default.snapshot().locks[0].waiters)  # and so is lock_timeout
    lock("x").release()
    join_all(threads)


IMPORTS = ["agentdiff", "agentdiff_coordination"]


@pytest.mark.parametrize("module", IMPORTS)
def test_F2_import_touches_nothing(module: str) -> None:
    """No thread, no file written, none read but modules, no logging set up, nothing printed, with no home directory."""
    result = run_script(
        f"""
        import logging, os, sys, threading

        touched = []

        def audit(event, args):
            if event == "open":
                path, mode, flags = args
                writes = isinstance(flags, int) and flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_APPEND)
                if writes or (isinstance(mode, str) and set(mode) & set("wax+")):
                    touched.append(args)
                elif isinstance(path, str) and not path.endswith((".py", ".pyc", ".so", ".pyi", ".dylib", ".pyd")):
                    touched.append(args)
            elif event in ("os.mkdir", "os.remove", "os.rename", "socket.connect", "subprocess.Popen", "os.fork"):
                touched.append((event, args))

        before = set(logging.root.manager.loggerDict)
        sys.addaudithook(audit)
        import {module}
        assert not touched, touched
        assert threading.active_count() == 1, threading.enumerate()
        assert not {{"redis", "sqlite3", "_sqlite3"}} & set(sys.modules)
        assert not [name for name in sys.modules if name.startswith(("redis.", "agentdiff.stores"))]
        assert logging.root.handlers == [] and logging.root.level == logging.WARNING
        logger = logging.getLogger("agentdiff")
        assert (logger.handlers, logger.level, logger.propagate) == ([], logging.NOTSET, True)
        """,
        HOME="/dev/null/nobody",
        USERPROFILE="/dev/null/nobody",
        XDG_DATA_HOME="/dev/null/nobody",
        TMPDIR="/dev/null/nobody",
        PYTHONDONTWRITEBYTECODE="1",
    )
    assert (result.stdout, result.stderr, result.returncode) == ("", "", 0)


@pytest.mark.parametrize("module", IMPORTS)
def test_F2_use_touches_no_file_either(module: str) -> None:
    """Locks, agents and events work with no home directory, write no file and print nothing."""
    result = run_script(
        f"""
        import os, sys

        def audit(event, args):
            if event == "open" and isinstance(args[2], int) and args[2] & (os.O_WRONLY | os.O_RDWR | os.O_CREAT):
                raise AssertionError(args)

        sys.addaudithook(audit)
        import {module} as lib

        heard = []

        @lib.coordinate("agent", "x")
        def agent(x):
            return x

        @lib.when("agent_complete")
        def handle(data):
            heard.append(data["result"])

        agent(3)
        from agentdiff import default_coordinator
        default_coordinator().join(20)
        assert heard == [3]
        assert not {{"redis", "sqlite3"}} & set(sys.modules)
        """,
        HOME="/dev/null/nobody",
        PYTHONDONTWRITEBYTECODE="1",
    )
    assert (result.stdout, result.stderr, result.returncode) == ("", "", 0)
