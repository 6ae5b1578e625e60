"""The public transport: nothing but grpcio's public API, so it works with every grpcio and behind every interceptor."""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import grpc

from .interface import Metadata, OnEnd, ServerSession, StreamEnd


def stream_handler(open_session: Callable[[grpc.ServicerContext], ServerSession]) -> grpc.RpcMethodHandler:
    """Return a handler that serves each stream on its own thread, which waits while the stream's request does."""
    return grpc.stream_stream_rpc_method_handler(partial(serve, open_session))


def serve(
    open_session: Callable[[grpc.ServicerContext], ServerSession],
    messages: Iterator[bytes],
    context: grpc.ServicerContext,
) -> Iterator[bytes]:
    """Yield the replies to a stream's messages."""
    try:
        session = open_session(context)
    except StreamEnd as end:
        end.set_on(context)
        return
    try:
        if not context.add_callback(session.close):
            return
        for message in messages:
            yield session.exchange(message)
            del message  # an idle stream keeps nothing alive
            session.replied()
    except StreamEnd as end:
        end.set_on(context)
    finally:
        session.close()


class PublicClientStream:
    """A ClientStream on any channel."""

    def __init__(self, channel: grpc.Channel, method: str, metadata: Metadata) -> None:
        self._outbox: queue.SimpleQueue[bytes | None] = queue.SimpleQueue()
        self._call = channel.stream_stream(method)(iter(self._outbox.get, None), metadata=metadata)

    def exchange(self, message: bytes) -> bytes | None:
        """Send a request and return its reply, or None if the server ended the stream with OK instead.

        Raises grpc.RpcError, which is also a grpc.Call.
        """
        self._outbox.put(message)
        return next(self._call, None)

    def is_alive(self) -> bool:
        """Whether the stream can take another request, as far as this end knows."""
        return bool(self._call.is_active())

    def trailing_metadata(self) -> Any:
        """The metadata that the server ended the stream with. Call this once `is_alive` says that it has ended."""
        return self._call.trailing_metadata()

    def cancel(self) -> None:
        """End the stream at once. May be called from any thread, and again."""
        self._call.cancel()

    def close(self) -> None:
        """Cancel the stream, and release the thread on which grpcio waits for its next message."""
        self._call.cancel()
        self._outbox.put(None)


class PublicPooledStream:
    """A PooledClientStream on any channel.

    grpcio has no public way to learn that a reply is there without waiting for it, so each stream has a thread that
    waits for its replies, beside grpcio's own that waits for its messages.
    """

    def __init__(self, channel: grpc.Channel, method: str, metadata: Metadata, on_over: Callable[[], None]) -> None:
        self._on_over = on_over
        self._lock = threading.Lock()
        # These are guarded by it.
        self._on_end: OnEnd | None = None
        self._is_ended = False
        self._error: grpc.RpcError | None = None
        self._outbox: queue.SimpleQueue[bytes | None] = queue.SimpleQueue()
        self._call = channel.stream_stream(method)(iter(self._outbox.get, None), metadata=metadata)
        try:
            threading.Thread(target=self._read, name="grpc_batcher-replies", daemon=True).start()
        except RuntimeError:
            self.close()
            raise

    def start(self, message: bytes, on_end: OnEnd) -> None:
        """Send a request. `on_end` is called once, on the stream's thread, or at once if the stream has ended."""
        with self._lock:
            is_ended = self._is_ended
            if not is_ended:
                self._on_end = on_end
                self._outbox.put(message)
        if is_ended:
            on_end(None, self._error)

    def is_alive(self) -> bool:
        """Whether the stream can take another request, as far as this end knows."""
        return not self._is_ended and bool(self._call.is_active())

    def trailing_metadata(self) -> Any:
        """The metadata that the server ended the stream with. Call this once `is_alive` says that it has ended."""
        return self._call.trailing_metadata()

    def cancel(self) -> None:
        """End the stream at once. May be called from any thread, and again."""
        self._call.cancel()

    def close(self) -> None:
        """Cancel the stream. It is over a moment later."""
        self._call.cancel()
        self._outbox.put(None)

    def _read(self) -> None:
        error = None
        try:
            for reply in self._call:
                self._report(reply, None)
        except grpc.RpcError as raised:
            error = raised
        with self._lock:
            self._is_ended = True
            self._error = error
        self._report(None, error)
        self._outbox.put(None)
        self._on_over()

    def _report(self, reply: bytes | None, error: grpc.RpcError | None) -> None:
        with self._lock:
            on_end, self._on_end = self._on_end, None
        if on_end is not None:
            on_end(reply, error)
