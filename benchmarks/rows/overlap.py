"""How long the callback stands still between two batches when it releases the GIL and enough callers wait."""

from __future__ import annotations

from contextlib import ExitStack
from functools import partial
from itertools import pairwise

from grpc_batcher._server.metrics import nearest_rank

from measuring import Sample, open_streams
from processes import Child
from row import Bench, Cell, Row, shared
from systems import DIRECT, PUBLIC, batcher

TITLE = "from a callback's end to the next one's start: 64 callers, 2 ms without the GIL"

CALLERS = 64


def open_row(bench: Bench, stack: ExitStack) -> Row:
    systems = {transport: batcher(transport, "native") for transport in (DIRECT, PUBLIC)}
    return Row(
        [
            Cell(
                f"overlap/{transport}",
                f"the gap: {systems[transport].title}",
                "p50_ms",
                partial(_gaps, bench, server, callers),
            )
            for transport, (server, callers) in bench.start(stack, systems).items()
        ]
    )


def _gaps(bench: Bench, server: Child, callers: list[Child]) -> Sample:
    groups = shared(CALLERS, callers)
    open_streams(server, groups)
    server.ask("notes")
    sample = bench.measure(server, groups, least_batch=8)
    gaps_ns = sorted(next_begin_ns - end_ns for (_, end_ns, _), (next_begin_ns, _, _) in pairwise(sample.notes(server)))
    sample.values["p50_ms"] = nearest_rank(gaps_ns, 50) / 1e6
    sample.values["p99_ms"] = nearest_rank(gaps_ns, 99) / 1e6
    return sample
