"""Packed arrays against msgpack's, protobuf's and numpy's own idea of them."""

from __future__ import annotations

import math
from typing import Any

from grpc_batcher import _arrays
from grpc_batcher._arrays import Arena, ArrayError, ArrayRequest, Field, RequestReader
from grpc_batcher._proto.mukoe_batcher_pb2 import (
    Arrays,
    Dynamics,
    KeyValue,
    ModelResponse,
    MukoeRequest,
    MukoeResponse,
    Representations,
)

import msgpack
import numpy as np
import pytest
from google.protobuf.message import DecodeError
from hypothesis import example, given, settings
from hypothesis import strategies as st

# What protobuf raises; the latter two out of 3.20, in plain Python and in C++.
BROKEN = (DecodeError, UnicodeDecodeError, SystemError)

MAX_SIZE = 2**63 - 1
INT32 = st.integers(-(2**31), 2**31 - 1)

REPR = {"number": 1, "data_number": 1}
DYNA = {"number": 2, "data_number": 1, "action_number": 2}
ARRAYS = {"number": 3}
KINDS = {"repr": REPR, "dyna": DYNA, "arrays": ARRAYS}


def packed(array: np.ndarray) -> bytes:
    return msgpack.packb((array.shape, array.dtype.name, array.tobytes()))


def described(name: str, array: np.ndarray) -> tuple[str, Any, tuple[int, ...], str]:
    return name, array, array.shape, array.dtype.name


def field(name: str, shape: tuple[int, ...], dtype: str) -> Field:
    return Field(name, shape, dtype, np.dtype(dtype).itemsize)


DATA = field("data", (2, 3), "float32")
FIELDS = {"repr": [DATA], "dyna": [DATA], "arrays": [field("image", (4,), "uint8"), field("state", (), "float64")]}
READERS = {kind: RequestReader(fields=FIELDS[kind], max_rows=3, **KINDS[kind]) for kind in KINDS}


def rows_of(request: ArrayRequest, index: int, field: Field) -> bytes:
    target = bytearray(request.rows * field.row_bytes)
    assert _arrays.gather([request], index, target, request.rows) == request.rows
    return bytes(target)


def meaning(kind: str, request: ArrayRequest) -> tuple[object, ...]:
    rows = [rows_of(request, index, field) for index, field in enumerate(FIELDS[kind])]
    return request.rows, request.keeps_axis, request.action, rows


def read(kind: str, message: bytes) -> tuple[object, ...] | None:
    """What a message means to a reader; None if it is refused or protobuf must be asked."""
    try:
        request = READERS[kind].read(message)
    except ArrayError:
        return None
    return None if request is None else meaning(kind, request)


def read_with_protobuf(kind: str, message: bytes) -> tuple[object, ...] | None:
    try:
        request = MukoeRequest.FromString(message)
    except BROKEN:
        return None
    if request.WhichOneof("request_type") != {"repr": "representations", "dyna": "dynamics", "arrays": "arrays"}[kind]:
        return None
    if kind == "arrays":
        payloads = [(pair.key, pair.values) for pair in request.arrays.arrays]
        action = 0
    else:
        body = request.representations if kind == "repr" else request.dynamics
        payloads = [("data", body.data)]
        action = request.dynamics.action
    try:
        return meaning(kind, READERS[kind].of_payloads(payloads, action, request.keep_rows_axis))
    except ArrayError:
        return None


def unpacked(payload: bytes) -> tuple[tuple[int, ...], str, bytes] | None:
    """By ours."""
    try:
        shape, dtype, offset, size = _arrays.unpack(payload)
    except ArrayError:
        return None
    return shape, dtype, payload[offset : offset + size]


def unpacked_with_msgpack(payload: bytes) -> tuple[tuple[int, ...], str, bytes] | None:
    """By msgpack, if that is a packed array."""
    try:
        shape, dtype, data = msgpack.unpackb(payload, raw=True, strict_map_key=False)
        dtype = dtype.decode()
    except Exception:  # of many kinds
        return None
    if type(shape) is not list or len(shape) > 32 or not isinstance(data, bytes):
        return None
    if any(type(length) is not int or not 0 <= length <= MAX_SIZE for length in shape):
        return None
    if math.prod(length for length in shape if length) > MAX_SIZE:
        return None
    items = math.prod(shape)
    if len(data) % items or len(data) < items if items else data:
        return None
    return tuple(shape), dtype, data


@st.composite
def mangled(draw: st.DrawFn, messages: st.SearchStrategy[bytes]) -> bytes:
    """Messages cut short, run together, with bytes changed, inserted or removed."""
    message = draw(messages)
    for _ in range(draw(st.integers(0, 3))):
        at = draw(st.integers(0, len(message)))
        change = draw(st.sampled_from(["cut", "insert", "replace", "remove", "append"]))
        if change == "cut":
            message = message[:at]
        elif change == "insert":
            message = message[:at] + draw(st.binary(max_size=4)) + message[at:]
        elif change == "replace":
            message = message[:at] + draw(st.binary(min_size=1, max_size=1)) + message[at + 1 :]
        elif change == "remove":
            message = message[:at] + message[at + 1 :]
        else:
            message = message + draw(messages)
    return message


# All encodings of a number, of an array's length, and of bytes.


def wide(first: int, value: int, width: int) -> bytes:
    return bytes([first]) + value.to_bytes(width, "big")


def naturals(value: int) -> st.SearchStrategy[bytes]:
    forms = [wide(0xCC + i, value, 1 << i) for i in range(4) if value < 1 << (8 << i)]
    forms += [wide(0xD0 + i, value, 1 << i) for i in range(4) if value < 1 << (8 << i) - 1]
    return st.sampled_from(forms + [bytes([value])] * (value < 128))


