"""The requests of the Open Inference Protocol, one by one and on streams, and what a shutdown must know about them."""

from __future__ import annotations

import logging
import queue
import threading
import time
from collections import deque
from collections.abc import Iterator
from functools import partial
from typing import Any

import grpc

from .. import _core
from .._arrays import ArrayError
from .._models import BROKEN_MESSAGE, BadRequestError
from .._proto import open_inference_pb2 as messages
from .._transport.interface import StreamEnd
from .array_callback import ArrayCallback
from .inference_tensors import Inputs, NoDatatypeError, UnknownOutputError, Wanted, response_of
from .service import Service
from .session import SHUTTING_DOWN, Session

_logger = logging.getLogger("grpc_batcher")

VERSION = "1"

# A place that no request has used for this long is given up: the window no longer waits for its caller, either.
_IDLE_NS = 1_000_000_000


class ServedModel:
    """The one model that is served, in one version.

    Raises NoDatatypeError if the protocol has no datatype for a declared array.
    """

    def __init__(self, name: str, callback: ArrayCallback) -> None:
        self.name = name
        self.inputs = Inputs(callback.declared, takes_actions=callback.takes_actions)
        self._reader = callback.reader

    def not_found(self, name: str, version: str) -> str | None:
        """Say what is not served of a model and a version, or return None."""
        if name != self.name:
            return f"the model is {name!r:.100}; this server has {self.name!r}"
        if version not in ("", VERSION):
            return f"the version is {version!r:.100}; this server has {VERSION!r} of {self.name!r}"
        return None

    def read(self, request: messages.ModelInferRequest) -> tuple[Any, int]:
        """Return a request's rows, and how many they are. Raises BadRequestError."""
        try:
            rows = self.inputs.read(self._reader, request)
        except ArrayError as error:
            raise BadRequestError(str(error)) from None
        return rows, rows.rows


