"""Between emit and store: nobody waits, what is lost is counted, the end comes in time (S1, S2, E6)."""

from __future__ import annotations

import asyncio
import logging
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from queue import SimpleQueue
from typing import Any, Callable, Optional

import pytest
from support import eventually, join_all, run_script, start_all

from agentdiff import CoordinationTimeoutError, Coordinator, StoreError
from agentdiff.stores import Query, Record, Store
from agentdiff.stores.memory import MemoryStore
from agentdiff.stores.writer import BATCH, Writer
from agentdiff.testing import FakeClock


class FakeStore(MemoryStore):
    """A store that can hang, fail, or refuse records."""

    def __init__(self) -> None:
        super().__init__()
        self.may_go_on = threading.Event()
        self.may_go_on.set()
        self.entered = threading.Event()
        self.error: Optional[BaseException] = None
        self.loses_reply = False
        self.refuses: Callable[[Record], bool] = lambda record: False
        self.attempts = 0
        self.closed = 0

    def __repr__(self) -> str:
        return "<FakeStore>"

    def write(self, records: Sequence[Record]) -> None:
        self.attempts += 1
        self.entered.set()
        self.may_go_on.wait(30)
        if self.error is not None:
            raise self.error
        if any(map(self.refuses, records)):
            raise ValueError("not this one")
        super().write(records)
        if self.loses_reply:
            self.loses_reply = False
            raise StoreError("the reply was lost")

    def close(self) -> None:
        self.closed += 1

    @contextmanager
    def hanging(self) -> Iterator[None]:
        self.may_go_on.clear()
        self.entered.clear()
        try:
            yield
        finally:
            self.may_go_on.set()


class SteppedStore(FakeStore):
    """Tells of each batch before it writes it, and waits for a word."""

    def __init__(self) -> None:
        super().__init__()
        self.reached: SimpleQueue[list[int]] = SimpleQueue()
        self.go_on: SimpleQueue[None] = SimpleQueue()

    def write(self, records: Sequence[Record]) -> None:
        self.reached.put([int(record.id[3:]) for record in records])
        self.go_on.get()
        super().write(records)

    @contextmanager
    def stepping(self) -> Iterator[Callable[[list[int]], None]]:
        """What lets it write, and asserts which batch comes next; at the end it may go on."""

        def step(to: list[int]) -> None:
            self.go_on.put(None)
            assert self.reached.get(timeout=10) == to

        try:
            yield step
        finally:
            for _ in range(20):
                self.go_on.put(None)


def record_of(number: int) -> Record:
    return Record(f"id-{number}", "event", float(number), None, None, None, "null")


@contextmanager
def writing(store: Store, **more: Any) -> Iterator[Any]:
    """A writer of numbers, with a clock of its own, and what puts them in."""
    settings: dict[str, Any] = {"name": "test", "flush_timeout": 5.0, "owns": True, "size": 10, **more}
    writer = Writer(store, record_of, settings.pop("clock", None) or FakeClock(), **settings)
    try:
        yield writer, writer.keeper()
    finally:
        writer.stop()
        eventually(lambda: not [thread for thread in threading.enumerate() if thread.name == "test-store"])


def kept(store: Store) -> list[int]:
    return [int(record.id[3:]) for record in store.select(Query())]


def test_S1_what_is_put_in_is_written_in_order_and_flush_waits_for_it() -> None:
    """Flush comes back when everything before it is there; the fake clock stands still, so it did not just gather."""
    store = FakeStore()
    with writing(store, size=100_000) as (writer, keep):
        for number in range(3 * BATCH + 7):
            keep(number)
        assert writer.flush(10)
        assert kept(store) == list(range(3 * BATCH + 7))
        assert (writer.stored, writer.dropped) == (3 * BATCH + 7, 0)
        assert writer.flush(0)
    assert store.closed == 1


