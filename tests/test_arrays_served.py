"""Requests of arrays over a socket: who is served, what a batch looks like, and who is refused."""

from __future__ import annotations

import array
import pickle
import re
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

from grpc_batcher import Array, Batch, MukoeBatcher, MukoeBatcherClient, RequestError
from grpc_batcher._proto.mukoe_batcher_pb2 import (
    Arrays,
    Dynamics,
    KeyValue,
    MukoeRequest,
    MukoeResponse,
    Representations,
)

import grpc
import ml_dtypes
import msgpack
import numpy as np
import pytest
from serving import (
    Held,
    OldStyleReply,
    address_of,
    connect,
    error_of,
    eventually,
    in_background,
    in_callback,
    old_style_request,
    serving,
    waiting,
)

DATA = {"data": Array((2, 3), "float32")}
NAMED = {"image": Array((4,), "uint8"), "state": Array((), "float64")}
DECLARED = {"repr": DATA, "dyna": DATA, "arrays": NAMED}


def row(number: float) -> np.ndarray:
    """A row that fits DATA, unlike that of any other number."""
    return np.arange(6, dtype=np.float32).reshape(2, 3) + 10 * np.float32(number)


def rows(*numbers: float) -> np.ndarray:
    return np.stack([row(number) for number in numbers])


def numbers_in(data: np.ndarray) -> list[float]:
    """The numbers of the rows in a batch or an answer."""
    numbers = [float(each[0, 0]) / 10 for each in data]
    np.testing.assert_array_equal(data, rows(*numbers))
    return numbers


def pack(value: np.ndarray) -> bytes:
    """What MuKoe's actors send: msgpack's own packing of shape, name and bytes."""
    return msgpack.packb((value.shape, value.dtype.name, value.tobytes()))


def unpack(payload: bytes) -> np.ndarray:
    shape, dtype, data = msgpack.unpackb(payload)
    return np.frombuffer(data, dtype).reshape(shape)


class Seen(NamedTuple):
    """A batch as the callback saw it."""

    arrays: dict[str, np.ndarray]
    count: int
    size: int


class Recording:
    """A callback that keeps copies of what it sees, and returns its input."""

    def __init__(self) -> None:
        self.batches: list[Seen] = []

    def __call__(self, batch: Batch) -> dict[str, np.ndarray]:
        self.batches.append(Seen({name: value.copy() for name, value in batch.items()}, batch.count, batch.size))
        return dict(batch)


def assert_equal(answer: tuple[dict[str, np.ndarray], int], expected: dict[str, np.ndarray], step: int = 0) -> None:
    """Compare an answer, including shapes and dtypes."""
    assert answer[1] == step
    assert answer[0].keys() == expected.keys()
    for name, value in expected.items():
        assert answer[0][name].dtype == value.dtype
        assert answer[0][name].shape == value.shape
        np.testing.assert_array_equal(answer[0][name], value)


# ---- who is served ----


def test_a_repr_callback_gets_and_returns_arrays() -> None:
    def infer(batch: Batch) -> Any:
        assert isinstance(batch["data"], np.ndarray)
        assert (list(batch), batch["data"].dtype) == (["data"], np.float32)
        return {"double": 2 * batch["data"], "sum": batch["data"].sum(axis=(1, 2)), "list": [[1, 2]] * batch.size}

    with serving(infer, arrays=DATA) as batcher, connect(batcher, arrays=True) as client:
        expected = {"double": 2 * row(5), "sum": row(5).sum(), "list": np.array([1, 2])}
        assert_equal(client.send_request(row(5)), expected)


def test_a_dyna_callback_gets_the_actions_as_int32_once_per_row() -> None:
    recording = Recording()
    with (
        Held(recording) as held,
        serving(held, model="dyna", arrays=DATA, batch_sizes=(1, 8)) as batcher,
        connect(batcher, arrays=True) as client,
    ):
        first = in_callback(held, client, row(0), 9)
        others = [
            waiting(batcher, client.send_request, data, action) for data, action in ((rows(1, 2), -5), (row(3), 7))
        ]
        held.release(2)
        assert_equal(first.result(), {"data": row(0), "action": np.array(9, np.int32)})
        assert_equal(others[0].result(), {"data": rows(1, 2), "action": np.array([-5, -5], np.int32)})
        assert_equal(others[1].result(), {"data": row(3), "action": np.array(7, np.int32)})
    actions = recording.batches[1].arrays["action"]
    assert actions.dtype == np.int32
    assert actions.tolist() == [-5, -5, 7, -5, -5, -5, -5, -5]


