"""Our readers and writers of messages, compared with protobuf's."""

from __future__ import annotations

from grpc_batcher import _models, _wire
from grpc_batcher._models import MODELS, Answer, BadRequestError
from grpc_batcher._proto.mukoe_batcher_pb2 import (
    Dynamics,
    KeyValue,
    ModelResponse,
    MukoeRequest,
    MukoeResponse,
    Representations,
)

import numpy as np
import pytest
from google.protobuf.message import DecodeError
from hypothesis import example, given, settings
from hypothesis import strategies as st

INT32 = st.integers(-(2**31), 2**31 - 1)
ANSWERS = st.builds(Answer, st.dictionaries(st.text(), st.binary()), INT32)


def read_request_with_protobuf(model: str, message: bytes) -> object:
    """Read a message with nothing but protobuf; None if the model does not accept it."""
    try:
        request = MukoeRequest.FromString(message)
    except (DecodeError, UnicodeDecodeError, SystemError):  # protobuf 3.20 raises the last two
        return None
    kind = request.WhichOneof("request_type")
    if kind != MODELS[model].message_field:
        return None
    if model == "repr":
        return request.representations.data
    return request.dynamics.data, request.dynamics.action


def read_request(model: str, message: bytes) -> object:
    try:
        return MODELS[model].read_request(message)
    except BadRequestError:
        return None


def read_answer_with_protobuf(message: bytes) -> tuple[dict[str, bytes], int] | None:
    try:
        result = MukoeResponse.FromString(message).result
    except (DecodeError, UnicodeDecodeError, SystemError):
        return None
    return {pair.key: pair.values for pair in result.dictionary}, result.step


def read_answer(message: bytes) -> tuple[dict[str, bytes], int] | None:
    try:
        return _models.read_answer(message)
    except DecodeError:
        return None


@st.composite
def mangled(draw: st.DrawFn, messages: st.SearchStrategy[bytes]) -> bytes:
    """Messages cut off, joined, or with changed bytes, so that fields are split, repeated, unknown or broken."""
    message = draw(messages)
    for _ in range(draw(st.integers(0, 3))):
        at = draw(st.integers(0, len(message)))
        change = draw(st.sampled_from(["cut", "insert", "replace", "append", "wrap"]))
        if change == "cut":
            message = message[:at]
        elif change == "insert":
            message = message[:at] + draw(st.binary(max_size=4)) + message[at:]
        elif change == "replace":
            message = message[:at] + draw(st.binary(min_size=1, max_size=1)) + message[at + 1 :]
        elif change == "append":
            message = message + draw(messages)
        elif len(message) < 128:
            message = bytes([draw(st.sampled_from([0x0A, 0x12, 0x1A])), len(message)]) + message
    return message


REQUEST_MESSAGES = st.one_of(
    st.builds(lambda data: MukoeRequest(representations=Representations(data=data)).SerializeToString(), st.binary()),
    st.builds(
        lambda data, action: MukoeRequest(dynamics=Dynamics(data=data, action=action)).SerializeToString(),
        st.binary(),
        INT32,
    ),
    st.binary(max_size=40),
)
ANSWER_MESSAGES = st.one_of(
    st.builds(
        lambda answer: MukoeResponse(
            result=ModelResponse(
                dictionary=[KeyValue(key=key, values=value) for key, value in answer.dictionary.items()],
                step=answer.step,
            )
        ).SerializeToString(),
        ANSWERS,
    ),
    st.binary(max_size=40),
)


@settings(max_examples=300)
@given(st.binary(), INT32)
@example(b"", 0)
@example(b"x" * 127, -1)
@example(b"x" * 128, 2**31 - 1)
@example(b"x" * 200_000, -(2**31))
def test_written_requests_are_byte_for_byte_protobufs(data: bytes, action: int) -> None:
    dyna = MukoeRequest(dynamics=Dynamics(data=data, action=action))
    assert MODELS["dyna"].write_request({"data": data, "action": action}) == dyna.SerializeToString()
    rep = MukoeRequest(representations=Representations(data=data))
    assert MODELS["repr"].write_request({"data": data}) == rep.SerializeToString()


