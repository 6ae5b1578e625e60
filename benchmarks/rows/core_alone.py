"""The core without gRPC: from push to finish, by number of threads, beside Python's own queue and locks."""

from __future__ import annotations

import time
from contextlib import ExitStack
from functools import partial

import core_process
from measuring import Sample
from processes import Child
from row import Bench, Cell, Row

TITLE = "the core alone, from push to finish"

THREADS = (1, 4, 16, 64)
ROOMS = {"core": "the waiting room", "queue": "SimpleQueue and locks"}


def open_row(bench: Bench, stack: ExitStack) -> Row:
    child = Child("the process of the core alone", core_process.run)
    stack.callback(child.stop)
    _ = child.ready  # the time for its start must not be taken from the first cell's
    return Row(
        [
            Cell(
                f"core/{threads}/{room}",
                f"{threads} {'thread' if threads == 1 else 'threads'}: {title}",
                "requests_per_s",
                partial(_measure, bench, child, room, threads),
            )
            for threads in THREADS
            for room, title in ROOMS.items()
        ]
    )


def _measure(bench: Bench, child: Child, room: str, threads: int) -> Sample:
    start_ns = time.monotonic_ns() + 10_000_000
    from_ns = start_ns + int(bench.settings.warm_s / 2 * 1e9)
    until_ns = from_ns + int(bench.settings.window_s / 2 * 1e9)
    values = child.ask(do="run", room=room, threads=threads, start_ns=start_ns, from_ns=from_ns, until_ns=until_ns)
    problems = values.pop("problems")
    return Sample(values, problems)
