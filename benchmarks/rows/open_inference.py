"""Triton's own client, asking this library and PyTriton: a call per request, and a stream per caller."""

from __future__ import annotations

from contextlib import ExitStack
from functools import partial

from grpc_batcher._cli.workers import stop_all

from row import Bench, Cell, Row, shared
from systems import INFERENCE, PYTRITON, inference

TITLE = "Triton's client, 16 callers"

CALLERS = 16
SIZES = (64, 110_592, 884_736)

# How the client asks, by the names in keys and titles.
WAYS = {"unary": "triton", "streaming": "triton-streams"}


def open_row(bench: Bench, stack: ExitStack) -> Row:
    """Start a server per size, because an array's shape is fixed, and its callers for either way."""
    first, *others = WAYS
    started = bench.start(
        stack,
        {(size, name): inference(name, size, WAYS[first]) for size in SIZES for name in (INFERENCE, PYTRITON)},
    )
    cells = []
    for (size, name), (server, callers) in started.items():
        ways = {first: callers}
        for way in others:
            system = inference(name, size, WAYS[way])
            ways[way] = [system.spawn_callers(server) for _ in callers]
            stack.callback(stop_all, ways[way])
        cells += [
            Cell(
                f"inference/{size}/{way}/{name}",
                f"{size:,} B, {way}: {inference(name, size, WAYS[way]).title}",
                "requests_per_s",
                partial(bench.measure, server, shared(CALLERS, ways[way]), payload_bytes=size),
            )
            for way in WAYS
        ]
    return Row(cells)
