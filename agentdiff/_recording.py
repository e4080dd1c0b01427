"""Between a bus and a store: what is opened, and what is written of an event (S1, S4). Loaded when there is a store."""

from __future__ import annotations

from typing import Any, Optional, Union

from ._clock import Clock
from ._lanes import Delivery
from ._workers import stop_at_exit
from .bus import Bus
from .stores import Record, Store, open_store
from .stores.encoding import Encoder, clean
from .stores.writer import Writer


def start_writing(
    bus: Bus,
    clock: Clock,
    store: Union[str, Store],
    *,
    name: str,
    flush_timeout: Optional[float],
    redact: Any,
    max_payload: int,
) -> Writer:
    """Have every event of a bus written to a store from now on.

    Raises:
        TypeError, ValueError: no store, or no URL of one.
        StoreError: it can't be opened.
    """
    encode = Encoder(redact, max_payload)
    if not isinstance(store, (str, Store)):
        raise TypeError(f"store must be a URL or an agentdiff.stores.Store, not {store!r}")
    opened = open_store(store) if isinstance(store, str) else store
    make = tuple.__new__  # the writer's speed is that of these lines
    ids_of, parameters_of, masks = bus.ids_of, bus.parameters.get, bool(encode.redact)

    def record_of(delivery: Delivery) -> Record:
        event_id, run_id, parent_id = ids_of(delivery)
        name, sender = delivery.name, delivery.sender
        facts = (
            event_id,
            name if type(name) is str and name.isascii() else clean(name),
            delivery.time,
            sender if sender is None else clean(sender),
            run_id if run_id is None else clean(run_id),
            parent_id,
            encode(delivery.data, parameters_of(name, ())) if masks else encode(delivery.data),
        )
        return make(Record, facts)

    writer = Writer(
        opened, record_of, clock, name=name, flush_timeout=flush_timeout, owns=opened is not store
    )  # a store object is its owner's to close
    writer.start()  # now, since at the exit of the process no thread may be startable any more
    bus.give_to(writer.keeper())
    stop_at_exit(writer)
    return writer
