"""The processes that run.py starts, and what the kernel says of them."""

from __future__ import annotations

import ctypes
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from functools import cached_property
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from grpc_batcher._cli.workers import Worker, WorkerError, obey

_TRANSPORT = "GRPC_BATCHER_TRANSPORT"

_PROGRAM_STOP_LIMIT_S = 5.0

_libc = ctypes.CDLL(None, use_errno=True)


class Child(Worker):
    """A worker that runs on one transport and whose standard error goes to a file, for the text of errors."""

    def __init__(
        self, name: str, function: Callable[..., None], *arguments: object, transport: str | None = None
    ) -> None:
        self._log = tempfile.NamedTemporaryFile()  # noqa: SIM115, it lives as long as the worker
        os.environ.pop(_TRANSPORT, None)
        if transport is not None:
            os.environ[_TRANSPORT] = transport
        super().__init__(name, _logged, self._log.name, function, *arguments)

    @cached_property
    def _pids(self) -> list[int]:
        """It and the processes that it has started when this is first asked for."""
        return _with_descendants(self.pid)

    def cpu_ns(self) -> int:
        """CPU time so far, in user and kernel mode, of the process and those it has started."""
        return sum(_cpu_ns(pid) for pid in self._pids)

    def rss_bytes(self) -> int:
        """Memory that is resident now, without that of processes it has started."""
        pages = Path(f"/proc/{self.pid}/statm").read_text().split()[1]
        return int(pages) * os.sysconf("SC_PAGESIZE")

    def _error(self) -> WorkerError:
        error = super()._error()
        said = Path(self._log.name).read_text(errors="replace")[-2000:].strip()
        return WorkerError(f"{error}: {said}") if said else error


def _logged(pipe: Connection, log: str, function: Callable[..., None], *arguments: object) -> None:
    with open(log, "ab") as file:
        os.dup2(file.fileno(), sys.stderr.fileno())
    function(pipe, *arguments)


def run_program(pipe: Connection, *command: str) -> None:
    """A child that is another program: it prints a JSON object when it is ready, and one for each line it gets.

    It ends when its standard input is closed.
    """
    # Scripts of the subfolders import what stands here.
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parent)}
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment, start_new_session=True
    ) as program:
        assert program.stdin is not None
        assert program.stdout is not None
        stdin, stdout = program.stdin, program.stdout

        def answer() -> Any:
            return json.loads(stdout.readline() or sys.exit(f"{command[0]} ended"))

        def counts() -> Any:
            print(file=stdin, flush=True)
            return answer()

        pipe.send(answer())
        obey(pipe, {"counts": counts})
        stdin.close()
        try:
            program.wait(_PROGRAM_STOP_LIMIT_S)
        except subprocess.TimeoutExpired:
            os.killpg(program.pid, signal.SIGKILL)  # of a session of its own: only what it started


def sleep_until(due_ns: int) -> None:
    time.sleep(max(0, due_ns - time.monotonic_ns()) / 1e9)


def _cpu_ns(pid: int) -> int:
    """The process's own clock counts in nanoseconds; /proc/PID/stat only in hundredths of a second."""
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
                # The process name before it is in parentheses and may contain anything.
                parent = int((entry / "stat").read_text().rpartition(")")[2].split()[1])
            except (OSError, IndexError):
                continue
            children.setdefault(parent, []).append(int(entry.name))
    found = [root]
    for pid in found:
        found += children.get(pid, ())
    return found