def test_a_callback_of_the_kind_arrays_gets_any_names() -> None:
    image, state = np.arange(4, dtype=np.uint8), np.float64(0.5)
    with (
        serving(Recording(), model="arrays", arrays=NAMED) as batcher,
        connect(batcher, arrays=True) as client,
    ):
        assert_equal(client.send_request(state=state, image=image), {"image": image, "state": state})
        images, states = np.stack([image, image + 1]), np.array([0.5, 1.5])
        assert_equal(client.send_request(image=images, state=states), {"image": images, "state": states})
        assert batcher.metrics().model == "arrays"


def old_actor(batcher: MukoeBatcher, value: np.ndarray) -> OldStyleReply:
    """Send what an unmodified actor sends: its own msgpack, on a stream of its own."""
    request = MukoeRequest(representations=Representations(data=pack(value)))
    return old_style_request(address_of(batcher), request.SerializeToString())


def test_old_actors_array_clients_and_byte_clients_share_a_batch() -> None:
    recording = Recording()
    with (
        Held(recording) as held,
        serving(held, arrays=DATA) as batcher,
        connect(batcher, arrays=True) as client,
        connect(batcher) as byte_client,
    ):
        first = in_callback(held, client, row(0))
        batcher.publish("weights", step=12)
        old = waiting(batcher, old_actor, batcher, rows(1))
        new = waiting(batcher, client.send_request, row(2))
        plain = waiting(batcher, byte_client.send_request, pack(row(3)))
        held.release(2)
        assert_equal(first.result(), {"data": row(0)})
        (message,), code, _details = old.result()
        assert code is grpc.StatusCode.OK
        (pair,) = MukoeResponse.FromString(message).result.dictionary
        assert MukoeResponse.FromString(message).result.step == 12
        # Actors add the leading axis themselves.
        assert (pair.key, pair.values) == ("data", pack(row(1)))
        assert_equal(new.result(), {"data": row(2)}, step=12)
        assert plain.result() == ({"data": pack(row(3))}, 12)
    assert numbers_in(recording.batches[1].arrays["data"]) == [1, 2, 3]


@pytest.mark.parametrize("use_bin_type", [True, False])
def test_every_way_in_which_msgpack_packs_an_array_is_read(use_bin_type: bool) -> None:
    payloads = [
        msgpack.packb((row(1).shape, "float32", row(1).tobytes()), use_bin_type=use_bin_type),
        msgpack.packb([[1, 2, 3], b"float32", row(1).tobytes()], use_bin_type=use_bin_type),
        b"\xdc\0\3\xdd\0\0\0\2\xcd\0\2\xd3\0\0\0\0\0\0\0\3\xd9\7float32\xc6\0\0\0\x18" + row(1).tobytes(),
    ]
    with serving(Recording(), arrays=DATA) as batcher, connect(batcher) as client:
        for payload in payloads:
            assert client.send_request(payload) == ({"data": pack(row(1))}, 0)


@pytest.mark.parametrize(
    "more",
    [
        pytest.param(b"\x70\x01", id="a field that nobody knows"),
        pytest.param(
            MukoeRequest(representations=Representations()).SerializeToString(), id="the message in two parts"
        ),
        pytest.param(b"\x78\x80\x00", id="false in two bytes"),
    ],
)
def test_messages_that_only_protobuf_reads_are_served(more: bytes) -> None:
    message = MukoeRequest(representations=Representations(data=pack(row(1)))).SerializeToString()
    with serving(Recording(), arrays=DATA) as batcher:
        for whole in (message + more, more + message):
            (reply,), code, _details = old_style_request(address_of(batcher), whole)
            assert code is grpc.StatusCode.OK
            assert MukoeResponse.FromString(reply).result.dictionary[0].values == pack(row(1))


