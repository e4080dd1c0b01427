"""The wait-for graph, and what to say about it: who waits for whom, since when, where, and what to do.

Nothing here decides or changes anything. The lock table asks under its mutex whether a wait would close a
ring (L5); the words are made afterwards, since they walk the stacks of those concerned.
"""

from __future__ import annotations

import os
from asyncio import AbstractEventLoop
from collections.abc import Container, Iterable
from types import FrameType
from typing import Any, Callable, Optional, Protocol, Union

import attrs

from ._owner import GeneratorOwner, Owner, ThreadOwner, agent_of, current_frame, has_ended, in_words
from ._waitqueue import Bell

_PACKAGE = os.path.dirname(os.path.abspath(__file__)) + os.sep
_PLUMBING = ("threading.py", f"asyncio{os.sep}", "contextlib.py", f"concurrent{os.sep}futures")


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
        where: the line of code that it is at.
    """

    who: str
    agent: Optional[str]
    held_for: float
    entries: int
    borrowed: bool
    orphaned: bool
    where: Optional[str]


@attrs.frozen(kw_only=True)
class WaiterInfo:
    """Somebody in line for a lock, as a snapshot shows it (L11).

    Attributes:
        who: the thread or task, in words.
        agent: the agent that it runs, if any.
        waiting_for: for how long it has been in line, in seconds.
        timeout: how long it is willing to wait, in seconds; None for ever.
        where: the line of code that it is at.
    """

    who: str
    agent: Optional[str]
    waiting_for: float
    timeout: Optional[float]
    where: Optional[str]


@attrs.frozen(kw_only=True)
class LockInfo:
    """One lock that is held or waited for, as a snapshot shows it (L11).

    Attributes:
        name: its name.
        holders: who is inside, the outermost first.
        waiters: who stands in line, the first first.
    """

    name: str
    holders: tuple[HolderInfo, ...]
    waiters: tuple[WaiterInfo, ...]


@attrs.frozen(kw_only=True)
class LimitInfo:
    """What a name allows and what is used of it, as a snapshot shows it (L11).

    Attributes:
        name: the name.
        concurrency: how many may be inside at once, as declared; None: any number.
        requests: how many may enter in any `per` seconds, as declared; None: any number.
        tokens: how many tokens they may use in any `per` seconds, as declared; None: any number.
        per: the window, in seconds.
        margin: by how many seconds it is kept longer.
        places_taken: how many are inside, those on loan not counted.
        requests_used: how many entries the present window holds.
        tokens_used: how many tokens it holds, reservations included.
        next_free: in how many seconds the next in line can enter, or, if nobody waits, a call that reserves no
            tokens; None: as soon as somebody leaves.
        held_back_for: for how many more seconds the API wants no calls (R4).
        waiting: how many wait.
    """

    name: str
    concurrency: Optional[int]
    requests: Optional[int]
    tokens: Optional[int]
    per: float
    margin: float
    places_taken: int
    requests_used: int
    tokens_used: float
    next_free: Optional[float]
    held_back_for: float
    waiting: int

    def in_words(self) -> str:
        """What is used, and when the next place is free."""
        parts = []
        if self.concurrency is not None:
            parts.append(f"{self.places_taken} of {self.concurrency} places are taken")
        if self.requests is not None:
            parts.append(f"{self.requests_used} of {self.requests} requests in {self.per:g} s are used")
        if self.tokens is not None:
            parts.append(f"{self.tokens_used:g} of {self.tokens} tokens in {self.per:g} s are used")
        if self.held_back_for:
            parts.append(f"the API wants no calls for another {self.held_back_for:.3g} s")
        if self.next_free is None:
            parts.append("the next may enter when somebody leaves")
        elif self.next_free:
            parts.append(f"the next may enter in {self.next_free:.3g} s")
        return "; ".join(parts)


Party = Union[Owner, AbstractEventLoop]
"""Who must go on: an owner, or the loop that is to run what has no task there yet."""


@attrs.frozen
class Hop:
    """One edge of the graph: `waiter` can't go on before `other` does.

    `lock` is what it waits for and `since` when `other` took it, None where `other` merely stands ahead in line.
    Without a lock, `why` are the words around `other` that say what it waits for; without these too, `waiter` is a
    task or a loop, whose thread `other` blocks.
    """

    waiter: Party
    other: Party
    lock: Optional[str]
    since: Optional[float]
    why: Optional[tuple[str, str]] = None


@attrs.frozen
class Wait:
    """Whom somebody waits for: `hops` lead to all who have a part in it.

    `ends` tells whether it will end some time, if those can go on who are in what it is given. Unless said otherwise
    all must.
    """

    hops: list[Hop]
    ends: Callable[[Container[Party]], bool] = attrs.field()

    @ends.default
    def _all_go_on(self) -> Callable[[Container[Party]], bool]:
        hops = self.hops  # and not this wait itself, which would be a cycle that keeps what its parties hold
        return lambda free: all(hop.other in free for hop in hops)


@attrs.define(eq=False)
class OtherWait:
    """A wait for something that is no lock.

    Attributes:
        owner: who waits.
        name: what for: the name of an agent or event.
        what: the same in words.
        whom: whom for, asked whenever somebody looks.
        blocks: the loop whose thread sleeps in it.
        bell: what wakes it to look again whether it can end.
        since: when it began.
    """

    owner: Owner
    name: str
    what: str
    whom: Callable[[], Wait]
    blocks: Optional[AbstractEventLoop] = None
    bell: Optional[Bell] = None
    since: float = 0.0


class Graph(Protocol):
    """Who waits for whom, for locks and otherwise: the lock table."""

    def begin_wait(self, wait: OtherWait) -> None:
        """Somebody is about to wait; raises `DeadlockError` if that could never end (L5)."""

    def end_wait(self, wait: OtherWait) -> None:
        """It is over."""

    def look_again(self, loop: AbstractEventLoop) -> None:
        """Something more is to run on this loop: a wait that blocks it is woken, and begins anew or is refused."""

    def warn_after(self, blocks: Optional[AbstractEventLoop]) -> Optional[float]:
        """After how many seconds a wait, on the thread of that loop, is worth a warning; None: never (L12)."""


def find_ring(start: Party, wait_of: Callable[[Party], Optional[Wait]]) -> tuple[Hop, ...]:
    """The hops from `start` around a ring, if it could never go on; else nothing. None: it waits for nobody."""
    waits: dict[Party, Wait] = {}
    free: set[Party] = set()
    todo = [start]
    while todo:
        owner = todo.pop()
        if owner in waits or owner in free:
            continue
        wait = wait_of(owner)
        if wait is None:
            free.add(owner)
        else:
            waits[owner] = wait
            todo += [hop.other for hop in wait.hops]
    more = True
    while more:  # whose wait ends once those go on who can, can go on too
        able = [owner for owner, wait in waits.items() if owner not in free and wait.ends(free)]
        free.update(able)
        more = bool(able)
    ring: list[Hop] = []
    passed: set[Party] = set()
    while start not in free and start not in passed:
        passed.add(start)
        ring.append(next(hop for hop in waits[start].hops if hop.other not in free))
        start = ring[-1].other
    return tuple(ring)


# -- in words -----------------------------------------------------------------------------------------------


def named(owner: Party, agent: Optional[str] = None) -> str:
    """The owner with the agent that it runs: `agent 'writer' (thread "T1")`."""
    if isinstance(owner, AbstractEventLoop):
        return "an event loop that is to run a handler"
    agent = agent or agent_of(owner)
    return f"agent {agent!r} ({in_words(owner)})" if agent else in_words(owner)


def age(seconds: float) -> str:
    """A duration that reads well."""
    if seconds < 60:
        return f"{seconds:.3g} s"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min {rest} s"


def where(owner: Party) -> Optional[str]:
    """The line of the program that a thread or task is at, past our own code and the standard library's waits."""
    if isinstance(owner, AbstractEventLoop):
        return None
    for frame in _frames(owner):
        path = frame.f_code.co_filename
        if not path.startswith(_PACKAGE) and not any(part in path for part in _PLUMBING):
            return f"{os.path.basename(path)}:{frame.f_lineno} in {frame.f_code.co_name}()"
    return None


