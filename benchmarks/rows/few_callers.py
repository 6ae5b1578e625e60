"""A lone caller and eight, where a batch has room for 16."""

from __future__ import annotations

from contextlib import ExitStack
from functools import partial

from measuring import Sample
from processes import Child
from row import Bench, Cell, Row, shared
from systems import DIRECT, PUBLIC, STREAMS, SYSTEMS, batcher

TITLE = "few callers"

# What is asked, by the names in keys and titles: number of callers, callback, whether batches may leave early.
_CASES = {
    "1/answer": ("a lone caller", 1, "answer", True),
    "1/native": ("a lone caller, 2 ms callback", 1, "native", True),
    "8/answer": ("eight callers", 8, "answer", True),
    "8/native": ("eight callers, 2 ms callback", 8, "native", True),
    "window": ("a lone caller that waits for the window", 1, "answer", False),
}


def open_row(bench: Bench, stack: ExitStack) -> Row:
    systems = {
        (transport, callback, leave_early): batcher(transport, callback, leave_early=leave_early)
        for _, _, callback, leave_early in _CASES.values()
        for transport in (DIRECT, PUBLIC)
    }
    systems[STREAMS, "answer", True] = SYSTEMS[STREAMS]
    started = bench.start(stack, systems)
    return Row(
        [
            Cell(
                f"few/{case}/{name}",
                f"{title}: {systems[system].title}",
                "requests_per_s",
                partial(_measure_afresh, bench, *started[system], count),
            )
            for case, (title, count, callback, leave_early) in _CASES.items()
            for name in (DIRECT, PUBLIC, STREAMS)
            if (system := (name, callback, leave_early)) in started
        ]
    )


def _measure_afresh(bench: Bench, server: Child, callers: list[Child], count: int) -> Sample:
    """Measure on new streams, and close them: a batch would wait for callers who were just here."""
    sample = bench.measure(server, shared(count, callers), least_batch=count / 2)
    for child in callers:
        child.ask("close")
    return sample