@settings(max_examples=300)
@given(ANSWERS)
@example(Answer({"": b""}, 0))
@example(Answer({"key": b"x" * 200_000}, -1))
def test_written_answers_are_byte_for_byte_protobufs(answer: Answer) -> None:
    message = _models.write_answer(answer)
    parsed = MukoeResponse.FromString(message)
    assert parsed.SerializeToString() == message
    assert ({pair.key: pair.values for pair in parsed.result.dictionary}, parsed.result.step) == answer
    assert _models.read_answer(message) == answer


@settings(max_examples=300)
@given(mangled(REQUEST_MESSAGES))
@example(b"")
@example(b"\x0a\x00")
@example(b"\x12\x02\x10\x05")  # only an action
@example(b"\x12\x04\x10\x05\x0a\x00")  # fields in the other order
@example(b"\x0a\x03\x0a\x01a\x0a\x03\x0a\x01b")  # the message in two parts, which merge
@example(b"\x12\x02\x10\x05\x12\x03\x0a\x01b")
@example(b"\x0a\x00\x12\x00")  # both kinds: the last one counts
@example(b"\x12\x0b\x10\xff\xff\xff\xff\xff\xff\xff\xff\xff\x7f")  # a varint of over 64 bits
@example(b"\x12\x06\x10\xff\xff\xff\xff\x1f")  # a varint of over 32 bits
@example(b"\x0a\x03\x0a\x28a")  # a length past the end
def test_any_request_is_read_as_protobuf_reads_it(message: bytes) -> None:
    for model in ("repr", "dyna"):
        assert read_request(model, message) == read_request_with_protobuf(model, message)


@settings(max_examples=300)
@given(mangled(ANSWER_MESSAGES))
@example(b"")
@example(b"\x0a\x00")
@example(b"\x0a\x04\x10\x05\x0a\x00")  # the step before a pair
@example(b"\x0a\x02\x10\x05\x0a\x02\x10\x06")  # the result in two parts
@example(b"\x0a\x05\x0a\x28\x0a\x01k")  # a length past the end
@example(b"\x0a\x05\x0a\x03\x0a\x28k")
@example(b"\x0a\x05\x0a\x03\x0a\x01\xff")  # a key that is not UTF-8
@example(b"\x0a\x08\x0a\x06\x12\x01v\x0a\x01k")  # a value before its key
@example(b"\x0a\x07\x0a\x05\x0a\x01k\x10\x05")  # an unknown field of a pair, with the number of the step
def test_any_answer_is_read_as_protobuf_reads_it(message: bytes) -> None:
    assert read_answer(message) == read_answer_with_protobuf(message)


def test_plain_messages_are_read_without_protobuf() -> None:
    codec = MODELS["dyna"]._codec
    assert codec is not None
    assert codec.read(MODELS["dyna"].write_request({"data": b"data", "action": -5})) == (b"data", -5)
    assert _wire.read_answer(_models.write_answer(Answer({"a": b"b"}, 1))) == ({"a": b"b"}, 1)


@pytest.mark.parametrize(
    "data", [bytearray(b"abc"), memoryview(b"abc"), np.arange(12.0).reshape(3, 4), np.zeros(0), np.float32(1)]
)
def test_a_contiguous_buffer_is_sent_as_it_is_in_memory(data: object) -> None:
    message = MODELS["repr"].write_request({"data": data})
    assert MODELS["repr"].read_request(message) == memoryview(data).tobytes()  # type: ignore[arg-type]


def test_an_array_that_is_not_contiguous_is_sent_in_c_order() -> None:
    array = np.arange(12.0).reshape(3, 4).T
    assert MODELS["repr"].read_request(MODELS["repr"].write_request({"data": array})) == array.tobytes()


def test_a_codec_refuses_fields_it_does_not_support() -> None:
    with pytest.raises(ValueError, match="no codec"):
        _wire.RequestCodec(16, [(1, True)])
    with pytest.raises(ValueError, match="no codec"):
        _wire.RequestCodec(1, [(2, True), (1, True)])
    with pytest.raises(ValueError, match="no codec"):
        _wire.RequestCodec(1, [(number, True) for number in range(1, 11)])
