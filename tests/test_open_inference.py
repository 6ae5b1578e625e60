"""The Open Inference Protocol, over a real socket, with its messages and plain grpcio."""

from __future__ import annotations

import queue
import re
import signal
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from grpc_batcher import Array, Batch, MukoeBatcher, __version__, create_batcher
from grpc_batcher._proto import open_inference_pb2 as messages

import grpc
import numpy
import pytest
from serving import Held, address_of, connect, eventually, finish_program, in_background, serving, start_program

PREFIX = "/inference.GRPCInferenceService/"
TWO_ARRAYS = {"image": Array((2, 3), "uint8"), "scale": Array((), "float32")}

# Each dtype's datatype, and where a request may have its values but in raw_input_contents.
DATATYPES = {
    "bool": ("BOOL", "bool_contents"),
    "uint8": ("UINT8", "uint_contents"),
    "uint16": ("UINT16", "uint_contents"),
    "uint32": ("UINT32", "uint_contents"),
    "uint64": ("UINT64", "uint64_contents"),
    "int8": ("INT8", "int_contents"),
    "int16": ("INT16", "int_contents"),
    "int32": ("INT32", "int_contents"),
    "int64": ("INT64", "int64_contents"),
    "float16": ("FP16", None),
    "float32": ("FP32", "fp32_contents"),
    "float64": ("FP64", "fp64_contents"),
}
DATATYPE_OF = {dtype: datatype for dtype, (datatype, _) in DATATYPES.items()}
DTYPE_OF = {datatype: dtype for dtype, datatype in DATATYPE_OF.items()}


# ---- a server, and a client made of grpcio and the messages ----


def double(batch: Batch) -> dict[str, Any]:
    """A callback that answers with what it got, and with sums."""
    image = batch["image"].astype("int64")
    return {"image": batch["image"], "sum": image.sum((1, 2)) * batch["scale"].astype("float64")}


def echo(batch: Batch) -> dict[str, Any]:
    return dict(batch)


@contextmanager
def inferring(
    callback: Callable[[Batch], Any] = double, arrays: Mapping[str, Array] = TWO_ARRAYS, **options: Any
) -> Iterator[tuple[MukoeBatcher, Client]]:
    """A batcher that serves the protocol, and a client of it."""
    options = {"model": "arrays", **options}
    with serving(callback, arrays=arrays, open_inference=True, **options) as batcher, Client(batcher) as client:
        yield batcher, client


class Client:
    """The protocol's methods on a channel of its own."""

    def __init__(self, batcher: MukoeBatcher) -> None:
        self._channel = grpc.insecure_channel(address_of(batcher), (("grpc.max_receive_message_length", -1),))

    def __enter__(self) -> Client:
        return self

    def __exit__(self, *_: object) -> None:
        self._channel.close()

    def unary(self, method: str, message: bytes = b"") -> bytes:
        return self._channel.unary_unary(PREFIX + method)(message)

    def call(self, method: str, **fields: Any) -> Any:
        request = getattr(messages, f"{method}Request")(**fields)
        return getattr(messages, f"{method}Response").FromString(self.unary(method, request.SerializeToString()))

    def infer(self, request: messages.ModelInferRequest, **options: Any) -> messages.ModelInferResponse:
        return self._infer(request, **options)

    def begin(self, request: messages.ModelInferRequest, **options: Any) -> Any:
        """Send a request; return the grpcio call, which is a future of the response."""
        return self._infer.future(request, **options)

    @property
    def _infer(self) -> Any:
        return self._channel.unary_unary(
            PREFIX + "ModelInfer",
            messages.ModelInferRequest.SerializeToString,
            messages.ModelInferResponse.FromString,
        )

    def stream(self, **options: Any) -> Stream:
        return Stream(self._channel, **options)


class Stream:
    """A ModelStreamInfer that is open."""

    def __init__(self, channel: grpc.Channel, **options: Any) -> None:
        self._outbox: queue.SimpleQueue[messages.ModelInferRequest | None] = queue.SimpleQueue()
        self.call = channel.stream_stream(
            PREFIX + "ModelStreamInfer",
            messages.ModelInferRequest.SerializeToString,
            messages.ModelStreamInferResponse.FromString,
        )(iter(self._outbox.get, None), **options)

    def __enter__(self) -> Stream:
        return self

    def __exit__(self, *_: object) -> None:
        self.call.cancel()
        self.half_close()

    def send(self, *requests: messages.ModelInferRequest) -> None:
        for request in requests:
            self._outbox.put(request)

    def receive(self) -> messages.ModelStreamInferResponse:
        return next(self.call)

    def half_close(self) -> None:
        self._outbox.put(None)


def request_of(
    arrays: Mapping[str, Any] | None = None, *, model_name: str = "arrays", **fields: Any
) -> messages.ModelInferRequest:
    """A request with arrays in raw_input_contents."""
    if arrays is None:
        arrays = image_of(1)
    request = messages.ModelInferRequest(model_name=model_name, **fields)
    for name, array in arrays.items():
        request.inputs.add(name=name, datatype=DATATYPE_OF[array.dtype.name], shape=array.shape)
        request.raw_input_contents.append(array.tobytes())
    return request


def image_of(value: int, rows: int = 1) -> dict[str, Any]:
    return {"image": numpy.full((rows, 2, 3), value, "uint8"), "scale": numpy.ones(rows, "float32")}


