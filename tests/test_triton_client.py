"""Triton's own client, unchanged, against a batcher in the same process. `make test-triton` runs these.

tritonclient needs an older protobuf than the other tests, so it is not in the extra `test`.
"""

from __future__ import annotations

import asyncio
import queue
import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from grpc_batcher import Array, Batch, MukoeBatcher, __version__
from grpc_batcher._proto import open_inference_pb2

import pytest
from serving import Held, address_of, connect, eventually, in_background, run_program, serving, start_program

grpcclient = pytest.importorskip("tritonclient.grpc")
aioclient = pytest.importorskip("tritonclient.grpc.aio")
service_pb2 = pytest.importorskip("tritonclient.grpc.service_pb2")
model_config_pb2 = pytest.importorskip("tritonclient.grpc.model_config_pb2")
numpy = pytest.importorskip("numpy")

ROOT = Path(__file__).resolve().parent.parent
PAGE = ROOT / "docs" / "open-inference.md"

DTYPES = {
    "BOOL": "bool",
    "UINT8": "uint8",
    "UINT16": "uint16",
    "UINT32": "uint32",
    "UINT64": "uint64",
    "INT8": "int8",
    "INT16": "int16",
    "INT32": "int32",
    "INT64": "int64",
    "FP16": "float16",
    "FP32": "float32",
    "FP64": "float64",
    "BF16": "bfloat16",
}


def add(batch: Batch) -> Any:
    return {"sum": batch["a"] + batch["b"], "difference": batch["a"] - batch["b"]}, 12


@contextmanager
def triton(
    callback: Callable[[Batch], Any] = add, arrays: Mapping[str, Array] | None = None, **options: Any
) -> Iterator[tuple[MukoeBatcher, Any]]:
    """A batcher with the model "adder", and Triton's client of it."""
    arrays = arrays or {"a": Array((4,), "float32"), "b": Array((4,), "float32")}
    options = {"model": "arrays", "model_name": "adder", **options}
    with (
        serving(callback, arrays=arrays, open_inference=True, **options) as batcher,
        grpcclient.InferenceServerClient(address_of(batcher)) as client,
    ):
        yield batcher, client


def inputs(a: float, b: float = 1, rows: int = 1, module: Any = grpcclient) -> list[Any]:
    made = []
    for name, value in (("a", a), ("b", b)):
        made.append(module.InferInput(name, [rows, 4], "FP32"))
        made[-1].set_data_from_numpy(numpy.full((rows, 4), value, "float32"))
    return made


def error_of(function: Callable[..., Any], *args: Any, **kwargs: Any) -> tuple[str, str]:
    with pytest.raises(grpcclient.InferenceServerException) as caught:
        function(*args, **kwargs)
    return caught.value.status(), caught.value.message()


# ---- infer ----


def test_infer_is_answered() -> None:
    with triton() as (_, client):
        result = client.infer("adder", inputs(2, rows=3), request_id="the id", model_version="1")
        response = result.get_response()
    assert (response.id, response.model_name, response.model_version) == ("the id", "adder", "1")
    assert response.parameters["step"].int64_param == 12
    assert numpy.array_equal(result.as_numpy("sum"), numpy.full((3, 4), 3, "float32"))
    assert numpy.array_equal(result.as_numpy("difference"), numpy.full((3, 4), 1, "float32"))


def test_infer_returns_only_the_requested_outputs() -> None:
    with triton() as (_, client):
        result = client.infer("adder", inputs(2), outputs=[grpcclient.InferRequestedOutput("difference")])
    assert result.as_numpy("sum") is None
    assert result.as_numpy("difference").tolist() == [[1, 1, 1, 1]]


@pytest.mark.parametrize("algorithm", ["gzip", "deflate"])
def test_infer_may_compress(algorithm: str) -> None:
    with triton() as (_, client):
        assert client.infer("adder", inputs(2), compression_algorithm=algorithm).as_numpy("sum")[0, 0] == 3


