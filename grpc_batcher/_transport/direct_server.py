"""The server end of the direct transport.

The handler returns at once, so no thread is parked for an open stream. Each message that arrives runs
`DirectServerStream._on_event` on gRPC's polling thread. The reply goes out together with the next receive, as one batch
of operations and one event (gRPC keeps the reply until the next request arrives). The server, and with it TLS,
deadlines and shutdown, remain grpcio's.

A stream whose handler an interceptor wrapped is served by the public transport, so that the interceptor sees its
messages. (An interceptor that only replaces the handler's serializers is bypassed: messages are bytes here.)
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from functools import partial
from typing import Any

import grpc

from . import public
from .grpcio_private import UNFINISHED, ServerCall, message_of, receive, send_and_receive
from .interface import ServerSession, StreamEnd

_logger = logging.getLogger("grpc_batcher")


def stream_handler(
    open_session: Callable[[grpc.ServicerContext], ServerSession], on_mismatch: Callable[[Exception], None]
) -> grpc.RpcMethodHandler:
    """Return a handler that serves each stream on gRPC's polling thread and on those that deliver replies.

    on_mismatch: called with the error if grpcio turns out to differ from what this transport needs. The stream then
        ends with an error.
    """
    return grpc.stream_stream_rpc_method_handler(_Behaviour(open_session, on_mismatch))


class _Behaviour:
    """What grpcio calls for each stream.

    A class with slots, so that functools.wraps does not copy `experimental_non_blocking` to an interceptor's function.
    """

    __slots__ = ("_on_mismatch", "_open_session")

    experimental_non_blocking = True

    def __init__(
        self, open_session: Callable[[grpc.ServicerContext], ServerSession], on_mismatch: Callable[[Exception], None]
    ) -> None:
        self._open_session = open_session
        self._on_mismatch = on_mismatch

    def __call__(
        self,
        messages: Iterator[bytes],
        context: grpc.ServicerContext,
        send_response: Callable[[None], None] | None = None,
    ) -> Iterator[bytes] | None:
        if send_response is None:  # an interceptor wrapped this object
            return public.serve(self._open_session, messages, context)
        try:
            session = self._open_session(context)
            try:
                stream = DirectServerStream(session, context, partial(send_response, None), self._on_mismatch)
            except AttributeError as error:
                session.close()
                self._on_mismatch(error)
                raise StreamEnd(grpc.StatusCode.UNAVAILABLE, f"grpcio is not as expected: {error}") from None
        except StreamEnd as end:
            end.set_on(context)
            send_response(None)
        else:
            stream.begin()
        return None


class DirectServerStream:
    """A ServerStream, driven by the events of its own operations.

    end_call: makes grpcio send the status that was set on the context.
    """

    def __init__(
        self,
        session: ServerSession,
        context: grpc.ServicerContext,
        end_call: Callable[[], None],
        on_mismatch: Callable[[Exception], None],
    ) -> None:
        self._on_mismatch = on_mismatch
        self._session = session
        self._context = context
        self._end_call = end_call
        self._call = ServerCall(context)
        self._has_ended = False
        session.stream = self

    def begin(self) -> None:
        """Receive the first request."""
        if not self._context.add_callback(self._close):
            self._close()
            return
        try:
            self._start(receive())
        except Exception as error:
            self._fail(error)

    def send(self, reply: bytes) -> None:
        """Send a reply, then receive the next request. Never raises."""
        try:
            self._start(send_and_receive(reply))
        except Exception as error:
            self._fail(error)

    def end(self, end: StreamEnd | None) -> None:
        """Send the stream's status, OK if None. Only the first call has an effect."""
        with self._call.condition:
            if self._has_ended:
                return
            self._has_ended = True
            if end is not None:
                end.set_on(self._context)
        self._end_call()

    def _close(self) -> None:
        """The call is over: the caller cancelled it or is gone, or it has its status."""
        self._session.close()
        self.end(None)

    def _start(self, operations: Sequence[Any]) -> None:
        try:
            self._call.start(operations, self._on_event)
        except (AttributeError, TypeError) as error:
            self._on_mismatch(error)
            raise

    def _on_event(self, event: Any) -> tuple[Any, Any]:
        """The operations are done. Runs on the polling thread, which would not survive an exception."""
        finished = UNFINISHED
        try:
            try:
                finished = self._call.finish()
                message = message_of(event)
            except (AttributeError, TypeError) as error:
                self._on_mismatch(error)
                self._call.forget()
                raise
            if message is None:  # half-closed or broken; gRPC sends no status on a broken stream
                self.end(None)
            else:
                self._session.accept(message)
        except StreamEnd as end:
            with suppress(Exception):
                self.end(end)
        except Exception as error:
            with suppress(Exception):
                self._fail(error)
        return finished

    def _fail(self, error: Exception) -> None:
        self.end(StreamEnd(grpc.StatusCode.INTERNAL, f"the server failed: {type(error).__name__}: {error}"))
        _logger.error("a stream failed", exc_info=error)