def test_a_pickled_client_sends_arrays() -> None:
    with (
        serving(Recording(), arrays=DATA) as batcher,
        connect(batcher, arrays=True) as client,
        pickle.loads(pickle.dumps(client)) as copy,
    ):
        assert_equal(copy.send_request(row(1)), {"data": row(1)})


def test_an_answers_arrays_are_the_callers_to_change() -> None:
    with serving(Recording(), arrays=DATA) as batcher, connect(batcher, arrays=True) as client:
        answer, _step = client.send_request(row(1))
        answer["data"][:] = 0
        assert answer["data"].flags.aligned
        assert_equal(client.send_request(row(1)), {"data": row(1)})


# ---- what may be sent ----


@pytest.mark.parametrize(
    "value",
    [
        pytest.param(row(1).tolist(), id="lists of float64, which is another dtype"),
        pytest.param(row(1).astype(np.float64), id="another dtype"),
    ],
)
def test_the_dtype_must_be_the_declared_one(value: Any) -> None:
    with serving(Recording(), arrays=DATA) as batcher, connect(batcher, arrays=True) as client:
        error = error_of(client.send_request, value)
        assert error.code() is grpc.StatusCode.INVALID_ARGUMENT
        assert error.details() == (
            "data is float64 [2, 3]; this batcher takes float32 [2, 3], or 1 to 8 rows of it as [rows, 2, 3]"
        )


def read_only(value: np.ndarray) -> np.ndarray:
    value.flags.writeable = False
    return value


@pytest.mark.parametrize(
    "value",
    [
        pytest.param(read_only(row(1)), id="read-only"),
        pytest.param(np.asfortranarray(row(1)), id="in Fortran's order"),
        pytest.param(np.repeat(row(1), 2, axis=1)[:, ::2], id="every second"),
        pytest.param(row(1)[::-1, ::-1], id="backwards"),
        pytest.param(np.broadcast_to(np.float32(1), (2, 3)), id="broadcast"),
        pytest.param(row(1).astype(">f4"), id="big-endian"),
        pytest.param(row(1).astype(">f4").T.copy().T, id="big-endian and in Fortran's order"),
        pytest.param(memoryview(array.array("f", range(6))).cast("B").cast("f", (2, 3)), id="memoryview"),
        pytest.param(np.ma.array(row(1)), id="a subclass"),
        pytest.param(np.frombuffer(b"!" + row(1).tobytes(), np.float32, 6, 1).reshape(2, 3), id="unaligned"),
    ],
)
def test_arrays_of_any_layout_arrive_as_they_are(value: Any) -> None:
    with serving(Recording(), arrays=DATA) as batcher, connect(batcher, arrays=True) as client:
        assert_equal(client.send_request(value), {"data": np.ascontiguousarray(value, np.float32)})


@pytest.mark.parametrize("name", ["bool", "int8", "uint16", "int64", "float16", "float64", "complex64"])
def test_numpys_dtypes_arrive_as_they_are(name: str) -> None:
    value = np.array([[0, 1], [1, 0]], name)
    declared = {"data": Array((2, 2), name)}
    with serving(Recording(), arrays=declared) as batcher, connect(batcher, arrays=True) as client:
        assert_equal(client.send_request(value), {"data": value})


@pytest.mark.parametrize("name", ["bfloat16", "float8_e4m3fn", "float8_e5m2"])
def test_the_dtypes_of_ml_dtypes_arrive_as_they_are(name: str) -> None:
    value = np.array([0.5, -2, 1], getattr(ml_dtypes, name))
    recording = Recording()
    with (
        serving(recording, arrays={"data": Array((3,), name)}, batch_sizes=(8,)) as batcher,
        connect(batcher, arrays=True) as client,
    ):
        assert_equal(client.send_request(value), {"data": value})
        several = np.stack([value, -value])
        assert_equal(client.send_request(several), {"data": several})
        assert error_of(client.send_request, value.astype(np.float16)).details().startswith("data is float16 [3]; this")
    assert recording.batches[0].arrays["data"].dtype == value.dtype


