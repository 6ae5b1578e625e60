"""Shutdowns at every stage of a request, with an account of every request.

Shutdowns from the callback, from a signal handler, from two threads, and repeated ones are in test_api.py.
GRPC_BATCHER_TRIALS=20 in the environment makes the random ones twenty times as long.
"""

from __future__ import annotations

import logging
import random
import socket
import threading
import time
from contextlib import suppress
from pathlib import Path

from grpc_batcher import MukoeBatcherClient

import grpc
import pytest
from accounting import KINDS, LENGTH, Ledger, serving_kind
from serving import Held, address_of, answer, connect, error_of, eventually, in_background, run_program, serving


@pytest.mark.parametrize("grace_s", [0, 60])
@pytest.mark.parametrize("streams", [0, 1, 50])
def test_a_shutdown_without_requests_ends_the_streams_and_returns(streams: int, grace_s: float) -> None:
    with Held() as held, serving(held, batch_size=64, batch_timeout_s=0.001) as batcher, connect(batcher) as client:
        held.release(float("inf"))
        begin = threading.Barrier(streams + 1)

        def ask(number: int) -> None:
            begin.wait()
            assert client.send_request(b"%d" % number) == answer(b"%d" % number)

        requests = [in_background(ask, number) for number in range(streams)]
        begin.wait()
        for request in requests:
            request.result()
        batcher.shutdown(grace_s)
        assert batcher.metrics().open_streams == 0
        assert error_of(client.send_request, b"after").code().name == "UNAVAILABLE"


def test_a_shutdown_answers_what_waits_without_waiting_for_the_window(tmp_path: Path) -> None:
    ledger, callers = Ledger(tmp_path / "ledger"), 10
    with serving(ledger.callback, batch_size=2 * callers, batch_timeout_s=1e6) as batcher, connect(batcher) as client:
        requests = [in_background(ledger.ask, client, f"caller/{number}") for number in range(callers)]
        eventually(lambda: batcher.metrics().waiting == callers)
        batcher.shutdown(grace_s=60)
        assert [request.result() for request in requests] == [True] * callers
        assert batcher.metrics().batches["drain"] == 1
    ledger.account()


class SlowLink:
    """Forwards a caller's bytes at once, and the server's at 64 KiB per 5 ms."""

    PIECE_BYTES, PAUSE_S = 65536, 0.005

    def __init__(self, port: int) -> None:
        self.has_begun = threading.Event()  # to forward an answer
        self._server_port = port
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.address = f"127.0.0.1:{self._listener.getsockname()[1]}"
        self._thread = threading.Thread(target=self._run)

    def _run(self) -> None:
        caller, _ = self._listener.accept()
        with caller, socket.socket() as server:
            server.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, self.PIECE_BYTES)  # so that little is in flight
            server.connect(("127.0.0.1", self._server_port))
            upstream = threading.Thread(target=self._forward, args=(caller, server, 0))
            upstream.start()
            self._forward(server, caller, self.PAUSE_S)
            upstream.join()

    def _forward(self, source: socket.socket, target: socket.socket, pause_s: float) -> None:
        passed_bytes = 0
        with suppress(OSError):
            while data := source.recv(self.PIECE_BYTES):
                time.sleep(pause_s)
                target.sendall(data)
                passed_bytes += len(data)
                if passed_bytes > 3 * self.PIECE_BYTES:
                    self.has_begun.set()
        for end in (source, target):
            with suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)

    def __enter__(self) -> SlowLink:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._thread.join()
        self._listener.close()


@pytest.mark.skipif(
    tuple(int(part) for part in grpc.__version__.split(".")[:2]) < (1, 62),
    reason="older gRPC reports a reply as sent too early, and cuts it off when the server stops",
)
def test_replies_that_are_on_their_way_arrive_despite_a_shutdown() -> None:
    """The shutdown starts when the beginning of a long reply has passed a slow link."""
    answer_bytes = 10_000_000

    def long_answers(requests: list[bytes]) -> list[tuple[dict[str, bytes], int]]:
        return [({"result": bytes(answer_bytes)}, 7) for _ in requests]

    with (
        serving(long_answers) as batcher,
        connect(batcher) as idle_client,
        SlowLink(batcher.port) as link,
        MukoeBatcherClient(link.address) as client,
    ):
        idle_client.send_request(b"a stream")
        request = in_background(client.send_request, b"x")
        link.has_begun.wait()
        batcher.shutdown(grace_s=60)
        assert request.result() == ({"result": bytes(answer_bytes)}, 7)


