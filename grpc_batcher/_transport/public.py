"""The gear that uses nothing but grpcio's public API. It works with every grpcio."""

from __future__ import annotations

import queue
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import grpc

from .._server.session import Session, StreamEnd, set_status


def stream_handler(open_session: Callable[[grpc.ServicerContext], Session]) -> grpc.RpcMethodHandler:
    """Return a handler that serves each stream on a thread of its own, which waits while its request does."""
    return grpc.stream_stream_rpc_method_handler(partial(serve, open_session))


def serve(
    open_session: Callable[[grpc.ServicerContext], Session], messages: Iterator[bytes], context: grpc.ServicerContext
) -> Iterator[bytes]:
    """Yield the replies to a stream's messages."""
    try:
        session = open_session(context)
    except StreamEnd as end:
        set_status(context, end)
        return
    try:
        if not context.add_callback(session.close):
            return
        for message in messages:
            yield _reply_to(session, message)
            del message  # an idle stream keeps nothing alive
            session.replied()
    except StreamEnd as end:
        set_status(context, end)
    finally:
        session.close()


def _reply_to(session: Session, message: bytes) -> bytes:
    ticket = session.accept(message)
    ticket.wait()
    return session.reply(ticket)


class ClientStream:
    """One open stream to a server, for one request at a time."""

    def __init__(self, channel: grpc.Channel, method: str, metadata: Sequence[tuple[str, Any]]) -> None:
        self._outbox: queue.SimpleQueue[bytes | None] = queue.SimpleQueue()
        self._call = channel.stream_stream(method)(iter(self._outbox.get, None), metadata=metadata)

    def exchange(self, message: bytes) -> bytes | None:
        """Send a request and return its reply; None if the server ended the stream well and without one.

        Raises grpc.RpcError, which is also a grpc.Call.
        """
        self._outbox.put(message)
        return next(self._call, None)

    def is_alive(self) -> bool:
        return bool(self._call.is_active())

    def cancel(self) -> None:
        """End the stream at once. May be called from any thread, and again."""
        self._call.cancel()

    def close(self) -> None:
        """Cancel the stream, and let go of the thread on which grpcio waits for its next message."""
        self._call.cancel()
        self._outbox.put(None)
