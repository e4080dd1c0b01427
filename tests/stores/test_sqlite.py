"""SQLite: what is written stays, whatever happens to the process, the disk or the file (S1, S2, S3)."""

from __future__ import annotations

import gc
import os
import signal
import sqlite3
import stat
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import closing
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from support import ROOT, eventually, join_all, run_script, start_all

from agentdiff import Coordinator, StoreError
from agentdiff.stores import Record, open_store
from agentdiff.stores.sqlite import SQLiteStore


def record(number: int, data: str = "null") -> Record:
    return Record(f"id-{number}", "event", float(number), None, None, None, data)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "events.db"


@pytest.fixture
def store(path: Path) -> Iterator[SQLiteStore]:
    with SQLiteStore(str(path)) as made:
        yield made


def checked(path: Path) -> Any:
    with closing(sqlite3.connect(str(path))) as connection:
        return connection.execute("PRAGMA integrity_check").fetchone()[0]


def ids(store: SQLiteStore) -> list[str]:
    return [event.id for event in store.read()]


@pytest.mark.parametrize(
    "url",
    [
        "sqlite://",
        "sqlite:///",
        "sqlite://events.db",
        "sqlite:///folder/",
        "sqlite:///a.db?mode=ro",
        "memory://x",
        "events.db",
        "mysql://host/db",
        "",
    ],
)
def test_S1_a_url_that_names_no_store_is_refused(url: str) -> None:
    """At once, with what is allowed."""
    with pytest.raises(ValueError, match="://"):
        open_store(url)


def test_S1_a_url_s_password_is_not_repeated() -> None:
    """A misspelt scheme is no reason to tell the log a secret."""
    with pytest.raises(ValueError, match="rediss") as caught:
        open_store("rdis://:secret@host/0")
    assert "secret" not in str(caught.value)
    with pytest.raises(TypeError, match="string"):
        open_store(Path("x"))  # type: ignore[arg-type]


