"""The waiting room: requests come in one by one and leave in batches.

Each docstring here is the beginning of the one in `_core.pyx`; WaitingRoom's there is the whole contract.
"""

from collections.abc import Sequence
from typing import Any, Final, final

# Why a batch left, in the order in which they count.
REASONS: Final[tuple[str, str, str, str]]

# The states of a ticket: WAITING, then perhaps TAKEN, and in the end one of the others.
WAITING: Final[int]
TAKEN: Final[int]
FINISHED: Final[int]
LEFT: Final[int]
EXPIRED: Final[int]
CLOSED: Final[int]

class QueueFullError(Exception):
    """The request was refused because the waiting requests would have more than `capacity` rows with it."""

class QueueBytesFullError(QueueFullError):
    """The request was refused because the waiting requests would have more than `capacity_bytes` bytes with it."""

class RoomClosedError(Exception):
    """The request was refused because the room is closed."""

@final
class ManualClock:
    """A clock that stands still until it is set, for testing windows and deadlines."""

    now_ns: int
    def __init__(self, now_ns: int = 0) -> None: ...

@final
class Ticket:
    """One request and what became of it. Created by `Stream.push`."""

    @property
    def request(self) -> Any:
        """The object that was pushed."""
    @property
    def outcome(self) -> Any:
        """The object that was passed to `WaitingRoom.finish`, if the state is FINISHED."""
    @property
    def state(self) -> int:
        """The state now: WAITING, TAKEN, or the final state that `wait` returns."""
    @property
    def owner(self) -> Any:
        """The object that was passed to `open_stream`."""
    @property
    def rows(self) -> int:
        """The `rows` that the request was pushed with."""
    @property
    def pushed_ns(self) -> int:
        """Monotonic time of the push, in nanoseconds."""
    @property
    def taken_ns(self) -> int:
        """Monotonic time at which a batch took the request, in nanoseconds; 0 if none has."""
    def wait(self) -> int:
        """Block, without the GIL, until the request ends, and return its final state.

        FINISHED: `outcome` is set.
        LEFT: the stream was closed.
        EXPIRED: the deadline passed, before or after a batch took the request.
        CLOSED: the room was abandoned.
        """

@final
class Stream:
    """A caller's connection to the room, with one request at a time. Created by `WaitingRoom.open_stream`."""

    def push(self, request: object, deadline_ns: int | None = None, size_bytes: int = 0, rows: int = 1) -> Ticket:
        """Put a request into the queue and return its Ticket. Never blocks.

        deadline_ns: monotonic time from which the answer is useless; None for no deadline.
        size_bytes: what the request counts towards `capacity_bytes` while it waits; at least 0.
        rows: what the request counts towards `batch_size`, and towards `capacity` while it waits; from 1 to
            `batch_size`.
        """
    def close(self) -> None:
        """Close the stream. If it has a request that has not ended, that ends as LEFT. May be called again."""

@final
class WaitingRoom:
    """A bounded first-in, first-out queue whose requests leave in batches.

    batch_size: most rows per batch, at least 1. A request has one row unless it is pushed with more.
    window_ns: nanoseconds that the oldest request may wait for others while the taker is free; 0 for none.
    capacity: most rows that may wait, from 1 to 2**30.
    capacity_bytes: most bytes that waiting requests may have in total, by the `size_bytes` they were pushed with; at
        least 1, or None for no limit.
    leave_early: whether a batch leaves as soon as everyone is in (see below).
    clock: a ManualClock, for tests; None for the system's monotonic clock.
    """

    def __init__(
        self,
        batch_size: int,
        window_ns: int,
        capacity: int,
        *,
        capacity_bytes: int | None = None,
        leave_early: bool = True,
        clock: ManualClock | None = None,
    ) -> None: ...
    @property
    def batch_size(self) -> int:
        """Most rows per batch."""
    @property
    def window_ns(self) -> int:
        """How long the oldest request may wait for others, in nanoseconds."""
    @property
    def capacity(self) -> int:
        """Most rows that may wait."""
    @property
    def capacity_bytes(self) -> int | None:
        """Most bytes that may wait; None for no limit."""
    @property
    def leave_early(self) -> bool:
        """Whether a batch leaves as soon as everyone is in."""
    @property
    def closed(self) -> bool:
        """Whether `close` or `abandon` was called."""
    @property
    def waiting(self) -> int:
        """Requests that are waiting now."""
    @property
    def waiting_rows(self) -> int:
        """The `rows` of the requests that are waiting now, added up."""
    @property
    def waiting_bytes(self) -> int:
        """The `size_bytes` of the requests that are waiting now, added up."""
    @property
    def pushed(self) -> int:
        """Requests accepted so far, and so positions of the ring that were filled."""
    @property
    def popped(self) -> int:
        """Positions of the ring before the oldest waiting request; equal to `pushed` if nothing is waiting."""
    @property
    def takers(self) -> int:
        """Threads that are asleep in `take_batch`."""
    @property
    def open_streams(self) -> int:
        """Streams that are open now."""
    def open_stream(self, owner: object = None, *, pooled: bool = False) -> Stream:
        """Return a new Stream, which the room keeps alive until it is closed.

        owner: any object; it is the `owner` of the stream's tickets.
        pooled: whether its caller has several such streams and uses any of them, so that an idle one says little about
            what the caller will do.
        """
    def poll_batch(self) -> tuple[str, list[Ticket]] | None:
        """Take a batch if one is due, without blocking.

        Returns (reason, tickets), with the oldest ticket first, or None if no batch is due.
        """
    def is_due(self) -> bool:
        """Return whether a batch is due, without taking it.

        Requests past their deadline still count here, so `poll_batch` may return None even though this was true.
        """
    def take_batch(self) -> tuple[str, list[Ticket]] | None:
        """Block, without the GIL, until a batch is due, and take it.

        Returns (reason, tickets), with the oldest ticket first, or None once the room is closed and nothing is waiting.
        After a `nudge`, returns ("nudge", []) rather than wait.
        """
    def nudge(self) -> None:
        """Have `take_batch` return even if no batch is due: now if a thread is in it, otherwise the next time."""
    def finish(self, tickets: Sequence[Ticket], outcomes: Sequence[object]) -> None:
        """Give each taken ticket its outcome (any object), all at the same moment, and wake the threads that wait.

        Tickets that have not been taken, or have already ended, are skipped.
        """
    def close(self) -> None:
        """Refuse further requests. Those waiting are due at once. May be called again."""
    def abandon(self) -> int:
        """Close the room and every stream. Requests that have not ended become CLOSED. May be called again.

        Returns the number of those requests.
        """
    def batches(self) -> tuple[dict[str, int], int, int]:
        """Return (batches taken so far by reason, requests in them, rows in them), all as of the same moment."""
