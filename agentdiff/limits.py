"""Limits: how many at once, how many requests and tokens in any window of time; and who waits for which.

A limit is declared once, and the locks of its name obey it. `LimitEntry` decides for such a name, under the table's
mutex, as `LockEntry` does for a lock; an `Account` counts what has been used.

What an entry has been granted is an open charge until its thread or task is awake and enters the block. Only from
then on its window runs: R2 is measured there, and a thread that is slow to wake must not make the window longer.
"""

from __future__ import annotations

from asyncio import AbstractEventLoop
from collections import deque
from collections.abc import Container, Iterator
from typing import Any, Optional, Union

import attrs

from ._owner import GeneratorOwner, Owner
from ._places import Book, LockEntry, Place, Slot, ahead_of, closed, hops_to, lender
from ._waitqueue import WaitQueue
from .deadlock import Hop, LimitInfo, Party, Wait
from .errors import check_amount


def _check_count(limit: Limit, attribute: Any, number: Any) -> None:
    if number is None:
        return
    what = attribute.name
    if isinstance(number, bool) or not isinstance(number, int):
        raise TypeError(f"{what} must be a whole number or None, not {type(number).__name__}: {number!r}")
    if number < 1:
        raise ValueError(f"{what} must be at least 1, not {number}: nobody would ever get in")


def _check_seconds(limit: Limit, attribute: Any, seconds: Any) -> None:
    check_amount(attribute.name, seconds)
    if not seconds and attribute.name == "per":
        raise ValueError("per must be more than 0 seconds")


@attrs.frozen
class Limit:
    """What a name allows (R1); None is no limit. `per` and `margin` are seconds."""

    concurrency: Optional[int] = attrs.field(default=None, validator=_check_count)
    requests: Optional[int] = attrs.field(default=None, validator=_check_count)
    tokens: Optional[int] = attrs.field(default=None, validator=_check_count)
    per: float = attrs.field(default=60.0, validator=_check_seconds)
    margin: float = attrs.field(default=0.1, validator=_check_seconds)

    def __attrs_post_init__(self) -> None:
        if self.concurrency is None and self.requests is None and self.tokens is None:
            raise ValueError("a limit needs at least one of concurrency, requests and tokens")

    def refusal(self, name: str, tokens: float) -> Optional[ValueError]:
        """What to say to a request that can never be granted (R5)."""
        if self.tokens is None or tokens <= self.tokens:
            return None
        return ValueError(
            f"{tokens:.15g} tokens can never be had from limit {name!r}: it allows {self.tokens} in {self.per:g} s"
        )


class Charge:
    """What one entry costs: a request, and tokens. `at` is when its block was entered, None before."""

    __slots__ = ("at", "counts", "entry", "tokens")

    def __init__(self, entry: LimitEntry, tokens: float) -> None:
        self.entry: LimitEntry = entry
        self.tokens: float = tokens
        self.at: Optional[float] = None
        self.counts: bool = True  # until its window is over

    def enter(self, now: float) -> None:
        """The block is entered now."""
        if self.entry.account.enter(self, now):
            self.entry.serve()


