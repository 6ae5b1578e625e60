"""This library's server: `python batcher.py BATCH_SIZE BATCH_TIMEOUT_S CALLBACK`.

CALLBACK is one of
    answer: answers at once;
    native: leaves the GIL for 2 ms first, as a call into a network on an accelerator does;
    python: computes for about 1 ms in pure Python first, with the GIL.
The last two note when they ran.
"""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Callable, Sequence

import lines
from answers import FILLER, KEY, TAG_BYTES

from grpc_batcher import create_batcher

NATIVE_S = 0.002
PYTHON_NS = 1_000_000

# As a batcher pauses between two batches; a thread that never does so is treated worse by the kernel.
PAUSE_S = 0.0003

# While it is not set no batch is answered, so that each caller needs a stream of its own.
released = threading.Event()
released.set()

Results = list[tuple[dict[str, bytes], int]]


def answer(requests: Sequence[bytes]) -> Results:
    if not released.is_set():
        released.wait()
    return [({KEY: FILLER + data[-TAG_BYTES:]}, 0) for data in requests]


class Noting:
    """A callback that does some work first, and notes when it began and ended, and its thread's CPU time."""

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
        """Call it as the batcher would, on a thread and with pauses, but with nothing else going on."""
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
    """How many steps take so long, by the quickest of some tries."""
    steps = 1000
    best_ns = min(_timed_ns(steps) for _ in range(200))
    return max(1, steps * duration_ns // best_ns)


def _timed_ns(steps: int) -> int:
    begin_ns = time.monotonic_ns()
    compute(steps)
    return time.monotonic_ns() - begin_ns


def main() -> None:
    batch_size, batch_timeout_s, name = int(sys.argv[1]), float(sys.argv[2]), sys.argv[3]
    noting = None
    if name == "native":
        noting = Noting(lambda: time.sleep(NATIVE_S))
    elif name == "python":
        steps = steps_for(PYTHON_NS)
        noting = Noting(lambda: compute(steps))
    elif name != "answer":
        raise SystemExit(f"CALLBACK is {name!r}; it must be answer, native or python")
    with create_batcher(
        "repr",
        batch_size,
        batch_timeout_s,
        port=0,
        batch_process_fn=noting or answer,
        host="127.0.0.1",
        track_metrics=False,
    ) as batcher:
        lines.say(port=batcher.port, gear=batcher.gear, counts=True)
        for command in lines.commands():
            if command["do"] == "counts":
                metrics = batcher.metrics()
                lines.say(
                    batches=sum(metrics.batches.values()),
                    batched_requests=metrics.batched_requests,
                    open_streams=metrics.open_streams,
                    gear=batcher.gear,
                )
            elif command["do"] == "hold":
                released.clear()
                lines.say()
            elif command["do"] == "release":
                released.set()
                lines.say()
            elif command["do"] == "notes" and noting is not None:
                lines.say(notes=noting.take_notes())
            elif command["do"] == "alone" and noting is not None:
                lines.say(notes=noting.alone(command["calls"], batch_size))
            else:
                raise SystemExit(f"no such command: {command}")


if __name__ == "__main__":
    main()
