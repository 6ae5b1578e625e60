"""What concerns the process as a whole: what works in a forked child, and what is closed when the interpreter exits.

gRPC's threads do not survive a fork. If the parent has used gRPC before it forks, a call in the child hangs, unless
GRPC_ENABLE_FORK_SUPPORT=1 was in the environment before grpc was imported (see doc/fork_support.md in gRPC's
repository). This library opens its first channel as late as possible, so a client that was made but not yet used works
in any child, and it raises an error where gRPC would hang.
"""

from __future__ import annotations

import atexit
import os
import weakref
from collections.abc import Callable
from typing import Protocol

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


def check_and_mark_grpc_used() -> None:
    """Call this before gRPC does anything. Raises RuntimeError in a child in which gRPC would hang."""
    global _grpc_was_used
    if _grpc_is_broken:
        raise RuntimeError(
            "this process was forked from one that had used gRPC, and gRPC does not work here: start processes with "
            "multiprocessing's 'spawn' or 'forkserver', or fork before the parent's first request, or set "
            "GRPC_ENABLE_FORK_SUPPORT=1 in the environment before grpc is imported"
        )
    _grpc_was_used = True


def _after_fork_in_child() -> None:
    global _grpc_is_broken
    _grpc_is_broken = _grpc_was_used and not fork_support_is_on
    for thing in tuple(_fork_aware):
        thing.forget_parent()


os.register_at_fork(after_in_child=_after_fork_in_child)


# Clients close before servers: a server that stops first makes gRPC print "Got goaway" for every connected client.
_close_clients: list[Callable[[], None]] = []
_close_servers: list[Callable[[], None]] = []


def close_clients_at_exit(close: Callable[[], None]) -> None:
    """Have `close` called when the interpreter exits, before any server is shut down."""
    _close_clients.append(close)


def close_servers_at_exit(close: Callable[[], None]) -> None:
    """Have `close` called when the interpreter exits, after all clients are closed."""
    _close_servers.append(close)


@atexit.register
def _close_at_exit() -> None:
    for close in (*_close_clients, *_close_servers):
        close()