class Account:
    """What has been used within the window; exact, whatever the order of things."""

    __slots__ = ("entered", "limit", "open", "resume_at", "tokens")

    def __init__(self, limit: Limit) -> None:
        self.limit: Limit = limit
        self.entered: deque[Charge] = deque()  # in the order of their times
        self.open: dict[Charge, Place] = {}  # what has not been entered yet, and who is to enter it
        self.tokens: float = 0  # of all these
        self.resume_at: float = 0.0  # nobody enters before (R4)

    @property
    def used(self) -> int:
        """How many requests count at the moment."""
        return len(self.entered) + len(self.open)

    def charge(self, entry: LimitEntry, waiter: Place) -> Charge:
        """Grant an entry: it counts at once, and its window begins with `enter`."""
        charge = Charge(entry, waiter.tokens)
        self.open[charge] = waiter
        self.tokens += charge.tokens
        return charge

    def enter(self, charge: Charge, now: float) -> bool:
        """The block of the charge is entered now; False if it was before, or is not wanted any more."""
        if self.open.pop(charge, None) is None:
            return False
        charge.at = now
        if self.limit.requests is None and self.limit.tokens is None:
            self._forget(charge)
        else:
            self.entered.append(charge)
        return True

    def refund(self, charge: Charge) -> None:
        """It was granted, and is not wanted any more."""
        if self.open.pop(charge, None) is not None:
            self._forget(charge)

    def settle(self, charge: Charge, tokens: float) -> None:
        """It has used so many tokens in the end (R3)."""
        if charge.counts:
            self.tokens += tokens - charge.tokens
            charge.tokens = tokens

    def expire(self, now: float) -> None:
        """Forget what no window that ends from now on can hold."""
        window = self.limit.per + self.limit.margin
        entered = self.entered
        while entered and (entered[0].at or 0.0) + window <= now:
            self._forget(entered.popleft())

    def _forget(self, charge: Charge) -> None:
        charge.counts = False
        self.tokens -= charge.tokens
        if not self.entered and not self.open:
            self.tokens = 0  # sums of fractions drift

    def due(self, now: float, tokens: float) -> Optional[float]:
        """From when on the limit allows another entry; None: not known before open charges have entered."""
        limit = self.limit
        when = max(now, self.resume_at)
        entered = self.entered
        window = limit.per + limit.margin
        if limit.requests is not None:
            excess = self.used + 1 - limit.requests
            if excess > len(entered):
                return None
            if excess > 0:
                when = max(when, (entered[excess - 1].at or 0.0) + window)
        if limit.tokens is not None:
            excess_tokens = self.tokens + tokens - limit.tokens
            for charge in entered:
                if excess_tokens <= 0:
                    break
                excess_tokens -= charge.tokens
                if charge.tokens:
                    when = max(when, (charge.at or 0.0) + window)
            if excess_tokens > 0 and self.open:
                return None
        return when

    def forget_open(self) -> None:
        """After a fork: what had not entered yet is the parent's."""
        while self.open:
            self._forget(self.open.popitem()[0])


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

    def enter(self, now: float) -> None:
        """Its block is entered now."""
        if self.charge is not None:
            self.charge.enter(now)


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
        self._sides: dict[Optional[AbstractEventLoop], WaitQueue[Slot]] = {}  # the line by loop; None: of the threads
        self._due: Optional[float] = None  # when the next one's time comes, if time is what it waits for
        self._chains: dict[Slot, list[Slot]] = {}  # the place of each slot inside: who has it, and who borrows it
        self._owners: dict[Owner, Slot] = {}
        self._places = 0
        self._closed = closed()
        chain = [slot for slot, _ in before.loans()]
        self._former = chain[0] if chain else None  # it may still leave the quick way
        for slot in chain:
            self._chains[slot] = chain
            owner = slot.owner  # asked once: it may leave the quick way in this moment
            if owner is not None:
                self._owners[owner] = slot
        self._places = 1 if chain else 0
        for waiter in self.line:
            waiter.request = Request()
            self._side(waiter)[waiter] = None
        self._evicted = before.evicted  # took the name the quick way since then; each comes to settle
        self._close()

    def _close(self) -> None:
        """Nobody takes the name the quick way. Whoever just has will see that there is an entry."""
        found = self.book.slots.setdefault(self.name, self._closed)
        if found is not self._closed:
            self.book.slots[self.name] = self._closed
            if found is not self._former:
                self._evicted.add(found)

    def forget(self) -> None:
        """Nobody holds or waits any more (L13)."""
        self.line.clear()
        self.hopeful.clear()
        self._sides.clear()
        self._chains.clear()
        self._owners.clear()
        self._places = 0
        self._due = self._former = None
        self._evicted.clear()
        self.account.forget_open()
        self.book.entries[self.name] = self
        self.book.slots[self.name] = self._closed

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
        now = self.book.now()
        due = self.account.due(now, 0)
        return not self.line and self._has_room() and due is not None and due <= now

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
        return waiter.bell is not None and waiter.bell.loop in self.book.blocked

    def _comes_in(self, waiter: Place, free: Container[Party]) -> bool:
        """Whether it does some time, if of all others only those go on who are in `free`."""
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
        by = lender(self._chains, waiter.claim) if self._may_borrow(waiter) else None
        if by is not None and self._chains[by][-1] is by:
            return self._chains[by]
        return [] if self._has_room() else None

    @staticmethod
    def _may_borrow(waiter: Place) -> bool:
        return waiter.claim.outer is not None or isinstance(waiter.owner, GeneratorOwner)

    def place(self, waiter: Place) -> Optional[Slot]:
        refusal = self.limit.refusal(self.name, waiter.tokens)
        if refusal is not None:
            raise refusal
        counted = waiter.claim.door.how.counted.get(self.name)
        waiter.request = Request(counted)
        opening = self._opening(waiter)
        now = self.book.now()
        due = self._due_of(waiter, now)
        first = self._passes(waiter) or (opening is not None and not self.line)
        first = first and self._next_to_pass() is None
        if first and due is not None and due <= now:
            return self._let_in(waiter)
        if waiter.bell is not None:
            self.line[waiter] = self._side(waiter)[waiter] = None
            if opening or counted or (self._may_borrow(waiter) and lender(self._chains, waiter.claim)):
                self.hopeful[waiter] = None
            self.book.list(waiter)
            self._watch(due if first else self._due, waiter)
        return None

    def _passes(self, waiter: Place) -> bool:
        """Whether it need not stand in line now: it has a place already, or needs nothing else."""
        opening = self._opening(waiter)
        return bool(opening) or (opening is not None and waiter.request.counted is not None)

    def _next_to_pass(self) -> Optional[Place]:
        return next((waiter for waiter in self.hopeful if self._passes(waiter)), None)

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
        charge = waiter.request.counted or self.account.charge(self, waiter)
        if hasattr(slot, "charges"):
            slot.charges.append(charge)
        else:
            slot.charges = [charge]
        waiter.request.slot = slot
        waiter.request.charge = charge
        return slot

    def is_due(self) -> bool:
        return True

    def serve(self) -> None:
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
            self.book.woken.append(waiter)
        self._watch(due)

    def _next(self) -> Optional[Place]:
        """Whose turn it is, once the account allows it; None if nobody could come in even then."""
        passing = self._next_to_pass() if self.hopeful else None
        if passing is not None:
            return passing
        first = next(iter(self.line), None)
        return first if first is not None and self._opening(first) is not None else None

    def _watch(self, due: Optional[float], awake: Optional[Place] = None) -> None:
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

    def _side(self, waiter: Place) -> WaitQueue[Slot]:
        assert waiter.bell is not None
        return self._sides.setdefault(waiter.bell.loop, WaitQueue())

    def _unlist(self, waiter: Place) -> None:
        assert waiter.bell is not None
        side = self._side(waiter)
        del self.line[waiter], side[waiter]
        if not side:
            del self._sides[waiter.bell.loop]
        self.hopeful.pop(waiter, None)
        self.book.unlist(waiter)

    # -- going out ----------------------------------------------------------------------------------------

    def exit(self, slot: Slot, me: Owner) -> bool:
        if slot not in self._chains or not slot.count_off(me):
            return False
        charges = getattr(slot, "charges", [])
        if charges and charges[-1].at is None:  # it was taken with others, and not all could be had
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
        for waiter in list(self.account.open.values()):
            if waiter.bell is not None and waiter.bell.loop is not None and waiter.bell.loop.is_closed():
                self._take_back(waiter)
        self._close()
        former = self._former
        if former is not None and former.owner is None:
            self._former = None
            chain = self._chains.pop(former, None)
            if chain is not None:
                chain.remove(former)
                self._places -= not chain
                self._owners = {slot.owner: slot for slot in self._chains if slot.owner is not None}

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
        due = self._due
        if not self.line and self._has_room():
            due = account.due(now, 0)
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


