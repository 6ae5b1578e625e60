"""Futures and tasks that are cancelled at random moments while others of their client go on, with an account.

GRPC_BATCHER_TRIALS=20 in the environment makes this trial twenty times as long.
"""

from __future__ import annotations

import asyncio
import concurrent.futures
import random
from pathlib import Path
from typing import Any

from grpc_batcher import RequestError

import grpc
import pytest
from accounting import LENGTH, AsyncioClient, FuturesClient, Ledger, asking
from serving import address_of, eventually, in_background, serving

# About twice as long as an answer takes, so some requests are cancelled on the way, some in the queue, some in the
# callback, and some too late.
LONGEST_S = 0.008


class CancelledFutures:
    """Sends each request with `submit`, and cancels its future at a random moment unless the answer comes before."""

    def __init__(self, client: FuturesClient, seed: int) -> None:
        self._client = client
        self._moments = random.Random(seed)

    def send_request(self, data: bytes, *, timeout_s: float | None) -> Any:
        future = self._client.submit(data, timeout_s=timeout_s)
        concurrent.futures.wait([future], self._moments.uniform(0, LONGEST_S))
        if future.cancel():
            raise RequestError(grpc.StatusCode.CANCELLED, "the trial cancelled it")
        return future.result()


class CancelledTasks:
    """Does the same with tasks of a loop."""

    def __init__(self, client: AsyncioClient, seed: int) -> None:
        self._client = client
        self._moments = random.Random(seed)

    def send_request(self, data: bytes, *, timeout_s: float | None) -> Any:
        return self._client.run(self._send(data, timeout_s, self._moments.uniform(0, LONGEST_S)))

    async def _send(self, data: bytes, timeout_s: float | None, moment_s: float) -> Any:
        task = asyncio.create_task(self._client.client.send_request(data, timeout_s=timeout_s))
        await asyncio.wait([task], timeout=moment_s)
        task.cancel()
        try:
            return await task
        except asyncio.CancelledError:
            raise RequestError(grpc.StatusCode.CANCELLED, "the trial cancelled it") from None


@pytest.mark.parametrize(
    ("connect", "cancelling"),
    [(FuturesClient, CancelledFutures), (AsyncioClient, CancelledTasks)],
    ids=["futures", "asyncio"],
)
def test_requests_that_are_cancelled_at_any_moment_do_not_affect_others_of_their_client(
    tmp_path: Path, connect: Any, cancelling: Any
) -> None:
    ledger = Ledger(tmp_path / "ledger")

    def cancel_some(caller: int) -> None:
        sender = cancelling(client, caller)
        for number in range(200 * LENGTH):
            ledger.ask(sender, f"cancels-{caller}/{number}")

    with (
        serving(ledger.callback, batch_timeout_s=0.002) as batcher,
        connect(address_of(batcher)) as client,
        asking(ledger, "other", [client] * 4),
    ):
        for caller in [in_background(cancel_some, caller) for caller in range(4)]:
            caller.result()
        eventually(lambda: batcher.metrics().waiting <= 4)
    account = ledger.account(failures={"CANCELLED"})
    assert account.failed
    assert [name for name in account.failed if not name.startswith("cancels")] == []
    assert [name for name in account.answered if name.startswith("cancels")]
