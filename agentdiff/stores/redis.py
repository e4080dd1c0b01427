"""Events in a Redis stream: several processes and machines write to one place (S1, S2).

A reply can be lost after the server has done the work, and a server that was stopped goes on with what it had received
when it goes on. So each batch has a number, and the server keeps, beside the stream, the highest number of each writer
that it has seen; both change in one script. What was in doubt is settled before anything else is written: it was done,
or it never will be.
"""

from __future__ import annotations

import json
import os
import threading
from collections.abc import Iterator, Sequence
from importlib import import_module
from json.encoder import encode_basestring
from typing import Any, Optional
from urllib.parse import parse_qsl, urlencode, urlsplit, urlunsplit

from .base import Query, Record, Store, StoreError

redis: Any = import_module("redis")

PREFIX = "agentdiff:"
MAXLEN = 1_000_000
TIMEOUT = 1.5
"""Seconds that a server which doesn't answer may cost."""

_PAGE = 500
_CHUNK = 1024 * 1024  # characters in one command: what is longer may not get through in time
_KNOWN = 10_000
_OWN = ("prefix", "maxlen", "password", "db")
_FIXED = ("protocol", "decode_responses", "encoding", "retry_on_timeout", "retry_on_error")
_MARK_LIVES = 24 * 3600
_DATA = ',"data":'  # not within what comes before it: quotes are escaped there
_WRITE = """
local seen = tonumber(redis.call('GET', KEYS[2]) or '0')
if seen >= tonumber(ARGV[1]) then return 0 end
for i = 4, #ARGV do redis.call('XADD', KEYS[1], '*', 'event', ARGV[i]) end
redis.call('XTRIM', KEYS[1], 'MAXLEN', '~', ARGV[3])
redis.call('SET', KEYS[2], ARGV[1], 'EX', ARGV[2])
return 1
"""
_SETTLE = """
local seen = tonumber(redis.call('GET', KEYS[1]) or '0')
if seen >= tonumber(ARGV[1]) then return 1 end
redis.call('SET', KEYS[1], ARGV[1], 'EX', ARGV[2])
return 0
"""
_left_alone: list[Any] = []  # connections of a parent process


class RedisStore(Store):
    """Keeps events in a stream of a Redis server, 6.2 or newer; the oldest go when there are more than `maxlen`.

    Nothing is connected before something is written or read: a program may start before its server.

    Args:
        url: `redis://user:password@host:6379/0`, `rediss://...` for TLS, `unix:///path/redis.sock?db=0`. Besides what
            redis-py takes, `?prefix=`, `?maxlen=`, `?password=` and `?db=` stand for the arguments of these names.
        password: in place of what the URL says.
        db: likewise, the database's number.
        prefix: what the names of keys begin with; the stream is `{prefix}events`.
        maxlen: about how many events are kept: never fewer, and a few hundred more at times.

    Raises:
        TypeError, ValueError: an argument that makes no sense.
    """

    def __init__(
        self,
        url: str,
        *,
        password: Optional[str] = None,
        db: Optional[int] = None,
        prefix: Optional[str] = None,
        maxlen: Optional[int] = None,
    ) -> None:
        if not isinstance(url, str):
            raise TypeError(f"url must be a string, not {type(url).__name__}")
        self._url, own = _take_own(url)
        prefix = own.get("prefix", PREFIX) if prefix is None else prefix
        if not isinstance(prefix, str):
            raise TypeError(f"prefix must be a string, not {prefix!r}")
        self._maxlen = _check_number("maxlen", own.get("maxlen", MAXLEN) if maxlen is None else maxlen, 1)
        self._options: dict[str, Any] = {}
        password = own.get("password") if password is None else password
        if password is not None:
            self._options["password"] = password
        number = own.get("db") if db is None else db
        if number is not None:
            self._options["db"] = _check_number("db", number, 0)
        self.key: str = prefix + "events"
        self._tls = _tls_options(self._url)
        self._begin()
        try:
            facts = self._make_client().connection_pool.make_connection()
        except (TypeError, ValueError, redis.RedisError) as error:
            raise ValueError(f"a part of the Redis URL makes no sense: {error}") from None
        where = getattr(facts, "path", "") or f"{facts.host}:{facts.port}"
        self._where = f"{where}/{facts.db}"

    def __repr__(self) -> str:
        return f"<RedisStore {self._where} {self.key!r}>"

    def _begin(self) -> None:
        self._mutex = threading.Lock()
        self._client: Any = None
        self._mark = f"{self.key}:writer:{os.urandom(8).hex()}"
        self._number = 0
        self._known: dict[str, None] = {}  # the last ids that are there
        self._doubt: tuple[str, ...] = ()  # the ids of the batch of the last number, of which nobody knows

    def _make_client(self) -> Any:
        pool = redis.ConnectionPool.from_url(
            self._url,
            socket_timeout=TIMEOUT,
            socket_connect_timeout=TIMEOUT,
            encoding_errors="replace",
            decode_responses=True,
            protocol=2,
            **self._tls,
            retry=import_module("redis.retry").Retry(import_module("redis.backoff").NoBackoff(), 0),
        )
        pool.connection_kwargs.update(self._options)
        return redis.Redis(connection_pool=pool)

    def _connected(self) -> Any:
        client = self._client
        if client is None:
            client = self._client = self._make_client()
        return client

    # -- writing ------------------------------------------------------------------------------------------

    def write(self, records: Sequence[Record]) -> None:
        with self._mutex:
            try:
                self._settle()
                known = self._known
                for id in list(known)[: max(0, len(known) - max(_KNOWN, len(records)))]:
                    del known[id]
                new = {record.id: record for record in records if record.id not in known}
                for chunk in _chunks(new):
                    self._write(chunk)
            except redis.RedisError as error:
                raise self._error("can't be written", error) from error

    def _write(self, documents: dict[str, str]) -> None:
        self._number += 1
        self._doubt = tuple(documents)
        try:
            self._connected().eval(
                _WRITE, 2, self.key, self._mark, self._number, _MARK_LIVES, self._maxlen, *documents.values()
            )
        except redis.ResponseError:  # the server has said no
            self._doubt = ()
            raise
        self._known.update(dict.fromkeys(documents))
        self._doubt = ()

    def _settle(self) -> None:
        """Find out whether the last batch has arrived; if not, it won't any more."""
        if self._doubt:
            if self._connected().eval(_SETTLE, 1, self._mark, self._number, _MARK_LIVES):
                self._known.update(dict.fromkeys(self._doubt))
            self._doubt = ()

    # -- reading ------------------------------------------------------------------------------------------

    def select(self, query: Query) -> Iterator[Record]:
        return query.select(self._all(query.after))

    def _all(self, after: Optional[str]) -> Iterator[Record]:
        try:
            client = self._connected()
            at = self._place_of(client, after) if after is not None else None
            while True:
                page = client.xrange(self.key, f"({at}" if at else "-", count=_PAGE)
                for place, fields in page:
                    yield self._record(place, fields)
                if len(page) < _PAGE:
                    return
                at = page[-1][0]
        except redis.RedisError as error:
            raise self._error("can't be read", error) from error

    def _place_of(self, client: Any, id: str) -> Optional[str]:
        """Where in the stream an event is: looked for from the end, since it is a follower who asks."""
        at = None
        while True:
            page = client.xrevrange(self.key, f"({at}" if at else "+", count=_PAGE)
            for place, fields in page:
                if self._record(place, fields).id == id:
                    return str(place)
            if len(page) < _PAGE:
                return None
            at = page[-1][0]

    def _record(self, place: str, fields: dict[str, str]) -> Record:
        try:
            head, _, data = fields["event"].partition(_DATA)
            return Record(**json.loads(head + "}"), data=data[:-1])
        except (KeyError, TypeError, ValueError):
            raise StoreError(
                f"{self}: entry {place} of {self.key!r} was written by something else", store=repr(self)
            ) from None

    # -- the rest -----------------------------------------------------------------------------------------

    def _error(self, what: str, error: BaseException) -> StoreError:
        text = str(error) or type(error).__name__
        if "WRONGTYPE" in text:
            text = f"the key {self.key!r} holds something else, not a stream"
        elif "OOM" in text:
            text = "the server's memory is full (OOM)"
        return StoreError(f"Redis at {self._where} {what}: {text}", store=repr(self))

    def close(self) -> None:
        client, self._client = self._client, None
        if client is not None:
            client.connection_pool.disconnect()

    def forget(self) -> None:
        _left_alone.append(self._client)
        self._begin()


