"""grpcio's private names that the direct transport uses: all of them, and only here.

Elsewhere only the calls that this file opens are used: their `operate` and `next_event`.

They are the same in grpcio 1.49.1, 1.62.3, 1.71.2 and 1.85.3. grpcio builds its own streams from each of them, so none
is likely to change alone.

Server, from grpc._server:
    _Context._rpc_event.call.start_server_batch(operations, tag): starts operations. The polling thread calls the tag
        with the event, and takes (state, callbacks) from it.
    _Context._state (_RPCState): `condition` guards it; `due` holds what is outstanding, and a call is over once it is
        empty; `initial_metadata_allowed` says whether the next message must bring the initial metadata along.
    _is_rpc_state_active, _possibly_finish_call, _get_initial_metadata_operation: grpcio's own tags and sends call them.
        With them our operations stand in `due` like grpcio's own, and a stopping server waits for ours, too.
    _stream_response_in_pool: honours a behaviour's `experimental_non_blocking`. It then passes the behaviour a function
        that ends the call, and frees the thread when the behaviour returns.
Client, from grpc._channel and grpc._cython.cygrpc:
    grpc._channel.Channel: what grpc.insecure_channel returns unless something wraps it; its `_channel` is a
        cygrpc.Channel.
    cygrpc.Channel.segregated_call: makes a call with its own completion queue, as grpcio's blocking calls do. Its
        result, a SegregatedCall, has `operate`, `next_event` and `cancel`, and lives while operations are outstanding.
    _channel_managed_call_management: grpcio's own way to make a call on the channel's one completion queue, for which
        grpcio runs one thread per channel as long as there is such a call. The thread calls an event's tag with the
        event, and takes from it whether the call is over. The result, an IntegratedCall, has `operate` and `cancel`.
    Channel._call_state: what that needs to know of its channel.
    PropagationConstants.GRPC_PROPAGATE_DEFAULTS, StatusCode.cancelled: constants of gRPC's C API.
Both, from grpc._cython.cygrpc:
    the operations that send and receive metadata, messages and the status. One that received a message has it as
        `message()`; one that received the status has `code()`, `details()` and `trailing_metadata()`.
    BatchOperationEvent: what a tag is called with, and `next_event` returns. It has the operations that are done, as
        `batch_operations`, and the `tag`.
"""

from __future__ import annotations

import importlib
import inspect
import operator
import os
import re
import threading
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import grpc

from .._process import NEWEST_TESTED_GRPCIO

_NO_FLAGS = 0

# grpcio identifies outstanding operations by such tokens. A stream never has more than one of ours.
_TOKEN = "grpc_batcher"

# What a tag returns for a call that is not over: no state to forget, and nobody to tell.
UNFINISHED: tuple[Any, Any] = (None, ())

_not_found: list[str] = []


def _find(module: str, name: str) -> Any:
    """Return a name from one of grpcio's modules; None where this grpcio lacks it."""
    try:
        return getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError):
        _not_found.append(f"{module}.{name}")
        return None


cygrpc = _find("grpc._cython", "cygrpc")
_get_initial_metadata_operation = _find("grpc._server", "_get_initial_metadata_operation")
_is_rpc_state_active = _find("grpc._server", "_is_rpc_state_active")
_possibly_finish_call = _find("grpc._server", "_possibly_finish_call")
_Context = _find("grpc._server", "_Context")
_channel_managed_call_management = _find("grpc._channel", "_channel_managed_call_management")
_PlainChannel = _find("grpc._channel", "Channel")
_RPCState = _find("grpc._server", "_RPCState")
_stream_response_in_pool = _find("grpc._server", "_stream_response_in_pool")


def missing_for_server() -> str | None:
    """Say what this grpcio lacks for the direct transport's server end, or return None."""
    if absent := [name for name in _not_found if not name.startswith("grpc._channel.")]:
        return f"there is no {absent[0]}"
    try:
        operator.attrgetter("BatchOperationEvent.batch_operations", "ReceiveMessageOperation.message")(cygrpc)
        cygrpc.ReceiveMessageOperation(_NO_FLAGS)
        cygrpc.SendMessageOperation(b"", _NO_FLAGS)
        _check_arguments("Call.start_server_batch", None, (), None)
        state = _RPCState()
        operator.attrgetter("condition", "due", "initial_metadata_allowed")(state)
        operator.attrgetter("_rpc_event", "_state", "add_callback")(_Context(None, state, None))
        state.due.add(_TOKEN)
        finished = _possibly_finish_call(state, _TOKEN)
        _get_initial_metadata_operation(state, None)
        active = _is_rpc_state_active(state)
        names = _stream_response_in_pool.__code__.co_names
    except (AttributeError, KeyError, TypeError) as error:
        return str(error)
    if not active or state.due or finished != UNFINISHED:
        return "_possibly_finish_call does not keep account of outstanding operations"
    if "experimental_non_blocking" not in names:
        return "a behaviour's experimental_non_blocking is unknown"
    return None


