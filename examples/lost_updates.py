"""Trouble 1, lost updates: threads and asyncio tasks read, think and write the same state.

A thread and a task exclude each other under one lock name; `async with` doesn't block the loop.
"""

import asyncio
import threading
import time

from agentdiff import Coordinator

EACH, TIMES = 4, 10  # so many threads, as many tasks, and updates by each
balance = 0


def deposit():
    """What others write while it thinks is lost."""
    global balance
    seen = balance
    time.sleep(0.001)
    balance = seen + 1


async def all_together(threaded, awaited):
    global balance
    balance = 0
    threads = [threading.Thread(target=threaded) for _ in range(EACH)]
    for thread in threads:
        thread.start()
    await asyncio.gather(*(awaited() for _ in range(EACH)), *(asyncio.to_thread(t.join) for t in threads))
    return f"{balance} of {2 * EACH * TIMES} updates kept"


def plain_thread():
    for _ in range(TIMES):
        deposit()


async def plain_task():
    for _ in range(TIMES):
        await asyncio.to_thread(deposit)


with Coordinator() as coord:
    account = coord.lock("account_42")

    def locked_thread():
        for _ in range(TIMES):
            with account:
                deposit()

    async def locked_task():
        for _ in range(TIMES):
            async with account:
                await asyncio.to_thread(deposit)

    print("before:", asyncio.run(all_together(plain_thread, plain_task)))
    print("after: ", asyncio.run(all_together(locked_thread, locked_task)))
