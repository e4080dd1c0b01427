"""The lock table: who holds which name, who waits, who comes next.

How it keeps its word without a mutex on the free path: a name that nobody contends lives in one
dict, `slots`, and is taken by one atomic `setdefault`. Only a name with waiters or borrowers has an
`_Entry` beside it, and whoever sees an entry goes the slow way, under the mutex. The three rules:

- who takes a free name looks for an entry after taking it; found, it undoes that and goes the slow way;
- who is about to wait or borrow publishes the entry first and looks at the name again afterwards;
- who leaves looks for an entry before and after leaving.

So of any two who meet, at least one sees the other, and nobody waits for a hand-over that never comes.
"""

from __future__ import annotations

import threading
from asyncio import AbstractEventLoop
from collections import deque
from collections.abc import Sequence
from contextlib import suppress
from functools import partial
from heapq import heappop, heappush
from types import TracebackType
from typing import Any, Callable, Optional

from ._clock import Clock
from ._limited import LimitEntry, all_limits
from ._log import about, logger
from ._owner import (
    HOLDS,
    GeneratorOwner,
    Owner,
    ThreadOwner,
    agent_of,
    has_ended,
    in_words,
    lent_worker,
    loop_of,
    running_loop,
)
from ._places import BY_HAND, Book, Door, Entry, How, LockEntry, Place, Slot, live, released_inside, the_only_one
from ._quick import Ways, make_ways
from ._waitqueue import TaskBell, ThreadBell, Waiter
from .deadlock import (
    HolderInfo,
    Hop,
    LimitInfo,
    LockInfo,
    OtherWait,
    Party,
    Wait,
    WaiterInfo,
    age,
    describe_orphan,
    explain_locks,
    find_ring,
    named,
    ring_in_words,
    where,
)
from .errors import CoordinationTimeoutError, DeadlockError, NotHeldError
from .limits import Limit

LOOP_BLOCKED_AFTER = 0.1
"""A blocking wait on the thread of a running loop is worth a warning after so many seconds (L12)."""

PAUSE = 1.0
"""For how long a name is held back by an API that wants a pause and doesn't say how long, in seconds (R4)."""

_A_MOMENT = 1e-9  # what adding and subtracting times may lose


