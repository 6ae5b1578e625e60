"""The Open Inference Protocol (KServe's and Triton's), answered from the same batches as the batcher's own callers.

https://github.com/kserve/open-inference-protocol describes it; ModelStreamInfer is Triton's extension.
"""

from __future__ import annotations

import queue
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from typing import Any

import grpc
from google.protobuf.message import DecodeError

from .. import _core
from .._arrays import ArrayError
from .._models import BadRequestError
from .._proto import open_inference_pb2 as messages
from .._transport.interface import StreamEnd
from .._version import __version__
from .array_callback import ArrayCallback
from .inference_tensors import Inputs, NoDatatypeError, UnknownOutputError, response_of, tensor_metadata
from .service import Service
from .session import Session

_PREFIX = "/inference.GRPCInferenceService/"
_VERSION = "1"
_PLATFORM = "grpc_batcher"

# A place that no request has used for this long is given up: the window no longer waits for its caller, either.
_IDLE_NS = 1_000_000_000


class _Places:
    """The waiting room's streams for these requests, which come one by one: each is lent to one request after another.

    So the window knows how many callers there are, as it does for streams that callers keep.
    """

    class _Owner:
        stream = None  # the thread of the request waits for the answer

    def __init__(self, room: _core.WaitingRoom) -> None:
        self._room = room
        self._idle: deque[tuple[int, _core.Stream]] = deque()  # since when; the most recently used last
        self._lock = threading.Lock()

    def take(self) -> _core.Stream:
        with self._lock:
            if self._idle:
                return self._idle.pop()[1]
        return self._room.open_stream(self._Owner())

    def give_back(self, place: _core.Stream) -> None:
        now_ns = time.monotonic_ns()
        unused = []
        with self._lock:
            self._idle.append((now_ns, place))
            while now_ns - self._idle[0][0] > _IDLE_NS:
                unused.append(self._idle.popleft()[1])
        for old in unused:
            old.close()


class _Call(Session):
    """One request. `request` is what it asked, once it has been read."""

    def __init__(
        self, service: Service, context: grpc.ServicerContext, protocol: OpenInference, place: _core.Stream
    ) -> None:
        super().__init__(service, context, place)
        self._protocol = protocol
        self.request = messages.ModelInferRequest()

    def read_request(self, message: bytes) -> tuple[Any, int]:
        try:
            self.request.ParseFromString(message)
        except DecodeError as error:
            raise BadRequestError(f"{len(message)} bytes that are not a ModelInferRequest: {error}") from None
        if missing := self._protocol.not_found(self.request.model_name, self.request.model_version):
            raise self.failed(grpc.StatusCode.NOT_FOUND, missing)
        try:
            rows = self._protocol.inputs.read(self._protocol.reader, self.request)
        except ArrayError as error:
            raise BadRequestError(str(error)) from None
        return rows, rows.rows

    def response(self, ticket: _core.Ticket) -> messages.ModelInferResponse:
        """Wait for the answer. Raises StreamEnd."""
        try:
            return response_of(self.answer(ticket), self.request)
        except UnknownOutputError as error:
            raise StreamEnd(grpc.StatusCode.INVALID_ARGUMENT, str(error)) from None
        except NoDatatypeError as error:
            raise StreamEnd(grpc.StatusCode.INTERNAL, str(error)) from None


