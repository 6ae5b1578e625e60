"""`Array`, the dtypes that can travel, the decorator `arrays`, and what `create_batcher` accepts of them."""

from __future__ import annotations

import copy
import pickle
import re
from collections.abc import Mapping
from dataclasses import FrozenInstanceError
from pathlib import Path
from typing import Any

import grpc_batcher
from grpc_batcher import Array, arrays, create_batcher
from grpc_batcher._array import as_array, dtype_named

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from serving import run_program

BFLOAT16 = np.dtype(ml_dtypes.bfloat16)
FLOAT8 = np.dtype(ml_dtypes.float8_e5m2)
DTYPES = [np.dtype(name) for name in ("bool", "uint8", "int64", "float16", "float32", "complex64")] + [BFLOAT16, FLOAT8]


def created(**arguments: Any) -> Any:
    """Create a batcher with some arguments that are good unless replaced."""
    good = {
        "model": "repr",
        "batch_size": 8,
        "batch_timeout_s": 0,
        "batch_process_fn": lambda batch: {},
        "arrays": {"data": Array((2,), "uint8")},
    }
    return create_batcher(**{**good, **arguments})


# ---- Array ----


@pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: dtype.name)
def test_an_array_has_the_shape_and_the_dtype_it_was_given_by_name_type_or_dtype(dtype: np.dtype) -> None:
    for given_as in (dtype.name, dtype, dtype.type):
        array = Array([np.int64(2), 3], given_as)
        assert (array.shape, array.dtype) == ((2, 3), dtype)
        assert array.row_bytes == 6 * dtype.itemsize
        assert repr(array) == f"Array((2, 3), {dtype.name!r})"


def test_a_number_is_an_array_without_axes() -> None:
    assert Array((), "float32").shape == ()
    assert Array((), "float32").row_bytes == 4


def test_arrays_are_frozen_and_equal_by_shape_and_dtype() -> None:
    array = Array((2,), "uint8")
    with pytest.raises(FrozenInstanceError):
        array.shape = (3,)  # type: ignore[misc]
    assert array == Array([2], np.uint8)
    assert hash(array) == hash(Array([2], np.uint8))
    assert array not in (Array((3,), "uint8"), Array((2,), "int8"), ((2,), "uint8"))


@pytest.mark.parametrize("dtype", [np.dtype("uint8"), BFLOAT16])
def test_an_array_can_be_pickled_and_copied(dtype: np.dtype) -> None:
    array = Array((2, 3), dtype)
    assert pickle.loads(pickle.dumps(array)) == copy.deepcopy(array) == array


@pytest.mark.parametrize(
    ("shape", "dtype", "error", "text"),
    [
        (5, "uint8", TypeError, "shape is 5; it must be a sequence of ints"),
        ("ab", "uint8", TypeError, "shape is 'ab'; it must be a sequence of ints"),
        ((2.0,), "uint8", TypeError, "shape is (2.0,); it must be a sequence of ints"),
        ((2, 0), "uint8", ValueError, "shape is (2, 0); each length must be at least 1"),
        ((2, -1), "uint8", ValueError, "shape is (2, -1); each length must be at least 1"),
        ((1,) * 31, "uint8", ValueError, "shape has 31 lengths; there may be 30"),
        ((2**62, 4), "uint8", ValueError, "a message holds at most 2147483647"),
        ((2**31,), "uint8", ValueError, "which is 2147483648 bytes; a message holds at most 2147483647"),
        ((2,), None, TypeError, "dtype is None; it must be a dtype of numpy's"),
        ((2,), "flaot32", TypeError, "dtype is 'flaot32': the dtype 'flaot32' is unknown here"),
        ((2,), "(2,", TypeError, "dtype is '(2,': the dtype '(2,' is unknown here"),
        ((2,), 5, TypeError, "dtype is 5: "),
        ((2,), object, TypeError, "dtype is <class 'object'>: the dtype object cannot be sent; booleans, integers"),
        ((2,), "O", TypeError, "the dtype object cannot be sent"),
        ((2,), "U3", TypeError, "the dtype <U3 cannot be sent"),
        ((2,), "S3", TypeError, "the dtype |S3 cannot be sent"),
        ((2,), "datetime64[s]", TypeError, "the dtype datetime64[s] cannot be sent"),
        ((2,), [("x", "i4")], TypeError, "cannot be sent"),
        ((2,), "V4", TypeError, "cannot be sent"),
        ((2,), ">f4", ValueError, "dtype is '>f4', which is not of this machine's byte order; use 'float32'"),
    ],
)
def test_an_array_that_cannot_be_sent_is_refused(shape: Any, dtype: Any, error: type[Exception], text: str) -> None:
    with pytest.raises(error, match=re.escape(text)):
        Array(shape, dtype)


