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
from collections.abc import Callable, Mapping
from functools import cached_property
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from grpc_batcher._cli.workers import Worker, WorkerError, obey

# What the package tunes in a process unless a variable is 0, by its name in `grpc_batcher.info()`.
_SWITCHES = {"poller": "GRPC_BATCHER_TUNE_GRPC", "memory": "GRPC_BATCHER_TUNE_MALLOC"}

# For processes that use plain grpcio and import the package only for its helpers.
UNTUNED = dict.fromkeys(_SWITCHES.values(), "0")

_PROGRAM_STOP_LIMIT_S = 5.0

_libc = ctypes.CDLL(None, use_errno=True)


class Child(Worker):
    """A worker whose standard error goes to a file, for the text of errors.

    environment: the package's variables that it gets. It inherits no others of them, so without any it has the
        package's defaults.
    """

    def __init__(
        self, name: str, function: Callable[..., None], *arguments: object, environment: Mapping[str, str] | None = None
    ) -> None:
        self._log = tempfile.NamedTemporaryFile()  # noqa: SIM115, it lives as long as the worker
        self._environment = environment or {}
        for variable in tuple(os.environ):
            if variable.startswith("GRPC_BATCHER_"):
                del os.environ[variable]
        os.environ.update(self._environment)
        super().__init__(name, _logged, self._log.name, function, *arguments)

    @cached_property
    def info(self) -> dict[str, str] | None:
        """Its `grpc_batcher.info()`, to be asked for after it was used; None for a program without the package."""
        return self.ask("info")  # type: ignore[no-any-return]

    def mistuned(self) -> list[str]:
        """What is tuned although it should not be, or the other way round. Call it after the process was used."""
        return [
            f"{self.name}: {name}: {self.info[name]}"
            for name, switch in _SWITCHES.items()
            if self.info is not None and self.info[name].startswith("tuned") is (self._environment.get(switch) == "0")
        ]

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
        obey(pipe, {"counts": counts, "info": lambda: None})
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