class OpenInference(grpc.GenericRpcHandler):  # type: ignore[misc]
    """Serves one model, in one version.

    Raises NoDatatypeError if the protocol has no datatype for a declared array.
    """

    def __init__(self, service: Service, callback: ArrayCallback, model_name: str) -> None:
        self.inputs = Inputs(callback.declared, takes_actions=callback.takes_actions)
        self.reader = callback.reader
        self._service = service
        self._callback = callback
        self._model_name = model_name
        self._places = _Places(service.room)
        unary = grpc.unary_unary_rpc_method_handler
        self._handlers = {
            "ServerLive": self._plain(messages.ServerLiveRequest, self._server_live),
            "ServerReady": self._plain(messages.ServerReadyRequest, self._server_ready),
            "ModelReady": self._plain(messages.ModelReadyRequest, self._model_ready),
            "ServerMetadata": self._plain(messages.ServerMetadataRequest, self._server_metadata),
            "ModelMetadata": self._plain(messages.ModelMetadataRequest, self._model_metadata),
            "ModelInfer": unary(self._infer, response_serializer=_serialized),
            "ModelStreamInfer": grpc.stream_stream_rpc_method_handler(
                self._stream_infer, response_serializer=_serialized
            ),
        }

    def service(self, handler_call_details: grpc.HandlerCallDetails) -> grpc.RpcMethodHandler | None:
        """Return the handler of one of the protocol's methods; None for others."""
        method = handler_call_details.method
        return self._handlers.get(method.removeprefix(_PREFIX)) if method.startswith(_PREFIX) else None

    def not_found(self, name: str, version: str) -> str | None:
        """Say what is not served of a model and a version, or return None."""
        if name != self._model_name:
            return f"the model is {name!r:.100}; this server has {self._model_name!r}"
        if version not in ("", _VERSION):
            return f"the version is {version!r:.100}; this server has {_VERSION!r} of {self._model_name!r}"
        return None

    # ---- what it tells about itself ----

    def _plain(self, request: Any, answer: Callable[[Any, grpc.ServicerContext], Any]) -> grpc.RpcMethodHandler:
        return grpc.unary_unary_rpc_method_handler(answer, request.FromString, _serialized)

    def _server_live(self, _request: Any, _context: grpc.ServicerContext) -> Any:
        return messages.ServerLiveResponse(live=True)

    def _server_ready(self, _request: Any, _context: grpc.ServicerContext) -> Any:
        return messages.ServerReadyResponse(ready=not self._service.room.closed)

    def _model_ready(self, request: messages.ModelReadyRequest, _context: grpc.ServicerContext) -> Any:
        is_served = self.not_found(request.name, request.version) is None
        return messages.ModelReadyResponse(ready=is_served and not self._service.room.closed)

    def _server_metadata(self, _request: Any, _context: grpc.ServicerContext) -> Any:
        return messages.ServerMetadataResponse(name="grpc_batcher", version=__version__)

    def _model_metadata(self, request: messages.ModelMetadataRequest, context: grpc.ServicerContext) -> Any:
        if missing := self.not_found(request.name, request.version):
            context.abort(grpc.StatusCode.NOT_FOUND, missing)
        try:
            outputs = [tensor_metadata(*output) for output in self._callback.outputs_seen]
        except NoDatatypeError as error:
            context.abort(grpc.StatusCode.INTERNAL, str(error))
        return messages.ModelMetadataResponse(
            name=self._model_name,
            versions=[_VERSION],
            platform=_PLATFORM,
            inputs=self.inputs.describe(),
            outputs=outputs,
        )

    # ---- inference ----

    def _infer(self, message: bytes, context: grpc.ServicerContext) -> messages.ModelInferResponse:
        try:
            call = self._open(context)
            if not context.add_callback(call.close):
                call.close()
            try:
                return call.response(call.accept(message))
            finally:
                self._release(call)
        except StreamEnd as end:
            context.abort(end.code, end.details)
            raise  # never reached: abort raises

    def _stream_infer(
        self, requests: Iterator[bytes], context: grpc.ServicerContext
    ) -> Iterator[messages.ModelStreamInferResponse]:
        """Answer a stream's requests in their order. Any number may be in flight, and an error ends only its own."""
        calls: set[_Call] = set()
        begun: queue.SimpleQueue[tuple[_Call | None, _core.Ticket | StreamEnd] | None] = queue.SimpleQueue()

        def close_all() -> None:
            for call in tuple(calls):
                call.close()

        def read() -> None:
            try:
                for message in requests:
                    begun.put(self._begin(message, context, calls))
            except grpc.RpcError:
                pass  # the caller left
            finally:
                if not context.is_active():
                    close_all()
                begun.put(None)

        if not context.add_callback(close_all):
            return
        threading.Thread(target=read, name="grpc_batcher-inference", daemon=True).start()
        try:
            while (item := begun.get()) is not None:
                call, ticket = item
                yield _in_band(call, ticket)
                if call is not None:
                    self._release(call)
                    call.close()
                    calls.discard(call)
        finally:
            close_all()

    def _begin(
        self, message: bytes, context: grpc.ServicerContext, calls: set[_Call]
    ) -> tuple[_Call | None, _core.Ticket | StreamEnd]:
        """Let a stream's request in, and return it with its ticket, or with why it was refused."""
        call = None
        try:
            call = self._open(context)
            calls.add(call)
            return call, call.accept(message)
        except StreamEnd as end:
            return call, end

    def _open(self, context: grpc.ServicerContext) -> _Call:
        return self._service.open_session(
            context, lambda service, context: _Call(service, context, self, self._places.take())
        )

    def _release(self, call: _Call) -> None:
        if (place := call.release()) is not None:
            self._places.give_back(place)


def _in_band(call: _Call | None, ticket: _core.Ticket | StreamEnd) -> messages.ModelStreamInferResponse:
    """Wait for the answer to a stream's request. An error is a response, too: the stream goes on."""
    try:
        if isinstance(ticket, StreamEnd):
            raise ticket
        assert call is not None
        return messages.ModelStreamInferResponse(infer_response=call.response(ticket))
    except StreamEnd as end:
        request = messages.ModelInferRequest() if call is None else call.request
        failed = messages.ModelInferResponse(id=request.id, model_name=request.model_name)
        return messages.ModelStreamInferResponse(error_message=end.details, infer_response=failed)


def _serialized(message: Any) -> bytes:
    return message.SerializeToString()  # type: ignore[no-any-return]