def test_S3_events_are_written_when_the_flush_interval_is_over() -> None:
    """The first wakes the writer, which waits for more: one batch, when the interval is over."""
    store, clock = FakeStore(), FakeClock()
    with writing(store, clock=clock) as (_, keep):
        keep(0)
        clock.wait_for_sleepers(1)
        keep(1)
        keep(2)
        assert store.attempts == 0
        clock.advance(0.1)
        eventually(lambda: kept(store) == [0, 1, 2])
        assert store.attempts == 1


def test_S1_half_a_buffer_of_events_is_not_left_to_gather() -> None:
    """Else those who emit a lot would lose events while the writer waits for more."""
    store, clock = FakeStore(), FakeClock()
    with writing(store, clock=clock) as (writer, keep):
        keep(0)
        clock.wait_for_sleepers(1)
        for number in range(1, 7):
            keep(number)
        eventually(lambda: writer.stored == 7)


def test_S2_a_store_that_is_away_gets_everything_when_it_is_back(caplog: pytest.LogCaptureFixture) -> None:
    """What fits waits; two lines in the log, however often it was tried."""
    store, clock = FakeStore(), FakeClock()
    store.error = ConnectionError("refused")
    with caplog.at_level(logging.WARNING), writing(store, clock=clock) as (writer, keep):
        for number in range(8):
            keep(number)
        for _ in range(6):
            clock.wait_for_sleepers(1)
            clock.advance(1.0)
        store.error = None
        eventually(lambda: clock.advance(1.0) or writer.stored == 8)
        keep(8)
        assert writer.flush(10)
        assert kept(store) == list(range(9))
        assert store.attempts > 3
    assert [line.getMessage() for line in caplog.records if "away" in line.getMessage()] == [
        "<FakeStore> is away (ConnectionError: refused): up to 10 events wait for it, then the oldest are lost"
    ]
    (back,) = [line.getMessage() for line in caplog.records if "back" in line.getMessage()]
    assert back.endswith("; 0 events were lost")


def test_S2_the_oldest_are_dropped_and_counted_exactly(caplog: pytest.LogCaptureFixture) -> None:
    """Ten wait, beside what is being written already; of the rest each is counted, and told of once."""
    store = FakeStore()
    with caplog.at_level(logging.WARNING), writing(store) as (writer, keep):
        with store.hanging():
            keep(0)
            writer.hurry()
            assert store.entered.wait(10)
            is_over = writer._aim()
            for number in range(1, 102):
                keep(number)
            assert (writer.stored, writer.dropped) == (0, 91)
            assert not is_over()  # though more have been dropped than it waits for
        assert writer.flush(10)
        assert is_over()
        assert kept(store) == [0, *range(92, 102)]
        assert (writer.stored, writer.dropped) == (11, 91)
        eventually(lambda: caplog.records)
    assert [line.getMessage() for line in caplog.records] == [
        "91 events were lost: <FakeStore> is slower than those who emit"
    ]


def test_S2_threads_that_emit_together_lose_what_is_counted() -> None:
    """Stored and dropped together are all, and what is stored is there once."""
    store = FakeStore()
    numbers = [range(begin, begin + 2000) for begin in range(0, 8000, 2000)]
    with writing(store, size=50) as (writer, keep):
        threads = [threading.Thread(target=lambda mine=mine: [keep(number) for number in mine]) for mine in numbers]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert writer.flush(10)
        assert writer.stored + writer.dropped == 8000
        assert len(kept(store)) == writer.stored


def test_S2_a_lost_reply_stores_nothing_twice() -> None:
    """The batch comes again, and every event is there once."""
    store, clock = FakeStore(), FakeClock()
    store.loses_reply = True
    with writing(store, clock=clock) as (writer, keep):
        for number in range(5):
            keep(number)
        eventually(lambda: clock.advance(0.1) or writer.stored == 5)
        assert kept(store) == list(range(5))
        assert store.attempts == 2


