"""What a callback with declared arrays may do with its batch and return, and what its callers get."""

from __future__ import annotations

import ctypes
import gc
import logging
import re
from collections import UserDict
from collections.abc import Iterator
from typing import Any

from grpc_batcher import Array, Batch, MukoeBatcher, MukoeBatcherClient
from grpc_batcher._models import MODELS
from grpc_batcher._proto.mukoe_batcher_pb2 import MukoeRequest, Representations
from grpc_batcher._server.array_callback import ArrayCallback
from grpc_batcher._server.metrics import Recorder
from grpc_batcher._server.published import Published

import grpc
import numpy as np
import pytest
from serving import Held, connect, error_of, in_background, in_callback, serving, waiting
from test_arrays_served import DATA, NAMED, Recording, assert_equal, numbers_in, pack, row, rows


class Programmed:
    """A callback that does what the test says, once, and otherwise returns its input."""

    def __init__(self) -> None:
        self.next: Any = None

    def __call__(self, batch: Batch) -> Any:
        function, self.next = self.next, None
        return {"data": batch["data"]} if function is None else function(batch)


@pytest.fixture(scope="module")
def server() -> Iterator[tuple[Programmed, MukoeBatcher, MukoeBatcherClient]]:
    programmed = Programmed()
    with (
        serving(programmed, arrays=DATA, batch_sizes=(4, 8)) as batcher,
        connect(batcher, arrays=True) as client,
    ):
        yield programmed, batcher, client


# ---- the batch ----


def test_a_batch_is_a_mapping_with_what_the_callback_needs() -> None:
    batches = []

    def keep(batch: Batch) -> Any:
        batches.append(batch)
        return dict(batch)

    with (
        serving(keep, model="arrays", arrays=NAMED, batch_sizes=(4, 8)) as batcher,
        connect(batcher, arrays=True) as client,
    ):
        batcher.publish("weights", step=12)
        client.send_request(image=np.zeros((3, 4), np.uint8), state=np.zeros(3))
    (batch,) = batches
    assert isinstance(batch, Batch)
    assert (set(batch), len(batch), "image" in batch, "other" in batch) == ({"image", "state"}, 2, True, False)
    assert (batch.count, batch.size, batch.weights, batch.step) == (3, 4, "weights", 12)
    assert (batch["image"].shape, batch["state"].shape) == ((4, 4), (4,))
    assert batch["image"].flags.writeable
    assert repr(batch) == "<Batch of 3 rows and 1 more; image: uint8 [4, 4], state: float64 [4]; step 12>"
    with pytest.raises(KeyError):
        batch["other"]


@pytest.mark.parametrize(
    ("arguments", "error", "text"),
    [
        ((1, ValueError()), IndexError, "row is 1; this batch has rows from 0 to 0"),
        ((-1, ValueError()), IndexError, "row is -1; this batch has rows from 0 to 0"),
        (("0", ValueError()), TypeError, "'str' object"),
        ((0.5, ValueError()), TypeError, "'float' object"),
        ((0, "no"), TypeError, "exception is 'no'; it must be an exception"),
        ((0, ValueError), TypeError, "exception is <class 'ValueError'>; it must be an exception"),
    ],
)
def test_failing_what_is_no_row_or_with_no_exception_raises_in_the_callback(
    arguments: tuple[Any, Any],
    error: type[Exception],
    text: str,
    server: tuple[Programmed, MukoeBatcher, MukoeBatcherClient],
) -> None:
    """The padding has no rows that could fail."""
    programmed, _batcher, client = server

    def fail_wrongly(batch: Batch) -> Any:
        with pytest.raises(error, match=re.escape(text)):
            batch.fail(*arguments)
        return {"data": batch["data"]}

    programmed.next = fail_wrongly
    assert_equal(client.send_request(row(1)), {"data": row(1)})


# ---- failing some rows ----


