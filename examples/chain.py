"""Trouble 3, a chain without an orchestrator: each agent starts when the one before it is done.

The last line starts the chain. Nobody sleeps, joins or polls: the process ends when the chain has.
"""

import threading
import time

from agentdiff import coordinate, when

STAGES = 5
finished = []


def work(text):
    time.sleep(0.02)
    return text + "."


# Before: five agents in plain threads. Each looks for what it needs, and most find nothing.
results = {0: "start"}


def plain_stage(number):
    if number - 1 in results:
        results[number] = work(results[number - 1])


threads = [threading.Thread(target=plain_stage, args=(number,)) for number in range(1, STAGES + 1)]
for thread in threads:
    thread.start()
for thread in threads:
    thread.join()
print(f"before: {len(results) - 1} of {STAGES} stages ran")


# After: each stage is an agent, and what one has returned calls the next.
@coordinate("first")
def first(text):
    return work(text)


def follow(before, name):
    @coordinate(name)
    def stage(text):
        return work(text)

    when(f"{before}_complete", lambda data: stage(data["result"]))


follow("first", "second")
follow("second", "third")
follow("third", "fourth")
follow("fourth", "fifth")
when("*_complete", lambda data: finished.append(data["agent"]))
when("fifth_complete", lambda data: print(f"after:  {len(finished)} of {STAGES} stages ran: {', '.join(finished)}"))

first("start")
