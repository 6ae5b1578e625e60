"""Two servers of the Open Inference Protocol with the same callback: this library's, and PyTriton."""

from __future__ import annotations

import os
import sys
import sysconfig
from multiprocessing.connection import Connection
from typing import Any

from grpc_batcher import Array, Batch, create_batcher, info
from grpc_batcher._cli.workers import obey

from answers import ANSWER_BYTES, FILLER, INPUT, KEY, MODEL, TAG_BYTES
from servers.batcher import serve
from servers.ports import free_ports


def answers_to(payloads: Any) -> Any:
    """Return a row of an answer for each row of a payload."""
    import numpy  # only in the servers' processes

    answers = numpy.empty((len(payloads), ANSWER_BYTES), numpy.uint8)
    answers[:, :-TAG_BYTES] = numpy.frombuffer(FILLER, numpy.uint8)
    answers[:, -TAG_BYTES:] = payloads[:, -TAG_BYTES:]
    return answers


def run(pipe: Connection, batch_size: int, batch_timeout_s: float, payload_bytes: int) -> None:
    """This library's process."""

    def answer(batch: Batch) -> dict[str, Any]:
        return {KEY: answers_to(batch[INPUT])}

    with create_batcher(
        "repr",
        batch_size,
        batch_timeout_s,
        port=0,
        batch_process_fn=answer,
        arrays={INPUT: Array((payload_bytes,), "uint8")},
        host="127.0.0.1",
        track_metrics=False,
        open_inference=True,
        model_name=MODEL,
    ) as batcher:
        serve(pipe, batcher, {})


def run_pytriton(pipe: Connection, batch_size: int, batch_timeout_s: float, payload_bytes: int) -> None:
    """PyTriton's process, which starts Triton's."""
    from numpy import uint8
    from pytriton.decorators import batch
    from pytriton.model_config import DynamicBatcher, ModelConfig, Tensor
    from pytriton.triton import Triton, TritonConfig

    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())  # Triton's log
    # Its Python backend loads libpython, which the loader finds by itself only where the system installed Python.
    os.environ["LD_LIBRARY_PATH"] = sysconfig.get_config_var("LIBDIR")
    counted = {"batches": 0, "batched_requests": 0}

    @batch  # type: ignore[misc]
    def answer(**inputs: Any) -> dict[str, Any]:
        counted["batches"] += 1
        counted["batched_requests"] += len(inputs[INPUT])
        return {KEY: answers_to(inputs[INPUT])}

    grpc_port, http_port = free_ports(2)
    config = TritonConfig(grpc_address="127.0.0.1", grpc_port=grpc_port, http_port=http_port, allow_metrics=False)
    with Triton(config=config) as triton:
        triton.bind(
            model_name=MODEL,
            infer_func=answer,
            inputs=[Tensor(name=INPUT, dtype=uint8, shape=(payload_bytes,))],
            outputs=[Tensor(name=KEY, dtype=uint8, shape=(ANSWER_BYTES,))],
            config=ModelConfig(
                max_batch_size=batch_size,
                batcher=DynamicBatcher(max_queue_delay_microseconds=round(batch_timeout_s * 1e6)),
            ),
        )
        triton.run()
        pipe.send({"port": grpc_port, "counts": True})
        obey(pipe, {"counts": lambda: dict(counted), "info": info})
