"""The server's side of a stream: a message becomes a ticket, and a ticket's outcome a reply or a gRPC status.

How the bytes move between gRPC and a Session is the gear's business (see `_gears`).
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from typing import Protocol

import grpc

from .. import _core
from .._server.metrics import Recorder
from .._models import Answer, BadRequestError, Model, write_answer

SERVICE_NAME = "mukoe_batcher.MukoeService"
METHOD = f"/{SERVICE_NAME}/ProcessRequest"

# Sent with the status of a stream that the server ends: how many of its requests the batcher took in. The caller can
# tell by it that its last request was not among them, and may be sent again.
TAKEN_IN_KEY = "grpc-batcher-taken-in"

# A status travels in a header, and gRPC peers refuse headers over 8 KiB; percent-encoding makes three bytes of one.
_MAX_DETAILS_BYTES = 2000

_SHUTTING_DOWN = "the batcher is shutting down"
_ENDS = {
    _core.LEFT: (grpc.StatusCode.CANCELLED, "the caller left"),
    _core.EXPIRED: (grpc.StatusCode.DEADLINE_EXCEEDED, "the caller's deadline passed before there was an answer"),
    _core.CLOSED: (grpc.StatusCode.UNAVAILABLE, f"{_SHUTTING_DOWN}, and its grace was over before there was an answer"),
}


class StreamEnd(Exception):
    """A stream ends with this status instead of a reply."""

    def __init__(self, code: grpc.StatusCode, details: str, taken_in: int = 0) -> None:
        super().__init__(code, details)
        self.code = code
        self.details = details.encode(errors="replace")[:_MAX_DETAILS_BYTES].decode(errors="ignore")
        self.trailing_metadata = ((TAKEN_IN_KEY, str(taken_in)),)


def set_status(context: grpc.ServicerContext, end: StreamEnd) -> None:
    """Have grpcio end the stream so, once it ends."""
    context.set_trailing_metadata(end.trailing_metadata)
    context.set_code(end.code)
    context.set_details(end.details)


class Transport(Protocol):
    """A gear's end of a stream that no thread waits for."""

    def send_reply(self, ticket: _core.Ticket) -> None:
        """The ticket has ended."""

    def end(self, end: StreamEnd) -> None:
        """The batcher takes no more requests."""


class Session:
    """One caller's stream. A gear calls `accept` for a message, then `reply` for its ended ticket, then `replied`.

    A gear that finds the stream ended calls `close`, at any moment and from any thread.

    transport: whom to tell; None in a gear whose thread waits for the ticket, and that leaves it to gRPC to end the
        stream when the server stops.
    busy: something is to be sent yet.
    """

    transport: Transport | None = None

    def __init__(self, service: Service, context: grpc.ServicerContext) -> None:
        self._service = service
        self._stream = service.room.open_stream(self)
        self._taken_in = 0
        self._uncounted: list[None] = []  # one for the request that was taken in and has no reply yet
        self.busy = False
        self._deadline_ns = _deadline_ns(context.time_remaining())

    def accept(self, message: bytes) -> _core.Ticket:
        """Let a request in. Raises StreamEnd."""
        self.busy = True
        # Before the push: its reply may be due, in another thread, before it returns.
        self._taken_in += 1
        self._uncounted.append(None)
        try:
            return self._stream.push(self._service.model.read_request(message), self._deadline_ns)
        except BadRequestError as error:
            raise self._refuse(grpc.StatusCode.INVALID_ARGUMENT, str(error)) from None
        except _core.QueueFullError as error:
            raise self._refuse(grpc.StatusCode.RESOURCE_EXHAUSTED, f"{error} (max_queue_size)") from None
        except _core.RoomClosedError:
            raise self._refuse(grpc.StatusCode.UNAVAILABLE, _SHUTTING_DOWN) from None

    def reply(self, ticket: _core.Ticket) -> bytes:
        """Return the message that answers a ticket that has ended. Raises StreamEnd."""
        if not self._count_once():
            raise StreamEnd(*_ENDS[_core.LEFT], self._taken_in)
        state = ticket.state
        if state != _core.FINISHED:
            raise self._end(*_ENDS[state])
        outcome = ticket.outcome
        if not isinstance(outcome, Answer):
            raise self._end(grpc.StatusCode.INTERNAL, outcome.text)
        recorder = self._service.recorder
        begin_ns = time.monotonic_ns() if recorder.timed else 0
        try:
            reply = write_answer(outcome)
        except OverflowError as error:
            raise self._end(grpc.StatusCode.INTERNAL, f"the answer can not be sent: {error}") from None
        end_ns = time.monotonic_ns() if recorder.timed else 0
        recorder.request_answered(end_ns - begin_ns, end_ns - ticket.pushed_ns)
        return reply

    def replied(self) -> None:
        """The reply is on its way; the stream is between two requests."""
        self.busy = False
        self._service.session_changed()

    def shut_down(self) -> None:
        """The batcher takes no more requests, and has given up on those without an outcome."""
        transport = self.transport
        if transport is None:
            return
        self.busy = True  # until the status is out; it goes behind a reply that is still on its way
        if self._count_once():
            transport.end(self._end(*_ENDS[_core.CLOSED]))
        else:
            transport.end(StreamEnd(grpc.StatusCode.UNAVAILABLE, _SHUTTING_DOWN, self._taken_in))

    def close(self) -> None:
        """The stream is over; a request of it that waits is dropped. May be called again."""
        self._stream.close()
        self.transport = None  # it refers back to this session
        self.busy = False
        self._service.session_closed(self)
        if self._count_once():
            late = self._deadline_ns is not None and time.monotonic_ns() >= self._deadline_ns
            code, _details = _ENDS[_core.EXPIRED if late else _core.LEFT]
            self._service.recorder.request_failed(code.name)

    def _count_once(self) -> bool:
        """Whether the request that was taken in is still to be counted. A reply and the caller's leaving may race."""
        try:
            self._uncounted.pop()
        except IndexError:
            return False
        return True

    def _refuse(self, code: grpc.StatusCode, details: str) -> StreamEnd:
        self._taken_in -= 1
        self._count_once()
        return self._end(code, details)

    def _end(self, code: grpc.StatusCode, details: str) -> StreamEnd:
        self._service.recorder.request_failed(code.name)
        return StreamEnd(code, details, self._taken_in)


