"""The arrays of rows/arrays.py: observations as users send them, and the answers to them."""

from __future__ import annotations

import struct

# How a server does the array work: see servers/array_batcher.py.
ARRAYS = "arrays"
BY_HAND = "by-hand"
BLIND = "blind"

OBSERVATION_SHAPE = (96, 96, 3, 4)
EMBEDDING_SHAPE = (6, 6, 256)  # of an answer, beside three small arrays
EMBEDDING_BYTES = 36_864  # as float32

# By the bytes of an observation.
DTYPES = {110_592: "uint8", 884_736: "float64"}

_ITEMS = {"uint8": "<B", "float64": "<d"}


def packed_observation(size_bytes: int, number: int) -> bytes:
    """An observation as MuKoe's actors send it. Its last item is `number`, below 256; the others are 0."""
    import msgpack

    dtype = DTYPES[size_bytes]
    item = struct.pack(_ITEMS[dtype], number)
    return msgpack.packb(((1, *OBSERVATION_SHAPE), dtype, bytes(size_bytes - len(item)) + item))  # type: ignore[no-any-return]


def number_of(packed: bytes) -> int:
    """The number of an observation."""
    import msgpack

    _shape, dtype, data = msgpack.unpackb(packed)
    (number,) = struct.unpack_from(_ITEMS[dtype], data, len(data) - struct.calcsize(_ITEMS[dtype]))
    return int(number)


def packed_value(number: int) -> bytes:
    """The array "value" in the answer to an observation, by which its caller knows it: float32 of no dimensions."""
    import msgpack

    return msgpack.packb(((), "float32", struct.pack("<f", number)))  # type: ignore[no-any-return]
