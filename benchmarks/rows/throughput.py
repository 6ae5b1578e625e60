"""16 callers at four sizes of payload, and what a request costs both ends in CPU time."""

from __future__ import annotations

from contextlib import ExitStack
from functools import partial

from measuring import measure
from row import Bench, Cell, Row, shared
from systems import SYSTEMS

TITLE = "16 callers"

CALLERS = 16

# A small one, and the users' own: an embedding, and an observation as uint8 and as float64. With each the smallest mean
# batch that can be called full load; 16 of the largest take longer to arrive than the window.
SIZES = {64: 8, 36_864: 8, 110_592: 8, 884_736: 2}


def open_row(bench: Bench, stack: ExitStack) -> Row:
    return Row(
        [
            Cell(
                f"throughput/{size}/{name}",
                f"{size:,} B: {SYSTEMS[name].title}",
                "requests_per_s",
                partial(
                    measure,
                    server,
                    shared(CALLERS, callers),
                    payload_bytes=size,
                    warm_s=bench.settings.warm_s,
                    window_s=bench.settings.window_s,
                    least_batch=least_batch,
                ),
            )
            for size, least_batch in SIZES.items()
            for name, (server, callers) in bench.all_systems().items()
        ]
    )