def test_S2_a_record_that_can_never_be_kept_costs_nothing_but_itself(caplog: pytest.LogCaptureFixture) -> None:
    """It is found, counted and told of; the others of its batch are kept, in order."""
    store = FakeStore()
    store.refuses = lambda record: record.id in {"id-2", "id-4"}
    with writing(store, size=100) as (writer, keep):
        for number in range(6):
            keep(number)
        assert writer.flush(10)
        assert kept(store) == [0, 1, 3, 5]
        assert (writer.stored, writer.dropped) == (4, 2)
        attempts = store.attempts
        for number in range(6, 12):
            keep(number)
        assert writer.flush(10)
        assert store.attempts == attempts + 1  # all of them together again
    assert sum("can't be kept" in line.getMessage() for line in caplog.records) == 2


def test_S1_flush_waits_for_every_event_though_they_are_written_one_by_one() -> None:
    """Those that wait behind one that is refused are still to come, and so is what was put in after them."""
    store = SteppedStore()
    store.refuses = lambda record: record.id == "id-2"
    with writing(store) as (writer, keep):
        with store.stepping() as step:
            for number in range(5):
                keep(number)
            writer.hurry()
            assert store.reached.get(timeout=10) == [0, 1, 2, 3, 4]
            step([0])
            keep(5)
            is_over = writer._aim()
            for number in range(1, 6):
                step([number])
                assert not is_over()
        assert writer.flush(10)
        assert is_over()
        assert kept(store) == [0, 1, 3, 4, 5]


def test_S1_flush_comes_back_though_there_is_always_a_next_batch() -> None:
    """As soon as those are written that it waits for."""
    store = SteppedStore()
    with writing(store) as (writer, keep), store.stepping() as step:
        keep(0)
        writer.hurry()
        assert store.reached.get(timeout=10) == [0]
        flushing = start_all(lambda: writer.flush(None))
        eventually(lambda: writer._bells)
        keep(1)
        step([1])
        join_all(flushing)


def test_S1_flush_says_when_the_store_did_not_take_them_in_time() -> None:
    """An error with its facts; what was emitted is written later all the same."""
    store = FakeStore()
    with Coordinator(store=store) as coord:
        with store.hanging():
            coord.emit("x")
            with pytest.raises(CoordinationTimeoutError, match="FakeStore") as caught:
                coord.flush(0)
            assert (caught.value.name, caught.value.timeout) == ("flush", 0)
        coord.flush(10)
        assert [event.name for event in store.read()] == ["x"]


def test_S1_flush_without_a_store_is_nothing() -> None:
    """There is nothing to wait for."""
    with Coordinator() as coord:
        coord.emit("x")
        coord.flush(0)


def test_E6_close_gives_up_on_a_hung_store_after_flush_timeout(caplog: pytest.LogCaptureFixture) -> None:
    """It comes back although the store never does; what is lost is counted; no error for whoever closes."""
    store = FakeStore()
    coord = Coordinator(store=store, flush_timeout=0.05)
    with store.hanging():
        for _ in range(7):
            coord.emit("x")
        coord.close()
        counts = coord.snapshot().counts
        assert (counts.events_stored, counts.events_dropped) == (0, 7)
    assert any("7 events are lost" in line.getMessage() for line in caplog.records)
    eventually(lambda: not [thread for thread in threading.enumerate() if thread.name == "agentdiff-store"])
    counts = coord.snapshot().counts  # the write that hung was done in the end
    assert counts.events_stored == len(list(store.read()))
    assert counts.events_stored + counts.events_dropped == 7


def test_E6_close_gives_up_on_a_store_that_is_away(caplog: pytest.LogCaptureFixture) -> None:
    """The same where it answers, but with errors."""
    store = FakeStore()
    store.error = StoreError("no")
    coord = Coordinator(store=store, flush_timeout=0.05)
    for _ in range(7):
        coord.emit("x")
    coord.close()
    eventually(lambda: not [thread for thread in threading.enumerate() if thread.name == "agentdiff-store"])
    assert coord.snapshot().counts.events_dropped == 7


def test_E6_close_async_lets_the_loop_go_on() -> None:
    """While events are being written, the loop runs what lets the store go on."""
    store = FakeStore()

    async def main() -> None:
        async with Coordinator(store=store) as coord:
            store.may_go_on.clear()
            coord.emit("x")
            asyncio.get_running_loop().call_later(0.01, store.may_go_on.set)

    asyncio.run(main())
    assert len(list(store.read())) == 1