def fail_some(batch: Batch) -> Any:
    """Fail the rows with odd numbers, and return nothing of use for them."""
    data = batch["data"]
    for index, number in enumerate(numbers_in(data[: batch.count])):
        if number % 2:
            batch.fail(np.int64(index), ValueError(f"odd: {number:.0f}"))
            data[index] = np.nan
    return {"data": data}


def test_a_failed_row_fails_its_request_alone() -> None:
    with (
        Held(fail_some) as held,
        serving(held, arrays=DATA) as batcher,
        connect(batcher, arrays=True) as client,
    ):
        first = in_callback(held, client, row(0))
        numbers: list[list[float]] = [[1], [2], [4, 6], [8, 7, 5], [10]]
        requests = [waiting(batcher, client.send_request, rows(*each)) for each in numbers]
        held.release(2)
        assert_equal(first.result(), {"data": row(0)})
        errors = [error_of(requests[index].result) for index in (0, 3)]
        assert [error.code() for error in errors] == [grpc.StatusCode.INTERNAL] * 2
        assert [error.details() for error in errors] == [
            "the callback answered this request with ValueError: odd: 1",
            "the callback answered row 1 of this request with ValueError: odd: 7",
        ]
        for index in (1, 2, 4):
            expected = rows(*numbers[index])
            assert_equal(requests[index].result(), {"data": expected if len(expected) > 1 else expected[0]})
        assert batcher.metrics().requests == {"OK": 4, "INTERNAL": 2}


def test_what_a_callback_returns_is_not_looked_at_if_all_rows_failed(
    server: tuple[Programmed, MukoeBatcher, MukoeBatcherClient], caplog: pytest.LogCaptureFixture
) -> None:
    programmed, _batcher, client = server
    programmed.next = lambda batch: batch.fail(0, RuntimeError("nothing to return"))
    details = error_of(client.send_request, row(1)).details()
    assert details == "the callback answered this request with RuntimeError: nothing to return"
    assert caplog.records == []
    assert_equal(client.send_request(row(2)), {"data": row(2)})


def test_a_failed_row_keeps_its_own_error_if_the_callback_then_raises() -> None:
    def fail_and_raise(batch: Batch) -> Any:
        if batch.count == 2:
            batch.fail(1, ValueError("mine"))
            raise RuntimeError("everyone's")
        return dict(batch)

    with (
        Held(fail_and_raise) as held,
        serving(held, arrays=DATA) as batcher,
        connect(batcher, arrays=True) as client,
    ):
        in_callback(held, client, row(0))
        requests = [waiting(batcher, client.send_request, row(number)) for number in (1, 2)]
        held.release(2)
        assert [error_of(request.result).details() for request in requests] == [
            "the callback raised RuntimeError: everyone's",
            "the callback answered this request with ValueError: mine",
        ]


# ---- results ----


class Lazy:
    """An array of another library, which numpy.asarray fetches. It counts how often."""

    def __init__(self, value: Any) -> None:
        self.value = value
        self.fetched = 0

    def __array__(self, dtype: Any = None, copy: Any = None) -> Any:
        self.fetched += 1
        if isinstance(self.value, BaseException):
            raise self.value
        return np.asarray(self.value, dtype)


def test_anything_that_numpy_takes_is_fetched_once_for_the_whole_batch(
    server: tuple[Programmed, MukoeBatcher, MukoeBatcherClient],
) -> None:
    programmed, _batcher, client = server
    lazy = Lazy(rows(1, 2, 3))
    programmed.next = lambda batch: UserDict(
        lazy=lazy,
        list=[[1.5]] * 4,
        view=memoryview(rows(4, 5, 6)),
        swapped=np.arange(3, dtype=">i2"),
        columns=np.asfortranarray(np.arange(12).reshape(4, 3)),
        empty=np.zeros((3, 0), np.float32),
        empties=np.zeros((3, 2, 0, 5), np.uint8),
        read_only=np.broadcast_to(np.float32(1), (3, 2)),
        flags=np.array([True, False, True]),
    )
    expected = {
        "lazy": rows(1, 2, 3),
        "list": np.array([[1.5]] * 3),
        "view": rows(4, 5, 6),
        "swapped": np.arange(3, dtype=np.int16),
        "columns": np.arange(9).reshape(3, 3),
        "empty": np.zeros((3, 0), np.float32),
        "empties": np.zeros((3, 2, 0, 5), np.uint8),
        "read_only": np.ones((3, 2), np.float32),
        "flags": np.array([True, False, True]),
    }
    assert_equal(client.send_request(rows(7, 8, 9)), expected)
    assert lazy.fetched == 1


