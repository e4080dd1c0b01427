"""Redis that hangs, dies, comes back, is full, is not there, or answers into the void (S1, S2, E6)."""

from __future__ import annotations

import contextlib
import logging
import os
import re
import sys
import warnings
from collections.abc import Iterator
from typing import Any

import pytest
from redis_server import CuttingProxy, RedisServer, TLSProxy, need_module
from support import eventually, run_script

from agentdiff import Coordinator
from agentdiff._clock import Clock
from agentdiff.stores import Record, StoreError, open_store
from agentdiff.stores.writer import Writer

needs_fork = pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork here")


def record(number: int, data: str = "null") -> Record:
    return Record(f"id-{number}", "done", 1000.0 + number, None, None, None, data)


def ids(store: Any) -> list[str]:
    return [event.id for event in store.read()]


def numbers(store: Any) -> list[int]:
    return [event.data for event in store.read()]


@pytest.fixture
def patient(monkeypatch: pytest.MonkeyPatch) -> None:
    """A server that is there answers in the end, however busy the machine is."""
    need_module("redis")
    from agentdiff.stores import redis

    monkeypatch.setattr(redis, "TIMEOUT", 10.0)


@pytest.fixture
def impatient(patient: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """A server that doesn't answer costs half a second and not more."""
    monkeypatch.setattr("agentdiff.stores.redis.TIMEOUT", 0.5)


@pytest.fixture
def server(redis_server: RedisServer, patient: None) -> RedisServer:
    return redis_server


@pytest.fixture
def authority() -> Any:
    """What signs certificates, and is trusted by nobody who isn't told to."""
    need_module("trustme")
    import trustme

    return trustme.CA()


@pytest.fixture
def logged(caplog: pytest.LogCaptureFixture) -> Iterator[Any]:
    with caplog.at_level(logging.DEBUG, "agentdiff"):
        yield lambda words: [r.getMessage() for r in caplog.records if words in r.getMessage()]


def test_S2_a_hanging_server_gets_everything_once_when_it_goes_on(
    server: RedisServer, impatient: None, logged: Any
) -> None:
    """What it had received when it was stopped it does later, beside what comes again: no event is there twice."""
    with Coordinator(store=server.url) as coord:
        coord.emit("e", 0)
        coord.flush(10)
        server.pause()
        for number in range(1, 50):
            coord.emit("e", number)
        eventually(lambda: logged("is away"))
        for number in range(50, 1500):
            coord.emit("e", number)
        server.resume()
        coord.flush(20)
        counts = coord.snapshot().counts
    assert numbers(open_store(server.url)) == list(range(1500))
    assert (counts.events_stored, counts.events_dropped) == (1500, 0)
    assert len(logged("is away")) == len(logged("is back")) == 1
    assert "0 events were lost" in logged("is back")[0]


def test_S2_what_was_in_doubt_is_settled_before_anything_else_is_written(server: RedisServer, impatient: None) -> None:
    """The batch that nobody knows of is done or never will be: also when asking gets no answer."""
    with open_store(server.url) as store:
        store.write([record(0)])
        server.pause()
        for _ in range(3):
            with pytest.raises(StoreError, match="Timeout"):
                store.write([record(1), record(2)])
        server.resume()
        store.write([record(3)])
        store.write([record(1), record(2)])
        store.write([record(2), record(3)])
        assert sorted(ids(store)) == ["id-0", "id-1", "id-2", "id-3"]


def test_S2_a_batch_that_comes_too_late_is_refused_by_the_server(server: RedisServer) -> None:
    """Whatever has been given up as not done can't be done by an old connection later."""
    with open_store(server.url) as store:
        store.write([record(0)])
        redis: Any = store
        number = redis._number
        store.write([record(1)])
        with server.client() as client:
            from agentdiff.stores.redis import _WRITE

            assert client.eval(_WRITE, 2, redis.key, redis._mark, number + 1, 100, 1000, "{}") == 0
        assert ids(store) == ["id-0", "id-1"]


@pytest.mark.parametrize("passes", [0, 1, 2, 5])
def test_S2_a_reply_that_is_lost_makes_no_event_twice(server: RedisServer, passes: int) -> None:
    """Cut off after each n-th reply, every event is there once, in order."""
    with CuttingProxy(server.port, passes) as proxy:
        with open_store(f"redis://127.0.0.1:{proxy.port}/0") as store:
            for begin in range(0, 100, 5):
                batch = [record(number) for number in range(begin, begin + 5)]
                for _ in range(50):
                    try:
                        store.write(batch)
                        break
                    except StoreError:
                        continue
                else:
                    if passes:
                        pytest.fail("it never got through")
        assert proxy.cuts >= 3
    found = ids(open_store(server.url))
    if passes:
        assert found == [f"id-{number}" for number in range(100)]
    else:  # not one answer ever: nobody can know, and what is there is there once
        assert len(found) == len(set(found))


def test_S2_a_killed_server_gets_what_comes_during_the_outage_when_it_is_back(server: RedisServer, logged: Any) -> None:
    """It reconnects by itself; what the server had and forgot is the server's loss."""
    with Coordinator(store=server.url) as coord:
        coord.emit("e", 0)
        coord.flush(10)
        server.kill()
        for number in range(1, 600):
            coord.emit("e", number)
        eventually(lambda: logged("is away"))
        server.start()
        coord.flush(20)
        counts = coord.snapshot().counts
        assert numbers(open_store(server.url)) == list(range(1, 600))
    assert (counts.events_stored, counts.events_dropped) == (600, 0)
    assert len(logged("is away")) == len(logged("is back")) == 1


def test_S2_beyond_the_buffer_the_oldest_are_lost_counted_and_told_once(
    server: RedisServer, impatient: None, logged: Any
) -> None:
    """Every event is stored or counted as lost, and those that are there are the newest."""
    store = open_store(server.url)
    writer = Writer(
        store, lambda number: record(number, str(number)), Clock(), name="t", flush_timeout=20, owns=True, size=100
    )
    keep = writer.keeper()
    server.pause()
    for number in range(1000):
        keep(number)
    eventually(lambda: logged("is away"))
    for number in range(1000, 2000):
        keep(number)
    server.resume()
    assert writer.flush(20)
    writer.stop()
    found = numbers(open_store(server.url))
    assert len(found) == len(set(found)) == writer.stored
    assert writer.stored + writer.dropped == 2000
    assert found[-100:] == list(range(1900, 2000))
    assert len(logged("is away")) == len(logged("is back")) == 1
    assert f"{writer.dropped} events were lost" in " ".join(logged("were lost"))


TROUBLES = {
    "unreachable": "refused",
    "hangs": "Timeout",
    "password": "invalid username-password",
    "type": "'agentdiff:events' holds something else",
    "full": "memory is full",
    "unknown authority": "unable to get local issuer certificate",
    "certificate of another": "not valid for '127.0.0.1'",
}


@contextlib.contextmanager
def trouble_at_the_server(trouble: str, authority: Any) -> Iterator[str]:
    """The URL of a server that takes nothing, with a password that nobody is to see."""
    options = {"full": ("--maxmemory", "1", "--maxmemory-policy", "noeviction"), "type": ()}
    with contextlib.ExitStack() as stack:
        server = stack.enter_context(RedisServer(*options.get(trouble, ("--requirepass", "right"))))
        url = server.url.replace("right", "secret")
        if trouble == "unreachable":
            server.kill()
        elif trouble == "hangs":
            server.pause()
        elif trouble == "type":
            with server.client() as client:
                client.set("agentdiff:events", "mine")
        elif "certificate" in trouble or "authority" in trouble:
            names = authority.issue_cert("other.example" if "certificate" in trouble else "127.0.0.1")
            proxy = stack.enter_context(TLSProxy(server.port, names))
            url = url.replace("redis:", "rediss:").replace(str(server.port), str(proxy.port))
            if "certificate" in trouble:
                url += f"?ssl_ca_certs={stack.enter_context(authority.cert_pem.tempfile())}"
        yield url


@pytest.mark.parametrize("trouble", TROUBLES)
def test_S2_no_agent_notices_and_every_event_is_counted_as_lost(
    trouble: str, logged: Any, authority: Any, request: Any
) -> None:
    """Agents run, close ends in time, the loss is exact, and the log says what the matter is, once, and no password."""
    if trouble == "hangs":
        request.getfixturevalue("impatient")
    with trouble_at_the_server(trouble, authority) as url, Coordinator(store=url, flush_timeout=0.4) as coord:
        agent = coord.coordinate("agent")(lambda: "done")
        assert [agent() for _ in range(50)] == ["done"] * 50
        eventually(lambda: logged("is away ("))
        coord.join()
        assert coord.snapshot().counts.events_dropped == 0
    assert coord.snapshot().counts.events_dropped == 100
    assert coord.snapshot().counts.events_stored == 0
    assert len(logged("is away (")) == 1
    assert TROUBLES[trouble] in logged("is away (")[0]
    assert len(logged("are lost: ")) == 1
    assert "100 events are lost" in logged("are lost: ")[0]
    assert not logged("secret")
    assert not logged("mine")


def test_S2_a_server_that_is_no_longer_full_gets_everything(server: RedisServer, logged: Any) -> None:
    """As with every outage: events wait, and nothing is lost or twice."""
    with server.client() as client, Coordinator(store=server.url) as coord:
        coord.emit("e", 0)
        coord.flush(10)
        client.config_set("maxmemory", 1)
        for number in range(1, 100):
            coord.emit("e", number)
        eventually(lambda: logged("memory is full"))
        client.config_set("maxmemory", 0)
        coord.flush(10)
    assert numbers(open_store(server.url)) == list(range(100))


@pytest.mark.parametrize("end", ["", "coord.close()", "import sys; sys.exit(3)"])
def test_E6_the_process_ends_in_time_with_a_hanging_server(server: RedisServer, end: str) -> None:
    """`close` and the end wait `flush_timeout` at most; the exit code stays, and the loss is told."""
    server.pause()
    result = run_script(
        f"""
        from agentdiff import Coordinator
        coord = Coordinator(store={server.url!r}, flush_timeout=0.5)
        for number in range(300):
            coord.emit("e", number)
        {end}
        """,
        timeout=30,
    )
    assert result.returncode == (3 if "exit" in end else 0)
    assert "300 events are lost" in result.stderr


@needs_fork
def test_L13_a_forked_child_writes_beside_its_parent(server: RedisServer) -> None:
    """Each has connections and numbers of its own; what both write is there once."""
    with Coordinator(store=server.url) as coord:
        coord.emit("parent", 1)
        coord.flush(10)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)  # fork beside threads is what is tested
            child = os.fork()
        if child == 0:
            try:
                for number in range(20):
                    coord.emit("child", number)
                coord.flush(10)
                os._exit(coord.snapshot().counts.events_dropped)
            except BaseException:
                os._exit(1)
        for number in range(20):
            coord.emit("parent", number)
        assert os.waitpid(child, 0)[1] == 0
        coord.flush(10)
    store = open_store(server.url)
    assert len(list(store.read(name="child"))) == 20
    assert len(list(store.read(name="parent"))) == 21
    assert len(set(ids(store))) == 41