class Places:
    """The waiting room's streams for these requests, which come one by one: each is lent to one request after another.

    So the window knows how many callers there are, as it does for streams that callers keep. They are pooled: a place
    that stays idle only says that fewer requests are in flight than before.
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
        return self._room.open_stream(self._Owner(), pooled=True)

    def give_back(self, place: _core.Stream) -> None:
        now_ns = time.monotonic_ns()
        unused = []
        with self._lock:
            self._idle.append((now_ns, place))
            while now_ns - self._idle[0][0] > _IDLE_NS:
                unused.append(self._idle.popleft()[1])
        for old in unused:
            old.close()


class Call(Session):
    """One request. Its reply is a ModelInferResponse."""

    def __init__(self, service: Service, context: grpc.ServicerContext, model: ServedModel, places: Places) -> None:
        super().__init__(service, context, places.take())
        self._model = model
        self._places = places
        self.wanted = Wanted(messages.ModelInferRequest())  # until the request has been read

    def read_request(self, message: bytes) -> tuple[Any, int]:
        try:
            request = messages.ModelInferRequest.FromString(message)
        except BROKEN_MESSAGE as error:
            raise BadRequestError(f"{len(message)} bytes that are not a ModelInferRequest: {error}") from None
        self.wanted = Wanted(request)
        if missing := self._model.not_found(request.model_name, request.model_version):
            raise self.failed(grpc.StatusCode.NOT_FOUND, missing)
        return self._model.read(request)

    def write_reply(self, outcome: Any) -> bytes:
        try:
            response = response_of(super().write_reply(outcome), self.wanted, VERSION)
        except UnknownOutputError as error:
            raise self.failed(grpc.StatusCode.INVALID_ARGUMENT, str(error)) from None
        except NoDatatypeError as error:
            raise self.failed(grpc.StatusCode.INTERNAL, str(error)) from None
        return self._written(response)

    def _written(self, response: messages.ModelInferResponse) -> bytes:
        return response.SerializeToString()

    def give_back_place(self) -> None:
        """Let another request have the place. Call this once the request has ended, and before its reply is sent: the
        caller's next request must find the place, or the window would take it for another caller's.
        """
        if (place := self.release()) is not None:
            self._places.give_back(place)


class _CallOnStream(Call):
    """One request of a stream. Its reply is a ModelStreamInferResponse.

    begun: its ticket, or why it was refused.
    """

    begun: _core.Ticket | StreamEnd

    def begin(self, message: bytes) -> None:
        try:
            self.begun = self.accept(message)
        except StreamEnd as end:
            self.begun = end

    def reply(self) -> bytes:
        """Wait for the reply. An error is one, too: the stream goes on."""
        try:
            if isinstance(self.begun, StreamEnd):
                raise self.begun
            return self.answer(self.begun)
        except StreamEnd as end:
            failed = messages.ModelInferResponse(id=self.wanted.id, model_name=self.wanted.model_name)
            return self._on_stream(failed, error_message=end.details)
        finally:
            self.give_back_place()

    def _written(self, response: messages.ModelInferResponse) -> bytes:
        return self._on_stream(response)

    def _on_stream(self, response: messages.ModelInferResponse, error_message: str = "") -> bytes:
        if self.wanted.marks_final:
            response.parameters["triton_final_response"].bool_param = True
        streamed = messages.ModelStreamInferResponse(error_message=error_message, infer_response=response)
        return streamed.SerializeToString()


class CallStream:
    """A stream of requests, answered in their order. An error ends only its own request.

    A thread reads them while the handler's own waits for answers and sends these. It stops reading while two batches'
    worth of requests are in flight, so that a caller who takes no answers costs no more memory than that.
    """

    def __init__(self, service: Service, context: grpc.ServicerContext, model: ServedModel, places: Places) -> None:
        self._service = service
        self._context = context
        self._make_call = partial(_CallOnStream, service, context, model, places)
        self._free = threading.Semaphore(2 * service.room.batch_size)
        self._begun: queue.SimpleQueue[_CallOnStream | StreamEnd | None] = queue.SimpleQueue()
        self._calls: set[_CallOnStream] = set()  # those whose replies have not been sent
        self._is_closed = False
        self._is_ending = False

    @property
    def has_unsent_reply(self) -> bool:
        return not self._is_closed and (self._is_ending or bool(self._calls))

    def shut_down(self) -> None:
        self._is_ending = True
        self._begun.put(StreamEnd(grpc.StatusCode.UNAVAILABLE, SHUTTING_DOWN))

    def close(self) -> None:
        """The stream is over; drop its requests. May be called again."""
        self._is_closed = True  # before the calls are looked at: `_begin` does it the other way round
        for call in self._calls.copy():
            call.close()
        self._free.release()  # for the reader, which ends then
        self._service.session_closed(self)

    def replies(self, requests: Iterator[bytes]) -> Iterator[bytes]:
        """Yield the replies. Raises StreamEnd."""
        try:
            if not self._context.add_callback(self.close):
                return
            threading.Thread(target=self._read, args=(requests,), name="grpc_batcher-inference", daemon=True).start()
            while (call := self._begun.get()) is not None:
                if isinstance(call, StreamEnd):
                    raise call
                yield call.reply()
                self._replied(call)
                del call  # an idle stream keeps nothing alive
        finally:
            self.close()

    def _read(self, requests: Iterator[bytes]) -> None:
        try:
            for message in requests:
                self._free.acquire()
                if self._is_closed:
                    return
                self._begin(message)
                del message
        except grpc.RpcError:
            pass  # the caller left
        except Exception as error:
            self._begun.put(StreamEnd(grpc.StatusCode.INTERNAL, f"the server failed: {type(error).__name__}: {error}"))
            _logger.exception("a stream failed")
        finally:
            self._begun.put(None)

    def _begin(self, message: bytes) -> None:
        call = self._make_call()
        self._calls.add(call)
        if self._is_closed:
            call.close()
        call.begin(message)
        self._begun.put(call)

    def _replied(self, call: _CallOnStream) -> None:
        call.close()
        self._calls.discard(call)
        self._free.release()
        self._service.session_changed()