class LockTable:
    """All locks and limits of one coordinator, for threads and tasks of any loop together (L1, L2, L3).

    Args:
        clock: the time.
        timeout: how long those wait who name no timeout, in seconds; None for ever.
        slow_after: how long a wait may take before it is worth a warning, in seconds; None: never (L12).
        storage: what the two dicts are made of; tests put their hooks there.
    """

    def __init__(
        self,
        clock: Clock,
        timeout: Optional[float] = None,
        slow_after: Optional[float] = 30.0,
        storage: Callable[[], dict[str, Any]] = dict,
    ) -> None:
        self.timeout = timeout
        self.slow_after = slow_after
        book = Book(clock.monotonic, storage)
        self.book: Book = book
        self.slots: dict[str, Slot] = book.slots
        self.entries: dict[str, Entry] = book.entries
        self.ways: Callable[[Door], Ways]
        self.async_ways: Callable[[Door, Any], Ways]
        self.ways, self.async_ways = make_ways(self)
        self._clock = clock
        self._now = clock.monotonic
        self._held_back: list[tuple[float, str]] = []  # until when which lock is, a heap
        self._inherited: list[str] = []  # after a fork: blocks that are open here, of holds that the parent has
        self.forget()

    def forget(self, forked: bool = False) -> None:
        """Nobody holds or waits any more; after a fork, the parent's threads are not here (L13). Limits stay."""
        self._mutex: Any = threading.RLock()  # re-entrant only in that it knows who is inside
        self._chores: deque[Callable[[], Any]] = deque()
        limited = list(all_limits(self.entries.values()))
        if forked:
            held = [slot for slot in self.slots.values() if slot.owner is not None]
            held += [slot for name, entry in self.entries.items() for slot, lent in entry.loans() if slot not in held]
            self._inherited = [slot.name for slot in held for _ in range(slot.depth)]
            for slot in held:
                slot.owner = None
        self.book.clear()
        for entry in limited:
            self.entries[entry.name] = entry.renewed()

    # -- taking: the decision ---------------------------------------------------------------------------

    def settle(self, slot: Slot) -> None:
        """The name was taken the quick way, but somebody waits for it or has it on loan: undo, and let them pass."""
        with self._mutex:
            self._entry(slot.name).settle(slot)
        self._act()

    def _entry(self, name: str) -> Entry:
        entry = self.entries.get(name)
        if entry is None:
            entry = self.entries[name] = LockEntry(name, self.book)
        return entry

    def _decide(
        self,
        claim: Slot,
        me: Owner,
        timeout: Optional[float],
        bell: Any,
        blocks: Optional[AbstractEventLoop] = None,
        whole: bool = True,
    ) -> tuple[Place, Optional[Slot]]:
        """Decide under the mutex: the slot, or None: the waiter stands in line, if it has a bell.

        `whole` says that the block is entered at once; it is not, if more locks are to be taken for it first.

        Raises:
            DeadlockError: the wait could never end (L5).
            ValueError: the limit can never give so many tokens (R5).
        """
        slot: Optional[Slot] = None
        ring: tuple[Hop, ...] = ()
        name = claim.door.name
        waiter: Place = Waiter()
        waiter.owner = me
        waiter.claim = claim
        waiter.timeout = timeout
        waiter.bell = bell
        waiter.blocks = blocks
        waiter.request = None
        waiter.tokens = claim.door.how.tokens
        waiter.served = waiter.warned = False
        waiter.since = claim.since
        try:
            with self._mutex:
                entry = self.entries.get(name)
                if entry is None or not entry.join(waiter):
                    slot, ring = self._place(waiter, self._entry(name), whole)
            if self.book.woken or self._chores:
                self._act()
            if ring:
                raise self._deadlock(f"lock {name!r}", name, ring)
            if slot is claim and claim.door.how.lend:
                HOLDS.set(slot)
        except BaseException as error:
            self._give_up(waiter, error)
            raise
        return waiter, slot

    def _place(self, waiter: Place, entry: Entry, whole: bool) -> tuple[Optional[Slot], tuple[Hop, ...]]:
        """The slot, if it is inside now; or the ring that its wait would close, and then it doesn't wait."""
        slot = entry.place(waiter)
        if slot is not None or waiter.bell is None:
            if whole and slot is not None and isinstance(entry, LimitEntry):
                entry.enter(slot)
            entry.tidy()
            return slot, ()
        ring = self._ring_from(waiter.owner) if self._may_be_stuck(entry) else ()
        if ring:
            entry.forsake(waiter)
        return None, ring

    def _may_be_stuck(self, entry: Entry) -> bool:
        """Whether a wait for it could close a ring: not if all who are inside can go on."""
        book = self.book
        if book.blocked:
            return True
        waiting, elsewhere = book.waiting, book.elsewhere
        for slot in entry.inside():
            owner = slot.owner
            if owner in waiting or owner in elsewhere or isinstance(owner, GeneratorOwner):
                return True
        return False

    def _ring_from(self, start: Party) -> tuple[Hop, ...]:
        """A ring through `start` that stands still: nobody in it has gone on while we looked.

        Waits for locks end, and waits of all kinds begin, under the mutex that we hold; the others may end any time.
        """
        book = self.book
        while True:
            ring = find_ring(start, self._wait_of)
            waiting = [hop.waiter for hop in ring if hop.lock is not None or hop.why is not None]
            if all(party in book.elsewhere or party in book.waiting for party in waiting):
                return ring

    def _wait_of(self, party: Party) -> Optional[Wait]:
        """Whom `party` waits for; None: for nobody (L5). A generator amid a step goes on if its driver does."""
        if isinstance(party, GeneratorOwner) and party.stepping and party.driver is not None:
            party = party.driver
        book = self.book
        wait = None
        if isinstance(party, AbstractEventLoop):
            loop: Optional[AbstractEventLoop] = party
        else:
            loop = loop_of(party)
            elsewhere, waiter = book.elsewhere.get(party), book.waiting.get(party)
            if elsewhere is not None:
                wait = elsewhere.whom()
            elif waiter is not None:
                wait = self._entry(waiter.claim.name).wait_of(waiter)
        blocker = book.blocked.get(loop) if loop is not None else None
        if blocker is None or blocker is party:
            return wait
        hop = Hop(party, blocker, None, None)
        if wait is None:
            return Wait([hop])
        return Wait([hop, *wait.hops], lambda free: blocker in free and wait.ends(free))

    def begin_wait(self, wait: OtherWait) -> None:
        """Somebody is about to wait for something that is no lock (L5).

        Raises:
            DeadlockError: the wait could never end.
        """
        with self._mutex:
            self.book.list_other(wait)
            ring = self._ring_from(wait.owner)
            if ring:
                self.book.unlist_other(wait)
        self._act()
        if ring:
            raise self._deadlock(wait.what, wait.name, ring)

    def end_wait(self, wait: OtherWait) -> None:
        """It waits for that no more."""
        self.book.unlist_other(wait)

    def other_waits(self) -> list[OtherWait]:
        """All that are no waits for locks."""
        return list(self.book.elsewhere.values())

    def look_again(self, loop: AbstractEventLoop) -> None:
        """Something more is to run on this loop: a wait that blocks it is woken, and begins anew or is refused."""
        blocker = self.book.blocked.get(loop)
        wait = self.book.elsewhere.get(blocker) if blocker is not None else None
        if wait is not None and wait.bell is not None:
            wait.bell.ring()

    # -- taking: the drivers ----------------------------------------------------------------------------

    def claim(self, door: Door, me: Owner) -> Slot:
        """What `me` asks for; it is inside by it when its turn has come."""
        claim = Slot()
        claim.door = door
        claim.owner = me
        claim.depth = 1
        claim.since = self._now()
        outer = HOLDS.get()
        claim.outer = outer if outer is None else live(outer)
        return claim

    def acquire(self, claim: Slot, me: Owner, timeout: Optional[float], whole: bool = True) -> Optional[Slot]:
        """Take the name, waiting on this thread where need be; None if the time ran out (L3, L4, L7)."""
        bell = ThreadBell() if timeout != 0 else None
        waiter, slot = self._decide(claim, me, timeout, bell, running_loop(), whole)
        if slot is not None or bell is None:
            return slot
        try:
            if me.__class__ is ThreadOwner and me.workers is None:
                bell.sleep(self._clock, self._first_spell(waiter))
            else:
                with lent_worker():  # E16
                    bell.sleep(self._clock, self._first_spell(waiter))
            while not waiter.served and self._look_again(waiter):
                with lent_worker():
                    bell.sleep(self._clock, self._spell(waiter))
            if waiter.served and waiter.request is None and claim.door.how.lend:  # what follows, in the plainest case
                HOLDS.set(claim)
                return claim
            return self._wake_up(waiter, whole)
        except BaseException as error:
            self._give_up(waiter, error)
            raise

    async def acquire_async(
        self, claim: Slot, me: Owner, timeout: Optional[float], whole: bool = True
    ) -> Optional[Slot]:
        """Take the name, waiting on this loop where need be; None if the time ran out (L3, L4, L7)."""
        bell = TaskBell() if timeout != 0 else None
        waiter, slot = self._decide(claim, me, timeout, bell, None, whole)
        if slot is not None or bell is None:
            return slot
        try:
            await bell.sleep(self._clock, self._first_spell(waiter))
            while not waiter.served and self._look_again(waiter):
                await bell.sleep(self._clock, self._spell(waiter))
            return self._wake_up(waiter, whole)
        except BaseException as error:
            self._give_up(waiter, error)
            raise

    def patience(self, timeout: Any) -> Optional[float]:
        """How long to wait, if a handle or an agent was told so; `...`: nothing, so the coordinator says it."""
        return self.timeout if timeout is ... else timeout

    def enter(self, claim: Slot, me: Owner) -> Slot:
        """Take the name for a block, waiting on this thread where need be.

        Raises:
            CoordinationTimeoutError: the time ran out (L4).
        """
        timeout = self.patience(claim.door.how.timeout)
        slot = self.acquire(claim, me, timeout)
        if slot is None:
            raise self.timeout_error(claim.name, timeout or 0, me)
        return slot

    async def enter_async(self, claim: Slot, me: Owner) -> Slot:
        """Take the name for a block, waiting on this loop where need be."""
        timeout = self.patience(claim.door.how.timeout)
        slot = await self.acquire_async(claim, me, timeout)
        if slot is None:
            raise self.timeout_error(claim.name, timeout or 0, me)
        return slot

    def warn_after(self, blocks: Optional[AbstractEventLoop]) -> Optional[float]:
        """After how many seconds a wait, on the thread of that loop, is worth a warning; None: never (L12)."""
        return self.slow_after if blocks is None else LOOP_BLOCKED_AFTER

    def _slow_after(self, waiter: Place) -> Optional[float]:
        """After how long the wait is worth a warning; None if it never is, or has been told of (L12)."""
        return None if waiter.warned else self.warn_after(waiter.blocks)

    def _first_spell(self, waiter: Place) -> Optional[float]:
        if waiter.timeout is None and waiter.blocks is None and waiter.request is None:
            return self.slow_after
        return self._spell(waiter)

    def _spell(self, waiter: Place) -> Optional[float]:
        """How long to sleep until the wait is over, or worth a warning (L12), or a limit may let it in (R2)."""
        request = waiter.request
        ends = [waiter.since + spell for spell in (waiter.timeout, self._slow_after(waiter)) if spell is not None]
        if request is not None and request.due is not None:
            ends.append(request.due)
        return max(min(ends) - self._now(), 0.0) if ends else None

    def _look_again(self, waiter: Place) -> bool:
        """The sleep is over, and the turn has not come: False if the time is up."""
        waited = self._now() - waiter.since + _A_MOMENT
        if waiter.timeout is not None and waited >= waiter.timeout:
            return False
        slow = self._slow_after(waiter)
        if slow is not None and waited >= slow:
            waiter.warned = True
            self._warn(waiter)
        if waiter.request is not None:
            with self._mutex:
                self._entry(waiter.claim.name).serve()
            self._act()
            if waiter.request.error is not None:
                raise waiter.request.error
        return True

    def _wake_up(self, waiter: Place, whole: bool = True) -> Optional[Slot]:
        """The wait is over: what did it bring?"""
        if not waiter.served and self._leave_line(waiter):
            return None
        slot = waiter.claim
        request = waiter.request
        if request is not None:
            slot = request.slot or slot
            if whole:
                self.all_taken((slot,))
        if slot is waiter.claim and slot.door.how.lend:
            HOLDS.set(slot)
        return slot

    def _leave_line(self, waiter: Place) -> bool:
        """Stop waiting; False if the turn came first."""
        request = waiter.request
        with self._mutex:
            entry = self._entry(waiter.claim.name)
            if request is not None:
                entry.serve()  # its time may have come in this very moment
            left = not waiter.served
            if left:
                entry.forsake(waiter)
        self._act()
        if request is not None and request.error is not None:
            raise request.error
        return left

    def _give_up(self, waiter: Place, error: BaseException) -> None:
        """Leave nothing behind (L7): neither a place in line, nor a turn that came meanwhile.

        It may be the garbage collector who gives up, for a task that nobody will run again: see `_do_chores`. Anybody
        else goes on when it is done: who asks again meanwhile would be inside by the turn that is to be passed on.
        """
        self._chores.append(partial(self._forsake, waiter))
        if not isinstance(error, GeneratorExit):
            self._do_chores(wait=True)
        self._act()

    def _forsake(self, waiter: Place) -> None:
        self._entry(waiter.claim.name).forsake(waiter)

    # -- releasing --------------------------------------------------------------------------------------

    def release(self, name: str, me: Owner, of_block: bool = False) -> None:
        """End one entry of the caller's (L8).

        `of_block` says that a `with` block ends: it had entered, so where its thread or task is not inside (an
        async generator that is closed by another task), the entry is that of the only one who is.
        """
        slot = self.slots.get(name)
        if slot is not None and slot.owner is me:
            by_hand = not of_block and not slot.count_off_by_hand()
            self.free(slot, me)
            if by_hand and slot.owner is None:
                slot.depth = BY_HAND
            return
        if self._mutex._is_owned():  # a collection has ended a generator's block here, of all places
            self._chores.append(lambda: self._release_later(name, me))
            return
        with self._mutex:
            entry = self._entry(name)
            entry.serve()
            slot = entry.mine(me)
            if slot is None and of_block and not released_inside(name):
                slot = the_only_one(entry.inside(), running_loop())
                me = slot.owner if slot is not None and slot.owner is not None else me
            done = slot is not None and entry.exit(slot, me)
            if done and slot is not None and not of_block and not slot.count_off_by_hand() and slot.owner is None:
                slot.depth = BY_HAND
            entry.tidy()
            holder = entry.holder()
            if not done and of_block and name in self._inherited:
                self._inherited.remove(name)
                done = True
        self._act()
        if not done:
            words = _who(holder) if holder is not None else None
            raise NotHeldError(
                f"{in_words(me)} can't release lock {name!r}: "
                + (f"it is held by {words}" if words else "nobody holds it")
                + "; nothing was changed",
                name=name,
                holder=words,
            )

    def _release_later(self, name: str, me: Owner) -> None:
        entry = self._entry(name)
        slot = entry.mine(me) or the_only_one(entry.inside())
        if slot is not None and slot.owner is not None:
            entry.exit(slot, slot.owner)

    def free(self, slot: Slot, me: Owner) -> None:
        """End one entry of `me` to this very slot, whoever calls (L8)."""
        name = slot.name
        if slot.owner is me and name not in self.entries:
            if slot.depth > 1:
                slot.depth -= 1
                return
            if self.slots.get(name) is slot:
                del self.slots[name]
                slot.owner = None
                if name in self.entries:
                    self.pass_on(name)
                return
        if self._mutex._is_owned():
            self.free_collected(slot, me)
            return
        try:
            with self._mutex:
                entry = self._entry(name)
                entry.exit(slot, me)
                entry.tidy()
        finally:
            if self.book.woken or self._chores:
                self._act()

    def free_all(self, slots: Sequence[Slot], me: Owner) -> None:
        """End one entry of `me` to each, the last taken first."""
        for slot in reversed(slots):
            self.free(slot, me)

    def free_collected(self, slot: Slot, me: Owner) -> None:
        """`free` for what a garbage collection may end, on any thread, task or closed loop: waits for nobody (L2).

        Of a generator's slot: whoever drives it may still be inside, and then the last of them frees the lock.
        """
        self._chores.append(lambda: self._entry(slot.name).exit(slot, me))
        self._act()

    def pass_on(self, name: str) -> None:
        """The name has been left the quick way, and then somebody was seen: hand it over."""
        with self._mutex:
            entry = self._entry(name)
            entry.serve()
            entry.tidy()
        self._act()

    def hand_over(self, slot: Slot) -> bool:
        """End the only entry to the slot, where to appoint the first in line is all that there is to do."""
        mutex = self._mutex
        if mutex._is_owned():
            return False
        try:
            with mutex:
                entry = self.entries.get(slot.door.name)
                done = entry.__class__ is LockEntry and entry.hand_over(slot)
        finally:
            if self.book.woken or self._chores:
                self._act()
        return done

    # -- after the mutex --------------------------------------------------------------------------------

    def _act(self) -> None:
        """What is to be done after each stay in the mutex: wake those whose turn has come, and the chores."""
        woken = self.book.woken
        while woken or (self._chores and self._do_chores()):
            try:
                waiter = woken[0]
            except IndexError:
                continue  # another thread has woken it
            reached = waiter.bell is None or waiter.bell.ring()
            with suppress(ValueError):  # another thread has woken it too
                woken.remove(waiter)  # only now, so that no Ctrl-C loses it: to be rung twice does no harm
            if not reached:  # its loop is closed: the turn goes on to the next
                self._chores.append(partial(self._forsake, waiter))

    def _do_chores(self, wait: bool = False) -> bool:
        """Do under the mutex what has been put aside; False if somebody else will.

        A garbage collection can come upon a thread inside the mutex; so what a collection may call puts its work
        aside, and doesn't wait for the mutex: whoever has it does the work afterwards.
        """
        if self._mutex._is_owned() or not self._mutex.acquire(wait):
            return False
        try:
            while self._chores:
                self._chores.popleft()()
        finally:
            self._mutex.release()
        return True

    # -- several at once (L6) -----------------------------------------------------------------------------

    def acquire_all(
        self, names: Sequence[str], how: How, me: Owner, timeout: Optional[float]
    ) -> tuple[Sequence[Slot], Optional[str]]:
        """Take all names in the order given, or none: the slots, or the name for which the time ran out."""
        if len(names) == 1:
            slot = self.acquire(self.claim(Door(self, names[0], how), me), me, timeout)
            return ((), names[0]) if slot is None else ((slot,), None)
        with _Several(self, names, how, me, timeout) as several:
            for name in names:
                claim = self.claim(Door(self, name, how), me)
                if not several.add(name, self.acquire(claim, me, several.left(), False)):
                    break
        return several.slots, several.missed

    async def acquire_all_async(
        self, names: Sequence[str], how: How, me: Owner, timeout: Optional[float]
    ) -> tuple[Sequence[Slot], Optional[str]]:
        """The same, waiting on this loop."""
        if len(names) == 1:
            slot = await self.acquire_async(self.claim(Door(self, names[0], how), me), me, timeout)
            return ((), names[0]) if slot is None else ((slot,), None)
        with _Several(self, names, how, me, timeout) as several:
            for name in names:
                claim = self.claim(Door(self, name, how), me)
                if not several.add(name, await self.acquire_async(claim, me, several.left(), False)):
                    break
        return several.slots, several.missed

    # -- limits -------------------------------------------------------------------------------------------

    def limit(self, name: str, limit: Limit) -> None:
        """From now on the name allows what `limit` says, for those who wait already too (R1)."""
        with self._mutex:
            self._limited(name, limit).change(limit)
        self._act()

    def unlimit(self, name: str) -> None:
        """The name is a plain lock again. Nobody may hold it or wait for it."""
        with self._mutex:
            if isinstance(self.entries.get(name), LimitEntry):
                del self.entries[name]
                self.slots.pop(name, None)
        self._act()

    def declared(self) -> dict[str, Limit]:
        """What has been declared, by name."""
        with self._mutex:
            found = {entry.name: entry.limit for entry in all_limits(list(self.entries.values())) if entry.declared}
        self._act()
        return found

    def _limited(self, name: str, limit: Limit) -> LimitEntry:
        entry = self._entry(name)
        entry.serve()
        if not isinstance(entry, LimitEntry):
            assert isinstance(entry, LockEntry)
            entry = self.entries[name] = LimitEntry(name, self.book, limit, entry)
        return entry

    def commit(self, slot: Slot, tokens: float) -> None:
        """The slot's innermost entry has used so many tokens (R3)."""
        if hasattr(slot, "charges"):
            with self._mutex:
                entry = self.entries.get(slot.name)
                if isinstance(entry, LimitEntry):
                    entry.commit(slot, tokens)
            self._act()

    def hold_back(self, name: str, seconds: Optional[float]) -> None:
        """Nobody enters under this name for so long (R4); a name without a limit goes on as one of one at once."""
        with self._mutex:
            until = self._now() + (PAUSE if seconds is None else seconds)
            entry = self._limited(name, Limit(concurrency=1))
            entry.hold_back(until)
            if not entry.declared:
                heappush(self._held_back, (until, name))
            self._tidy_held_back()
        self._act()

    def _tidy_held_back(self) -> None:
        """A lock that was held back costs nothing when that is over and nobody is there (L9)."""
        while self._held_back and self._held_back[0][0] <= self._now():
            entry = self.entries.get(heappop(self._held_back)[1])
            if entry is not None:
                entry.tidy()

    def check_tokens(self, names: Sequence[str], tokens: float) -> None:
        """Refuse what one of these limits can never give, before the others are waited for (R5)."""
        for name in names if tokens else ():
            entry = self.entries.get(name)
            refusal = entry.limit.refusal(name, tokens) if isinstance(entry, LimitEntry) else None
            if refusal is not None:
                raise refusal

    def all_taken(self, slots: Sequence[Slot]) -> None:
        """All locks of a block have been taken: it is entered now (R2)."""
        charged = [slot for slot in slots if hasattr(slot, "charges")]
        if charged:
            with self._mutex:
                for slot in charged:
                    entry = self.entries.get(slot.name)
                    if isinstance(entry, LimitEntry):
                        entry.enter(slot)
            self._act()

    def limits(self) -> tuple[LimitInfo, ...]:
        """What each limited name allows, and what is used of it, sorted by name (L11)."""
        with self._mutex:
            self._tidy_held_back()
            found = tuple(entry.info() for entry in all_limits(list(self.entries.values())))
        self._act()
        return tuple(sorted(found, key=lambda info: info.name))

    # -- looking ----------------------------------------------------------------------------------------

    def is_free(self, name: str) -> bool:
        """Whether somebody new would get in at once."""
        entry = self.entries.get(name)
        if not isinstance(entry, LimitEntry):
            return name not in self.slots
        with self._mutex:
            free = entry.is_free()
            entry.tidy()
        self._act()
        return free

    def innermost(self, name: str, me: Owner) -> Optional[Slot]:
        """The slot that `me` has entered last, be it a generator's that it drives."""
        slot: Optional[Slot] = HOLDS.get()
        while slot is not None:
            if slot.name == name and slot.door.table is self and slot.admits(me):
                return slot
            slot = slot.outer
        return self.slot_of(name, me)

    def slot_of(self, name: str, me: Owner) -> Optional[Slot]:
        """The slot by which `me` is inside."""
        with self._mutex:
            entry = self.entries.get(name) or LockEntry(name, self.book)
            slot = entry.mine(me)
        self._act()
        return slot

    def holds(self, name: str, me: Owner) -> bool:
        """Whether `me` has an open entry to the name."""
        slot = self.slot_of(name, me)
        owner = slot.owner if slot is not None else None
        return owner is me or (isinstance(owner, GeneratorOwner) and me in owner.guests)

    def timeout_error(self, name: str, timeout: float, me: Owner) -> CoordinationTimeoutError:
        """The error of a wait that was too long: who has it, since when, how many wait (L4)."""
        with self._mutex:
            entry = self.entries.get(name) or LockEntry(name, self.book)
            slot = entry.holder()
            owner = slot.owner if slot is not None else None
            held_for = self._now() - slot.since if slot is not None and owner is not None else None
            waiting = len(entry.line)
            limit = entry.info().in_words() if isinstance(entry, LimitEntry) else ""
        self._act()
        tried = "is not free" if timeout == 0 else f"was not free within {age(timeout)}"
        if slot is None or owner is None or held_for is None:
            holder, state = None, limit or "it has just been released"
        else:
            holder = named(owner, slot.agent)
            state = f"held for {age(held_for)} by {holder}{describe_orphan(owner)}"
            state += f"; {limit}" if limit else ""
        others = f"; {waiting} other{'s' if waiting != 1 else ''} waiting" if waiting else ""
        return CoordinationTimeoutError(
            f"lock {name!r} {tried} for {named(me)}: {state}{others}",
            name=name,
            timeout=timeout,
            holder=holder,
            held_for=held_for,
            waiting=waiting,
        )

    def _deadlock(self, what: str, name: str, ring: tuple[Hop, ...]) -> DeadlockError:
        cycle = ring_in_words(ring, self._now())
        hops = "".join(f"\n  {number}. {hop}" for number, hop in enumerate(cycle, 1))
        return DeadlockError(f"waiting for {what} would never end:{hops}", name=name, cycle=cycle)

    def _warn(self, waiter: Place) -> None:
        name = waiter.claim.name
        what = " and blocks its event loop meanwhile (use `async with`)" if waiter.blocks is not None else ""
        logger.warning(
            "%s has waited %s for lock %r%s\n%s",
            named(waiter.owner, waiter.claim.agent),
            age(self._now() - waiter.since),
            name,
            what,
            explain_locks(self.snapshot(), self.limits(), name),
            extra=about(agent=waiter.claim.agent),
        )

    def snapshot(self) -> tuple[LockInfo, ...]:
        """Every lock that is held or waited for, sorted by name (L11)."""
        with self._mutex:
            now = self._now()
            seen = []
            for name in sorted({*list(self.slots), *self.entries}):
                entry = self.entries.get(name) or LockEntry(name, self.book)
                holders = [(slot, slot.owner, slot.since, slot.depth, lent) for slot, lent in entry.loans()]
                seen.append((name, holders, list(entry.line)))
        self._act()
        return tuple(  # in words only after the mutex: it walks stacks
            LockInfo(
                name=name,
                holders=tuple(
                    HolderInfo(
                        who=in_words(owner),
                        agent=slot.agent or agent_of(owner),
                        held_for=now - since,
                        entries=depth,
                        borrowed=lent,
                        orphaned=has_ended(owner),
                        where=where(owner),
                    )
                    for slot, owner, since, depth, lent in holders
                    if owner is not None
                ),
                waiters=tuple(
                    WaiterInfo(
                        who=in_words(waiter.owner),
                        agent=waiter.claim.agent or agent_of(waiter.owner),
                        waiting_for=now - waiter.since,
                        timeout=waiter.timeout,
                        where=where(waiter.owner),
                    )
                    for waiter in waiters
                ),
            )
            for name, holders, waiters in seen
            if holders or waiters
        )


