"""How run.py and its processes talk: a JSON object in each line of their input and output."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from typing import Any


def commands() -> Iterator[dict[str, Any]]:
    """Yield what run.py asks for, until it closes the pipe or is gone."""
    for line in sys.stdin:
        yield json.loads(line)


def say(**answer: Any) -> None:
    print(json.dumps(answer), flush=True)
