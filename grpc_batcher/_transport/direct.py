"""The gear that speaks to grpcio's own layer below its public API, and so saves most of the thread hand-overs.

On the server the handler returns at once and no thread is parked for the stream. Each message that arrives runs
`_ServerStream._on_event` in the thread that polls for gRPC; the reply goes out together with the next receive, as one
batch of operations and one event (for which gRPC keeps the reply until the next request is in). The server, and with it
TLS, deadlines and shutdown, stay grpcio's; a stream whose handler an interceptor wrapped is served by the public gear,
so that the interceptor sees its messages. (One that only gives the handler serializers of its own is passed by:
messages are bytes here.)
On the client a request is one batch (send, receive) on a call with a completion queue of its own, and one wait.

It leans on these names, which are alike in grpcio 1.49.1, 1.62.3, 1.71.2 and 1.85.1. Each is what grpcio's own
streams are made of, so that it can hardly change alone:

server, grpc._server
    _Context._rpc_event.call.start_server_batch(operations, tag): how every handler's receive and reply are started. The
        polling thread calls the tag with the event, and takes (state, callbacks) from it.
    _Context._state (_RPCState): its `condition` guards it, `due` holds what is outstanding, and a call is over once it
        is empty; `initial_metadata_allowed` says whether a reply must bring the initial metadata along.
    _is_rpc_state_active, _possibly_finish_call, _get_initial_metadata_operation: what grpcio's tags and sends call.
        Our operations are in `due` through them like its own, so that the server's stop waits for ours, too.
    a behavior's `experimental_non_blocking`: has _stream_response_in_pool call it with a function that ends the call,
        on a thread that is free again when it returns.
client, grpc._cython.cygrpc
    channel._channel: the cygrpc.Channel beneath a grpc.Channel.
    Channel.segregated_call: how grpcio's blocking calls are made; a SegregatedCall has `operate`, `next_event` and
        `cancel`. The call lives as long as an operation is outstanding: its status, from the first to the last.
    PropagationConstants.GRPC_PROPAGATE_DEFAULTS, StatusCode.ok and .cancelled: constants of gRPC's C API.
operations, grpc._cython.cygrpc
    Send- and ReceiveInitialMetadataOperation, Send- and ReceiveMessageOperation, ReceiveStatusOnClientOperation.

Where one is missing the public gear serves; where one behaves otherwise it takes over from then on.
"""

from __future__ import annotations

import logging
import operator
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from functools import partial
from typing import Any

import grpc

from .._transport import public as _public
from .._core import Ticket
from .._server.session import Session, StreamEnd, set_status

_logger = logging.getLogger("grpc_batcher")

_NO_FLAGS = 0

# grpcio knows its outstanding operations by such a token; a stream has no more than one of ours.
_TOKEN = "grpc_batcher"

# What a tag returns for a call that is not over: nothing to forget, and nobody to tell.
_UNFINISHED: tuple[Any, Any] = (None, ())

try:
    from grpc._cython import cygrpc
    from grpc._server import (
        _Context,
        _get_initial_metadata_operation,
        _is_rpc_state_active,
        _possibly_finish_call,
        _RPCState,
        _stream_response_in_pool,
    )
except ImportError as error:
    _import_error: ImportError | None = error
else:
    _import_error = None


_NAMES_IN_CYGRPC = (
    "Channel.segregated_call",
    "PropagationConstants.GRPC_PROPAGATE_DEFAULTS",
    "ReceiveInitialMetadataOperation",
    "ReceiveMessageOperation",
    "ReceiveStatusOnClientOperation",
    "SegregatedCall.cancel",
    "SegregatedCall.next_event",
    "SegregatedCall.operate",
    "SendInitialMetadataOperation",
    "SendMessageOperation",
    "StatusCode.cancelled",
    "StatusCode.ok",
)


def missing() -> str | None:
    """Return what this grpcio lacks, in words, or None if the gear can be tried."""
    if _import_error is not None:
        return str(_import_error)
    try:
        for name in _NAMES_IN_CYGRPC:
            operator.attrgetter(name)(cygrpc)
        state = _RPCState()
        operator.attrgetter("condition", "due", "initial_metadata_allowed")(state)
        operator.attrgetter("_rpc_event", "_state")(_Context(None, state, None))
        state.due.add(_TOKEN)
        finished = _possibly_finish_call(state, _TOKEN)
        _get_initial_metadata_operation(state, None)
        active = _is_rpc_state_active(state)
    except (AttributeError, KeyError, TypeError) as error:
        return str(error)
    if not active or state.due or finished != _UNFINISHED:
        return "_possibly_finish_call does not keep the account of outstanding operations"
    if "experimental_non_blocking" not in _stream_response_in_pool.__code__.co_names:
        return "grpcio does not know a behavior's experimental_non_blocking"
    return None


