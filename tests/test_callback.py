"""What callbacks may do with their list and their results. More over a socket: `test_outcomes.py`."""

from __future__ import annotations

import logging
import threading
from collections.abc import Sequence
from typing import Any

from grpc_batcher._models import MODELS, Answer
from grpc_batcher._server.byte_callback import ByteCallback
from grpc_batcher._server.callback import Failed
from grpc_batcher._server.delivery import Delivery
from grpc_batcher._server.published import Published

import grpc
import numpy as np
import pytest
from serving import answer, connect, echo, error_of, eventually, in_background, serving


def outcomes_of(callback: Any, requests: list[bytes]) -> list[Any]:
    return ByteCallback(callback, MODELS["repr"], Published(), warm_up_requests=()).outcomes_of(requests)


def consumed(requests: list[Any]) -> list[Any]:
    results = []
    while requests:
        results.append(({"result": requests.pop(0)}, 0))
    return results


def padded(requests: list[Any]) -> list[Any]:
    count = len(requests)
    requests += [b""] * (16 - count)
    return echo(requests)[:count]


@pytest.mark.parametrize("callback", [consumed, padded])
def test_a_callback_may_consume_or_pad_its_list(callback: Any) -> None:
    with serving(callback) as batcher, connect(batcher) as client:
        for data in (b"first", b"second"):
            assert client.send_request(data) == ({"result": data}, 0)


@pytest.mark.parametrize("callback", [lambda requests: requests.clear() or [], lambda requests: 1 / len(requests[9:])])
def test_a_callback_that_empties_its_list_and_fails_still_fails_each_request_once(callback: Any) -> None:
    outcomes = outcomes_of(callback, [b"a", b"b"])
    assert len(outcomes) == 2
    assert all(isinstance(outcome, Failed) for outcome in outcomes)


def test_a_sequence_that_yields_more_than_its_length_fails_the_batch() -> None:
    class Liar(Sequence[Any]):
        def __len__(self) -> int:
            return 1

        def __getitem__(self, index: Any) -> Any:
            if index > 2:
                raise IndexError
            return {}, 0

    (outcome,) = outcomes_of(lambda requests: Liar(), [b"a"])
    assert outcome == Failed("the callback must return one result per request; its Liar holds 3")


def test_numpys_bytes_and_str_are_accepted_as_bytes_and_str() -> None:
    result = ({np.str_("key"): np.bytes_(b"value")}, np.int64(3))
    (outcome,) = outcomes_of(lambda requests: [result], [b"a"])
    assert outcome == Answer({"key": b"value"}, 3)
    with serving(lambda requests: [result for _ in requests]) as batcher, connect(batcher) as client:
        assert client.send_request(b"x") == ({"key": b"value"}, 3)


def test_replies_are_sent_even_if_no_thread_can_be_started(monkeypatch: pytest.MonkeyPatch) -> None:
    """With more callers than a batch holds, a second thread would send the replies."""
    started = threading.Thread.start

    def refuse(thread: threading.Thread) -> None:
        if thread.name == "grpc_batcher-replies":
            raise RuntimeError("can't start new thread")
        started(thread)

    monkeypatch.setattr(threading.Thread, "start", refuse)
    with serving(batch_size=1) as batcher, connect(batcher) as client:

        def ask(caller: int) -> None:
            for number in range(50):
                data = b"%d %d" % (caller, number)
                assert client.send_request(data) == ({"result": data}, 0)

        for request in [in_background(ask, caller) for caller in range(8)]:
            request.result()


def test_a_reply_that_cannot_be_sent_does_not_stop_the_others() -> None:
    class Room:
        @staticmethod
        def is_due() -> bool:
            return False

    class Owner:
        def __init__(self, fails: bool) -> None:
            self.fails = fails
            self.delivered = False
            self.stream = object()

        def deliver(self, ticket: Any) -> None:
            if self.fails:
                raise ValueError("broken")
            self.delivered = True

    class Ticket:
        def __init__(self, owner: Owner) -> None:
            self.owner = owner

    owners = [Owner(fails=True), Owner(fails=False)]
    Delivery(Room()).deliver([Ticket(owner) for owner in owners])  # type: ignore[arg-type, list-item]
    assert owners[1].delivered


def test_a_callback_that_calls_its_own_batcher_times_out_and_blocks_nothing() -> None:
    """Batches run one at a time, so its own request is not answered before it returns."""
    codes = []

    def call_its_own_batcher(requests: list[bytes]) -> Any:
        if b"outer" in requests:
            for _ in range(3):
                codes.append(error_of(inner_client.send_request, b"inner", timeout_s=0.05).code())
                eventually(lambda: batcher.metrics().waiting == 0)  # the server has noticed as well
        return echo(requests)

    with serving(call_its_own_batcher) as batcher, connect(batcher) as client, connect(batcher) as inner_client:
        for _ in range(2):
            assert client.send_request(b"outer") == answer(b"outer")
            assert inner_client.send_request(b"after") == answer(b"after")
        assert codes == [grpc.StatusCode.DEADLINE_EXCEEDED] * 6
        assert batcher.metrics().batched_requests == 4


def test_a_callback_may_call_another_batcher() -> None:
    with serving() as second, connect(second) as client_of_second:

        def pass_on(requests: list[bytes]) -> Any:
            return [client_of_second.send_request(data) for data in requests]

        with serving(pass_on) as first, connect(first) as client:
            asked = [in_background(client.send_request, b"%d" % number) for number in range(20)]
            assert [request.result() for request in asked] == [answer(b"%d" % number) for number in range(20)]


class ExitsWhenRead(dict[str, bytes]):
    def items(self) -> Any:
        raise SystemExit("from a result")


def test_a_result_that_raises_system_exit_when_read_fails_only_its_own_request() -> None:
    def some_exit(requests: list[bytes]) -> Any:
        return [(ExitsWhenRead() if data == b"bad" else {"result": data}, 0) for data in requests]

    with serving(some_exit) as batcher, connect(batcher) as client:
        error = error_of(client.send_request, b"bad")
        assert error.code() is grpc.StatusCode.INTERNAL
        assert "SystemExit: from a result" in error.details()
        assert client.send_request(b"good") == answer(b"good")


class BrokenHandler(logging.Handler):
    def emit(self, record: logging.LogRecord) -> None:
        raise OSError("no space left on the log's disk")


def test_a_log_handler_that_raises_does_not_end_the_batch_thread() -> None:
    def some_fail(requests: list[bytes]) -> Any:
        if b"bad" in requests:
            raise ValueError("bad")
        return echo(requests)

    handler = BrokenHandler()
    logging.getLogger("grpc_batcher").addHandler(handler)
    try:
        with serving(some_fail) as batcher, connect(batcher) as client:
            assert error_of(client.send_request, b"bad").code() is grpc.StatusCode.INTERNAL
            assert client.send_request(b"good") == answer(b"good")
    finally:
        logging.getLogger("grpc_batcher").removeHandler(handler)
