"""Agents that come after others (A5): who has completed in which run, and who waits for that.

Only agents that some `after=` names are remembered, and only as long as their run goes on: until it has no open block
and nothing pending.
"""

from __future__ import annotations

import itertools
import threading
from asyncio import AbstractEventLoop
from typing import Any, Callable, Optional

import attrs

from ._clock import Clock, left_until
from ._log import about, logger
from ._owner import Owner, in_words, lent_worker, running_loop
from ._waitqueue import Bell, TaskBell, ThreadBell
from .deadlock import Graph, Hop, OtherWait, Wait, age, at, where
from .errors import CoordinationTimeoutError, DeadlockError, DependencyFailedError


@attrs.frozen(kw_only=True)
class AgentInfo:
    """A running agent that others may come after, or that comes after others, as a snapshot shows it (L11).

    Attributes:
        name: its name.
        who: the thread or task that runs it, in words.
        run: the id of its run; None outside of any.
        running_for: for how many seconds.
        waits_for: the agents that it waits for.
        where: the line of code that it is at.
    """

    name: str
    who: str
    run: Optional[str]
    running_for: float
    waits_for: tuple[str, ...]
    where: Optional[str]


class Running:
    """One call of an agent, while it runs."""

    __slots__ = ("agent", "bell", "missing", "owner", "run", "since", "warned")

    def __init__(self, agent: str, run: Optional[str], owner: Owner, since: float) -> None:
        self.agent: str = agent
        self.run: Optional[str] = run
        self.owner: Owner = owner
        self.since: float = since
        self.missing: tuple[str, ...] = ()  # what it waits for
        self.bell: Optional[Bell] = None
        self.warned: bool = False  # that this takes long


class _Run:
    """What is known of one run."""

    __slots__ = ("calls", "outcomes")

    def __init__(self) -> None:
        self.outcomes: dict[str, Optional[str]] = {}  # by agent: None if it completed, else what its error said
        self.calls: list[Running] = []


