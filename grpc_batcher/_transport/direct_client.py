"""The client end of the direct transport.

A request is one batch of operations (send, receive) on a call with a completion queue of its own, and one wait. All of
it happens on the caller's thread.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from itertools import starmap
from operator import length_hint
from typing import Any

import grpc

from .grpcio_private import (
    ReceivedStatus,
    cancel,
    is_mismatch,
    message_of,
    open_call,
    opening,
    send_and_receive,
    status_of,
    tag_of,
)
from .interface import Metadata

_STATUS_CODES = {code.value[0]: code for code in grpc.StatusCode}

# The user tags of a call's events.
_STATUS = "status"
_OPENING = "opening"
_EXCHANGE = "exchange"
_PROBE = "probe"

# A stream used this recently is taken to be alive without asking gRPC.
_PROBE_AFTER_NS = 10_000_000


class CallEnd(grpc.RpcError):  # type: ignore[misc]
    """How a call ended: the part of grpc.Call that callers of `exchange` need."""

    def __init__(self, code: grpc.StatusCode, details: str, trailing_metadata: Any = ()) -> None:
        super().__init__(code, details)
        self._end = code, details, trailing_metadata

    @classmethod
    def of(cls, status: ReceivedStatus) -> CallEnd:
        """Return the end that a received status describes."""
        code = _STATUS_CODES.get(status.code, grpc.StatusCode.UNKNOWN)
        return cls(code, status.details, status.trailing_metadata)

    @classmethod
    def by_mismatch(cls, error: Exception) -> CallEnd:
        """Return the end of a request for which grpcio turned out to differ from what this transport needs."""
        return cls(grpc.StatusCode.UNAVAILABLE, f"grpcio is not as expected: {error}")

    def code(self) -> grpc.StatusCode:
        return self._end[0]

    def details(self) -> str:
        return self._end[1]

    def trailing_metadata(self) -> Any:
        return self._end[2]


class DirectClientStream:
    """A ClientStream on a plain channel of grpcio's.

    on_mismatch: called with the error if grpcio turns out to differ from what this transport needs. The request then
        ends with UNAVAILABLE.
    """

    def __init__(
        self, channel: grpc.Channel, method: str, metadata: Metadata, on_mismatch: Callable[[Exception], None]
    ) -> None:
        self._on_mismatch = on_mismatch
        self._status: ReceivedStatus | None = None
        self._used_ns = time.monotonic_ns()
        batches = tuple(zip(opening(metadata), (_STATUS, _OPENING, _OPENING), strict=True))
        # A True for each batch of operations whose event is outstanding. gRPC keeps the call until all events have
        # come. (Anything else in the list is done with: an event, or a False for a batch that gRPC did not take.)
        self._due: list[Any] = [True] * len(batches)
        self._call = open_call(channel, method, batches)

    def exchange(self, message: bytes) -> bytes | None:
        """Send a request and return its reply, or None if the server ended the stream with OK instead.

        Raises CallEnd.
        """
        try:
            if self._operate(send_and_receive(message), _EXCHANGE):
                reply = message_of(self._next_event(_EXCHANGE))
                if reply is not None:
                    self._used_ns = time.monotonic_ns()
                    return reply
            while self._status is None:
                self._next_event(_STATUS)
            end = CallEnd.of(self._status)
        except (AttributeError, TypeError) as error:
            if not is_mismatch(error):
                raise
            self._on_mismatch(error)
            end = CallEnd.by_mismatch(error)
        if end.code() is grpc.StatusCode.OK:
            return None
        raise end

    def is_alive(self) -> bool:
        """Whether the stream can take another request, as far as this end knows."""
        if self._status is None and time.monotonic_ns() - self._used_ns > _PROBE_AFTER_NS:
            # An empty batch completes at once; a status that arrived before it is found on the way.
            try:
                if self._operate((), _PROBE):
                    self._next_event(_PROBE)
            except (AttributeError, TypeError) as error:
                if not is_mismatch(error):
                    raise
                self._on_mismatch(error)
                return False
            self._used_ns = time.monotonic_ns()
        return self._status is None

    def trailing_metadata(self) -> Any:
        """The metadata that the server ended the stream with. Call this once `is_alive` says that it has ended."""
        return None if self._status is None else self._status.trailing_metadata

    def cancel(self) -> None:
        """End the stream at once. May be called from any thread, and again."""
        cancel(self._call)

    def close(self) -> None:
        """Cancel the stream, and wait for its outstanding events: until then gRPC keeps the call."""
        try:
            if self._outstanding():
                self.cancel()
            while self._outstanding():
                self._next_event(None)
        except (AttributeError, TypeError) as error:
            if not is_mismatch(error):
                raise
            self._on_mismatch(error)

    def _outstanding(self) -> int:
        return self._due.count(True)

    # A signal handler may raise between any two bytecodes of the main thread. Were that to happen after gRPC takes a
    # batch, or gives an event, and before it is recorded, one event too few would be waited for and the call leak, or
    # one too many and `close` wait forever. So list methods make the calls: no bytecode runs between call and record.

    def _operate(self, operations: Sequence[Any], tag: str) -> bool:
        if not self._outstanding():
            return False
        self._due.extend(starmap(self._call.operate, ((operations, tag),)))
        return self._due[-1] is True

    def _next_event(self, tag: str | None) -> Any:
        """Wait for the next event with this tag, or for any event if None."""
        while True:
            self._due[:] = [True] * self._outstanding()
            pending = iter(((),))
            try:
                self._due[:1] = starmap(self._call.next_event, pending)
            except BaseException:  # Ctrl-C in the main thread
                was_called, was_recorded = length_hint(pending) == 0, self._due[0] is not True
                # In between, grpcio has taken the call apart. Or the event had arrived and is lost: another takes its
                # place.
                if was_called and not was_recorded and not self._call.operate((), _PROBE):
                    self._due.clear()
                raise
            event = self._due[0]
            event_tag = tag_of(event)
            if event_tag == _STATUS:
                self._status = status_of(event)
            if tag is None or event_tag == tag:
                return event