def arrays_of(count: int) -> st.SearchStrategy[bytes]:
    return st.sampled_from([wide(0xDC, count, 2), wide(0xDD, count, 4)] + [bytes([0x90 | count])] * (count < 16))


def contents(content: bytes) -> st.SearchStrategy[bytes]:
    forms = [bytes([0xA0 | len(content)])] if len(content) < 32 else []
    for width in (1, 2, 4):
        if len(content) < 1 << 8 * width:
            forms += [wide(first + width.bit_length() - 1, len(content), width) for first in (0xC4, 0xD9)]
    return st.sampled_from(forms).map(lambda head: head + content)


SHAPES = st.lists(st.integers(0, 5), max_size=4).map(tuple)


@st.composite
def packings(draw: st.DrawFn) -> tuple[tuple[int, ...], str, bytes, bytes]:
    """A shape, a dtype name, data, and one of all encodings of the three."""
    shape = draw(SHAPES)
    dtype = draw(st.sampled_from(["uint8", "bfloat16", "é" * 20]))
    data = bytes(math.prod(shape) * draw(st.sampled_from([1, 8])))
    encoded = draw(arrays_of(3)) + draw(arrays_of(len(shape)))
    for length in shape:
        encoded += draw(naturals(length))
    return shape, dtype, data, encoded + draw(contents(dtype.encode())) + draw(contents(data))


@settings(max_examples=300)
@given(packings())
def test_an_array_is_read_in_every_encoding_that_msgpack_has_for_it(
    packing: tuple[tuple[int, ...], str, bytes, bytes],
) -> None:
    shape, dtype, data, encoded = packing
    assert unpacked_with_msgpack(encoded) == unpacked(encoded) == (shape, dtype, data)


@settings(max_examples=500)
@given(mangled(st.one_of(packings().map(lambda packing: packing[-1]), st.binary(max_size=40))))
@example(b"")
@example(msgpack.packb(([True], "uint8", b"x")))
@example(msgpack.packb(([1.0], "uint8", b"x")))
@example(msgpack.packb(([-1], "uint8", b"")))
@example(msgpack.packb(({}, "uint8", b"x")))
@example(msgpack.packb(([1], None, b"x")))
@example(msgpack.packb(([1], b"\xff", b"x")))
@example(msgpack.packb(([1], "uint8", [1])))
@example(msgpack.packb(([1], "uint8", b"x", 4)))
@example(msgpack.packb(([1], "uint8")))
@example(msgpack.packb(([2], "uint8", b"xyz")))
@example(msgpack.packb(([2], "uint8", b"")))
@example(msgpack.packb(([0], "uint8", b"x")))
@example(msgpack.packb(([2**32, 2**31], "uint8", b"")))
@example(msgpack.packb(([0, 2**32, 2**31], "uint8", b"")))
@example(msgpack.packb(([2**32, 2**31, 0], "uint8", b"")))
@example(msgpack.packb(([2**63], "uint8", b"")))
@example(msgpack.packb(([0, 2**63 - 1], "uint8", b"")))
@example(msgpack.packb(([1] * 32, "uint8", b"x")))
@example(msgpack.packb(([1] * 33, "uint8", b"x")))
def test_any_bytes_mean_to_us_what_they_mean_to_msgpack(payload: bytes) -> None:
    assert unpacked(payload) == unpacked_with_msgpack(payload)


@settings(max_examples=300)
@given(
    st.lists(st.one_of(st.integers(0, 300), st.integers(0, MAX_SIZE)), max_size=32),
    st.text(min_size=1, max_size=16),
    st.sampled_from([0, 1, 255, 256, 65_535, 65_536]),
)
def test_a_header_is_msgpacks_to_the_byte(shape: list[int], dtype: str, size: int) -> None:
    data = bytes(size)
    assert _arrays.pack_header(shape, dtype, size) + data == msgpack.packb((shape, dtype, data))


@pytest.mark.parametrize(
    ("shape", "dtype", "size", "error"),
    [
        ([-1], "uint8", 0, ValueError),
        ([2**63], "uint8", 0, OverflowError),
        ([1] * 33, "uint8", 1, ValueError),
        ([1.5], "uint8", 1, TypeError),
        (4, "uint8", 4, TypeError),
        ([1], b"uint8", 1, TypeError),
        ([1], "", 1, ValueError),
        ([1], "x" * 65, 1, ValueError),
        ([1], "\ud800", 1, UnicodeEncodeError),
        ([1], "uint8", -1, OverflowError),
        ([1], "uint8", 2**32, OverflowError),
    ],
)
def test_a_header_of_what_no_array_has_is_refused(shape: Any, dtype: Any, size: int, error: type[Exception]) -> None:
    with pytest.raises(error):
        _arrays.pack_header(shape, dtype, size)


def test_an_array_that_is_cut_anywhere_says_so() -> None:
    payload = packed(np.arange(300, dtype="uint16").reshape(1, 300))
    assert unpacked(payload) is not None
    for size in range(len(payload)):
        with pytest.raises(ArrayError, match=f"{size} bytes .* ends early"):
            _arrays.unpack(payload[:size])


@pytest.mark.parametrize(
    "payload",
    [
        b"\xdd\xff\xff\xff\xff",
        b"\x93\xdd\xff\xff\xff\xff",
        b"\x93\x91\x01\xdb\xff\xff\xff\xff",
        b"\x93\x91\x01\xa1x\xc6\xff\xff\xff\xff",
        b"\x93\x92\xcf\xff\xff\xff\xff\xff\xff\xff\xff\x01\xa1x\xc4\x00",
    ],
)
def test_sizes_that_are_claimed_and_not_there_are_refused(payload: bytes) -> None:
    with pytest.raises(ArrayError):
        _arrays.unpack(payload)


