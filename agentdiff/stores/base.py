"""What a store is: it keeps records, and gives them back in the order of writing (S1)."""

from __future__ import annotations

import json
import re
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from itertools import islice
from math import isnan
from types import TracebackType
from typing import Any, NamedTuple, Optional

import attrs

from ..errors import StoreError
from ..events import Event, as_regex, check_name, is_pattern

__all__ = ["Query", "Record", "Store", "StoreError"]


class Record(NamedTuple):
    """An event as a store gets it: nothing but text, and its time.

    Every text can be encoded as UTF-8; `data` is JSON, and no longer than `max_payload`.
    """

    id: str
    name: str
    time: float
    sender: Optional[str]
    run_id: Optional[str]
    parent_id: Optional[str]
    data: str

    def as_event(self) -> Event:
        """The event again; its data is what JSON says of it."""
        return Event(
            name=self.name,
            data=json.loads(self.data),
            sender=self.sender,
            id=self.id,
            time=self.time,
            run_id=self.run_id,
            parent_id=self.parent_id,
        )


@attrs.frozen(kw_only=True)
class Query:
    """Which records are wanted; None: whichever.

    Attributes:
        name: a name, or a pattern as in E9.
        run: a run's id.
        since: emitted then or later, in seconds since the epoch.
        until: emitted then or earlier.
        limit: so many at most: the first ones.
        after: only those that were written after the record of this id; an unknown one: all.
    """

    name: Optional[str] = None
    run: Optional[str] = None
    since: Optional[float] = None
    until: Optional[float] = None
    limit: Optional[int] = None
    after: Optional[str] = None

    @property
    def pattern(self) -> Optional[str]:
        """The name, where it stands for more than one."""
        return self.name if self.name is not None and is_pattern(self.name) else None

    def select(self, records: Iterator[Record]) -> Iterator[Record]:
        """Those that are wanted, of what comes after `after`: for stores that can't look for them themselves."""
        matches = re.compile(as_regex(self.name), re.DOTALL).fullmatch if self.name is not None else None
        wanted = (
            record
            for record in records
            if (matches is None or matches(record.name))
            and (self.run is None or record.run_id == self.run)
            and (self.since is None or record.time >= self.since)
            and (self.until is None or record.time <= self.until)
        )
        return islice(wanted, self.limit)


class Store(ABC):
    """Keeps events. Yours implements `write` and `select`, and `close` where there is something to let go of.

    `write` is called by one background thread of each coordinator that has this store, the others by anybody.
    """

    @abstractmethod
    def write(self, records: Sequence[Record]) -> None:
        """Keep a batch, in this order, after what was written before.

        It may be called again with the same batch after it has raised: what was kept already, by its id, is not kept
        twice.

        Raises:
            TypeError, ValueError: a record can never be kept; the writer finds out which, and gives that up.
            Exception: anything else, such as `StoreError`: the store is away for now; the writer comes again.
        """

    @abstractmethod
    def select(self, query: Query) -> Iterator[Record]:
        """The records that are wanted, in the order of writing. Others may write meanwhile."""

    def close(self) -> None:  # noqa: B027  (nothing to let go of is no fault)
        """Let go of files and connections. Whatever is written or read later opens them again."""

    def forget(self) -> None:  # noqa: B027
        """After a fork, in the child: connections and locks are the parent's; leave them alone, begin anew (L13)."""

    def read(
        self,
        *,
        name: Optional[str] = None,
        run: Optional[str] = None,
        since: Optional[float] = None,
        until: Optional[float] = None,
        limit: Optional[int] = None,
        after: Optional[str] = None,
    ) -> Iterator[Event]:
        """The events that were written, in the order of writing; also while others write (S1).

        Args:
            name: only events of this name; `*` stands for any characters, `?` for any one.
            run: only those of this run.
            since: only those emitted then or later, in seconds since the epoch.
            until: only those emitted then or earlier.
            limit: the first so many at most.
            after: the id of an event: only those written after it. So a follower asks for what is new; if the event
                isn't there any more, all are given.

        Raises:
            TypeError, ValueError: an argument that makes no sense.
            StoreError: the store can't be read.
        """
        if name is not None:
            check_name(name)
        for what, text in (("run", run), ("after", after)):
            if text is not None and not isinstance(text, str):
                raise TypeError(f"{what} must be a string, not {text!r}")
        for what, moment in (("since", since), ("until", until)):
            if moment is not None and (isinstance(moment, bool) or not isinstance(moment, (int, float))):
                raise TypeError(f"{what} must be seconds since the epoch, not {moment!r}")
            if moment is not None and isnan(moment):
                raise ValueError(f"{what} must be seconds since the epoch, not {moment!r}")
        if limit is not None and (isinstance(limit, bool) or not isinstance(limit, int)):
            raise TypeError(f"limit must be a whole number, not {limit!r}")
        if limit is not None and limit < 0:
            raise ValueError(f"limit must be 0 or more, not {limit}")
        found = self.select(Query(name=name, run=run, since=since, until=until, limit=limit, after=after))
        return (record.as_event() for record in found)

    def __enter__(self: Any) -> Any:
        return self

    def __exit__(
        self, kind: Optional[type[BaseException]], error: Optional[BaseException], trace: Optional[TracebackType]
    ) -> None:
        self.close()
