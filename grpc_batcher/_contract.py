"""What both ends of a stream must agree on, and limits that every part of the package shares."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable
from typing import Any, TypeVar

_Value = TypeVar("_Value")

SERVICE_NAME = "mukoe_batcher.MukoeService"
METHOD = f"/{SERVICE_NAME}/ProcessRequest"

# Trailing metadata of a stream that the server ends: how many of the stream's requests the batcher took in. From it the
# client knows whether its last request was refused, and so may be sent again.
TAKEN_IN_KEY = "grpc-batcher-taken-in"

# Metadata of a stream that is one of several of its caller, which uses any of them for its next request. Its value has
# no meaning.
POOLED_KEY = "grpc-batcher-pooled"

# Metadata that this library's clients open a stream with: how old their connection is, in milliseconds.
CONNECTION_AGE_KEY = "grpc-batcher-connection-age-ms"

# Trailing metadata of a stream that the server ends because its connection is old: the caller should open another
# connection, not only another stream, and so resolve the server's name again.
RECONNECT_KEY = "grpc-batcher-reconnect"

# Both ends accept messages up to this size unless told otherwise. gRPC counts a message's bytes in an int32.
DEFAULT_MAX_MESSAGE_BYTES = 64 * 1024 * 1024
MAX_MESSAGE_BYTES = 2**31 - 1

# The longest duration that any argument may give: thirty years, as good as forever.
MAX_DURATION_S = 1e9

_METADATA_KEY = re.compile(r"[0-9a-z_.-]+")
_METADATA_TEXT = re.compile(r"[\x20-\x7e]*")


def check_duration(name: str, value: Any) -> None:
    """Raise ValueError unless an argument is a number of seconds from 0."""
    try:
        is_good = math.isfinite(value) and 0 <= value <= MAX_DURATION_S
    except (OverflowError, TypeError):
        is_good = False
    if not is_good:
        raise ValueError(f"{name} is {value!r}; it must be a number of seconds from 0 to {MAX_DURATION_S:.0f}")


def as_tuple(name: str, values: Iterable[_Value]) -> tuple[_Value, ...]:
    """Return an argument's values as a tuple. Raises TypeError if it has none.

    An iterator gives its values only once: checking them and then using it would use none.
    """
    try:
        return tuple(values)
    except TypeError:
        raise TypeError(f"{name} is {values!r}; it must be a sequence such as a list or a tuple") from None


def is_unix_socket(address: str) -> bool:
    """Whether an address is a unix socket's path, which has no port."""
    return address.startswith(("unix:", "unix-abstract:"))


def metadata_fault(key: Any, value: Any) -> str | None:
    """Say what is wrong with a metadata pair, or return None.

    The rules are Custom-Metadata's in gRPC's PROTOCOL-HTTP2.md. The value is never shown: it may be a secret.
    """
    if not isinstance(key, str) or not _METADATA_KEY.fullmatch(key):
        return f"the key {key!r}; keys consist of lower-case letters, digits, '_', '-' and '.'"
    if key.endswith("-bin"):
        return None if isinstance(value, bytes) else f"a {type(value).__name__} for {key!r}; '-bin' keys take bytes"
    if isinstance(value, bytes):
        value = value.decode("latin-1")
    if not isinstance(value, str):
        return f"a {type(value).__name__} for {key!r}; it must be a str"
    if not _METADATA_TEXT.fullmatch(value):
        return f"a value for {key!r} with characters other than printable ASCII, such as a line break"
    return None