class Dependencies:
    """Who has completed, in the runs of one coordinator.

    Args:
        is_going_on: whether a run has an open block, or anything pending.
    """

    def __init__(self, clock: Clock, graph: Graph, is_going_on: Callable[[str], bool]) -> None:
        self.named: set[str] = set()  # the agents that some `after=` names
        self._declared: dict[str, set[tuple[str, ...]]] = {}  # what the functions of each name come after
        self._clock = clock
        self._graph = graph
        self._is_going_on = is_going_on
        self._runs: dict[Optional[str], _Run] = {}
        self._mutex = threading.RLock()  # re-entrant, since a collected generator ends its call (A1)

    def forget(self) -> None:
        """After a fork: no agent runs here, and none has completed (L13)."""
        self._mutex = threading.RLock()
        self._runs.clear()

    def declare(self, agent: str, after: tuple[str, ...]) -> None:
        """There is a function of this name, which comes after these."""
        with self._mutex:
            self._declared.setdefault(agent, set()).add(after)

    def copy(self) -> tuple[set[str], dict[str, set[tuple[str, ...]]]]:
        """What has been declared, for `restore`."""
        with self._mutex:
            return set(self.named), {name: set(ways) for name, ways in self._declared.items()}

    def restore(self, declared: tuple[set[str], dict[str, set[tuple[str, ...]]]]) -> None:
        """What is declared is what it was."""
        with self._mutex:
            self.named.intersection_update(declared[0])
            self._declared = declared[1]

    def begin(self, agent: str, run: Optional[str], owner: Owner) -> Running:
        """A call of an agent has begun."""
        call = Running(agent, run, owner, self._clock.monotonic())
        with self._mutex:
            self._runs.setdefault(run, _Run()).calls.append(call)
        return call

    def record(self, call: Running, error: Optional[str]) -> None:
        """It completed, or failed or was cancelled with an error that says this: those who wait for it go on."""
        with self._mutex:
            found = self._runs.get(call.run)
            if found is None or call not in found.calls or call.agent not in self.named:
                return
            found.outcomes[call.agent] = error
            bells = [other.bell for other in found.calls if call.agent in other.missing and other.bell is not None]
        for bell in bells:
            bell.ring()

    def end(self, call: Running) -> None:
        """It is over, and its end has been told: the run may be forgotten, if that has set nothing going."""
        with self._mutex:
            found = self._runs.get(call.run)
            if found is not None and call in found.calls:
                found.calls.remove(call)
        if call.run is not None:
            self.sweep(call.run)

    def sweep(self, run: str) -> None:
        """Something of the run has ended: if nothing of it goes on, it is forgotten."""
        with self._mutex:
            found = self._runs.get(run)
            if found is not None and not found.calls and not self._is_going_on(run):
                del self._runs[run]

    # -- waiting ------------------------------------------------------------------------------------------

    def wait(self, call: Running, after: tuple[str, ...], timeout: Optional[float]) -> None:
        """Block this thread until all agents in `after` have completed in the run of the call.

        Raises:
            DependencyFailedError: one of them has failed, or was cancelled.
            CoordinationTimeoutError: the time ran out.
            DeadlockError: one of them waits, in the end, for this very call (L5).
        """
        deadline = self._clock.deadline(timeout)
        wait = self._wait_of(call, running_loop())
        try:
            while not self._is_ready(call, after, bell := ThreadBell()):
                spell = self._spell(call, wait, deadline, timeout)
                with lent_worker():
                    bell.sleep(self._clock, spell)
        finally:
            self._stop(call, wait)

    async def wait_async(self, call: Running, after: tuple[str, ...], timeout: Optional[float]) -> None:
        """The same on a loop, which goes on meanwhile."""
        deadline = self._clock.deadline(timeout)
        wait = self._wait_of(call, None)
        try:
            while not self._is_ready(call, after, bell := TaskBell()):
                await bell.sleep(self._clock, self._spell(call, wait, deadline, timeout))
        finally:
            self._stop(call, wait)

    def _is_ready(self, call: Running, after: tuple[str, ...], bell: Bell) -> bool:
        """Whether the call may start; if not, the bell will ring when something has changed."""
        with self._mutex:
            outcomes = self._runs.setdefault(call.run, _Run()).outcomes  # `isolated` may have forgotten it
            for name in after:
                error = outcomes.get(name)
                if error is not None:
                    run = f" in run {call.run!r}" if call.run is not None else ""
                    raise DependencyFailedError(
                        f"agent {call.agent!r} did not start: agent {name!r}, which it comes after, ended{run} with "
                        f"{error}",
                        agent=call.agent,
                        dependency=name,
                        error=error,
                        run=call.run,
                    )
            call.missing = tuple(name for name in after if name not in outcomes)
            call.bell = bell
        return not call.missing

    def _wait_of(self, call: Running, blocks: Optional[AbstractEventLoop]) -> OtherWait:
        """What the graph is to know of this wait."""
        return OtherWait(call.owner, call.agent, "", lambda: self._whom(call), blocks)

    def _stop(self, call: Running, wait: OtherWait) -> None:
        with self._mutex:
            call.missing = ()
            call.bell = None
        self._graph.end_wait(wait)

    def _whom(self, call: Running) -> Wait:
        """Whose calls may bring what it waits for: of each agent that runs now, one. One that doesn't may begin yet."""
        with self._mutex:
            calls = self._runs.setdefault(call.run, _Run()).calls
            by_agent = [
                [
                    Hop(call.owner, other.owner, None, None, (f"agent {name!r}, which", " is running"))
                    for other in calls
                    if other.agent == name
                ]
                for name in call.missing
            ]
        return Wait(
            [hop for hops in by_agent for hop in hops],
            lambda free: all(not hops or any(hop.other in free for hop in hops) for hops in by_agent),
        )

    def _refuse_ring(self, call: Running) -> None:
        """If what it waits for comes, in the end, after itself, that would never end, whatever may begin yet (L5)."""
        with self._mutex:
            missing = call.missing
            found = self._runs.setdefault(call.run, _Run())
            able = set(found.outcomes) | {other.agent for other in found.calls if not other.missing}
            comes_after = {}
            todo = list(missing)
            while todo:
                name = todo.pop()
                if name in comes_after or name in able:
                    continue
                if name not in self._declared:  # it may be yet
                    able.add(name)
                    continue
                comes_after[name] = ways = [tuple(way) for way in self._declared[name]]
                todo += itertools.chain(*ways)
        more = True
        while more:
            freed = {name for name, ways in comes_after.items() if name not in able and any(able >= {*w} for w in ways)}
            able |= freed
            more = bool(freed)
        ring, at = [call.agent], next((name for name in missing if name not in able), None)
        if at is None:
            return
        while at not in ring:
            ring.append(at)
            at = next(name for way in comes_after[at] for name in way if name not in able)
        hops = tuple(f"agent {name!r} comes after agent {other!r}" for name, other in zip(ring, [*ring[1:], at]))
        raise DeadlockError(
            f"waiting for agent {missing[0]!r} would never end, whoever begins yet:\n"
            + "\n".join(f"  {number}. {hop}" for number, hop in enumerate(hops, 1)),
            name=missing[0],
            cycle=hops,
        )

    def _spell(
        self, call: Running, wait: OtherWait, deadline: Optional[float], timeout: Optional[float]
    ) -> Optional[float]:
        """How long to sleep until the time is up, or the wait is worth a warning (L12); refuses for ever (L5)."""
        now = self._clock.monotonic()
        if deadline is not None and timeout is not None and deadline <= now:
            missing = ", ".join(map(repr, call.missing))
            raise CoordinationTimeoutError(
                f"agent {call.agent!r} did not start: within {age(timeout)}, {missing} did not complete in its run",
                name=call.missing[0],
                timeout=timeout,
            )
        self._refuse_ring(call)
        wait.name = call.missing[0]
        wait.what = f"agent {wait.name!r}"
        self._graph.begin_wait(wait)
        slow = None if call.warned else self._graph.warn_after(wait.blocks)
        if slow is not None and call.since + slow <= now:
            call.warned = True
            slow = None
            self._warn(call, wait.blocks is not None)
        return left_until(now, deadline, None if slow is None else call.since + slow)

    def _warn(self, call: Running, blocks_loop: bool) -> None:
        hint = "\n  -> It blocks its event loop meanwhile: make the agent an `async def`." if blocks_loop else ""
        told = "\n".join(explain_agents(self.snapshot(), call.agent, call.run))
        logger.warning("%s%s", told, hint, extra=about(agent=call.agent, run=call.run))

    # -- looking ------------------------------------------------------------------------------------------

    def snapshot(self) -> tuple[AgentInfo, ...]:
        """The calls that run now, the oldest first."""
        with self._mutex:
            now = self._clock.monotonic()
            calls = [(call, call.missing) for run in self._runs.values() for call in run.calls]
        return tuple(
            AgentInfo(
                name=call.agent,
                who=in_words(call.owner),
                run=call.run,
                running_for=now - call.since,
                waits_for=missing,
                where=where(call.owner),
            )
            for call, missing in sorted(calls, key=_by_age)
        )


