"""Speed and memory of agentdiff as ratios to a floor that is measured beside it.

    python tests/benchmarks/bench.py [--quick] [--only NAME]...

Each line is a median; the contestants of one entry take turns in short slices, so that a processor that changes its
speed changes it for all. The first line of an entry is its floor. Peers take part where they can be imported: aiologic,
anyio, blinker, pyee, wrapt. Times say little; compare ratios.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import functools
import gc
import importlib
import json
import os
import queue
import subprocess
import sys
import tempfile
import threading
import time
import tracemalloc
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import count, repeat
from pathlib import Path
from statistics import median
from typing import Any, Optional

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from agentdiff import Coordinator  # noqa: E402

now = time.perf_counter
Run = Callable[[int], Any]  # does so many operations


def peer(name: str) -> Any:
    """The module, or None where it is not installed."""
    try:
        return importlib.import_module(name)
    except ImportError:
        return None


class Bench:
    """What one entry prints. `quick` is for a look whether it runs at all."""

    def __init__(self, quick: bool) -> None:
        self.quick = quick

    def race(self, contestants: dict[str, Run], *, slice_s: float = 0.004, rounds: int = 150) -> None:
        """Time them in turns; each with as many operations as fill a slice."""
        if self.quick:
            slice_s, rounds = slice_s / 4, 5
        sizes = {}
        for name, run in contestants.items():
            size = 8
            while True:
                begun = now()
                run(size)
                took = now() - begun
                if took >= slice_s:
                    break
                size = max(size * 2, int(size * slice_s / max(took, 1e-7) * 0.6))
            sizes[name] = size
        times: dict[str, list[float]] = {name: [] for name in contestants}
        for _ in range(rounds):
            for name, run in contestants.items():
                begun = now()
                run(sizes[name])
                times[name].append((now() - begun) / sizes[name])
        self.show({name: median(found) for name, found in times.items()})

    def show(self, seconds: dict[str, float], more: Optional[dict[str, str]] = None) -> None:
        """The figures of one entry, the floor first."""
        floor = next(iter(seconds.values()))
        unit, factor = ("ns", 1e9) if floor < 2e-6 else ("us", 1e6) if floor < 2e-3 else ("ms", 1e3)
        for name, value in seconds.items():
            note = f"  {more[name]}" if more else ""
            print(f"  {name:50}{value * factor:10.1f} {unit}{value / floor:9.2f} x{note}")

    def show_bytes(self, sizes: dict[str, float]) -> None:
        """The same for memory."""
        floor = next(iter(sizes.values()))
        for name, size in sizes.items():
            print(f"  {name:50}{size:10.0f} bytes{size / floor:6.2f} x")


ENTRIES: dict[str, Callable[[Bench], None]] = {}


def entry(function: Callable[[Bench], None]) -> Callable[[Bench], None]:
    """A function that measures; its name is for --only, its docstring for people."""
    ENTRIES[function.__name__] = function
    return function


def taking(lock_of: Callable[[str], Any], name: str = "x") -> Run:
    """Take the lock of a name and let it go."""

    def run(n: int) -> None:
        for _ in repeat(None, n):
            with lock_of(name):
                pass

    return run


def taking_handle(lock: Any) -> Run:
    """The same without asking for the lock by its name."""

    def run(n: int) -> None:
        for _ in repeat(None, n):
            with lock:
                pass

    return run


# -- locks ----------------------------------------------------------------------------------------------------


@entry
def lock_free(bench: Bench) -> None:
    """`with` a named lock that is free."""
    with Coordinator() as coord:
        locks = {"x": threading.RLock()}
        contestants = {
            "threading.RLock in a dict": taking(locks.__getitem__),
            'with coord.lock("x")': taking(coord.lock),
            "with a handle kept from before": taking_handle(coord.lock("x")),
        }
        if aiologic := peer("aiologic"):
            contestants["aiologic.RLock in a dict"] = taking({"x": aiologic.RLock()}.__getitem__)
        bench.race(contestants)


@entry
def lock_held(bench: Bench) -> None:
    """Taken again by its holder."""
    with Coordinator() as coord:
        locks = {"x": threading.RLock()}
        with contextlib.ExitStack() as stack:
            stack.enter_context(locks["x"])
            stack.enter_context(coord.lock("x"))
            contestants = {
                "threading.RLock in a dict": taking(locks.__getitem__),
                'with coord.lock("x")': taking(coord.lock),
            }
            if aiologic := peer("aiologic"):
                theirs = {"x": aiologic.RLock()}
                stack.enter_context(theirs["x"])
                contestants["aiologic.RLock in a dict"] = taking(theirs.__getitem__)
            bench.race(contestants)


@entry
def lock_beside(bench: Bench) -> None:
    """Free, while another name is held and waited for."""
    with Coordinator() as coord:
        with coord.lock("y"):
            waiter = threading.Thread(target=taking(coord.lock, "y"), args=(1,))
            waiter.start()
            while not coord.snapshot().locks[0].waiters:
                time.sleep(0.001)
            locks = {"x": threading.RLock()}
            bench.race(
                {"threading.RLock in a dict": taking(locks.__getitem__), 'with coord.lock("x")': taking(coord.lock)}
            )
        waiter.join()


@entry
def lock_new_name(bench: Bench) -> None:
    """A new name each time; the floor makes an RLock, puts it into a dict, and takes it out again."""
    numbers = count()
    locks: dict[str, Any] = {}

    def floor(n: int) -> None:
        turn = next(numbers)
        for number in range(n):
            name = f"name-{turn}-{number}"
            with locks.setdefault(name, threading.RLock()):
                pass
            del locks[name]

    with Coordinator() as coord:

        def ours(n: int) -> None:
            turn = next(numbers)
            for number in range(n):
                with coord.lock(f"name-{turn}-{number}"):
                    pass

        bench.race({"threading.RLock in a dict": floor, "with coord.lock(name)": ours})


@entry
def lock_async(bench: Bench) -> None:
    """`async with` a named lock that is free."""
    loop = asyncio.new_event_loop()

    def awaiting(lock_of: Callable[[str], Any]) -> Run:
        async def run(n: int) -> None:
            for _ in repeat(None, n):
                async with lock_of("x"):
                    pass

        return lambda n: loop.run_until_complete(run(n))

    async def made(make: Callable[[], Any]) -> dict[str, Any]:  # on 3.9 a lock belongs to the loop that made it
        return {"x": make()}

    with Coordinator() as coord:
        contestants = {
            "asyncio.Lock in a dict": awaiting(loop.run_until_complete(made(asyncio.Lock)).__getitem__),
            'async with coord.lock("x")': awaiting(coord.lock),
        }
        for name in ("aiologic", "anyio"):
            if module := peer(name):
                locks = loop.run_until_complete(made(module.Lock))
                contestants[f"{name}.Lock in a dict"] = awaiting(locks.__getitem__)
        bench.race(contestants)
    loop.close()


THREADS = 8


@entry
def lock_handover(bench: Bench) -> None:
    """8 threads, all in line before the first may go, each time the next one's turn; per acquisition."""
    ring = [threading.Lock() for _ in range(THREADS)]
    for lock in ring:
        lock.acquire()

    def around(n: int, place: int) -> None:
        mine, following = ring[place], ring[(place + 1) % THREADS]
        for _ in repeat(None, n):
            mine.acquire()
            following.release()

    def floor(n: int) -> float:
        threads = [threading.Thread(target=around, args=(n, place)) for place in range(THREADS)]
        for thread in threads:
            thread.start()
        time.sleep(0.005)
        begun = now()
        ring[0].release()
        for thread in threads:
            thread.join()
        ring[0].acquire()
        return now() - begun

    def contended(lock: Any) -> Callable[[int], float]:
        work = taking_handle(lock)

        def run(n: int) -> float:
            with lock:
                threads = [threading.Thread(target=work, args=(n,)) for _ in range(THREADS)]
                for thread in threads:
                    thread.start()
                time.sleep(0.005)
                begun = now()
            for thread in threads:
                thread.join()
            return now() - begun

        return run

    with Coordinator() as coord:
        contestants = {"a ring of raw locks": floor, 'with coord.lock("x")': contended(coord.lock("x"))}
        if aiologic := peer("aiologic"):
            contestants["aiologic.Lock"] = contended(aiologic.Lock())
        contestants["threading.RLock (not fair)"] = contended(threading.RLock())
        times: dict[str, list[float]] = {name: [] for name in contestants}
        turns = 10 if bench.quick else 50
        for _ in range(2 if bench.quick else 40):
            for name, run in contestants.items():
                times[name].append(run(turns) / turns / THREADS)
        bench.show({name: median(found) for name, found in times.items()})


