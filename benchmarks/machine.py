"""What the figures were measured on."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import resource
import subprocess
import time
from pathlib import Path
from typing import Any

import cpp_echo

# Environment variables that change how these programs run, by the beginning of their names.
_TELLING = (
    "GLIBC_TUNABLES",
    "GRPC_ENABLE_FORK_SUPPORT",
    "GRPC_EXPERIMENTS",
    "GRPC_POLL_STRATEGY",
    "MALLOC_",
    "PYTHONGIL",
    "PYTHONMALLOC",
)


def describe() -> dict[str, Any]:
    return {
        "cpu": _cpu_model(),
        "cores": len(os.sched_getaffinity(0)),
        "memory_gib": round(os.sysconf("SC_PAGESIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1),
        "kernel": platform.release(),
        "python": platform.python_version(),
        "grpc_batcher": _version("grpc-batcher"),
        "commit": _commit(),
        "grpcio": _version("grpcio"),
        "protobuf": _version("protobuf"),
        "mosec": _version("mosec"),
        "grpc++": cpp_echo.grpc_version(),
        "environment": {name: value for name, value in sorted(os.environ.items()) if name.startswith(_TELLING)},
        "started": time.strftime("%Y-%m-%d %H:%M:%S %z"),
    }


def in_words(machine: dict[str, Any]) -> str:
    others = ", ".join(f"{name} {machine[name]}" for name in ("mosec", "grpc++") if machine[name])
    environment = ", ".join(f"{name}={value}" for name, value in machine["environment"].items())
    return (
        f"{machine['cpu']}, {machine['cores']} cores, {machine['memory_gib']} GiB, Linux {machine['kernel']}; "
        f"Python {machine['python']}, grpcio {machine['grpcio']}, protobuf {machine['protobuf']}, "
        f"grpc_batcher {machine['grpc_batcher']} at {machine['commit'] or 'no commit'}"
        + (f"; {others}" if others else "")
        + (f"; {environment}" if environment else "")
    )


def _cpu_model() -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        name, _, value = line.partition(":")
        if name.strip() == "model name":
            return value.strip()
    return platform.machine()


def _commit() -> str | None:
    """The commit of the tree that holds this file, with "-dirty" appended if the tree was changed."""
    command = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty", "--abbrev=12"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None


def _version(distribution: str) -> str | None:
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return None


class Watch:
    """Measures how much of the machine others use from now on."""

    def __init__(self) -> None:
        self._begin = self._read()

    def others_percent(self) -> float:
        """Call it after all processes that this one started have ended."""
        (total, busy, own), (total_before, busy_before, own_before) = self._read(), self._begin
        others = (busy - busy_before) - (own - own_before)
        return max(0.0, 100 * others / max(1e-9, total - total_before))

    @staticmethod
    def _read() -> tuple[float, float, float]:
        """Return seconds: of all cores together, of those spent on any process, and on ours."""
        ticks = [int(field) for field in Path("/proc/stat").read_text().splitlines()[0].split()[1:9]]
        user, nice, system, _idle, _iowait, _irq, _softirq, steal = ticks
        usages = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
        per_s = os.sysconf("SC_CLK_TCK")
        return (
            sum(ticks) / per_s,
            (user + nice + system + steal) / per_s,
            sum(usage.ru_utime + usage.ru_stime for usage in usages),
        )
