"""The processes that run.py starts: asking them, and what the kernel says of them."""

from __future__ import annotations

import ctypes
import json
import os
import queue
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Sequence
from contextlib import suppress
from functools import cached_property
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent

# An answer that takes longer than this never comes.
_ANSWER_LIMIT_S = 60.0
_STOP_LIMIT_S = 10.0

_libc = ctypes.CDLL(None, use_errno=True)


class ChildError(Exception):
    """A process ended or hangs; the text says which, and the end of what it wrote to its standard error."""


class Child:
    """A process that prints a JSON object when it is ready and then one for each command."""

    def __init__(self, name: str, command: Sequence[str], *, gear: str | None = None) -> None:
        self.name = name
        environment = dict(os.environ)
        environment.pop("GRPC_BATCHER_GEAR", None)
        if gear is not None:
            environment["GRPC_BATCHER_GEAR"] = gear
        # Scripts of its subfolders import what stands here.
        environment["PYTHONPATH"] = os.pathsep.join(filter(None, (str(HERE), environment.get("PYTHONPATH"))))
        self._stderr = tempfile.TemporaryFile()  # noqa: SIM115, it is closed in stop
        self._process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._stderr,
            env=environment,
            start_new_session=True,  # Ctrl-C is for run.py, which then stops all
        )
        self._answers: queue.SimpleQueue[bytes] = queue.SimpleQueue()
        threading.Thread(target=self._read, daemon=True).start()

    @cached_property
    def ready(self) -> dict[str, Any]:
        """Wait until it is ready, and return what it then said."""
        return self.answer()

    @cached_property
    def _pids(self) -> list[int]:
        """It and the processes that it has started when this is first asked for."""
        return _with_descendants(self._process.pid)

    def tell(self, **command: Any) -> None:
        """Send a command, whose answer `answer` returns."""
        _ = self.ready  # or it would be taken for the answer
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(json.dumps(command).encode() + b"\n")
            self._process.stdin.flush()
        except BrokenPipeError:
            raise self._error("ended") from None

    def answer(self) -> dict[str, Any]:
        limit_s = time.monotonic() + _ANSWER_LIMIT_S
        line = None
        while line is None:
            # The pipe alone does not tell: its own children may hold it open.
            has_ended = self._process.poll() is not None
            try:
                line = self._answers.get(timeout=0.5)
            except queue.Empty:
                if has_ended:
                    raise self._error("ended") from None
                if time.monotonic() > limit_s:
                    raise self._error(f"gave no answer within {_ANSWER_LIMIT_S:.0f} s") from None
        if not line:
            raise self._error("ended")
        return json.loads(line)  # type: ignore[no-any-return]

    def ask(self, **command: Any) -> dict[str, Any]:
        self.tell(**command)
        return self.answer()

    def stop(self) -> None:
        """Close its input, at which it ends, and wait for that."""
        self._close_input()
        try:
            self._process.wait(_STOP_LIMIT_S)
        except subprocess.TimeoutExpired:
            os.killpg(self._process.pid, signal.SIGKILL)  # of a session of its own: just what this Child started
            self._process.wait()
        self._stderr.close()

    def _close_input(self) -> None:
        if self._process.stdin is not None:
            with suppress(BrokenPipeError):
                self._process.stdin.close()

    def cpu_ns(self) -> int:
        """CPU time so far, in user and kernel mode, of the process and those that it has started."""
        return sum(_cpu_ns(pid) for pid in self._pids)

    def rss_bytes(self) -> int:
        """Memory that is resident now."""
        pages = Path(f"/proc/{self._process.pid}/statm").read_text().split()[1]
        return int(pages) * os.sysconf("SC_PAGESIZE")

    def _read(self) -> None:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            self._answers.put(line)
        self._answers.put(b"")

    def _error(self, what: str) -> ChildError:
        self._stderr.seek(0)
        said = self._stderr.read()[-2000:].decode(errors="replace").strip()
        return ChildError(f"{self.name} {what}" + (f": {said}" if said else ""))


def stop_all(children: Sequence[Child]) -> None:
    """Stop them at the same time."""
    for child in children:
        child._close_input()
    for child in children:
        child.stop()


def python(script: str, *arguments: object) -> list[str]:
    """The command that runs a script of this folder with this Python."""
    return [sys.executable, str(HERE / script), *map(str, arguments)]


def sleep_until(due_ns: int) -> None:
    time.sleep(max(0, due_ns - time.monotonic_ns()) / 1e9)


def _cpu_ns(pid: int) -> int:
    """/proc/PID/stat counts in hundredths of a second; the process' own clock in nanoseconds."""
    clock = ctypes.c_int()
    if _libc.clock_getcpuclockid(pid, ctypes.byref(clock)):
        return 0  # it has ended
    try:
        return time.clock_gettime_ns(clock.value)
    except OSError:
        return 0


def _with_descendants(root: int) -> list[int]:
    children: dict[int, list[int]] = {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                # The name before it is in parentheses and may hold anything.
                parent = int((entry / "stat").read_text().rpartition(")")[2].split()[1])
            except (OSError, IndexError):
                continue
            children.setdefault(parent, []).append(int(entry.name))
    found = [root]
    for pid in found:
        found += children.get(pid, ())
    return found