def test_rows_of_a_megabyte_arrive_as_they_are() -> None:
    declared = {"data": Array((512, 512), "float32")}
    values = np.random.default_rng(1).random((3, 512, 512), np.float32)
    with serving(Recording(), arrays=declared, batch_sizes=(4, 8)) as batcher, connect(batcher, arrays=True) as client:
        assert_equal(client.send_request(values), {"data": values})


# ---- rows ----


def test_the_answer_to_several_rows_has_an_axis_of_rows_and_that_to_one_has_not_unless_asked() -> None:
    recording = Recording()
    with (
        Held(recording) as held,
        serving(held, arrays=DATA) as batcher,
        connect(batcher, arrays=True) as client,
    ):
        first = in_callback(held, client, row(0))
        requests = [
            waiting(batcher, client.send_request, row(1)),
            waiting(batcher, client.send_request, rows(2)),
            waiting(batcher, client.send_request, rows(3), rows=True),
            waiting(batcher, client.send_request, rows(4, 5)),
            waiting(batcher, client.send_request, rows(6, 7), rows=True),
        ]
        held.release(2)
        for request, expected in zip(
            [first, *requests], [row(0), row(1), row(2), rows(3), rows(4, 5), rows(6, 7)], strict=True
        ):
            assert_equal(request.result(), {"data": expected})
        assert batcher.metrics().batched_requests == 6
        assert batcher.metrics().batched_rows == 8
        assert batcher.metrics().batch_sizes.sum == 8
    assert numbers_in(recording.batches[1].arrays["data"]) == [1, 2, 3, 4, 5, 6, 7]


def test_a_declared_number_takes_rows_as_well() -> None:
    declared = {"data": Array((), "int64")}
    with serving(Recording(), arrays=declared) as batcher, connect(batcher, arrays=True) as client:
        for value, options in ((np.int64(5), {}), (np.array([5, 6]), {}), (np.array([5]), {"rows": True})):
            assert_equal(client.send_request(value, **options), {"data": np.asarray(value)})
        assert_equal(client.send_request([5]), {"data": np.array(5)})


def test_a_batch_of_one_of_the_allowed_sizes_is_not_padded_and_others_repeat_row_0() -> None:
    recording = Recording()
    with (
        serving(recording, arrays=DATA, batch_sizes=(2, 4, 8)) as batcher,
        connect(batcher, arrays=True) as client,
    ):
        for count, padded_rows in ((1, 1), (2, 1), (3, 2), (5, 5), (8, 5)):
            answer, _step = client.send_request(rows(*range(count)), rows=True)
            assert numbers_in(answer["data"]) == list(range(count))
            assert batcher.metrics().padded_rows == padded_rows
        assert batcher.metrics().batch_sizes.sum == 19
    assert [(seen.count, seen.size) for seen in recording.batches] == [(1, 2), (2, 2), (3, 4), (5, 8), (8, 8)]
    for seen in recording.batches:
        assert numbers_in(seen.arrays["data"]) == [*range(seen.count), *[0] * (seen.size - seen.count)]


def test_without_batch_sizes_nothing_is_padded() -> None:
    recording = Recording()
    with serving(recording, arrays=DATA) as batcher, connect(batcher, arrays=True) as client:
        for count in range(1, 9):
            client.send_request(rows(*range(count)))
        assert batcher.metrics().padded_rows == 0
    assert [seen.size for seen in recording.batches] == list(range(1, 9))


def test_requests_are_never_split_nor_overtaken() -> None:
    recording = Recording()
    with (
        Held(recording) as held,
        serving(held, arrays=DATA, batch_size=4) as batcher,
        connect(batcher, arrays=True) as client,
    ):
        first = in_callback(held, client, row(0))
        sizes = (3, 2, 1, 1, 4, 1)
        begins = [1, 4, 6, 7, 8, 12]
        requests = [
            waiting(batcher, client.send_request, rows(*range(begin, begin + size)), rows=True)
            for begin, size in zip(begins, sizes, strict=True)
        ]
        held.release(float("inf"))
        assert_equal(first.result(), {"data": row(0)})
        for request, begin, size in zip(requests, begins, sizes, strict=True):
            assert_equal(request.result(), {"data": rows(*range(begin, begin + size))})
    assert [numbers_in(seen.arrays["data"]) for seen in recording.batches] == [
        [0],
        [1, 2, 3],
        [4, 5, 6, 7],
        [8, 9, 10, 11],
        [12],
    ]


