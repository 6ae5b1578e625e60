"""What a fork means for clients and servers.

gRPC's own threads do not live on in a forked child. If the parent had used gRPC before, a call in the child hangs,
unless GRPC_ENABLE_FORK_SUPPORT=1 was in the environment before grpc was imported (see doc/fork_support.md in gRPC's
repository). This library opens its first channel as late as it can, so that a client which was made but not yet used
works in any child, and raises where gRPC would hang.
"""

from __future__ import annotations

import os
import weakref
from typing import Protocol

supported = os.environ.get("GRPC_ENABLE_FORK_SUPPORT", "0").lower() in ("1", "true", "t", "yes", "y")
_used = False
_broken = False


class Forgetful(Protocol):
    """An object that starts anew in a forked child."""

    def forget_parent(self) -> None: ...


_forgetful: weakref.WeakSet[Forgetful] = weakref.WeakSet()


def register(thing: Forgetful) -> None:
    """Have `forget_parent` called in every child that is forked from now on."""
    _forgetful.add(thing)


def check_and_mark_used() -> None:
    """To be called before gRPC does anything. Raises RuntimeError in a child in which it would hang."""
    global _used
    if _broken:
        raise RuntimeError(
            "this process was forked from one that had used gRPC, and gRPC does not work here: start processes with "
            "multiprocessing's 'spawn' or 'forkserver', or fork before the parent's first request, or set "
            "GRPC_ENABLE_FORK_SUPPORT=1 in the environment before grpc is imported"
        )
    _used = True


def _after_fork_in_child() -> None:
    global _broken
    _broken = _used and not supported
    for thing in tuple(_forgetful):
        thing.forget_parent()


os.register_at_fork(after_in_child=_after_fork_in_child)