# Requests.

ROW = np.arange(6, dtype="float32").reshape(2, 3)
ROWS = np.arange(18, dtype="float32").reshape(3, 2, 3)


@st.composite
def rows_of_fields(draw: st.DrawFn) -> list[tuple[str, np.ndarray]]:
    """Arrays for the kind `arrays`: mostly good."""
    count = draw(st.integers(0, 4))
    image = np.arange(count * 4, dtype="uint8").reshape(count, 4)
    state = np.arange(draw(st.sampled_from([count, count, count, 1])), dtype="float64")
    given = [("image", image), ("state", state)]
    given = [(name, array[0] if len(array) == 1 and draw(st.booleans()) else array) for name, array in given]
    given = draw(st.permutations(given))
    return given + draw(st.sampled_from([[], [], [], [("other", state)], given[:1]]))


def arrays_message(arrays: list[tuple[str, np.ndarray]], keep: bool = False) -> MukoeRequest:
    pairs = [KeyValue(key=name, values=packed(array)) for name, array in arrays]
    return MukoeRequest(arrays=Arrays(arrays=pairs), keep_rows_axis=keep)


PAYLOADS = st.one_of(
    st.sampled_from([packed(array) for array in (ROW, ROW[None], ROWS, ROWS[:2], ROWS[:0], ROW.astype("float64"))]),
    st.binary(max_size=30),
)
MESSAGES = st.one_of(
    st.builds(
        lambda data, keep: MukoeRequest(representations=Representations(data=data), keep_rows_axis=keep),
        PAYLOADS,
        st.booleans(),
    ),
    st.builds(
        lambda data, action, keep: MukoeRequest(dynamics=Dynamics(data=data, action=action), keep_rows_axis=keep),
        PAYLOADS,
        INT32,
        st.booleans(),
    ),
    st.builds(arrays_message, rows_of_fields(), st.booleans()),
).map(lambda message: message.SerializeToString())


@settings(max_examples=500)
@given(mangled(st.one_of(MESSAGES, st.binary(max_size=40))))
@example(b"")
@example(b"\x0a\x00")
@example(b"\x1a\x00")
@example(b"\x78\x01")
@example(MukoeRequest(representations=Representations(data=packed(ROW))).SerializeToString() * 2)
@example(b"\x78\x01" + MukoeRequest(representations=Representations(data=packed(ROW[None]))).SerializeToString())
def test_any_request_means_to_us_what_it_means_to_protobuf(message: bytes) -> None:
    for kind in KINDS:
        known = read(kind, message)
        by_protobuf = read_with_protobuf(kind, message)
        assert known == by_protobuf or known is None
        try:
            asks_protobuf = READERS[kind].read(message) is None
        except ArrayError:
            asks_protobuf = False
        assert asks_protobuf or known == by_protobuf


@pytest.mark.parametrize("kind", KINDS)
def test_plain_requests_are_read_without_protobuf(kind: str) -> None:
    image, state = np.arange(8, dtype="uint8").reshape(2, 4), np.arange(2, dtype="float64")
    arrays = [described("state", state), described("image", image)] if kind == "arrays" else [described("data", ROWS)]
    for keep in (False, True):
        message = _arrays.write_request(arrays=arrays, action=-7, keep_rows_axis=keep, **KINDS[kind])
        request = READERS[kind].read(message)
        assert request is not None
        assert request.size_bytes == len(message)
        assert request.action == (-7 if kind == "dyna" else 0)


def test_arrays_go_by_name_in_any_order() -> None:
    image, state = np.arange(8, dtype="uint8").reshape(2, 4), np.arange(2, dtype="float64")
    for arrays in ([("image", image), ("state", state)], [("state", state), ("image", image)]):
        assert read("arrays", arrays_message(arrays).SerializeToString()) == (
            2,
            True,
            0,
            [image.tobytes(), state.tobytes()],
        )


def test_a_single_row_loses_its_axis_unless_the_request_keeps_it() -> None:
    for data, keep, rows, keeps_axis in [
        (ROW, False, 1, False),
        (ROW[None], False, 1, False),
        (ROWS, False, 3, True),
        (ROW[None], True, 1, True),
        (ROWS, True, 3, True),
    ]:
        request = READERS["repr"].read(_arrays.write_request(arrays=[described("", data)], keep_rows_axis=keep, **REPR))
        assert request is not None
        assert (request.rows, request.keeps_axis) == (rows, keeps_axis)


def test_the_data_is_kept_alive_and_not_copied() -> None:
    message = _arrays.write_request(arrays=[described("", ROWS)], **REPR)
    request = READERS["repr"].read(message)
    parsed = READERS["repr"].of_payloads([("data", b"".join([packed(ROWS)]))])
    del message
    assert request is not None
    assert rows_of(request, 0, DATA) == rows_of(parsed, 0, DATA) == ROWS.tobytes()
    assert parsed.size_bytes == len(packed(ROWS))


EXPECTED = r"takes float32 \[2, 3\], or 1 to 3 rows of it as \[rows, 2, 3\]$"


