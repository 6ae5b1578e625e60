"""A session between a gear and the room, in orders of events that sockets bring about but rarely."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import grpc
import pytest

from grpc_batcher import _core
from grpc_batcher._server.metrics import Recorder
from grpc_batcher._models import MODELS, Answer, read_answer
from grpc_batcher._server.session import Service, Session, StreamEnd

REQUEST = MODELS["repr"].write_request({"data": b"hi"})
NO_DEADLINE = SimpleNamespace(time_remaining=lambda: None)


class EagerStream:
    """A stream whose requests are taken, answered and delivered by "another thread" before `push` returns."""

    def __init__(self, room: _core.WaitingRoom, stream: _core.Stream, deliver: Callable[[_core.Ticket], None]) -> None:
        self._room = room
        self._stream = stream
        self._deliver = deliver

    def push(self, request: Any, deadline_ns: int | None) -> _core.Ticket:
        ticket = self._stream.push(request, deadline_ns)
        taken = self._room.poll_batch()
        assert taken is not None
        self._room.finish(taken[1], [Answer({"result": request}, 7)])
        self._deliver(ticket)
        return ticket

    def close(self) -> None:
        self._stream.close()


@pytest.fixture
def service() -> Service:
    room = _core.WaitingRoom(batch_size=1, window_ns=0, capacity=2)
    return Service(
        room, MODELS["repr"], Recorder(timed=True, batch_size=1), max_streams=2, stream_handler=lambda _open: None
    )


def counts(service: Service) -> dict[str, int]:
    batches, batched = service.room.batches()
    snapshot = service.recorder.snapshot(
        model="repr", batches=batches, batched_requests=batched, waiting=0, open_streams=0
    )
    return dict(snapshot.requests)


def test_a_reply_that_is_due_before_the_request_is_wholly_in_is_sent(service: Service) -> None:
    session = Session(service, NO_DEADLINE)
    replies: list[bytes] = []
    session._stream = EagerStream(service.room, session._stream, lambda ticket: replies.append(session.reply(ticket)))
    for _ in range(2):
        session.accept(REQUEST)
    assert [read_answer(reply) for reply in replies] == [({"result": b"hi"}, 7)] * 2
    session.close()
    assert counts(service) == {"OK": 2}


def test_a_refused_request_is_counted_once_and_not_as_taken_in(service: Service) -> None:
    session = Session(service, NO_DEADLINE)
    for message, code in ((b"", grpc.StatusCode.INVALID_ARGUMENT), (b"\xff", grpc.StatusCode.INVALID_ARGUMENT)):
        with pytest.raises(StreamEnd) as caught:
            session.accept(message)
        assert caught.value.code is code
        assert caught.value.trailing_metadata == (("grpc-batcher-taken-in", "0"),)
    service.room.close()
    with pytest.raises(StreamEnd) as caught:
        session.accept(REQUEST)
    assert caught.value.code is grpc.StatusCode.UNAVAILABLE
    session.close()
    assert counts(service) == {"INVALID_ARGUMENT": 2, "UNAVAILABLE": 1}


def test_a_request_whose_caller_leaves_is_counted_once(service: Service) -> None:
    session = Session(service, NO_DEADLINE)
    ticket = session.accept(REQUEST)
    session.close()
    session.close()
    assert ticket.state == _core.LEFT
    with pytest.raises(StreamEnd):
        session.reply(ticket)
    assert counts(service) == {"CANCELLED": 1}
