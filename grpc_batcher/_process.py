"""What concerns the process as a whole: gRPC's poller, glibc's memory, forks, and the interpreter's exit.

This module is imported before grpc is: the poller can be chosen only then.
"""

from __future__ import annotations

import atexit
import ctypes
import importlib.metadata
import logging
import os
import re
import sys
import weakref
from collections.abc import Callable
from typing import NamedTuple, Protocol

_logger = logging.getLogger("grpc_batcher")


# The newest release that all tests passed with. The direct transport is tried with newer ones, too; the poller is not
# touched.
NEWEST_TESTED_GRPCIO = (1, 85)


class Tuning(NamedTuple):
    """Whether a process-wide setting was changed, and why or why not."""

    is_on: bool
    why: str


# ---- gRPC's poller ----

# From grpcio 1.80 on, gRPC's event engine hands every event to another thread. Without these two experiments gRPC polls
# its sockets on the threads that wait for them, as it did before, which takes about half the thread switches per
# request.
#
# After `import grpc` there is no way left. gRPC's core reads its experiments once, when its native module is loaded: a
# variable set later, even before the first channel, changes nothing (tried with grpcio 1.85.3). Their setter is private
# to the core, the module exports no function besides PyInit_cygrpc, and no channel option chooses between the two.
_POLLING_EXPERIMENTS = "-event_engine_client,-event_engine_listener"
_FIRST_WITH_EVENT_ENGINE = (1, 80)


def _choose_poller() -> Tuning:
    """Import grpc with polling where that was tried. gRPC reads the variable only then, so no child inherits it."""
    if os.environ.get("GRPC_BATCHER_TUNE_GRPC") == "0":
        return Tuning(False, "GRPC_BATCHER_TUNE_GRPC is 0")
    if "GRPC_EXPERIMENTS" in os.environ:
        return Tuning(False, f"GRPC_EXPERIMENTS is {os.environ['GRPC_EXPERIMENTS']!r} already")
    if "grpc" in sys.modules:
        return Tuning(False, "grpc was imported before grpc_batcher, which is too late to choose")
    try:
        version = importlib.metadata.version("grpcio")
    except importlib.metadata.PackageNotFoundError:  # in a bundle without metadata
        version = None
    # None, too, for a folder of metadata that lost its METADATA.
    numbers = re.match(r"(\d+)\.(\d+)", version or "")
    if numbers is None:
        return Tuning(False, "the version of grpcio is unknown")
    release = (int(numbers[1]), int(numbers[2]))
    if release < _FIRST_WITH_EVENT_ENGINE:
        return Tuning(False, f"grpcio {version} polls by default")
    if release > NEWEST_TESTED_GRPCIO:
        return Tuning(False, f"polling is untested with grpcio {version}")
    os.environ["GRPC_EXPERIMENTS"] = _POLLING_EXPERIMENTS
    try:
        import grpc  # noqa: F401
    finally:
        del os.environ["GRPC_EXPERIMENTS"]
    return Tuning(True, f"grpcio {version} polls faster than it hands events to other threads")


poller = _choose_poller()
_logger.debug("gRPC's poller: %s: %s", "tuned" if poller.is_on else "left alone", poller.why)


# ---- glibc's memory ----

# glibc gives the memory of large blocks back to the system as soon as they are freed, and every message costs page
# faults again. Its limits for that adapt: freeing a block of up to 32 MiB raises the size from which blocks are mapped
# on their own to that block's size, and the free memory kept at the end of the heap to twice as much (M_MMAP_THRESHOLD
# in mallopt(3)). So one large block, freed untouched, sets them as if the program had used such blocks all along; where
# the user set the limits, glibc leaves them.
_PRIMING_BLOCK_BYTES = 32 * 1024 * 1024 - 8 * 1024

memory = Tuning(False, "this process has neither sent nor served a request")

# Each of these fixes the limits, and glibc then adapts none of them.
_MALLOC_VARIABLES = ("MALLOC_MMAP_MAX_", "MALLOC_MMAP_THRESHOLD_", "MALLOC_TOP_PAD_", "MALLOC_TRIM_THRESHOLD_")
_MALLOC_TUNABLES = re.compile(r"glibc\.malloc\.(mmap_max|mmap_threshold|top_pad|trim_threshold)=")


