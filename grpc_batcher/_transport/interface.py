"""The interface between transports, which move bytes, and the two ends of a stream.

There are two implementations: `public` uses nothing but grpcio's public API and works with every grpcio; `direct`
speaks to the layer below it and saves most of the thread switches.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol

import grpc

from .._contract import RECONNECT_KEY, TAKEN_IN_KEY
from .._core import Ticket

# A status travels in a header, and gRPC peers refuse headers over 8 KiB. Percent-encoding triples some bytes.
_MAX_DETAILS_BYTES = 2000


class StreamEnd(Exception):
    """Ends a stream with this status instead of a reply.

    taken_in: how many of the stream's requests the batcher took in. The caller is told.
    reconnect: whether the caller should connect again.
    """

    def __init__(self, code: grpc.StatusCode, details: str, taken_in: int = 0, *, reconnect: bool = False) -> None:
        super().__init__(code, details)
        self.code = code
        self.details = details.encode(errors="replace")[:_MAX_DETAILS_BYTES].decode(errors="ignore")
        self._metadata = [(TAKEN_IN_KEY, str(taken_in))]
        if reconnect:
            self._metadata.append((RECONNECT_KEY, "1"))

    def set_on(self, context: grpc.ServicerContext) -> None:
        """Have grpcio send this status when the stream ends."""
        context.set_trailing_metadata(tuple(self._metadata))
        context.set_code(self.code)
        context.set_details(self.details)


class ServerStream(Protocol):
    """A transport's server end of a stream on which no thread waits. Every method may be called from any thread."""

    def send(self, reply: bytes) -> None:
        """Send a reply, then receive the next request. Never raises."""

    def end(self, end: StreamEnd | None) -> None:
        """Send the stream's status, OK if None. Only the first call has an effect."""


class ServerSession(Protocol):
    """What a transport calls on the server's side of a stream."""

    stream: ServerStream | None

    def accept(self, message: bytes) -> Ticket:
        """Let a request in; its reply will go to `stream`. Raises StreamEnd."""

    def exchange(self, message: bytes) -> bytes:
        """Let a request in, wait for its answer and return the reply. Raises StreamEnd."""

    def replied(self) -> None:
        """The reply that `exchange` returned has been sent. Raises StreamEnd if the stream takes no further request."""

    def close(self) -> None:
        """The stream is over. May be called again, at any moment and from any thread."""


class ClientStream(Protocol):
    """A transport's client end of a stream, for one request at a time.

    Only one thread at a time may use it, except for `cancel`.
    """

    def exchange(self, message: bytes) -> bytes | None:
        """Send a request and return its reply, or None if the server ended the stream with OK instead.

        Raises grpc.RpcError, with code(), details() and trailing_metadata().
        """

    def is_alive(self) -> bool:
        """Whether the stream can take another request, as far as this end knows."""

    def trailing_metadata(self) -> Any:
        """The metadata that the server ended the stream with. Call this once `is_alive` says that it has ended."""

    def cancel(self) -> None:
        """End the stream at once. May be called from any thread, and again."""

    def close(self) -> None:
        """Cancel the stream and release what it holds."""


# What is called when a request on a pooled stream has ended: with its reply; with None and the error (as `exchange`
# raises it); or with None and None if the server ended the stream with OK instead.
OnEnd = Callable[[bytes | None, Any], None]


class PooledClientStream(Protocol):
    """A transport's client end of a stream whose replies come on a thread of the transport, for one request at a time.

    It is opened with `on_over`, which is called once, when the stream has ended and holds nothing any more.
    """

    def start(self, message: bytes, on_end: OnEnd) -> None:
        """Send a request. `on_end` is called once, on a thread of the transport, or at once if the stream has ended.

        Only one thread at a time may call this.
        """

    def is_alive(self) -> bool:
        """Whether the stream can take another request, as far as this end knows."""

    def trailing_metadata(self) -> Any:
        """The metadata that the server ended the stream with. Call this once `is_alive` says that it has ended."""

    def cancel(self) -> None:
        """End the stream at once. May be called from any thread, and again."""

    def close(self) -> None:
        """Cancel the stream. It is over a moment later."""


Metadata = tuple[tuple[str, Any], ...]
