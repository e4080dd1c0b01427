"""The lock table and the handle that users hold.

How it keeps its word without a mutex on the free path: a name that nobody contends lives in one
dict, `slots`, and is taken by one atomic `setdefault`. Only a name with waiters or borrowers has an
`_Entry` beside it, and whoever sees an entry goes the slow way, under the mutex. The three rules:

- who takes a free name looks for an entry before and after taking it; found, it settles under the mutex;
- who is about to wait or borrow publishes the entry first and looks at the name again afterwards;
- who leaves looks for an entry before and after leaving.

So of any two who meet, at least one sees the other, and nobody waits for a hand-over that never comes.
"""

from __future__ import annotations

import threading
from collections import deque
from math import isnan
from types import TracebackType
from typing import Any, Callable, Optional, Sequence, Union

import attrs

from ._clock import Clock
from ._owner import (
    HOLDS,
    LOCAL,
    GeneratorOwner,
    Owner,
    agent_of,
    current_owner,
    current_task_of,
    has_ended,
    in_words,
    running_loop,
)
from ._waitqueue import Bell, TaskBell, ThreadBell, Waiter, WaitQueue
from .errors import CoordinationTimeoutError, NotHeldError


class Slot:
    """One held place under a lock: what `with coord.lock(name) as slot` yields.

    Attributes:
        name: the lock's name.
        agent: the agent that took it through `@coordinate(..., lock_name=...)`, else None.
    """

    # `owner` is who holds it, None once it has ended; `since` is monotonic; `outer` is the slot entered
    # before in the same context; `depth` counts entries of its owner. Written by the table alone. There is
    # no __init__: this object is made for every entry, and a call would cost as much as all the rest.
    __slots__ = ("name", "agent", "owner", "since", "outer", "depth", "__weakref__")

    name: str
    agent: Optional[str]
    owner: Optional[Owner]
    since: float
    outer: Optional[Slot]
    depth: int

    def __repr__(self) -> str:
        return f"<Slot {self.name!r} {in_words(self.owner) if self.owner is not None else 'released'}>"


Place = Waiter[Slot]


class _Entry:
    """What the table knows of a name beyond its holder; it exists only while there is something to know."""

    __slots__ = ("line", "hopeful", "chain", "root", "evicted")

    def __init__(self) -> None:
        self.line: WaitQueue[Slot] = WaitQueue()
        self.hopeful: WaitQueue[Slot] = WaitQueue()  # those in line who may borrow
        self.chain: list[Slot] = []  # borrowers inside, each borrowing from the one before, the first from the root
        self.root: Optional[Slot] = None  # from whom the first of the chain borrows
        self.evicted: set[Slot] = set()  # took the name while it was only lent; each comes to settle


@attrs.frozen(kw_only=True)
class HolderInfo:
    """Somebody inside a lock, as a snapshot shows it (L11).

    Attributes:
        who: the thread or task, in words.
        agent: the agent that it runs, if any.
        held_for: for how long it has been inside, in seconds.
        entries: how many of its blocks are open.
        borrowed: whether it is inside because the one before it lent the lock (L2).
        orphaned: whether the thread or task has ended without releasing (L8).
    """

    who: str
    agent: Optional[str]
    held_for: float
    entries: int
    borrowed: bool
    orphaned: bool


@attrs.frozen(kw_only=True)
class WaiterInfo:
    """Somebody in line for a lock, as a snapshot shows it (L11).

    Attributes:
        who: the thread or task, in words.
        agent: the agent that it runs, if any.
        waiting_for: for how long it has been in line, in seconds.
        timeout: how long it is willing to wait, in seconds; None for ever.
    """

    who: str
    agent: Optional[str]
    waiting_for: float
    timeout: Optional[float]


@attrs.frozen(kw_only=True)
class LockInfo:
    """One lock that is held or waited for, as a snapshot shows it (L11): holders outermost first, waiters in line order."""

    name: str
    holders: tuple[HolderInfo, ...]
    waiters: tuple[WaiterInfo, ...]


def check_name(name: object) -> str:
    """Refuse what can't name a lock (L10)."""
    if not isinstance(name, str):
        raise TypeError(f"a lock's name must be a string, not {type(name).__name__}: {name!r}")
    if not name:
        raise ValueError("a lock's name must not be empty")
    return name


