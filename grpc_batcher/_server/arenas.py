"""Memory for batches' arrays, reused once nothing refers to it."""

from __future__ import annotations

from collections import deque

from .._arrays import Arena

# A callback that keeps the arrays of its last few batches still finds a free one. More are not kept.
_MAX_KEPT = 4


class Arenas:
    """Lends memory of one size. Used by one thread.

    What was lent is free again when the last view of it is gone: an array that the callback kept, or a JAX array that
    uses the memory in place. Until then another arena takes its place.
    """

    def __init__(self, size_bytes: int) -> None:
        self._size_bytes = size_bytes
        self._kept: deque[Arena] = deque(maxlen=_MAX_KEPT)

    def lend(self) -> Arena:
        """Return memory that nobody else sees. Raises MemoryError."""
        for arena in self._kept:
            if arena.is_free:
                return arena
        arena = Arena(self._size_bytes)
        self._kept.append(arena)  # the oldest is dropped, and lives until its last view is gone
        return arena