def arrays_in(response: messages.ModelInferResponse) -> dict[str, Any]:
    """The outputs of a response, as arrays."""
    return {
        tensor.name: numpy.frombuffer(content, DTYPE_OF[tensor.datatype]).reshape(tensor.shape)
        for tensor, content in zip(response.outputs, response.raw_output_contents, strict=True)
    }


def error_of(function: Callable[..., Any], *args: Any, **kwargs: Any) -> tuple[grpc.StatusCode, str]:
    """Make a call that must fail; return its status."""
    with pytest.raises(grpc.RpcError) as caught:
        function(*args, **kwargs)
    return caught.value.code(), caught.value.details()


def waiting(batcher: MukoeBatcher, count: int) -> None:
    """Wait until this many requests are waiting for a batch."""
    eventually(lambda: batcher.metrics().waiting == count)


def in_flight(batcher: MukoeBatcher) -> int:
    """How many requests are waiting or in a batch, or were: none that has an answer is subtracted."""
    metrics = batcher.metrics()
    return metrics.waiting + metrics.batched_requests


# ---- what the server tells about itself ----


def test_a_server_is_live_and_ready_and_says_its_version() -> None:
    with inferring() as (_, client):
        assert client.call("ServerLive").live
        assert client.call("ServerReady").ready
        metadata = client.call("ServerMetadata")
        assert (metadata.name, metadata.version) == ("grpc_batcher", __version__)
        assert list(metadata.extensions) == ["model_configuration", "statistics"]


def test_only_the_model_that_is_served_is_ready() -> None:
    with inferring(model_name="agent") as (_, client):
        assert client.call("ModelReady", name="agent").ready
        assert client.call("ModelReady", name="agent", version="1").ready
        assert not client.call("ModelReady", name="agent", version="2").ready
        assert not client.call("ModelReady", name="arrays").ready


def described(tensors: Sequence[messages.ModelMetadataResponse.TensorMetadata]) -> list[tuple[str, str, list[int]]]:
    return [(tensor.name, tensor.datatype, list(tensor.shape)) for tensor in tensors]


def test_the_metadata_describes_the_declared_arrays_with_any_number_of_rows() -> None:
    with inferring() as (_, client):
        metadata = client.call("ModelMetadata", name="arrays")
    assert (metadata.name, list(metadata.versions)) == ("arrays", ["1"])
    assert described(metadata.inputs) == [("image", "UINT8", [-1, 2, 3]), ("scale", "FP32", [-1])]


def test_the_metadata_describes_the_outputs_once_the_callback_has_returned_some() -> None:
    outputs = [("image", "UINT8", [-1, 2, 3]), ("sum", "FP64", [-1])]
    with inferring() as (_, client):
        assert described(client.call("ModelMetadata", name="arrays").outputs) == []
        client.infer(request_of())
        assert described(client.call("ModelMetadata", name="arrays").outputs) == outputs
    with inferring(warm_up=True) as (_, client):
        assert described(client.call("ModelMetadata", name="arrays").outputs) == outputs


def test_the_configuration_describes_a_row_and_the_window() -> None:
    with inferring(warm_up=True, batch_timeout_s=0.0025) as (_, client):
        config = client.call("ModelConfig", name="arrays", version="1").config
        assert error_of(client.call, "ModelConfig", name="image")[0] == grpc.StatusCode.NOT_FOUND
    assert (config.name, config.max_batch_size) == ("arrays", 8)
    assert config.dynamic_batching.max_queue_delay_microseconds == 2500
    assert [(each.name, each.data_type, list(each.dims)) for each in config.input] == [
        ("image", messages.TYPE_UINT8, [2, 3]),
        ("scale", messages.TYPE_FP32, []),
    ]
    assert [(each.name, each.data_type, list(each.dims)) for each in config.output] == [
        ("image", messages.TYPE_UINT8, [2, 3]),
        ("sum", messages.TYPE_FP64, []),
    ]


@pytest.mark.parametrize("timed", [True, False])
def test_the_statistics_count_requests_rows_batches_and_nanoseconds(timed: bool) -> None:
    with inferring(track_metrics=timed) as (batcher, client):
        client.infer(request_of(image_of(1, rows=2)))
        assert error_of(client.infer, changed(WRONG["an unknown input"][0]))
        eventually(lambda: sum(batcher.metrics().requests.values()) == 2)
        (one,) = client.call("ModelStatistics", name="arrays").model_stats
        (every,) = client.call("ModelStatistics").model_stats
        assert error_of(client.call, "ModelStatistics", name="image")[0] == grpc.StatusCode.NOT_FOUND
        metrics = batcher.metrics()
    assert one == every
    assert (one.name, one.version, one.inference_count, one.execution_count) == ("arrays", "1", 2, 1)
    counted = one.inference_stats
    assert [counted.success.count, counted.fail.count, counted.queue.count, counted.compute_infer.count] == [1, 1, 1, 1]
    if timed:
        assert metrics.callback_histogram_s is not None
        assert counted.compute_infer.ns == pytest.approx(metrics.callback_histogram_s.sum * 1e9, abs=1)
        assert counted.success.ns >= counted.queue.ns + counted.compute_infer.ns > counted.compute_infer.ns > 0
    else:
        assert counted.success.ns == counted.queue.ns == counted.compute_infer.ns == 0