# ---- the server's end ----


def stream_handler(
    open_session: Callable[[grpc.ServicerContext], Session], give_up: Callable[[Exception], None]
) -> grpc.RpcMethodHandler:
    """Return a handler that serves each stream in gRPC's polling thread and in those that deliver replies.

    give_up: called where grpcio turns out to be otherwise than this gear needs; the stream then ends with an error, and
        the caller's next is served by the gear that is chosen instead.
    """
    return grpc.stream_stream_rpc_method_handler(_Behavior(open_session, give_up))


class _Behavior:
    """What grpcio calls for each stream.

    A class with slots, so that functools.wraps does not copy the mark that stands here to an interceptor's function.
    """

    __slots__ = ("_give_up", "_open_session")

    experimental_non_blocking = True

    def __init__(
        self, open_session: Callable[[grpc.ServicerContext], Session], give_up: Callable[[Exception], None]
    ) -> None:
        self._open_session = open_session
        self._give_up = give_up

    def __call__(
        self,
        messages: Iterator[bytes],
        context: grpc.ServicerContext,
        send_response: Callable[[None], None] | None = None,
    ) -> Iterator[bytes] | None:
        if send_response is None:
            # An interceptor wrapped this object, and is to see the messages go by.
            return _public.serve(self._open_session, messages, context)
        try:
            session = self._open_session(context)
            try:
                stream = _ServerStream(session, context, partial(send_response, None), self._give_up)
            except AttributeError as error:
                session.close()
                self._give_up(error)
                raise StreamEnd(grpc.StatusCode.UNAVAILABLE, f"grpcio is not as expected: {error}") from None
        except StreamEnd as end:
            set_status(context, end)
            send_response(None)
        else:
            stream.begin()
        return None


class _ServerStream:
    """Moves one stream's messages. It is driven by events of its own operations, and by the end of its tickets.

    end_call: has grpcio send the status that the context was given.
    """

    def __init__(
        self,
        session: Session,
        context: grpc.ServicerContext,
        end_call: Callable[[], None],
        give_up: Callable[[Exception], None],
    ) -> None:
        self._give_up = give_up
        self._session = session
        self._context = context
        self._end_call = end_call
        self._call = context._rpc_event.call
        self._state = context._state
        self._ended = False
        session.transport = self

    def begin(self) -> None:
        if not self._context.add_callback(self._close):
            self._close()
            return
        try:
            self._start((cygrpc.ReceiveMessageOperation(_NO_FLAGS),))
        except Exception as error:
            self._fail(error)

    def send_reply(self, ticket: Ticket) -> None:
        """Send a ticket's answer, or end the stream with its status. Runs in any thread."""
        try:
            reply = self._session.reply(ticket)
            # Before the reply goes out, for the caller's next request may come in on its heels.
            self._session.replied()
            self._start(
                (cygrpc.SendMessageOperation(reply, _NO_FLAGS), cygrpc.ReceiveMessageOperation(_NO_FLAGS)),
            )
        except StreamEnd as end:
            self.end(end)
        except Exception as error:
            self._fail(error)

    def end(self, end: StreamEnd | None) -> None:
        """Send the stream's status: OK if there is no other."""
        with self._state.condition:
            if self._ended:
                return
            self._ended = True
            if end is not None:
                set_status(self._context, end)
        self._end_call()

    def _close(self) -> None:
        """The call is over: the caller cancelled it or is gone, or it has its status."""
        self._session.close()
        self.end(None)

    def _start(self, operations: Sequence[Any]) -> None:
        """Start operations, of which the last is to receive. On a call that is over nothing happens."""
        try:
            with self._state.condition:
                if not _is_rpc_state_active(self._state):
                    return
                with_metadata = self._state.initial_metadata_allowed and len(operations) > 1
                if with_metadata:
                    operations = (_get_initial_metadata_operation(self._state, None), *operations)
                error = self._call.start_server_batch(operations, self._on_event)
                if error:
                    raise RuntimeError(f"gRPC refused to start operations on a stream, with its error {error}")
                if with_metadata:
                    self._state.initial_metadata_allowed = False
                self._state.due.add(_TOKEN)
        except (AttributeError, TypeError) as error:
            self._give_up(error)
            raise

    def _on_event(self, event: Any) -> tuple[Any, Any]:
        """The operations are done. Runs in the polling thread, which would not survive an exception."""
        finished = _UNFINISHED
        try:
            try:
                with self._state.condition:
                    finished = _possibly_finish_call(self._state, _TOKEN)
                message = event.batch_operations[-1].message()
            except (AttributeError, TypeError) as error:
                self._give_up(error)
                self._state.due.discard(_TOKEN)  # or the server's stop would wait for it
                raise
            if message is None:  # half-closed or broken; on a broken stream no status is sent
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


