"""The server's side of a stream: a message becomes a ticket, and a ticket's outcome a reply or a gRPC status.

The session encodes; the transport sends.
"""

from __future__ import annotations

import logging
import re
import threading
import time
from typing import TYPE_CHECKING, Any

import grpc

from .. import _core
from .._contract import CONNECTION_AGE_KEY, MAX_DURATION_S
from .._models import BadRequestError
from .._transport.interface import ServerStream, StreamEnd
from .callback import Failed

if TYPE_CHECKING:
    from .service import Service

_logger = logging.getLogger("grpc_batcher")

SHUTTING_DOWN = "the batcher is shutting down"
_TOO_OLD = "the connection is older than max_connection_age_s; connect again"
_NEVER_NS = 2**62
_AGE = re.compile(r"[0-9]{1,12}")
_ENDS = {
    _core.LEFT: (grpc.StatusCode.CANCELLED, "the caller left"),
    _core.EXPIRED: (grpc.StatusCode.DEADLINE_EXCEEDED, "the caller's deadline passed before there was an answer"),
    _core.CLOSED: (grpc.StatusCode.UNAVAILABLE, f"{SHUTTING_DOWN}, and its grace period ended before the answer came"),
}


class Session:
    """One caller's stream, which carries one request at a time.

    The direct transport calls `accept` for each message, and is given the reply through `stream`. The public transport
    calls `exchange` and then `replied`. A transport that finds the stream ended calls `close`, at any moment and from
    any thread.

    stream: where replies go; None on the public transport, whose thread waits for the answer, and on a closed session.
    has_unsent_reply: whether a reply or a status is still to be sent.
    """

    def __init__(
        self,
        service: Service,
        context: grpc.ServicerContext,
        source: _core.Stream | None = None,
        *,
        pooled: bool = False,
    ) -> None:
        self.stream: ServerStream | None = None
        self.has_unsent_reply = False
        self._service = service
        self._source = service.room.open_stream(self, pooled=pooled) if source is None else source
        self._deadline_ns = _deadline_ns(context.time_remaining())
        self._too_old_ns = _too_old_ns(context, service.max_connection_age_s)
        # Makes "pushed" and "counted as taken in" one step, so that a shutdown on another thread sees both or neither.
        self._lock = threading.Lock()
        # These five are guarded by it.
        self._is_closed = False
        self._is_retired = False  # whether its status is about to be sent because its connection is too old
        self._is_released = False
        self._taken_in = 0  # requests that were pushed
        self._is_unanswered = False  # whether the last of them is still to be counted in the metrics

    def accept(self, message: bytes) -> _core.Ticket:
        """Let a request in. Raises StreamEnd if it is refused."""
        self.has_unsent_reply = True
        try:
            request, rows = self.read_request(message)
            with self._lock:
                if self._is_retired:  # the caller sends it again, on another stream
                    raise self._retirement()
                if not self._is_closed:
                    ticket = self._source.push(request, self._deadline_ns, len(message), rows)
                    self._taken_in += 1
                    self._is_unanswered = True
                    return ticket
        except BadRequestError as error:
            raise self.failed(grpc.StatusCode.INVALID_ARGUMENT, str(error)) from None
        except _core.QueueFullError as error:
            limit = "max_queue_bytes" if isinstance(error, _core.QueueBytesFullError) else "max_queue_size"
            raise self.failed(grpc.StatusCode.RESOURCE_EXHAUSTED, f"{error} ({limit})") from None
        except _core.RoomClosedError:
            raise self.failed(grpc.StatusCode.UNAVAILABLE, SHUTTING_DOWN) from None
        raise self.failed(*_ENDS[_core.LEFT])

    def exchange(self, message: bytes) -> bytes:
        """Let a request in, wait for its answer and return the reply. Raises StreamEnd."""
        return self.answer(self.accept(message))

    def read_request(self, message: bytes) -> tuple[Any, int]:
        """Return the request in a message, and how many rows it has. Raises BadRequestError or StreamEnd."""
        return self._service.callback.read_request(message)

    def write_reply(self, outcome: Any) -> bytes:
        """Return the message for a request's outcome. Raises OverflowError or StreamEnd."""
        return self._service.callback.encode(outcome)

    def answer(self, ticket: _core.Ticket) -> bytes:
        """Wait for the answer to a request that was let in, and return the reply. Raises StreamEnd."""
        ticket.wait()
        return self._encode(ticket)

    def deliver(self, ticket: _core.Ticket) -> None:
        """Send the reply to a ticket that has ended, unless the transport's thread waits for it. Never raises."""
        stream = self.stream
        if stream is None:
            return
        try:
            reply = self._encode(ticket)
        except StreamEnd as end:
            stream.end(end)
        except Exception as error:
            stream.end(self._end(grpc.StatusCode.INTERNAL, f"the server failed: {type(error).__name__}: {error}"))
            _logger.exception("a reply could not be encoded")
        else:
            # Before it goes out: the caller's next request may come in on its heels.
            retirement = self._retire_if_old()
            self._note_reply()
            stream.send(reply)
            if retirement is not None:
                stream.end(retirement)

    def replied(self) -> None:
        """The reply is on its way; the stream is between two requests. Raises StreamEnd if the connection is old."""
        self._note_reply()
        if (retirement := self._retire_if_old()) is not None:
            raise retirement

    def _note_reply(self) -> None:
        self.has_unsent_reply = False
        self._service.session_changed()

    def _retire_if_old(self) -> StreamEnd | None:
        """Take in no more requests if the connection is too old, and return the status to end the stream with.

        Between two requests this fails none: the status tells the caller that the next one was not taken in.
        """
        if time.monotonic_ns() < self._too_old_ns:
            return None
        with self._lock:
            self._is_retired = True
            return self._retirement()

    def _retirement(self) -> StreamEnd:
        return StreamEnd(grpc.StatusCode.UNAVAILABLE, _TOO_OLD, self._taken_in, reconnect=True)

    def shut_down(self) -> None:
        """End the stream: the batcher accepts nothing more, and has given up on requests without an outcome.

        Does nothing on the public transport, where gRPC ends the stream when the server stops.
        """
        stream = self.stream
        if stream is None:
            return
        self.has_unsent_reply = True  # until the status is out, which queues behind a reply still on its way
        if self._count_once():
            stream.end(self.failed(*_ENDS[_core.CLOSED]))
        else:
            stream.end(self._end(grpc.StatusCode.UNAVAILABLE, SHUTTING_DOWN))

    def close(self) -> None:
        """The stream is over; drop its request if one waits. May be called again."""
        with self._lock:
            self._is_closed = True
            is_released = self._is_released
        if not is_released:
            self._source.close()
        self.stream = None  # it refers back to this session
        self.has_unsent_reply = False
        self._service.session_closed(self)
        if self._count_once():
            late = self._deadline_ns is not None and time.monotonic_ns() >= self._deadline_ns
            code, _details = _ENDS[_core.EXPIRED if late else _core.LEFT]
            self._service.recorder.request_failed(code.name)

    def release(self) -> _core.Stream | None:
        """Return the source, which outlives the session from now on; None if the session is closed already."""
        with self._lock:
            if self._is_closed:
                return None
            self._is_released = True
        return self._source

    def _encode(self, ticket: _core.Ticket) -> bytes:
        """Return the message that answers a ticket that has ended. Raises StreamEnd."""
        if not self._count_once():  # the stream was closed meanwhile
            raise self._end(*_ENDS[_core.LEFT])
        state = ticket.state
        if state != _core.FINISHED:
            raise self.failed(*_ENDS[state])
        outcome = ticket.outcome
        if isinstance(outcome, Failed):
            raise self.failed(grpc.StatusCode.INTERNAL, outcome.text)
        recorder = self._service.recorder
        begin_ns = time.monotonic_ns() if recorder.timed else 0
        try:
            reply = self.write_reply(outcome)
        except OverflowError as error:
            raise self.failed(grpc.StatusCode.INTERNAL, f"the answer cannot be sent: {error}") from None
        end_ns = time.monotonic_ns() if recorder.timed else 0
        recorder.request_answered(end_ns - begin_ns, end_ns - ticket.pushed_ns)
        return reply

    def _count_once(self) -> bool:
        """Whether the request that was taken in is still to be counted. A reply and the caller's leaving may race."""
        with self._lock:
            is_unanswered, self._is_unanswered = self._is_unanswered, False
        return is_unanswered

    def failed(self, code: grpc.StatusCode, details: str) -> StreamEnd:
        """Count a failed request, and return its status."""
        self._service.recorder.request_failed(code.name)
        return self._end(code, details)

    def _end(self, code: grpc.StatusCode, details: str) -> StreamEnd:
        with self._lock:
            taken_in = self._taken_in
        return StreamEnd(code, details, taken_in)


def _too_old_ns(context: grpc.ServicerContext, max_age_s: float | None) -> int:
    """Return the monotonic time at which a stream's connection is too old.

    Other people's clients do not say how old theirs is, and would not understand what ends their stream.
    """
    if max_age_s is not None:
        age = dict(context.invocation_metadata()).get(CONNECTION_AGE_KEY, "")
        if isinstance(age, str) and _AGE.fullmatch(age):
            return time.monotonic_ns() + int(max_age_s * 1e9) - int(age) * 1_000_000
    return _NEVER_NS


def _deadline_ns(remaining_s: float | None) -> int | None:
    """Return a call's deadline on the monotonic clock; for a call without one grpcio says None, or many years."""
    if remaining_s is None or remaining_s > MAX_DURATION_S:
        return None
    return time.monotonic_ns() + int(remaining_s * 1e9)