def _keep_freed_memory() -> Tuning:
    """Have glibc keep freed memory for the next message."""
    if os.environ.get("GRPC_BATCHER_TUNE_MALLOC") == "0":
        return Tuning(False, "GRPC_BATCHER_TUNE_MALLOC is 0")
    if not libc().startswith("glibc"):
        return Tuning(False, "the C library is not glibc")
    for variable in _MALLOC_VARIABLES:
        if variable in os.environ:
            return Tuning(False, f"{variable} is set")
    if tunable := _MALLOC_TUNABLES.search(os.environ.get("GLIBC_TUNABLES", "")):
        return Tuning(False, f"GLIBC_TUNABLES sets glibc.malloc.{tunable[1]}")
    process = ctypes.CDLL(None)
    process.malloc.restype = ctypes.c_void_p
    process.malloc.argtypes = [ctypes.c_size_t]
    process.free.argtypes = [ctypes.c_void_p]
    glibc = ctypes.CDLL("libc.so.6")  # whose mallinfo another allocator may replace, too
    before_bytes = _allocated_bytes(glibc)
    block = process.malloc(_PRIMING_BLOCK_BYTES)
    came_from_glibc = (_allocated_bytes(glibc) - before_bytes) % 2**32 >= _PRIMING_BLOCK_BYTES // 2
    process.free(block)
    if not came_from_glibc:
        return Tuning(False, "another allocator replaces glibc's")
    return Tuning(True, "freed memory is kept for the next message")


class _MallInfo(ctypes.Structure):
    """What mallinfo(3) returns. Its int fields wrap around at 4 GiB."""

    _fields_ = tuple(
        (name, ctypes.c_int)
        for name in [
            "arena",
            "ordblks",
            "smblks",
            "hblks",
            "hblkhd",
            "usmblks",
            "fsmblks",
            "uordblks",
            "fordblks",
            "keepcost",
        ]
    )


def _allocated_bytes(glibc: ctypes.CDLL) -> int:
    """How many bytes glibc's allocator has given out, modulo 4 GiB."""
    glibc.mallinfo.restype = _MallInfo
    found = glibc.mallinfo()
    return int(found.uordblks) + int(found.hblkhd)


def libc() -> str:
    """Return the C library's name and version, such as "glibc 2.36"; "unknown" if it is not glibc."""
    try:
        return os.confstr("CS_GNU_LIBC_VERSION") or "unknown"
    except (OSError, ValueError):
        return "unknown"


# ---- forks ----

# gRPC's threads do not survive a fork. If the parent has used gRPC before it forks, a call in the child hangs, unless
# GRPC_ENABLE_FORK_SUPPORT=1 was in the environment before grpc was imported (see doc/fork_support.md in gRPC's
# repository). This library opens its first channel as late as possible, so a client that was made but not yet used
# works in any child, and it raises an error where gRPC would hang.
fork_support_is_on = os.environ.get("GRPC_ENABLE_FORK_SUPPORT", "0").lower() in ("1", "true", "t", "yes", "y")
_grpc_was_used = False
_grpc_is_broken = False


class ForkAware(Protocol):
    """An object that starts afresh in a forked child."""

    def forget_parent(self) -> None: ...


_fork_aware: weakref.WeakSet[ForkAware] = weakref.WeakSet()


def start_afresh_after_fork(thing: ForkAware) -> None:
    """Have `forget_parent` called in every child forked from now on."""
    _fork_aware.add(thing)


def prepare_to_use_grpc() -> None:
    """Call this before gRPC does anything. Raises RuntimeError in a child in which gRPC would hang."""
    global _grpc_was_used, memory
    if _grpc_is_broken:
        raise RuntimeError(
            "this process was forked from one that had used gRPC, and gRPC does not work here: start processes with "
            "multiprocessing's 'spawn' or 'forkserver', or fork before the parent's first request, or set "
            "GRPC_ENABLE_FORK_SUPPORT=1 in the environment before grpc is imported"
        )
    if not _grpc_was_used:
        memory = _keep_freed_memory()
        _logger.debug("glibc's memory: %s: %s", "tuned" if memory.is_on else "left alone", memory.why)
    _grpc_was_used = True


def _after_fork_in_child() -> None:
    global _grpc_is_broken
    _grpc_is_broken = _grpc_was_used and not fork_support_is_on
    for thing in tuple(_fork_aware):
        thing.forget_parent()


os.register_at_fork(after_in_child=_after_fork_in_child)


# ---- the interpreter's exit ----

# Clients close before servers: a server that stops first makes gRPC print "Got goaway" for every connected client.
_close_clients: list[Callable[[], None]] = []
_close_servers: list[Callable[[], None]] = []


def close_clients_at_exit(close: Callable[[], None]) -> None:
    """Have `close` called when the interpreter exits, before any server is shut down."""
    _close_clients.append(close)


def close_servers_at_exit(close: Callable[[], None]) -> None:
    """Have `close` called when the interpreter exits, after all clients are closed."""
    _close_servers.append(close)


def call_at_exit(close: Callable[[], None]) -> None:
    """Call what closes something at exit; an error must not keep the rest from being closed."""
    try:
        close()
    except Exception:
        _logger.exception("something did not close cleanly at exit")


@atexit.register
def _close_at_exit() -> None:
    for close in (*_close_clients, *_close_servers):
        call_at_exit(close)