# ---- the client's end ----

_STATUS_CODES = {code.value[0]: code for code in grpc.StatusCode}

# The user tags of a call's events.
_STATUS = "status"
_OPENING = "opening"
_EXCHANGE = "exchange"
_PROBE = "probe"

# A stream that was used so recently is taken to be alive without asking gRPC.
_PROBE_AFTER_NS = 10_000_000


class CallEnd(grpc.RpcError):  # type: ignore[misc]
    """How a call ended; the part of grpc.Call that a caller of `exchange` needs."""

    def __init__(self, code: grpc.StatusCode, details: str, trailing_metadata: Any = ()) -> None:
        super().__init__(code, details)
        self._end = code, details, trailing_metadata

    def code(self) -> grpc.StatusCode:
        return self._end[0]

    def details(self) -> str:
        return self._end[1]

    def trailing_metadata(self) -> Any:
        return self._end[2]


class ClientStream:
    """One open stream to a server, for one request at a time. All but `cancel` are for one thread at a time.

    give_up: called where grpcio turns out to be otherwise than this gear needs; the request then ends with UNAVAILABLE,
        and the next is sent in the gear that is chosen instead.
    """

    def __init__(
        self,
        channel: grpc.Channel,
        method: str,
        metadata: Sequence[tuple[str, Any]],
        give_up: Callable[[Exception], None],
    ) -> None:
        self._give_up = give_up
        self._status: Any = None
        self._outstanding = 3
        self._used_ns = time.monotonic_ns()
        self._call = channel._channel.segregated_call(
            cygrpc.PropagationConstants.GRPC_PROPAGATE_DEFAULTS,
            method.encode(),
            None,
            None,
            None,
            None,
            (
                ((cygrpc.ReceiveStatusOnClientOperation(_NO_FLAGS),), _STATUS),
                ((cygrpc.SendInitialMetadataOperation(tuple(metadata), _NO_FLAGS),), _OPENING),
                ((cygrpc.ReceiveInitialMetadataOperation(_NO_FLAGS),), _OPENING),
            ),
        )

    def exchange(self, message: bytes) -> bytes | None:
        """Send a request and return its reply; None if the server ended the stream well and without one.

        Raises grpc.RpcError, with code(), details() and trailing_metadata().
        """
        try:
            operations = (
                cygrpc.SendMessageOperation(message, _NO_FLAGS),
                cygrpc.ReceiveMessageOperation(_NO_FLAGS),
            )
            if self._operate(operations, _EXCHANGE):
                reply = self._next_event(_EXCHANGE).batch_operations[1].message()
                if reply is not None:
                    self._used_ns = time.monotonic_ns()
                    return reply  # type: ignore[no-any-return]
            while self._status is None:
                self._next_event(_STATUS)
            code = self._status.code()
            end = CallEnd(
                _STATUS_CODES.get(code, grpc.StatusCode.UNKNOWN),
                str(self._status.details()),
                self._status.trailing_metadata(),
            )
        except (AttributeError, TypeError) as error:
            self._give_up(error)
            end = CallEnd(grpc.StatusCode.UNAVAILABLE, f"grpcio is not as expected: {error}")
        if end.code() is grpc.StatusCode.OK:
            return None
        raise end

    def is_alive(self) -> bool:
        if self._status is None and time.monotonic_ns() - self._used_ns > _PROBE_AFTER_NS:
            # An empty batch is done at once. A status that came before it is found on the way.
            try:
                if self._operate((), _PROBE):
                    self._next_event(_PROBE)
            except (AttributeError, TypeError) as error:
                self._give_up(error)
                return False
            self._used_ns = time.monotonic_ns()
        return self._status is None

    def cancel(self) -> None:
        """End the stream at once. May be called from any thread, and again."""
        self._call.cancel(cygrpc.StatusCode.cancelled, "the caller cancelled")

    def close(self) -> None:
        """Cancel the stream, and wait for what is outstanding to be gone: until then gRPC keeps the call."""
        if self._outstanding:
            self.cancel()
        while self._outstanding:
            self._next_event(None)

    def _operate(self, operations: Sequence[Any], tag: str) -> bool:
        if self._outstanding and self._call.operate(operations, tag):
            self._outstanding += 1
            return True
        return False

    def _next_event(self, tag: str | None) -> Any:
        """Wait for the event of this tag, or for any with None."""
        while True:
            try:
                event = self._call.next_event()
            except BaseException:  # Ctrl-C in the main thread
                # grpcio then has taken the call apart. Or the event had come, and is lost: another takes its place.
                if not self._call.operate((), _PROBE):
                    self._outstanding = 0
                raise
            self._outstanding -= 1
            if event.tag == _STATUS:
                self._status = event.batch_operations[0]
            if tag is None or event.tag == tag:
                return event