@pytest.mark.parametrize("datatype", DTYPES)
def test_every_datatype_returns_as_it_was(datatype: str) -> None:
    if datatype == "BF16":
        pytest.importorskip("ml_dtypes")
    given = numpy.array([[0, 1, 2]], DTYPES[datatype])
    tensor = grpcclient.InferInput("x", [1, 3], datatype)
    tensor.set_data_from_numpy(given)
    with triton(lambda batch: {"y": batch["x"]}, {"x": Array((3,), DTYPES[datatype])}) as (_, client):
        result = client.infer("adder", [tensor])
        assert client.get_model_metadata("adder").outputs[0].datatype == datatype
    assert result.get_output("y").datatype == datatype
    assert result.as_numpy("y").tolist() == given.tolist()


def test_async_infer_is_answered_and_shares_batches_with_the_librarys_own_client() -> None:
    results: queue.SimpleQueue[Any] = queue.SimpleQueue()
    with Held(add) as held, triton(held) as (batcher, client), connect(batcher, arrays=True) as own:

        def begin(a: float) -> None:
            client.async_infer("adder", inputs(a), lambda result, error: results.put((result, error)))

        begin(0)
        eventually(lambda: held.batches)
        for a in (1, 2, 3):
            begin(a)
        mine = in_background(own.send_request, a=numpy.full(4, 4, "float32"), b=numpy.full(4, 1, "float32"))
        eventually(lambda: batcher.metrics().waiting == 4)
        held.release(2)
        answers = [results.get() for _ in range(4)]
        assert mine.result()[0]["sum"].tolist() == [5, 5, 5, 5]
        assert batcher.metrics().batched_requests == 5
    assert [error for _, error in answers] == [None] * 4
    assert sorted(result.as_numpy("sum")[0, 0] for result, _ in answers) == [1, 2, 3, 4]
    assert len(held.batches) == 2


def test_the_client_for_asyncio_is_answered() -> None:
    async def ask(address: str) -> list[float]:
        async with aioclient.InferenceServerClient(address) as client:
            assert await client.is_server_live()
            asked = [client.infer("adder", inputs(a, module=aioclient)) for a in range(5)]
            return [result.as_numpy("sum")[0, 0] for result in await asyncio.gather(*asked)]

    with triton() as (batcher, _):
        assert asyncio.run(ask(address_of(batcher))) == [1, 2, 3, 4, 5]


# ---- streams ----


@contextmanager
def streaming(client: Any) -> Iterator[queue.SimpleQueue[tuple[Any, Any]]]:
    """A stream of Triton's client; yields where its results and errors arrive."""
    arrived: queue.SimpleQueue[tuple[Any, Any]] = queue.SimpleQueue()
    client.start_stream(lambda result, error: arrived.put((result, error)))
    try:
        yield arrived
    finally:
        client.stop_stream()


def test_a_stream_is_answered_in_order_with_the_ids() -> None:
    with triton() as (_, client), streaming(client) as arrived:
        for number in range(20):
            client.async_stream_infer("adder", inputs(number), request_id=f"request {number}")
        for number in range(20):
            result, error = arrived.get()
            assert error is None
            assert result.get_response().id == f"request {number}"
            assert result.as_numpy("sum")[0, 0] == number + 1


def test_an_error_of_a_stream_is_in_band() -> None:
    with triton() as (_, client), streaming(client) as arrived:
        client.async_stream_infer("resnet", inputs(1))
        client.async_stream_infer("adder", inputs(1)[:1])
        client.async_stream_infer("adder", inputs(1), request_id="after the errors")
        messages = []
        for _ in range(2):
            result, error = arrived.get()
            assert result is None
            messages.append(error.message())
        assert messages == [
            "the model is 'resnet'; this server has 'adder'",
            "the request has no input 'b'; this model takes 'a', 'b'",
        ]
        result, error = arrived.get()
        assert (error, result.get_response().id) == (None, "after the errors")


