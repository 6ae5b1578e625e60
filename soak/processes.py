"""The processes as run.py sees them: what the kernel says of them, and which requests their callbacks have seen."""

from __future__ import annotations

import os
import re
import threading
from collections.abc import Callable
from pathlib import Path

from grpc_batcher._cli.workers import Worker

from traffic import COUNT_BITS, name_of


class Child(Worker):
    answer_limit_s = 150.0  # longer than any wait inside

    def resources(self) -> dict[str, int]:
        """What it uses now. Memory is the anonymous part of resident memory, without files and the interpreter."""
        folder = Path(f"/proc/{self.pid}")
        status = (folder / "status").read_text()
        numbers = dict(re.findall(r"^(\w+):\s+(\d+)", status, re.M))
        return {
            "memory_bytes": int(numbers["RssAnon"]) << 10,
            "threads": int(numbers["Threads"]),
            "files": len(os.listdir(folder / "fd")),
        }


class Seen:
    """The request numbers that callbacks have seen, on any server, with one bit each."""

    def __init__(self, report: Callable[[str], None]) -> None:
        self._report = report
        self._lock = threading.Lock()
        self._bits: dict[int, bytearray] = {}
        self.count = 0

    def mark(self, server: str, number: int) -> None:
        process, count = number >> COUNT_BITS, number & (1 << COUNT_BITS) - 1
        with self._lock:
            bits = self._bits.setdefault(process, bytearray())
            if len(bits) <= count >> 3:
                bits.extend(bytes((count >> 3) + 1 - len(bits)))
            bit = 1 << (count & 7)
            if bits[count >> 3] & bit:
                self._report(f"{server}: the callback saw {name_of(number)}, which a callback had seen before")
            bits[count >> 3] |= bit
            self.count += 1