@pytest.mark.parametrize(
    ("payload", "text"),
    [
        (packed(ROW.astype("float64")), r"^data is float64 \[2, 3\]; this batcher " + EXPECTED),
        (packed(ROW.T), r"^data is float32 \[3, 2\]; .*" + EXPECTED),
        (packed(ROW[0]), r"^data is float32 \[3\]; .*" + EXPECTED),
        (packed(np.float32(1)), r"^data is float32 \[\]; .*" + EXPECTED),
        (packed(ROWS[None]), r"^data is float32 \[1, 3, 2, 3\]; .*" + EXPECTED),
        (packed(ROWS[:0]), r"^data is float32 \[0, 2, 3\]; .*" + EXPECTED),
        (packed(np.zeros((4, 2, 3), "float32")), r"^data is float32 \[4, 2, 3\]; .*" + EXPECTED),
        (msgpack.packb(((2, 3), ">f4", bytes(24))), r"^data is >f4 \[2, 3\]; .*" + EXPECTED),
        (msgpack.packb(((2, 3), "object", bytes(48))), r"^data is object \[2, 3\]; .*" + EXPECTED),
        (msgpack.packb(((2, 3), "a\n" * 80, b"")), r"^data is '(a\\n){20}\S* \[2, 3\]; .*" + EXPECTED),
        (msgpack.packb(((2, 3), b"\xff", b"")), r"^data is \ufffd \[2, 3\]; .*" + EXPECTED),
        (msgpack.packb(((2, 3), "", b"")), r"^data is '' \[2, 3\]; .*" + EXPECTED),
        (msgpack.packb(((2**62, 2**62), "float32", b"")), r"^data is float32 \[4611686018427387904, 46.*" + EXPECTED),
        (msgpack.packb(((2, 3), "float32", bytes(23))), r"^data is float32 \[2, 3\] with 23 bytes of data; .* 24$"),
        (msgpack.packb(((3, 2, 3), "float32", bytes(24))), "with 24 bytes of data; it must have 72$"),
        (b"", "^data is 0 bytes that are not a packed array, .*: it ends early; .*" + EXPECTED),
        (b"hello", "^data is 5 bytes .*: it is not a msgpack array of 3 elements; .*" + EXPECTED),
        (msgpack.packb((6, "float32", b"")), "its shape is not an array; .*" + EXPECTED),
        (msgpack.packb(((1.5,), "float32", b"")), "its shape is not of integers from 0; "),
        (msgpack.packb(((-1,), "float32", b"")), "its shape is not of integers from 0; "),
        (msgpack.packb(((2**64 - 1,), "float32", b"")), "its shape overflows; "),
        (msgpack.packb(((1,) * 33, "float32", b"")), "its shape has over 32 dimensions; "),
        (msgpack.packb(((2, 3), 5, b"")), "its dtype is not a str; "),
        (msgpack.packb(((2, 3), "float32", None)), "its data is not a bin; "),
        (packed(ROW)[:-1], "it ends early; "),
        (packed(ROW) + b"x", "bytes follow its data; "),
    ],
)
def test_an_error_says_what_came_and_what_is_expected(payload: bytes, text: str) -> None:
    message = MukoeRequest(representations=Representations(data=payload)).SerializeToString()
    with pytest.raises(ArrayError, match=text):
        READERS["repr"].read(message)
    with pytest.raises(ArrayError, match=text):
        READERS["repr"].of_payloads([("data", payload)])


def test_a_row_without_axis_is_refused_where_the_request_says_that_it_has_one() -> None:
    message = _arrays.write_request(arrays=[described("", ROW)], keep_rows_axis=True, **REPR)
    with pytest.raises(
        ArrayError, match=r"with keep_rows_axis this batcher takes float32 \[rows, 2, 3\], 1 to 3 rows$"
    ):
        READERS["repr"].read(message)


def test_a_batcher_of_single_rows_and_one_of_scalars_say_so() -> None:
    single = RequestReader(fields=[field("data", (), "int8")], max_rows=1, **REPR)
    with pytest.raises(ArrayError, match=r"takes int8 \[\], or 1 row of it as \[rows\]$"):
        single.of_payloads([("data", packed(ROW))])
    assert single.of_payloads([("data", packed(np.int8([5])))]).rows == 1


IMAGE, STATE = np.zeros((2, 4), "uint8"), np.zeros(2)


@pytest.mark.parametrize(
    ("arrays", "text"),
    [
        ([], "^the request has no array 'image'; this batcher takes 'image', 'state'$"),
        ([("image", IMAGE)], "^the request has no array 'state'; this batcher takes 'image', 'state'$"),
        ([("image", IMAGE), ("stat", STATE)], "^the request has an array 'stat'; this batcher takes 'image', 'state'$"),
        ([("", IMAGE)], "^the request has an array ''; "),
        ([("x" * 1000, IMAGE)], "^the request has an array 'x{99}; "),
        ([("image", IMAGE), ("state", STATE), ("image", IMAGE)], "^the request has image twice$"),
        ([("image", IMAGE), ("state", STATE[:1])], "same number of rows; image has 2, state has 1$"),
        ([("state", STATE[:1]), ("image", IMAGE)], "same number of rows; state has 1, image has 2$"),
        (
            [("image", IMAGE), ("state", STATE.astype("float32"))],
            r"^state is float32 \[2\]; .* float64 \[\], or ",
        ),
    ],
)
def test_each_declared_name_comes_once_with_the_same_number_of_rows(
    arrays: list[tuple[str, np.ndarray]], text: str
) -> None:
    with pytest.raises(ArrayError, match=text):
        READERS["arrays"].read(arrays_message(arrays).SerializeToString())
    with pytest.raises(ArrayError, match=text):
        READERS["arrays"].of_payloads([(name, packed(array)) for name, array in arrays])


@pytest.mark.parametrize(
    ("payloads", "action", "error"),
    [
        ([("data", None)], 0, TypeError),
        ([("data", bytearray(packed(ROW)))], 0, TypeError),
        ([(None, packed(ROW))], 0, ArrayError),
        ([([], packed(ROW))], 0, TypeError),
        ([packed(ROW)], 0, ValueError),
        (None, 0, TypeError),
        ([("data", packed(ROW))], 2**31, OverflowError),
        ([("data", packed(ROW))], None, TypeError),
    ],
)
def test_only_names_with_bytes_are_payloads(payloads: Any, action: Any, error: type[Exception]) -> None:
    with pytest.raises(error):
        READERS["repr"].of_payloads(payloads, action)