def test_an_empty_mapping_answers_with_no_arrays(server: tuple[Programmed, MukoeBatcher, MukoeBatcherClient]) -> None:
    programmed, _batcher, client = server
    programmed.next = lambda batch: ({}, 7)
    assert client.send_request(row(1)) == ({}, 7)


@pytest.mark.parametrize(
    ("returned", "step"),
    [(None, 12), (3, 3), (np.int64(-3), -3), (2**31 - 1, 2**31 - 1), (True, 1)],
)
def test_the_step_is_what_the_callback_returns_or_what_was_published(returned: Any, step: int) -> None:
    def infer(batch: Batch) -> Any:
        return {"data": batch["data"]}, returned

    with serving(infer, arrays=DATA) as batcher, connect(batcher, arrays=True) as client:
        batcher.publish(None, step=12)
        assert client.send_request(row(1))[1] == step


GOOD = {"data": rows(0, 1, 2)}
BAD_RESULTS = [
    (None, "must return a mapping from names to arrays, or a pair of that and a step; it returned a NoneType"),
    ([GOOD], "it returned a list"),
    (rows(0, 1, 2), "it returned a ndarray"),
    ((GOOD,), "it returned a tuple"),
    ((GOOD, 1, 2), "it returned a tuple"),
    ((None, 3), "it returned a NoneType"),
    ((3, GOOD), "returned a step that cannot be sent: step is a dict"),
    ((GOOD, "3"), "returned a step that cannot be sent: step is a str: '3'; it must be an int"),
    ((GOOD, 1.0), "step is a float: 1.0; it must be an int"),
    ((GOOD, 2**31), "step is 2147483648, which does not fit an int32"),
    ({1: rows(0, 1, 2)}, "must return names that are str; it returned 1"),
    ({b"data": rows(0, 1, 2)}, "must return names that are str; it returned b'data'"),
    ({"\udc80": rows(0, 1, 2)}, "returned arrays that cannot be sent: 'utf-8' codec can't encode"),
    ({"data": 5}, "must return a row for each of the batch's 3; 'data' is int64 []"),
    ({"data": rows(0, 1)}, "must return a row for each of the batch's 3; 'data' is float32 [2, 2, 3]"),
    ({"data": rows(0, 1, 2), "other": []}, "must return a row for each of the batch's 3; 'other' is float64 [0]"),
    ({"data": [None] * 3}, "returned 'data', which cannot be sent as an array: TypeError: the dtype object cannot"),
    ({"data": ["a", "b", "c"]}, "the dtype <U1 cannot be sent"),
    ({"data": [b"a", b"b", b"c"]}, "the dtype |S1 cannot be sent"),
    ({"data": np.array(["2020"] * 3, "datetime64[D]")}, "the dtype datetime64[D] cannot be sent"),
    ({"data": np.zeros(3, [("x", "f4")])}, "cannot be sent"),
    ({"data": [[1], [2, 3], [4]]}, "returned 'data', which cannot be sent as an array: "),
    ({"data": Lazy(RuntimeError("out of memory"))}, "cannot be sent as an array: RuntimeError: out of memory"),
    ({"data": Lazy(SystemExit(3))}, "cannot be sent as an array: SystemExit: 3"),
]


