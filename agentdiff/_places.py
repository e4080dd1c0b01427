"""Slots, and who is inside one lock: what the table decides for a name, once, without waiting.

All of `LockEntry` runs under the table's mutex. Beside it the free path goes on without one, see `_table.py`;
so whoever asks here who holds the name asks once, and goes by the answer.
"""

from __future__ import annotations

import itertools
from asyncio import AbstractEventLoop
from collections import deque
from collections.abc import Collection, Iterable, Iterator, Mapping
from types import MappingProxyType
from typing import Any, Callable, Optional, Protocol, Union

import attrs

from ._owner import HOLDS, GeneratorOwner, Owner, has_ended, in_words, loop_of
from ._waitqueue import Waiter, WaitQueue
from .deadlock import Hop, OtherWait, Wait
from .errors import check_amount

BY_HAND = -1
"""The depth of a slot whose last block was ended by `release()`, before its end."""


class Limiter(Protocol):
    """Where a slot says what its call has used, and that the API wants a pause."""

    def commit(self, slot: Slot, tokens: float) -> None: ...

    def hold_back(self, name: str, seconds: Optional[float]) -> None: ...


@attrs.frozen
class How:
    """How somebody takes a name: what its handle, or its agent, has been told."""

    timeout: Any = ...  # seconds, None for ever, `...` for what the coordinator says
    agent: Optional[str] = None
    lend: bool = True
    tokens: float = 0
    counted: Mapping[str, Any] = MappingProxyType({})  # by name: its charge, where it has been let in once


PLAIN = How()


class Door:
    """A name, and how it is taken: what all slots of one handle have in common."""

    __slots__ = ("how", "name", "table")

    def __init__(self, table: Limiter, name: str, how: How = PLAIN) -> None:
        self.table: Limiter = table
        self.name: str = name
        self.how: How = how


class Slot:
    """One held place under a lock or limit: what `with coord.lock(name) as slot` yields."""

    # `owner` is who holds it, None once it has ended; `since` is monotonic; `outer` is the slot entered
    # before in the same context; `depth` counts entries of its owner. Written by the table alone. There is
    # no __init__: this object is made for every entry, and a call would cost as much as all the rest.
    # `by_hand` counts the entries that `acquire()` made, and is there only if it made any; `charges` are what
    # its entries have cost, and are there only under a limit.
    __slots__ = ("by_hand", "charges", "depth", "door", "outer", "owner", "since")

    by_hand: int
    charges: list[Any]
    depth: int
    door: Door
    outer: Optional[Slot]
    owner: Optional[Owner]
    since: float

    @property
    def name(self) -> str:
        """The lock's name."""
        return self.door.name

    @property
    def agent(self) -> Optional[str]:
        """The agent that took it through `@coordinate(..., lock_name=...)`, else None."""
        return self.door.how.agent

    def commit(self, *, tokens: float) -> None:
        """Say how many tokens the call has used in the end; the rest of the reservation is free for others (R3).

        Until then, and where it is never said, the reservation counts. Said again, the last word counts. Without a
        limit of tokens it changes nothing.

        Args:
            tokens: all that this block has used, more than was reserved included.

        Raises:
            TypeError, ValueError: no number, or a negative one.
        """
        self.door.table.commit(self, check_amount("tokens", tokens))

    def throttled(self, *, retry_after: Optional[float] = None) -> None:
        """The API has answered "too many requests": nobody enters under this name until it wants calls again (R4).

        Who is inside already stays. The longest pause that was asked for counts.

        Args:
            retry_after: seconds from now; None, where the API named no time: one second.

        Raises:
            TypeError, ValueError: no number, or a negative one.
        """
        if retry_after is not None:
            check_amount("retry_after", retry_after)
        self.door.table.hold_back(self.name, retry_after)

    def count_by_hand(self) -> None:
        """`acquire()` has made an entry, and `release()` is to end it."""
        self.by_hand = getattr(self, "by_hand", 0) + 1

    def count_off_by_hand(self) -> bool:
        """`release()` ends an entry; False if it is a block's."""
        left = getattr(self, "by_hand", 0)
        if left:
            self.by_hand = left - 1
        return bool(left)

    def count_in(self, me: Owner) -> None:
        """One more entry of `me`, who is inside already."""
        owner = self.owner
        if owner is me:
            self.depth += 1
        else:
            assert isinstance(owner, GeneratorOwner)
            owner.guests[me] = owner.guests.get(me, 0) + 1

    def count_off(self, me: Owner) -> bool:
        """One entry of `me` less; False if there is none."""
        owner = self.owner
        if owner is me:
            self.depth -= 1
            return True
        if isinstance(owner, GeneratorOwner) and owner.guests.get(me):
            owner.guests[me] -= 1
            if not owner.guests[me]:
                del owner.guests[me]
            return True
        return False

    def is_empty(self) -> bool:
        """Whether all its entries have ended."""
        return self.depth <= 0 and not (isinstance(self.owner, GeneratorOwner) and self.owner.guests)

    def admits(self, me: Owner) -> bool:
        """Whether `me` is inside by this slot: its owner, or whoever drives the generator that owns it."""
        owner = self.owner
        return owner is me or (isinstance(owner, GeneratorOwner) and (owner.driver is me or me in owner.guests))

    def __repr__(self) -> str:
        return f"<Slot {self.name!r} {in_words(self.owner) if self.owner is not None else 'released'}>"