def test_S1_two_writers_share_a_stream(server: RedisServer) -> None:
    """What one writes the other doesn't refuse."""
    with open_store(server.url) as one, open_store(server.url) as other:
        for number in range(0, 20, 2):
            one.write([record(number)])
            other.write([record(number + 1)])
        assert ids(one) == [f"id-{number}" for number in range(20)]


def test_S1_the_stream_is_cut_at_about_maxlen(server: RedisServer) -> None:
    """The newest stay: never fewer than `maxlen`, and not many more."""
    with open_store(server.url + "?maxlen=300&prefix=app:") as store:
        for begin in range(0, 5000, 500):
            store.write([record(number) for number in range(begin, begin + 500)])
        found = ids(store)
        with server.client() as client:
            assert client.xlen("app:events") == len(found)
    assert 300 <= len(found) < 1000
    assert found[-1] == "id-4999"
    assert len(ids(open_store(server.url))) == 0


def test_S1_large_events_go_in_several_commands(server: RedisServer) -> None:
    """Fifty of 64 KiB are too long for one; a part that is done already is not done again."""
    with open_store(server.url) as store:
        text = f'"{"é" * 65_000}"'
        store.write([record(number, text) for number in range(50)])
        store.write([record(number, text) for number in range(51)])
        assert ids(store) == [f"id-{number}" for number in range(51)]
        assert {event.data for event in store.read()} == {"é" * 65_000}


