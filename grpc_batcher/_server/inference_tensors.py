"""Tensors of the Open Inference Protocol: from its requests to rows, and from an answer to its response."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from .. import _arrays
from .._array import Array, import_numpy
from .._models import BadRequestError
from .._proto.open_inference_pb2 import ModelInferRequest, ModelInferResponse, ModelMetadataResponse

# The protocol's datatypes (its "Tensor Data Types"; BF16 is Triton's), and where a request may have their values if
# not in raw_input_contents. Halves have no such place.
_DATATYPES = {
    "BOOL": ("bool", "bool_contents"),
    "UINT8": ("uint8", "uint_contents"),
    "UINT16": ("uint16", "uint_contents"),
    "UINT32": ("uint32", "uint_contents"),
    "UINT64": ("uint64", "uint64_contents"),
    "INT8": ("int8", "int_contents"),
    "INT16": ("int16", "int_contents"),
    "INT32": ("int32", "int_contents"),
    "INT64": ("int64", "int64_contents"),
    "FP16": ("float16", None),
    "FP32": ("float32", "fp32_contents"),
    "FP64": ("float64", "fp64_contents"),
    "BF16": ("bfloat16", None),
}
_CONTENTS_DTYPES = {
    "bool_contents": "bool",
    "int_contents": "int32",
    "int64_contents": "int64",
    "uint_contents": "uint32",
    "uint64_contents": "uint64",
    "fp32_contents": "float32",
    "fp64_contents": "float64",
}
_DATATYPE_OF = {dtype: datatype for datatype, (dtype, _contents) in _DATATYPES.items()}

STEP = "step"
_ACTION = "action"

_SHARED_MEMORY = "shared_memory_region"

# What a request may ask for an output and this server does not have. Other parameters, such as a priority, are hints.
_REFUSED_FOR_OUTPUTS = {
    _SHARED_MEMORY: "is requested in shared memory, which this server does not have",
    "classification": "is requested as a classification, which this server does not make; ask for the output",
}


class UnknownOutputError(Exception):
    """A requested output that the answer does not have; the text says which there are."""


class NoDatatypeError(ValueError):
    """A dtype for which the protocol has no datatype; the text says which."""


def datatype_of(name: str, dtype: str) -> str:
    """Return the protocol's name of a dtype. Raises NoDatatypeError; `name` is the array's."""
    try:
        return _DATATYPE_OF[dtype]
    except KeyError:
        raise NoDatatypeError(
            f"{name!r} is {dtype}, for which the Open Inference Protocol has no datatype; it has those for "
            f"{', '.join(_DATATYPE_OF)}"
        ) from None


class Inputs:
    """What a model takes: the declared arrays, and for "dyna" the action of each row.

    Raises NoDatatypeError if the protocol cannot express one of them.
    """

    def __init__(self, declared: Mapping[str, Array], *, takes_actions: bool) -> None:
        self._declared = dict(declared)
        if takes_actions:
            self._declared[_ACTION] = Array((), "int32")
        self._takes_actions = takes_actions
        self._datatypes = {name: datatype_of(name, array.dtype.name) for name, array in self._declared.items()}

    def describe(self) -> list[ModelMetadataResponse.TensorMetadata]:
        """The protocol's description of them: -1 stands for any number of rows."""
        return [tensor_metadata(name, array.dtype.name, array.shape) for name, array in self._declared.items()]

    def read(self, reader: _arrays.RequestReader, request: ModelInferRequest) -> _arrays.ArrayRequest:
        """Return a request's rows. Raises BadRequestError, and ArrayError for a wrong number of rows or bytes."""
        _check_what_is_asked_for(request)
        raw = request.raw_input_contents
        if raw and len(raw) != len(request.inputs):
            raise BadRequestError(f"the request has {len(request.inputs)} inputs, but {len(raw)} raw_input_contents")
        contents: dict[str, bytes] = {}
        rows = 0
        for index, tensor in enumerate(request.inputs):
            self._check(tensor, contents)
            if contents and tensor.shape[0] != rows:
                raise BadRequestError(
                    f"{tensor.name!r} has {tensor.shape[0]} rows, the inputs before it {rows}; they must agree"
                )
            rows = tensor.shape[0]
            if raw and tensor.HasField("contents"):
                raise BadRequestError(f"{tensor.name!r} has both contents and raw_input_contents; send one of them")
            contents[tensor.name] = raw[index] if raw else self._typed(tensor)
        if missing := [name for name in self._declared if name not in contents]:
            raise BadRequestError(f"the request has no input {missing[0]!r}; this model takes {self._names()}")
        actions = contents.pop(_ACTION) if self._takes_actions else None
        return reader.of_rows([contents[name] for name in self._declared if name in contents], rows, actions)

    def _check(self, tensor: ModelInferRequest.InferInputTensor, seen: Mapping[str, bytes]) -> None:
        name, shape = tensor.name, list(tensor.shape)
        if name not in self._declared:
            raise BadRequestError(f"the request has an input {name!r:.100}; this model takes {self._names()}")
        if name in seen:
            raise BadRequestError(f"the request has the input {name!r} twice")
        if _SHARED_MEMORY in tensor.parameters:
            raise BadRequestError(f"{name!r} is in shared memory, which this server does not have; send its contents")
        datatype, row_shape = self._datatypes[name], list(self._declared[name].shape)
        if tensor.datatype != datatype or len(shape) != 1 + len(row_shape) or shape[1:] != row_shape or shape[0] < 1:
            came = ", ".join([*map(str, shape[:8]), *(["..."] if len(shape) > 8 else [])])
            lengths = ", ".join(["rows", *map(str, row_shape)])
            raise BadRequestError(
                f"{name!r} is {tensor.datatype:.20} [{came}]; this model takes {datatype} [{lengths}]"
            )

    def _typed(self, tensor: ModelInferRequest.InferInputTensor) -> bytes:
        """Return the bytes of a tensor whose values are in its `contents`."""
        numpy = import_numpy()
        dtype, field = _DATATYPES[tensor.datatype]
        if field is None:
            raise BadRequestError(f"{tensor.name!r} is {tensor.datatype}, which only raw_input_contents can hold")
        values = getattr(tensor.contents, field)
        count = math.prod(tensor.shape)
        if len(values) != count:
            raise BadRequestError(
                f"{tensor.name!r} is {tensor.datatype} {list(tensor.shape)} with {len(values)} values in {field}; it "
                f"must have {count}"
            )
        given = numpy.array(values, _CONTENTS_DTYPES[field])
        array = given.astype(dtype)
        if not numpy.array_equal(array, given, equal_nan=array.dtype.kind == "f"):
            raise BadRequestError(f"{tensor.name!r} has values in {field} that {tensor.datatype} cannot hold")
        return array.tobytes()  # type: ignore[no-any-return]

    def _names(self) -> str:
        return ", ".join(map(repr, self._declared))


