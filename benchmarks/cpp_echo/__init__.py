"""Builds the C++ echo, if its compiler and libraries are installed."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

_HERE = Path(__file__).parent
_SOURCE = _HERE / "echo.cc"
_BINARY = _HERE / "build" / "echo"
_INSTALL = "on Debian: apt install g++ pkg-config libgrpc++-dev"


class NotBuilt(Exception):
    """Why there is no C++ echo."""


def build() -> Path:
    """Return the binary, compiling it again if the source is newer. Raises NotBuilt."""
    if _BINARY.exists() and _BINARY.stat().st_mtime >= _SOURCE.stat().st_mtime:
        return _BINARY
    for tool in ("g++", "pkg-config"):
        if shutil.which(tool) is None:
            raise NotBuilt(f"there is no {tool} ({_INSTALL})")
    flags = _run("pkg-config", "--cflags", "--libs", "grpc++").split()
    _BINARY.parent.mkdir(exist_ok=True)
    # pkg-config forgets absl_synchronization where gRPC's headers need it.
    _run("g++", "-O2", "-std=c++17", "-o", str(_BINARY), str(_SOURCE), *flags, "-labsl_synchronization")
    return _BINARY


def grpc_version() -> str | None:
    """Return the gRPC version it is built on; None if it is unknown."""
    try:
        return _run("pkg-config", "--modversion", "grpc++").strip()
    except (NotBuilt, FileNotFoundError):
        return None


def _run(*command: str) -> str:
    result = subprocess.run(command, capture_output=True, text=True)
    if result.returncode:
        last_line = (result.stderr.strip().splitlines() or ["no output"])[-1]
        raise NotBuilt(f"{command[0]} failed: {last_line} ({_INSTALL})")
    return result.stdout
