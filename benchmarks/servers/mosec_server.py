"""mosec, a batching server over HTTP: `python mosec_server.py BATCH_SIZE BATCH_TIMEOUT_S`."""

from __future__ import annotations

import http.client
import json
import os
import re
import signal
import sys
import threading
import time

from answers import answer_to
from mosec import Server, Worker
from servers.ports import free_ports


class Echo(Worker):
    def deserialize(self, data: bytes) -> bytes:
        return data

    def forward(self, data: list[bytes]) -> list[bytes]:
        return [answer_to(each) for each in data]

    def serialize(self, data: bytes) -> bytes:
        return data


def say_when_ready(port: int) -> None:
    """Say when the server is ready, answer requests for its counts, and stop it when the standard input closes."""
    while True:
        try:
            connection = http.client.HTTPConnection("127.0.0.1", port, timeout=5)
            connection.request("POST", "/inference", bytes(64))
            if connection.getresponse().status == 200:
                break
        except OSError:
            pass
        time.sleep(0.05)
    connection.close()
    print(json.dumps({"port": port, "counts": True}), flush=True)
    for _ in sys.stdin:
        print(json.dumps(counts(port)), flush=True)
    os.kill(os.getpid(), signal.SIGTERM)


def counts(port: int) -> dict[str, int]:
    """What it counted, read from its Prometheus page."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=5)
    connection.request("GET", "/metrics")
    page = connection.getresponse().read().decode()
    connection.close()
    found = dict(re.findall(r"^mosec_service_batch_size_(sum|count){.*} (\S+)$", page, re.MULTILINE))
    return {"batches": round(float(found["count"])), "batched_requests": round(float(found["sum"]))}


def main() -> None:
    batch_size, batch_timeout_s = int(sys.argv[1]), float(sys.argv[2])
    (port,) = free_ports(1)
    sys.argv = [sys.argv[0], "--address", "127.0.0.1", "--port", str(port), "--log-level", "error"]
    server = Server()
    server.append_worker(Echo, max_batch_size=batch_size, max_wait_time=round(batch_timeout_s * 1000))
    threading.Thread(target=say_when_ready, args=(port,), daemon=True).start()
    server.run()


if __name__ == "__main__":
    main()
