"""Declared arrays, and the dtypes that arrays may have on the wire. Declaring the first one imports numpy."""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import cache, lru_cache
from typing import TYPE_CHECKING, Any, TypeVar

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import DTypeLike

_Function = TypeVar("_Function", bound=Callable[..., Any])

# The most axes that a message's arrays may have, less the one of rows.
_MAX_DIMENSIONS = 30
_MAX_ROW_BYTES = 2**31 - 1  # of a message

_DECLARATION = "__grpc_batcher_arrays__"


@dataclass(frozen=True)
class Array:
    """The shape and the dtype of one row of an array: what one request sends.

    shape: ints from 1; () for a number.
    dtype: a dtype of numpy's, or its name: booleans, integers, floats and complex numbers. With `ml_dtypes` installed,
        its dtypes, such as "bfloat16", too.

    Raises ValueError or TypeError saying what is allowed, and ImportError without numpy.
    """

    shape: tuple[int, ...]
    dtype: np.dtype[Any]

    def __init__(self, shape: Iterable[int], dtype: DTypeLike) -> None:
        object.__setattr__(self, "shape", _checked_shape(shape))
        object.__setattr__(self, "dtype", _checked_dtype(dtype))
        if self.row_bytes > _MAX_ROW_BYTES:
            raise ValueError(
                f"shape is {self.shape} of {self.dtype.name}, which is {self.row_bytes} bytes; a message holds at most "
                f"{_MAX_ROW_BYTES}"
            )

    @property
    def row_bytes(self) -> int:
        """Bytes of one row."""
        return math.prod(self.shape) * int(self.dtype.itemsize)

    def __repr__(self) -> str:
        return f"Array({self.shape}, {self.dtype.name!r})"


def arrays(**declared: Array) -> Callable[[_Function], _Function]:
    """Declare, above a callback, the arrays that its requests hold: `create_batcher` then needs no `arrays`.

    declared: the same as `create_batcher`'s `arrays`, by name.
    """

    def declare(function: _Function) -> _Function:
        setattr(function, _DECLARATION, declared)
        return function

    return declare


def declared_on(function: Any) -> Mapping[str, Array] | None:
    """Return what `arrays` declared on a callback, or None."""
    return getattr(function, _DECLARATION, None)


@cache
def import_numpy() -> Any:
    """Return numpy. Raises ImportError saying what to install."""
    try:
        import numpy
    except ImportError as error:
        message = 'arrays need numpy, which cannot be imported here: pip install "grpc-batcher[arrays]"'
        raise ImportError(message) from error
    return numpy


# Both are asked for each array of each request or batch, and numpy makes a dtype's name anew each time.
@lru_cache
def dtype_named(name: str) -> np.dtype[Any]:
    """Return the dtype of a name on the wire. Raises TypeError if there is none here, or if it cannot travel."""
    numpy = import_numpy()
    try:
        dtype = numpy.dtype(name)
    except Exception:  # numpy parses it, and raises SyntaxError for some names
        if (scalar := _extra_types().get(name)) is None:
            raise TypeError(
                f"the dtype {name!r:.100} is unknown here; numpy's are known, and those of ml_dtypes if it is installed"
            ) from None
        dtype = numpy.dtype(scalar)
    name_of(dtype)
    return dtype  # type: ignore[no-any-return]


@lru_cache
def name_of(dtype: np.dtype[Any]) -> str:
    """Return a dtype's name on the wire, which says nothing about byte order. Raises TypeError if it cannot travel."""
    if dtype.kind in "biufc" or dtype.type in _extra_types().values():
        return dtype.name
    raise TypeError(
        f"the dtype {dtype} cannot be sent; booleans, integers, floats and complex numbers can, and the dtypes of "
        "ml_dtypes if it is installed"
    )


def as_array(value: Any) -> tuple[np.ndarray[Any, Any], str]:
    """Return what `numpy.asarray` makes of a value, C-contiguous and in native byte order, and its dtype's name.

    Raises TypeError for dtypes that cannot travel, and whatever the value's own methods raise.
    """
    numpy = import_numpy()
    array = numpy.asarray(value)
    name = name_of(array.dtype)
    if not array.dtype.isnative:
        array = array.astype(array.dtype.newbyteorder("="))
    # Not numpy.ascontiguousarray, which turns a number into an array of one.
    return (array if array.flags.c_contiguous else array.copy(order="C")), name


@cache
def _extra_types() -> dict[str, type]:
    """The scalar types of ml_dtypes, by the name of their dtype; none if it is not installed."""
    try:
        import ml_dtypes
    except ImportError:
        return {}
    numpy = import_numpy()
    types = [
        value for value in vars(ml_dtypes).values() if isinstance(value, type) and issubclass(value, numpy.generic)
    ]
    return {numpy.dtype(scalar).name: scalar for scalar in types}


def _checked_shape(shape: Iterable[int]) -> tuple[int, ...]:
    try:
        lengths = tuple([operator.index(length) for length in shape])
    except TypeError:
        raise TypeError(f"shape is {shape!r}; it must be a sequence of ints such as (96, 96, 3)") from None
    if any(length < 1 for length in lengths):
        raise ValueError(f"shape is {lengths}; each length must be at least 1")
    if len(lengths) > _MAX_DIMENSIONS:
        raise ValueError(f"shape has {len(lengths)} lengths; there may be {_MAX_DIMENSIONS}")
    return lengths


def _checked_dtype(dtype: DTypeLike) -> np.dtype[Any]:
    if dtype is None:  # to numpy it means float64
        raise TypeError("dtype is None; it must be a dtype of numpy's, or its name, such as 'uint8'")
    try:
        found = dtype_named(dtype) if isinstance(dtype, str) else import_numpy().dtype(dtype)
        name_of(found)
    except TypeError as error:
        raise TypeError(f"dtype is {dtype!r:.100}: {error}") from None
    if not found.isnative:
        raise ValueError(f"dtype is {found.str!r}, which is not of this machine's byte order; use {found.name!r}")
    return found
