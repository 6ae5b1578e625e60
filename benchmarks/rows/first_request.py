"""The first request of a new client: from creating the client to its first answer."""

from __future__ import annotations

import dataclasses
from contextlib import ExitStack
from functools import partial

from grpc_batcher._server.metrics import nearest_rank

from measuring import Sample
from processes import Child
from row import Bench, Cell, Row
from systems import DIRECT, STREAMS, SYSTEMS, batcher

TITLE = "the first request of a new client, from creating the client to the answer"

# Without a window to wait for.
UNBATCHED = "direct-unbatched"

_SYSTEMS = {
    DIRECT: SYSTEMS[DIRECT],
    UNBATCHED: dataclasses.replace(batcher(DIRECT, batch_size=1), title="direct transport, batches of one"),
    STREAMS: SYSTEMS[STREAMS],
}


def open_row(bench: Bench, stack: ExitStack) -> Row:
    return Row(
        [
            Cell(
                f"first/{name}",
                f"first request: {_SYSTEMS[name].title}",
                "p50_ms",
                partial(_measure, bench, server, caller),
            )
            for name, (server, (caller,)) in bench.start(stack, _SYSTEMS, processes=1).items()
        ]
    )


def _measure(bench: Bench, server: Child, caller: Child) -> Sample:
    """Make one new client after the other. The first ones, for which gRPC starts its threads, do not count."""
    caller.ask("first_requests", bench.settings.warm_s)
    durations_ns = sorted(caller.ask("first_requests", bench.settings.window_s))
    bench.check_tuning(server, caller)
    return Sample(
        {
            "clients": len(durations_ns),
            "p50_ms": nearest_rank(durations_ns, 50) / 1e6,
            "p99_ms": nearest_rank(durations_ns, 99) / 1e6,
        }
    )
