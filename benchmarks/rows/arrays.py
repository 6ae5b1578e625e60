"""Array work in the callback: by hand, by `arrays=`, and not at all; and how long the GIL is held for it."""

from __future__ import annotations

import importlib.util
from contextlib import ExitStack
from functools import partial

from array_kinds import ARRAYS, BLIND, BY_HAND, DTYPES
from measuring import Sample
from processes import Child
from row import Bench, Cell, Row, shared
from systems import BATCH_TIMEOUT_S, DIRECT, System

TITLE = "arrays: observations in, an embedding and three small arrays out"

BATCH_SIZES = (16, 64)
NETWORKS = {"numpy": "no network", "jax": "a jitted network"}

WAYS = {
    ARRAYS: "arrays=",
    BY_HAND: "by hand in the callback",
    BLIND: "a callback that looks at nothing",
}

# The smallest mean batch that counts as full load: 16 of the larger take longer to arrive than the window lasts.
_LEAST_BATCHES = {110_592: 8, 884_736: 2}

# What large batches may cost another thread, beside what copies without the GIL cost it. With the GIL it would be 100.
_MOST_STALL_PERCENT = 30

GIL_KEY = "arrays/gil/codec"
GIL_BYTES, GIL_BATCH_SIZE = 110_592, 16


def key(size: int, batch_size: int, network: str, way: str) -> str:
    return f"arrays/{size}/{batch_size}/{network}/{way}"


def open_row(bench: Bench, stack: ExitStack) -> Row:
    # Not at the top: the processes of all rows import this module, and need no numpy.
    import gil_process

    systems = {
        way: System(title, partial(_server, way), "blind" if way == BLIND else "packed", DIRECT)
        for way, title in WAYS.items()
    }
    started = bench.start(stack, systems)
    gil = Child("the process that measures the GIL", gil_process.run)
    stack.callback(gil.stop)
    networks = dict(NETWORKS)
    if importlib.util.find_spec("jax") is None:
        bench.not_run[f"arrays with {networks.pop('jax')}"] = "jax is not installed (pip install jax)"
    return Row(
        [
            *(
                Cell(
                    key(size, batch_size, network, way),
                    f"{size:,} B, batches of {batch_size}, {network_title}: {WAYS[way]}",
                    "requests_per_s",
                    partial(_measure, bench, child, callers, size, batch_size, with_jax=network == "jax"),
                )
                for size in DTYPES
                for batch_size in BATCH_SIZES
                for network, network_title in networks.items()
                for way, (child, callers) in started.items()
            ),
            Cell(
                GIL_KEY,
                f"{GIL_BYTES:,} B, a batch of {GIL_BATCH_SIZE}: the GIL held for reading, gathering and encoding",
                "gil_ms",
                partial(_held, bench, gil),
            ),
        ]
    )


def _server(way: str) -> tuple[object, ...]:
    from servers import array_batcher  # as above

    return array_batcher.run, way, BATCH_TIMEOUT_S


def _measure(bench: Bench, child: Child, callers: list[Child], size: int, batch_size: int, *, with_jax: bool) -> Sample:
    """Have the process serve this, and the callers connect to it anew."""
    port = child.ask("serve", size, batch_size, with_jax)
    for caller in callers:
        caller.ask("connect", f"127.0.0.1:{port}")
    warm_s = bench.settings.warm_s * max(1, batch_size / 16)  # until each of the callers has had an answer
    return bench.measure(
        child, shared(batch_size, callers), payload_bytes=size, least_batch=_LEAST_BATCHES[size], warm_s=warm_s
    )


def _held(bench: Bench, gil: Child) -> Sample:
    sample = Sample({"gil_ms": gil.ask("held_ms", GIL_BYTES, GIL_BATCH_SIZE, bench.settings.window_s)})
    with_codec, with_copies = gil.ask("stall_percents")
    if with_codec > with_copies + _MOST_STALL_PERCENT:
        sample.problems.append(
            f"another thread stood still for {with_codec:.0f} % of the time beside large batches, and for "
            f"{with_copies:.0f} % beside copies without the GIL"
        )
    return sample
