"""Feed random messages to the native readers, and check that protobuf and msgpack read the same from them.

Messages as protobuf writes them are of the plain shape, which the native readers must read themselves.

atheris makes the messages. It is guided by the code they reach in the pure Python implementations of protobuf and
msgpack, as it sees nothing of our readers, which are native code. The arguments are libFuzzer's.
"""

from __future__ import annotations

import math
import os
import sys
import tempfile
from pathlib import Path

os.environ["PROTOCOL_BUFFERS_PYTHON_IMPLEMENTATION"] = "python"
os.environ["MSGPACK_PUREPYTHON"] = "1"

import atheris

with atheris.instrument_imports(include=["google.protobuf.internal", "msgpack"]):
    import msgpack
    from google.protobuf.internal import decoder, python_message  # noqa: F401, to be instrumented
    from google.protobuf.message import DecodeError

from grpc_batcher import _arrays, _wire
from grpc_batcher._arrays import ArrayError, ArrayRequest, Field, RequestReader
from grpc_batcher._models import MODELS
from grpc_batcher._proto.mukoe_batcher_pb2 import MukoeRequest, MukoeResponse

BROKEN = (DecodeError, UnicodeDecodeError)  # plain Python protobuf raises the second for a key

DATA = Field("data", (2,), "uint8", 1)
READERS = {
    "representations": RequestReader(1, [DATA], data_number=1, max_rows=3),
    "dynamics": RequestReader(2, [DATA], data_number=1, action_number=2, max_rows=3),
    "arrays": RequestReader(3, [Field("x", (2,), "uint8", 1), Field("y", (), "int16", 2)], max_rows=3),
}

# Where the mutations start.
PAIR = msgpack.packb(((2,), "uint8", b"ab"))
SEEDS = [
    PAIR,
    b"\xdc\0\3\xdc\0\1\xd1\0\2\xd9\5uint8\xda\0\2ab",
    _arrays.write_request(1, [("", b"ab", (2,), "uint8")], data_number=1),
    _arrays.write_request(2, [("", b"ab", (1, 2), "uint8")], data_number=1, action_number=2, action=5),
    _arrays.write_request(
        3, [("x", b"abcd", (2, 2), "uint8"), ("y", memoryview(b"abcd").cast("h"), (2,), "int16")], keep_rows_axis=True
    ),
    _wire.write_answer({"key": PAIR, "other": msgpack.packb(((), "float32", b"abcd"))}, 5),
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
    except BROKEN:
        return None
    if request.WhichOneof("request_type") != MODELS[model].message_field:
        return None
    body = getattr(request, MODELS[model].message_field)
    return tuple(getattr(body, name) for name in MODELS[model].arguments)


def answer_by_protobuf(message: bytes) -> tuple[dict[str, bytes], int] | None:
    try:
        result = MukoeResponse.FromString(message).result
    except BROKEN:
        return None
    return {pair.key: pair.values for pair in result.dictionary}, result.step


def array_by_msgpack(payload: bytes) -> tuple[tuple[int, ...], str, bytes] | None:
    try:
        shape, dtype, data = msgpack.unpackb(payload, raw=True, strict_map_key=False)
        dtype = dtype.decode()
    except Exception:  # of many kinds
        return None
    if type(shape) is not list or len(shape) > 32 or type(data) is not bytes:
        return None
    if any(type(length) is not int or not 0 <= length < 2**63 for length in shape):
        return None
    items = math.prod(shape)
    if math.prod(filter(None, shape)) >= 2**63 or (len(data) % items or len(data) < items if items else data):
        return None
    return tuple(shape), dtype, data


def array_by_ours(payload: bytes) -> tuple[tuple[int, ...], str, bytes] | None:
    try:
        shape, dtype, offset, size = _arrays.unpack(payload)
    except ArrayError:
        return None
    return shape, dtype, payload[offset : offset + size]


def meaning(request: ArrayRequest, fields: int) -> tuple[object, ...]:
    targets = [bytearray(2 * request.rows) for _ in range(fields)]
    for index, target in enumerate(targets):
        _arrays.gather([request], index, target, request.rows)
    return request.rows, request.keeps_axis, request.action, targets


def check_arrays(message: bytes) -> None:
    """The same for the readers of arrays."""
    assert array_by_ours(message) == array_by_msgpack(message), message
    try:
        request: MukoeRequest | None = MukoeRequest.FromString(message)
    except BROKEN:
        request = None
    kind = request.WhichOneof("request_type") if request is not None else None
    for name, reader in READERS.items():
        fields = 2 if name == "arrays" else 1
        try:
            taken = reader.read(message)
            if taken is None:
                continue
            ours = meaning(taken, fields)
        except ArrayError:
            ours = None
        by_protobuf = None
        if request is not None and kind == name:
            if name == "arrays":
                payloads = [(pair.key, pair.values) for pair in request.arrays.arrays]
            else:
                payloads = [("data", getattr(request, name).data)]
            try:
                parsed = reader.of_payloads(payloads, request.dynamics.action, request.keep_rows_axis)
                by_protobuf = meaning(parsed, fields)
            except ArrayError:
                pass
        assert ours == by_protobuf, (name, message, ours, by_protobuf)
    try:
        answer = _arrays.read_answer(message)
    except ArrayError:
        result = MukoeResponse.FromString(message).result
        assert None in [array_by_msgpack(pair.values) for pair in result.dictionary], message
        return
    if answer is not None:
        result = MukoeResponse.FromString(message).result
        found = [(key, (shape, dtype, message[at : at + size])) for key, shape, dtype, at, size in answer[0]]
        assert found == [(pair.key, array_by_msgpack(pair.values)) for pair in result.dictionary], message
        assert answer[1] == result.step, message


def check(message: bytes) -> None:
    """Raises AssertionError if the two differ. Messages that ours leaves to protobuf (None) cannot differ."""
    check_arrays(message)
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
