"""The processes as run.py sees them: asking them, ending them, and what the kernel says of them."""

from __future__ import annotations

import multiprocessing
import os
import re
import signal
import threading
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

from traffic import COUNT_BITS, name_of

# An answer that takes longer never comes: the process hangs. Longer than any wait inside.
_ANSWER_LIMIT_S = 150.0

# gRPC allows no fork behind its back.
spawning = multiprocessing.get_context("spawn")


class ChildError(Exception):
    """A process ended that nobody ended, or it hangs."""


class Child:
    """A process that obeys over a pipe.

    ready: what it said when it began to serve or to call.
    """

    def __init__(self, name: str, function: Callable[..., None], *arguments: Any) -> None:
        self.name = name
        self._pipe, theirs = spawning.Pipe()
        self._process = spawning.Process(target=function, args=(theirs, *arguments), name=name, daemon=True)
        self._process.start()
        theirs.close()
        self._ready: dict[str, Any] | None = None

    @property
    def ready(self) -> dict[str, Any]:
        if self._ready is None:
            self._ready = self.answer()
        return self._ready

    def tell(self, *command: Any) -> None:
        """Send a command, whose answer `answer` returns."""
        _ = self.ready  # or it would be taken for the answer
        with suppress(BrokenPipeError):  # the answer says it
            self._pipe.send(command)

    def ask(self, *command: Any) -> dict[str, Any]:
        self.tell(*command)
        return self.answer()

    def end(self) -> None:
        """Wait for the end of a process that was told to stop. Raises ChildError unless its exit status is 0."""
        self._process.join(_ANSWER_LIMIT_S)
        if self._process.exitcode != 0:
            raise self._error()

    def kill(self) -> None:
        """End it with SIGKILL."""
        self._process.kill()
        self._process.join()
        self._pipe.close()

    def resources(self) -> dict[str, int]:
        """What it uses now. Its memory is the anonymous part of what is resident: not files, nor the interpreter."""
        folder = Path(f"/proc/{self._process.pid}")
        status = (folder / "status").read_text()
        numbers = dict(re.findall(r"^(\w+):\s+(\d+)", status, re.M))
        return {
            "memory_bytes": int(numbers["RssAnon"]) << 10,
            "threads": int(numbers["Threads"]),
            "files": len(os.listdir(folder / "fd")),
        }

    def answer(self) -> dict[str, Any]:
        try:
            if self._pipe.poll(_ANSWER_LIMIT_S):
                answer: dict[str, Any] = self._pipe.recv()
                return answer
        except (EOFError, OSError):
            pass
        raise self._error()

    def _error(self) -> ChildError:
        self._process.join(1)
        if self._process.exitcode is not None:
            return ChildError(f"{self.name} ended with the exit status {self._process.exitcode}")
        os.kill(self._process.pid or 0, signal.SIGABRT)
        return ChildError(f"{self.name} hung; its stacks are on stderr")


class Seen:
    """The numbers that callbacks have seen, a bit for each, whichever server it was."""

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
