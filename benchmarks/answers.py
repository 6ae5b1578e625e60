"""What every server answers: 1 KiB that ends with the request's last 8 bytes, which show whose answer it is."""

from __future__ import annotations

TAG_BYTES = 8
ANSWER_BYTES = 1024

FILLER = b"a" * (ANSWER_BYTES - TAG_BYTES)

# The key of the only value, where answers are dictionaries.
KEY = "r"

# The model's name in the Open Inference Protocol, and that of its only input. Its only output is `KEY`.
MODEL = "echo"
INPUT = "data"


def answer_to(payload: bytes) -> bytes:
    return FILLER + payload[-TAG_BYTES:]