def test_a_stream_marks_final_responses_if_asked() -> None:
    with triton() as (_, client), streaming(client) as arrived:
        client.async_stream_infer("adder", inputs(1), enable_empty_final_response=True)
        result, _ = arrived.get()
        assert result.get_response().parameters["triton_final_response"].bool_param


def test_a_stream_is_told_of_a_shutdown() -> None:
    with triton() as (batcher, client), streaming(client) as arrived:
        client.async_stream_infer("adder", inputs(1))
        assert arrived.get()[1] is None
        batcher.shutdown()
        result, error = arrived.get()
        assert (result, error.status(), error.message()) == (
            None,
            "StatusCode.UNAVAILABLE",
            "the batcher is shutting down",
        )


# ---- metadata and errors ----


def test_server_and_model_describe_themselves() -> None:
    with triton(warm_up=True) as (_, client):
        assert client.is_server_live()
        assert client.is_server_ready()
        assert client.is_model_ready("adder")
        assert client.is_model_ready("adder", "1")
        assert not client.is_model_ready("resnet")
        server = client.get_server_metadata()
        assert (server.name, server.version) == ("grpc_batcher", __version__)
        model = client.get_model_metadata("adder", as_json=True)
    described = {"datatype": "FP32", "shape": ["-1", "4"]}
    assert model == {
        "name": "adder",
        "versions": ["1"],
        "platform": "grpc_batcher",
        "inputs": [{"name": "a", **described}, {"name": "b", **described}],
        "outputs": [{"name": "sum", **described}, {"name": "difference", **described}],
    }


def test_the_configuration_and_the_statistics_are_there_for_tritons_tools() -> None:
    with triton(batch_timeout_s=0.001, warm_up=True) as (_, client):
        client.infer("adder", inputs(1, rows=2))
        config = client.get_model_config("adder").config
        (statistics,) = client.get_inference_statistics("adder").model_stats
    assert (config.name, config.max_batch_size, [each.name for each in config.input]) == ("adder", 8, ["a", "b"])
    assert config.WhichOneof("scheduling_choice") == "dynamic_batching"
    assert not config.model_transaction_policy.decoupled
    assert (statistics.inference_count, statistics.inference_stats.success.count) == (2, 1)


def test_errors_have_the_status_and_say_what_was_wrong() -> None:
    wrong_shape = grpcclient.InferInput("a", [1, 3], "FP32")
    wrong_shape.set_data_from_numpy(numpy.zeros((1, 3), "float32"))
    with triton() as (_, client):
        assert error_of(client.infer, "resnet", inputs(1)) == (
            "StatusCode.NOT_FOUND",
            "the model is 'resnet'; this server has 'adder'",
        )
        assert error_of(client.infer, "adder", inputs(1), model_version="4") == (
            "StatusCode.NOT_FOUND",
            "the version is '4'; this server has '1' of 'adder'",
        )
        assert error_of(client.infer, "adder", [wrong_shape, inputs(1)[1]]) == (
            "StatusCode.INVALID_ARGUMENT",
            "'a' is FP32 [1, 3]; this model takes FP32 [rows, 4]",
        )
        outputs = [grpcclient.InferRequestedOutput("product")]
        assert error_of(client.infer, "adder", inputs(1), outputs=outputs) == (
            "StatusCode.INVALID_ARGUMENT",
            "the request asks for an output 'product'; there are sum, difference",
        )


def test_a_client_timeout_ends_a_request() -> None:
    with Held(add) as held, triton(held) as (_, client):
        assert error_of(client.infer, "adder", inputs(1), client_timeout=0.2)[0] == "StatusCode.DEADLINE_EXCEEDED"


