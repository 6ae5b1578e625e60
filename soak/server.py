"""A server process. Its callback checks what it gets, sends run.py the numbers it saw, and fails when asked to."""

from __future__ import annotations

import array
import random
import time
from multiprocessing.connection import Connection
from typing import Any

from grpc_batcher import Batch, BindError, MukoeBatcher, create_batcher

import numpy as np
from child import Faults, obey
from traffic import (
    ARRAYS,
    MAX_MESSAGE_BYTES,
    REFUSED,
    AskedForError,
    Kind,
    answer_to,
    from_rows,
    name_of,
    read_request,
    step_of,
)

BATCH_SIZE = 8
BATCH_ROWS = 32
WINDOW_S = 0.002
MAX_CALLBACK_S = 0.003

# After a restart the port is free again at once, unless a connection of another program just took it.
_BIND_ATTEMPTS = 100
_BIND_PAUSE_S = 0.1


class Callback:
    """seen: the pipe that gets the numbers of each batch before anything else; its content outlives this process."""

    def __init__(self, seen: Connection, faults: Faults, seed: str) -> None:
        self._seen = seen
        self._faults = faults
        self._chance = random.Random(seed)

    def __call__(self, batch: list[Any]) -> list[Any]:
        payloads = [each[0] if isinstance(each, tuple) else each for each in batch]
        try:
            requests = [read_request(payload) for payload in payloads]
        except Exception as error:
            self._faults.report(f"the callback got something broken: {error!r}")
            raise
        self._seen.send_bytes(array.array("Q", [request.number for request in requests]))
        for request, item in zip(requests, batch, strict=True):
            if request.kind in REFUSED:
                self._faults.report(f"the callback got {name_of(request.number)}, a {request.kind.name} to be refused")
            if isinstance(item, tuple) and item[1] != step_of(request.number):
                self._faults.report(f"{name_of(request.number)} came with the action {item[1]} of another request")
        time.sleep(self._chance.random() * MAX_CALLBACK_S)
        if any(request.kind is Kind.RAISING for request in requests):
            raise AskedForError(*(request.number for request in requests))
        return [
            AskedForError(request.number) if request.kind is Kind.FAILING else answer_to(request.number, payload)
            for request, payload in zip(requests, payloads, strict=True)
        ]


class ArrayCallback(Callback):
    """The same for the server of arrays, which keeps some of its input to see whether it changes."""

    def __init__(self, seen: Connection, faults: Faults, seed: str) -> None:
        super().__init__(seen, faults, seed)
        self._kept: tuple[Any, Any] | None = None

    def __call__(self, batch: Batch) -> Any:  # type: ignore[override]
        if self._kept is not None and not np.array_equal(*self._kept):
            self._faults.report("an array that the callback kept has changed")
        self._kept = (batch["piece"], batch["piece"].copy()) if self._chance.random() < 0.1 else None
        sent = list(from_rows(batch, batch.count))
        numbers = np.zeros(batch.size, np.uint64)
        results = super().__call__([payload for _first, payload in sent])
        for (first, payload), result in zip(sent, results, strict=True):
            if isinstance(result, Exception):
                batch.fail(first, result)
            numbers[first:] = read_request(payload).number
        return {**batch, "number": numbers}


def serve(pipe: Connection, seen: Connection, model: str, port: int, seed: str) -> None:
    """The process. It serves until it is told to stop. port: 0 for any free one."""
    faults = Faults()
    callback = ArrayCallback if model == "arrays" else Callback
    batcher = _start(model, port, callback(seen, faults, seed))

    def sample() -> dict[str, Any]:
        metrics = batcher.metrics()
        return {
            "batched": metrics.batched_requests,
            "waiting": metrics.waiting,
            "open_streams": metrics.open_streams,
            "mean_batch_size": metrics.mean_batch_size,
        }

    def stop(grace_s: float) -> dict[str, Any]:
        batcher.shutdown(grace_s)
        return sample()

    pipe.send({"port": batcher.port, "transport": batcher.transport})
    obey(pipe, faults, {"sample": sample, "stop": stop})


def _start(model: str, port: int, callback: Callback) -> MukoeBatcher:
    for attempt in range(_BIND_ATTEMPTS):
        batcher = create_batcher(
            model,
            BATCH_ROWS if model == "arrays" else BATCH_SIZE,
            WINDOW_S,
            port,
            batch_process_fn=callback,
            host="127.0.0.1",
            max_message_bytes=MAX_MESSAGE_BYTES,
            **(
                {"arrays": ARRAYS, "batch_sizes": (1, 4, 16, BATCH_ROWS), "warm_up": False} if model == "arrays" else {}
            ),
        )
        try:
            batcher.start()
        except BindError:
            if attempt == _BIND_ATTEMPTS - 1:
                raise
            time.sleep(_BIND_PAUSE_S)
        else:
            return batcher
    raise AssertionError("not reached")