def test_a_batch_is_full_by_rows() -> None:
    """The window is longer than the test may take."""
    with (
        serving(Recording(), arrays=DATA, batch_size=4, batch_timeout_s=1e6) as batcher,
        connect(batcher, arrays=True) as client,
    ):
        early = waiting(batcher, client.send_request, rows(1, 2, 3))
        assert_equal(client.send_request(row(4)), {"data": row(4)})
        assert_equal(early.result(), {"data": rows(1, 2, 3)})
        assert batcher.metrics().batches["full"] == 1


def test_the_queues_limit_counts_rows() -> None:
    with (
        Held(Recording()) as held,
        serving(held, arrays=DATA, batch_size=4, max_queue_size=4) as batcher,
        connect(batcher, arrays=True) as client,
    ):
        in_callback(held, client, row(0))
        first = waiting(batcher, client.send_request, rows(1, 2, 3))
        error = error_of(client.send_request, rows(4, 5))
        assert error.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
        assert error.details() == (
            "the queue is full: 3 rows are waiting, and this request's 2 would exceed the limit of 4 (max_queue_size)"
        )
        second = waiting(batcher, client.send_request, row(6))
        assert (batcher.metrics().waiting, batcher.metrics().waiting_rows) == (2, 4)
        assert error_of(client.send_request, row(7)).details() == (
            "the queue is full: 4 rows are waiting, the most allowed (max_queue_size)"
        )
        held.release(2)
        assert_equal(first.result(), {"data": rows(1, 2, 3)})
        assert_equal(second.result(), {"data": row(6)})


# ---- who is refused ----


def raw(data: bytes) -> bytes:
    return MukoeRequest(representations=Representations(data=data)).SerializeToString()


def named(*pairs: tuple[str, np.ndarray]) -> bytes:
    return MukoeRequest(
        arrays=Arrays(arrays=[KeyValue(key=name, values=pack(value)) for name, value in pairs])
    ).SerializeToString()


EXPECTED = "this batcher takes float32 [2, 3], or 1 to 8 rows of it as [rows, 2, 3]"
IMAGE, STATE = np.zeros(4, np.uint8), np.float64(0)

