"""What travels: requests that carry a number of their own and say what shall become of them, and answers that prove it.

A payload is the header (number, kind, the body's CRC-32) and then random bytes. A number is that of the caller's
process and, in the lower half, a count of that process's requests: no two are alike in a run.
"""

from __future__ import annotations

import os
import random
import struct
import zlib
from enum import IntEnum
from typing import Any, NamedTuple

import grpc

MIN_BYTES = 64
MAX_BYTES = 1 << 20

# What the servers take: the largest request with its framing, and not the one that is meant to be too large.
MAX_MESSAGE_BYTES = MAX_BYTES + 1024
TOO_LARGE_BYTES = MAX_BYTES + (64 << 10)

COUNT_BITS = 32
INT31 = 2**31 - 1

_HEADER = struct.Struct("<QBI")


class Kind(IntEnum):
    """What shall become of a request."""

    PLAIN = 0  # an answer
    HURRIED = 1  # its deadline may pass first
    CANCELLED = 2  # its client may be closed first
    FAILING = 3  # the callback answers it with an Exception
    RAISING = 4  # the callback raises, and the whole batch fails
    WRONG_MODEL = 5  # refused: the other model's request
    TOO_LARGE = 6  # refused


# How many of a hundred requests are of each kind.
SHARES = {
    Kind.PLAIN: 83.0,
    Kind.HURRIED: 8.0,
    Kind.CANCELLED: 1.0,
    Kind.FAILING: 4.0,
    Kind.RAISING: 0.5,
    Kind.WRONG_MODEL: 3.0,
    Kind.TOO_LARGE: 0.5,
}

# How a request may end (see "Outcomes" in README.md). Beside these: INTERNAL for all of a batch that has a RAISING
# one, and UNAVAILABLE from a server that is restarted just then.
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
    """An error that a request asked for. Its text has the number of every request that it fails."""

    def __init__(self, *numbers: int) -> None:
        super().__init__(" ".join(f"#{number};" for number in numbers))


def is_asked_for(details: str, number: int) -> bool:
    """Whether a status is that of an AskedForError, and this request's own."""
    return AskedForError.__name__ in details and f"#{number};" in details


class Request(NamedTuple):
    number: int
    kind: Kind


_random_bytes = os.urandom(TOO_LARGE_BYTES + 65536)


def random_size(chance: random.Random) -> int:
    """As often from 64 to 128 bytes as from 512 KiB to 1 MiB."""
    return int(MIN_BYTES * (MAX_BYTES / MIN_BYTES) ** chance.random())


def write_request(request: Request, size: int, chance: random.Random) -> bytes:
    start = chance.randrange(65536)
    body = memoryview(_random_bytes)[start : start + size - _HEADER.size]
    return _HEADER.pack(*request, zlib.crc32(body)) + body


def read_request(payload: bytes) -> Request:
    """Raises ValueError if it is not what was sent."""
    number, kind, checksum = _HEADER.unpack_from(payload)
    if zlib.crc32(memoryview(payload)[_HEADER.size :]) != checksum:
        raise ValueError(f"a request of {len(payload)} bytes came in changed; its number may be {name_of(number)}")
    return Request(number, Kind(kind))


def step_of(number: int) -> int:
    return number & INT31


def answer_to(number: int, payload: bytes) -> tuple[dict[str, bytes], int]:
    return {"number": number.to_bytes(8, "little"), "payload": payload}, step_of(number)


def what_is_wrong(answer: tuple[dict[str, Any], int], number: int, payload: bytes) -> str | None:
    """What an answer has that is not this request's; None if nothing."""
    if answer == answer_to(number, payload):
        return None
    dictionary, step = answer
    other = dictionary.get("number")
    if other is not None and int.from_bytes(other, "little") != number:
        return f"got the answer to {name_of(int.from_bytes(other, 'little'))}"
    return f"got an answer with the keys {sorted(dictionary)}, the step {step} and other bytes than it sent"


def name_of(number: int) -> str:
    """A number for people: the caller's process and the count."""
    return f"{number >> COUNT_BITS}/{number & (1 << COUNT_BITS) - 1}"