@pytest.mark.parametrize("model", ["repr", "dyna"])
def test_the_model_is_called_like_its_kind_unless_it_is_given_a_name(model: str) -> None:
    with inferring(echo, {"data": Array((4,), "uint8")}, model=model) as (_, client):
        inputs = described(client.call("ModelMetadata", name=model).inputs)
    assert inputs == [("data", "UINT8", [-1, 4]), ("action", "INT32", [-1])][: 1 + (model == "dyna")]


def test_metadata_of_another_model_or_version_is_not_found() -> None:
    with inferring() as (_, client):
        not_found = grpc.StatusCode.NOT_FOUND
        assert error_of(client.call, "ModelMetadata", name="resnet") == (
            not_found,
            "the model is 'resnet'; this server has 'arrays'",
        )
        assert error_of(client.call, "ModelMetadata", name="arrays", version="3") == (
            not_found,
            "the version is '3'; this server has '1' of 'arrays'",
        )


@pytest.mark.parametrize("method", ["RepositoryIndex", "SystemSharedMemoryStatus", "TraceSetting", "Nothing"])
def test_methods_that_are_not_there_are_unimplemented(method: str) -> None:
    with inferring() as (_, client):
        assert error_of(client.unary, method)[0] == grpc.StatusCode.UNIMPLEMENTED


# ---- one request ----


def test_a_request_of_several_rows_is_answered_with_as_many() -> None:
    arrays = {"image": numpy.arange(18, dtype="uint8").reshape(3, 2, 3), "scale": numpy.array([1, 2, 0.5], "float32")}
    with inferring() as (_, client):
        response = client.infer(request_of(arrays, id="the third", model_version="1"))
    assert (response.model_name, response.model_version, response.id) == ("arrays", "1", "the third")
    found = arrays_in(response)
    assert list(found) == ["image", "sum"]
    assert numpy.array_equal(found["image"], arrays["image"])
    assert found["sum"].tolist() == [15.0, 102.0, 43.5 + 0.0]


def test_the_step_is_a_parameter_of_the_response() -> None:
    with inferring(lambda batch: (dict(batch), -7)) as (_, client):
        assert client.infer(request_of()).parameters["step"].int64_param == -7


def test_the_inputs_may_come_in_any_order() -> None:
    arrays = dict(reversed(image_of(2).items()))
    with inferring() as (_, client):
        assert arrays_in(client.infer(request_of(arrays)))["sum"].tolist() == [12.0]


def test_each_row_of_dyna_has_its_own_action() -> None:
    arrays = {"data": numpy.arange(8, dtype="uint8").reshape(2, 4), "action": numpy.array([5, -6], "int32")}
    with inferring(echo, {"data": Array((4,), "uint8")}, model="dyna") as (_, client):
        found = arrays_in(client.infer(request_of(arrays, model_name="dyna")))
    assert found["data"].tolist() == arrays["data"].tolist()
    assert found["action"].tolist() == [5, -6]


EXTREMES = {
    "bool": [True, False],
    "float16": [65504, -0.5],
    "float32": [1.5, float("-inf")],
    "float64": [1e300, float("nan")],
    **{
        dtype: [numpy.iinfo(dtype).max, numpy.iinfo(dtype).min]
        for dtype in DATATYPES
        if dtype.startswith(("int", "uint"))
    },
}


@pytest.mark.parametrize("dtype", DATATYPES)
def test_every_datatype_arrives_and_returns_as_it_was(dtype: str) -> None:
    datatype, contents = DATATYPES[dtype]
    value = numpy.array([EXTREMES[dtype]], dtype)
    request = request_of({"x": value})
    with inferring(echo, {"x": Array((2,), dtype)}) as (_, client):
        assert described(client.call("ModelMetadata", name="arrays").inputs) == [("x", datatype, [-1, 2])]
        response = client.infer(request)
        assert response.outputs[0].datatype == datatype
        assert response.raw_output_contents[0] == value.tobytes()
        if contents is not None:
            del request.raw_input_contents[:]
            getattr(request.inputs[0].contents, contents).extend(value[0].tolist())
            assert client.infer(request).raw_output_contents[0] == value.tobytes()


def test_bfloat16_is_bf16() -> None:
    ml_dtypes = pytest.importorskip("ml_dtypes")
    value = numpy.array([[1.5, -2.0]], ml_dtypes.bfloat16)
    request = messages.ModelInferRequest(model_name="arrays", raw_input_contents=[value.tobytes()])
    request.inputs.add(name="x", datatype="BF16", shape=(1, 2))
    with inferring(echo, {"x": Array((2,), "bfloat16")}) as (_, client):
        response = client.infer(request)
    assert (response.outputs[0].datatype, response.raw_output_contents[0]) == ("BF16", value.tobytes())


def test_only_the_requested_outputs_are_sent_in_the_order_of_the_request() -> None:
    request = request_of()
    with inferring() as (_, client):
        request.outputs.add(name="sum")
        assert list(arrays_in(client.infer(request))) == ["sum"]
        request.outputs.add(name="image")
        assert list(arrays_in(client.infer(request))) == ["sum", "image"]


def test_a_callback_may_return_no_outputs() -> None:
    with inferring(lambda batch: {}) as (_, client):
        response = client.infer(request_of(id="none"))
    assert (response.id, list(response.outputs)) == ("none", [])


def test_compressed_requests_are_read() -> None:
    with inferring() as (_, client):
        assert client.infer(request_of(image_of(1)), compression=grpc.Compression.Gzip).outputs[1].name == "sum"


