"""This library's server, with one of three callbacks.

answer: answers at once.
native: releases the GIL for 2 ms first, as a call into a network on an accelerator does.
python: computes for about 1 ms in pure Python first, with the GIL.
The last two note when they ran.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Mapping, Sequence
from multiprocessing.connection import Connection
from typing import Any

from grpc_batcher import MukoeBatcher, create_batcher, info
from grpc_batcher._cli.workers import obey

from answers import FILLER, KEY, TAG_BYTES

NATIVE_S = 0.002
PYTHON_NS = 1_000_000

# A batcher also pauses between two batches, and the kernel treats a thread worse that never does.
PAUSE_S = 0.0003

# While it is not set, no batch is answered, so that each caller needs its own stream.
released = threading.Event()
released.set()

Results = list[tuple[dict[str, bytes], int]]


def answer(requests: Sequence[bytes]) -> Results:
    if not released.is_set():
        released.wait()
    return [({KEY: FILLER + data[-TAG_BYTES:]}, 0) for data in requests]


class Noting:
    """A callback that does some work first, and notes when it started and ended and its thread's CPU time."""

    def __init__(self, work: Callable[[], object]) -> None:
        self._work = work
        self._notes: list[tuple[int, int, int]] = []

    def __call__(self, requests: Sequence[bytes]) -> Results:
        cpu_ns = time.thread_time_ns()
        begin_ns = time.monotonic_ns()
        self._work()
        results = answer(requests)
        end_ns = time.monotonic_ns()
        self._notes.append((begin_ns, end_ns, time.thread_time_ns() - cpu_ns))
        return results

    def take_notes(self) -> list[tuple[int, int, int]]:
        notes, self._notes = self._notes, []
        return notes

    def alone(self, calls: int, batch_size: int) -> list[tuple[int, int, int]]:
        """Call it as the batcher would, on a thread and with pauses, while nothing else runs."""
        batch = [bytes(64)] * batch_size
        self._notes = []

        def call() -> None:
            for _ in range(calls):
                self(batch)
                time.sleep(PAUSE_S)

        thread = threading.Thread(target=call)
        thread.start()
        thread.join()
        return self.take_notes()


def compute(steps: int) -> int:
    total = 0
    for step in range(steps):
        total = (total * 31 + step) & 0xFFFF
    return total


def steps_for(duration_ns: int) -> int:
    """Return how many steps take that long, judged by the fastest of some tries."""
    steps = 1000
    best_ns = min(_timed_ns(steps) for _ in range(200))
    return max(1, steps * duration_ns // best_ns)


def _timed_ns(steps: int) -> int:
    begin_ns = time.monotonic_ns()
    compute(steps)
    return time.monotonic_ns() - begin_ns


def run(pipe: Connection, batch_size: int, batch_timeout_s: float, callback: str, leave_early: bool) -> None:
    """The process."""
    commands: dict[str, Callable[..., Any]] = {"hold": released.clear, "release": released.set}
    function: Callable[[Sequence[bytes]], Results] = answer
    if callback != "answer":
        steps = steps_for(PYTHON_NS)
        noting = Noting({"native": lambda: time.sleep(NATIVE_S), "python": lambda: compute(steps)}[callback])
        commands |= {"notes": noting.take_notes, "alone": lambda calls: noting.alone(calls, batch_size)}
        function = noting
    with create_batcher(
        "repr",
        batch_size,
        batch_timeout_s,
        port=0,
        batch_process_fn=function,
        host="127.0.0.1",
        track_metrics=False,
        leave_early=leave_early,
    ) as batcher:
        serve(pipe, batcher, commands)


def serve(pipe: Connection, batcher: MukoeBatcher, commands: Mapping[str, Callable[..., Any]]) -> None:
    """Tell where a batcher serves, and obey until the benchmark ends it."""
    pipe.send({"port": batcher.port, "transport": batcher.transport, "counts": True})
    obey(pipe, {**commands, "counts": lambda: counts_of(batcher), "info": info})


def counts_of(batcher: MukoeBatcher) -> dict[str, Any]:
    metrics = batcher.metrics()
    return {
        "batches": sum(metrics.batches.values()),
        "batched_requests": metrics.batched_requests,
        "open_streams": metrics.open_streams,
        "transport": batcher.transport,
    }