def _frames(owner: Owner) -> Iterable[FrameType]:
    """The stack, innermost first."""
    if isinstance(owner, GeneratorOwner):
        return _frames(owner.driver) if owner.driver is not None else ()
    if isinstance(owner, ThreadOwner) or owner.get_coro() is None:
        return _outwards(current_frame(owner))
    chain: list[FrameType] = []
    awaited: Any = owner.get_coro()
    while awaited is not None:
        frame = getattr(awaited, "cr_frame", None) or getattr(awaited, "gi_frame", None)
        if frame is not None:
            chain.append(frame)
        awaited = getattr(awaited, "cr_await", None) or getattr(awaited, "gi_yieldfrom", None)
    if chain and chain[-1].f_back is not None:  # it is running now: what it has called stands on the thread's stack
        return _outwards(current_frame(owner))
    return reversed(chain)


def _outwards(frame: Optional[FrameType]) -> Iterable[FrameType]:
    while frame is not None:
        yield frame
        frame = frame.f_back


def at(place: Optional[str]) -> str:
    """The place as an apposition, if it is known."""
    return f", at {place}" if place else ""


def ring_in_words(ring: tuple[Hop, ...], now: float) -> tuple[str, ...]:
    """One sentence for each hop; the first is about whoever asked."""
    sentences = []
    for number, hop in enumerate(ring):
        verb = "would wait" if number == 0 else "waits"
        who, other = named(hop.waiter), named(hop.other)
        if hop.why is not None:
            before, after = hop.why
            sentences.append(f"{who} {verb} for {before} {other}{after}{at(where(hop.waiter))}")
        elif hop.lock is None:
            blocked = "that loop" if isinstance(hop.waiter, AbstractEventLoop) else f"the event loop of {who}"
            sentences.append(f"{blocked} can't go on: {other} blocks its thread (use `async with` or `await` there)")
        elif hop.since is None:
            sentences.append(
                f"{who} {verb} for lock {hop.lock!r} behind {other}, who stands ahead in line{at(where(hop.waiter))}"
            )
        else:
            sentences.append(
                f"{who} {verb} for lock {hop.lock!r}, which {other} has held for {age(now - hop.since)}"
                f"{at(where(hop.waiter))}"
            )
    return tuple(sentences)


