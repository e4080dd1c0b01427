"""A coordinator puts the parts together: isolation (L1), its arguments, its state (L11), its end (E7)."""

from __future__ import annotations

import asyncio
import gc
import inspect
import threading
import weakref
from contextvars import Context
from typing import Any

import attrs
import pytest
from support import eventually, join_all, run_script, start_all

from agentdiff import (
    ClosedError,
    CoordinationTimeoutError,
    Coordinator,
    DeadlockError,
    QueueFullError,
    Snapshot,
)


def test_L1_two_coordinators_share_no_lock() -> None:
    """The same name in another coordinator is another lock, for blocks and agents alike."""
    with Coordinator() as one, Coordinator() as other:
        got: list[bool] = []

        def attempt() -> None:
            got.append(other.coordinate("agent", "x", timeout=0)(lambda: one.lock("x").locked())())
            with pytest.raises(CoordinationTimeoutError):
                one.coordinate("agent", "x", timeout=0)(lambda: None)()

        with one.lock("x"):
            assert not other.lock("x").locked()
            join_all(start_all(attempt))
            assert [lock.name for lock in one.snapshot().locks] == ["x"]
            assert other.snapshot().locks == ()
        assert got == [True]

        @one.coordinate("outer", "x", timeout=5)
        @other.coordinate("inner", "x", timeout=5)
        def both() -> list[int]:
            return [len(coord.snapshot().locks) for coord in (one, other)]

        assert both() == [1, 1]


def test_L1_two_coordinators_share_no_event() -> None:
    """Handlers hear their own coordinator only, by name and by pattern; runs and causes stay apart too."""
    with Coordinator() as one, Coordinator() as other:
        heard: list[Any] = []
        one.on("*", lambda event: heard.append(("one", event.name)), pass_event=True)
        other.on("e", lambda data: heard.append(("other", data)))
        one.emit("e", 1)
        one.join(10)
        assert heard == [("one", "e")]
        with one.run("report"):
            assert one.emit("x").event.run_id == "report"
            assert other.emit("x").event.run_id is None
            with other.run("mine"):
                assert other.emit("x").event.run_id == "mine"
                assert one.emit("x").event.run_id == "report"

        @other.coordinate("agent")
        def agent() -> Any:
            return one.emit("x").event.parent_id

        other.on("agent_*", lambda data: None)
        assert agent() is None


def test_L1_closing_one_leaves_the_other() -> None:
    """A coordinator that is closed takes nothing along."""
    with Coordinator() as one:
        heard: list[Any] = []
        one.on("e", heard.append)
        with Coordinator() as other:
            other.on("e", heard.append)
        one.emit("e", 1).wait(10)
        assert heard == [1]


@pytest.mark.parametrize(
    ("wrong", "kind"),
    [
        ({"name": 5}, TypeError),
        ({"name": None}, TypeError),
        *[({key: value}, TypeError) for key in ("workers", "max_pending") for value in (True, 1.5, "3", None)],
        *[({key: value}, ValueError) for key in ("workers", "max_pending") for value in (0, -1)],
        *[({key: value}, TypeError) for key in ("lock_timeout", "exit_timeout", "slow_after") for value in (True, "3")],
        *[
            ({key: value}, ValueError)
            for key in ("lock_timeout", "exit_timeout", "slow_after")
            for value in (-1, float("nan"))
        ],
        ({"nonsense": 1}, TypeError),
    ],
    ids=str,
)
def test_L4_bad_arguments_are_refused(wrong: dict[str, Any], kind: Any) -> None:
    """What makes no sense is refused, and the message names the argument or the value."""
    (key, value), *_ = wrong.items()
    with pytest.raises(kind) as caught:
        Coordinator(**wrong)
    assert key in str(caught.value) or repr(value) in str(caught.value)


def test_E7_arguments_are_keywords_only() -> None:
    """Nothing is told apart by its position."""
    with pytest.raises(TypeError):
        Coordinator("name")  # type: ignore[misc]


def test_E7_repr_says_name_and_state() -> None:
    """One sees which coordinator it is, and whether it is closed."""
    coord = Coordinator(name="mine")
    assert repr(coord) == "<Coordinator 'mine'>"
    coord.close()
    assert repr(coord) == "<Coordinator 'mine' closed>"


def test_E7_threads_carry_the_coordinators_name() -> None:
    """A thread of ours can be told from others by its name."""
    with Coordinator(name="mine") as coord:
        sub = coord.on("e", lambda data: threading.current_thread().name)
        (name,) = coord.emit("e").wait(10).results
        assert name.startswith("mine-")
        sub.cancel()


def test_E7_after_close_all_is_refused() -> None:
    """A closed coordinator gives no lock, takes no handler, no event and no run; closing and joining again is fine."""
    coord = Coordinator()
    coord.lock("kept")
    coord.close()
    uses = {
        "lock": lambda: coord.lock("x"),
        "kept lock": lambda: coord.lock("kept"),
        "locks": lambda: coord.lock("x", "y"),
        "on": lambda: coord.on("e", print),
        "on as a decorator": lambda: coord.on("e")(print),
        "emit": lambda: coord.emit("e"),
        "run": lambda: coord.run("r").__enter__(),
    }
    for use in uses.values():
        with pytest.raises(ClosedError):
            use()
    coord.close()
    coord.join(1)
    asyncio.run(coord.close_async())
    assert (coord.snapshot().locks, coord.snapshot().pending) == ((), 0)