BAD_REQUESTS = [
    ("repr", raw(pack(np.zeros((3, 2), np.float32))), f"data is float32 [3, 2]; {EXPECTED}"),
    ("repr", raw(pack(np.zeros(6, np.float32))), f"data is float32 [6]; {EXPECTED}"),
    ("repr", raw(pack(np.zeros((1, 1, 2, 3), np.float32))), f"data is float32 [1, 1, 2, 3]; {EXPECTED}"),
    ("repr", raw(pack(np.zeros((9, 2, 3), np.float32))), f"data is float32 [9, 2, 3]; {EXPECTED}"),
    ("repr", raw(pack(np.zeros((0, 2, 3), np.float32))), f"data is float32 [0, 2, 3]; {EXPECTED}"),
    ("repr", raw(pack(np.zeros((2, 3), np.int32))), f"data is int32 [2, 3]; {EXPECTED}"),
    (
        "repr",
        MukoeRequest(representations=Representations(data=pack(row(1))), keep_rows_axis=True).SerializeToString(),
        "data is float32 [2, 3]; with keep_rows_axis this batcher takes float32 [rows, 2, 3], 1 to 8 rows",
    ),
    (
        "repr",
        raw(msgpack.packb(((2, 3), "float32", bytes(23)))),
        "data is float32 [2, 3] with 23 bytes of data; it must have 24",
    ),
    ("repr", raw(msgpack.packb(((2, 3), "<f4", bytes(24)))), f"data is <f4 [2, 3]; {EXPECTED}"),
    ("repr", raw(b""), "data is 0 bytes that are not a packed array"),
    ("repr", raw(b"\xff" * 24), "data is 24 bytes that are not a packed array"),
    ("repr", raw(row(1).tobytes()), "data is 24 bytes that are not a packed array"),
    ("repr", raw(pack(row(1))[:-1]), "it ends early"),
    ("repr", raw(pack(row(1)) + b"!"), "bytes follow its data"),
    ("repr", raw(msgpack.packb({"shape": (2, 3)})), "it is not a msgpack array of 3 elements"),
    ("repr", raw(msgpack.packb(((2, -3), "float32", bytes(24)))), "its shape is not of integers from 0"),
    ("repr", raw(msgpack.packb(((2.0, 3), "float32", bytes(24)))), "its shape is not of integers from 0"),
    ("repr", raw(msgpack.packb(((2**64 - 1,), "float32", b""))), "its shape overflows"),
    ("repr", raw(msgpack.packb(((2**62, 2**62, 2, 3), "float32", b""))), "data is float32 [46116860"),
    ("repr", raw(msgpack.packb(((2**62, 2, 3), "float32", bytes(24)))), f"data is float32 [{2**62}, 2, 3]; {EXPECTED}"),
    ("repr", raw(msgpack.packb(((1,) * 33, "float32", bytes(4)))), "its shape has over 32 dimensions"),
    ("repr", raw(msgpack.packb(((2, 3), 5, bytes(24)))), "its dtype is not a str"),
    ("repr", raw(msgpack.packb(((2, 3), "float32", [0] * 6))), "its data is not a bin"),
    (
        "repr",
        MukoeRequest(dynamics=Dynamics(data=pack(row(1)))).SerializeToString(),
        "the request holds dynamics; this",
    ),
    ("repr", named(("data", row(1))), "the request holds arrays; this batcher serves 'repr' and takes representations"),
    ("repr", b"", "the request holds no request_type"),
    ("arrays", b"\x72\x04\x0a\x02hi", "the request holds no request_type"),  # but a kind that is added later
    ("repr", b"\xff\xff", "2 bytes that are not a MukoeRequest"),
    ("dyna", raw(pack(row(1))), "the request holds representations; this batcher serves 'dyna' and takes dynamics"),
    ("arrays", raw(pack(row(1))), "the request holds representations; this batcher serves 'arrays' and takes arrays"),
    ("arrays", named(("image", IMAGE)), "the request has no array 'state'; this batcher takes 'image', 'state'"),
    ("arrays", named(), "the request has no array 'image'; this batcher takes 'image', 'state'"),
    (
        "arrays",
        named(("image", IMAGE), ("state", STATE), ("more", IMAGE)),
        "the request has an array 'more'; this batcher takes 'image', 'state'",
    ),
    ("arrays", named(("image", IMAGE), ("image", IMAGE), ("state", STATE)), "the request has image twice"),
    (
        "arrays",
        named(("image", np.zeros((2, 4), np.uint8)), ("state", np.zeros(3))),
        "the arrays of a request must have the same number of rows; image has 2, state has 3",
    ),
    (
        "arrays",
        named(("image", IMAGE), ("state", np.zeros((2, 2)))),
        "state is float64 [2, 2]; this batcher takes float64 [], or 1 to 8 rows of it as [rows]",
    ),
]

GOOD_REQUESTS: dict[str, Callable[[MukoeBatcherClient], Any]] = {
    "repr": lambda client: client.send_request(row(1)),
    "dyna": lambda client: client.send_request(row(1), 3),
    "arrays": lambda client: client.send_request(image=IMAGE, state=STATE),
}


@pytest.fixture(scope="module")
def batchers() -> Iterator[dict[str, tuple[MukoeBatcher, MukoeBatcherClient, Recording]]]:
    """A batcher of each kind, a client of it, and what its callback saw."""
    recordings = {kind: Recording() for kind in DECLARED}

    def one(kind: str) -> Any:
        return serving(recordings[kind], model=kind, arrays=DECLARED[kind])

    with one("repr") as first, one("dyna") as second, one("arrays") as third:
        of_kind = {"repr": first, "dyna": second, "arrays": third}
        clients = {kind: connect(batcher, arrays=True) for kind, batcher in of_kind.items()}
        yield {kind: (of_kind[kind], clients[kind], recordings[kind]) for kind in DECLARED}
        for client in clients.values():
            client.close()