def retry_after(error: BaseException, now: float) -> Optional[float]:
    """How many seconds the API wants to be left alone, by the headers of the error's response; None if they don't say.

    Both official clients, and whatever else is built on httpx or requests, keep it as `error.response.headers`.
    `now` is the date, in seconds since the epoch, since a header may name a date too.
    """
    try:
        get = error.response.headers.get  # type: ignore[attr-defined]
        said = {header: get(header) for header in ("retry-after-ms", "retry-after")}
    except Exception:  # it is the users' error, or none of an API
        return None
    found = (_seconds(said["retry-after-ms"], 0.001, None), _seconds(said["retry-after"], 1.0, now))
    return next((seconds for seconds in found if seconds is not None), None)


def _seconds(said: Any, scale: float, now: Optional[float]) -> Optional[float]:
    """What a header says; None if that makes no sense."""
    if isinstance(said, bytes):
        said = said.decode("ascii", "replace")
    if isinstance(said, bool) or not isinstance(said, (str, int, float)):
        return None
    try:
        seconds = float(said) * scale
    except (ValueError, OverflowError):
        seconds = -1.0 if now is None else _until(str(said), now)
    return seconds if 0 <= seconds < float("inf") else None


def _until(date: str, now: float) -> float:
    from email.utils import parsedate_to_datetime

    try:
        return max(parsedate_to_datetime(date).timestamp() - now, 0.0)
    except (TypeError, ValueError, IndexError, OverflowError):  # neither is it
        return -1.0


def all_limits(entries: Any) -> Iterator[LimitEntry]:
    """Those of them that are limits."""
    return (entry for entry in entries if isinstance(entry, LimitEntry))