@pytest.mark.parametrize(("result", "text"), BAD_RESULTS, ids=range(len(BAD_RESULTS)))
def test_a_bad_result_fails_the_whole_batch_saying_what_is_wrong_and_the_next_is_answered(
    result: Any, text: str, caplog: pytest.LogCaptureFixture
) -> None:
    def infer(batch: Batch) -> Any:
        return result if batch.count == 3 else dict(batch)

    with (
        Held(infer) as held,
        serving(held, arrays=DATA) as batcher,
        connect(batcher, arrays=True) as client,
    ):
        in_callback(held, client, row(0))
        requests = [waiting(batcher, client.send_request, value) for value in (row(1), rows(2, 3))]
        held.release(2)
        for request in requests:
            error = error_of(request.result)
            assert error.code() is grpc.StatusCode.INTERNAL
            assert error.details().startswith("the callback ")
            assert text in error.details()
        held.release()
        assert_equal(client.send_request(row(4)), {"data": row(4)})
    assert [record.levelno for record in caplog.records] == [logging.ERROR]


@pytest.mark.parametrize("error", [ValueError("no"), SystemExit(3), KeyboardInterrupt(), MemoryError()])
def test_a_callback_that_raises_fails_its_batch_and_the_next_is_answered(
    error: BaseException, server: tuple[Programmed, MukoeBatcher, MukoeBatcherClient]
) -> None:
    programmed, _batcher, client = server

    def fail(batch: Batch) -> Any:
        raise error

    programmed.next = fail
    failure = error_of(client.send_request, row(1))
    assert failure.code() is grpc.StatusCode.INTERNAL
    assert failure.details() == f"the callback raised {type(error).__name__}: {error}"
    assert_equal(client.send_request(row(2)), {"data": row(2)})