def test_S1_data_that_looks_like_our_own_form_is_kept_as_it_is(server: RedisServer) -> None:
    """Quotes, commas and what separates data from the rest may stand anywhere."""
    nasty = '","data":{"x":1}}'
    with open_store(server.url) as store:
        store.write([Record(nasty, nasty, 0.1, nasty, nasty, nasty, '{"id":",\\"data\\":"}'), record(1)])
        event, plain = store.read()
    assert (event.id, event.name, event.sender, event.run_id, event.parent_id) == (nasty,) * 5
    assert event.data == {"id": ',"data":'}
    assert (plain.sender, plain.run_id, plain.parent_id) == (None, None, None)


def test_S1_reading_tells_what_is_wrong(server: RedisServer) -> None:
    """Another kind of key, an entry of somebody else's, a server that is gone: an error that says so."""
    with server.client() as client, open_store(server.url) as store:
        client.set("agentdiff:events", "mine")
        with pytest.raises(StoreError, match="holds something else"):
            ids(store)
        client.delete("agentdiff:events")
        client.xadd("agentdiff:events", {"a": "b"})
        with pytest.raises(StoreError, match="written by something else"):
            ids(store)
        server.kill()
        with pytest.raises(StoreError, match=f"127.0.0.1:{server.port}/0 can't be read") as caught:
            list(store.read(after="id-1"))
        assert caught.value.store == repr(store)