class Service(grpc.GenericRpcHandler):  # type: ignore[misc]
    """Answers the one method of the contract, with a Session a stream."""

    def __init__(
        self,
        room: _core.WaitingRoom,
        model: Model,
        recorder: Recorder,
        max_streams: int,
        stream_handler: Callable[[Callable[[grpc.ServicerContext], Session]], grpc.RpcMethodHandler],
    ) -> None:
        self.room = room
        self.model = model
        self.recorder = recorder
        self._max_streams = max_streams
        self._stream_handler = stream_handler
        self._sessions: set[Session] = set()
        self._closing = False
        self._changed = threading.Condition()

    def service(self, handler_call_details: grpc.HandlerCallDetails) -> grpc.RpcMethodHandler | None:
        if handler_call_details.method != METHOD:
            return None
        return self._stream_handler(self.open_session)

    def open_session(self, context: grpc.ServicerContext) -> Session:
        """Raises StreamEnd if there are too many, or the batcher shuts down."""
        if self.room.closed:
            raise StreamEnd(grpc.StatusCode.UNAVAILABLE, _SHUTTING_DOWN)
        with self._changed:
            if len(self._sessions) >= self._max_streams:
                raise StreamEnd(
                    grpc.StatusCode.RESOURCE_EXHAUSTED,
                    f"{self._max_streams} streams are open, and no more may be (max_streams)",
                )
            session = Session(self, context)
            self._sessions.add(session)
            return session

    def session_closed(self, session: Session) -> None:
        with self._changed:
            self._sessions.discard(session)
        self.session_changed()

    def session_changed(self) -> None:
        if self._closing:
            with self._changed:
                self._changed.notify_all()

    def end_streams(self) -> None:
        """Tell every session that it is over. To be called once the room is closed and abandoned."""
        with self._changed:
            sessions = tuple(self._sessions)
        for session in sessions:
            session.shut_down()

    def wait_until_replied(self, timeout_s: float) -> bool:
        """Wait until no stream has a request that is not replied to. To be called once the room is closed."""
        return self._wait_for(lambda: not any(session.busy for session in self._sessions), timeout_s)

    def wait_until_closed(self, timeout_s: float) -> bool:
        """Wait until there is no stream left. To be called after `end_streams`."""
        return self._wait_for(lambda: not self._sessions, timeout_s)

    def _wait_for(self, holds: Callable[[], bool], timeout_s: float) -> bool:
        with self._changed:
            self._closing = True
            return self._changed.wait_for(holds, timeout_s)


def _deadline_ns(remaining_s: float | None) -> int | None:
    """A call's deadline on the monotonic clock. What grpcio says of a call without one is years away, or None."""
    if remaining_s is None or remaining_s > 1e9:
        return None
    return time.monotonic_ns() + int(remaining_s * 1e9)