@pytest.mark.parametrize(("kind", "message", "text"), BAD_REQUESTS)
def test_a_bad_request_is_told_what_came_and_what_is_expected_and_the_next_is_served(
    kind: str,
    message: bytes,
    text: str,
    batchers: dict[str, tuple[MukoeBatcher, MukoeBatcherClient, Recording]],
) -> None:
    batcher, client, recording = batchers[kind]
    refused = batcher.metrics().requests.get("INVALID_ARGUMENT", 0)
    seen = len(recording.batches)
    messages, code, details = old_style_request(address_of(batcher), message)
    assert (messages, code) == ([], grpc.StatusCode.INVALID_ARGUMENT)
    assert text in details
    assert "\n" not in details
    assert batcher.metrics().requests["INVALID_ARGUMENT"] == refused + 1
    assert len(recording.batches) == seen
    GOOD_REQUESTS[kind](client)


def test_a_bad_request_fails_no_other_of_its_time() -> None:
    with (
        Held(Recording()) as held,
        serving(held, arrays=DATA) as batcher,
        connect(batcher, arrays=True) as client,
    ):
        in_callback(held, client, row(0))
        good = [waiting(batcher, client.send_request, row(1))]
        assert error_of(client.send_request, row(0)[0]).code() is grpc.StatusCode.INVALID_ARGUMENT
        good.append(waiting(batcher, client.send_request, row(2)))
        held.release(2)
        for number, request in enumerate(good, 1):
            assert_equal(request.result(), {"data": row(number)})


class Broken:
    """Not an array, and says so in its own way."""

    def __init__(self, error: Exception) -> None:
        self._error = error

    def __array__(self, dtype: Any = None, copy: Any = None) -> Any:
        raise self._error

    def __repr__(self) -> str:
        return "Broken()"


@pytest.mark.parametrize(
    ("arguments", "error", "text"),
    [
        ({}, TypeError, "a request needs data, or the arrays that the batcher declares, by name"),
        ({"data": "abc"}, TypeError, "data is 'abc': the dtype <U3 cannot be sent"),
        ({"data": b"abc"}, TypeError, "data is b'abc': the dtype |S3 cannot be sent"),
        ({"data": object()}, TypeError, "the dtype object cannot be sent"),
        ({"data": [10**400]}, TypeError, "the dtype object cannot be sent"),
        ({"data": {"a": 1}}, TypeError, "data is {'a': 1}: the dtype object cannot be sent"),
        ({"data": np.array(["2020"], "datetime64[D]")}, TypeError, "the dtype datetime64[D] cannot be sent"),
        ({"data": [[1, 2], [3]]}, (TypeError, ValueError), "data is [[1, 2], [3]]: "),
        ({"data": Broken(TypeError("no"))}, TypeError, "data is Broken(): no"),
        ({"data": Broken(UnicodeDecodeError("utf-8", b"x", 0, 1, "no"))}, ValueError, "data is Broken(): 'utf-8'"),
        ({"data": np.zeros((1,) * 32)}, ValueError, "a shape of over 31 dimensions"),
        ({"data": row(1), "action": "3"}, TypeError, "action is a str: '3'; it must be an int"),
        ({"data": row(1), "action": 2**31}, ValueError, "action is 2147483648, which does not fit an int32"),
        ({"action": 3}, TypeError, "no model takes the arguments (action); give data, data and action, or arrays"),
        ({"action": 3, "image": IMAGE}, TypeError, "no model takes the arguments (action, image)"),
        ({"data": row(1), "image": IMAGE}, TypeError, "no model takes the arguments (data, image)"),
        ({"data": 5, "rows": True}, ValueError, "data is int64 []; with rows=True its first axis must be rows"),
        ({"data": np.zeros((0, 2)), "rows": True}, ValueError, "data is float64 [0, 2]; with rows=True its first axis"),
        (
            {"image": np.zeros((2, 4), np.uint8), "state": np.zeros(3), "rows": True},
            ValueError,
            "state has 3 rows, and the array before it 2; they must agree",
        ),
        ({"\udc80": IMAGE}, ValueError, "surrogates not allowed"),
    ],
)
@pytest.mark.filterwarnings("ignore:Creating an ndarray from ragged")  # numpy 1.23
def test_arguments_that_cannot_be_sent_raise_before_anything_is_sent(
    arguments: dict[str, Any], error: Any, text: str
) -> None:
    """Nothing listens there, so that a request that was sent would raise RequestError."""
    with MukoeBatcherClient("127.0.0.1:1", arrays=True) as client, pytest.raises(error, match=re.escape(text)):
        client.send_request(**arguments)