def test_what_is_not_there_says_so() -> None:
    shared = grpcclient.InferInput("a", [1, 4], "FP32")
    shared.set_shared_memory("region", 16)
    top = [grpcclient.InferRequestedOutput("sum", class_count=2)]
    with triton() as (_, client):
        for ask in (
            lambda: client.get_model_repository_index(),
            lambda: client.load_model("adder"),
            lambda: client.get_trace_settings(),
            lambda: client.register_system_shared_memory("region", "/region", 64),
        ):
            assert error_of(ask)[0] == "StatusCode.UNIMPLEMENTED"
        for ask in (
            lambda: client.infer("adder", [shared, inputs(1)[1]]),
            lambda: client.infer("adder", inputs(1), outputs=top),
            lambda: client.infer("adder", inputs(1), sequence_id=7, sequence_start=True),
        ):
            assert error_of(ask)[0] == "StatusCode.INVALID_ARGUMENT"


# ---- the two protos, and the page about them ----


def described(field: Any) -> dict[str, Any]:
    return {
        "number": field.number,
        "type": field.type,
        "repeated": field.label == field.LABEL_REPEATED,
        "message": field.message_type and field.message_type.full_name,
        "oneof": field.containing_oneof and field.containing_oneof.name,
    }


def messages_in(descriptor: Any) -> Iterator[Any]:
    for message in descriptor.values():
        yield message
        yield from messages_in(message.nested_types_by_name)


OUR_MESSAGES, THEIR_MESSAGES = (
    {
        message.full_name: message
        for module in modules
        for message in messages_in(module.DESCRIPTOR.message_types_by_name)
    }
    for modules in ([open_inference_pb2], [service_pb2, model_config_pb2])
)
# Of what describes a model and of what is counted, ours have only what a batcher fills in.
PARTIAL = {"inference.Model" + name for name in ("Config", "Input", "Output", "DynamicBatching", "Statistics")} | {
    "inference.InferStatistics"
}


@pytest.mark.parametrize("name", OUR_MESSAGES)
def test_a_message_has_the_fields_of_tritons(name: str) -> None:
    ours, theirs = (
        {field.name: described(field) for field in messages[name].fields} for messages in (OUR_MESSAGES, THEIR_MESSAGES)
    )
    assert ours == (theirs if name not in PARTIAL else {field: theirs[field] for field in ours})
    assert OUR_MESSAGES[name].GetOptions().map_entry == THEIR_MESSAGES[name].GetOptions().map_entry


def test_datatypes_have_the_numbers_of_tritons() -> None:
    assert dict(open_inference_pb2.DataType.items()) == dict(model_config_pb2.DataType.items())


def test_the_service_has_methods_of_tritons() -> None:
    (ours,) = open_inference_pb2.DESCRIPTOR.services_by_name.values()
    theirs = service_pb2.DESCRIPTOR.services_by_name[ours.name]
    assert ours.full_name == theirs.full_name
    assert len(ours.methods) == 9
    for method in ours.methods:
        same = theirs.methods_by_name[method.name]
        assert [end.full_name for end in (method.input_type, method.output_type)] == [
            end.full_name for end in (same.input_type, same.output_type)
        ]
        assert (method.client_streaming, method.server_streaming) == (same.client_streaming, same.server_streaming)


def test_the_script_on_the_page_is_answered_by_the_server_on_the_page(tmp_path: Path) -> None:
    server, script = re.findall(r"^```py\n(.*?)^```$", PAGE.read_text(), re.MULTILINE | re.DOTALL)
    address = "localhost:8001"
    assert (server.count("port=8001"), server.count("batcher.serve_forever()"), script.count(address)) == (1, 1, 1)
    server = server.replace("port=8001", "port=0").replace(
        "batcher.serve_forever()", "batcher.start()\nprint(batcher.port, flush=True)\ninput()"
    )
    (said,) = re.findall(r"^print\(.*\)  # (.*)$", script, re.MULTILINE)
    with start_program(tmp_path, server) as program:
        port = program.read_line()
        assert run_program(tmp_path, script.replace(address, f"localhost:{port}")) == [said]
