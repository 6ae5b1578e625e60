"""16 processes with one caller each, as actors run."""

from __future__ import annotations

from contextlib import ExitStack
from functools import partial

from row import Bench, Cell, Row, shared
from systems import DIRECT, STREAMS, SYSTEMS

TITLE = "16 processes with one caller each"

PROCESSES = 16
SIZES = (64, 110_592)

# Sixteen processes take a while to get the CPU.
_SETTLE_S = 0.1


def open_row(bench: Bench, stack: ExitStack) -> Row:
    started = bench.start(stack, {name: SYSTEMS[name] for name in (DIRECT, STREAMS)}, PROCESSES)
    return Row(
        [
            Cell(
                f"actors/{size}/{name}",
                f"{size:,} B, 16 processes: {SYSTEMS[name].title}",
                "requests_per_s",
                partial(
                    bench.measure,
                    server,
                    shared(PROCESSES, callers),
                    payload_bytes=size,
                    least_batch=8,
                    settle_s=_SETTLE_S,
                ),
            )
            for size in SIZES
            for name, (server, callers) in started.items()
        ]
    )
