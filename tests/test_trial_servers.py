"""Servers that are killed or shut down under load and come back, with an account of every request.

GRPC_BATCHER_TRIALS=20 in the environment makes these trials twenty times as long.
"""

from __future__ import annotations

import os
import random
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from accounting import KINDS, LENGTH, Ledger, asking, serving_kind, start_server, wait_for_answers
from serving import serving

THREADS_OF_A_CLIENT = 4

# An address of this process's own, so that no other test gets the server's port while the server is away.
HOST = f"127.{1 + os.getpid() % 250}.{os.getpid() // 250 % 250}.1"
CALLERS = {f"caller-{number}" for number in range(2 * THREADS_OF_A_CLIENT)}


@contextmanager
def callers_asking(ledger: Ledger, kind: str, port: int) -> Iterator[None]:
    """Callers that keep using the same clients, whatever happens, until this is left."""
    with (
        KINDS[kind](f"{HOST}:{port}") as first,
        KINDS[kind](f"{HOST}:{port}") as second,
        asking(ledger, "caller", (first, second) * THREADS_OF_A_CLIENT),
    ):
        yield


@pytest.mark.timeout(60 + 60 * LENGTH)
@pytest.mark.parametrize("kind", KINDS)
def test_callers_get_unavailable_when_their_server_is_killed_and_continue_with_the_next(
    kind: str, tmp_path: Path
) -> None:
    ledger, moments, kills = Ledger(tmp_path / "ledger"), random.Random(2), 10 * LENGTH
    server, port = start_server(ledger, kind, HOST)
    with callers_asking(ledger, kind, port):
        for _ in range(kills):
            wait_for_answers(ledger, 100 + moments.randrange(50))
            server.kill()
            server.join()
            server, port = start_server(ledger, kind, HOST, port)
        wait_for_answers(ledger, 100)
    server.kill()
    server.join()
    account = ledger.account(failures={"UNAVAILABLE"})
    assert {name.partition("/")[0] for name in account.answered} == CALLERS
    assert account.failed


@pytest.mark.timeout(60 + 60 * LENGTH)
@pytest.mark.parametrize("kind", KINDS)
def test_no_request_is_executed_twice_or_lost_while_servers_restart_under_load(kind: str, tmp_path: Path) -> None:
    """A server that shuts down first answers what it took in."""
    ledger, moments = Ledger(tmp_path / "ledger"), random.Random(3)
    with serving(ledger.callback, host=HOST) as finder:
        port = finder.port
    with callers_asking(ledger, kind, port):
        for _ in range(20 * LENGTH):
            with serving_kind(kind, ledger.callback, host=HOST, port=port, batch_timeout_s=0.001) as batcher:
                wait_for_answers(ledger, 50 + moments.randrange(50))
                batcher.shutdown(grace_s=30)
    account = ledger.account(failures={"UNAVAILABLE"})
    assert {name for batch in account.batches for name in batch} == set(account.answered)
    assert {name.partition("/")[0] for name in account.answered} == CALLERS