def test_S1_urls_are_relative_or_absolute(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Three slashes and four; changing the folder later changes nothing; any file name will do."""
    monkeypatch.chdir(tmp_path)
    with open_store("sqlite:///odd %41?#name.db".replace("?", "")) as relative:
        monkeypatch.chdir("/")
        relative.write([record(1)])
        assert [event.id for event in relative.read()] == ["id-1"]
    assert (tmp_path / "odd %41#name.db").exists()
    with open_store(f"sqlite:///{tmp_path}/a.db"):
        assert (tmp_path / "a.db").exists()


@pytest.mark.parametrize(("path", "error"), [("", ValueError), ("a\0b", ValueError), (1, TypeError)])
def test_S1_a_path_that_makes_no_sense_is_refused(path: Any, error: type[Exception]) -> None:
    """At once."""
    with pytest.raises(error):
        SQLiteStore(path)


def test_S1_the_store_is_readable_by_its_owner_only(tmp_path: Path) -> None:
    """The file, what SQLite puts beside it, and the folders that are made, from their first moment."""
    before = os.umask(0)
    try:
        path = tmp_path / "made" / "too" / "events.db"
        with SQLiteStore(str(path)) as store:
            store.write([record(1)])
            files = sorted(path.parent.iterdir())
            assert [file.name for file in files] == ["events.db", "events.db-shm", "events.db-wal"]
            assert {stat.S_IMODE(file.stat().st_mode) for file in files} == {0o600}
        assert stat.S_IMODE(path.parent.stat().st_mode) == stat.S_IMODE(path.parent.parent.stat().st_mode) == 0o700
    finally:
        os.umask(before)


def test_S1_the_file_says_what_it_is(store: SQLiteStore, path: Path) -> None:
    """WAL, and the version of its tables; a newer one is refused, and so is somebody else's database."""
    connection = sqlite3.connect(str(path))
    assert connection.execute("PRAGMA journal_mode").fetchone() == ("wal",)
    assert connection.execute("PRAGMA user_version").fetchone() == (1,)
    assert store._connection is not None
    assert store._connection.execute("PRAGMA synchronous").fetchone() == (1,)
    connection.execute("PRAGMA user_version = 2")
    connection.close()
    with pytest.raises(StoreError, match="newer agentdiff"):
        SQLiteStore(str(path))
    other = path.with_name("other.db")
    connection = sqlite3.connect(str(other))
    connection.execute("CREATE TABLE mine (x)")
    connection.commit()
    connection.close()
    with pytest.raises(StoreError, match="something else"):
        SQLiteStore(str(other))


def test_S1_what_can_t_be_opened_is_refused_clearly(tmp_path: Path) -> None:
    """A folder, a damaged file, a folder that is a file: the error says which, and an agent has not begun yet."""
    damaged = tmp_path / "damaged.db"
    damaged.write_bytes(b"no database at all" * 100)
    for bad in (tmp_path, damaged, damaged / "events.db"):
        with pytest.raises(StoreError, match="can't be opened") as caught:
            Coordinator(store=f"sqlite:///{bad}")
        assert str(bad) in str(caught.value)
        assert str(bad) in caught.value.store
    assert damaged.read_bytes() == b"no database at all" * 100


@pytest.mark.skipif(os.name != "posix" or os.geteuid() == 0, reason="root may write everywhere")
def test_S1_a_read_only_folder_is_refused_clearly(tmp_path: Path) -> None:
    """When the store is opened."""
    tmp_path.chmod(0o500)
    try:
        with pytest.raises(StoreError, match="can't be opened"):
            SQLiteStore(str(tmp_path / "events.db"))
    finally:
        tmp_path.chmod(0o700)


def test_S2_a_file_replaced_by_a_folder_costs_events_and_no_agent(tmp_path: Path) -> None:
    """Emitting goes on; when the folder is gone again, so does writing, into a new file."""
    path = tmp_path / "events.db"
    with Coordinator(store=f"sqlite:///{path}") as coord:
        coord.emit("before")
        coord.flush(10)
        for file in tmp_path.iterdir():
            file.unlink()
        path.mkdir()
        coord.emit("while")
        eventually(lambda: coord._writer is not None and coord._writer._down is not None)
        path.rmdir()
        coord.emit("after")
        coord.flush(20)
        counts = coord.snapshot().counts
        assert (counts.events_stored, counts.events_dropped) == (3, 0)
    with open_store(f"sqlite:///{path}") as store:
        assert [event.name for event in store.read()] == ["while", "after"]


def test_S2_a_file_that_is_damaged_meanwhile_costs_events_and_no_agent(path: Path) -> None:
    """They are counted as lost when the coordinator closes."""
    coord = Coordinator(store=f"sqlite:///{path}", flush_timeout=0.2)
    coord.flush()
    coord._writer.store.close()  # type: ignore[union-attr]  # so that nothing of it is cached
    path.write_bytes(b"damaged" * 1000)
    for _ in range(5):
        coord.emit("x")
    coord.close()
    eventually(lambda: coord.snapshot().counts.events_dropped == 5)


FULL = """
import resource, signal, sys
from agentdiff import Coordinator
from agentdiff.stores import open_store
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
url = "sqlite:///" + sys.argv[1]
coord = Coordinator(store=url, flush_timeout=0.3)
coord.emit("first", "x")
coord.flush()
resource.setrlimit(resource.RLIMIT_FSIZE, (300_000, resource.RLIM_INFINITY))
for number in range(100):
    coord.emit("big", "x" * 10_000)
try:
    coord.flush(1)
    raise SystemExit("the disk was not full")
except TimeoutError:
    pass
resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
coord.flush(20)
print(coord.snapshot().counts.events_stored, coord.snapshot().counts.events_dropped)
coord.close()
print(len(list(open_store(url).read())))
"""


@pytest.mark.skipif(sys.platform == "win32", reason="no RLIMIT_FSIZE")
def test_S2_a_full_disk_costs_time_and_no_agent(path: Path) -> None:
    """As long as it is full, events wait; when there is room, all of them are written, once."""
    done = run_script(FULL, str(path), timeout=50)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == ["101", "0", "101"]
    assert "is away (StoreError: " in done.stderr
    assert "events.db can't be written: " in done.stderr
    assert "is back" in done.stderr


def test_S1_several_may_open_a_new_file_at_the_same_moment(tmp_path: Path) -> None:
    """Each finds it whole, or makes it."""
    for number in range(30):
        path = str(tmp_path / f"{number}.db")
        together = threading.Barrier(4)
        failures: list[Any] = []

        def open_and_write(path: str = path, together: Any = together, failures: list[Any] = failures) -> None:
            together.wait()
            try:
                with SQLiteStore(path) as mine:
                    mine.write([record(threading.get_ident())])
            except BaseException as error:
                failures.append(error)

        join_all(start_all(*[open_and_write] * 4))
        assert failures == []


def test_S1_a_new_file_that_somebody_else_is_making_is_waited_for(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """SQLite itself doesn't wait for them; if they take too long, it is an error."""
    other = sqlite3.connect(str(path), isolation_level=None)
    other.execute("BEGIN IMMEDIATE")
    with monkeypatch.context() as impatient:
        impatient.setattr("agentdiff.stores.sqlite.BUSY", 0)
        with pytest.raises(StoreError, match="locked"):
            SQLiteStore(str(path))
    monkeypatch.setattr("agentdiff.stores.sqlite.time.sleep", lambda seconds: other.execute("COMMIT"))
    with SQLiteStore(str(path)) as store:
        store.write([record(1)])
        assert ids(store) == ["id-1"]
    other.close()


def test_S1_several_may_write_to_one_file(path: Path) -> None:
    """Threads with stores of their own: nothing is lost, nobody fails."""
    failures: list[Any] = []

    def write(begin: int) -> None:
        try:
            with SQLiteStore(str(path)) as mine:
                for number in range(begin, begin + 100, 10):
                    mine.write([record(n) for n in range(number, number + 10)])
        except BaseException as error:
            failures.append(error)

    join_all(start_all(*[partial(write, begin) for begin in (0, 100, 200)]))
    assert failures == []
    with SQLiteStore(str(path)) as store:
        assert sorted(ids(store)) == sorted(f"id-{n}" for n in range(300))


def test_S1_a_batch_is_written_whole_or_not_at_all(store: SQLiteStore) -> None:
    """One that can't be written takes back those before it."""
    with pytest.raises((ValueError, StoreError)):
        store.write([record(1), record(2)._replace(name="\ud800")])
    assert ids(store) == []
    store.write([record(3)])
    assert ids(store) == ["id-3"]


def test_S1_the_log_is_emptied_though_somebody_always_reads(
    store: SQLiteStore, path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A reader in the middle of its events keeps no transaction open; the file is no longer than its events."""
    monkeypatch.setattr("agentdiff.stores.sqlite._LOG_LIMIT", 200_000)
    store.write([record(number) for number in range(1000)])
    reader = store.read()
    next(reader)
    for begin in range(1000, 6000, 100):
        store.write([record(number, '"' + "x" * 500 + '"') for number in range(begin, begin + 100)])
        assert os.stat(f"{path}-wal").st_size < 600_000
    assert len(list(reader)) == 5999
    assert os.stat(path).st_size < 5_000_000


def test_S1_a_store_that_isn_t_there_any_more_can_t_be_read(store: SQLiteStore, path: Path) -> None:
    """That is an error of the store's, with the file's name."""
    store.close()
    path.unlink()
    with pytest.raises(StoreError, match=r"events\.db can't be read"):
        ids(store)
    assert repr(store) == f"<SQLiteStore {str(path)!r}>"


WRITER = """
import sys, time
from agentdiff import Coordinator
coord = Coordinator(store="sqlite:///" + sys.argv[1])
number = 0
while True:
    for _ in range(200):
        coord.emit("tick", {"number": number, "text": "x" * 100})
        number += 1
    if number % 1000 == 0:
        coord.flush()
        print(number, flush=True)
"""


@pytest.mark.skipif(os.name != "posix", reason="no SIGKILL")
@pytest.mark.time_limit(180)
def test_S3_a_killed_process_loses_nothing_that_was_written(path: Path) -> None:
    """Killed in the middle of writing, five times, with four readers beside it that never fail.

    The file opens, everything is there up to the last flush that came back, and what there is of the rest has no gap.
    """
    over = threading.Event()
    failures: list[Any] = []
    SQLiteStore(str(path)).close()

    def read() -> None:
        try:
            with SQLiteStore(str(path)) as mine:
                last = None
                while not over.is_set():
                    for event in mine.read(after=last):
                        last = event.id
        except BaseException as error:
            failures.append(error)

    readers = [threading.Thread(target=read) for _ in range(4)]
    for reader in readers:
        reader.start()
    try:
        seen = 0
        for round_ in range(5):
            child = subprocess.Popen(
                [sys.executable, "-c", WRITER, str(path)],
                stdout=subprocess.PIPE,
                text=True,
                env={**os.environ, "PYTHONPATH": str(ROOT)},
            )
            assert child.stdout is not None
            with child.stdout:
                for _ in range(round_ + 1):
                    acknowledged = int(child.stdout.readline())
                child.send_signal(signal.SIGKILL)
                acknowledged = int(([str(acknowledged), *child.stdout.read().split()])[-1])
            child.wait()
            with SQLiteStore(str(path)) as store:
                assert checked(path) == "ok"
                numbers = [event.data["number"] for event in store.read()][seen:]
            assert numbers == list(range(len(numbers)))
            assert len(numbers) >= acknowledged
            seen += len(numbers)
    finally:
        over.set()
        for reader in readers:
            reader.join()
    assert failures == []


def test_L13_a_forked_child_leaves_the_parent_s_connection_alone(store: SQLiteStore, path: Path) -> None:
    """It opens one of its own, and doesn't close the other: that would empty the log under the parent's hands."""
    store.write([record(1)])
    store.forget()
    gc.collect()
    assert os.path.getsize(f"{path}-wal") > 0
    store.write([record(2)])
    assert ids(store) == ["id-1", "id-2"]
