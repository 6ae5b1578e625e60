"""A process that drives the core without gRPC, for rows/core_alone.py.

`run`: threads push requests and wait, and one takes batches. `churn`: requests leave a full queue, and others come in.
"""

from __future__ import annotations

import queue
import threading
import time
from collections import deque
from collections.abc import Callable
from contextlib import suppress
from multiprocessing.connection import Connection
from typing import Any

from grpc_batcher._cli import load
from grpc_batcher._cli.load import Job, Window
from grpc_batcher._cli.workers import obey
from grpc_batcher._core import Stream, WaitingRoom
from grpc_batcher._server.metrics import nearest_rank

BATCH_SIZE = 16
WINDOW_NS = 5_000_000
CAPACITY = 8192  # the default of max_queue_size, and a power of two


class CoreRoom:
    """The library's waiting room. A request's outcome is the time of `finish`, so that its waiter knows the delay."""

    def __init__(self, threads: int) -> None:
        self._room = WaitingRoom(BATCH_SIZE, WINDOW_NS, max(BATCH_SIZE, threads))
        self._streams = [self._room.open_stream() for _ in range(threads)]
        self.pushed_to_taken_ns: list[int] = []
        self.finished_to_woken_ns: list[int] = []
        self.batches = 0
        self.taken = 0

    def sender(self, number: int) -> Callable[[Any], Any]:
        push = self._streams[number].push
        wakes_ns = self.finished_to_woken_ns

        def send(request: Any) -> Any:
            ticket = push(request)
            ticket.wait()
            wakes_ns.append(time.monotonic_ns() - ticket.outcome)
            return ticket.request

        return send

    def serve(self) -> None:
        while (taken := self._room.take_batch()) is not None:
            now_ns = time.monotonic_ns()
            _reason, tickets = taken
            self.pushed_to_taken_ns.append(now_ns - tickets[-1].pushed_ns)
            self.batches += 1
            self.taken += len(tickets)
            self._room.finish(tickets, [time.monotonic_ns()] * len(tickets))

    def close(self) -> None:
        self._room.close()


class QueueRoom:
    """The same built from Python's own parts: one queue, and one lock per caller. The taker takes what is there."""

    def __init__(self, threads: int) -> None:
        self._queue: queue.SimpleQueue[list[Any] | None] = queue.SimpleQueue()
        self.pushed_to_taken_ns: list[int] = []
        self.finished_to_woken_ns: list[int] = []
        self.batches = 0
        self.taken = 0

    def sender(self, number: int) -> Callable[[Any], Any]:
        finished = threading.Lock()
        finished.acquire()
        wakes_ns = self.finished_to_woken_ns

        def send(request: Any) -> Any:
            ticket = [request, time.monotonic_ns(), finished, None]
            self._queue.put(ticket)
            finished.acquire()
            wakes_ns.append(time.monotonic_ns() - ticket[3])
            return ticket[0]

        return send

    def serve(self) -> None:
        over = False
        while not over:
            taken = [self._queue.get()]
            now_ns = time.monotonic_ns()
            with suppress(queue.Empty):
                while len(taken) < BATCH_SIZE:
                    taken.append(self._queue.get_nowait())
            over = None in taken
            tickets = [ticket for ticket in taken if ticket is not None]
            if not tickets:
                break
            self.pushed_to_taken_ns.append(now_ns - tickets[0][1])
            self.batches += 1
            self.taken += len(tickets)
            finish_ns = time.monotonic_ns()
            for ticket in tickets:
                ticket[3] = finish_ns
                ticket[2].release()

    def close(self) -> None:
        self._queue.put(None)


def drive(room: CoreRoom | QueueRoom, threads: int, window: Window) -> dict[str, Any]:
    taker = threading.Thread(target=room.serve)
    taker.start()
    jobs = [[Job(request, request) for request in (2 * number, 2 * number + 1)] for number in range(threads)]
    outcome = load.run([room.sender(number) for number in range(threads)], jobs, window)
    room.close()
    taker.join()
    problems = []
    if outcome.wrong or outcome.errors:
        problems.append(f"{outcome.wrong} wrong answers, failed: {outcome.errors}")
    if outcome.warm < threads:
        problems.append(f"{threads - outcome.warm} of {threads} threads had no answer while warming up")
    if 0 in outcome.answers:
        problems.append(f"{outcome.answers.count(0)} of {threads} threads had no answer")
    latencies_ns = sorted(outcome.latencies_ns)
    return {
        "problems": problems,
        "requests_per_s": len(latencies_ns) / window.length_s,
        "p50_ms": nearest_rank(latencies_ns, 50) / 1e6,
        "p99_ms": nearest_rank(latencies_ns, 99) / 1e6,
        "mean_batch": room.taken / room.batches,
        "push_to_taken_us": nearest_rank(sorted(room.pushed_to_taken_ns), 50) / 1e3,
        "finish_to_woken_us": nearest_rank(sorted(room.finished_to_woken_ns), 50) / 1e3,
    }


def churn(kept: int, window: Window) -> dict[str, Any]:
    """Measure replacing a request of a full queue: one stream leaves, and a new one pushes. One thread, no taker.

    kept: how many of the oldest requests stay where they are, so that each one that leaves has them before it.
    """
    room = WaitingRoom(BATCH_SIZE, WINDOW_NS, CAPACITY)

    def push() -> Stream:
        stream = room.open_stream()
        stream.push(None)
        return stream

    streams = deque(push() for _ in range(CAPACITY))
    for _ in range(kept):
        streams.popleft()  # the room keeps it
    latencies_ns: list[int] = []
    begin_ns = time.monotonic_ns()
    while begin_ns < window.until_ns:
        streams.popleft().close()
        streams.append(push())
        end_ns = time.monotonic_ns()
        if window.from_ns <= end_ns < window.until_ns:
            latencies_ns.append(end_ns - begin_ns)
        begin_ns = end_ns
    problems = []
    if room.waiting != CAPACITY:
        problems.append(f"{room.waiting} of {CAPACITY} requests were waiting in the end")
    room.abandon()
    latencies_ns.sort()
    return {
        "problems": problems,
        "requests_per_s": len(latencies_ns) / window.length_s,
        "p50_ms": nearest_rank(latencies_ns, 50) / 1e6,
        "p99_ms": nearest_rank(latencies_ns, 99) / 1e6,
    }


ROOMS: dict[str, Callable[[int], CoreRoom | QueueRoom]] = {"core": CoreRoom, "queue": QueueRoom}


def run(pipe: Connection) -> None:
    """The process."""
    pipe.send(None)
    obey(
        pipe,
        {
            "run": lambda window, room, threads: drive(ROOMS[room](threads), threads, window),
            "churn": lambda window, kept: churn(kept, window),
        },
    )
