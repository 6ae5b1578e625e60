"""What a bug report needs to know about a process."""

from __future__ import annotations

import importlib.metadata
import platform
import sys
import sysconfig

from . import _process
from ._transport import choice
from ._version import __version__


def info() -> dict[str, str]:
    """Return what a bug report should contain, by name: versions, and what this process chose and why.

    grpc_batcher, grpcio, protobuf, numpy: versions; "not installed" for numpy if it is missing.
    python: the version, and whether the interpreter was configured with `--enable-optimizations`. One that is not
        optimised costs a quarter of the throughput.
    kernel, libc: the system's.
    server_transport, client_transport: "direct" or "public" (see `MukoeBatcher.transport`), and why.
    poller: whether gRPC polls its sockets on the threads that wait for them ("tuned"), and why or why not.
    memory: whether glibc keeps freed memory for the next message ("tuned"), and why or why not.
    """
    return {
        "grpc_batcher": __version__,
        "python": f"{platform.python_version()}, {_python_build()}",
        "grpcio": _version("grpcio"),
        "protobuf": _version("protobuf"),
        "numpy": _version("numpy"),
        "kernel": f"{platform.system()} {platform.release()} {platform.machine()}",
        "libc": _process.libc(),
        "server_transport": choice.server_reason(),
        "client_transport": choice.client_reason(),
        "poller": _tuning(_process.poller),
        "memory": _tuning(_process.memory),
    }


def _python_build() -> str:
    implementation = sys.implementation.name
    options = sysconfig.get_config_var("CONFIG_ARGS") or ""
    if "--enable-optimizations" in options:
        return f"{implementation}, optimised build"
    # Their settings describe the shared library that they build beside the interpreter.
    return f"{implementation}, configured without --enable-optimizations (Debian's, Ubuntu's and conda's are optimised)"


def _version(distribution: str) -> str:
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def _tuning(tuning: _process.Tuning) -> str:
    return f"{'tuned' if tuning.is_on else 'left alone'}: {tuning.why}"