def tensor_metadata(name: str, dtype: str, row_shape: Sequence[int]) -> ModelMetadataResponse.TensorMetadata:
    """Describe a tensor with any number of rows. Raises NoDatatypeError."""
    return ModelMetadataResponse.TensorMetadata(name=name, datatype=datatype_of(name, dtype), shape=(-1, *row_shape))


def _check_what_is_asked_for(request: ModelInferRequest) -> None:
    if "sequence_id" in request.parameters:
        raise BadRequestError(
            "the request asks for a sequence, but this server keeps nothing between requests (sequence_id)"
        )
    names: set[str] = set()
    for output in request.outputs:
        if output.name in names:  # each would be a copy in the response
            raise BadRequestError(f"the request asks for the output {output.name!r:.100} twice")
        names.add(output.name)
        for name, problem in _REFUSED_FOR_OUTPUTS.items():
            if name in output.parameters:
                raise BadRequestError(f"the output {output.name!r:.100} {problem}")


class Wanted:
    """What must be known of a request until it is answered; its inputs are not.

    outputs: the names of the requested outputs; none stands for all.
    marks_final: whether a streamed response says that it is the last for its request, as every one is.
    """

    def __init__(self, request: ModelInferRequest) -> None:
        self.id = request.id
        self.model_name = request.model_name
        self.outputs = [output.name for output in request.outputs]
        self.marks_final = request.parameters["triton_enable_empty_final_response"].bool_param


def response_of(reply: bytes, wanted: Wanted, version: str) -> ModelInferResponse:
    """Return a batcher's answer, a MukoeResponse, as the response to a request.

    Raises UnknownOutputError or NoDatatypeError.
    """
    answer = _arrays.read_answer(reply)
    assert answer is not None, "a reply that the batcher did not write"
    arrays, step = answer
    response = ModelInferResponse(model_name=wanted.model_name, model_version=version, id=wanted.id)
    response.parameters[STEP].int64_param = step
    found: dict[str, Any] = {name: rest for name, *rest in arrays}
    for name in wanted.outputs or found:
        if name not in found:
            raise UnknownOutputError(f"the request asks for an output {name!r:.100}; there are {', '.join(found)}")
        shape, dtype, offset, size_bytes = found[name]
        response.outputs.add(name=name, datatype=datatype_of(name, dtype), shape=shape)
        response.raw_output_contents.append(reply[offset : offset + size_bytes])
    return response