@given(st.text())
def test_any_text_is_the_name_of_a_dtype_or_a_type_error(name: str) -> None:
    try:
        dtype = dtype_named(name)
    except TypeError:
        return
    assert dtype.name in {each.name for each in map(np.dtype, np.sctypeDict.values())} | {BFLOAT16.name, FLOAT8.name}


@pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: dtype.name)
def test_a_dtype_is_found_by_the_name_it_travels_with(dtype: np.dtype) -> None:
    array, name = as_array(np.zeros(2, dtype))
    assert dtype_named(name) == array.dtype == dtype


@pytest.mark.parametrize(
    "value",
    [
        np.arange(6, dtype=">i4").reshape(2, 3),
        np.arange(6, dtype=np.int32).reshape(3, 2).T,
        np.arange(12, dtype=np.int32)[::2],
        np.asfortranarray(np.arange(6.0).reshape(2, 3)),
        np.float32(3),
        np.array(3, ">f8"),
        [[1, 2], [3, 4]],
        5,
        True,
    ],
)
def test_what_is_sent_is_contiguous_native_and_equal(value: Any) -> None:
    array, name = as_array(value)
    assert array.flags.c_contiguous
    assert array.dtype.isnative
    assert array.shape == np.shape(value)
    assert name == np.asarray(value).dtype.name
    np.testing.assert_array_equal(array, value)


# ---- the decorator ----


@arrays(data=Array((2,), "uint8"))
def decorated(batch: Any) -> Mapping[str, Any]:
    return {"out": batch["data"]}


class Network:
    @arrays(data=Array((2,), "uint8"))
    def infer(self, batch: Any) -> Mapping[str, Any]:
        return {"out": batch["data"]}


@arrays(data=Array((2,), "uint8"))
class Callable:
    def __call__(self, batch: Any) -> Mapping[str, Any]:
        return {"out": batch["data"]}


@pytest.mark.parametrize("function", [decorated, Network().infer, Callable()])
def test_a_decorated_callback_declares_its_arrays(function: Any) -> None:
    created(batch_process_fn=function, arrays=None, batch_sizes=(4, 8), warm_up=True)


def test_the_decorator_returns_the_function_itself() -> None:
    def function() -> None:
        pass

    assert arrays(x=Array((), "int8"))(function) is function


def test_what_create_batcher_is_given_precedes_what_the_callback_declares() -> None:
    with pytest.raises(ValueError, match="the only name is 'data'"):
        created(batch_process_fn=decorated, arrays={"other": Array((2,), "uint8")})


# ---- create_batcher ----