def test_E7_handles_and_holds_survive_close() -> None:
    """A lock that is held when the coordinator is closed can still be released."""
    coord = Coordinator()
    handle = coord.lock("x")
    with handle:
        coord.close()
        assert handle.locked()
    assert not handle.locked()


def test_E7_with_closes_and_joins() -> None:
    """At the end of the block every event is handled, cascades too; an `Exception` changes nothing about that."""
    heard: list[int] = []
    coord = Coordinator()

    @coord.on("e")
    def slowly(n: int) -> None:
        threading.Event().wait(0.005)
        heard.append(n)
        if n:
            coord.emit("e", n - 1)

    coord.emit("e", 5)
    with pytest.raises(ValueError, match="mine"), coord:
        raise ValueError("mine")
    assert heard == [5, 4, 3, 2, 1, 0]
    with pytest.raises(ClosedError):
        coord.emit("e")


def test_E7_an_interrupt_leaves_without_joining() -> None:
    """A block left by Ctrl-C or a cancellation doesn't wait for handlers, and refuses from then on."""
    gate = threading.Event()
    try:
        coord = Coordinator()
        coord.on("e", lambda data: gate.wait(20))
        coord.emit("e")
        with pytest.raises(KeyboardInterrupt), coord:
            raise KeyboardInterrupt
        assert not gate.is_set()
        with pytest.raises(ClosedError):
            coord.emit("e")
    finally:
        gate.set()


def test_E7_async_with_closes_and_the_loop_goes_on() -> None:
    """`async with` waits for the handlers on the loop, without stopping it."""
    gate = threading.Event()
    heard: list[Any] = []

    async def main() -> None:
        async with Coordinator() as coord:
            coord.on("e", lambda data: heard.append(gate.wait(20)))
            coord.emit("e")
            asyncio.get_running_loop().call_soon(gate.set)
        with pytest.raises(ClosedError):
            coord.emit("e")

    asyncio.run(asyncio.wait_for(main(), 20))
    assert heard == [True]


def test_E7_join_times_out_and_can_be_repeated(coord: Coordinator) -> None:
    """`join(timeout)` raises when the time is over, and says how much is left; nothing is lost."""
    gate = threading.Event()
    coord.on("e", lambda data: gate.wait(20))
    coord.emit("e")
    with pytest.raises(CoordinationTimeoutError, match="1 event"):
        coord.join(0)
    with pytest.raises(CoordinationTimeoutError, match="1 event"):
        asyncio.run(coord.join_async(0))
    gate.set()
    coord.join(20)
    for wrong, kind in ((-1, ValueError), ("3", TypeError), (True, TypeError)):
        with pytest.raises(kind):
            coord.join(wrong)  # type: ignore[arg-type]


def test_E7_join_in_a_handler_is_refused(coord: Coordinator) -> None:
    """A handler that would wait for itself is told so."""
    coord.on("e", lambda data: coord.join(10))
    (error,) = coord.emit("e").wait(10).errors
    assert isinstance(error, DeadlockError)


def test_L11_a_snapshot_is_frozen_and_an_idle_one_is_empty(coord: Coordinator) -> None:
    """Who holds what since when and who waits is shown as it was; an idle coordinator shows nothing."""
    assert coord.snapshot().locks == ()
    assert coord.snapshot().pending == 0
    with coord.lock("x"):
        threads = start_all(lambda: coord.lock("x").acquire(timeout=20) and coord.lock("x").release())
        eventually(lambda: coord.snapshot().locks[0].waiters)
        seen = coord.snapshot()
    join_all(threads)
    assert isinstance(seen, Snapshot)
    (lock,) = seen.locks
    assert (lock.name, len(lock.holders), len(lock.waiters)) == ("x", 1, 1)
    assert lock.holders[0].held_for >= lock.waiters[0].waiting_for >= 0
    for frozen in (seen, seen.counts, lock, lock.holders[0], lock.waiters[0]):
        name = attrs.fields(type(frozen))[0].name
        with pytest.raises(attrs.exceptions.FrozenInstanceError):
            setattr(frozen, name, None)
    assert coord.snapshot().locks == ()


def test_L11_a_snapshot_counts_what_went_wrong_and_what_is_pending(coord: Coordinator) -> None:
    """Failed handlers and pending events are numbers in the snapshot."""
    gate = threading.Event()
    coord.on("bad", lambda data: 1 / 0)
    coord.emit("bad").wait(10)
    coord.on("e", lambda data: gate.wait(20))
    coord.emit("e")
    coord.emit("e")
    assert coord.snapshot().counts.handlers_failed == 1
    assert coord.snapshot().pending == 2
    gate.set()
    coord.join(20)
    assert coord.snapshot().pending == 0


