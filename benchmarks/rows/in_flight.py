"""Many requests in flight from few threads, next to blocking threads."""

from __future__ import annotations

from contextlib import ExitStack
from functools import partial

from row import Bench, Cell, Row, shared
from systems import DIRECT, batcher

TITLE = "many in flight from one thread: requests at once, and asyncio"

MANY = 64
TASKS = 256
BLOCKING = (16, 64)
SIZES = (64, 110_592)


def open_row(bench: Bench, stack: ExitStack) -> Row:
    kinds = {"blocking": "batcher", "many": "batcher-many", "tasks": "batcher-asyncio"}
    started = bench.start(stack, {kind: batcher(DIRECT, caller=caller) for kind, caller in kinds.items()}, 1)
    ways = [
        *(("blocking", threads, f"{threads} blocking threads") for threads in BLOCKING),
        ("many", MANY, f"one thread, send_many of {MANY}"),
        ("tasks", TASKS, f"asyncio, {TASKS} tasks"),
    ]
    return Row(
        [
            Cell(
                f"in_flight/{size}/{kind}/{count}/{DIRECT}",
                f"{size:,} B: {title}",
                "requests_per_s",
                partial(
                    bench.measure,
                    started[kind][0],
                    shared(count, started[kind][1]),
                    payload_bytes=size,
                    least_batch=8,
                ),
            )
            for size in SIZES
            for kind, count, title in ways
        ]
    )
