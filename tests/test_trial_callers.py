"""Callers that are killed, cancel or run out of time while others continue, with an account of every request.

GRPC_BATCHER_TRIALS=20 in the environment makes these trials twenty times as long.
"""

from __future__ import annotations

import gc
import itertools
import random
import re
import threading
from pathlib import Path
from typing import Any

from grpc_batcher._server.session import Session

import pytest
from accounting import (
    KINDS,
    LENGTH,
    Ledger,
    ask_until_killed,
    asking,
    serving_kind,
    start_process,
    wait_for_answers,
)
from serving import Held, address_of, eventually, in_background, open_files, resident_bytes

KILLED_AT_ONCE, KILLED_IN_TOTAL, REQUEST_BYTES = 20, 200 * LENGTH, 200_000


@pytest.mark.timeout(300 * LENGTH)
@pytest.mark.parametrize("kind", ["blocking", "futures", "arrays"])
def test_200_callers_killed_at_random_moments_leave_nothing_behind(tmp_path: Path, kind: str) -> None:
    """A leak of one request, stream, file or thread per caller would show. Other callers get their answers."""
    moments, others = random.Random(1), 4
    ledger, killed = Ledger(tmp_path / "ledger"), set()

    def round_of_killing(name: str) -> None:
        names = [f"{name}-{number}" for number in range(KILLED_AT_ONCE)]
        victims = [
            start_process(ask_until_killed, ledger, address_of(batcher), each, REQUEST_BYTES, kind) for each in names
        ]
        eventually(lambda: batcher.metrics().open_streams == others + KILLED_AT_ONCE)
        for victim in victims:
            wait_for_answers(ledger, moments.randrange(3))
            victim.kill()
        for victim in victims:
            victim.join()
            victim.close()
        eventually(lambda: batcher.metrics().open_streams == others)
        ledger.note_gone(names)
        killed.update(names)

    with (
        serving_kind(kind, ledger.callback, batch_timeout_s=0.001) as batcher,
        KINDS[kind](address_of(batcher)) as client,
        asking(ledger, "other", [client] * others),
    ):
        for number in range(2):
            round_of_killing(f"first-{number}")
        gc.collect()
        threads, files, objects, resident = (
            threading.active_count(),
            open_files(),
            len(gc.get_objects()),
            resident_bytes(),
        )
        for number in range(KILLED_IN_TOTAL // KILLED_AT_ONCE):
            round_of_killing(f"killed-{number}")
        gc.collect()
        assert batcher.metrics().waiting <= others
        eventually(lambda: threading.active_count() <= threads)
        eventually(lambda: open_files() <= files + KILLED_AT_ONCE)
        assert len(gc.get_objects()) - objects < KILLED_IN_TOTAL
        assert resident_bytes() - resident < KILLED_IN_TOTAL * REQUEST_BYTES / 2
    account = ledger.account(killed=killed)
    assert account.failed == {}
    eventually(lambda: batcher.metrics().open_streams == 0)


@pytest.mark.parametrize("kind", KINDS)
def test_requests_of_callers_that_leave_while_waiting_never_reach_the_callback(tmp_path: Path, kind: str) -> None:
    """Half of them run out of time, the others have their client closed. Those that stay are answered."""
    ledger, each_kind = Ledger(tmp_path / "ledger"), 12

    def round_of_leaving(round_name: str) -> None:
        others = [in_background(ledger.ask, client, f"first-{round_name}/1")]
        eventually(lambda: held.batches)
        leavers = []
        for number in range(each_kind):
            others.append(in_background(ledger.ask, client, f"stays-{round_name}-{number}/1", timeout_s=1000))
            timeout_s = 0.02 if number % 2 else None
            leavers.append(in_background(ledger.ask, leaver, f"leaves-{round_name}-{number}/1", timeout_s=timeout_s))
        eventually(lambda: sum(request.done() for request in leavers) == each_kind // 2)
        eventually(lambda: batcher.metrics().waiting == each_kind + each_kind // 2)
        leaver.close()
        assert [request.result() for request in leavers] == [False] * each_kind
        eventually(lambda: batcher.metrics().waiting == each_kind)
        ledger.note_gone(f"leaves-{round_name}-{number}/1" for number in range(each_kind))
        held.release(float("inf"))
        assert [request.result() for request in others] == [True] * (1 + each_kind)

    for number in range(10 * LENGTH):
        with (
            Held(ledger.callback) as held,
            serving_kind(kind, held, batch_size=5, batch_timeout_s=0.001) as batcher,
            KINDS[kind](address_of(batcher)) as client,
            KINDS[kind](address_of(batcher)) as leaver,
        ):
            round_of_leaving(f"{number}")
    account = ledger.account(failures={"DEADLINE_EXCEEDED", "CANCELLED"})
    assert {name for batch in account.batches for name in batch} == set(account.answered)
    assert set(account.failed.values()) == {"DEADLINE_EXCEEDED", "CANCELLED"}


@pytest.mark.parametrize("kind", KINDS)
def test_time_limits_that_pass_at_any_moment_do_not_affect_others(kind: str, tmp_path: Path) -> None:
    """The limits are about as long as an answer takes, so they pass on the way, in the queue and in the callback."""
    ledger = Ledger(tmp_path / "ledger")

    def hurry(caller: int) -> None:
        limits = random.Random(caller)
        for number in range(150 * LENGTH):
            ledger.ask(client, f"hurries-{caller}/{number}", timeout_s=limits.uniform(1e-4, 8e-3))

    with (
        serving_kind(kind, ledger.callback, batch_timeout_s=0.002) as batcher,
        KINDS[kind](address_of(batcher)) as client,
        KINDS[kind](address_of(batcher)) as other_client,
        asking(ledger, "other", [other_client] * 4),
    ):
        for caller in [in_background(hurry, caller) for caller in range(4)]:
            caller.result()
    account = ledger.account(failures={"DEADLINE_EXCEEDED"})
    assert account.failed
    assert [name for name in account.failed if not name.startswith("hurries")] == []


@pytest.mark.parametrize("kind", ["blocking", "arrays"])
def test_requests_reach_the_callback_in_order_of_arrival_under_load(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    """A request accepted before another arrives never comes after it; those of one stream come one at a time.

    The longest arrays have three rows and a batch five, so a batch is often full although there is room for others.
    """
    ticks = itertools.count()
    accepted: dict[str, tuple[int, int]] = {}
    accept = Session.accept

    def note_and_accept(session: Session, message: bytes) -> Any:
        begin = next(ticks)
        ticket = accept(session, message)
        (name,) = re.findall(rb"other-\d+/\d+", message)
        accepted[name.decode()] = begin, next(ticks)
        return ticket

    monkeypatch.setattr(Session, "accept", note_and_accept)
    ledger = Ledger(tmp_path / "ledger")
    with (
        serving_kind(kind, ledger.callback, batch_size=5, batch_timeout_s=0.001) as batcher,
        KINDS[kind](address_of(batcher)) as client,
        asking(ledger, "other", [client] * 16, step_bytes=5000),
    ):
        wait_for_answers(ledger, 2000 * LENGTH)
    in_order = [name for batch in ledger.account().batches for name in batch]
    latest_begin = -1
    last_of: dict[str, int] = {}
    for name in in_order:
        begin, end = accepted[name]
        assert end > latest_begin, f"{name} was accepted before another arrived, which reached the callback first"
        latest_begin = max(latest_begin, begin)
        caller, _, number = name.rpartition("/")
        assert int(number) == last_of.get(caller, 0) + 1
        last_of[caller] = int(number)