def test_requests_of_both_protocols_share_a_batch() -> None:
    with Held(double) as held, inferring(held) as (batcher, client), connect(batcher, arrays=True) as own:
        first = client.begin(request_of())
        eventually(lambda: held.batches)
        second = client.begin(request_of(image_of(2, rows=2)))
        waiting(batcher, 1)
        third = in_background(own.send_request, **{name: array[0] for name, array in image_of(3).items()})
        waiting(batcher, 2)
        held.release(2)
        assert arrays_in(first.result())["sum"].tolist() == [6.0]
        assert arrays_in(second.result())["sum"].tolist() == [12.0, 12.0]
        assert third.result()[0]["sum"] == 18.0
        metrics = batcher.metrics()
    assert (sum(metrics.batches.values()), metrics.batched_requests, metrics.batched_rows) == (2, 3, 4)
    assert metrics.requests["OK"] == 3


# ---- what is wrong with a request ----


def changed(change: Callable[[messages.ModelInferRequest], object], **fields: Any) -> messages.ModelInferRequest:
    request = request_of(image_of(1, rows=2), **fields)
    change(request)
    return request


def with_contents(request: messages.ModelInferRequest, **contents: Any) -> None:
    """Give the first input's values in `contents`, and none raw."""
    del request.raw_input_contents[:]
    request.inputs[0].contents.CopyFrom(messages.InferTensorContents(**contents))


WRONG: dict[str, tuple[Callable[[messages.ModelInferRequest], object], str]] = {
    "an unknown input": (
        lambda request: setattr(request.inputs[0], "name", "images"),
        r"the request has an input 'images'; this model takes 'image', 'scale'",
    ),
    "an input twice": (
        lambda request: setattr(request.inputs[1], "name", "image"),
        r"the request has the input 'image' twice",
    ),
    "no inputs": (
        lambda request: (request.ClearField("inputs"), request.ClearField("raw_input_contents")),
        r"the request has no input 'image'; this model takes 'image', 'scale'",
    ),
    "an input missing": (
        lambda request: (request.inputs.pop(), request.raw_input_contents.pop()),
        r"the request has no input 'scale'; this model takes 'image', 'scale'",
    ),
    "another datatype": (
        lambda request: setattr(request.inputs[0], "datatype", "INT8"),
        r"'image' is INT8 \[2, 2, 3\]; this model takes UINT8 \[rows, 2, 3\]",
    ),
    "no datatype": (lambda request: request.inputs[0].ClearField("datatype"), r"'image' is  \[2, 2, 3\]; this .*"),
    "another shape": (
        lambda request: request.inputs[0].shape.__setitem__(1, 4),
        r"'image' is UINT8 \[2, 4, 3\]; this model takes UINT8 \[rows, 2, 3\]",
    ),
    "no axis of rows": (
        lambda request: request.inputs[0].shape.pop(0),
        r"'image' is UINT8 \[2, 3\]; this model takes UINT8 \[rows, 2, 3\]",
    ),
    "no shape": (lambda request: request.inputs[0].ClearField("shape"), r"'image' is UINT8 \[\]; this model takes .*"),
    "a long shape": (
        lambda request: request.inputs[0].shape.extend([1] * 9),
        r"'image' is UINT8 \[2, 2, 3, 1, 1, 1, 1, 1, \.\.\.\]; this model takes .*",
    ),
    "no rows": (
        lambda request: request.inputs[0].shape.__setitem__(0, 0),
        r"'image' is UINT8 \[0, 2, 3\]; this model takes .*",
    ),
    "a negative number of rows": (
        lambda request: request.inputs[0].shape.__setitem__(0, -1),
        r"'image' is UINT8 \[-1, 2, 3\]; this model takes .*",
    ),
    "different numbers of rows": (
        lambda request: request.inputs[1].shape.__setitem__(0, 1),
        r"'scale' has 1 rows, the inputs before it 2; they must agree",
    ),
    "more rows than a batch": (
        lambda request: [tensor.shape.__setitem__(0, 2**62) for tensor in request.inputs],
        r"the request has 4611686018427387904 rows; this batcher takes from 1 to 8",
    ),
    "too few bytes": (
        lambda request: request.raw_input_contents.__setitem__(0, b"12345"),
        r"image has 5 bytes; 2 rows of uint8 \[2, 3\] have 12",
    ),
    "too many bytes": (
        lambda request: request.raw_input_contents.__setitem__(1, bytes(12)),
        r"scale has 12 bytes; 2 rows of float32 \[\] have 8",
    ),
    "fewer contents than inputs": (
        lambda request: request.raw_input_contents.pop(),
        r"the request has 2 inputs, but 1 raw_input_contents",
    ),
    "contents twice": (
        lambda request: request.inputs[1].contents.fp32_contents.append(1),
        r"'scale' has both contents and raw_input_contents; send one of them",
    ),
    "no contents": (
        lambda request: request.ClearField("raw_input_contents"),
        r"'image' is UINT8 \[2, 2, 3\] with 0 values in uint_contents; it must have 12",
    ),
    "typed contents of another type": (
        lambda request: with_contents(request, int_contents=[1] * 12),
        r"'image' is UINT8 \[2, 2, 3\] with 0 values in uint_contents; it must have 12",
    ),
    "too many values": (
        lambda request: with_contents(request, uint_contents=[1] * 13),
        r"'image' is UINT8 \[2, 2, 3\] with 13 values in uint_contents; it must have 12",
    ),
    "a value that is too large": (
        lambda request: with_contents(request, uint_contents=[256] * 12),
        r"'image' has values in uint_contents that UINT8 cannot hold",
    ),
    "an input in shared memory": (
        lambda request: (
            request.inputs[0]
            .parameters["shared_memory_region"]
            .MergeFrom(messages.InferParameter(string_param="region"))
        ),
        r"'image' is in shared memory, which this server does not have; send its contents",
    ),
    "an output twice": (
        lambda request: [request.outputs.add(name=name) for name in ("sum", "image", "sum")],
        r"the request asks for the output 'sum' twice",
    ),
    "an output in shared memory": (
        lambda request: request.outputs.add(name="sum").parameters["shared_memory_region"].SetInParent(),
        r"the output 'sum' is requested in shared memory, which this server does not have",
    ),
    "a classification": (
        lambda request: request.outputs.add(name="sum").parameters["classification"].SetInParent(),
        r"the output 'sum' is requested as a classification, which this server does not make; .*",
    ),
    "a sequence": (
        lambda request: request.parameters["sequence_id"].MergeFrom(messages.InferParameter(int64_param=3)),
        r"the request asks for a sequence, but this server keeps nothing between requests \(sequence_id\)",
    ),
    "an unknown output": (
        lambda request: request.outputs.add(name="logits"),
        r"the request asks for an output 'logits'; there are image, sum",
    ),
}


