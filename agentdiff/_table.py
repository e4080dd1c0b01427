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

import logging
import threading
from asyncio import AbstractEventLoop
from collections import deque
from collections.abc import Iterator, Sequence
from typing import Any, Callable, Optional, Union

from ._clock import Clock
from ._owner import HOLDS, GeneratorOwner, Owner, agent_of, has_ended, in_words, loop_of, running_loop
from ._waitqueue import Bell, TaskBell, ThreadBell, Waiter, WaitQueue
from .deadlock import (
    HolderInfo,
    Hop,
    LockInfo,
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

logger = logging.getLogger("agentdiff")

LOOP_BLOCKED_AFTER = 0.1
"""A blocking wait on the thread of a running loop is worth a warning after so many seconds (L12)."""


_BY_HAND = -1
"""The depth of a slot whose last block was ended by `release()`, before its end."""


class Slot:
    """One held place under a lock: what `with coord.lock(name) as slot` yields.

    Attributes:
        name: the lock's name.
        agent: the agent that took it through `@coordinate(..., lock_name=...)`, else None.
    """

    # `owner` is who holds it, None once it has ended; `since` is monotonic; `outer` is the slot entered
    # before in the same context; `depth` counts entries of its owner. Written by the table alone. There is
    # no __init__: this object is made for every entry, and a call would cost as much as all the rest.
    # `by_hand` counts the entries that `acquire()` made, and is there only if it made any.
    __slots__ = ("__weakref__", "agent", "by_hand", "depth", "name", "outer", "owner", "since")

    name: str
    agent: Optional[str]
    by_hand: int
    owner: Optional[Owner]
    since: float
    outer: Optional[Slot]
    depth: int

    def count_by_hand(self) -> None:
        """`acquire()` has made an entry, and `release()` is to end it."""
        self.by_hand = getattr(self, "by_hand", 0) + 1

    def count_off_by_hand(self) -> bool:
        """`release()` ends an entry; False if it is a block's."""
        left = getattr(self, "by_hand", 0)
        if left:
            self.by_hand = left - 1
        return bool(left)

    def __repr__(self) -> str:
        return f"<Slot {self.name!r} {in_words(self.owner) if self.owner is not None else 'released'}>"


Place = Waiter[Slot]
Ring = tuple[Hop, ...]


class _Entry:
    """What the table knows of a name beyond its holder; it exists only while there is something to know."""

    __slots__ = ("chain", "evicted", "hopeful", "line", "root")

    def __init__(self) -> None:
        self.line: WaitQueue[Slot] = WaitQueue()
        self.hopeful: WaitQueue[Slot] = WaitQueue()  # those in line who may borrow
        self.chain: list[Slot] = []  # borrowers inside, each borrowing from the one before, the first from the root
        self.root: Optional[Slot] = None  # from whom the first of the chain borrows
        self.evicted: set[Slot] = set()  # took the name while it was only lent; each comes to settle


class LockTable:
    """All locks of one coordinator, for threads and tasks of any loop together (L1, L2, L3).

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
        storage: type[dict] = dict,  # type: ignore[type-arg]
    ) -> None:
        self.timeout = timeout
        self.slow_after = slow_after
        self.slots: dict[str, Slot] = storage()
        self.entries: dict[str, _Entry] = storage()
        self.quick = _quick_way(self.slots, self.entries, clock.monotonic, self._settle)
        self._clock = clock
        self._now = clock.monotonic
        self._waiting: dict[Owner, Place] = {}
        self._blocked: dict[AbstractEventLoop, Place] = {}  # loops whose thread sleeps in a blocking acquire
        self._inherited: list[str] = []  # after a fork: blocks that are open here, of holds that the parent has
        self.forget()

    def forget(self, forked: bool = False) -> None:
        """Nobody holds or waits any more; after a fork, the parent's threads are not here (L13)."""
        self._mutex: Any = threading.RLock()  # re-entrant only in that it knows who is inside
        self._chores: deque[Callable[[], list[Place]]] = deque()
        if forked:
            held = [slot for slot in self.slots.values() if slot is not None]
            held += [slot for entry in self.entries.values() for slot in entry.chain]
            self._inherited = [slot.name for slot in held for _ in range(slot.depth)]
            for slot in held:
                slot.owner = None
        self.slots.clear()
        self.entries.clear()
        self._waiting.clear()
        self._blocked.clear()

    # -- taking: the decision ---------------------------------------------------------------------------

    def _settle(self, slot: Slot) -> None:
        """The name was taken the quick way, but somebody waits for it or has it on loan: undo, and let them pass."""
        with self._mutex:
            entry = self._entry(slot.name)
            if entry.chain:
                self._mend(slot.name, entry)
            entry.evicted.discard(slot)
            woken = self._leave(slot.name, entry, slot)
        self._act(woken)

    def _decide(
        self,
        name: str,
        me: Owner,
        bell: Optional[Bell],
        timeout: Optional[float],
        agent: Optional[str],
        lend: bool,
        blocks: Optional[AbstractEventLoop] = None,
    ) -> Union[Slot, Place, None]:
        """Decide under the mutex: the slot, or a waiter that stands in line, or None where nobody wants to wait.

        Raises:
            DeadlockError: the wait could never end (L5).
        """
        outer = HOLDS.get()
        slot = Slot()
        slot.name = name
        slot.owner = me
        slot.depth = 1
        slot.outer = outer if outer is None else live(outer)
        slot.agent = agent
        try:
            with self._mutex:
                slot.since = self._now()
                entry = self._entry(name)
                woken = self._serve(name, entry)
                got, ring = self._place(name, entry, slot, bell, timeout, blocks)
                self._tidy(name, entry)
            self._act(woken)
            if ring:
                raise self._deadlock(name, ring)
            if got is slot and lend:
                HOLDS.set(slot)
        except BaseException:
            self._give_up(slot)
            raise
        return got

    def _place(
        self,
        name: str,
        entry: _Entry,
        slot: Slot,
        bell: Optional[Bell],
        timeout: Optional[float],
        blocks: Optional[AbstractEventLoop],
    ) -> tuple[Union[Slot, Place, None], Ring]:
        me = slot.owner
        assert me is not None
        mine = self._mine(name, entry, me)
        if mine is not None:
            self._reenter(mine, me)
            return mine, ()
        if not entry.chain and name not in self.slots and self.slots.setdefault(name, slot) is slot:
            return slot, ()
        inside = self._inside(name, entry)
        lender = self._lender(inside, slot)
        if lender is not None and lender is inside[-1]:
            self._lend(entry, inside, slot)
            return slot, ()
        if bell is None:
            return None, ()
        waiter = Waiter(me, slot, slot.since, timeout, bell, blocks)
        self._waiting[me] = waiter
        entry.line.join(waiter)
        if lender is not None:
            entry.hopeful.join(waiter)
        if blocks is not None:
            self._blocked[blocks] = waiter
        if self._blocked or any(other.owner in self._waiting for other in inside):
            ring = find_ring(me, self._hops)
            if ring:
                self._unlist(entry, waiter)
                return None, ring
        return waiter, ()  # if all who are inside can go on, there is no ring

    def _hops(self, owner: Owner) -> Iterator[Hop]:
        """Before whom `owner` can't go on (L5)."""
        waiter = self._waiting.get(owner)
        if waiter is not None:
            name = waiter.claim.name
            entry = self._entry(name)
            inside = self._inside(name, entry)
            lender = self._lender(inside, waiter.claim)
            if lender is not None:
                inside = inside[inside.index(lender) + 1 :]
            for slot in inside:
                holder = slot.owner  # asked once: it may leave the quick way at any time
                if holder is not None:
                    yield Hop(owner, holder, name, slot.since)
            if self._blocked:  # else they wait for nobody that isn't named already
                for other in entry.line:
                    if other is waiter:
                        break
                    yield Hop(owner, other.owner, name, None)
        loop = loop_of(owner)
        blocker = self._blocked.get(loop) if loop is not None else None
        if blocker is not None and blocker.owner is not owner:
            yield Hop(owner, blocker.owner, None, None)

    # -- taking: the drivers ----------------------------------------------------------------------------

    def acquire(
        self, name: str, timeout: Optional[float], me: Owner, agent: Optional[str] = None, lend: bool = True
    ) -> Optional[Slot]:
        """Take the name, waiting on this thread where need be; None if the time ran out (L3, L4, L7)."""
        bell = ThreadBell()
        blocks = running_loop()
        got = self._decide(name, me, bell if timeout != 0 else None, timeout, agent, lend, blocks)
        if got is None or isinstance(got, Slot):
            return got
        try:
            spell = self._first_spell(timeout, blocks is not None)
            bell.sleep(self._clock, spell)
            if not got.served and spell != timeout:
                bell.sleep(self._clock, self._second_spell(got, timeout))
            return self._wake_up(got, lend)
        except BaseException:
            self._give_up(got.claim)
            raise

    async def acquire_async(
        self, name: str, timeout: Optional[float], me: Owner, agent: Optional[str] = None, lend: bool = True
    ) -> Optional[Slot]:
        """Take the name, waiting on this loop where need be; None if the time ran out (L3, L4, L7)."""
        bell = TaskBell()
        got = self._decide(name, me, bell if timeout != 0 else None, timeout, agent, lend)
        if got is None or isinstance(got, Slot):
            return got
        try:
            spell = self._first_spell(timeout, False)
            await bell.sleep(self._clock, spell)
            if not got.served and spell != timeout:
                await bell.sleep(self._clock, self._second_spell(got, timeout))
            return self._wake_up(got, lend)
        except BaseException:
            self._give_up(got.claim)
            raise

    def _first_spell(self, timeout: Optional[float], blocks_loop: bool) -> Optional[float]:
        """How long to sleep until the wait is worth a warning, or over (L12)."""
        slow_after = LOOP_BLOCKED_AFTER if blocks_loop else self.slow_after
        if slow_after is None or (timeout is not None and timeout <= slow_after):
            return timeout
        return slow_after

    def _second_spell(self, waiter: Place, timeout: Optional[float]) -> Optional[float]:
        """Warn; how long to sleep then."""
        self._warn(waiter)
        return None if timeout is None else max(waiter.since + timeout - self._now(), 0.0)

    def _wake_up(self, waiter: Place, lend: bool) -> Optional[Slot]:
        """The sleep is over: what did it bring?"""
        if not waiter.served and self._leave_line(waiter):
            return None
        if lend:
            HOLDS.set(waiter.claim)
        return waiter.claim

    def _leave_line(self, waiter: Place) -> bool:
        """Stop waiting; False if the turn came first."""
        with self._mutex:
            left = not waiter.served
            if left:
                name = waiter.claim.name
                entry = self._entry(name)
                self._unlist(entry, waiter)
                self._tidy(name, entry)
        self._act([])
        return left

    def _give_up(self, slot: Slot) -> None:
        """Leave nothing behind (L7): neither a place in line, nor a turn that came meanwhile.

        It may be the garbage collector who gives up, for a task that nobody will run again: see `_do_chores`.
        """

        def chore() -> list[Place]:
            entry = self._entry(slot.name)
            waiter = self._waiting.get(slot.owner) if slot.owner is not None else None
            if waiter is not None and waiter.claim is slot:
                self._unlist(entry, waiter)
            return self._leave(slot.name, entry, slot)

        self._chores.append(chore)
        self._do_chores()

    def acquire_all(
        self, names: Sequence[str], timeout: Optional[float], me: Owner, agent: Optional[str] = None, lend: bool = True
    ) -> tuple[list[Slot], Optional[str]]:
        """Take all names in the order given, or none (L6): the slots, or the name for which the time ran out."""
        taken: list[Slot] = []
        left = self._countdown(timeout)
        try:
            for name in names:
                slot = self.acquire(name, left(), me, agent, lend)
                if slot is None:
                    break
                taken.append(slot)
            else:
                return taken, None
        except BaseException:
            self.free_all(taken, me)
            raise
        self.free_all(taken, me)
        return [], name

    async def acquire_all_async(
        self, names: Sequence[str], timeout: Optional[float], me: Owner, agent: Optional[str] = None, lend: bool = True
    ) -> tuple[list[Slot], Optional[str]]:
        """The same, waiting on this loop."""
        taken: list[Slot] = []
        left = self._countdown(timeout)
        try:
            for name in names:
                slot = await self.acquire_async(name, left(), me, agent, lend)
                if slot is None:
                    break
                taken.append(slot)
            else:
                return taken, None
        except BaseException:
            self.free_all(taken, me)
            raise
        self.free_all(taken, me)
        return [], name

    def _countdown(self, timeout: Optional[float]) -> Callable[[], Optional[float]]:
        """What is left of a timeout that covers several waits; 0 stays 'try once'."""
        if not timeout:
            return lambda: timeout
        deadline = self._now() + timeout
        return lambda: max(deadline - self._now(), 0.0)

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
            if slot.owner is None and by_hand:
                slot.depth = _BY_HAND
            return
        if self._mutex._is_owned():  # a collection has ended a generator's block here, of all places
            self._chores.append(lambda: self._release_later(name, me))
            return
        with self._mutex:
            entry = self._entry(name)
            woken = self._serve(name, entry)
            slot = self._mine(name, entry, me)
            if slot is None and of_block and not _released_inside(name):
                slot = self._the_only_one(name, entry)
                me = slot.owner if slot is not None and slot.owner is not None else me
            done = slot is not None and self._exit(slot, me)
            if done and slot is not None and _is_empty(slot):
                woken += self._leave(name, entry, slot)
                slot.depth = 0 if of_block or slot.count_off_by_hand() else _BY_HAND
            self._tidy(name, entry)
            holder = self._holder(name)
            if not done and of_block and name in self._inherited:
                self._inherited.remove(name)
                done = True
        self._act(woken)
        if not done:
            words = _who(holder) if holder is not None else None
            raise NotHeldError(
                f"{in_words(me)} can't release lock {name!r}: "
                + (f"it is held by {words}" if words else "nobody holds it")
                + "; nothing was changed",
                name=name,
                holder=words,
            )

    def _release_later(self, name: str, me: Owner) -> list[Place]:
        entry = self._entry(name)
        slot = self._mine(name, entry, me) or self._the_only_one(name, entry)
        if slot is None or slot.owner is None or not self._exit(slot, slot.owner) or not _is_empty(slot):
            return []
        return self._leave(name, entry, slot)

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
        with self._mutex:
            entry = self._entry(name)
            woken: list[Place] = []
            if self._exit(slot, me) and _is_empty(slot):
                woken = self._leave(name, entry, slot)
            self._tidy(name, entry)
        self._act(woken)

    def free_all(self, slots: Sequence[Slot], me: Owner) -> None:
        """End one entry of `me` to each, the last taken first."""
        for slot in reversed(slots):
            self.free(slot, me)

    def free_collected(self, slot: Slot, me: Owner) -> None:
        """`free` for what a garbage collection may end, on any thread, task or closed loop: waits for nobody (L2).

        Of a generator's slot: whoever drives it may still be inside, and then the last of them frees the lock.
        """

        def chore() -> list[Place]:
            if self._exit(slot, me) and _is_empty(slot):
                return self._leave(slot.name, self._entry(slot.name), slot)
            return []

        self._chores.append(chore)
        self._do_chores()

    def pass_on(self, name: str) -> None:
        """The name has been left the quick way, and then somebody was seen: hand it over."""
        with self._mutex:
            entry = self._entry(name)
            woken = self._serve(name, entry)
            self._tidy(name, entry)
        self._act(woken)

    # -- under the mutex: who is inside, who comes next -------------------------------------------------

    def _entry(self, name: str) -> _Entry:
        entry = self.entries.get(name)
        if entry is None:
            entry = self.entries[name] = _Entry()
        return entry

    def _tidy(self, name: str, entry: _Entry) -> None:
        """A name that nobody waits for and nobody borrows costs nothing (L9)."""
        if not (entry.line or entry.chain or entry.evicted):
            self.entries.pop(name, None)

    def _inside(self, name: str, entry: _Entry) -> list[Slot]:
        """Who is inside at this moment, the root first.

        Ask once and go by the answer: the root may leave the quick way at any time, if it looked for an entry before
        there was one. It looks again, and will wait for the mutex to hand over.
        """
        root = self.slots.get(name)
        if root is None:
            return entry.chain.copy()
        return [root, *entry.chain] if entry.chain else [root]

    def _mine(self, name: str, entry: _Entry, me: Owner) -> Optional[Slot]:
        for slot in self._inside(name, entry):
            owner = slot.owner
            if owner is me:
                return slot
            if isinstance(owner, GeneratorOwner) and (owner.driver is me or me in owner.guests):
                return slot
        return None

    def _the_only_one(self, name: str, entry: _Entry) -> Optional[Slot]:
        inside = self._inside(name, entry)
        if len(inside) > 1:
            inside = [slot for slot in inside if slot.owner is not None and has_ended(slot.owner)]
        return inside[0] if len(inside) == 1 else None

    def _reenter(self, slot: Slot, me: Owner) -> None:
        if slot.owner is me:
            slot.depth += 1
        else:
            assert isinstance(slot.owner, GeneratorOwner)
            slot.owner.guests[me] = slot.owner.guests.get(me, 0) + 1

    def _exit(self, slot: Slot, me: Owner) -> bool:
        """Count one entry of `me` off; False if there is none."""
        owner = slot.owner
        if owner is me:
            slot.depth -= 1
            return True
        if isinstance(owner, GeneratorOwner) and owner.guests.get(me):
            owner.guests[me] -= 1
            if not owner.guests[me]:
                del owner.guests[me]
            return True
        return False

    def _lender(self, inside: list[Slot], slot: Slot) -> Optional[Slot]:
        """The nearest ancestor that is inside."""
        outer = slot.outer
        asks = slot.owner.driver if isinstance(slot.owner, GeneratorOwner) else None
        while outer is not None:
            if outer.name == slot.name and outer in inside:
                return outer
            outer = outer.outer
        for held in reversed(inside if asks is not None else ()):
            # a generator within another's steps, or between them, of the same driver
            holder = held.owner
            if isinstance(holder, GeneratorOwner) and holder.driver is asks:
                return held
        return None

    def _lend(self, entry: _Entry, inside: list[Slot], slot: Slot) -> None:
        if not entry.chain:
            entry.root = inside[0]
        entry.chain.append(slot)

    def _leave(self, name: str, entry: _Entry, slot: Slot) -> list[Place]:
        """Take a slot out; what it had lent stays inside, on loan from its own lender or as the new root."""
        if entry.chain:
            self._mend(name, entry)
        woken: list[Place] = []
        if slot in entry.chain:
            entry.chain.remove(slot)
        elif self.slots.get(name) is slot:
            heir = entry.line.first() if not entry.chain else None
            if entry.chain:
                self.slots[name] = entry.root = entry.chain.pop(0)
            elif heir is not None:  # in one step, so that no newcomer finds the name free
                self.slots[name] = heir.claim
                self._appoint(entry, heir, woken)
            else:
                del self.slots[name]
        slot.owner = None
        if entry.line:
            woken += self._serve(name, entry)
        self._tidy(name, entry)
        return woken

    def _mend(self, name: str, entry: _Entry) -> None:
        """The root left the quick way while it was lent: the first borrower is the root now.

        Whoever took the name in that moment took it before it looked for an entry; it will, and settle.
        """
        if self.slots.get(name) is entry.root:
            return
        entry.root = heir = entry.chain.pop(0)
        found = self.slots.setdefault(name, heir)
        if found is not heir:
            entry.evicted.add(found)
            self.slots[name] = heir

    def _serve(self, name: str, entry: _Entry) -> list[Place]:
        """Appoint whoever's turn it is; the caller wakes them after the mutex."""
        if entry.chain:
            self._mend(name, entry)
        woken: list[Place] = []
        if entry.line and not entry.chain and name not in self.slots:
            heir = entry.line.first()
            if heir is not None and self.slots.setdefault(name, heir.claim) is heir.claim:
                self._appoint(entry, heir, woken)
        while entry.hopeful:
            inside = self._inside(name, entry)
            borrower = next((w for w in entry.hopeful if inside and self._lender(inside, w.claim) is inside[-1]), None)
            if borrower is None:
                break
            self._lend(entry, inside, borrower.claim)
            self._appoint(entry, borrower, woken)
        return woken

    def _appoint(self, entry: _Entry, waiter: Place, woken: list[Place]) -> None:
        self._unlist(entry, waiter)
        waiter.claim.since = self._now()
        waiter.served = True
        woken.append(waiter)

    def _unlist(self, entry: _Entry, waiter: Place) -> None:
        entry.line.pop(waiter, None)
        if entry.hopeful:
            entry.hopeful.leave(waiter)
        if self._waiting.get(waiter.owner) is waiter:
            del self._waiting[waiter.owner]
        if waiter.blocks is not None:
            self._blocked.pop(waiter.blocks, None)

    # -- after the mutex --------------------------------------------------------------------------------

    def _act(self, woken: list[Place]) -> None:
        """What is to be done after each stay in the mutex: wake those whose turn has come, and the chores."""
        self._wake(woken)
        if self._chores:
            self._do_chores()

    def _wake(self, woken: list[Place]) -> None:
        try:
            for waiter in woken:
                if not waiter.bell.ring():  # its loop is closed: the turn goes on to the next
                    with self._mutex:
                        slot = waiter.claim
                        woken += self._leave(slot.name, self._entry(slot.name), slot)
        except BaseException:  # Ctrl-C in just this moment: nobody is to sleep on
            for waiter in woken:
                waiter.bell.ring()
            raise

    def _do_chores(self) -> None:
        """Do under the mutex what has been put aside.

        A garbage collection can come upon a thread inside the mutex; so what a collection may call puts its work
        aside, and doesn't wait for the mutex: whoever has it does the work afterwards.
        """
        while self._chores and not self._mutex._is_owned() and self._mutex.acquire(False):
            woken: list[Place] = []
            try:
                while self._chores:
                    woken += self._chores.popleft()()
            finally:
                self._mutex.release()
            self._wake(woken)

    # -- looking ----------------------------------------------------------------------------------------

    def holds(self, name: str, me: Owner) -> bool:
        """Whether `me` has an open entry to the name."""
        with self._mutex:
            slot = self._mine(name, self.entries.get(name) or _Entry(), me)
            owner = slot.owner if slot is not None else None
            mine = owner is me or (isinstance(owner, GeneratorOwner) and me in owner.guests)
        self._act([])
        return mine

    def _holder(self, name: str) -> Optional[Slot]:
        entry = self.entries.get(name)
        return entry.chain[-1] if entry is not None and entry.chain else self.slots.get(name)

    def timeout_error(self, name: str, timeout: float, me: Owner) -> CoordinationTimeoutError:
        """The error of a wait that was too long: who has it, since when, how many wait (L4)."""
        with self._mutex:
            slot = self._holder(name)
            owner = slot.owner if slot is not None else None
            held_for = self._now() - slot.since if slot is not None and owner is not None else None
            entry = self.entries.get(name)
            waiting = len(entry.line) if entry is not None else 0
        self._act([])
        tried = "is not free" if timeout == 0 else f"was not free within {age(timeout)}"
        if slot is None or owner is None or held_for is None:
            holder, state = None, "it has just been released"
        else:
            holder = named(owner, slot.agent)
            state = f"held for {age(held_for)} by {holder}{describe_orphan(owner)}"
        others = f"; {waiting} other{'s' if waiting != 1 else ''} waiting" if waiting else ""
        return CoordinationTimeoutError(
            f"lock {name!r} {tried} for {named(me)}: {state}{others}",
            name=name,
            timeout=timeout,
            holder=holder,
            held_for=held_for,
            waiting=waiting,
        )

    def _deadlock(self, name: str, ring: Ring) -> DeadlockError:
        cycle = ring_in_words(ring, self._now())
        hops = "".join(f"\n  {number}. {hop}" for number, hop in enumerate(cycle, 1))
        return DeadlockError(f"waiting for lock {name!r} would never end:{hops}", name=name, cycle=cycle)

    def _warn(self, waiter: Place) -> None:
        name = waiter.claim.name
        what = " and blocks its event loop meanwhile (use `async with`)" if waiter.blocks is not None else ""
        logger.warning(
            "%s has waited %s for lock %r%s\n%s",
            named(waiter.owner, waiter.claim.agent),
            age(self._now() - waiter.since),
            name,
            what,
            explain_locks(self.snapshot(), name),
        )

    def snapshot(self) -> tuple[LockInfo, ...]:
        """Every lock that is held or waited for, sorted by name (L11)."""
        with self._mutex:
            now = self._now()
            seen = []
            for name in sorted({*list(self.slots), *self.entries}):
                entry = self.entries.get(name)
                inside = self._inside(name, entry or _Entry())
                holders = [(slot, slot.owner, slot.since, slot.depth) for slot in inside]
                seen.append((name, holders, list(entry.line) if entry is not None else []))
        self._act([])
        return tuple(  # in words only after the mutex: it walks stacks
            LockInfo(
                name=name,
                holders=tuple(
                    HolderInfo(
                        who=in_words(owner),
                        agent=slot.agent or agent_of(owner),
                        held_for=now - since,
                        entries=depth,
                        borrowed=place > 0,
                        orphaned=has_ended(owner),
                        where=where(owner),
                    )
                    for place, (slot, owner, since, depth) in enumerate(holders)
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


def _quick_way(
    slots: dict[str, Slot],
    entries: dict[str, _Entry],
    now: Callable[[], float],
    settle: Callable[[Slot], None],
) -> Callable[[str, Owner], Optional[Slot]]:
    """The free path, without a mutex. A closure, since every attribute looked up on it shows in the figures."""
    setdefault = slots.setdefault
    held = HOLDS.get
    hold = HOLDS.set

    def quick(name: str, me: Owner) -> Optional[Slot]:
        """The slot of a name that is free, or the caller's already; else None: go the slow way."""
        slot = Slot()
        slot.name = name
        slot.owner = me
        slot.depth = 1
        slot.agent = None
        slot.since = now()
        outer: Optional[Slot] = held()
        if outer is None or (outer.owner is None and outer.outer is None):
            slot.outer = None
        else:
            slot.outer = live(outer)
        try:
            found = setdefault(name, slot)
            if found is slot:
                if name not in entries:
                    hold(slot)
                    return slot
                settle(slot)
                return None
        except BaseException:  # Ctrl-C in just this moment
            settle(slot)
            raise
        if found.owner is me:
            found.depth += 1
            return found
        return None

    return quick


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


def _released_inside(name: str) -> bool:
    """Whether the slot that this context entered last under the name was let go by hand: its block has lost it."""
    slot: Optional[Slot] = HOLDS.get()
    while slot is not None and slot.name != name:
        slot = slot.outer
    return slot is not None and slot.depth == _BY_HAND


def _is_empty(slot: Slot) -> bool:
    return slot.depth <= 0 and not (isinstance(slot.owner, GeneratorOwner) and slot.owner.guests)


def _who(slot: Slot) -> str:
    return "somebody who has just left" if slot.owner is None else named(slot.owner, slot.agent)