def missing_for_client() -> str | None:
    """Say what this grpcio lacks for the direct transport's client end, or return None."""
    if absent := [name for name in _not_found if not name.startswith("grpc._server.")]:
        return f"there is no {absent[0]}"
    try:
        operator.attrgetter("PropagationConstants.GRPC_PROPAGATE_DEFAULTS", "StatusCode.cancelled")(cygrpc)
        operator.attrgetter("BatchOperationEvent.batch_operations", "BatchOperationEvent.tag")(cygrpc)
        operator.attrgetter("ReceiveMessageOperation.message")(cygrpc)
        operator.attrgetter("code", "details", "trailing_metadata")(cygrpc.ReceiveStatusOnClientOperation)
        cygrpc.SendInitialMetadataOperation((), _NO_FLAGS)
        cygrpc.ReceiveInitialMetadataOperation(_NO_FLAGS)
        cygrpc.SendMessageOperation(b"", _NO_FLAGS)
        cygrpc.ReceiveMessageOperation(_NO_FLAGS)
        cygrpc.ReceiveStatusOnClientOperation(_NO_FLAGS)
        _check_arguments("Channel.segregated_call", None, 0, b"", None, None, None, None, ())
        _check_arguments("SegregatedCall.operate", None, (), None)
        _check_arguments("SegregatedCall.next_event", None)
        _check_arguments("SegregatedCall.cancel", None, 0, "")
        _check_arguments("IntegratedCall.operate", None, (), None)
        _check_arguments("IntegratedCall.cancel", None, 0, "")
        _pooled_arguments(_channel_managed_call_management(None), b"", (), None)
        if "_call_state" not in _PlainChannel.__init__.__code__.co_names:
            return "a channel has no _call_state"
    except (AttributeError, TypeError) as error:
        return str(error)
    return None


def _check_arguments(name: str, *arguments: Any) -> None:
    """Raise AttributeError or TypeError unless cygrpc's method of this name exists and takes these arguments."""
    method = operator.attrgetter(name)(cygrpc)
    try:
        signature = inspect.signature(method)
    except ValueError:  # an older Cython's methods, which tell nothing
        return
    try:
        signature.bind(*arguments)
    except TypeError as error:
        raise TypeError(f"cygrpc.{name}{signature} takes other arguments: {error}") from None


def wrapped_by(channel: grpc.Channel) -> str | None:
    """Name the class that wraps a channel of grpcio's, or return None for a plain one."""
    if type(channel) is _PlainChannel:
        return None
    return f"{type(channel).__module__}.{type(channel).__qualname__}"


def is_newer_than_tested(version: str = grpc.__version__) -> bool:
    """Whether no test has seen this grpcio, nor any of its minor release."""
    numbers = re.match(r"(\d+)\.(\d+)", version)
    return numbers is None or (int(numbers[1]), int(numbers[2])) > NEWEST_TESTED_GRPCIO


def is_mismatch(error: Exception) -> bool:
    """Whether an AttributeError or TypeError shows that grpcio differs from what the direct transport needs.

    It was then raised in this package or in grpcio. A user's signal handler may raise such errors, too, during a
    call.
    """
    innermost = error.__traceback__
    while innermost is not None and innermost.tb_next is not None:
        innermost = innermost.tb_next
    file = "" if innermost is None else innermost.tb_frame.f_code.co_filename
    ours, grpcios = os.path.dirname(__file__), os.path.dirname(grpc.__file__)
    return os.path.dirname(file) == ours or file.startswith(grpcios) or "grpc/_cython/" in file


def receive() -> tuple[Any, ...]:
    """Return the operations that receive a message."""
    return (cygrpc.ReceiveMessageOperation(_NO_FLAGS),)


def send_and_receive(message: bytes) -> tuple[Any, ...]:
    """Return the operations that send a message and receive the next one."""
    return cygrpc.SendMessageOperation(message, _NO_FLAGS), cygrpc.ReceiveMessageOperation(_NO_FLAGS)


class ReceivedStatus(NamedTuple):
    """How a server ended a client's call. The code is its number."""

    code: int
    details: str
    trailing_metadata: Any