def _chunks(records: dict[str, Record]) -> Iterator[dict[str, str]]:
    chunk: dict[str, str] = {}
    size = 0
    for record in records.values():
        document = _document(record)
        if size + len(document) > _CHUNK and chunk:
            yield chunk
            chunk, size = {}, 0
        chunk[record.id] = document
        size += len(document)
    if chunk:
        yield chunk


def _document(record: Record) -> str:
    id, name, time, sender, run_id, parent_id, data = record
    quoted = encode_basestring
    return (
        f'{{"id":{quoted(id)},"name":{quoted(name)},"time":{time!r},'
        f'"sender":{"null" if sender is None else quoted(sender)},'
        f'"run_id":{"null" if run_id is None else quoted(run_id)},'
        f'"parent_id":{"null" if parent_id is None else quoted(parent_id)}{_DATA}{data}}}'
    )


def _take_own(url: str) -> tuple[str, dict[str, str]]:
    """The URL without what is for this store and not for redis-py, and that."""
    parts = urlsplit(url)
    try:
        _ = parts.port
    except ValueError:  # its text may hold a piece of the password
        raise ValueError("the port in a Redis URL must be a number, and a / in a password be written %2F") from None
    pairs = parse_qsl(parts.query, keep_blank_values=True)
    own = {name: value for name, value in pairs if name in _OWN}
    for name, _ in pairs:
        if name in _FIXED:
            raise ValueError(f"{name} in a Redis URL makes no sense here: agentdiff sets it itself")
    rest = urlencode([pair for pair in pairs if pair[0] not in own])
    return urlunsplit(parts._replace(query=rest)) if own else url, own


def _tls_options(url: str) -> dict[str, bool]:
    """The name in a server's certificate is checked; before version 6, redis-py did that on request only."""
    parts = urlsplit(url)
    query = dict(parse_qsl(parts.query))
    for name in ("ssl_ca_certs", "ssl_certfile", "ssl_keyfile"):
        if name in query and not os.path.isfile(query[name]):
            raise ValueError(f"{name} in a Redis URL must name a file, and {query[name]!r} is none")
    return {"ssl_check_hostname": True} if parts.scheme == "rediss" and query.get("ssl_cert_reqs") != "none" else {}


def _check_number(what: str, number: Any, least: int) -> int:
    if isinstance(number, str) and number.isdecimal():
        number = int(number)
    if isinstance(number, bool) or not isinstance(number, int):
        raise TypeError(f"{what} must be a whole number, not {number!r}")
    if number < least:
        raise ValueError(f"{what} must be at least {least}, not {number}")
    return number
