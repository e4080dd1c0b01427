"""Trouble 2, calls beyond what an API allows: it refuses whatever comes while it is busy.

A lock is a limit of one call at a time, in arrival order, for every function that names it.
"""

import asyncio
import threading
import time

from agentdiff import Coordinator

ALLOWED, CALLS = 1, 24


class Api:
    """Counts the calls in flight, and refuses those beyond what it allows."""

    def __init__(self):
        self._mutex = threading.Lock()
        self.in_flight = self.peak = self.refused = 0

    def begin(self):
        with self._mutex:
            self.in_flight += 1
            self.peak = max(self.peak, self.in_flight)
            self.refused += self.in_flight > ALLOWED

    def end(self):
        with self._mutex:
            self.in_flight -= 1

    def call(self, prompt):
        self.begin()
        time.sleep(0.005)
        self.end()

    async def call_async(self, prompt):
        self.begin()
        await asyncio.sleep(0.005)
        self.end()


async def everybody(call, call_async):
    """Half of the calls from threads, half from tasks, all at once."""
    half = range(CALLS // 2)
    await asyncio.gather(*(asyncio.to_thread(call, n) for n in half), *(call_async(n) for n in half))


plain = Api()
asyncio.run(everybody(plain.call, plain.call_async))
print(f"before: {plain.refused} of {CALLS} calls refused, {plain.peak} at once")

api = Api()
with Coordinator() as coord:
    agent = coord.coordinate("asker", lock_name="llm_api")
    asyncio.run(everybody(agent(api.call), agent(api.call_async)))
print(f"after:  {api.refused} of {CALLS} calls refused, {api.peak} at once")
