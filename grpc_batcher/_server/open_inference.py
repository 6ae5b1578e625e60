"""The Open Inference Protocol (KServe's and Triton's), answered from the same batches as the batcher's own callers.

https://github.com/kserve/open-inference-protocol describes it; ModelStreamInfer, ModelConfig and ModelStatistics are
Triton's extensions.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import grpc

from .._proto import open_inference_pb2 as messages
from .._transport.interface import StreamEnd
from .._version import __version__
from .array_callback import ArrayCallback
from .inference_calls import VERSION, Call, CallStream, Places, ServedModel
from .inference_reports import PLATFORM, configuration, statistics
from .inference_tensors import NoDatatypeError, tensor_metadata
from .metrics import Metrics
from .service import Service

_PREFIX = "/inference.GRPCInferenceService/"
_EXTENSIONS = ("model_configuration", "statistics")  # by Triton's names


class OpenInference(grpc.GenericRpcHandler):  # type: ignore[misc]
    """Serves one model, in one version.

    metrics: returns the batcher's counters.

    Raises NoDatatypeError if the protocol has no datatype for a declared array.
    """

    def __init__(
        self, service: Service, callback: ArrayCallback, model_name: str, metrics: Callable[[], Metrics]
    ) -> None:
        self._service = service
        self._callback = callback
        self._metrics = metrics
        self._model = ServedModel(model_name, callback)
        self._places = Places(service.room)
        self._handlers = {
            "ServerLive": self._plain(messages.ServerLiveRequest, self._server_live),
            "ServerReady": self._plain(messages.ServerReadyRequest, self._server_ready),
            "ModelReady": self._plain(messages.ModelReadyRequest, self._model_ready),
            "ServerMetadata": self._plain(messages.ServerMetadataRequest, self._server_metadata),
            "ModelMetadata": self._plain(messages.ModelMetadataRequest, self._model_metadata),
            "ModelConfig": self._plain(messages.ModelConfigRequest, self._model_config),
            "ModelStatistics": self._plain(messages.ModelStatisticsRequest, self._model_statistics),
            "ModelInfer": grpc.unary_unary_rpc_method_handler(self._infer),
            "ModelStreamInfer": grpc.stream_stream_rpc_method_handler(self._stream_infer),
        }

    def service(self, handler_call_details: grpc.HandlerCallDetails) -> grpc.RpcMethodHandler | None:
        """Return the handler of one of the protocol's methods; None for others."""
        method = handler_call_details.method
        return self._handlers.get(method.removeprefix(_PREFIX)) if method.startswith(_PREFIX) else None

    # ---- what it tells about itself ----

    def _plain(self, request: Any, answer: Callable[[Any, grpc.ServicerContext], Any]) -> grpc.RpcMethodHandler:
        return grpc.unary_unary_rpc_method_handler(answer, request.FromString, _serialized)

    def _server_live(self, _request: Any, _context: grpc.ServicerContext) -> Any:
        return messages.ServerLiveResponse(live=True)

    def _server_ready(self, _request: Any, _context: grpc.ServicerContext) -> Any:
        return messages.ServerReadyResponse(ready=not self._service.room.closed)

    def _model_ready(self, request: messages.ModelReadyRequest, _context: grpc.ServicerContext) -> Any:
        is_served = self._model.not_found(request.name, request.version) is None
        return messages.ModelReadyResponse(ready=is_served and not self._service.room.closed)

    def _server_metadata(self, _request: Any, _context: grpc.ServicerContext) -> Any:
        return messages.ServerMetadataResponse(name="grpc_batcher", version=__version__, extensions=_EXTENSIONS)

    def _model_metadata(self, request: messages.ModelMetadataRequest, context: grpc.ServicerContext) -> Any:
        self._find(request.name, request.version, context)
        return messages.ModelMetadataResponse(
            name=self._model.name,
            versions=[VERSION],
            platform=PLATFORM,
            inputs=self._model.inputs.describe(),
            outputs=self._outputs(context),
        )

    def _model_config(self, request: messages.ModelConfigRequest, context: grpc.ServicerContext) -> Any:
        self._find(request.name, request.version, context)
        room = self._service.room
        return messages.ModelConfigResponse(
            config=configuration(
                self._model.name,
                self._model.inputs.describe(),
                self._outputs(context),
                batch_size=room.batch_size,
                window_ns=room.window_ns,
            )
        )

    def _model_statistics(self, request: messages.ModelStatisticsRequest, context: grpc.ServicerContext) -> Any:
        if request.name:  # without a name, of all models
            self._find(request.name, request.version, context)
        return messages.ModelStatisticsResponse(model_stats=[statistics(self._model.name, VERSION, self._metrics())])

    def _find(self, name: str, version: str, context: grpc.ServicerContext) -> None:
        """End the call if another model is meant."""
        if missing := self._model.not_found(name, version):
            context.abort(grpc.StatusCode.NOT_FOUND, missing)

    def _outputs(self, context: grpc.ServicerContext) -> Sequence[messages.ModelMetadataResponse.TensorMetadata]:
        """Describe what the callback returned last."""
        try:
            return [tensor_metadata(*output) for output in self._callback.outputs_seen]
        except NoDatatypeError as error:
            context.abort(grpc.StatusCode.INTERNAL, str(error))
            raise  # never reached: abort raises

    # ---- inference: messages are bytes here ----

    def _infer(self, message: bytes, context: grpc.ServicerContext) -> bytes:
        try:
            call = self._service.open_session(
                context, lambda service, context: Call(service, context, self._model, self._places)
            )
            if not context.add_callback(call.close):
                call.close()
            try:
                return call.exchange(message)
            finally:
                call.give_back_place()
        except StreamEnd as end:
            context.abort(end.code, end.details)
            raise  # never reached: abort raises

    def _stream_infer(self, requests: Iterator[bytes], context: grpc.ServicerContext) -> Iterator[bytes]:
        try:
            stream = self._service.open_session(
                context, lambda service, context: CallStream(service, context, self._model, self._places)
            )
            yield from stream.replies(requests)
        except StreamEnd as end:
            context.abort(end.code, end.details)


def _serialized(message: Any) -> bytes:
    return message.SerializeToString()  # type: ignore[no-any-return]