def test_S2_what_is_remembered_of_earlier_batches_is_bounded(server: RedisServer, monkeypatch: Any) -> None:
    """The last ids are known, whatever has been written before; a whole batch always is."""
    from agentdiff.stores import redis

    monkeypatch.setattr(redis, "_KNOWN", 10)
    with open_store(server.url) as store:
        for number in range(50):
            store.write([record(number)])
        batch = [record(number) for number in range(100, 130)]
        store.write(batch)
        store.write(batch)
        store.write([record(129)])
        store.write([record(129), record(128)])
        assert ids(store) == [f"id-{number}" for number in (*range(50), *range(100, 130))]
        assert len(store._known) <= 30


def test_S2_a_server_that_is_stopped_while_it_is_read_is_told(server: RedisServer, impatient: None) -> None:
    """Within the time that an attempt may take."""
    with open_store(server.url) as store:
        store.write([record(1)])
        server.pause()
        with pytest.raises(StoreError, match="can't be read: Timeout"):
            ids(store)
        server.resume()
        assert ids(store) == ["id-1"]


def test_S1_a_follower_far_from_the_end_is_found(server: RedisServer) -> None:
    """Also where its last event is pages away from the newest."""
    with open_store(server.url) as store:
        store.write([record(number) for number in range(1500)])
        assert len(list(store.read(after="id-100"))) == 1399
        assert len(list(store.read(after="gone"))) == 1500


def test_S1_sockets_passwords_and_databases(patient: None) -> None:
    """A Unix socket, a password in the URL or beside it, another database."""
    from agentdiff.stores.redis import RedisStore

    with RedisServer("--requirepass", "right") as server:
        for store in (
            open_store(server.url),
            RedisStore(f"redis://127.0.0.1:{server.port}/0", password="right"),
            RedisStore(f"redis://:wrong@127.0.0.1:{server.port}/0", password="right", db=3, prefix="p:"),
            open_store(f"unix://:right@{server.socket}?db=4"),
        ):
            with store:
                store.write([record(1)])
                assert ids(store) == ["id-1"] or store.key == "agentdiff:events"
                assert "right" not in repr(store)
        with server.client() as client:
            client.select(3)
            assert client.xlen("p:events") == 1
            client.select(4)
            assert client.xlen("agentdiff:events") == 1


