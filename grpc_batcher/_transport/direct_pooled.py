"""The client end of the direct transport for many requests in flight: one completion queue and one thread per channel.

grpcio runs the thread, as it does for its own calls. A request is one batch of operations (send, receive); the thread
calls this module with its event.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable
from contextlib import suppress
from itertools import starmap
from typing import Any

import grpc

from .direct_client import CallEnd
from .grpcio_private import (
    ReceivedStatus,
    cancel,
    is_mismatch,
    message_of,
    open_pooled_call,
    opening,
    send_and_receive,
    status_of,
)
from .interface import Metadata, OnEnd

_logger = logging.getLogger("grpc_batcher")


class DirectPooledStream:
    """A PooledClientStream on a plain channel of grpcio's.

    on_mismatch: called with the error if grpcio turns out to differ from what this transport needs. The request then
        ends with UNAVAILABLE.
    """

    def __init__(
        self,
        channel: grpc.Channel,
        method: str,
        metadata: Metadata,
        on_over: Callable[[], None],
        on_mismatch: Callable[[Exception], None],
    ) -> None:
        self._on_over = on_over
        self._on_mismatch = on_mismatch
        batches = opening(metadata)
        self._lock = threading.Lock()
        # All of these are guarded by it. `_exchanging` has a True while gRPC owes the event of an exchange.
        self._exchanging: list[Any] = []
        self._unopened = len(batches)
        self._status: ReceivedStatus | None = None
        self._on_end: OnEnd | None = None
        self._call = open_pooled_call(channel, method, batches, self._on_opened)

    def start(self, message: bytes, on_end: OnEnd) -> None:
        """Send a request. `on_end` is called once, on the channel's thread, or at once if the stream has ended."""
        self._on_end = on_end
        try:
            operations = send_and_receive(message)
            with self._lock:
                # A signal handler may raise between any two bytecodes of the main thread, and none runs in between.
                self._exchanging[:] = starmap(self._call.operate, ((operations, self._on_exchanged),))
                status = None if self._is_exchanging() else self._status
            if status is not None:
                self._report_end(status)
        except (AttributeError, TypeError) as error:
            if not is_mismatch(error):
                raise
            self._on_mismatch(error)
            self._report(None, CallEnd.by_mismatch(error))

    def is_alive(self) -> bool:
        """Whether the stream can take another request, as far as this end knows."""
        return self._status is None

    def trailing_metadata(self) -> Any:
        """The metadata that the server ended the stream with. Call this once `is_alive` says that it has ended."""
        return None if self._status is None else self._status.trailing_metadata

    def cancel(self) -> None:
        """End the stream at once. May be called from any thread, and again."""
        cancel(self._call)

    def close(self) -> None:
        """Cancel the stream. It is over a moment later."""
        self.cancel()

    # ---- on the channel's thread, which would not survive an exception ----

    def _on_opened(self, event: Any) -> bool:
        """One of the batches of operations that opened the stream is done."""
        status = None
        try:
            status = status_of(event)
        except Exception as error:
            self._fail(error)
        with self._lock:
            self._unopened -= 1
            if status is not None:
                self._status = status
            is_over, is_exchanging = self._is_over(), self._is_exchanging()
        if status is not None and not is_exchanging:
            self._report_end(status)
        return self._finish(is_over)

    def _on_exchanged(self, event: Any) -> bool:
        """A request has its reply, or will have none."""
        with self._lock:
            self._exchanging.clear()
            is_over = self._unopened == 0
        try:
            reply = message_of(event)
        except Exception as error:
            self._fail(error)
        else:
            if reply is not None:
                self._report(reply, None)
            elif self._status is not None:
                self._report_end(self._status)
            # Otherwise the status is still to come, and is reported then.
        return self._finish(is_over)

    def _is_exchanging(self) -> bool:
        return True in self._exchanging

    def _is_over(self) -> bool:
        """Whether all events have come. gRPC takes no more operations then."""
        return self._unopened == 0 and not self._is_exchanging()

    def _report(self, reply: bytes | None, error: CallEnd | None) -> None:
        with self._lock:
            on_end, self._on_end = self._on_end, None
        if on_end is not None:
            on_end(reply, error)

    def _report_end(self, status: ReceivedStatus) -> None:
        end = CallEnd.of(status)
        self._report(None, None if end.code() is grpc.StatusCode.OK else end)

    def _fail(self, error: Exception) -> None:
        with suppress(BaseException):  # a log handler may raise
            if isinstance(error, (AttributeError, TypeError)) and is_mismatch(error):
                self._on_mismatch(error)
            else:
                _logger.error("a stream failed", exc_info=error)
        self._report(None, CallEnd.by_mismatch(error))

    def _finish(self, is_over: bool) -> bool:
        if is_over:
            try:
                self._on_over()
            except Exception:
                with suppress(BaseException):
                    _logger.exception("a stream did not close cleanly")
        return is_over
