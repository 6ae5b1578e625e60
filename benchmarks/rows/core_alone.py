"""The core without gRPC: from push to finish by number of threads, and a full queue whose requests are replaced."""

from __future__ import annotations

import time
from contextlib import ExitStack
from functools import partial

from grpc_batcher._cli.load import Window

import core_process
from measuring import Sample
from processes import Child
from row import Bench, Cell, Row

TITLE = "the core without gRPC: from push to finish, and a full queue"

THREADS = (1, 4, 16, 64)
ROOMS = {"core": "the waiting room", "queue": "SimpleQueue and locks"}

# How many of the oldest requests stay while younger ones are replaced.
KEPT = {"middle": 4096, "front": 0}
CHURN_TITLES = {
    "middle": "8,192 waiting, one leaves from the middle and one comes",
    "front": "the same, but the oldest leaves",
}


def open_row(bench: Bench, stack: ExitStack) -> Row:
    child = Child("the process of the core", core_process.run)
    stack.callback(child.stop)
    _ = child.ready  # starting it must not take time from the first cell
    return Row(
        [
            *(
                Cell(
                    f"core/{threads}/{room}",
                    f"{threads} {'thread' if threads == 1 else 'threads'}: {title}",
                    "requests_per_s",
                    partial(_measure, bench, child, do="run", room=room, threads=threads),
                )
                for threads in THREADS
                for room, title in ROOMS.items()
            ),
            *(
                Cell(
                    f"core/full/{place}",
                    CHURN_TITLES[place],
                    "requests_per_s",
                    partial(_measure, bench, child, do="churn", kept=kept),
                )
                for place, kept in KEPT.items()
            ),
        ]
    )


def _measure(bench: Bench, child: Child, do: str, **options: object) -> Sample:
    start_ns = time.monotonic_ns() + 10_000_000
    from_ns = start_ns + int(bench.settings.warm_s / 2 * 1e9)
    window = Window(start_ns, from_ns, from_ns + int(bench.settings.window_s / 2 * 1e9))
    values = child.ask(do, window, **options)
    problems = values.pop("problems")
    return Sample(values, problems)