def check_timeout(timeout: Any) -> Optional[float]:
    """Refuse what can't be a timeout (L4): None waits, 0 tries once, positive seconds wait that long."""
    if timeout is None:
        return None
    if isinstance(timeout, bool) or not isinstance(timeout, (int, float)):
        raise TypeError(f"a timeout must be a number of seconds or None, not {type(timeout).__name__}: {timeout!r}")
    if isnan(timeout) or timeout < 0:
        raise ValueError(f"a timeout must be 0 (try once), positive, or None (wait), not {timeout!r}")
    return None if timeout == float("inf") else float(timeout)


class LockTable:
    """All locks of one coordinator, for threads and tasks of any loop together (L1, L2, L3)."""

    def __init__(self, clock: Clock, timeout: Optional[float] = None) -> None:
        self.timeout = timeout  # of those who name none
        self._clock = clock
        self._now = clock.monotonic
        self.slots: dict[str, Slot] = {}
        self.entries: dict[str, _Entry] = {}
        self._mutex = threading.Lock()
        self._litter: deque[Slot] = deque()  # generators' slots to be freed by whoever has the mutex next

    # -- taking: the decision ---------------------------------------------------------------------------

    def quick(self, name: str, me: Owner) -> Optional[Slot]:
        """The slot of a name that is free, or the caller's already, without a mutex; else None: go the slow way."""
        entries = self.entries
        if name in entries:
            return None
        slots = self.slots
        found = slots.get(name)
        if found is None:
            slot = Slot()
            slot.name = name
            slot.owner = me
            slot.since = self._now()
            slot.depth = 1
            slot.agent = None
            outer = HOLDS.get()
            if outer is None or (outer.owner is None and outer.outer is None):
                slot.outer = None
            else:
                slot.outer = _live(outer)
            try:
                if slots.setdefault(name, slot) is slot:
                    if name not in entries:
                        HOLDS.set(slot)
                        return slot
                    self._settle(slot)
            except BaseException:  # Ctrl-C in just this moment
                self._settle(slot)
                raise
            return None
        if found.owner is me:
            found.depth += 1
            return found
        return None

    def _settle(self, slot: Slot) -> None:
        """The name was taken the quick way, but somebody waits for it or has it on loan: undo, and let them pass."""
        with self._mutex:
            entry = self._entry(slot.name)
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
    ) -> Union[Slot, Place, None]:
        """Decide under the mutex: the slot, or a waiter that stands in line, or None where nobody wants to wait."""
        outer = HOLDS.get()
        slot = Slot()
        slot.name = name
        slot.owner = me
        slot.depth = 1
        slot.outer = outer if outer is None else _live(outer)
        slot.agent = agent
        with self._mutex:
            slot.since = self._now()
            entry = self._entry(name)
            woken = self._serve(name, entry)
            got = self._place(name, entry, slot, bell, timeout)
            self._tidy(name, entry)
        self._act(woken)
        if got is slot and lend:
            HOLDS.set(slot)
        return got

    def _place(
        self, name: str, entry: _Entry, slot: Slot, bell: Optional[Bell], timeout: Optional[float]
    ) -> Union[Slot, Place, None]:
        me = slot.owner
        assert me is not None
        mine = self._mine(name, entry, me)
        if mine is not None:
            self._reenter(mine, me)
            return mine
        if name not in self.slots and self.slots.setdefault(name, slot) is slot:
            return slot
        lender = self._lender(name, entry, slot)
        if lender is not None and lender is self._inside(name, entry)[-1]:
            self._lend(name, entry, slot)
            return slot
        if bell is None:
            return None
        waiter = Waiter(me, slot, slot.since, timeout, bell)
        entry.line.join(waiter)
        if lender is not None:
            entry.hopeful.join(waiter)
        return waiter

    # -- taking: the drivers ----------------------------------------------------------------------------

    def acquire(
        self, name: str, timeout: Optional[float], me: Owner, agent: Optional[str] = None, lend: bool = True
    ) -> Optional[Slot]:
        """Take the name, waiting on this thread where need be; None if the time ran out (L3, L4, L7)."""
        bell = ThreadBell()
        got = self._decide(name, me, bell if timeout != 0 else None, timeout, agent, lend)
        if got is None or isinstance(got, Slot):
            return got
        try:
            bell.sleep(self._clock, timeout)
        except BaseException:
            self._give_up(got)
            raise
        return self._wake_up(got, lend)

    async def acquire_async(
        self, name: str, timeout: Optional[float], me: Owner, agent: Optional[str] = None, lend: bool = True
    ) -> Optional[Slot]:
        """Take the name, waiting on this loop where need be; None if the time ran out (L3, L4, L7)."""
        bell = TaskBell()
        got = self._decide(name, me, bell if timeout != 0 else None, timeout, agent, lend)
        if got is None or isinstance(got, Slot):
            return got
        try:
            await bell.sleep(self._clock, timeout)
        except BaseException:
            self._give_up(got)
            raise
        return self._wake_up(got, lend)

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
        """Take all names in the order given, or none (L6): the slots, or the name for which the time ran out."""
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
            if waiter.served:
                return False
            name = waiter.claim.name
            entry = self._entry(name)
            entry.line.leave(waiter)
            entry.hopeful.leave(waiter)
            self._tidy(name, entry)
        self._act([])
        return True

    def _give_up(self, waiter: Place) -> None:
        """Leave nothing behind (L7): neither a place in line nor a turn that came meanwhile."""
        if not self._leave_line(waiter):
            self.free(waiter.claim, waiter.owner)

    # -- releasing --------------------------------------------------------------------------------------

    def release(self, name: str, of_block: bool = False) -> None:
        """End one entry of the caller's (L8).

        `of_block` says that a `with` block ends: it had entered, so where its thread or task is not inside (an
        async generator that is closed by another task), the entry is that of the only one who is.
        """
        slot = self.slots.get(name)
        if slot is not None and name not in self.entries:
            # in a block, the slot that this context entered last is this block's; else ask who is asking
            if (of_block and slot is HOLDS.get()) or slot.owner is current_owner():
                if slot.depth > 1:
                    slot.depth -= 1
                    return
                del self.slots[name]
                slot.owner = None
                if name in self.entries:
                    self.pass_on(name)
                return
        self._release_slowly(name, current_owner(), of_block)

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

    def free_generator(self, slot: Slot) -> None:
        """End the hold of a generator, on any thread, task or closed loop, in a garbage collection too (L2).

        Whoever drives it may still be inside by an entry of its own: then the last of them frees the lock. A
        collection can come upon this very thread inside the mutex, so nobody waits for the mutex here: whoever has
        it sweeps afterwards.
        """
        self._litter.append(slot)
        self._clear_litter()

    def _clear_litter(self) -> None:
        while self._litter and self._mutex.acquire(False):
            try:
                woken = self._sweep()
            finally:
                self._mutex.release()
            self._wake_all(woken)

    def _sweep(self) -> list[Place]:
        woken: list[Place] = []
        while self._litter:
            slot = self._litter.popleft()
            slot.depth = 0
            if _is_empty(slot):
                woken += self._leave(slot.name, self._entry(slot.name), slot)
        return woken

    def _release_slowly(self, name: str, me: Owner, of_block: bool) -> None:
        with self._mutex:
            entry = self._entry(name)
            woken = self._serve(name, entry)
            slot = self._mine(name, entry, me)
            if slot is None and of_block:
                slot = self._the_only_one(name, entry)
                me = slot.owner if slot is not None and slot.owner is not None else me
            done = slot is not None and self._exit(slot, me)
            if done and slot is not None and _is_empty(slot):
                woken += self._leave(name, entry, slot)
            self._tidy(name, entry)
            holder = self._holder(name)
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
        root = self.slots.get(name)
        return entry.chain if root is None else [root, *entry.chain]

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

    def _lender(self, name: str, entry: _Entry, slot: Slot) -> Optional[Slot]:
        """The nearest ancestor that is inside."""
        outer = slot.outer
        if outer is None:
            return None
        inside = self._inside(name, entry)
        while outer is not None:
            if outer.name == name and outer in inside:
                return outer
            outer = outer.outer
        return None

    def _may_borrow(self, name: str, entry: _Entry, slot: Slot) -> bool:
        lender = self._lender(name, entry, slot)
        return lender is not None and lender is self._inside(name, entry)[-1]

    def _lend(self, name: str, entry: _Entry, slot: Slot) -> None:
        if not entry.chain:
            entry.root = self.slots[name]
        entry.chain.append(slot)

    def _leave(self, name: str, entry: _Entry, slot: Slot) -> list[Place]:
        """Take a slot out; what it had lent stays inside, on loan from its own lender or as the new root."""
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
        woken += self._serve(name, entry)
        self._tidy(name, entry)
        return woken

    def _mend(self, name: str, entry: _Entry) -> None:
        """The root left the quick way while it was lent: the first borrower is the root now.

        Whoever took the name in that moment took it before it looked for an entry; it will, and settle.
        """
        if not entry.chain:
            return
        found = self.slots.get(name)
        if found is entry.root:
            return
        if found is not None:
            entry.evicted.add(found)
        self.slots[name] = entry.root = entry.chain.pop(0)

    def _serve(self, name: str, entry: _Entry) -> list[Place]:
        """Appoint whoever's turn it is; the caller wakes them after the mutex."""
        self._mend(name, entry)
        woken: list[Place] = []
        heir = entry.line.first()
        if heir is not None and name not in self.slots and self.slots.setdefault(name, heir.claim) is heir.claim:
            self._appoint(entry, heir, woken)
        if entry.hopeful:
            self._serve_borrowers(name, entry, woken)
        return woken

    def _serve_borrowers(self, name: str, entry: _Entry, woken: list[Place]) -> None:
        found = True
        while found:
            found = False
            for waiter in entry.hopeful:
                if self._may_borrow(name, entry, waiter.claim):
                    self._lend(name, entry, waiter.claim)
                    self._appoint(entry, waiter, woken)
                    found = True
                    break

    def _appoint(self, entry: _Entry, waiter: Place, woken: list[Place]) -> None:
        entry.line.leave(waiter)
        entry.hopeful.leave(waiter)
        waiter.claim.since = self._now()
        waiter.served = True
        woken.append(waiter)

    # -- after the mutex --------------------------------------------------------------------------------

    def _act(self, woken: list[Place]) -> None:
        """What is to be done after each stay in the mutex: wake those whose turn has come, and sweep."""
        self._wake_all(woken)
        if self._litter:
            self._clear_litter()

    def _wake_all(self, woken: list[Place]) -> None:
        for waiter in woken:
            if not waiter.bell.ring():
                self.free(waiter.claim, waiter.owner)  # its loop is closed: the turn goes on to the next

    # -- looking ----------------------------------------------------------------------------------------

    def locked(self, name: str) -> bool:
        """Whether anybody holds the name at this moment."""
        return name in self.slots

    def holds(self, name: str, me: Owner) -> bool:
        """Whether `me` has an open entry to the name."""
        with self._mutex:
            slot = self._mine(name, self.entries.get(name) or _Entry(), me)
            mine = slot is not None and (
                slot.owner is me or (isinstance(slot.owner, GeneratorOwner) and me in slot.owner.guests)
            )
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
            held_for = self._now() - slot.since if slot is not None else None
            entry = self.entries.get(name)
            waiting = len(entry.line) if entry is not None else 0
        self._act([])
        tried = "is not free" if timeout == 0 else f"was not free within {timeout:g} s"
        if slot is None or owner is None:
            state = "it has just been released"
        else:
            state = f"held for {held_for:.3g} s by {_who(slot)}"
            if has_ended(owner):
                state += ", which has ended without releasing it"
        others = f"; {waiting} other{'s' if waiting != 1 else ''} waiting" if waiting else ""
        return CoordinationTimeoutError(
            f"lock {name!r} {tried} for {_named(agent_of(me), me)}: {state}{others}",
            name=name,
            timeout=timeout,
            holder=_who(slot) if slot is not None and owner is not None else None,
            held_for=held_for,
            waiting=waiting,
        )

    def snapshot(self) -> tuple[LockInfo, ...]:
        """Every lock that is held or waited for, sorted by name (L11)."""
        with self._mutex:
            now = self._now()
            names = sorted({*list(self.slots), *self.entries})
            seen = []
            for name in names:
                entry = self.entries.get(name)
                root = self.slots.get(name)
                inside = ([] if root is None else [root]) + (entry.chain if entry is not None else [])
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
                    )
                    for waiter in waiters
                ),
            )
            for name, holders, waiters in seen
            if holders or waiters
        )