@pytest.mark.timeout(60 + 30 * LENGTH)
@pytest.mark.parametrize("kind", ["blocking", "arrays"])
@pytest.mark.parametrize("grace_s", [0, 60])
def test_after_a_shutdown_under_load_each_request_is_answered_or_unavailable(
    grace_s: float, kind: str, tmp_path: Path
) -> None:
    """Callers stay, come and go, or have short time limits. In a grace period, what the callback saw is answered."""
    ledger, moments = Ledger(tmp_path / "ledger"), random.Random(8)

    def come_and_go(caller: str) -> None:
        for number in range(1_000_000):
            with KINDS[kind](address) as client:
                if not ledger.ask(client, f"{caller}/{number}"):
                    return

    def stay(caller: str, timeout_s: float | None) -> None:
        with KINDS[kind](address) as client:
            for number in range(1_000_000):
                if not ledger.ask(client, f"{caller}/{number}", timeout_s=timeout_s) and not batcher.is_server_ready():
                    return

    for number in range(15 * LENGTH):
        with serving_kind(kind, ledger.callback, batch_size=4, batch_timeout_s=0.001) as batcher:
            address = address_of(batcher)
            callers = [in_background(come_and_go, f"new-{number}-{each}") for each in range(2)]
            callers += [in_background(stay, f"stays-{number}-{each}", None) for each in range(4)]
            callers += [in_background(stay, f"hurries-{number}-{each}", 0.003) for each in range(2)]
            enough = ledger.answers + moments.randrange(60)
            eventually(lambda enough=enough: ledger.answers >= enough)  # type: ignore[misc]
            batcher.shutdown(grace_s)
            for caller in callers:
                caller.result()
    account = ledger.account(failures={"UNAVAILABLE", "DEADLINE_EXCEEDED"})
    assert {name.partition("-")[0] for name, code in account.failed.items() if code != "UNAVAILABLE"} <= {"hurries"}
    if grace_s:
        seen = {name for batch in account.batches for name in batch}
        assert {name for name in seen - set(account.answered) if not name.startswith("hurries")} == set()


@pytest.mark.parametrize("kind", ["blocking", "arrays"])
def test_behind_a_stuck_callback_the_queue_is_bounded_and_a_shutdown_says_what_it_left(
    kind: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    callers, places = 60, 10
    ledger = Ledger(tmp_path / "ledger")
    with (
        Held(ledger.callback) as held,
        serving_kind(kind, held, batch_size=1, max_queue_size=places) as batcher,
        KINDS[kind](address_of(batcher)) as client,
    ):
        requests = [in_background(ledger.ask, client, "in-the-callback/1")]
        eventually(lambda: held.batches)
        requests += [in_background(ledger.ask, client, f"caller-{number}/1") for number in range(callers)]
        eventually(lambda: sum(request.done() for request in requests) == callers - places)
        assert batcher.metrics().waiting == places
        with caplog.at_level(logging.WARNING, logger="grpc_batcher"):
            batcher.shutdown(grace_s=0.1)
        assert [request.result() for request in requests] == [False] * (1 + callers)
        assert f"left {1 + places} requests unanswered" in caplog.text
        codes = [
            code for _, code in sorted(ledger.account(failures={"RESOURCE_EXHAUSTED", "UNAVAILABLE"}).failed.items())
        ]
        assert codes.count("RESOURCE_EXHAUSTED") == callers - places
        assert codes.count("UNAVAILABLE") == 1 + places


INTERRUPTED_DRAIN_PROGRAM = """
    import signal, socket, threading
    from grpc_batcher import MukoeBatcherClient, RequestError, create_batcher

    class Enough(Exception):
        pass

    def enough(*_):
        raise Enough

    signal.signal(signal.SIGALRM, enough)
    entered = threading.Event()

    def never_returns(requests):
        entered.set()
        threading.Event().wait()

    batcher = create_batcher("repr", 1, 0.0, 0, batch_process_fn=never_returns, host="127.0.0.1")
    batcher.start()
    client = MukoeBatcherClient(f"127.0.0.1:{batcher.port}")

    def ask():
        try:
            client.send_request(b"x")
        except RequestError as error:
            print(error.code().name, flush=True)

    asking = threading.Thread(target=ask)
    asking.start()
    entered.wait()
    signal.setitimer(signal.ITIMER_REAL, 0.3)
    try:
        batcher.shutdown(grace_s=50)
    except Enough:
        pass
    asking.join()
    try:
        socket.create_connection(("127.0.0.1", batcher.port)).close()
    except ConnectionRefusedError:
        print("stopped")
"""


def test_a_shutdown_interrupted_by_an_exception_still_stops_the_server(tmp_path: Path) -> None:
    assert run_program(tmp_path, INTERRUPTED_DRAIN_PROGRAM) == ["UNAVAILABLE", "stopped"]
