"""How long the GIL is held for a batch of arrays: a process for rows/arrays.py that reads, gathers and encodes them."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from multiprocessing.connection import Connection
from statistics import median

from grpc_batcher import Array
from grpc_batcher._cli.workers import obey
from grpc_batcher._models import MODELS, write_request
from grpc_batcher._process import prepare_to_use_grpc
from grpc_batcher._server.array_callback import ArrayCallback
from grpc_batcher._server.metrics import Recorder
from grpc_batcher._server.published import Published

import numpy as np
from array_kinds import DTYPES, OBSERVATION_SHAPE, packed_observation
from servers.array_batcher import prepared_network

# A loop of the competing thread takes about a tenth of this.
_LEAST_STALL_NS = 2000

# Batches of which the copies take so long that a thread that gets the GIL meanwhile is seen to have it.
_LARGE_BYTES, _LARGE_BATCH_SIZE, _LARGE_BATCHES = 884_736, 64, 10

Work = Callable[[], object]


def codec(observation_bytes: int, batch_size: int) -> Work:
    """Return what a server with arrays does for a batch, with a callback that returns arrays made before."""
    network = prepared_network(batch_size)
    callback = ArrayCallback(
        lambda batch: network(batch["data"]),
        MODELS["repr"],
        {"data": Array(OBSERVATION_SHAPE, DTYPES[observation_bytes])},
        [batch_size],
        Published(),
        Recorder(timed=False, batch_size=batch_size),
        warms_up=False,
    )
    messages = [write_request({"data": packed_observation(observation_bytes, row)}) for row in range(batch_size)]

    def work() -> None:
        answers = callback.outcomes_of([callback.read_request(message)[0] for message in messages])
        if not all(type(answer) is bytes for answer in answers):
            raise RuntimeError(f"no answers: {answers!r:.300}")

    return work


def copies(sizes: list[int]) -> Work:
    """Return copies of these sizes by numpy, which makes them without the GIL."""
    pairs = [(np.zeros(size, np.uint8), np.ones(size, np.uint8)) for size in sizes]

    def work() -> None:
        for target, source in pairs:
            np.copyto(target, source)

    return work


def held_ms(observation_bytes: int, batch_size: int, seconds: float) -> float:
    """Return the CPU time of a batch less that of its copies, which are all that is done without the GIL."""
    outputs = prepared_network(batch_size)(np.zeros((batch_size, *OBSERVATION_SHAPE), np.uint8))
    sizes = [observation_bytes] * batch_size + [outputs["embedding"].nbytes // batch_size] * batch_size
    # The last tells what numpy's calls cost without what they copy.
    works = codec(observation_bytes, batch_size), copies(sizes), copies([1] * len(sizes))
    durations_ns: list[list[int]] = [[] for _ in works]
    until_s = time.monotonic() + seconds
    while time.monotonic() < until_s:
        for work, durations in zip(works, durations_ns, strict=True):
            begin_ns = time.thread_time_ns()
            work()
            durations.append(time.thread_time_ns() - begin_ns)
    with_codec_ns, with_copies_ns, calls_ns = map(median, durations_ns)
    return (with_codec_ns - (with_copies_ns - calls_ns)) / 1e6


def stall_percents() -> tuple[float, float]:
    """Return for which share of the time a thread that computes in Python stands still beside a codec of large batches,
    and beside numpy's copies of that size, which leave it the GIL. A busy machine adds to both.
    """
    works = codec(_LARGE_BYTES, _LARGE_BATCH_SIZE), copies([_LARGE_BYTES * _LARGE_BATCH_SIZE])
    with_codec, with_copies = map(_stall_percent, works)
    return with_codec, with_copies


def _stall_percent(work: Work) -> float:
    stalled_ns = 0
    is_over = threading.Event()

    def compete() -> None:
        nonlocal stalled_ns
        last_ns = time.monotonic_ns()
        while not is_over.is_set():
            now_ns = time.monotonic_ns()
            if now_ns - last_ns > _LEAST_STALL_NS:
                stalled_ns += now_ns - last_ns
            last_ns = now_ns

    work()
    competitor = threading.Thread(target=compete)
    competitor.start()
    begin_ns = time.monotonic_ns()
    for _ in range(_LARGE_BATCHES):
        work()
    passed_ns = time.monotonic_ns() - begin_ns
    is_over.set()
    competitor.join()
    return stalled_ns / passed_ns * 100


def run(pipe: Connection) -> None:
    """The process."""
    prepare_to_use_grpc()  # it keeps freed memory, as a server does
    pipe.send({})
    obey(pipe, {"held_ms": held_ms, "stall_percents": stall_percents, "info": lambda: None})
