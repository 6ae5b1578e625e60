"""Packed arrays: reads requests that hold them, gathers their rows, and writes answers, with one copy of the data each.

Each docstring here is the beginning of the one in `_arrays.pyx`.
"""

from collections.abc import Iterable, Sequence
from typing import final

from typing_extensions import Buffer, Self

class ArrayError(ValueError):
    """Bytes that are not the array they should be. The text says what came, and what was expected."""

def unpack(payload: bytes) -> tuple[tuple[int, ...], str, int, int]:
    """Return (shape, dtype name, offset of the data, its size in bytes) of a packed array."""

def pack_header(shape: Iterable[int], dtype: str, data_bytes: int) -> bytes:
    """Return what precedes the data of a packed array, as msgpack's `packb((shape, dtype, data))` writes it."""

@final
class Field:
    """A declared array.

    name: its name in a request of the kind `arrays`, and in errors.
    shape: of one row, each length at least 1.
    dtype: its name, which requests must have too.
    itemsize: bytes of an item.

    Raises TypeError, ValueError or OverflowError for others.
    """

    def __new__(cls, name: str, shape: Iterable[int], dtype: str, itemsize: int) -> Self: ...
    @property
    def name(self) -> str:
        """As given."""
    @property
    def shape(self) -> tuple[int, ...]:
        """As given."""
    @property
    def dtype(self) -> str:
        """As given."""
    @property
    def row_bytes(self) -> int:
        """Bytes of a row."""

@final
class RequestReader:
    """Reads MukoeRequests of one kind.

    number: of the kind's message in the request.
    fields: the declared arrays; one of them if there is a data_number.
    data_number: of the bytes field that holds the packed array; None for a message that is `Arrays`.
    action_number: of the int32 field, greater than data_number; None if there is none.
    max_rows: most rows per request.

    Raises ValueError for other numbers, and for names that are not unique.
    """

    def __new__(
        cls,
        number: int,
        fields: Iterable[Field],
        *,
        data_number: int | None = None,
        action_number: int | None = None,
        max_rows: int,
    ) -> Self: ...
    def read(self, message: bytes) -> ArrayRequest | None:
        """Return the ArrayRequest, which keeps the message, or None if protobuf must be asked.

        Raises ArrayError unless it holds exactly the declared arrays: each of the declared shape, which is one row, or
        of 1 to `max_rows` such rows, the same number in each.
        """
    def of_payloads(
        self, payloads: Iterable[tuple[str, bytes]], action: int = 0, keep_rows_axis: bool = False
    ) -> ArrayRequest:
        """Return the ArrayRequest of pairs (name, bytes), which protobuf has read. Raises ArrayError as `read` does."""

    def of_rows(self, columns: Iterable[bytes], rows: int, actions: bytes | None = None) -> ArrayRequest:
        """Return the ArrayRequest of each field's rows, which it keeps: `bytes`, in the order of the fields.

        actions: an int32 in native byte order per row; None for kinds that have none.

        Raises ArrayError for a wrong number of rows or bytes.
        """

@final
class ArrayRequest:
    """A request's arrays, as they lie in its message. Created by RequestReader."""

    @property
    def rows(self) -> int:
        """How many rows each array has, from 1."""
    @property
    def keeps_axis(self) -> bool:
        """Whether the arrays of the answer have an axis of rows."""
    @property
    def action(self) -> int:
        """Of every row; 0 where the kind has none, and where each row has its own."""
    @property
    def size_bytes(self) -> int:
        """Bytes of the message that it keeps."""

@final
class Arena:
    """Memory for the arrays of one batch after another, aligned to 64 bytes. It is a writable buffer of bytes.

    size_bytes: at least 1.

    Raises MemoryError.
    """

    def __new__(cls, size_bytes: int) -> Self: ...
    def __buffer__(self, flags: int, /) -> memoryview: ...
    @property
    def size_bytes(self) -> int:
        """As given."""
    @property
    def is_free(self) -> bool:
        """Whether nobody holds a view of it: no array, no tensor, no other view of any of these."""

def gather(requests: Iterable[ArrayRequest], field: int, target: Buffer, size: int) -> int:
    """Copy a field's rows of all requests, in order, into a buffer of `size` rows, and return how many they are.

    The rows that are left in the buffer repeat the first. Large copies are made without the GIL.

    target: a writable C-contiguous buffer of exactly `size` rows.
    """

def gather_actions(requests: Iterable[ArrayRequest], target: Buffer, size: int) -> int:
    """Write each row's action into a buffer of `size` int32, and return how many rows they are.

    What is left in the buffer repeats the first.
    """

def encode_answers(
    requests: Iterable[ArrayRequest], outputs: Iterable[tuple[str, Buffer, Sequence[int], str]], step: int
) -> list[bytes]:
    """Return a serialized MukoeResponse per request, which holds the request's rows of each output.

    outputs: tuples (key, buffer, shape of a row, dtype name). The buffer is C-contiguous, its items are of the dtype's
        size, and it has the rows of all requests in order; what follows them is dropped.
    step: an int32.
    """

def write_request(
    number: int,
    arrays: Iterable[tuple[str, Buffer, Sequence[int], str]],
    *,
    data_number: int | None = None,
    action_number: int | None = None,
    action: int = 0,
    keep_rows_axis: bool = False,
) -> bytes:
    """Return a serialized MukoeRequest, which RequestReader reads.

    arrays: tuples (name, buffer, shape, dtype name); with a data_number one, whose name is not sent. The buffer is
        C-contiguous and of exactly that shape, with items of the dtype's size.
    action: an int32, for kinds with an action_number.
    keep_rows_axis: whether the first axis is rows, and the answer must have it too.
    """

def read_answer(message: bytes) -> tuple[list[tuple[str, tuple[int, ...], str, int, int]], int] | None:
    """Return ([(key, shape, dtype name, offset of the data, its size in bytes)], step) of a MukoeResponse.

    Returns None if protobuf must be asked.
    """