def _live(slot: Slot) -> Optional[Slot]:
    """The nearest slot of a chain that hasn't ended; shortens the chain behind it, so that it can't grow for ever."""
    found: Optional[Slot] = slot
    while found is not None and found.owner is None:
        found = found.outer
    if found is not None:
        while found.outer is not None and found.outer.owner is None:
            found.outer = found.outer.outer
    return found


def _patience(table: LockTable, own: Any, blocking: bool = True, timeout: Any = ...) -> Optional[float]:
    """How long to wait: what the call says, else what the handle says, else what the coordinator says."""
    if timeout is ... and blocking:
        timeout = table.timeout if own is ... else own
        return None if timeout is None else float(timeout)
    if timeout is ...:
        return 0
    if not blocking:
        raise ValueError("a timeout makes no sense with blocking=False")
    return check_timeout(timeout)


def _no_task(what: str) -> RuntimeError:
    return RuntimeError(f"awaiting {what} needs a running asyncio task (trio is not supported)")


def _is_empty(slot: Slot) -> bool:
    return slot.depth == 0 and not (isinstance(slot.owner, GeneratorOwner) and slot.owner.guests)


def _never(name: str, me: Owner) -> Optional[Slot]:
    """The quick way of a lock that doesn't lend: none, since a slot taken so is in its context for others to find."""
    return None