@pytest.mark.parametrize("name", WRONG)
def test_a_wrong_request_is_refused_and_the_next_one_answered(name: str) -> None:
    change, details = WRONG[name]
    with inferring() as (batcher, client):
        code, said = error_of(client.infer, changed(change))
        assert code == grpc.StatusCode.INVALID_ARGUMENT
        assert re.fullmatch(details, said), said
        assert arrays_in(client.infer(request_of()))["sum"].tolist() == [6.0]
        eventually(lambda: batcher.metrics().requests == {"INVALID_ARGUMENT": 1, "OK": 1})


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_halves_may_only_come_raw(dtype: str) -> None:
    if dtype == "bfloat16":
        pytest.importorskip("ml_dtypes")
    datatype = "FP16" if dtype == "float16" else "BF16"
    request = messages.ModelInferRequest(model_name="arrays")
    request.inputs.add(name="x", datatype=datatype, shape=(1,)).contents.fp32_contents.append(1)
    with inferring(echo, {"x": Array((), dtype)}) as (_, client):
        assert error_of(client.infer, request) == (
            grpc.StatusCode.INVALID_ARGUMENT,
            f"'x' is {datatype}, which only raw_input_contents can hold",
        )


# Neither a field, nor a name in UTF-8: protobuf 3.20 raises something else for the second.
NO_REQUESTS = (b"\xff\xff\xff", b"\x0a\x01\xff")


@pytest.mark.parametrize("message", NO_REQUESTS)
def test_bytes_that_are_no_request_are_refused(message: bytes) -> None:
    with inferring() as (_, client):
        code, details = error_of(client.unary, "ModelInfer", message)
        assert code == grpc.StatusCode.INVALID_ARGUMENT
        assert details.startswith(f"{len(message)} bytes that are not a ModelInferRequest: ")
        assert client.infer(request_of()).outputs


@pytest.mark.parametrize(
    ("fields", "details"),
    [
        ({"model_name": "resnet"}, "the model is 'resnet'; this server has 'arrays'"),
        ({"model_name": ""}, "the model is ''; this server has 'arrays'"),
        ({"model_version": "2"}, "the version is '2'; this server has '1' of 'arrays'"),
    ],
)
def test_another_model_or_version_is_not_found(fields: dict[str, str], details: str) -> None:
    with inferring() as (batcher, client):
        assert error_of(client.infer, request_of(**fields)) == (grpc.StatusCode.NOT_FOUND, details)
        eventually(lambda: batcher.metrics().requests == {"NOT_FOUND": 1})


def test_a_request_for_an_unknown_output_spoils_nothing_for_the_others_in_its_batch() -> None:
    wrong = request_of(image_of(2))
    wrong.outputs.add(name="logits")
    with Held(double) as held, inferring(held) as (batcher, client):
        first = client.begin(request_of())
        eventually(lambda: held.batches)
        second, third = client.begin(wrong), client.begin(request_of(image_of(3)))
        waiting(batcher, 2)
        held.release(2)
        assert error_of(second.result)[0] == grpc.StatusCode.INVALID_ARGUMENT
        assert arrays_in(third.result())["sum"].tolist() == [18.0]
        assert first.result().outputs


# ---- what is wrong with the callback, and limits ----


def test_a_callback_that_raises_is_an_internal_error() -> None:
    def fail(batch: Batch) -> Any:
        raise ValueError("no weights")

    with inferring(fail) as (_, client):
        assert error_of(client.infer, request_of()) == (
            grpc.StatusCode.INTERNAL,
            "the callback raised ValueError: no weights",
        )


def test_a_row_that_fails_fails_its_request_alone() -> None:
    def fail_two(batch: Batch) -> Any:
        for row in numpy.flatnonzero(batch["image"][: batch.count, 0, 0] == 2):
            batch.fail(int(row), ValueError("two"))
        return double(batch)

    with Held(fail_two) as held, inferring(held) as (batcher, client):
        first = client.begin(request_of())
        eventually(lambda: held.batches)
        second, third = client.begin(request_of(image_of(2))), client.begin(request_of(image_of(3)))
        waiting(batcher, 2)
        held.release(2)
        code, details = error_of(second.result)
        assert (code, "two" in details) == (grpc.StatusCode.INTERNAL, True)
        assert arrays_in(third.result())["sum"].tolist() == [18.0]
        assert first.result().outputs