def test_a_batch_without_memory_fails_and_the_next_is_answered(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    with serving(Recording(), arrays=DATA) as batcher, connect(batcher, arrays=True) as client:
        monkeypatch.setattr("grpc_batcher._server.arenas.Arena", lambda size_bytes: bytearray(1 << 62))
        error = error_of(client.send_request, row(1))
        assert (error.code(), error.details()) == (grpc.StatusCode.INTERNAL, "the batcher failed: MemoryError")
        assert "the batcher failed, so its batch of 1 requests fails" in caplog.text
        monkeypatch.undo()
        assert_equal(client.send_request(row(2)), {"data": row(2)})


# ---- memory ----


def address_in_memory(array: np.ndarray) -> int:
    return int(array.__array_interface__["data"][0])


def test_memory_that_nobody_looks_at_is_used_again() -> None:
    addresses = set()

    def infer(batch: Batch) -> Any:
        addresses.add(address_in_memory(batch["data"]))
        return dict(batch)

    with serving(infer, arrays=DATA) as batcher, connect(batcher, arrays=True) as client:
        for number in range(20):
            assert_equal(client.send_request(row(number)), {"data": row(number)})
    assert len(addresses) == 1
    assert min(addresses) % 64 == 0


def keep_array(array: np.ndarray) -> Any:
    return array


def keep_part(array: np.ndarray) -> Any:
    return array[0, 1:]


def keep_view_of_another_type(array: np.ndarray) -> Any:
    return array.view(np.uint8)


def keep_memoryview(array: np.ndarray) -> Any:
    return memoryview(array).cast("B")


def keep_foreign_holder(array: np.ndarray) -> Any:
    """As other frameworks do, which take the buffer and forget the array."""
    return (ctypes.c_char * array.nbytes).from_buffer(array)


def keep_dlpack(array: np.ndarray) -> Any:
    return np.from_dlpack(array)


def keep_with_jax(array: np.ndarray) -> Any:
    """On the CPU it uses aligned memory in place."""
    return pytest.importorskip("jax.numpy").asarray(array)


def keep_with_torch(array: np.ndarray) -> Any:
    return pytest.importorskip("torch").from_numpy(array)


@pytest.mark.parametrize(
    "keep",
    [
        keep_array,
        keep_part,
        keep_view_of_another_type,
        keep_memoryview,
        keep_foreign_holder,
        keep_dlpack,
        keep_with_jax,
        keep_with_torch,
    ],
)
def test_what_a_callback_keeps_of_its_input_never_changes(keep: Any) -> None:
    keep(np.zeros((1, 2, 3), np.float32))  # skips without the framework
    kept, copies = [], []

    def infer(batch: Batch) -> Any:
        kept.append(keep(batch["data"]))
        copies.append(bytes(np.ascontiguousarray(kept[-1])))
        return dict(batch)

    with serving(infer, arrays=DATA) as batcher, connect(batcher, arrays=True) as client:
        for number in range(20):
            assert_equal(client.send_request(rows(number, number + 1)), {"data": rows(number, number + 1)})
    assert [bytes(np.ascontiguousarray(each)) for each in kept] == copies
    assert len(set(copies)) == 20


def array_callback(function: Any, *, batch_sizes: Any = range(1, 9)) -> ArrayCallback:
    recorder = Recorder(timed=False, batch_size=8)
    return ArrayCallback(function, MODELS["repr"], DATA, batch_sizes, Published(), recorder, warms_up=False)


def request_of(callback: ArrayCallback, value: np.ndarray) -> Any:
    message = MukoeRequest(representations=Representations(data=pack(value))).SerializeToString()
    request, count = callback.read_request(message)
    assert count == (1 if value.ndim == 2 else len(value))
    return request


def test_memory_that_a_callback_kept_is_given_back_when_it_drops_it() -> None:
    """Only a few pieces are kept for later, however many the callback kept at once."""
    kept: list[np.ndarray] = []

    def infer(batch: Batch) -> Any:
        kept.append(batch["data"])
        return dict(batch)

    callback = array_callback(infer)
    for number in range(50):
        callback.outcomes_of([request_of(callback, row(number))])
    first = {address_in_memory(array) for array in kept}
    assert len(first) == 50
    assert [numbers_in(array) for array in kept] == [[number] for number in range(50)]
    kept.clear()
    gc.collect()
    (arenas,) = callback._arenas
    assert len(arenas._kept) < 10
    assert all(arena.is_free for arena in arenas._kept)
    for number in range(50):
        callback.outcomes_of([request_of(callback, row(number))])
        kept.clear()
    assert len(arenas._kept) < 10


def test_a_callback_may_use_the_memory_of_its_results_again() -> None:
    """Its answers are encoded before it gets the next batch."""
    output = np.empty((8, 2, 3), np.float32)

    def infer(batch: Batch) -> Any:
        np.add(batch["data"], 0, out=output[: batch.size])
        return {"data": output}

    callback = array_callback(infer)
    (answer,) = callback.outcomes_of([request_of(callback, row(1))])
    output[:] = 0
    assert pack(row(1)) in callback.encode(answer)

    def ask(caller: int) -> None:
        for number in range(100):
            assert_equal(client.send_request(row(1000 * caller + number)), {"data": row(1000 * caller + number)})

    with serving(infer, arrays=DATA) as batcher, connect(batcher, arrays=True) as client:
        for done in [in_background(ask, caller) for caller in range(8)]:
            done.result()


def test_a_callback_may_change_its_input() -> None:
    def infer(batch: Batch) -> Any:
        batch["data"][:] *= 2
        return dict(batch)

    with serving(infer, arrays=DATA) as batcher, connect(batcher, arrays=True) as client:
        for number in range(5):
            assert_equal(client.send_request(row(number)), {"data": 2 * row(number)})


def test_a_large_row_is_padded() -> None:
    declared = {"data": Array((2**20,), "uint8")}
    value = np.arange(2**20, dtype=np.uint8)
    with (
        serving(lambda batch: {"sum": batch["data"].sum(axis=1)}, arrays=declared, batch_sizes=(8,)) as batcher,
        connect(batcher, arrays=True) as client,
    ):
        assert_equal(client.send_request(value), {"sum": np.asarray(value.sum())})