def _by_age(call: tuple[Running, Any]) -> float:
    return call[0].since


def explain_agents(
    agents: tuple[AgentInfo, ...], only: Optional[str] = None, only_run: Optional[str] = None
) -> list[str]:
    """Which agents wait for which, in plain words, and what to do (L11)."""
    running = {(agent.name, agent.run): agent for agent in agents}
    told = []
    for agent in agents:
        if not agent.waits_for or (only is not None and (agent.name, agent.run) != (only, only_run)):
            continue
        run = f" in run {agent.run!r}" if agent.run is not None else ""
        missing = ", ".join(
            f"{name!r} ({'running' if (name, agent.run) in running else 'not started'})" for name in agent.waits_for
        )
        lines = [
            f"Agent {agent.name!r} ({agent.who}) has waited for {age(agent.running_for)} for {missing}{run}.",
            *(f"  -> {_advice(name, run, running.get((name, agent.run)))}" for name in agent.waits_for),
        ]
        told.append("\n".join(lines))
    return told


def _advice(name: str, run: str, call: Optional[AgentInfo]) -> str:
    if call is None:
        return f"Nobody has called {name!r}{run} yet: who is to?"
    if call.waits_for:
        return f"{name!r} waits itself: see there."
    return f"{name!r} is at work{at(call.where)}."