def closed() -> Slot:
    """What lies in a name's place for as long as nobody may take it the quick way."""
    slot = Slot()
    slot.owner = slot.outer = None
    slot.depth = 0
    return slot


Place = Waiter[Slot]


class Book:
    """What the entries of one table share."""

    __slots__ = ("blocked", "elsewhere", "entries", "now", "slots", "waiting", "woken")

    def __init__(self, now: Callable[[], float], storage: Callable[[], dict[str, Any]]) -> None:
        self.now: Callable[[], float] = now
        self.slots: dict[str, Slot] = storage()
        self.entries: dict[str, Entry] = storage()
        self.waiting: dict[Owner, Place] = {}
        self.blocked: dict[AbstractEventLoop, Owner] = {}  # loops whose thread sleeps in a blocking wait, and whose
        self.elsewhere: dict[Owner, OtherWait] = {}
        self.woken: deque[Place] = deque()  # whose bells are still to be rung, after the mutex

    def clear(self) -> None:
        """Nobody holds or waits any more."""
        self.slots.clear()
        self.entries.clear()
        self.waiting.clear()
        self.blocked.clear()
        self.elsewhere.clear()
        self.woken.clear()

    def list(self, waiter: Place) -> None:
        """`waiter` has joined a line; with a generator, whoever would take its first step waits too."""
        owner = waiter.owner
        self.waiting[owner] = waiter
        if isinstance(owner, GeneratorOwner) and owner.driver is not None:
            self.waiting[owner.driver] = waiter
        if waiter.blocks is not None:
            self.blocked[waiter.blocks] = waiter.owner

    def unlist(self, waiter: Place) -> None:
        """`waiter` stands in no line any more."""
        owner = waiter.owner
        if self.waiting.get(owner) is waiter:
            del self.waiting[owner]
        if isinstance(owner, GeneratorOwner) and owner.driver is not None and self.waiting.get(owner.driver) is waiter:
            del self.waiting[owner.driver]
        if waiter.blocks is not None and self.blocked.get(waiter.blocks) is waiter.owner:
            del self.blocked[waiter.blocks]

    def list_other(self, wait: OtherWait) -> None:
        """Somebody waits for something that is no lock."""
        self.elsewhere[wait.owner] = wait
        if wait.blocks is not None:
            self.blocked[wait.blocks] = wait.owner

    def unlist_other(self, wait: OtherWait) -> None:
        """It waits for that no more."""
        if self.elsewhere.get(wait.owner) is wait:
            del self.elsewhere[wait.owner]
        if wait.blocks is not None and self.blocked.get(wait.blocks) is wait.owner:
            del self.blocked[wait.blocks]