def message_of(event: Any) -> bytes | None:
    """Return the message that the last of an event's operations received, or None if none came."""
    return event.batch_operations[-1].message()  # type: ignore[no-any-return]


def status_of(event: Any) -> ReceivedStatus | None:
    """Return the status that an event's operation received, or None if it was not to receive one."""
    operation = event.batch_operations[0]
    if not isinstance(operation, cygrpc.ReceiveStatusOnClientOperation):
        return None
    return ReceivedStatus(operation.code(), str(operation.details()), operation.trailing_metadata())


def tag_of(event: Any) -> Any:
    """Return the tag with which an event's operations were started."""
    return event.tag


class ServerCall:
    """One call on the server, as grpcio keeps it."""

    def __init__(self, context: grpc.ServicerContext) -> None:
        self._call = context._rpc_event.call
        self._state = context._state

    @property
    def condition(self) -> threading.Condition:
        """Guards the call's state."""
        return self._state.condition  # type: ignore[no-any-return]

    def start(self, operations: Sequence[Any], tag: Callable[[Any], tuple[Any, Any]]) -> None:
        """Start operations, the last of which receives a message. Does nothing on a call that is over.

        tag: called with the event on the polling thread. It must call `finish` or `forget`, and return (state,
            callbacks).
        """
        state = self._state
        with state.condition:
            if not _is_rpc_state_active(state):
                return
            with_metadata = state.initial_metadata_allowed and len(operations) > 1
            if with_metadata:
                operations = (_get_initial_metadata_operation(state, None), *operations)
            error = self._call.start_server_batch(operations, tag)
            if error:
                raise RuntimeError(f"gRPC refused to start operations on a stream, with its error {error}")
            if with_metadata:
                state.initial_metadata_allowed = False
            state.due.add(_TOKEN)

    def finish(self) -> tuple[Any, Any]:
        """The operations are done. Returns what the tag must return."""
        with self._state.condition:
            return _possibly_finish_call(self._state, _TOKEN)  # type: ignore[no-any-return]

    def forget(self) -> None:
        """The operations are done, and `finish` failed: a stopping server must not wait for them."""
        self._state.due.discard(_TOKEN)


def opening(metadata: Sequence[tuple[str, Any]]) -> tuple[tuple[Any], ...]:
    """Return the batches of operations that open a client's call; the first receives its status, when it ends."""
    return (
        (cygrpc.ReceiveStatusOnClientOperation(_NO_FLAGS),),
        (cygrpc.SendInitialMetadataOperation(metadata, _NO_FLAGS),),
        (cygrpc.ReceiveInitialMetadataOperation(_NO_FLAGS),),
    )


def cancel(call: Any) -> None:
    """End a client's call at once."""
    call.cancel(cygrpc.StatusCode.cancelled, "the caller cancelled")


def open_call(channel: grpc.Channel, method: str, operations: Sequence[tuple[Sequence[Any], Any]]) -> Any:
    """Open a call with its own completion queue: a SegregatedCall.

    operations: pairs of a batch of operations to start with, and the tag of its event.
    """
    return channel._channel.segregated_call(
        cygrpc.PropagationConstants.GRPC_PROPAGATE_DEFAULTS, method.encode(), None, None, None, None, operations
    )


def open_pooled_call(
    channel: grpc.Channel, method: str, operations: Sequence[Sequence[Any]], tag: Callable[[Any], bool]
) -> Any:
    """Open a call on the channel's completion queue: an IntegratedCall.

    operations: batches of operations to start with.
    tag: called with the event of each on grpcio's thread. It must return whether the call is over, and never raise.
    """
    create = _channel_managed_call_management(channel._call_state)
    return create(*_pooled_arguments(create, method.encode(), operations, tag))


def _pooled_arguments(create: Any, method: bytes, operations: Sequence[Sequence[Any]], tag: Any) -> tuple[Any, ...]:
    """Return what grpcio's function that makes a call takes: from grpcio 1.63 on, a handle of the method, too."""
    flags = cygrpc.PropagationConstants.GRPC_PROPAGATE_DEFAULTS
    arguments: tuple[Any, ...] = (flags, method, None, None, None, None, operations, tag, None)
    if "_registered_call_handle" in inspect.signature(create).parameters:
        arguments = (*arguments, None)
    try:
        inspect.signature(create).bind(*arguments)
    except TypeError as error:
        raise TypeError(f"_channel_managed_call_management{inspect.signature(create)}: {error}") from None
    return arguments