class _Several:
    """Taking several names, all or none: what has been taken, and what is left of the time."""

    def __init__(self, table: LockTable, names: Sequence[str], how: How, me: Owner, timeout: Optional[float]) -> None:
        self._table = table
        self._timeout = timeout
        self._now = table.book.now
        self._deadline = self._now() + timeout if timeout else None
        table.check_tokens(names, how.tokens)
        self._me = me
        self.slots: list[Slot] = []
        self.missed: Optional[str] = None

    def left(self) -> Optional[float]:
        """What is left of a timeout that covers several waits; 0 stays 'try once'."""
        return self._timeout if self._deadline is None else max(self._deadline - self._now(), 0.0)

    def add(self, name: str, slot: Optional[Slot]) -> bool:
        """Another one has been taken, or missed."""
        if slot is None:
            self.missed = name
            return False
        self.slots.append(slot)
        return True

    def __enter__(self) -> _Several:
        return self

    def __exit__(
        self, kind: Optional[type[BaseException]], error: Optional[BaseException], trace: Optional[TracebackType]
    ) -> None:
        inside = False
        try:
            if error is None and self.missed is None:
                self._table.all_taken(self.slots)
                inside = True
        finally:  # Ctrl-C may come in just this moment
            if not inside:
                self._table.free_all(self.slots, self._me)
                self.slots = []


def _who(slot: Slot) -> str:
    return "somebody who has just left" if slot.owner is None else named(slot.owner, slot.agent)
