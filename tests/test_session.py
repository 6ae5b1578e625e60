"""A session between a transport and the waiting room, with orders of events that sockets rarely produce."""

from __future__ import annotations

import threading
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

from grpc_batcher import _core
from grpc_batcher._models import MODELS, Answer, read_answer
from grpc_batcher._server.byte_callback import ByteCallback
from grpc_batcher._server.metrics import Recorder
from grpc_batcher._server.published import Published
from grpc_batcher._server.service import Service
from grpc_batcher._server.session import Session
from grpc_batcher._transport.interface import StreamEnd

import grpc
import pytest
from serving import echo

REQUEST = MODELS["repr"].write_request({"data": b"hi"})
NO_DEADLINE = SimpleNamespace(time_remaining=lambda: None)


class RecordedStream:
    """Records what a session sends: replies, and the status it ends with."""

    def __init__(self) -> None:
        self.replies: list[bytes] = []
        self.ends: list[StreamEnd | None] = []

    def send(self, reply: bytes) -> None:
        self.replies.append(reply)

    def end(self, end: StreamEnd | None) -> None:
        self.ends.append(end)


class Source:
    """Wraps a session's stream in the waiting room, to do something around `push` as other threads might."""

    def __init__(
        self,
        source: _core.Stream,
        before: Callable[[], None] = lambda: None,
        after: Callable[[_core.Ticket], None] = lambda ticket: None,
    ) -> None:
        self._source = source
        self._before = before
        self._after = after

    def push(self, *arguments: Any) -> _core.Ticket:
        self._before()
        ticket = self._source.push(*arguments)
        self._after(ticket)
        return ticket

    def close(self) -> None:
        self._source.close()


@pytest.fixture
def service() -> Service:
    room = _core.WaitingRoom(batch_size=1, window_ns=0, capacity=2)
    callback = ByteCallback(echo, MODELS["repr"], Published(), warm_up_requests=())
    return Service(room, callback, Recorder(timed=True, batch_size=1), max_streams=2)


def counts(service: Service) -> dict[str, int]:
    batches, batched, batched_rows = service.room.batches()
    snapshot = service.recorder.snapshot(
        model="repr",
        batches=batches,
        batched_requests=batched,
        batched_rows=batched_rows,
        waiting=0,
        waiting_rows=0,
        waiting_bytes=0,
        open_streams=0,
        step=None,
        step_age_s=None,
    )
    return dict(snapshot.requests)


def taken_in(end: StreamEnd | None) -> str:
    """Return how many requests a status tells the client were taken in."""
    assert end is not None
    told: dict[str, str] = {}
    context = SimpleNamespace(
        set_trailing_metadata=told.update, set_code=lambda code: None, set_details=lambda text: None
    )
    end.set_on(context)
    return told["grpc-batcher-taken-in"]


def test_a_reply_that_is_ready_before_push_returns_is_sent(service: Service) -> None:
    session = Session(service, NO_DEADLINE)
    stream = session.stream = RecordedStream()
    delivering: list[threading.Thread] = []

    def answer(ticket: _core.Ticket) -> None:
        taken = service.room.poll_batch()
        assert taken is not None
        service.room.finish(taken[1], [Answer({"result": ticket.request}, 7)])
        # Delivered on another thread, which waits until the request is counted as taken in.
        delivering.append(threading.Thread(target=session.deliver, args=(ticket,)))
        delivering[-1].start()

    session._source = Source(session._source, after=answer)
    for _ in range(2):
        session.accept(REQUEST)
        delivering[-1].join()
    assert [read_answer(reply) for reply in stream.replies] == [({"result": b"hi"}, 7)] * 2
    session.close()
    assert counts(service) == {"OK": 2}


def test_a_refused_request_is_counted_once_and_not_as_taken_in(service: Service) -> None:
    session = Session(service, NO_DEADLINE)
    for message, code in ((b"", grpc.StatusCode.INVALID_ARGUMENT), (b"\xff", grpc.StatusCode.INVALID_ARGUMENT)):
        with pytest.raises(StreamEnd) as caught:
            session.accept(message)
        assert caught.value.code is code
        assert taken_in(caught.value) == "0"
    service.room.close()
    with pytest.raises(StreamEnd) as caught:
        session.accept(REQUEST)
    assert caught.value.code is grpc.StatusCode.UNAVAILABLE
    session.close()
    assert counts(service) == {"INVALID_ARGUMENT": 2, "UNAVAILABLE": 1}


def test_a_request_refused_during_a_shutdown_is_not_counted_as_taken_in(service: Service) -> None:
    """The client may then resend it, because it certainly never ran."""
    session = Session(service, NO_DEADLINE)
    stream = session.stream = RecordedStream()
    ending: list[threading.Thread] = []

    def shut_down_meanwhile() -> None:
        service.room.close()
        service.room.abandon()
        ending.append(threading.Thread(target=session.shut_down))
        ending[0].start()

    session._source = Source(session._source, before=shut_down_meanwhile)
    with pytest.raises(StreamEnd) as caught:
        session.accept(REQUEST)
    ending[0].join()
    assert taken_in(caught.value) == "0"
    assert [taken_in(end) for end in stream.ends] == ["0"]
    assert counts(service) == {"UNAVAILABLE": 1}


def test_a_bad_request_whose_caller_leaves_meanwhile_is_counted_once(
    service: Service, monkeypatch: pytest.MonkeyPatch
) -> None:
    session = Session(service, NO_DEADLINE)
    read_request = service.callback.read_request

    def close_and_read(message: bytes) -> Any:
        session.close()
        return read_request(message)

    monkeypatch.setattr(service.callback, "read_request", close_and_read)
    with pytest.raises(StreamEnd):
        session.exchange(b"\xff")
    assert counts(service) == {"INVALID_ARGUMENT": 1}


def test_a_request_whose_caller_leaves_is_counted_once(service: Service) -> None:
    session = Session(service, NO_DEADLINE)
    stream = session.stream = RecordedStream()
    ticket = session.accept(REQUEST)
    session.close()
    session.close()
    assert ticket.state == _core.LEFT
    session.stream = stream  # a delivery that began before the close still has it
    session.deliver(ticket)
    assert stream.replies == []
    assert counts(service) == {"CANCELLED": 1}


def test_a_request_that_arrives_after_its_stream_ended_is_counted_once_and_not_taken_in(service: Service) -> None:
    session = Session(service, NO_DEADLINE)
    session.close()
    with pytest.raises(StreamEnd) as caught:
        session.accept(REQUEST)
    assert caught.value.code is grpc.StatusCode.CANCELLED
    assert taken_in(caught.value) == "0"
    assert counts(service) == {"CANCELLED": 1}
