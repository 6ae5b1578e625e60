"""What gRPC takes for metadata (Custom-Metadata in its PROTOCOL-HTTP2.md)."""

from __future__ import annotations

import re
from typing import Any

_KEY = re.compile(r"[0-9a-z_.-]+")
_TEXT = re.compile(r"[\x20-\x7e]*")


def fault_of(key: Any, value: Any) -> str | None:
    """What is wrong with a pair, in words, or None. It never shows the value, which may be a secret."""
    if not isinstance(key, str) or not _KEY.fullmatch(key):
        return f"the key {key!r}; a key is made of small letters, digits, '_', '-' and '.'"
    if key.endswith("-bin"):
        return None if isinstance(value, bytes) else f"a {type(value).__name__} for {key!r}; such a key takes bytes"
    if isinstance(value, bytes):
        value = value.decode("latin-1")
    if not isinstance(value, str):
        return f"a {type(value).__name__} for {key!r}; it takes a text"
    if not _TEXT.fullmatch(value):
        return f"a value for {key!r} with other characters than printable ASCII, such as the end of a line"
    return None