def test_an_output_without_a_datatype_is_an_internal_error() -> None:
    with inferring(lambda batch: {"z": batch["image"].astype("complex64")}) as (_, client):
        code, details = error_of(client.infer, request_of())
        assert code == grpc.StatusCode.INTERNAL
        assert details.startswith("'z' is complex64, for which the Open Inference Protocol has no datatype; ")
        assert error_of(client.call, "ModelMetadata", name="arrays") == (code, details)


def test_an_input_without_a_datatype_is_refused_when_the_batcher_is_created() -> None:
    with pytest.raises(ValueError, match="'z' is complex64, for which the Open Inference Protocol has no datatype; "):
        create_batcher("arrays", 1, 0, batch_process_fn=echo, arrays={"z": Array((), "complex64")}, open_inference=True)


@pytest.mark.parametrize(
    ("options", "details"),
    [
        ({"open_inference": True}, "open_inference is True, which needs arrays="),
        ({"model_name": "m"}, "model_name is 'm', but only open_inference=True gives the model a name"),
        (
            {"model_name": "", "open_inference": True, "arrays": {"data": Array((), "uint8")}},
            "model_name is ''; it must be a text that is not empty",
        ),
    ],
)
def test_create_batcher_says_what_the_protocol_needs(options: dict[str, Any], details: str) -> None:
    with pytest.raises(ValueError, match=f"^{re.escape(details)}$"):
        create_batcher("repr", 1, 0, batch_process_fn=echo, **options)


def test_a_request_past_a_limit_is_refused() -> None:
    with Held(double) as held, inferring(held, batch_size=1, max_queue_size=1) as (batcher, client):
        first = client.begin(request_of())
        eventually(lambda: held.batches)
        second = client.begin(request_of())
        waiting(batcher, 1)
        code, details = error_of(client.infer, request_of())
        assert code == grpc.StatusCode.RESOURCE_EXHAUSTED
        assert details.endswith("(max_queue_size)")
        held.release(2)
        assert first.result().outputs
        assert second.result().outputs


def test_a_stream_counts_once_towards_max_streams_and_so_does_a_call() -> None:
    refusal = (
        grpc.StatusCode.RESOURCE_EXHAUSTED,
        "2 streams are open, which is the most allowed (max_streams)",
    )
    with Held(double) as held, inferring(held, max_streams=2) as (batcher, client), client.stream() as stream:
        stream.send(*[request_of()] * 3)
        eventually(lambda: in_flight(batcher) == 3)
        call = client.begin(request_of())
        eventually(lambda: in_flight(batcher) == 4)
        assert error_of(client.infer, request_of()) == refusal
        with client.stream() as another:
            assert error_of(another.receive) == refusal
        held.release(4)
        assert [len(stream.receive().infer_response.outputs) for _ in range(3)] == [2, 2, 2]
        assert call.result().outputs


def test_a_request_that_is_too_large_is_refused() -> None:
    with inferring(max_message_bytes=1000) as (_, client):
        assert error_of(client.infer, request_of(id="x" * 1000))[0] == grpc.StatusCode.RESOURCE_EXHAUSTED
        assert client.infer(request_of()).outputs


class _Token(grpc.ServerInterceptor):  # type: ignore[misc]
    """Lets in those who say the word."""

    def intercept_service(self, continuation: Any, details: grpc.HandlerCallDetails) -> Any:
        if ("word", "sesame") in details.invocation_metadata:
            return continuation(details)
        return grpc.unary_unary_rpc_method_handler(
            lambda _, context: context.abort(grpc.StatusCode.UNAUTHENTICATED, "say the word")
        )


def test_an_interceptor_decides_who_is_answered() -> None:
    with inferring(interceptors=[_Token()]) as (_, client):
        assert error_of(client.infer, request_of()) == (grpc.StatusCode.UNAUTHENTICATED, "say the word")
        assert client.infer(request_of(), metadata=(("word", "sesame"),)).outputs
        with client.stream(metadata=(("word", "sesame"),)) as stream:
            stream.send(request_of())
            assert stream.receive().infer_response.outputs


# ---- streams ----


def test_a_streams_requests_are_answered_in_their_order_with_their_ids() -> None:
    with inferring() as (_, client), client.stream() as stream:
        stream.send(*(request_of(image_of(value), id=f"request {value}") for value in range(30)))
        stream.half_close()
        responses = [response.infer_response for response in stream.call]
        assert [response.id for response in responses] == [f"request {value}" for value in range(30)]
        assert [arrays_in(response)["sum"].item() for response in responses] == [6 * value for value in range(30)]
        assert stream.call.code() == grpc.StatusCode.OK


def test_the_requests_of_one_stream_share_a_batch() -> None:
    with Held(double) as held, inferring(held) as (batcher, client), client.stream() as stream:
        stream.send(request_of())
        eventually(lambda: held.batches)
        stream.send(*(request_of(image_of(value)) for value in range(5)))
        waiting(batcher, 5)
        held.release(2)
        assert [arrays_in(stream.receive().infer_response)["sum"].item() for _ in range(6)] == [6, 0, 6, 12, 18, 24]
        assert sum(batcher.metrics().batches.values()) == 2


