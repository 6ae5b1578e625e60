"""What serving costs the callback: pure Python under full load, against the same callback with nothing else running."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from functools import partial

from grpc_batcher._server.metrics import nearest_rank

from measuring import Sample
from processes import Child
from row import Bench, Cell, Row, shared
from systems import DIRECT, PUBLIC, batcher

TITLE = "a callback of pure Python, about 1 ms: alone, and with 64 callers"

# More than fit in a batch, so that some are always asking or being answered while the callback runs.
CALLERS = 64


def open_row(bench: Bench, stack: ExitStack) -> Row:
    systems = {transport: batcher(transport, "python") for transport in (DIRECT, PUBLIC)}
    cells = []
    for transport, (server, callers) in bench.start(stack, systems).items():
        title = systems[transport].title
        cells += [
            Cell(f"callback/alone/{transport}", f"alone: {title}", "mean_ms", partial(_alone, bench, server)),
            Cell(
                f"callback/load/{transport}",
                f"under load: {title}",
                "mean_ms",
                partial(_loaded, bench, server, callers),
            ),
        ]
    return Row(cells)


def _alone(bench: Bench, server: Child) -> Sample:
    calls = round(bench.settings.window_s * 1000)
    notes = server.ask("alone", calls)
    return Sample(_durations(notes))


def _loaded(bench: Bench, server: Child, callers: list[Child]) -> Sample:
    server.ask("notes")
    sample = bench.measure(server, shared(CALLERS, callers), least_batch=8)
    durations = _durations(sample.notes(server))
    problems = sample.problems if durations else [*sample.problems, "the callback never ran"]
    return Sample(sample.values | durations, problems)


def _durations(notes: Sequence[Sequence[int]]) -> dict[str, float]:
    if not notes:
        return {}
    durations_ns = sorted(end_ns - begin_ns for begin_ns, end_ns, _cpu_ns in notes)
    return {
        "mean_ms": sum(durations_ns) / len(notes) / 1e6,
        "p50_ms": nearest_rank(durations_ns, 50) / 1e6,
        "p99_ms": nearest_rank(durations_ns, 99) / 1e6,
        "callback_cpu_ms": sum(cpu_ns for _begin_ns, _end_ns, cpu_ns in notes) / len(notes) / 1e6,
    }
