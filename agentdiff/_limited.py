"""Who is inside a limited name, who waits for it, and for what: all of it under the table's mutex.

`LimitEntry` decides for such a name as `LockEntry` does for a lock; what has been used is in its `Account`.
"""

from __future__ import annotations

from asyncio import AbstractEventLoop
from collections import defaultdict
from collections.abc import Container, Iterable, Iterator
from typing import Any, Optional, Union

import attrs

from ._owner import GeneratorOwner, Owner
from ._places import Book, LockEntry, Place, Slot, ahead_of, closed, hops_to, lender
from ._waitqueue import WaitQueue
from .deadlock import Hop, LimitInfo, Party, Wait
from .limits import Account, Charge, Limit

Loop = Optional[AbstractEventLoop]
"""Where a waiter sleeps; None: on its thread."""


class Request:
    """What a waiter asks of a limit, and what has become of it.

    `counted` is the charge of one that has been let in before, and asks for a place only.
    """

    __slots__ = ("charge", "counted", "due", "error", "slot")

    def __init__(self, counted: Optional[Charge] = None) -> None:
        self.counted: Optional[Charge] = counted
        self.due: Optional[float] = None  # when to look again, for the one whose turn is next
        self.slot: Optional[Slot] = None  # by which it is inside: its claim, or a slot that it has entered again
        self.charge: Optional[Charge] = None
        self.error: Optional[ValueError] = None  # the limit has been changed: it can never be granted