@pytest.mark.parametrize(
    ("arguments", "error", "text"),
    [
        ({"arrays": {}}, TypeError, "arrays is {}; it must be a mapping from names to Arrays"),
        ({"arrays": [Array((2,), "uint8")]}, TypeError, "it must be a mapping from names to Arrays"),
        ({"arrays": {"data": ((2,), "uint8")}}, TypeError, "arrays has 'data': ((2,), 'uint8'); it must map names to"),
        ({"arrays": {1: Array((2,), "uint8")}}, TypeError, "arrays has 1: Array((2,), 'uint8'); it must map names to"),
        ({"arrays": {"image": Array((2,), "uint8")}}, ValueError, "has the names ['image']; for model 'repr' the only"),
        (
            {"arrays": {"data": Array((2,), "uint8"), "x": Array((), "int8")}, "model": "dyna"},
            ValueError,
            "arrays has the names ['data', 'x']; for model 'dyna' the only name is 'data'",
        ),
        *(
            (
                {"model": "arrays", "arrays": {name: Array((), "int8")}},
                ValueError,
                f"arrays has the name '{name}', which is an argument of send_request's own; use another",
            )
            for name in ("data", "action", "rows", "timeout_s", "self")
        ),
        ({"model": "arrays", "arrays": None}, ValueError, "model is 'arrays', which needs arrays"),
        (
            {"arrays": {"data": Array((10, 10), "float32")}, "max_message_bytes": 400},
            ValueError,
            "max_message_bytes is 400; it must be more than the 400 bytes that a request's arrays take",
        ),
        ({"batch_sizes": ()}, ValueError, "batch_sizes is (); it must be ints from 1 to batch_size (8)"),
        ({"batch_sizes": 8}, TypeError, "batch_sizes is 8"),
        ({"batch_sizes": (0, 8)}, ValueError, "batch_sizes is (0, 8); it must be ints from 1 to batch_size (8)"),
        ({"batch_sizes": (8, 9)}, ValueError, "batch_sizes is (8, 9); it must be ints from 1 to batch_size (8)"),
        ({"batch_sizes": (1, 4)}, ValueError, "batch_sizes is (1, 4); it must be ints from 1 to batch_size (8), which"),
        ({"batch_sizes": (1.0, 8)}, ValueError, "batch_sizes is (1.0, 8); it must be ints"),
        ({"batch_sizes": (True, 8)}, ValueError, "batch_sizes is (True, 8); it must be ints"),
        (
            {"batch_sizes": (8,), "arrays": None},
            ValueError,
            "batch_sizes is (8,), which needs arrays=",
        ),
        ({"warm_up": [b"x"]}, TypeError, "warm_up is [b'x']; with arrays it must be True or False"),
        ({"warm_up": 1}, TypeError, "warm_up is 1; with arrays it must be True or False"),
        ({"warm_up": True, "arrays": None}, TypeError, "warm_up is True; without arrays it must be a list of requests"),
        ({"warm_up": b"x", "arrays": None}, TypeError, "warm_up is b'x'; without arrays it must be a list of requests"),
        ({"warm_up": [], "arrays": None}, ValueError, "warm_up is []; it must be a list of 1 to batch_size (8)"),
        ({"warm_up": [b"x"] * 9, "arrays": None}, ValueError, "it must be a list of 1 to batch_size (8) requests"),
    ],
)
def test_a_declaration_that_cannot_be_served_is_refused(
    arguments: dict[str, Any], error: type[Exception], text: str
) -> None:
    with pytest.raises(error, match=re.escape(text)):
        created(**arguments)


@pytest.mark.parametrize("sizes", [(8,), [8, 1, 4], (np.int64(8), 4, 4), range(1, 9), (size for size in (4, 8))])
def test_batch_sizes_may_come_in_any_order_and_any_iterable(sizes: Any) -> None:
    created(batch_sizes=sizes)


# ---- without numpy ----

WITHOUT_NUMPY = """
    import sys

    class NoNumpy:
        def find_spec(self, name, path=None, target=None):
            if name.partition(".")[0] in ("numpy", "ml_dtypes"):
                raise ModuleNotFoundError(f"No module named {name!r}", name=name)

    sys.meta_path.insert(0, NoNumpy())
    from grpc_batcher import Array, MukoeBatcherClient, arrays, create_batcher

    def complain(function, *arguments, **options):
        try:
            function(*arguments, **options)
        except ImportError as error:
            print(error)

    def echo(requests):
        return [({"result": data}, None) for data in requests]

    complain(Array, (2,), "uint8")
    complain(MukoeBatcherClient, "localhost:1", arrays=True)
    complain(create_batcher, "repr", 1, 0, batch_process_fn=echo, arrays={"data": None})
    with create_batcher("repr", 1, 0, 0, batch_process_fn=echo, host="127.0.0.1", warm_up=[b"x"]) as batcher:
        batcher.publish("weights", step=3)
        with MukoeBatcherClient(f"127.0.0.1:{batcher.port}") as client:
            print(client.send_request(b"hi"))
    print("numpy" in sys.modules)
"""


def test_without_numpy_arrays_say_what_to_install_and_everything_else_works(tmp_path: Path) -> None:
    *complaints, answer, is_imported = run_program(tmp_path, WITHOUT_NUMPY)
    expected = 'arrays need numpy, which cannot be imported here: pip install "grpc-batcher[arrays]"'
    assert complaints == [expected] * 3
    assert answer == "({'result': b'hi'}, 3)"
    assert is_imported == "False"


def test_importing_the_package_does_not_import_numpy(tmp_path: Path) -> None:
    program = """
        import sys

        import grpc_batcher

        print("numpy" in sys.modules)
    """
    assert run_program(tmp_path, program) == ["False"]


def test_the_names_are_exported() -> None:
    assert {"Array", "Batch", "arrays"} <= set(grpc_batcher.__all__)