EXIT = """
import sys, threading, time
from agentdiff import Coordinator
from agentdiff.stores.memory import MemoryStore

class Hung(MemoryStore):
    def write(self, records):
        threading.Event().wait()

begun = time.monotonic()
import atexit
atexit.register(lambda: print("exit took", time.monotonic() - begun))
coords = [Coordinator(store=Hung(), flush_timeout=0.5) for _ in range(21)]
for coord in coords:
    coord.emit("x")
coords[20].close()
begun = time.monotonic()
"""


def test_E6_hung_stores_hold_up_the_exit_by_flush_timeout_together() -> None:
    """Twenty of them with half a second each: not ten seconds; the process ends well. One that is closed is over."""
    done = run_script(EXIT, timeout=30)
    assert done.returncode == 0
    assert float(done.stdout.split()[-1]) < 9
    assert done.stderr.count("events are lost") == 21


def test_E6_the_exit_writes_what_chains_have_emitted(tmp_path: Any) -> None:
    """Nobody closes, nobody flushes: all is there, the last link too."""
    done = run_script(
        """
import sys
from agentdiff import Coordinator
coord = Coordinator(store="sqlite:///" + sys.argv[1])
coord.on("a", lambda data: coord.emit("b") if data else None)
coord.on("b", lambda data: coord.emit("c"))
coord.emit("a", True)
""",
        f"{tmp_path}/events.db",
    )
    assert (done.returncode, done.stderr) == (0, "")
    from agentdiff.stores import open_store

    with open_store(f"sqlite:///{tmp_path}/events.db") as store:
        assert [event.name for event in store.read()] == ["a", "b", "c"]


def test_S1_a_store_object_is_its_owners_to_close_and_one_from_a_url_is_ours() -> None:
    """The coordinator closes what it has opened."""
    store = FakeStore()
    with Coordinator(store=store):
        pass
    assert store.closed == 0


@pytest.mark.parametrize("store", [1, object(), MemoryStore])
def test_S1_what_is_no_store_is_refused(store: Any) -> None:
    """At once."""
    with pytest.raises(TypeError, match="store must be"):
        Coordinator(store=store)


@pytest.mark.parametrize(
    ("settings", "error"),
    [
        ({"redact": "password"}, TypeError),
        ({"redact": (1,)}, TypeError),
        ({"max_payload": "1"}, TypeError),
        ({"max_payload": 0}, ValueError),
        ({"flush_timeout": -1}, ValueError),
    ],
)
def test_S4_settings_that_make_no_sense_are_refused(settings: dict[str, Any], error: type[Exception]) -> None:
    """At once, and no thread is left."""
    with pytest.raises(error):
        Coordinator(store=MemoryStore(), **settings)


def test_S1_a_store_can_be_changed_in_place() -> None:
    """`configure` sends what comes from now on elsewhere, and writes what came before where it belongs."""
    first, second = MemoryStore(), MemoryStore()
    with Coordinator(store=first, redact=("a",)) as coord:
        coord.emit("x", {"a": 1})
        coord.configure(store=second, redact=())
        coord.emit("y", {"a": 1})
        coord.configure(store=None)
        coord.emit("z")
    assert [(event.name, event.data) for event in first.read()] == [("x", {"a": "***"})]
    assert [(event.name, event.data) for event in second.read()] == [("y", {"a": 1})]