def test_an_error_of_a_stream_is_in_band_and_the_stream_goes_on() -> None:
    def fail_nine(batch: Batch) -> Any:
        for row in numpy.flatnonzero(batch["image"][: batch.count, 0, 0] == 9):
            batch.fail(int(row), ValueError("nine"))
        return double(batch)

    unknown_output = request_of(id="b")
    unknown_output.outputs.add(name="logits")
    with inferring(fail_nine) as (batcher, client), client.stream() as stream:
        stream.send(
            request_of(id="a", model_name="resnet"),
            unknown_output,
            request_of({"image": image_of(1)["image"]}, id="c"),
            request_of(image_of(9), id="d"),
            request_of(id="e"),
        )
        stream.half_close()
        responses = list(stream.call)
        assert stream.call.code() == grpc.StatusCode.OK
        assert [response.infer_response.id for response in responses] == list("abcde")
        assert [response.error_message for response in responses[:3]] == [
            "the model is 'resnet'; this server has 'arrays'",
            "the request asks for an output 'logits'; there are image, sum",
            "the request has no input 'scale'; this model takes 'image', 'scale'",
        ]
        assert "nine" in responses[3].error_message
        assert [len(response.infer_response.outputs) for response in responses] == [0, 0, 0, 0, 2]
        eventually(
            lambda: batcher.metrics().requests == {"NOT_FOUND": 1, "INVALID_ARGUMENT": 2, "INTERNAL": 1, "OK": 1}
        )


@pytest.mark.parametrize("message", NO_REQUESTS)
def test_bytes_that_are_no_request_are_an_error_in_band(message: bytes) -> None:
    with inferring() as (batcher, _), grpc.insecure_channel(address_of(batcher)) as channel:
        call = channel.stream_stream(PREFIX + "ModelStreamInfer")(iter((message, request_of().SerializeToString())))
        garbage, good = map(messages.ModelStreamInferResponse.FromString, call)
        assert garbage.error_message.startswith(f"{len(message)} bytes that are not a ModelInferRequest: ")
        assert good.infer_response.outputs


def test_a_response_is_marked_as_final_for_callers_who_ask_for_that() -> None:
    asking = request_of()
    asking.parameters["triton_enable_empty_final_response"].bool_param = True
    with inferring() as (_, client), client.stream() as stream:
        stream.send(request_of(), asking)
        plain, marked = (stream.receive().infer_response for _ in range(2))
    assert "triton_final_response" not in plain.parameters
    assert marked.parameters["triton_final_response"].bool_param


def test_a_stream_that_is_cancelled_drops_its_requests() -> None:
    with Held(double) as held, inferring(held) as (batcher, client):
        with client.stream() as stream:
            stream.send(request_of())
            eventually(lambda: held.batches)
            stream.send(*[request_of()] * 5)
            waiting(batcher, 5)
            stream.call.cancel()
            waiting(batcher, 0)
        eventually(lambda: batcher.metrics().requests == {"CANCELLED": 6})
        held.release(2)
        assert client.infer(request_of()).outputs
        assert held.batches[1:] != []
        assert batcher.metrics().batched_requests == 2


def test_a_stream_has_at_most_two_batches_worth_of_requests_in_flight() -> None:
    order: list[int] = []

    def note(batch: Batch) -> Any:
        order.extend(batch["image"][: batch.count, 0, 0].tolist())
        return double(batch)

    with (
        Held(note) as held,
        inferring(held, batch_size=2) as (batcher, client),
        client.stream() as stream,
        client.stream() as other,
    ):
        stream.send(*(request_of(image_of(value)) for value in range(20)))
        eventually(lambda: in_flight(batcher) == 4)
        other.send(request_of(image_of(100)))
        eventually(lambda: in_flight(batcher) == 5)
        held.release(float("inf"))
        sums = [arrays_in(stream.receive().infer_response)["sum"].item() for _ in range(20)]
        assert sums == [6 * value for value in range(20)]
        assert other.receive().infer_response.outputs
    assert order[:5] == [0, 1, 2, 3, 100]


def test_a_stream_without_requests_ends_when_its_caller_is_done() -> None:
    with inferring() as (_, client), client.stream() as stream:
        stream.half_close()
        assert list(stream.call) == []
        assert stream.call.code() == grpc.StatusCode.OK


# ---- the window ----


def test_a_lone_caller_does_not_wait_for_the_window() -> None:
    with inferring(batch_timeout_s=0.05) as (batcher, client):
        for _ in range(6):
            client.infer(request_of())
        assert batcher.metrics().batches == {"full": 0, "everyone_in": 5, "timeout": 1, "drain": 0}


def test_a_lone_stream_does_not_wait_for_the_window() -> None:
    with inferring(batch_timeout_s=0.05) as (batcher, client), client.stream() as stream:
        for _ in range(30):
            stream.send(request_of())
            stream.receive()
        assert batcher.metrics().batches == {"full": 0, "everyone_in": 29, "timeout": 1, "drain": 0}


def test_places_that_nobody_uses_are_given_up() -> None:
    with Held(double) as held, inferring(held) as (batcher, client):
        calls = [client.begin(request_of()) for _ in range(6)]
        eventually(lambda: in_flight(batcher) == 6)
        held.release(float("inf"))
        for call in calls:
            assert call.result().outputs
        assert batcher.metrics().open_streams == 6

        def is_one_left() -> bool:
            client.infer(request_of())
            return batcher.metrics().open_streams == 1

        eventually(is_one_left)


