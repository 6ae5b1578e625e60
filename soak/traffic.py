"""Requests that carry a unique number and say what should become of them, and answers that prove whose they are.

A payload is a header (number, kind, the body's CRC-32) followed by random bytes. The upper half of a number is that of
the caller's process, the lower half counts its requests: no two requests of a run have the same.
"""

from __future__ import annotations

import itertools
import os
import random
import struct
import zlib
from collections.abc import Iterator
from enum import IntEnum
from typing import Any, NamedTuple

from grpc_batcher import Array

import grpc
import numpy as np

MIN_BYTES = 64
MAX_BYTES = 1 << 20

# The servers accept the largest request with its framing, but not the one that is meant to be too large.
MAX_MESSAGE_BYTES = MAX_BYTES + 1024
TOO_LARGE_BYTES = MAX_BYTES + (64 << 10)

# For the server of arrays, a payload is as many rows as it needs.
ROW_BYTES = 1 << 16
ARRAYS = {"piece": Array((ROW_BYTES,), "uint8"), "piece_bytes": Array((), "int64"), "is_first": Array((), "bool")}

COUNT_BITS = 32
INT31 = 2**31 - 1

_HEADER = struct.Struct("<QBI")


class Kind(IntEnum):
    """What should become of a request."""

    PLAIN = 0  # an answer
    HURRIED = 1  # its deadline may pass first
    CANCELLED = 2  # its client may be closed first, or its future or task cancelled
    FAILING = 3  # the callback answers it with an Exception
    RAISING = 4  # the callback raises, and the whole batch fails
    WRONG_MODEL = 5  # refused: the other model's request
    TOO_LARGE = 6  # refused


# The percentage of requests of each kind.
SHARES = {
    Kind.PLAIN: 83.0,
    Kind.HURRIED: 8.0,
    Kind.CANCELLED: 1.0,
    Kind.FAILING: 4.0,
    Kind.RAISING: 0.5,
    Kind.WRONG_MODEL: 3.0,
    Kind.TOO_LARGE: 0.5,
}

# How a request may end. Besides these: INTERNAL for the whole batch of a RAISING request, and UNAVAILABLE while the
# server restarts.
ENDS = {
    Kind.PLAIN: {grpc.StatusCode.OK},
    Kind.HURRIED: {grpc.StatusCode.OK, grpc.StatusCode.DEADLINE_EXCEEDED},
    Kind.CANCELLED: {grpc.StatusCode.OK, grpc.StatusCode.CANCELLED},
    Kind.FAILING: {grpc.StatusCode.INTERNAL},
    Kind.RAISING: {grpc.StatusCode.INTERNAL},
    Kind.WRONG_MODEL: {grpc.StatusCode.INVALID_ARGUMENT},
    Kind.TOO_LARGE: {grpc.StatusCode.RESOURCE_EXHAUSTED},
}
REFUSED = (Kind.WRONG_MODEL, Kind.TOO_LARGE)


class AskedForError(Exception):
    """An error that requests asked for. Its text has the number of each request it fails."""

    def __init__(self, *numbers: int) -> None:
        super().__init__(" ".join(f"#{number};" for number in numbers))


def is_asked_for(details: str, number: int) -> bool:
    """Whether a status comes from an AskedForError, and from this request's own."""
    return AskedForError.__name__ in details and f"#{number};" in details


class Request(NamedTuple):
    number: int
    kind: Kind


_random_bytes = os.urandom(TOO_LARGE_BYTES + 65536)


def random_size(chance: random.Random) -> int:
    """Return a size whose logarithm is evenly distributed: 64 to 128 bytes as often as 512 KiB to 1 MiB."""
    return int(MIN_BYTES * (MAX_BYTES / MIN_BYTES) ** chance.random())


def write_request(request: Request, size: int, chance: random.Random) -> bytes:
    start = chance.randrange(65536)
    body = memoryview(_random_bytes)[start : start + size - _HEADER.size]
    return _HEADER.pack(*request, zlib.crc32(body)) + body


def read_request(payload: bytes) -> Request:
    """Raises ValueError if the payload was changed on its way."""
    number, kind, checksum = _HEADER.unpack_from(payload)
    if zlib.crc32(memoryview(payload)[_HEADER.size :]) != checksum:
        raise ValueError(
            f"a request of {len(payload)} bytes was changed on its way; its number may be {name_of(number)}"
        )
    return Request(number, Kind(kind))


def step_of(number: int) -> int:
    return number & INT31


def answer_to(number: int, payload: bytes) -> tuple[dict[str, bytes], int]:
    return {"number": number.to_bytes(8, "little"), "payload": payload}, step_of(number)


def to_rows(payload: bytes) -> dict[str, Any]:
    """Return a payload as the arrays of a request."""
    rows = -(-len(payload) // ROW_BYTES)
    pieces_bytes = np.full(rows, ROW_BYTES)
    pieces_bytes[-1] = len(payload) - (rows - 1) * ROW_BYTES
    padded = payload.ljust(rows * ROW_BYTES, b"\0")
    return {
        "piece": np.frombuffer(padded, np.uint8).reshape(rows, ROW_BYTES),
        "piece_bytes": pieces_bytes,
        "is_first": np.arange(rows) == 0,
    }


def from_rows(arrays: Any, count: int) -> Iterator[tuple[int, bytes]]:
    """Yield the first row and the payload of each request in the first `count` rows."""
    firsts = [*np.flatnonzero(arrays["is_first"][:count]).tolist(), count]
    for first, end in itertools.pairwise(firsts):
        rows = range(first, end)
        yield first, b"".join(arrays["piece"][row, : arrays["piece_bytes"][row]].tobytes() for row in rows)


def what_is_wrong(answer: tuple[dict[str, Any], int], number: int, payload: bytes) -> str | None:
    """What in an answer does not belong to this request; None if all does."""
    if answer == answer_to(number, payload):
        return None
    dictionary, step = answer
    other = dictionary.get("number")
    if other is not None and int.from_bytes(other, "little") != number:
        return f"got the answer to {name_of(int.from_bytes(other, 'little'))}"
    return f"got an answer with the keys {sorted(dictionary)}, the step {step} and other bytes than it sent"


def name_of(number: int) -> str:
    """A number in readable form: the caller's process and the count."""
    return f"{number >> COUNT_BITS}/{number & (1 << COUNT_BITS) - 1}"