def test_requests_of_send_many_are_mappings_in_any_order() -> None:
    with (
        serving(lambda batch: dict(batch), model="dyna", arrays=DATA) as batcher,
        connect(batcher, arrays=True) as client,
    ):
        answers = client.send_many(
            [
                {"action": 3, "data": row(1)},
                {"data": row(2), "action": None, "rows": False},
                {"rows": True, "data": rows(3, 4)},
            ],
            return_exceptions=True,
        )
        assert_equal(answers[0], {"data": row(1), "action": np.array(3, np.int32)})
        assert isinstance(answers[1], RequestError)  # as without the action
        assert isinstance(answers[2], RequestError)


def test_rows_need_a_client_of_arrays() -> None:
    with (
        MukoeBatcherClient("127.0.0.1:1") as client,
        pytest.raises(TypeError, match="create the client with arrays=True"),
    ):
        client.send_request(b"data", rows=True)


def test_a_batcher_of_bytes_refuses_named_arrays_and_serves_the_next_request() -> None:
    with serving() as batcher, connect(batcher, arrays=True) as client, connect(batcher) as byte_client:
        error = error_of(client.send_request, image=IMAGE)
        assert error.code() is grpc.StatusCode.INVALID_ARGUMENT
        assert error.details() == "the request holds arrays; this batcher serves 'repr' and takes representations"
        assert byte_client.send_request(b"data") == ({"result": b"data"}, 0)


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (b"bytes", "are not a packed array"),
        (pack(row(1))[:-1], "it ends early"),
        (msgpack.packb(((2,), "flaot", b"ab")), "the dtype 'flaot' is unknown here"),
        (msgpack.packb(((2,), "object", bytes(16))), "the dtype object cannot be sent"),
        (msgpack.packb(((2,), "float32", bytes(6))), "float32 [2] with 6 bytes; it must have 8"),
        (msgpack.packb(((0, 2**62), "float32", b"")), "holds no arrays"),
    ],
)
def test_an_answer_that_is_no_array_is_an_error_and_the_client_goes_on(value: bytes, text: str) -> None:
    """From another server, or from a batcher of bytes whose callback packs its answers itself."""
    answers = [value, pack(row(1))]
    with (
        serving(lambda requests: [({"value": answers.pop(0)}, 3) for _ in requests]) as batcher,
        connect(batcher, arrays=True) as client,
    ):
        error = error_of(client.send_request, row(0))
        assert error.code() is grpc.StatusCode.INTERNAL
        assert re.match(r"the server's reply of \d+ bytes holds no arrays: ", error.details())
        assert text in error.details()
        assert_equal(client.send_request(row(0)), {"value": row(1)}, step=3)


# ---- under load ----


@pytest.mark.parametrize("batch_sizes", [None, (1, 4, 16)])
def test_every_caller_gets_its_own_rows_under_load(batch_sizes: tuple[int, ...] | None) -> None:
    """Callers of several kinds, with one to five rows each, from one batcher."""
    callers, requests = 12, 40

    def ask(caller: int) -> None:
        chance = np.random.default_rng(caller)
        with connect(batcher, arrays=caller % 3 > 0) as client:
            for number in range(requests):
                value = rows(*(caller + (number * 5 + each) / 1024 for each in range(chance.integers(1, 6))))
                if caller % 3 == 0:
                    expected = value[0] if len(value) == 1 else value
                    assert client.send_request(pack(value)) == ({"data": pack(expected)}, 0)
                else:
                    assert_equal(client.send_request(value, rows=True), {"data": value})

    with serving(lambda batch: {"data": batch["data"]}, arrays=DATA, batch_size=16, batch_sizes=batch_sizes) as batcher:
        for done in [in_background(ask, caller) for caller in range(callers)]:
            done.result()
        assert batcher.metrics().requests == {"OK": callers * requests}
        eventually(lambda: batcher.metrics().open_streams == 0)
