"""Feed random messages to the readers of _wire.pyx, and check that protobuf reads the same from them.

atheris makes the messages. It is guided by the code they reach in the decoder of protobuf's pure Python
implementation, as it sees nothing of our readers, which are native code. The arguments are libFuzzer's.
"""

from __future__ import annotations

import os
import sys
import tempfile
from pathlib import Path

os.environ["PROTOCOL_BUFFERS_PYTHON_IMPLEMENTATION"] = "python"

import atheris

with atheris.instrument_imports(include=["google.protobuf.internal"]):
    from google.protobuf.internal import decoder, python_message  # noqa: F401, to be instrumented
    from google.protobuf.message import DecodeError

from grpc_batcher import _wire
from grpc_batcher._models import MODELS
from grpc_batcher._proto.mukoe_batcher_pb2 import MukoeRequest, MukoeResponse

# Where the mutations start.
SEEDS = [
    MODELS["repr"].write_request({"data": b"data"}),
    MODELS["dyna"].write_request({"data": b"data" * 50, "action": -1}),
    MODELS["dyna"].write_request({"data": b"", "action": 2**31 - 1}),
    _wire.write_answer({"key": b"value", "": b"", "a": b"b" * 200}, -(2**31)),
    _wire.write_answer({}, 5),
    b"",
]


def request_by_protobuf(model: str, message: bytes) -> tuple[object, ...] | None:
    try:
        request = MukoeRequest.FromString(message)
    except DecodeError:
        return None
    if request.WhichOneof("request_type") != MODELS[model].message_field:
        return None
    body = getattr(request, MODELS[model].message_field)
    return tuple(getattr(body, name) for name in MODELS[model].arguments)


def answer_by_protobuf(message: bytes) -> tuple[dict[str, bytes], int] | None:
    try:
        result = MukoeResponse.FromString(message).result
    except DecodeError:
        return None
    return {pair.key: pair.values for pair in result.dictionary}, result.step


def check(message: bytes) -> None:
    """Raises AssertionError if the two differ. Messages that ours leaves to protobuf (None) cannot differ."""
    for model in MODELS:
        codec = MODELS[model]._codec
        assert codec is not None
        values = codec.read(message)
        if values is not None:
            assert values == request_by_protobuf(model, message), (model, message, values)
    answer = _wire.read_answer(message)
    if answer is not None:
        assert answer == answer_by_protobuf(message), (message, answer)
    # When protobuf writes what it understood, the message has the plain shape, which ours must read.
    for model in MODELS:
        request = request_by_protobuf(model, message)
        codec = MODELS[model]._codec
        if request is not None and codec is not None:
            assert codec.read(codec.write(request)) == request, (model, message)
    understood = answer_by_protobuf(message)
    if understood is not None:
        assert _wire.read_answer(_wire.write_answer(*understood)) == understood, message


def main() -> None:
    with tempfile.TemporaryDirectory() as corpus:
        for number, seed in enumerate(SEEDS):
            Path(corpus, str(number)).write_bytes(seed)
        atheris.Setup([*sys.argv, "-artifact_prefix=fuzz-", corpus], check)
        atheris.Fuzz()


if __name__ == "__main__":
    main()
