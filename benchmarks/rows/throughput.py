"""16 callers at four payload sizes, and the CPU time that a request costs both ends."""

from __future__ import annotations

from contextlib import ExitStack
from functools import partial

from row import Bench, Cell, Row, shared
from systems import SYSTEMS

TITLE = "16 callers"

CALLERS = 16

# A small one, and the users' own: an embedding, and an observation as uint8 and as float64. Each has the smallest mean
# batch that counts as full load: 16 of the largest take longer to arrive than the window lasts.
SIZES = {64: 8, 36_864: 8, 110_592: 8, 884_736: 2}


def open_row(bench: Bench, stack: ExitStack) -> Row:
    return Row(
        [
            Cell(
                f"throughput/{size}/{name}",
                f"{size:,} B: {SYSTEMS[name].title}",
                "requests_per_s",
                partial(bench.measure, server, shared(CALLERS, callers), payload_bytes=size, least_batch=least_batch),
            )
            for size, least_batch in SIZES.items()
            for name, (server, callers) in bench.all_systems().items()
        ]
    )