@pytest.mark.parametrize("message", [None, "text", bytearray(b"x")])
def test_only_bytes_are_read(message: Any) -> None:
    for function in (_arrays.unpack, _arrays.read_answer, READERS["repr"].read):
        with pytest.raises(TypeError):
            function(message)


def test_a_request_that_is_cut_anywhere_is_refused_or_protobuf_is_asked() -> None:
    arrays = [("image", IMAGE), ("state", STATE)]
    for kind, message in [
        ("dyna", MukoeRequest(dynamics=Dynamics(data=packed(ROWS), action=300)).SerializeToString()),
        ("arrays", arrays_message(arrays).SerializeToString()),
    ]:
        assert READERS[kind].read(message) is not None
        for size in range(len(message)):
            assert READERS[kind].read(message[:size]) is None


@pytest.mark.parametrize(
    ("arguments", "error"),
    [
        ({"number": 15}, ValueError),  # keep_rows_axis
        ({"number": 0}, ValueError),
        ({"number": -1}, ValueError),
        ({"number": 2**32 + 1}, OverflowError),
        ({"data_number": 16}, ValueError),
        ({"data_number": 0}, ValueError),
        ({"data_number": "1"}, TypeError),
        ({"action_number": 1}, ValueError),
        ({"data_number": 2, "action_number": 1}, ValueError),
        ({"data_number": None, "action_number": 2}, ValueError),
        ({"max_rows": 0}, ValueError),
        ({"max_rows": 2**62}, OverflowError),
        ({"fields": []}, ValueError),
        ({"fields": [DATA, DATA]}, ValueError),
        ({"data_number": None, "fields": [DATA, DATA]}, ValueError),
        ({"fields": ["data"]}, TypeError),
        ({"fields": [None]}, TypeError),
    ],
)
def test_a_reader_of_what_cannot_be_read_is_refused(arguments: dict[str, Any], error: type[Exception]) -> None:
    good = {"fields": [DATA], "max_rows": 3, **REPR}
    assert RequestReader(**good)
    with pytest.raises(error):
        RequestReader(**{**good, **arguments})


@pytest.mark.parametrize(
    ("arguments", "error"),
    [
        (("data", (2, 0), "float32", 4), ValueError),
        (("data", (2, -1), "float32", 4), ValueError),
        (("data", (2**62, 2), "float32", 4), OverflowError),
        (("data", (2**64,), "float32", 4), OverflowError),
        (("data", (1,) * 32, "float32", 4), ValueError),
        (("data", (2,), "float32", 0), ValueError),
        (("data", (2,), "", 4), ValueError),
        (("data", (2,), "x" * 65, 4), ValueError),
        (("data", (2,), None, 4), TypeError),
        ((None, (2,), "float32", 4), TypeError),
        (("data", None, "float32", 4), TypeError),
    ],
)
def test_a_field_that_no_array_can_have_is_refused(arguments: tuple[Any, ...], error: type[Exception]) -> None:
    with pytest.raises(error):
        Field(*arguments)


def test_a_field_has_as_many_dimensions_as_leave_room_for_rows() -> None:
    shape = (1,) * 31
    deep = RequestReader(fields=[field("data", shape, "uint8")], max_rows=2, **REPR)
    assert deep.of_payloads([("data", msgpack.packb(((2, *shape), "uint8", b"xy")))]).rows == 2


def test_a_field_says_what_it_was_given() -> None:
    assert (DATA.name, DATA.shape, DATA.dtype, DATA.row_bytes) == ("data", (2, 3), "float32", 24)


# Batches.

DTYPES = st.sampled_from(["uint8", "float32", "float64", "bool", "complex128", "datetime64[s]", "int16"])


def random_array(shape: tuple[int, ...], dtype: str, seed: int = 0) -> np.ndarray:
    count = math.prod(shape) * np.dtype(dtype).itemsize
    content = np.random.default_rng(seed).integers(0, 2 if dtype == "bool" else 256, count, "uint8")
    return content.view(dtype).reshape(shape)


def requests_of(rows: list[int], shape: tuple[int, ...], dtype: str) -> tuple[list[ArrayRequest], np.ndarray]:
    """Requests with that many rows each; 0 is one row without its axis."""
    array = random_array((sum(max(count, 1) for count in rows), *shape), dtype)
    reader = RequestReader(fields=[field("data", shape, dtype)], max_rows=max(1, *rows), **DYNA)
    requests, at = [], 0
    for index, count in enumerate(rows):
        data = array[at] if count == 0 else array[at : at + count]
        at += max(count, 1)
        request = reader.read(MukoeRequest(dynamics=Dynamics(data=packed(data), action=index)).SerializeToString())
        assert request is not None
        requests.append(request)
    return requests, array