class LimitEntry:
    """Who is inside a limited name, who waits, who comes next (R1, R2).

    First come, first served (L3), and whoever is first waits until all that it asks for is there, so that a big
    request doesn't starve behind small ones. Before them come those who need no place: a holder that enters again
    and a borrower, since nobody can leave who is kept from going on inside. And those who need nothing but a place.

    A name that is limited never goes the quick way: a slot of ours lies in the table's dict, which nobody owns.
    """

    __slots__ = ("_chains", "_closed", "_due", "_evicted", "_former", "_owners", "_places", "_sides", "account", "book",
                 "declared", "hopeful", "limit", "line", "name")  # fmt: skip

    def __init__(self, name: str, book: Book, limit: Limit, before: LockEntry) -> None:
        self.name: str = name
        self.book: Book = book
        self.limit: Limit = limit
        self.declared = False  # as long as it isn't, it is a lock that the API holds back
        self.account: Account = Account(limit)
        self.line: WaitQueue[Slot] = before.line
        self.hopeful: dict[Place, None] = before.hopeful  # those in line who may pass the others
        self._sides: defaultdict[Loop, WaitQueue[Slot]] = defaultdict(WaitQueue)  # the line of each
        self._due: Optional[float] = None  # when the next one's time comes, if time is what it waits for
        chain = [slot for slot, _ in before.loans()]
        self._former = chain[0] if chain else None  # it may still leave the quick way
        self._chains: dict[Slot, list[Slot]] = dict.fromkeys(chain, chain)  # who has the place of each, and borrows it
        self._owners: dict[Owner, Slot] = _by_owner(chain)
        self._places = 1 if chain else 0
        self._closed = closed()
        for waiter in self.line:
            waiter.request = Request()
            self._list(waiter)
        self._evicted = before.evicted  # took the name the quick way since then; each comes to settle
        self._close()

    def _close(self) -> None:
        """Nobody takes the name the quick way. Whoever just has will see that there is an entry."""
        found = self.book.slots.setdefault(self.name, self._closed)
        if found is not self._closed:
            self.book.slots[self.name] = self._closed
            if found is not self._former:
                self._evicted.add(found)

    def renewed(self) -> LimitEntry:
        """The same limit, and nobody holds or waits any more (L13)."""
        renewed = LimitEntry(self.name, self.book, self.limit, LockEntry(self.name, self.book))
        renewed.declared = self.declared
        renewed.account = self.account
        self.account.forget_open()
        return renewed

    # -- who is inside ------------------------------------------------------------------------------------

    def inside(self) -> list[Slot]:
        return list(self._chains)

    def loans(self) -> list[tuple[Slot, bool]]:
        return [(slot, chain[0] is not slot) for slot, chain in self._chains.items()]

    def mine(self, me: Owner) -> Optional[Slot]:
        slot = self._owners.get(me)
        if slot is not None:
            return slot
        for owner, slot in self._owners.items():
            if isinstance(owner, GeneratorOwner) and slot.admits(me):
                return slot
        return None

    def holder(self) -> Optional[Slot]:
        return None if self._has_room() else next(iter(self._chains), None)

    def _has_room(self) -> bool:
        return self.limit.concurrency is None or self._places < self.limit.concurrency

    def is_free(self) -> bool:
        """Whether somebody new would get in at once."""
        self.serve()
        due = self._next_due()
        return not self.line and due is not None and due <= self.book.now()

    def _next_due(self) -> Optional[float]:
        """When the next in line can enter, else a call without tokens; None: as soon as somebody leaves."""
        if self.line or not self._has_room():
            return self._due
        return self.account.due(self.book.now(), 0)

    # -- who waits for whom: for those inside, and those who were let in and can't enter; never for time --------------

    def wait_of(self, waiter: Place) -> Wait:
        me = waiter.owner
        lenders, _ = self._lenders_place(waiter)
        in_the_way = [] if self._opening(waiter) else [slot for slot in self._chains if slot not in lenders]
        hops = hops_to(waiter, in_the_way)
        hops += [Hop(me, other.owner, self.name, other.claim.since) for other in self.account.open.values()]
        if self.book.blocked:
            ahead = filter(self._is_blocked, ahead_of(waiter, self.line))
            hops += [Hop(me, other.owner, self.name, None) for other in ahead]
        return Wait(hops, lambda free: self._comes_in(waiter, free))

    def _lenders_place(self, waiter: Place) -> tuple[list[Slot], list[Slot]]:
        """Who has the place of the waiter's lender: up to the lender, and those to whom it is lent beyond."""
        by = lender(self._chains, waiter.claim)
        if by is None:
            return [], []
        chain = self._chains[by]
        lent = chain.index(by) + 1
        return chain[:lent], chain[lent:]

    def _is_blocked(self, waiter: Place) -> bool:
        """Whether it couldn't enter if it were let in: its loop's thread sleeps in a blocking acquire."""
        return _loop_of(waiter) in self.book.blocked

    def _comes_in(self, waiter: Place, free: Container[Party]) -> bool:
        """Whether it does some time, if of all others only those go on who are in `free`.

        The places, requests and tokens of those who don't go on are lost; and what those ahead ask for must be there.
        """
        limit = self.limit
        staying = [slot for slot in self._chains if slot.owner is not None and slot.owner not in free]
        places = len({id(self._chains[slot]) for slot in staying})
        granted = [other for other in self.account.open.values() if other.owner not in free]
        lenders, lent = self._lenders_place(waiter)
        passes = bool(self._opening(waiter)) or bool(lenders and not set(lent) & set(staying))
        asking = self.line if not passes and (granted or self.book.blocked) else (waiter,)
        for other in asking if waiter.request.counted is None else ():
            if limit.requests is not None and len(granted) >= limit.requests:
                return False
            if limit.tokens is not None and sum(one.tokens for one in (*granted, other)) > limit.tokens:
                return False
            if other is waiter:
                break
            if other.owner not in free and self._is_blocked(other):  # its turn comes, and it can't take it
                granted += [other] if other.request.counted is None else []
                places += other not in self.hopeful
        return passes or limit.concurrency is None or places < limit.concurrency

    # -- coming in ----------------------------------------------------------------------------------------

    def _opening(self, waiter: Place) -> Union[Slot, list[Slot], None]:
        """The slot that it would enter again, or the place that it would take; None if there is none now."""
        again = self.mine(waiter.owner)
        if again is not None:
            return again
        by = lender(self._chains, waiter.claim)
        if by is not None and self._chains[by][-1] is by:
            return self._chains[by]
        return [] if self._has_room() else None

    def join(self, waiter: Place) -> bool:
        return False

    def place(self, waiter: Place) -> Optional[Slot]:
        refusal = self.limit.refusal(self.name, waiter.tokens)
        if refusal is not None:
            raise refusal
        counted = waiter.claim.door.how.counted.get(self.name)
        waiter.request = Request(counted)
        self._list(waiter)
        if counted or self.mine(waiter.owner) or lender(self._chains, waiter.claim):
            self.hopeful[waiter] = None
        self.serve(waiter)
        if waiter.served:
            slot: Slot = waiter.request.slot
            return slot
        if waiter.bell is None:
            self._unlist(waiter)
        else:
            self.book.list(waiter)
        return None

    def _due_of(self, waiter: Place, now: float) -> Optional[float]:
        if waiter.request.counted is not None:
            return max(now, self.account.resume_at)
        return self.account.due(now, waiter.tokens)

    def _let_in(self, waiter: Place) -> Slot:
        opening = self._opening(waiter)
        claim = slot = waiter.claim
        if isinstance(opening, Slot):
            slot = opening
            slot.count_in(waiter.owner)
        else:
            chain = opening if opening is not None else []
            self._places += not chain
            chain.append(claim)
            self._chains[claim] = chain
            self._owners[waiter.owner] = claim
            claim.since = self.book.now()
        charge = waiter.request.counted or self.account.charge(waiter)
        if hasattr(slot, "charges"):
            slot.charges.append(charge)
        else:
            slot.charges = [charge]
        waiter.request.slot = slot
        waiter.request.charge = charge
        return slot

    def serve(self, awake: Optional[Place] = None) -> None:
        self._mend()
        now = self.book.now()
        self.account.expire(now)
        while True:
            waiter = self._next()
            due = self._due_of(waiter, now) if waiter is not None else None
            if waiter is None or due is None or due > now:
                break
            self._unlist(waiter)
            self._let_in(waiter)
            waiter.served = True
            if waiter is not awake:
                self.book.woken.append(waiter)
        self._watch(due, awake)

    def _next(self) -> Optional[Place]:
        """Whose turn it is, once the account allows it; None if nobody could come in even then."""
        for waiter in self.hopeful:
            opening = self._opening(waiter)
            if opening or (opening is not None and waiter.request.counted is not None):
                return waiter  # it has a place already, or needs nothing else
        first = next(iter(self.line), None)
        return first if first is not None and self._opening(first) is not None else None

    def _watch(self, due: Optional[float], awake: Optional[Place]) -> None:
        """Have the first in line of each loop, and the first thread, look again when the next one's time has come.

        One alone might be a task whose loop is busy then, or closed.
        """
        self._due = due
        for side in self._sides.values():
            first = next(iter(side))
            if first.request.due != due:
                first.request.due = due
                if due is not None and first is not awake:
                    self.book.woken.append(first)

    def _list(self, waiter: Place) -> None:
        side = self._sides[_loop_of(waiter)]
        self.line[waiter] = side[waiter] = None

    def _unlist(self, waiter: Place) -> None:
        loop = _loop_of(waiter)
        side = self._sides[loop]
        del self.line[waiter], side[waiter]
        if not side:
            del self._sides[loop]
        self.hopeful.pop(waiter, None)
        self.book.unlist(waiter)

    def enter(self, slot: Slot) -> None:
        """The block of the slot is entered now, by whoever was let in (R2)."""
        now = self.book.now()
        for charge in slot.charges:
            self.account.enter(charge, now)
        self.serve()

    # -- going out ----------------------------------------------------------------------------------------

    def exit(self, slot: Slot, me: Owner) -> bool:
        if slot not in self._chains or not slot.count_off(me):
            return False
        charges = getattr(slot, "charges", [])
        if charges and charges[-1] in self.account.open:  # it was taken with others, and not all could be had
            self.account.refund(charges.pop())
        elif len(charges) > 1:  # the last is kept: `commit` may come after the block
            charges.pop()
        if slot.is_empty():
            self._leave(slot)
        self._go_on()
        return True

    def _leave(self, slot: Slot) -> None:
        """Take a slot out; the place is free when all who borrow it have left."""
        chain = self._chains.pop(slot)
        chain.remove(slot)
        self._places -= not chain
        owner, slot.owner = slot.owner, None
        if owner is not None and self._owners.get(owner) is slot:
            del self._owners[owner]

    def forsake(self, waiter: Place) -> None:
        if waiter in self.line:
            self._unlist(waiter)
        else:
            self._take_back(waiter)
        self._go_on()

    def _take_back(self, waiter: Place) -> None:
        """It was let in, and will not enter."""
        request = waiter.request
        if request is None:  # appointed when the name was a lock still
            if waiter.claim in self._chains:
                self._leave(waiter.claim)
        elif request.charge is not None:
            slot, charge = request.slot, request.charge
            request.charge = None
            self.account.refund(charge)
            if charge in slot.charges:
                slot.charges.remove(charge)
            if slot in self._chains and slot.count_off(waiter.owner) and slot.is_empty():
                self._leave(slot)

    def settle(self, slot: Slot) -> None:
        slot.owner = None
        self._evicted.discard(slot)
        self._go_on()

    def _go_on(self) -> None:
        self.serve()
        self.tidy()

    def _mend(self) -> None:
        """Whoever held the name when it was a lock may leave the quick way, and let others in behind it.

        And who was let in on a loop that was closed before it could enter never will.
        """
        for waiter in tuple(self.account.open.values()):
            loop = _loop_of(waiter)
            if loop is not None and loop.is_closed():
                self._take_back(waiter)
        self._close()
        former = self._former
        if former is not None and former.owner is None:
            self._former = None
            if former in self._chains:
                self._leave(former)
                self._owners = _by_owner(self._chains)

    def tidy(self) -> None:
        """What was declared stays; a lock that was held back is one again when that is over (L9)."""
        kept = self.declared or self.line or self._chains or self._evicted
        if not kept and self.account.resume_at <= self.book.now() and self.book.entries.get(self.name) is self:
            del self.book.entries[self.name], self.book.slots[self.name]

    # -- what users say -----------------------------------------------------------------------------------

    def change(self, limit: Limit) -> None:
        """The limit has been declared, or declared anew."""
        self.declared = True
        self.limit = self.account.limit = limit
        for waiter in list(self.line):
            waiter.request.error = limit.refusal(self.name, waiter.tokens)
            if waiter.request.error is not None:
                self._unlist(waiter)
                self.book.woken.append(waiter)
        self.serve()

    def commit(self, slot: Slot, tokens: float) -> None:
        """The innermost entry of the slot has used so many tokens (R3)."""
        if slot.charges:
            self.account.settle(slot.charges[-1], tokens)
            self.serve()

    def hold_back(self, until: float) -> None:
        """Nobody enters before (R4)."""
        self.account.resume_at = max(self.account.resume_at, until)
        self.serve()

    def info(self) -> LimitInfo:
        """What it allows, and what is used (L11)."""
        self.serve()
        now = self.book.now()
        account = self.account
        due = self._next_due()
        return LimitInfo(
            name=self.name,
            **attrs.asdict(self.limit),
            places_taken=self._places,
            requests_used=account.used,
            tokens_used=account.tokens,
            next_free=due - now if due is not None else None,
            held_back_for=max(account.resume_at - now, 0.0),
            waiting=len(self.line),
        )


def _by_owner(slots: Iterable[Slot]) -> dict[Owner, Slot]:
    owners = [(slot.owner, slot) for slot in slots]  # asked once: it may leave the quick way at any time
    return {owner: slot for owner, slot in owners if owner is not None}


def _loop_of(waiter: Place) -> Loop:
    """Where it sleeps."""
    return waiter.bell.loop if waiter.bell is not None else None


def all_limits(entries: Any) -> Iterator[LimitEntry]:
    """Those of them that are limits."""
    return (entry for entry in entries if isinstance(entry, LimitEntry))