def _named(agent: Optional[str], owner: Owner) -> str:
    return f"agent {agent!r} ({in_words(owner)})" if agent else in_words(owner)


def _who(slot: Slot) -> str:
    owner = slot.owner
    if owner is None:
        return "somebody who has just left"
    return _named(slot.agent or agent_of(owner), owner)


class Lock:
    """A handle to a named lock: `with` and `async with`, `acquire` and `release`.

    Cheap, without state of its own, and shareable by all threads and tasks (L10). Reentrant for its
    holder, first come first served for everybody else (L2, L3).

    >>> from agentdiff import Coordinator
    >>> with Coordinator() as coord:
    ...     customer = coord.lock("customer_123")
    ...     with customer:
    ...         customer.locked()
    True
    """

    __slots__ = ("_table", "_slots", "_entries", "_quick", "_name", "_timeout", "_lend")

    def __init__(self, table: LockTable, name: str, timeout: Any = ..., lend: bool = True) -> None:
        self._table = table
        self._slots = table.slots
        self._entries = table.entries
        self._quick: Callable[[str, Owner], Optional[Slot]] = table.quick if lend else _never
        self._name = name
        self._timeout = timeout
        self._lend = lend

    @property
    def name(self) -> str:
        """The name that it stands for."""
        return self._name

    def __repr__(self) -> str:
        return f"<Lock {self._name!r}{' locked' if self.locked() else ''}>"

    def locked(self) -> bool:
        """Whether anybody holds it at this moment."""
        return self._table.locked(self._name)

    def acquire(self, blocking: bool = True, timeout: Any = ...) -> bool:
        """Take the lock; wait for it on this thread where need be (L3, L4).

        Args:
            blocking: False tries once and never waits.
            timeout: seconds: None waits, 0 tries once; if left out, the handle's own timeout.

        Returns:
            Whether the lock was taken.

        Raises:
            TypeError, ValueError: the timeout is no number, negative or NaN, or given with `blocking=False`.
        """
        patience = _patience(self._table, self._timeout, blocking, timeout)
        me = current_owner()
        return (self._quick(self._name, me) or self._table.acquire(self._name, patience, me, lend=self._lend)) is not None

    async def acquire_async(self, blocking: bool = True, timeout: Any = ...) -> bool:
        """Take the lock; the task waits for it where need be, the loop goes on (L3, L4).

        Args, Returns, Raises: as for `acquire`; `RuntimeError` outside asyncio (L13).
        """
        patience = _patience(self._table, self._timeout, blocking, timeout)
        me = current_task_of(running_loop())
        if me is None:
            raise _no_task(f"lock {self._name!r}")
        return bool(
            self._quick(self._name, me) or await self._table.acquire_async(self._name, patience, me, lend=self._lend)
        )

    def _enter_slowly(self, me: Owner) -> Slot:
        timeout = _patience(self._table, self._timeout)
        slot = self._table.acquire(self._name, timeout, me, lend=self._lend)
        if slot is None:
            raise self._table.timeout_error(self._name, timeout or 0, me)
        return slot

    async def _enter_slowly_async(self, me: Owner) -> Slot:
        timeout = _patience(self._table, self._timeout)
        slot = await self._table.acquire_async(self._name, timeout, me, lend=self._lend)
        if slot is None:
            raise self._table.timeout_error(self._name, timeout or 0, me)
        return slot

    def release(self) -> None:
        """End one entry of the caller's.

        Raises:
            NotHeldError: the calling thread or task doesn't hold it; nothing was changed (L8).
        """
        self._table.release(self._name)

    # The four methods below are the product's hottest path: flat on purpose, each call within them shows.

    def __enter__(self) -> Slot:
        me = LOCAL.me if running_loop() is None else current_owner()
        quick = self._quick
        slot = quick(self._name, me)
        return slot if slot is not None else self._enter_slowly(me)

    def __exit__(
        self, kind: Optional[type[BaseException]], error: Optional[BaseException], trace: Optional[TracebackType]
    ) -> None:
        slot: Optional[Slot] = HOLDS.get()  # what this context entered last is this block's, if it is inside at all
        name = self._name
        slots = self._slots
        if slot is not None and slots.get(name) is slot and name not in self._entries:
            if slot.depth > 1:
                slot.depth -= 1
                return
            del slots[name]
            slot.owner = None
            if name in self._entries:
                self._table.pass_on(name)
        else:
            self._table.release(name, True)

    async def __aenter__(self) -> Slot:
        me = current_task_of(running_loop())
        if me is None:
            raise _no_task(f"lock {self._name!r}")
        quick = self._quick
        slot = quick(self._name, me)
        return slot if slot is not None else await self._enter_slowly_async(me)

    async def __aexit__(
        self, kind: Optional[type[BaseException]], error: Optional[BaseException], trace: Optional[TracebackType]
    ) -> None:
        self.__exit__(kind, error, trace)