def explain_locks(locks: Iterable[LockInfo], limits: Iterable[LimitInfo] = (), only: Optional[str] = None) -> str:
    """Who waits for whom, for how long, where, and what to do: for a tired person (L11)."""
    contended = [lock for lock in locks if lock.waiters and (only is None or lock.name == only)]
    waits = {waiter.who: lock.name for lock in locks for waiter in lock.waiters}
    by_name = {limit.name: limit for limit in limits}
    return "\n\n".join(_explain(lock, by_name.get(lock.name), waits) for lock in contended)


def _explain(lock: LockInfo, limit: Optional[LimitInfo], waits: dict[str, str]) -> str:
    lines = [] if limit is None else [f"Limit {limit.name!r}: {limit.in_words()}."]
    for holder in lock.holders:
        who = f"agent {holder.agent!r} ({holder.who})" if holder.agent else holder.who
        how = "on loan from the one above" if holder.borrowed else "held"
        lines.append(f"Lock {lock.name!r} is {how} by {who} for {age(holder.held_for)}{at(holder.where)}.")
    if not lock.holders and limit is None:
        lines.append(f"Lock {lock.name!r} is being handed over.")
    for place, waiter in enumerate(lock.waiters, 1):
        who = f"agent {waiter.agent!r} ({waiter.who})" if waiter.agent else waiter.who
        patience = "" if waiter.timeout is None else f", gives up after {age(waiter.timeout)}"
        lines.append(f"  {place}. {who} has waited for {age(waiter.waiting_for)}{patience}{at(waiter.where)}.")
    if limit is not None and limit.next_free is not None:
        lines.append("  -> Time is all that they wait for. If that takes too long, ask the API's provider for more.")
    else:
        lines.extend(f"  -> {advice}" for advice in _advice(lock, waits))
    return "\n".join(lines)


def _advice(lock: LockInfo, waits: dict[str, str]) -> Iterable[str]:
    for holder in lock.holders:
        if holder.orphaned:
            yield (
                f"{holder.who} has ended without releasing: nobody ever will. Take the lock with `with`, or release it "
                "in a `finally`."
            )
        elif holder.who in waits:
            yield f"{holder.who} itself waits for lock {waits[holder.who]!r}: look there."
        else:
            place = f"look at {holder.where}" if holder.where else "look at what it is doing"
            yield f"{holder.who} waits for no lock: {place}. If that takes long by nature, move it out of the block."


def explain_waits(waits: Iterable[OtherWait], now: float) -> list[str]:
    """Who waits for events, or for their end, in plain words (L11); `explain_agents` tells of those for agents."""
    return [
        f"{named(wait.owner)} has waited for {age(now - wait.since)} for {wait.what}{at(where(wait.owner))}."
        for wait in waits
        if wait.bell is not None
    ]


def describe_orphan(owner: Owner) -> str:
    """What to add about a holder whose thread or task is over (L8)."""
    return ", which has ended without releasing it" if has_ended(owner) else ""