def test_L11_a_collection_amid_a_snapshot_hangs_nothing() -> None:
    """Wherever in a snapshot the garbage collector strikes, and whatever it finds, the snapshot comes (gh-106883)."""
    result = run_script(
        """
        import gc, threading
        from agentdiff import Coordinator

        class Ring:
            def __init__(self):
                self.me, self.local = self, threading.local()

        coord = Coordinator()
        with coord.lock("x"):
            gc.disable()
            for strike in range(1, 120):
                gc.collect()
                Ring()
                gc.set_threshold(strike)
                gc.enable()
                coord.snapshot()
                assert gc.isenabled()
                gc.disable()
                coord.snapshot()
                assert not gc.isenabled()
        """,
        timeout=20,
    )
    assert result.returncode == 0, result.stderr


def test_L11_explain_is_plain_words(coord: Coordinator) -> None:
    """`explain()` names who waits for whom; with nothing to say it says so."""
    calm = coord.explain()
    assert "Nobody waits" in calm
    with coord.lock("customer"):
        threads = start_all(lambda: coord.lock("customer").acquire(timeout=20) and coord.lock("customer").release())
        eventually(lambda: coord.snapshot().locks[0].waiters)
        told = coord.explain()
    join_all(threads)
    assert "'customer'" in told
    assert threads[0].name in told
    assert "MainThread" in told
    assert coord.explain() == calm


def test_L10_handles_are_shared_and_names_checked(coord: Coordinator) -> None:
    """The same name gives an equivalent handle at any time; what is no non-empty string is refused."""
    assert coord.lock("x") is coord.lock("x")
    for wrong, kind in (("", ValueError), (3, TypeError), (None, TypeError), ([], TypeError), (b"x", TypeError)):
        with pytest.raises(kind):
            coord.lock(wrong)  # type: ignore[call-overload]
        with pytest.raises(kind):
            coord.lock("x", wrong)
        with pytest.raises(kind):
            coord.emit(wrong)  # type: ignore[arg-type]
        with pytest.raises(kind):
            coord.on(wrong, print)  # type: ignore[call-overload]
    for n in range(3000):
        coord.lock(f"name {n}")
    assert coord.lock("x").acquire(timeout=0)
    coord.lock("x").release()


def test_L10_lock_says_what_it_takes_and_obeys_a_subclass() -> None:
    """Most calls of `lock` go a short way, which neither hides what it takes nor passes over who overrides it."""

    class Counting(Coordinator):
        asked = 0

        def lock(self, *names: Any, **how: Any) -> Any:
            self.asked += 1
            return super().lock(*names, **how)

    with Coordinator() as coord:
        assert [*inspect.signature(coord.lock).parameters] == ["name", "more", "timeout", "lend", "tokens"]
        assert coord.lock.__doc__ == Coordinator.lock.__doc__
        with pytest.raises(TypeError, match="time_out"):
            coord.lock("x", time_out=3)  # type: ignore[call-overload]
    with Counting() as counting:
        for _ in range(2):
            with counting.lock("x"):
                pass
        assert counting.asked == 2
        assert counting.lock("x") is counting.lock("x", timeout=..., lend=True, tokens=0)
        assert counting.lock("x") is not counting.lock("x", timeout=1)


def test_L9_a_coordinator_goes_with_its_last_reference() -> None:
    """Nothing in it refers to it, so nobody waits for a collection; `lock` kept alone goes on."""
    coord = Coordinator()
    with coord.lock("x"):
        coord.emit("y").wait(10)
    lock, there = coord.lock, weakref.ref(coord)
    coord.close()
    gc.disable()
    try:
        del coord
        assert there() is None
    finally:
        gc.enable()
    with pytest.raises(ClosedError, match="closed"):
        lock("x")


def test_E5_max_pending_bounds_what_is_queued() -> None:
    """Past `max_pending`, which includes what is being delivered, `emit` raises; then there is room again."""
    gate = threading.Event()
    with Coordinator(max_pending=2) as coord:
        coord.on("e", lambda data: gate.wait(20))
        coord.emit("e")
        coord.emit("e")
        with pytest.raises(QueueFullError) as caught:
            coord.emit("e")
        assert (caught.value.name, caught.value.pending, caught.value.max_pending) == ("e", 2, 2)
        gate.set()
        coord.join(20)
        coord.emit("e").wait(20)


def test_L2_carry_takes_run_and_holds_along(coord: Coordinator) -> None:
    """`carry` brings the caller's run and its locks, for borrowing, where the context is lost; the name stays."""

    def tool(x: int) -> Any:
        """Use it."""
        got = coord.lock("x").acquire(timeout=0)
        if got:
            coord.lock("x").release()
        return x, got, coord.emit("e").event.run_id

    seen: list[Any] = []
    with coord.run("report"), coord.lock("x"):
        carried = coord.carry(tool)
        for call in (tool, carried, carried):
            join_all(start_all(lambda call=call: seen.append(Context().run(call, 1))))
    assert seen == [(1, False, None), (1, True, "report"), (1, True, "report")]
    assert (carried.__name__, carried.__doc__) == ("tool", "Use it.")
    with pytest.raises(TypeError):
        coord.carry(3)  # type: ignore[type-var]