@entry
def lock_hold_1ms(bench: Bench) -> None:
    """8 threads that hold it for 1 ms each: from a release to the next thread's turn; and how many are overtaken."""

    def hold(lock: Any, times: int) -> tuple[list[float], float]:
        stays: list[tuple[float, float, float, int]] = []  # asked, entered, left, by whom

        def work(me: int) -> None:
            time.sleep(me * 0.0003)
            for _ in range(times):
                asked = now()
                with lock:
                    entered = now()
                    time.sleep(0.001)
                    stays.append((asked, entered, now(), me))

        threads = [threading.Thread(target=work, args=(me,)) for me in range(THREADS)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        gaps = [after[1] - before[2] for before, after in zip(stays, stays[1:]) if before[3] != after[3]]
        overtaken = sum(any(late[0] > stay[0] for late in stays[:place]) for place, stay in enumerate(stays))
        return gaps, overtaken / len(stays)

    with Coordinator() as coord:
        contestants: dict[str, Any] = {"threading.Lock": threading.Lock(), 'with coord.lock("x")': coord.lock("x")}
        contestants["threading.RLock"] = threading.RLock()
        if aiologic := peer("aiologic"):
            contestants["aiologic.Lock"] = aiologic.Lock()
        gaps: dict[str, list[float]] = {name: [] for name in contestants}
        shares: dict[str, list[float]] = {name: [] for name in contestants}
        for _ in range(1 if bench.quick else 12):
            for name, lock in contestants.items():
                found, share = hold(lock, 5 if bench.quick else 12)
                gaps[name] += found or [1e-9]
                shares[name].append(share)
        bench.show(
            {name: median(found) for name, found in gaps.items()},
            {name: f"{median(found):.0%} overtaken" for name, found in shares.items()},
        )


# -- events ---------------------------------------------------------------------------------------------------


class Sink:
    """Handles by counting; `wait` blocks until so many have come."""

    def __init__(self) -> None:
        self.left = 0
        self.done = threading.Lock()

    def expect(self, n: int) -> None:
        self.left = n
        self.done.acquire(False)

    def __call__(self, data: Any) -> None:
        self.left -= 1
        if not self.left:
            self.done.release()

    def wait(self) -> None:
        self.done.acquire()


def through(send: Callable[[Any], Any], sink: Sink) -> Run:
    """Send so many, and wait until all are handled."""

    def run(n: int) -> None:
        sink.expect(n)
        for number in range(n):
            send(number)
        sink.wait()

    return run


@contextlib.contextmanager
def queue_and_thread(handle: Callable[[Any], Any]) -> Iterator[Callable[[Any], Any]]:
    """The floor of all buses: a `SimpleQueue`, and one thread that takes from it."""
    line: queue.SimpleQueue[Any] = queue.SimpleQueue()

    def work() -> None:
        get = line.get
        while True:
            item = get()
            if item is None:
                return
            handle(item)

    thread = threading.Thread(target=work)
    thread.start()
    try:
        yield line.put
    finally:
        line.put(None)
        thread.join()


def nothing(data: Any) -> None:
    pass


@entry
def emit(bench: Bench) -> None:
    """From emit to handled, many in a row; per event."""
    sink = Sink()
    with contextlib.ExitStack() as stack:
        coords = [stack.enter_context(Coordinator()) for _ in range(3)]
        for coord in coords:
            coord.on("ready", sink)
        for number in range(1000):
            coords[1].on(f"other-{number}", nothing)
        for number in range(100):
            coords[2].on(f"other-{number}-*", nothing)
        send = [functools.partial(coord.emit, "ready") for coord in coords]
        contestants = {
            "queue.SimpleQueue and a thread": through(stack.enter_context(queue_and_thread(sink)), sink),
            "coord.emit to one handler": through(send[0], sink),
            "  beside 1,000 handlers of other names": through(send[1], sink),
            "  beside 100 patterns that don't match": through(send[2], sink),
        }
        executor = stack.enter_context(ThreadPoolExecutor(1))
        contestants["ThreadPoolExecutor(1).submit"] = through(functools.partial(executor.submit, sink), sink)
        if pyee := peer("pyee"):
            emitter = pyee.EventEmitter()
            emitter.on("ready", sink)
            contestants["pyee, inline"] = through(functools.partial(emitter.emit, "ready"), sink)
        if blinker := peer("blinker"):
            signal = blinker.Signal("ready")
            signal.connect(sink)
            contestants["blinker, inline"] = through(signal.send, sink)
        bench.race(contestants, slice_s=0.06, rounds=25)


@entry
def emit_unheard(bench: Bench) -> None:
    """An event that nobody handles."""

    def floor(name: str, data: Any) -> None:
        pass

    def sending(send: Callable[..., Any], *args: Any) -> Run:
        def run(n: int) -> None:
            for _ in repeat(None, n):
                send(*args)

        return run

    with Coordinator() as coord:
        contestants = {"a call of an empty function": sending(floor, "x", 1), "coord.emit": sending(coord.emit, "x", 1)}
        if pyee := peer("pyee"):
            contestants["pyee"] = sending(pyee.EventEmitter().emit, "x", 1)
        if blinker := peer("blinker"):
            contestants["blinker"] = sending(blinker.Signal("x").send, 1)
        bench.race(contestants)


@entry
def store_sqlite(bench: Bench) -> None:
    """Events of about 150 bytes into SQLite, emitted and flushed; the same rows in the same table by `executemany`."""
    import sqlite3

    from agentdiff.stores.sqlite import SQLiteStore

    n = 1_000 if bench.quick else 20_000
    data = {"agent": "researcher", "result": "x" * 90, "duration": 0.25}
    insert = "INSERT INTO events (id, name, time, sender, run_id, parent_id, data) VALUES (?, ?, ?, ?, ?, ?, ?)"
    times: dict[str, list[float]] = {"sqlite3: executemany": [], "coord.emit and flush": [], "flush alone": []}
    with tempfile.TemporaryDirectory() as folder:
        SQLiteStore(f"{folder}/bare.db").close()
        bare = sqlite3.connect(f"{folder}/bare.db", isolation_level=None)
        bare.execute("PRAGMA synchronous = NORMAL")
        with Coordinator(store=f"sqlite:///{folder}/ours.db") as coord:
            for turn in range(3 if bench.quick else 15):
                rows = [
                    (f"0123456789-u{turn * n + k:x}", "done", time.time(), None, None, None, json.dumps(data))
                    for k in range(n)
                ]
                begun = now()
                for begin in range(0, n, 1000):
                    bare.execute("BEGIN")
                    bare.executemany(insert, rows[begin : begin + 1000])
                    bare.execute("COMMIT")
                times["sqlite3: executemany"].append((now() - begun) / n)
                begun = now()
                for _ in repeat(None, n):
                    coord.emit("done", data)
                emitted = now()
                coord.flush(60)
                times["coord.emit and flush"].append((now() - begun) / n)
                times["flush alone"].append((now() - emitted) / n)
        bare.close()
    bench.show({name: median(found) for name, found in times.items()})


@entry
def store_emit(bench: Bench) -> None:
    """`emit` at a thousand events a second: the 99th percentile, without a store, with SQLite, with one that hangs."""
    from agentdiff.stores.memory import MemoryStore

    class Hung(MemoryStore):
        def write(self, records: Any) -> None:
            time.sleep(3600)

    def p99(coord: Coordinator) -> float:
        took = []
        for _ in range(200 if bench.quick else 5000):
            begun = now()
            coord.emit("done", {"result": "x" * 100})
            took.append(now() - begun)
            time.sleep(0.001)
        return sorted(took)[len(took) * 99 // 100]

    with tempfile.TemporaryDirectory() as folder:
        found = {}
        for name, store in {"no store": None, "SQLite": f"sqlite:///{folder}/events.db", "hangs": Hung()}.items():
            with Coordinator(store=store, flush_timeout=0.1) as coord:
                found[name] = p99(coord)
        bench.show(found)


@entry
def emit_idle(bench: Bench) -> None:
    """On an idle bus: from one emit to the handler's start."""
    started = [0.0]
    done = threading.Lock()

    def handle(data: Any) -> None:
        started[0] = now()
        done.release()

    with contextlib.ExitStack() as stack:
        coord = stack.enter_context(Coordinator())
        coord.on("ready", handle)
        executor = stack.enter_context(ThreadPoolExecutor(1))
        sends: dict[str, Callable[[Any], Any]] = {
            "queue.SimpleQueue and a thread": stack.enter_context(queue_and_thread(handle)),
            "coord.emit": functools.partial(coord.emit, "ready"),
            "ThreadPoolExecutor(1).submit": functools.partial(executor.submit, handle),
        }
        times: dict[str, list[float]] = {name: [] for name in sends}
        done.acquire()
        for _ in range(20 if bench.quick else 1500):
            for name, send in sends.items():
                time.sleep(0.0002)  # so that the thread behind it has gone to rest
                begun = now()
                send(1)
                done.acquire()
                times[name].append(started[0] - begun)
        bench.show({name: median(found) for name, found in times.items()})


def longest_callback(scene: Callable[[], Any]) -> float:
    """How much CPU time the thread of a loop spends in its longest callback; a garbage collection is not counted."""
    took: list[float] = []
    run = asyncio.Handle._run

    def timed(handle: asyncio.Handle) -> None:
        begun = time.thread_time()
        run(handle)
        took.append(time.thread_time() - begun)

    asyncio.Handle._run = timed  # type: ignore[method-assign]
    gc.collect()
    gc.disable()
    try:
        asyncio.run(scene())
    finally:
        gc.enable()
        asyncio.Handle._run = run  # type: ignore[method-assign]
    return max(took)


async def crowd(send: Callable[[int], Any], lock_of: Callable[[int], Any], events: int) -> None:
    """Tasks and threads that send so many events, and 200 tasks at 50 locks."""

    async def sends(n: int) -> None:
        for number in range(n):
            send(number)
            if number % 5 == 4:
                await asyncio.sleep(0)

    async def locks(number: int) -> None:
        for _ in range(20):
            async with lock_of(number % 50):
                await asyncio.sleep(0)

    running: list[Any] = []
    for begin in [*([functools.partial(sends, events // 40)] * 20), *(functools.partial(locks, k) for k in range(200))]:
        running.append(asyncio.create_task(begin()))
        await asyncio.sleep(0)
    for _ in range(4):
        running.append(asyncio.to_thread(lambda: deque(map(send, range(events // 8)), 0)))
        await asyncio.sleep(0)
    await asyncio.gather(*running)


@entry
def loop_blocked(bench: Bench) -> None:
    """CPU time in the longest callback of a loop, with 10,000 events from tasks and threads, and 50 contended locks."""
    events = 400 if bench.quick else 10_000

    async def handle(data: Any) -> None:
        pass

    async def plain() -> None:
        loop = asyncio.get_running_loop()
        locks = [asyncio.Lock() for _ in range(50)]
        await crowd(
            lambda number: loop.call_soon_threadsafe(lambda: loop.create_task(handle(number)) and None),
            locks.__getitem__,
            events,
        )

    async def ours() -> None:
        async with Coordinator() as coord:
            coord.on("ready", handle)
            names = [f"lock-{number}" for number in range(50)]
            await crowd(lambda number: coord.emit("ready", number), lambda number: coord.lock(names[number]), events)

    scenes = {"asyncio.Lock and call_soon_threadsafe": plain, "async with coord.lock, coord.emit": ours}
    found: dict[str, list[float]] = {name: [] for name in scenes}
    for _ in range(2 if bench.quick else 9):
        for name, scene in scenes.items():
            found[name].append(longest_callback(scene))
    bench.show({name: median(times) for name, times in found.items()})


# -- agents ---------------------------------------------------------------------------------------------------


@entry
def decorator(bench: Bench) -> None:
    """A call of a function that does nothing; nobody listens."""

    def agent(topic: Any) -> None:
        pass

    @functools.wraps(agent)
    def wrapped(*args: Any, **kwargs: Any) -> Any:
        return agent(*args, **kwargs)

    def calling(function: Callable[[Any], Any]) -> Run:
        def run(n: int) -> None:
            for _ in repeat(None, n):
                function(1)

        return run

    with Coordinator() as coord:
        contestants = {
            "functools.wraps": calling(wrapped),
            "@coordinate": calling(coord.coordinate("agent")(agent)),
            "@coordinate with a lock": calling(coord.coordinate("agent", lock_name="x")(agent)),
        }
        if wrapt := peer("wrapt"):

            @wrapt.decorator
            def passing(function: Any, instance: Any, args: Any, kwargs: Any) -> Any:
                return function(*args, **kwargs)

            contestants["wrapt.decorator"] = calling(passing(agent))
        bench.race(contestants)


# -- memory, import -------------------------------------------------------------------------------------------


def bytes_each(n: int, make: Callable[[int], Any]) -> float:
    """What one more takes, as tracemalloc sees it."""
    kept = deque(map(make, range(10)))
    tracemalloc.start()
    before = tracemalloc.get_traced_memory()[0]
    kept.extend(map(make, range(10, 10 + n)))
    after = tracemalloc.get_traced_memory()[0]
    tracemalloc.stop()
    return (after - before) / n


@entry
def memory(bench: Bench) -> None:
    """What a handler takes, and an event that waits for it."""
    n = 1_000 if bench.quick else 20_000
    names = [f"event-{number}" for number in range(n + 10)]
    handlers: dict[str, list[Any]] = {}
    line: queue.SimpleQueue[Any] = queue.SimpleQueue()
    gate = threading.Event()
    with Coordinator() as coord:
        bench.show_bytes(
            {
                "a handler: a list in a dict": bytes_each(
                    n, lambda k: handlers.setdefault(names[k], []).append(nothing)
                ),
                "a handler: coord.on": bytes_each(n, lambda k: coord.on(names[k], nothing)),
            }
        )
        coord.on("slow", lambda data: gate.wait())
        coord.emit("slow")
        bench.show_bytes(
            {
                "a pending event: a tuple in a SimpleQueue": bytes_each(n, lambda k: line.put(("slow", names[k]))),
                "a pending event: coord.emit": bytes_each(n, lambda k: coord.emit("slow", names[k]) and None),
            }
        )
        gate.set()


MEASURE_IMPORT = """
import importlib, json, sys, time
names = json.loads(sys.argv[1])
before = set(sys.modules)
begun = time.perf_counter()
for name in names:
    importlib.import_module(name)
took = time.perf_counter() - begun
print(json.dumps([took, [name for name in sys.modules if name not in before]]))
"""


@entry
def import_time(bench: Bench) -> None:
    """`import agentdiff`, against what it needs of the standard library, plus attrs; all compiled before."""
    compiled = tempfile.TemporaryDirectory()
    environment = {**os.environ, "PYTHONPYCACHEPREFIX": compiled.name, "PYTHONDONTWRITEBYTECODE": ""}

    def load(names: list[str]) -> tuple[float, list[str]]:
        done = subprocess.run(
            [sys.executable, "-c", MEASURE_IMPORT, json.dumps(names)],
            stdout=subprocess.PIPE,
            check=True,
            cwd=ROOT,
            env=environment,
        )
        took, loaded = json.loads(done.stdout)
        return took, loaded

    needs = [name for name in load(["agentdiff"])[1] if name.split(".")[0] != "agentdiff"]
    contestants = {"its needs: the standard library's and attrs": needs, "import agentdiff": ["agentdiff"]}
    times: dict[str, list[float]] = {name: [] for name in contestants}
    for _ in range(2 if bench.quick else 20):
        for name, modules in contestants.items():
            times[name].append(load(modules)[0])
    bench.show({name: median(found) for name, found in times.items()})
    compiled.cleanup()


def main() -> None:
    parser = argparse.ArgumentParser(description="Ratios to a floor measured beside it.")
    parser.add_argument("--quick", action="store_true", help="a few rounds only: whether it runs, not how fast")
    parser.add_argument("--only", action="append", choices=sorted(ENTRIES), metavar="NAME", help=", ".join(ENTRIES))
    options = parser.parse_args()
    print(f"Python {sys.version.split()[0]}; medians, and ratios to the first line of each entry")
    for name in options.only or ENTRIES:
        print(f"\n{name}: {ENTRIES[name].__doc__}")
        ENTRIES[name](Bench(options.quick))


if __name__ == "__main__":
    main()