class LockGroup:
    """A handle to several locks: all or none, always taken in the same order, so that two groups can't deadlock (L6).

    A timeout covers the whole: what the first lock leaves of it is for the others. A name given twice counts once.
    """

    __slots__ = ("_table", "_names", "_timeout", "_lend")

    def __init__(
        self, table: LockTable, names: tuple[str, ...], timeout: Any = ..., lend: bool = True
    ) -> None:
        self._table = table
        self._names = tuple(sorted(set(names)))
        self._timeout = timeout
        self._lend = lend

    @property
    def names(self) -> tuple[str, ...]:
        """The names, in the order in which they are taken."""
        return self._names

    def __repr__(self) -> str:
        return f"<LockGroup {', '.join(map(repr, self._names))}>"

    def locked(self) -> bool:
        """Whether anybody holds any of them at this moment."""
        return any(self._table.locked(name) for name in self._names)

    def acquire(self, blocking: bool = True, timeout: Any = ...) -> bool:
        """Take all, or none: see `Lock.acquire`."""
        patience = _patience(self._table, self._timeout, blocking, timeout)
        return self._table.acquire_all(self._names, patience, current_owner(), lend=self._lend)[1] is None

    async def acquire_async(self, blocking: bool = True, timeout: Any = ...) -> bool:
        """Take all, or none: see `Lock.acquire_async`."""
        patience = _patience(self._table, self._timeout, blocking, timeout)
        return (await self._table.acquire_all_async(self._names, patience, self._task(), lend=self._lend))[1] is None

    def release(self) -> None:
        """End one entry of the caller's to each.

        Raises:
            NotHeldError: the caller doesn't hold all of them; nothing was changed (L8).
        """
        me = current_owner()
        missing = [name for name in self._names if not self._table.holds(name, me)]
        for name in missing or reversed(self._names):
            self._table.release(name)

    def __enter__(self) -> tuple[Slot, ...]:
        me = current_owner()
        timeout = _patience(self._table, self._timeout)
        slots, missed = self._table.acquire_all(self._names, timeout, me, lend=self._lend)
        if missed is not None:
            raise self._table.timeout_error(missed, timeout or 0, me)
        return tuple(slots)

    def __exit__(
        self, kind: Optional[type[BaseException]], error: Optional[BaseException], trace: Optional[TracebackType]
    ) -> None:
        for name in reversed(self._names):
            self._table.release(name, True)

    async def __aenter__(self) -> tuple[Slot, ...]:
        me = self._task()
        timeout = _patience(self._table, self._timeout)
        slots, missed = await self._table.acquire_all_async(self._names, timeout, me, lend=self._lend)
        if missed is not None:
            raise self._table.timeout_error(missed, timeout or 0, me)
        return tuple(slots)

    async def __aexit__(
        self, kind: Optional[type[BaseException]], error: Optional[BaseException], trace: Optional[TracebackType]
    ) -> None:
        self.__exit__(kind, error, trace)

    def _task(self) -> Owner:
        me: Optional[Owner] = current_task_of(running_loop())
        if me is None:
            raise _no_task(repr(self))
        return me
