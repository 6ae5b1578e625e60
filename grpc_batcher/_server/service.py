"""The gRPC service: answers the one method of the contract, with a session for each stream."""

from __future__ import annotations

import threading
from collections.abc import Callable
from functools import partial
from typing import Protocol, TypeVar

import grpc

from .. import _core
from .._contract import METHOD, POOLED_KEY
from .._transport import choice
from .._transport.interface import StreamEnd
from .callback import Callback
from .metrics import Recorder
from .session import SHUTTING_DOWN, Session


class OpenStream(Protocol):
    """What a shutdown must know about a caller's stream. A Session is one."""

    @property
    def has_unsent_reply(self) -> bool:
        """Whether a reply or a status is still to be sent."""

    def shut_down(self) -> None:
        """End the stream: the batcher accepts nothing more, and has given up on requests without an outcome."""


_Stream = TypeVar("_Stream", bound=OpenStream)


class Service(grpc.GenericRpcHandler):  # type: ignore[misc]
    """Knows every open stream, and ends them all at shutdown.

    max_connection_age_s: a stream of an older connection ends with its next answer; None for no limit.
    """

    def __init__(
        self,
        room: _core.WaitingRoom,
        callback: Callback,
        recorder: Recorder,
        max_streams: int,
        max_connection_age_s: float | None = None,
    ) -> None:
        self.room = room
        self.callback = callback
        self.recorder = recorder
        self.max_connection_age_s = max_connection_age_s
        self._max_streams = max_streams
        self._sessions: set[OpenStream] = set()
        self._is_closing = False
        self._changed = threading.Condition()

    def service(self, handler_call_details: grpc.HandlerCallDetails) -> grpc.RpcMethodHandler | None:
        """Return the handler of a new stream; None for methods that are not ours."""
        if handler_call_details.method != METHOD:
            return None
        if any(key == POOLED_KEY for key, _value in handler_call_details.invocation_metadata):
            return choice.stream_handler(partial(self.open_session, make=partial(Session, pooled=True)))
        return choice.stream_handler(partial(self.open_session, make=Session))

    def open_session(
        self, context: grpc.ServicerContext, make: Callable[[Service, grpc.ServicerContext], _Stream]
    ) -> _Stream:
        """Open what `make` returns. Raises StreamEnd if too many streams are open, or the batcher is shutting down."""
        with self._changed:
            # Under the lock, so that `end_streams` ends what is opened here, or this sees the closed room.
            if self.room.closed:
                raise StreamEnd(grpc.StatusCode.UNAVAILABLE, SHUTTING_DOWN)
            if len(self._sessions) >= self._max_streams:
                raise StreamEnd(
                    grpc.StatusCode.RESOURCE_EXHAUSTED,
                    f"{self._max_streams} streams are open, which is the most allowed (max_streams)",
                )
            session = make(self, context)
            self._sessions.add(session)
            return session

    def session_closed(self, session: OpenStream) -> None:
        with self._changed:
            self._sessions.discard(session)
        self.session_changed()

    def session_changed(self) -> None:
        if self._is_closing:
            with self._changed:
                self._changed.notify_all()

    def end_streams(self) -> None:
        """End every stream. Call this once the room is closed and abandoned."""
        with self._changed:
            sessions = tuple(self._sessions)
        for session in sessions:
            session.shut_down()

    def wait_until_replied(self, timeout_s: float) -> bool:
        """Wait until every reply and status has been sent. Call this once the room is closed."""
        return self._wait_for(lambda: not any(session.has_unsent_reply for session in self._sessions), timeout_s)

    def wait_until_closed(self, timeout_s: float) -> bool:
        """Wait until no stream is left. Call this after `end_streams`."""
        return self._wait_for(lambda: not self._sessions, timeout_s)

    def _wait_for(self, holds: Callable[[], bool], timeout_s: float) -> bool:
        with self._changed:
            self._is_closing = True
            return self._changed.wait_for(holds, timeout_s)
