"""Requests and answers of arrays."""

from __future__ import annotations

from typing import Any

import grpc
from google.protobuf.message import DecodeError

from .. import _arrays
from .._array import as_array, dtype_named, import_numpy
from .._errors import RequestError
from .._models import ARRAYS, MODELS, check_int32, read_answer

# By the arguments of send_request. All others hold arrays by the names that the batcher declares.
_MODELS = {frozenset(("data",)): MODELS["repr"], frozenset(("data", "action")): MODELS["dyna"]}


class ArrayPayloads:
    """See `BytesPayloads`. `data` makes a request for "repr", with an `action` for "dyna"; other names for "arrays".

    Raises ImportError without numpy.
    """

    def __init__(self) -> None:
        self._numpy = import_numpy()

    def encode(self, arguments: dict[str, Any]) -> bytes:
        """Return the message of a request. Raises TypeError or ValueError for arguments that cannot be sent.

        arguments: those of `send_request` that describe the request.
        """
        rows = arguments.pop("rows", False)
        if not arguments:
            raise TypeError("a request needs data, or the arrays that the batcher declares, by name")
        model = _MODELS.get(frozenset(arguments), ARRAYS)
        if model is ARRAYS and not arguments.keys().isdisjoint(("data", "action")):
            raise TypeError(
                f"no model takes the arguments ({', '.join(arguments)}); give data, data and action, or arrays by "
                "other names"
            )
        action = arguments.pop("action", 0)
        numbers = model.field_numbers
        described = []
        count = None
        for name, value in arguments.items():
            try:
                array, dtype = as_array(value)
            except (TypeError, ValueError) as error:
                kind = TypeError if isinstance(error, TypeError) else ValueError
                raise kind(f"{name} is {value!r:.200}: {error}") from None
            if rows and (array.ndim == 0 or array.shape[0] < 1):
                raise ValueError(f"{name} is {dtype} {list(array.shape)}; with rows=True its first axis must be rows")
            if rows and count not in (None, array.shape[0]):
                raise ValueError(f"{name} has {array.shape[0]} rows, and the array before it {count}; they must agree")
            count = array.shape[0] if rows else None
            described.append((name, array, array.shape, dtype))
        try:
            return _arrays.write_request(
                numbers[model.message_field],
                described,
                data_number=numbers.get("data"),
                action_number=numbers.get("action"),
                action=check_int32("action", action),
                keep_rows_axis=rows,
            )
        except OverflowError as error:
            raise ValueError(f"the request cannot be sent: {error}") from None

    def decode(self, reply: bytes) -> tuple[dict[str, Any], int]:
        """Return the arrays and the step in a reply. Raises RequestError if it holds none."""
        try:
            answer = _arrays.read_answer(reply)
            if answer is None:  # protobuf must be asked
                values, step = read_answer(reply)
                return {key: self._array(value, *_arrays.unpack(value)) for key, value in values.items()}, step
            packed, step = answer
            return {
                key: self._array(reply, shape, dtype, offset, size_bytes)
                for key, shape, dtype, offset, size_bytes in packed
            }, step
        except (DecodeError, TypeError, ValueError) as error:
            raise RequestError(
                grpc.StatusCode.INTERNAL, f"the server's reply of {len(reply)} bytes holds no arrays: {error}"
            ) from None

    def _array(self, message: bytes, shape: tuple[int, ...], dtype_name: str, offset: int, size_bytes: int) -> Any:
        """Return a copy, which is aligned, writable, and does not keep the message."""
        dtype = dtype_named(dtype_name)
        array = self._numpy.empty(shape, dtype)
        if array.nbytes != size_bytes:
            raise ValueError(f"{dtype_name} {list(shape)} with {size_bytes} bytes; it must have {array.nbytes}")
        array.reshape(-1).view(self._numpy.uint8)[:] = self._numpy.frombuffer(
            message, self._numpy.uint8, size_bytes, offset
        )
        return array