class Entry(Protocol):
    """What there is to know of a name, and to decide: one for locks, one for limits. All under the mutex."""

    line: WaitQueue[Slot]

    def join(self, waiter: Place) -> bool:
        """Whether it has joined the line of those who wait for somebody who waits for nobody; else: to be placed."""

    def place(self, waiter: Place) -> Optional[Slot]:
        """The slot by which the waiter is inside now; None: it has joined the line, if it has a bell."""

    def serve(self) -> None:
        """Appoint everybody whose turn it is."""

    def exit(self, slot: Slot, me: Owner) -> bool:
        """End one entry of `me`; False if there is none."""

    def settle(self, slot: Slot) -> None:
        """The slot was taken the quick way, and is not to be."""

    def forsake(self, waiter: Place) -> None:
        """The waiter has given up, in line or just appointed."""

    def mine(self, me: Owner) -> Optional[Slot]:
        """The slot by which `me` is inside."""

    def inside(self) -> Collection[Slot]:
        """Who is inside at this moment."""

    def loans(self) -> list[tuple[Slot, bool]]:
        """Who is inside, and whether on loan."""

    def wait_of(self, waiter: Place) -> Wait:
        """Whom the waiter, which is in line, waits for (L5)."""

    def holder(self) -> Optional[Slot]:
        """Whom to name when somebody asks who has it."""

    def tidy(self) -> None:
        """A name of which there is nothing to know costs nothing (L9)."""


def lender(inside: Union[list[Slot], dict[Slot, list[Slot]]], claim: Slot) -> Optional[Slot]:
    """The nearest ancestor of the claim that is inside (L2)."""
    outer = claim.outer
    while outer is not None:
        if outer.name == claim.name and outer in inside:
            return outer
        outer = outer.outer
    if isinstance(claim.owner, GeneratorOwner):
        for held in reversed(inside):  # a generator within another's steps, or between them, of the same driver
            holder = held.owner
            if isinstance(holder, GeneratorOwner) and holder.driver is claim.owner.driver:
                return held
    return None


def hops_to(waiter: Place, slots: Iterable[Slot]) -> list[Hop]:
    """That the waiter waits for those who are inside by these slots."""
    me, name = waiter.owner, waiter.claim.name
    inside = [(slot.owner, slot.since) for slot in slots]  # asked once: it may leave the quick way at any time
    return [Hop(me, owner, name, since) for owner, since in inside if owner is not None and owner is not me]


def ahead_of(waiter: Place, line: WaitQueue[Slot]) -> Iterator[Place]:
    """Those who stand ahead in line."""
    return itertools.takewhile(lambda other: other is not waiter, line)