# ---- deadlines, callers that leave, shutdown ----


def test_a_request_that_waits_past_its_deadline_never_reaches_the_callback() -> None:
    with Held(double) as held, inferring(held) as (batcher, client):
        first = client.begin(request_of())
        eventually(lambda: held.batches)
        assert error_of(client.infer, request_of(), timeout=0.2)[0] == grpc.StatusCode.DEADLINE_EXCEEDED
        waiting(batcher, 0)
        held.release(2)
        assert first.result().outputs
        assert client.infer(request_of()).outputs
        metrics = batcher.metrics()
    # Either end may be the first to find that the time is over.
    assert metrics.requests["OK"] == 2
    assert set(metrics.requests) - {"OK"} <= {"DEADLINE_EXCEEDED", "CANCELLED"}
    assert metrics.batched_requests == 2


def test_a_request_whose_caller_leaves_never_reaches_the_callback() -> None:
    with Held(double) as held, inferring(held) as (batcher, client):
        first = client.begin(request_of())
        eventually(lambda: held.batches)
        second = client.begin(request_of())
        waiting(batcher, 1)
        second.cancel()
        waiting(batcher, 0)
        eventually(lambda: batcher.metrics().requests == {"CANCELLED": 1})
        held.release(2)
        assert first.result().outputs
        assert client.infer(request_of()).outputs
        assert batcher.metrics().batched_requests == 2


def test_a_caller_who_leaves_while_the_callback_runs_disturbs_nobody() -> None:
    with Held(double) as held, inferring(held) as (batcher, client):
        first = client.begin(request_of())
        eventually(lambda: held.batches)
        first.cancel()
        eventually(lambda: batcher.metrics().requests == {"CANCELLED": 1})
        second = client.begin(request_of(image_of(2)))
        waiting(batcher, 1)
        held.release(2)
        assert arrays_in(second.result())["sum"].tolist() == [12.0]


def test_a_shutdown_answers_what_is_in_flight_and_refuses_the_rest() -> None:
    unavailable = (grpc.StatusCode.UNAVAILABLE, "the batcher is shutting down")
    with Held(double) as held, inferring(held) as (batcher, client), client.stream() as stream, client.stream() as idle:
        idle.send(request_of())
        eventually(lambda: held.batches)
        held.release()
        assert idle.receive().infer_response.outputs
        call = client.begin(request_of())
        eventually(lambda: len(held.batches) == 2)
        stream.send(request_of(id="in flight"))
        waiting(batcher, 1)
        shutdown = in_background(batcher.shutdown, 30)
        eventually(lambda: not client.call("ServerReady").ready)
        assert not client.call("ModelReady", name="arrays").ready
        assert client.call("ServerLive").live
        assert error_of(client.infer, request_of()) == unavailable
        with client.stream() as another:
            assert error_of(another.receive) == unavailable
        stream.send(request_of(id="late"))
        eventually(lambda: batcher.metrics().requests.get("UNAVAILABLE"))
        held.release(2)
        assert call.result().outputs
        in_flight_response, late = stream.receive(), stream.receive()
        assert (in_flight_response.infer_response.id, in_flight_response.error_message) == ("in flight", "")
        assert (late.infer_response.id, late.error_message) == ("late", unavailable[1])
        assert error_of(stream.receive) == unavailable
        assert error_of(idle.receive) == unavailable
        shutdown.result()


def test_requests_without_an_answer_at_the_end_of_the_grace_period_are_told_so() -> None:
    details = "the batcher is shutting down, and its grace period ended before the answer came"
    with Held(double) as held, inferring(held) as (batcher, client), client.stream() as stream:
        call = client.begin(request_of())
        eventually(lambda: held.batches)
        stream.send(request_of(id="waiting"))
        waiting(batcher, 1)
        shutdown = in_background(batcher.shutdown, 0.2)
        assert (call.code(), call.details()) == (grpc.StatusCode.UNAVAILABLE, details)
        response = stream.receive()
        assert (response.infer_response.id, response.error_message) == ("waiting", details)
        assert error_of(stream.receive) == (grpc.StatusCode.UNAVAILABLE, "the batcher is shutting down")
        held.release(2)
        shutdown.result()


# ---- the command line ----


def test_the_command_line_serves_the_protocol(tmp_path: Path) -> None:
    (tmp_path / "model.py").write_text(
        "from grpc_batcher import Array, arrays\n\n\n"
        "@arrays(x=Array((2,), 'float32'))\n"
        "def negate(batch):\n"
        "    return {'y': -batch['x']}\n"
    )
    program = start_program(
        tmp_path,
        "from grpc_batcher.__main__ import main\nmain()\n",
        *["serve", "model:negate", "--model", "arrays", "--batch-size", "4", "--batch-timeout-s", "0"],
        *["--host", "127.0.0.1", "--port", "0", "--open-inference", "--model-name", "negate"],
    )
    with program:
        port = program.read_line().rpartition(":")[2]
        with grpc.insecure_channel(f"127.0.0.1:{port}") as channel:
            request = request_of({"x": numpy.array([[1, 2]], "float32")}, model_name="negate")
            response = channel.unary_unary(PREFIX + "ModelInfer")(request.SerializeToString(), wait_for_ready=True)
        assert arrays_in(messages.ModelInferResponse.FromString(response))["y"].tolist() == [[-1, -2]]
        program.send_signal(signal.SIGTERM)
        status, _, errors = finish_program(program)
    assert status == 0, errors
