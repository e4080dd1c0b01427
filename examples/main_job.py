"""The main job: 20 researchers count their progress, ask one API, and hand on to a writer. How much of it arrives?"""

import threading
import time
from concurrent.futures import ThreadPoolExecutor

from agentdiff import Coordinator

TOPICS = [f"topic {n}" for n in range(20)]


class Office:  # what the agents share: a count, an API that serves one call at a time and refuses others, a desk
    def __init__(self):
        self.counted, self.answered, self.written, self.api = 0, [], [], threading.Lock()

    def count(self):
        seen = self.counted
        time.sleep(0.004)  # who counts in this moment is overwritten
        self.counted = seen + 1

    def ask(self, topic):
        if self.api.acquire(blocking=False):  # else: 429, too many requests
            time.sleep(0.004)
            self.answered.append(topic)
            self.api.release()

    def write(self, topic):
        if topic in self.answered:  # else: nothing to write about yet
            self.written.append(topic)


def start(*agents):  # all agents on all topics, at once
    together = threading.Barrier(len(TOPICS) * len(agents))
    with ThreadPoolExecutor(together.parties) as pool:
        for results in [pool.map(lambda t, agent=agent: (together.wait(), agent(t)), TOPICS) for agent in agents]:
            list(results)


plain, office = Office(), Office()
start(lambda topic: (plain.count(), plain.ask(topic)), plain.write)

with Coordinator() as coord:
    coord.on("researcher_complete", lambda data: office.write(data["result"]))

    @coord.coordinate("researcher")
    def research(topic):
        with coord.lock("progress"):
            office.count()
        with coord.lock("api"):
            office.ask(topic)
        return topic

    start(research)

print("out of 20                plain threads    agentdiff")
print(f"updates kept         {plain.counted:17}{office.counted:13}")
print(f"API calls answered   {len(plain.answered):17}{len(office.answered):13}")
print(f"reports written      {len(plain.written):17}{len(office.written):13}")