class LockEntry:
    """A lock beyond its holder; it exists only while there is something to know."""

    __slots__ = ("book", "chain", "evicted", "hopeful", "line", "name", "root", "slots")

    def __init__(self, name: str, book: Book) -> None:
        self.name: str = name
        self.book: Book = book
        self.slots: dict[str, Slot] = book.slots
        self.line: WaitQueue[Slot] = WaitQueue()
        self.hopeful: dict[Place, None] = {}  # those in line who may borrow
        self.chain: list[Slot] = []  # borrowers inside, each borrowing from the one before, the first from the root
        self.root: Optional[Slot] = None  # from whom the first of the chain borrows
        self.evicted: set[Slot] = set()  # took the name while it was only lent; each comes to settle

    # -- who is inside ------------------------------------------------------------------------------------

    def inside(self) -> list[Slot]:
        """Who is inside at this moment, the root first.

        The root may leave the quick way at any time, if it looked for an entry before there was one. It looks again,
        and will wait for the mutex to hand over.
        """
        root = self.slots.get(self.name)
        if root is None:
            return self.chain.copy()
        return [root, *self.chain] if self.chain else [root]

    def loans(self) -> list[tuple[Slot, bool]]:
        return [(slot, place > 0) for place, slot in enumerate(self.inside())]

    def mine(self, me: Owner) -> Optional[Slot]:
        for slot in self.inside():
            if slot.owner is me or slot.admits(me):
                return slot
        return None

    def holder(self) -> Optional[Slot]:
        return self.chain[-1] if self.chain else self.slots.get(self.name)

    def wait_of(self, waiter: Place) -> Wait:
        inside = self.inside()
        by = lender(inside, waiter.claim)
        hops = hops_to(waiter, inside if by is None else inside[inside.index(by) + 1 :])
        if self.book.blocked:  # else those ahead wait for nobody that isn't named already
            hops += [Hop(waiter.owner, other.owner, self.name, None) for other in ahead_of(waiter, self.line)]
        return Wait(hops)

    # -- coming in ----------------------------------------------------------------------------------------

    def place(self, waiter: Place) -> Optional[Slot]:
        claim = waiter.claim
        me = waiter.owner
        if self.chain or self.hopeful or (self.line and self.name not in self.slots):
            self.serve()
        inside = self.inside()
        for slot in inside:
            owner = slot.owner
            if owner is me or (owner.__class__ is GeneratorOwner and slot.admits(me)):
                slot.count_in(me)
                return slot
        if not inside:
            if self.slots.setdefault(self.name, claim) is claim:
                return claim
            inside = self.inside()
        by = lender(inside, claim) if claim.outer is not None or claim.owner.__class__ is GeneratorOwner else None
        if by is not None and by is inside[-1]:
            self._lend(inside, claim)
            return claim
        if waiter.bell is not None:
            self.line[waiter] = None
            if by is not None:
                self.hopeful[waiter] = None
            self.book.list(waiter)
        return None

    def join(self, waiter: Place) -> bool:
        """What `place` and a look for rings come to in the plainest case: to stand behind others.

        Whoever is next waits for this, if the one who joins has just left: it can go on when that sleeps, not before.
        """
        me, book = waiter.owner, self.book
        if not self.line or self.chain or self.hopeful or waiter.claim.outer is not None or waiter.bell is None:
            return False
        root = self.slots.get(self.name)
        if root is None or root.owner is me or root.owner in book.waiting or book.elsewhere or book.blocked:
            return False
        if waiter.blocks is not None or GeneratorOwner in (me.__class__, root.owner.__class__):
            return False
        self.line[waiter] = None
        book.waiting[me] = waiter
        return True

    def _lend(self, inside: list[Slot], claim: Slot) -> None:
        if not self.chain:
            self.root = inside[0]
        self.chain.append(claim)

    def serve(self) -> None:
        if self.chain:
            self._mend()
        if self.line and not self.chain:
            heir = next(iter(self.line))
            if self.slots.setdefault(self.name, heir.claim) is heir.claim:
                self._appoint(heir)
        while self.hopeful:
            inside = self.inside()
            borrower = next((w for w in self.hopeful if inside and lender(inside, w.claim) is inside[-1]), None)
            if borrower is None:
                break
            self._lend(inside, borrower.claim)
            self._appoint(borrower)

    def _appoint(self, waiter: Place) -> None:
        self._unlist(waiter)
        waiter.claim.since = self.book.now()
        waiter.served = True
        self.book.woken.append(waiter)

    def _unlist(self, waiter: Place) -> None:
        self.line.pop(waiter, None)
        if self.hopeful:
            self.hopeful.pop(waiter, None)
        self.book.unlist(waiter)

    # -- going out ----------------------------------------------------------------------------------------

    def exit(self, slot: Slot, me: Owner) -> bool:
        done = slot.count_off(me)
        if done and slot.is_empty():
            self._leave(slot)
        return done

    def _leave(self, slot: Slot) -> None:
        """Take a slot out; what it had lent stays inside, on loan from its own lender or as the new root."""
        chain = self.chain
        if chain:
            self._mend()
        if slot in chain:
            chain.remove(slot)
        elif self.slots.get(self.name) is slot:
            if chain:
                self.slots[self.name] = self.root = chain.pop(0)
            elif self.line:  # in one step, so that no newcomer finds the name free
                heir = next(iter(self.line))
                self.slots[self.name] = heir.claim
                self._appoint(heir)
                if not self.hopeful:
                    slot.owner = None
                    return self.tidy()
            else:
                del self.slots[self.name]
        slot.owner = None
        if self.hopeful or (self.line and not chain):
            self.serve()
        self.tidy()

    def hand_over(self, slot: Slot) -> bool:
        """What `exit` and all behind it come to in the plainest case; False where this is another.

        Everybody waits for this. So a thread is woken before the rest is done: it needs longer to wake than that takes.
        """
        line = self.line
        if not line or self.chain or self.hopeful or self.evicted or slot.owner.__class__ is GeneratorOwner:
            return False
        try:
            heir = next(iter(line))
            self.slots[self.name] = claim = heir.claim
            heir.served = True
            book, bell = self.book, heir.bell
            if bell is None or bell.loop is not None or not bell.ring():
                book.woken.append(heir)
            claim.since = book.now()
            slot.owner = None
            slot.depth = 0
            book.unlist(heir)
            del line[heir]
            if not line:
                self.tidy()
        except BaseException:  # Ctrl-C in just this moment: what has begun is brought to its end
            if slot.owner is not None:
                self.exit(slot, slot.owner)
            self.serve()
            self.tidy()
            raise
        return True

    def forsake(self, waiter: Place) -> None:
        if waiter in self.line:
            self._unlist(waiter)
        self._leave(waiter.claim)

    def settle(self, slot: Slot) -> None:
        if self.chain:
            self._mend()
        self.evicted.discard(slot)
        self._leave(slot)

    def _mend(self) -> None:
        """The root left the quick way while it was lent: the first borrower is the root now.

        Whoever took the name in that moment took it before it looked for an entry; it will, and settle.
        """
        if self.slots.get(self.name) is self.root:
            return
        self.root = heir = self.chain.pop(0)
        found = self.slots.setdefault(self.name, heir)
        if found is not heir:
            self.evicted.add(found)
            self.slots[self.name] = heir

    def tidy(self) -> None:
        if not (self.line or self.chain or self.evicted or self._is_a_generators()):
            self.book.entries.pop(self.name, None)

    def _is_a_generators(self) -> bool:
        """Whether a generator has it, whose driver leaves blocks of its own within: never the quick way."""
        root = self.slots.get(self.name)
        return root is not None and root.owner.__class__ is GeneratorOwner


def live(slot: Slot) -> Optional[Slot]:
    """The nearest slot of a chain that hasn't ended; shortens the chain behind it, so that it can't grow for ever."""
    found: Optional[Slot] = slot
    while found is not None and found.owner is None:
        found = found.outer
    if found is not None:
        beyond = found.outer
        while beyond is not None and beyond.owner is None:
            beyond = beyond.outer
        found.outer = beyond
    return found


def released_inside(name: str) -> bool:
    """Whether the slot that this context entered last under the name was let go by hand: its block has lost it."""
    slot: Optional[Slot] = HOLDS.get()
    while slot is not None and slot.name != name:
        slot = slot.outer
    return slot is not None and slot.depth == BY_HAND


def the_only_one(inside: Collection[Slot], loop: Optional[AbstractEventLoop] = None) -> Optional[Slot]:
    """Whose entry it must be, if only one is inside, or only one of them has ended, or is a task of this loop."""
    if len(inside) > 1:
        ended = [slot for slot in inside if slot.owner is not None and has_ended(slot.owner)]
        here = [slot for slot in inside if loop is not None and slot.owner is not None and loop_of(slot.owner) is loop]
        inside = ended or here
    return next(iter(inside)) if len(inside) == 1 else None
