"""An API that allows 3 calls at once and 20 a second. Twelve threads make 36 calls: how many does it refuse?"""

import http.client
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

from agentdiff import Coordinator

THREADS, CALLS, AT_ONCE, A_SECOND = 12, 36, 3, 20


class Server(ThreadingHTTPServer):  # stands in for the API, on this machine; its limits are hard
    request_queue_size, mutex, answered, in_flight = 64, threading.Lock(), [], 0


class Handler(BaseHTTPRequestHandler):
    def do_POST(self):
        with api.mutex:
            now = time.monotonic()
            fits = len([then for then in api.answered if then > now - 1]) < A_SECOND and api.in_flight < AT_ONCE
            api.answered += [now] * fits
            api.in_flight += fits
        time.sleep(0.03 * fits)
        with api.mutex:
            api.in_flight -= fits
        self.send_response(200 if fits else 429)
        self.end_headers()

    def log_message(self, *args):
        pass


def call(_):
    connection = http.client.HTTPConnection(*api.server_address)
    connection.request("POST", "/v1/messages")
    status = connection.getresponse().status
    connection.close()
    return status


def measure(how, agent):
    begun = time.monotonic()
    with ThreadPoolExecutor(THREADS) as pool:
        statuses = list(pool.map(agent, range(CALLS)))
    return how, statuses.count(200), statuses.count(429), round(time.monotonic() - begun, 1)


with Server(("127.0.0.1", 0), Handler) as api, Coordinator() as coord:
    threading.Thread(target=api.serve_forever, args=(0.01,), daemon=True).start()
    plain = measure("plain threads", call)
    time.sleep(1)  # then what it has answered counts no longer
    coord.limit("api", concurrency=AT_ONCE, requests=A_SECOND, per=1)
    limited = measure("agentdiff", coord.coordinate("asker", lock_name="api")(call))
    api.shutdown()

for row in zip((f"of {CALLS} calls", "answered", "refused (429)", "seconds"), plain, limited):
    print("{:17}{:>17}{:>13}".format(*row))
