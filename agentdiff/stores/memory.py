"""The last events, in this process: for tests, and for programs that look at themselves."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Iterator, Sequence

from .base import Query, Record, Store

SIZE = 100_000


class MemoryStore(Store):
    """Keeps the last events in memory; they end with the process, and `close` keeps them.

    Args:
        size: how many: when another comes, the oldest goes.
    """

    def __init__(self, size: int = SIZE) -> None:
        if isinstance(size, bool) or not isinstance(size, int):
            raise TypeError(f"size must be a whole number, not {size!r}")
        if size < 1:
            raise ValueError(f"size must be at least 1, not {size}")
        self._size = size
        self._records: OrderedDict[str, Record] = OrderedDict()
        self._mutex = threading.Lock()

    def __repr__(self) -> str:
        return f"<MemoryStore {len(self._records)} of {self._size}>"

    def write(self, records: Sequence[Record]) -> None:
        with self._mutex:
            for record in records:
                self._records.setdefault(record.id, record)
                if len(self._records) > self._size:
                    self._records.popitem(last=False)

    def select(self, query: Query) -> Iterator[Record]:
        with self._mutex:
            records = list(self._records.values())
        ids = [record.id for record in records]
        begin = ids.index(query.after) + 1 if query.after in ids else 0
        return query.select(iter(records[begin:]))

    def forget(self) -> None:
        self._mutex = threading.Lock()