LARGE = (2**16 // 4 - 1,), (2**16 // 4,), (2**16 // 4 + 1,)  # of float32, about what is copied without the GIL
ROW_COUNTS = st.lists(st.integers(0, 4), min_size=1, max_size=6)
LENGTHS = st.lists(st.integers(1, 4), max_size=3).map(tuple)


@settings(max_examples=200)
@given(ROW_COUNTS, LENGTHS, DTYPES, st.integers(0, 5))
@example([0, 1], LARGE[0], "float32", 0)
@example([0, 2], LARGE[1], "float32", 1)
@example([3, 0], LARGE[2], "float32", 2)
@example([1] * 4, (2**12 - 1,), "float32", 0)
@example([1] * 4, (2**12,), "float32", 0)
def test_rows_are_gathered_in_order_and_padded_with_the_first(
    rows: list[int], shape: tuple[int, ...], dtype: str, padding: int
) -> None:
    requests, array = requests_of(rows, shape, dtype)
    size = len(array) + padding
    target = np.zeros((size, *shape), dtype)
    assert _arrays.gather(requests, 0, target, size) == len(array)
    assert target.tobytes() == array.tobytes() + array[:1].tobytes() * padding
    actions = np.full(size, -1, "int32")
    assert _arrays.gather_actions(requests, actions, size) == len(array)
    expected = [index for index, count in enumerate(rows) for _ in range(max(count, 1))]
    assert actions.tolist() == expected + [0] * padding


def test_a_field_is_gathered_by_its_place_in_the_declaration() -> None:
    image, state = np.arange(8, dtype="uint8").reshape(2, 4), np.arange(2, dtype="float64")
    request = READERS["arrays"].read(arrays_message([("state", state), ("image", image)]).SerializeToString())
    targets = np.zeros_like(image), np.zeros_like(state)
    for index, target in enumerate(targets):
        _arrays.gather(iter([request]), index, target, 2)
    np.testing.assert_array_equal(targets[0], image)
    np.testing.assert_array_equal(targets[1], state)


def released(size: int) -> memoryview:
    view = memoryview(bytearray(size))
    view.release()
    return view


def not_writable(size: int) -> np.ndarray:
    array = np.zeros(size, "uint8")
    array.flags.writeable = False
    return array


BAD_TARGETS = [
    (lambda size: bytes(size), BufferError),
    (not_writable, ValueError),
    (lambda size: np.zeros(2 * size, "uint8")[::2], ValueError),
    (lambda size: memoryview(bytearray(2 * size))[::2], BufferError),
    (released, ValueError),
    (lambda size: bytearray(size - 1), ValueError),
    (lambda size: bytearray(size + 1), ValueError),
    (lambda size: bytearray(size * 2), ValueError),
    (lambda size: bytearray(), ValueError),
    (lambda size: None, TypeError),
    (lambda size: [0] * size, TypeError),
]


@pytest.mark.parametrize(("make", "error"), BAD_TARGETS)
@pytest.mark.parametrize("shape", [(3,), (2**14,)])
def test_a_target_that_cannot_take_the_rows_is_refused(shape: tuple[int, ...], make: Any, error: Any) -> None:
    requests, array = requests_of([1, 2], shape, "float32")
    with pytest.raises(error):
        _arrays.gather(requests, 0, make(array.nbytes), 3)
    with pytest.raises(error):
        _arrays.gather_actions(requests, make(12), 3)


def test_a_target_may_lie_anywhere() -> None:
    requests, array = requests_of([1, 2], (3,), "float32")
    target = bytearray(1 + array.nbytes)
    _arrays.gather(requests, 0, memoryview(target)[1:], 3)
    assert target[1:] == array.tobytes()
    _arrays.gather_actions(requests, memoryview(target)[1:13], 3)
    assert np.frombuffer(target, "int32", 3, 1).tolist() == [0, 1, 1]


@pytest.mark.parametrize("size", [2, 0, -1, 2**62, 2**63 - 1])
def test_a_size_below_the_rows_or_beyond_the_target_is_refused(size: int) -> None:
    requests, array = requests_of([1, 2], (3,), "float32")
    with pytest.raises(ValueError, match=str(size)):
        _arrays.gather(requests, 0, bytearray(array.nbytes), size)
    with pytest.raises(ValueError, match=str(size)):
        _arrays.gather_actions(requests, bytearray(12), size)


def test_requests_that_make_no_batch_are_refused() -> None:
    requests, array = requests_of([1], (3,), "float32")
    others, _ = requests_of([1], (1000,), "float32")
    for wrong, error in [
        ([], ValueError),
        (requests + others, ValueError),
        ([ArrayRequest()], TypeError),
        ([ArrayRequest.__new__(ArrayRequest), *requests], TypeError),
        ([None], TypeError),
        ([*requests, b"request"], TypeError),
        (None, TypeError),
    ]:
        with pytest.raises(error):
            _arrays.gather(wrong, 0, bytearray(array.nbytes), 1)
        with pytest.raises(error):
            _arrays.gather_actions(wrong, bytearray(4), 1)
        with pytest.raises(error):
            _arrays.encode_answers(wrong, [], 0)


@pytest.mark.parametrize("index", [1, -1, 2**62])
def test_a_field_that_is_not_declared_is_refused(index: int) -> None:
    requests, array = requests_of([1], (3,), "float32")
    with pytest.raises(IndexError):
        _arrays.gather(requests, index, bytearray(array.nbytes), 1)


# Answers.


def answers_by_hand(rows: list[int], outputs: list[tuple[str, np.ndarray]], step: int) -> list[MukoeResponse]:
    answers, at = [], 0
    for count in rows:
        parts = {key: array[at : at + max(count, 1)] for key, array in outputs}
        at += max(count, 1)
        pairs = [KeyValue(key=key, values=packed(part if count > 1 else part[0])) for key, part in parts.items()]
        answers.append(MukoeResponse(result=ModelResponse(dictionary=pairs, step=step)))
    return answers


def by_row(key: str, array: np.ndarray) -> tuple[str, Any, tuple[int, ...], str]:
    return key, array, array.shape[1:], array.dtype.name


OUTPUTS = st.lists(st.tuples(st.text(max_size=5), SHAPES, DTYPES), max_size=4, unique_by=lambda output: output[0])


@settings(max_examples=200)
@given(ROW_COUNTS, OUTPUTS, st.integers(0, 2), INT32)
@example([0, 1], [("x", LARGE[0], "float32"), ("y", (), "uint8")], 0, 0)
@example([0, 2], [("x", LARGE[1], "float32"), ("y", (), "uint8")], 0, -1)
@example([3, 0], [("x", LARGE[2], "float32"), ("", (), "uint8")], 0, 2**31 - 1)
def test_answers_are_what_msgpack_and_protobuf_write(
    rows: list[int], shapes: list[tuple[str, tuple[int, ...], str]], further: int, step: int
) -> None:
    requests, array = requests_of(rows, (2,), "uint8")
    size = len(array) + further
    outputs = [(key, random_array((size, *shape), dtype, seed)) for seed, (key, shape, dtype) in enumerate(shapes)]
    answers = _arrays.encode_answers(requests, [by_row(*output) for output in outputs], step)
    by_hand = answers_by_hand(rows, outputs, step)
    assert answers == [answer.SerializeToString() for answer in by_hand]
    for message, answer in zip(answers, by_hand, strict=True):
        again = _arrays.read_answer(message)
        assert again is not None
        pairs, its_step = again
        assert its_step == step
        assert [key for key, *_ in pairs] == [pair.key for pair in answer.result.dictionary]
        for (_, shape, dtype, offset, count), pair in zip(pairs, answer.result.dictionary, strict=True):
            assert (shape, dtype, message[offset : offset + count]) == unpacked(pair.values)


def test_an_answer_keeps_the_axis_of_a_single_row_if_the_request_says_so() -> None:
    requests = [
        READERS["repr"].read(_arrays.write_request(arrays=[described("", ROW[None])], keep_rows_axis=keep, **REPR))
        for keep in (True, False, True)
    ]
    output = np.arange(6, dtype="int16").reshape(3, 2)
    answers = _arrays.encode_answers(requests, [by_row("x", output)], 5)  # type: ignore[arg-type]
    shapes = [_arrays.read_answer(answer)[0][0][1] for answer in answers]  # type: ignore[index]
    assert shapes == [(1, 2), (2,), (1, 2)]


@pytest.mark.parametrize(
    ("output", "error"),
    [
        (("x", np.zeros((2, 4)), (4,), "float64"), ValueError),  # 3 rows are wanted
        (("x", np.zeros((0, 4)), (4,), "float64"), ValueError),
        (("x", np.zeros((3, 4)), (4, 2), "float64"), ValueError),
        (("x", np.zeros((3, 4)), (2**61, 2**61), "float64"), OverflowError),
        (("x", np.zeros((3, 4)), (-4,), "float64"), ValueError),
        (("x", np.zeros((3, 4)), (1,) * 32, "float64"), ValueError),
        (("x", np.zeros((4, 3)).T, (4,), "float64"), ValueError),  # not contiguous
        (("x", memoryview(bytearray(24))[::2], (4,), "uint8"), BufferError),
        (("x", released(12), (4,), "uint8"), ValueError),
        (("x", [0] * 12, (4,), "uint8"), TypeError),
        (("x", np.zeros((3, 4)), (4,), None), TypeError),
        (("x", np.zeros((3, 4)), (4,), "x" * 65), ValueError),
        ((b"x", np.zeros((3, 4)), (4,), "float64"), TypeError),
        ((None, np.zeros((3, 4)), (4,), "float64"), TypeError),
        (("\ud800", np.zeros((3, 4)), (4,), "float64"), UnicodeEncodeError),
        (("x", np.zeros((3, 4)), (4,)), ValueError),
        (None, TypeError),
    ],
)
def test_an_output_that_cannot_be_sent_is_refused(output: Any, error: type[Exception]) -> None:
    requests, _ = requests_of([1, 2], (2,), "uint8")
    good = bytearray(3)
    with pytest.raises(error):
        _arrays.encode_answers(requests, [("good", good, (), "uint8"), output], 0)
    good.append(0)  # or its buffer would still be held


def test_outputs_may_be_read_only() -> None:
    requests, _ = requests_of([1, 2], (2,), "uint8")
    [first, second] = _arrays.encode_answers(requests, [("x", bytes(range(6)), (2,), "uint8")], 0)
    assert (first[-2:], second[-4:]) == (bytes([0, 1]), bytes([2, 3, 4, 5]))


@pytest.mark.parametrize("step", [2**31, -(2**31) - 1, 2**64])
def test_a_step_that_does_not_fit_an_int32_is_refused(step: int) -> None:
    requests, _ = requests_of([1], (2,), "uint8")
    with pytest.raises(OverflowError, match=f"^{step} does not fit an int32$|too large"):
        _arrays.encode_answers(requests, [], step)


def test_more_bytes_than_a_message_holds_are_refused() -> None:
    requests, _ = requests_of([1], (2,), "uint8")
    untouched = np.empty(2**30, "uint8")  # pages that are never touched
    outputs = [(key, untouched, (2**30,), "uint8") for key in "ab"]
    with pytest.raises(OverflowError, match="1073741824"):
        _arrays.encode_answers(requests, outputs, 0)
    with pytest.raises(OverflowError, match="1073741824"):
        _arrays.write_request(3, outputs)


ANSWER_MESSAGES = st.builds(
    lambda pairs, step: MukoeResponse(
        result=ModelResponse(dictionary=[KeyValue(key=key, values=value) for key, value in pairs], step=step)
    ).SerializeToString(),
    st.lists(st.tuples(st.text(max_size=5), PAYLOADS), max_size=3),
    INT32,
)


@settings(max_examples=500)
@given(mangled(st.one_of(ANSWER_MESSAGES, st.binary(max_size=40))))
@example(b"")
@example(b"\x0a\x00")
@example(b"\x0a\x04\x10\x05\x0a\x00")  # the step before a pair
@example(b"\x0a\x05\x0a\x03\x0a\x01\xff")  # a key that is no UTF-8
def test_any_answer_means_to_us_what_it_means_to_protobuf(message: bytes) -> None:
    try:
        ours = _arrays.read_answer(message)
    except ArrayError:
        result = MukoeResponse.FromString(message).result
        assert None in [unpacked(pair.values) for pair in result.dictionary]
        return
    if ours is None:
        return
    pairs, step = ours
    result = MukoeResponse.FromString(message).result
    assert step == result.step
    assert [(key, (shape, dtype, message[at : at + size])) for key, shape, dtype, at, size in pairs] == [
        (pair.key, unpacked(pair.values)) for pair in result.dictionary
    ]


def test_an_answer_that_is_no_array_says_which() -> None:
    message = MukoeResponse(result=ModelResponse(dictionary=[KeyValue(key="k", values=b"hello")])).SerializeToString()
    with pytest.raises(ArrayError, match=r"^'k' is 5 bytes that are not a packed array, "):
        _arrays.read_answer(message)
    with pytest.raises(ArrayError, match=r"^the payload is float32 \[2\] with 3 bytes, which does not fit that shape$"):
        _arrays.unpack(msgpack.packb(((2,), "float32", b"abc")))


# Memory for batches.


@pytest.mark.parametrize("size_bytes", [1, 63, 64, 65, 100_000])
def test_an_arena_is_a_writable_buffer_of_its_size_aligned_for_jax(size_bytes: int) -> None:
    arena = Arena(size_bytes)
    assert arena.size_bytes == size_bytes
    array = np.frombuffer(arena, np.uint8)
    assert (array.shape, array.flags.writeable) == ((size_bytes,), True)
    assert array.__array_interface__["data"][0] % 64 == 0
    array[:] = 7
    assert bytes(arena) == b"\7" * size_bytes


def test_an_arena_is_free_when_the_last_view_of_it_is_gone() -> None:
    arena = Arena(64)
    assert arena.is_free
    array = np.frombuffer(arena, np.float32).reshape(4, 4)
    views = [array, array[1:], array.view(np.uint8), memoryview(array), memoryview(arena)[3:], np.from_dlpack(array)]
    del array
    while views:
        assert not arena.is_free
        views.pop(0)
    assert arena.is_free


def test_the_memory_of_an_arena_lives_as_long_as_its_last_view() -> None:
    view = memoryview(Arena(100_000))
    view[:] = bytes(range(250)) * 400
    assert bytes(view) == bytes(range(250)) * 400


@pytest.mark.parametrize(
    ("size_bytes", "error"),
    [(0, ValueError), (-1, ValueError), (2**62, MemoryError), (2**64, OverflowError), ("1", TypeError)],
)
def test_an_arena_of_an_impossible_size_is_refused(size_bytes: Any, error: type[Exception]) -> None:
    with pytest.raises(error):
        Arena(size_bytes)


# The client's requests.


@settings(max_examples=200)
@given(SHAPES, DTYPES, INT32, st.booleans())
@example((2**16 // 4,), "float32", 0, False)
@example((2**18,), "float32", -1, True)
def test_written_requests_are_what_msgpack_and_protobuf_write(
    shape: tuple[int, ...], dtype: str, action: int, keep: bool
) -> None:
    array = random_array(shape, dtype)
    payload = packed(array)
    [one] = arrays = [described("naïve", array)]
    expected = MukoeRequest(representations=Representations(data=payload), keep_rows_axis=keep)
    assert _arrays.write_request(arrays=arrays, keep_rows_axis=keep, **REPR) == expected.SerializeToString()
    expected = MukoeRequest(dynamics=Dynamics(data=payload, action=action), keep_rows_axis=keep)
    written = _arrays.write_request(arrays=arrays, action=action, keep_rows_axis=keep, **DYNA)
    assert written == expected.SerializeToString()
    for count in range(3):
        pairs = [KeyValue(key="naïve", values=payload), KeyValue(values=payload)][:count]
        expected = MukoeRequest(arrays=Arrays(arrays=pairs), keep_rows_axis=keep)
        arrays = [one, ("", *one[1:])][:count]
        written = _arrays.write_request(arrays=arrays, keep_rows_axis=keep, **ARRAYS)
        assert written == expected.SerializeToString()


@pytest.mark.parametrize(
    ("arguments", "error"),
    [
        ({"arrays": [("x", np.zeros(4), (5,), "float64")]}, ValueError),
        ({"arrays": [("x", np.zeros(4), (2,), "float64")]}, ValueError),
        ({"arrays": [("x", np.zeros((4, 2)).T, (2, 4), "float64")]}, ValueError),
        ({"arrays": []}, ValueError),
        ({"arrays": [described("x", ROW)] * 2}, ValueError),
        ({"action": 2**31}, OverflowError),
        ({"action": 1.5}, TypeError),
        ({"action": None}, TypeError),
        ({"number": 0}, ValueError),
        ({"number": 15}, ValueError),
        ({"data_number": 16}, ValueError),
        ({"data_number": -1}, ValueError),
        ({"action_number": 16}, ValueError),
    ],
)
def test_a_request_that_cannot_be_sent_is_refused(arguments: dict[str, Any], error: type[Exception]) -> None:
    good = {"arrays": [described("x", ROW)], "action": 1, **DYNA}
    assert _arrays.write_request(**good)
    with pytest.raises(error):
        _arrays.write_request(**{**good, **arguments})


def test_the_numbers_are_those_of_the_proto() -> None:
    numbers = {field.name: field.number for field in MukoeRequest.DESCRIPTOR.fields}
    assert numbers == {"representations": 1, "dynamics": 2, "arrays": 3, "keep_rows_axis": 15}