def test_L13_a_forked_child_writes_its_own_events_and_none_of_the_parents(tmp_path: Any) -> None:
    """Its writer's thread, buffer and connection are new; both write to one file."""
    done = run_script(
        """
import os, sys, warnings
warnings.simplefilter("ignore", DeprecationWarning)
from agentdiff import Coordinator
from agentdiff.stores import open_store
url = "sqlite:///" + sys.argv[1]
coord = Coordinator(store=url)
coord.emit("parent's first")
coord.flush()
coord.emit("parent's")
pid = os.fork()
if pid == 0:
    try:
        coord.emit("child's")
        coord.flush(10)
        assert coord.snapshot().counts.events_stored == 1
        coord.close()
        os._exit(0)
    except BaseException:
        import traceback
        traceback.print_exc()
        os._exit(1)
assert os.waitpid(pid, 0)[1] == 0
coord.close()
print(sorted(event.name for event in open_store(url).read()))
""",
        f"{tmp_path}/events.db",
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout == '["child\'s", "parent\'s", "parent\'s first"]\n'


def test_F2_the_import_loads_no_store() -> None:
    """Neither the package's nor those of others; a coordinator without a store needs none either."""
    done = run_script(
        "import sys, agentdiff; agentdiff.Coordinator().close()\n"
        "print([name for name in sys.modules if name in ('sqlite3', 'redis') or 'agentdiff.stores' in name])"
    )
    assert done.stdout == "[]\n"


def test_E6_where_no_thread_can_start_whoever_waits_writes(monkeypatch: pytest.MonkeyPatch) -> None:
    """At the end of the process the interpreter refuses threads; what was emitted is written all the same."""

    def refuse(thread: threading.Thread) -> None:
        raise RuntimeError("can't create new thread at interpreter shutdown")

    store = FakeStore()
    with writing(store) as (writer, keep):
        monkeypatch.setattr(threading.Thread, "start", refuse)
        for number in range(5):
            keep(number)
        assert writer.flush(10)
        assert kept(store) == list(range(5))


def test_E6_the_exit_waits_only_for_what_is_left_of_flush_timeout() -> None:
    """Others have used it up already: what hangs is given up at once."""
    store = FakeStore()
    with writing(store, flush_timeout=5.0) as (writer, keep):
        with store.hanging():
            keep(0)
            writer.hurry()
            assert store.entered.wait(10)
            keep(1)
            writer.stop_by(-1e9)
            assert writer.dropped == 2
        eventually(lambda: (writer.stored, writer.dropped) == (1, 1))  # it was written after all


def test_E6_the_exit_does_not_wait_again_for_what_was_closed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever closed it has waited."""
    store = FakeStore()
    with store.hanging(), writing(store, flush_timeout=0.0) as (writer, keep):
        keep(0)
        writer.stop()
        with monkeypatch.context() as patched:
            patched.setattr("agentdiff.stores.writer._Countdown", pytest.fail)
            writer.stop_by(0.0)
        store.may_go_on.set()
        eventually(lambda: writer._thread is None)


@pytest.mark.parametrize("end", ["written", "refused", "away"])
def test_S2_what_was_given_up_is_counted_once_whatever_becomes_of_it(end: str) -> None:
    """Also if it is given up twice; if it has been written in the end, it is not lost."""
    store = FakeStore()
    with writing(store, flush_timeout=0.0) as (writer, keep):
        with store.hanging():
            keep(0)
            keep(1)
            writer.hurry()
            assert store.entered.wait(10)
            keep(2)
            for _ in range(2):
                writer.stop()
                assert (writer.stored, writer.dropped) == (0, 3)
            if end == "refused":
                store.refuses = lambda record: True
            elif end == "away":
                store.error = StoreError("no")
        eventually(lambda: writer._thread is None)
        assert (writer.stored, writer.dropped) == ((2, 1) if end == "written" else (0, 3))
        assert kept(store) == ([0, 1] if end == "written" else [])


def test_S1_an_event_that_comes_as_the_writer_goes_to_sleep_is_written(monkeypatch: pytest.MonkeyPatch) -> None:
    """It has woken nobody, since somebody was awake."""
    store, clock, late = FakeStore(), FakeClock(), [1]
    with writing(store, clock=clock) as (writer, keep):
        monkeypatch.setattr(writer, "_tell_lost", lambda: keep(late.pop()) if late else None)  # it has found no more
        keep(0)
        clock.wait_for_sleepers(1)
        clock.advance(0.1)
        eventually(lambda: clock.advance(0.1) or kept(store) == [0, 1])


def test_E7_a_writer_that_is_to_end_gathers_no_more(monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where its thread has not begun yet, and one ring stands for the event and for the end."""
    store, go = FakeStore(), threading.Event()
    with writing(store) as (writer, keep):
        run = writer._run
        monkeypatch.setattr(writer, "_run", lambda: (go.wait(10), run()))
        keep(0)
        writer.end()
        go.set()
        eventually(lambda: writer._thread is None)
        assert kept(store) == [0]


def test_E6_stop_waits_until_the_store_is_closed() -> None:
    """The thread ends after that, and then whoever stops it goes on."""
    store, clock, may_close = FakeStore(), FakeClock(), threading.Event()
    store.close = may_close.wait  # type: ignore[assignment,method-assign]
    with writing(store, clock=clock) as (writer, keep):
        keep(0)
        stopping = start_all(writer.stop)
        eventually(lambda: writer._ending)
        clock.wait_for_sleepers(1)
        may_close.set()
        join_all(stopping)


def test_E6_close_async_gives_up_on_a_hung_store_too() -> None:
    """Within flush_timeout, and the loop has gone on meanwhile."""
    store = FakeStore()
    ticks: list[int] = []

    async def main() -> None:
        async with Coordinator(store=store, flush_timeout=0.1) as coord:
            store.may_go_on.clear()
            coord.emit("x")
            asyncio.get_running_loop().call_later(0.01, ticks.append, 1)

    asyncio.run(main())
    assert ticks == [1]
    store.may_go_on.set()
    eventually(lambda: not [thread for thread in threading.enumerate() if thread.name == "agentdiff-store"])


def test_E7_quit_waits_for_nobody_and_what_can_be_written_is() -> None:
    """The writer goes on by itself, and ends."""
    store = FakeStore()
    coord = Coordinator(store=store)
    with store.hanging():
        coord.emit("x")
        coord.quit()
    eventually(lambda: not [thread for thread in threading.enumerate() if thread.name == "agentdiff-store"])
    assert coord.snapshot().counts.events_stored == 1


def test_S2_what_a_store_that_is_away_never_took_is_counted_at_the_end(caplog: pytest.LogCaptureFixture) -> None:
    """One last attempt, and then the thread ends."""
    store = FakeStore()
    store.error = StoreError("no")
    coord = Coordinator(store=store)
    coord.emit("x")
    coord.quit()
    eventually(lambda: coord.snapshot().counts.events_dropped == 1)
    eventually(lambda: "1 events are lost: <FakeStore> is away" in caplog.text)


def test_S1_a_store_that_can_t_be_closed_fails_nobody(caplog: pytest.LogCaptureFixture) -> None:
    """It is told of in the log."""

    class Stuck(FakeStore):
        def close(self) -> None:
            raise OSError("stuck")

    with writing(Stuck()) as (_, keep):
        keep(1)
    assert "<FakeStore> could not be closed: stuck" in caplog.text


def test_L13_a_writer_that_forgets_begins_anew() -> None:
    """Nothing waits, nothing is counted, and what is put in afterwards is written by a new thread."""
    store = FakeStore()
    writer = Writer(store, record_of, FakeClock(), name="test", flush_timeout=5.0, owns=False)
    keep = writer.keeper()
    keep(1)
    assert writer.flush(10)
    writer.end()
    eventually(lambda: writer._thread is None)
    keep(2)
    assert writer._thread is None
    writer.forget()
    keep(3)
    assert writer.flush(10)
    assert (writer.stored, writer.dropped) == (1, 0)
    assert kept(store) == [1, 3]
    writer.stop()


def test_S1_the_memory_store_keeps_the_last_events() -> None:
    """Of more than its size the oldest go; a size that makes no sense is refused."""
    store = MemoryStore(3)
    store.write([record_of(number) for number in range(5)])
    assert kept(store) == [2, 3, 4]
    assert repr(store) == "<MemoryStore 3 of 3>"
    store.forget()
    assert kept(store) == [2, 3, 4]
    with pytest.raises(TypeError, match="size"):
        MemoryStore("3")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="size"):
        MemoryStore(0)