def test_S1_events_go_over_tls(redis_server: RedisServer, authority: Any) -> None:
    """To a server whose certificate is signed by whom the URL names, and shows its name; else nothing is sent."""
    with (
        authority.cert_pem.tempfile() as trusted,
        TLSProxy(redis_server.port, authority.issue_cert("127.0.0.1")) as proxy,
    ):
        plain = f"rediss://127.0.0.1:{proxy.port}/0"
        with Coordinator(store=f"{plain}?ssl_ca_certs={trusted}&prefix=app:") as coord:
            for number in range(200):
                coord.emit("e", number)
            coord.flush(10)
            assert coord.snapshot().counts.events_stored == 200
        with open_store(f"{plain}?prefix=app:&ssl_ca_certs={trusted}") as store:
            assert numbers(store) == list(range(200))
        for url in (plain, f"{plain}?ssl_ca_certs={trusted}".replace("127.0.0.1", "localhost")):
            with open_store(url) as store, pytest.raises(StoreError, match="CERTIFICATE_VERIFY_FAILED"):
                store.write([record(1)])
        with open_store(f"{plain}?ssl_cert_reqs=none") as store:  # whoever insists
            store.write([record(1)])
            assert ids(store) == ["id-1"]


def test_S1_nothing_is_connected_before_it_is_needed() -> None:
    """A store can be opened before its server runs; with TLS likewise; its text shows no password."""
    need_module("redis")
    for scheme in ("redis", "rediss"):
        with open_store(f"{scheme}://user:secret@127.0.0.1:1/7?prefix=a:") as store:
            assert repr(store) == "<RedisStore 127.0.0.1:1/7 'a:events'>"
            with pytest.raises(StoreError, match="can't be written"):
                store.write([record(1)])


@pytest.mark.parametrize(
    ("arguments", "error"),
    [
        ({"url": "redis://127.0.0.1/0?nonsense=1"}, ValueError),
        ({"url": "redis://127.0.0.1/0?protocol=3"}, ValueError),
        ({"url": "redis://127.0.0.1:port/0"}, ValueError),
        ({"url": "redis://127.0.0.1/0?socket_timeout=soon"}, ValueError),
        ({"url": "rediss://127.0.0.1/0?ssl_ca_certs=/nowhere/ca.pem"}, ValueError),
        ({"url": "rediss://127.0.0.1/0?ssl_cert_reqs=perhaps"}, ValueError),
        ({"url": "http://127.0.0.1"}, ValueError),
        ({"url": 1}, TypeError),
        ({"maxlen": 0}, ValueError),
        ({"maxlen": True}, TypeError),
        ({"url": "redis://127.0.0.1/0?maxlen=many"}, TypeError),
        ({"prefix": 1}, TypeError),
    ],
    ids=str,
)
def test_S1_what_makes_no_sense_is_refused_at_once(arguments: dict[str, Any], error: type[Exception]) -> None:
    """When the store is opened."""
    need_module("redis")
    from agentdiff.stores.redis import RedisStore

    with pytest.raises(error):
        RedisStore(**{"url": "redis://127.0.0.1/0", **arguments})


def test_S1_a_refused_url_shows_no_password() -> None:
    """Not even a piece of it, where a slash has cut it in two."""
    need_module("redis")
    with pytest.raises(ValueError, match="%2F") as caught:
        open_store("redis://:hidden/half@host:6379/0")
    assert "hid" not in str(caught.value)
    assert caught.value.__suppress_context__


def test_S1_a_missing_extra_names_the_pip_command(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without redis-py, the error says how to get it; where it is broken, what is missing."""
    monkeypatch.delitem(sys.modules, "agentdiff.stores.redis", raising=False)
    monkeypatch.setitem(sys.modules, "redis", None)
    with pytest.raises(ImportError, match=re.escape('pip install "agentdiff-coordination[redis]"')):
        Coordinator(store="redis://127.0.0.1/0")
    monkeypatch.setitem(sys.modules, "agentdiff.stores.redis", None)
    with pytest.raises(ModuleNotFoundError, match=re.escape("agentdiff.stores.redis")):
        open_store("redis://127.0.0.1/0")
