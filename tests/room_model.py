"""A model of the waiting room in plain Python, written from the core's docstrings. The tests compare the core with it.

It supports one thread and a manual clock. It keeps every ticket it ever accepted and computes everything else from
them each time, so that it has no counter, list or ring that could be wrong in the same way as the core's.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from grpc_batcher._core import (
    CLOSED,
    EXPIRED,
    FINISHED,
    LEFT,
    REASONS,
    TAKEN,
    WAITING,
    ManualClock,
    QueueBytesFullError,
    QueueFullError,
    RoomClosedError,
)

SECOND_NS = 1_000_000_000
MAX_CAPACITY = 2**30
MAX_CAPACITY_BYTES = 2**62
MAX_WINDOW_NS = (2**63 - 1) // 4


class Ticket:
    def __init__(self, stream: Stream, request: Any, deadline_ns: int | None, size_bytes: int, rows: int) -> None:
        self.stream = stream
        self.request = request
        self.outcome: Any = None
        self.state = WAITING
        self.deadline_ns = deadline_ns
        self.size_bytes = size_bytes
        self.rows = rows
        self.pushed_ns = 0
        self.taken_ns = 0

    @property
    def owner(self) -> Any:
        return self.stream.owner

    def is_past_deadline(self) -> bool:
        return self.deadline_ns is not None and self.stream.room.clock.now_ns >= self.deadline_ns

    def has_ended(self) -> bool:
        return self.state not in (WAITING, TAKEN)

    def wait(self) -> int:
        """Only for cases in which the core's `wait` returns at once: there is no other thread to end the ticket."""
        if not self.has_ended() and self.is_past_deadline():
            self.state = EXPIRED
        assert self.has_ended(), "the core would block here"
        return self.state


def rows_of(tickets: Sequence[Ticket]) -> int:
    return sum(ticket.rows for ticket in tickets)


class Stream:
    def __init__(self, room: WaitingRoom, owner: Any, pooled: bool) -> None:
        self.room = room
        self.owner = owner
        self.pooled = pooled
        self.was_absent = False  # since its last answer, a batch has waited a whole window for it
        self.is_open = True
        self.answered_ns: int | None = None

    def push(self, request: Any, deadline_ns: int | None = None, size_bytes: int = 0, rows: int = 1) -> Ticket:
        room = self.room
        if size_bytes < 0:
            raise ValueError(f"size_bytes is {size_bytes}; it must be at least 0")
        if not 1 <= rows <= room.batch_size:
            raise ValueError(f"rows is {rows}; it must be from 1 to {room.batch_size}")
        ticket = Ticket(self, request, deadline_ns, size_bytes, rows)
        if room.unfinished_of(self):
            raise RuntimeError("this stream's last request has not ended; a stream has one request at a time")
        if room.closed:
            raise RoomClosedError("the room is closed")
        if not self.is_open:
            ticket.state = LEFT
            return ticket
        if room.waiting_rows + rows > room.capacity:
            if rows > 1:
                raise QueueFullError(
                    f"the queue is full: {room.waiting_rows} rows are waiting, and this request's {rows} "
                    f"would exceed the limit of {room.capacity}"
                )
            counted = "requests" if all(ticket.rows == 1 for ticket in room.queue()) else "rows"
            raise QueueFullError(f"the queue is full: {room.capacity} {counted} are waiting, the most allowed")
        if room.capacity_bytes is not None and room.waiting_bytes + size_bytes > room.capacity_bytes:
            raise QueueBytesFullError(
                f"the queue is full: {room.waiting_bytes} bytes are waiting, and this request's {size_bytes} "
                f"would exceed the limit of {room.capacity_bytes}"
            )
        ticket.pushed_ns = room.clock.now_ns
        room.accepted.append(ticket)
        return ticket

    def close(self) -> None:
        self.is_open = False
        for ticket in self.room.unfinished_of(self):
            ticket.state = LEFT

    def was_answered_recently(self) -> bool:
        if self.answered_ns is None or self.was_absent:
            return False
        return self.room.clock.now_ns - self.answered_ns < SECOND_NS


class WaitingRoom:
    def __init__(
        self,
        batch_size: int,
        window_ns: int,
        capacity: int,
        *,
        capacity_bytes: int | None = None,
        leave_early: bool = True,
        clock: ManualClock,
    ) -> None:
        if batch_size < 1:
            raise ValueError(f"batch_size is {batch_size}; it must be at least 1")
        if not 1 <= capacity <= MAX_CAPACITY:
            raise ValueError(f"capacity is {capacity}; it must be from 1 to {MAX_CAPACITY}")
        if capacity_bytes is not None and not 1 <= capacity_bytes <= MAX_CAPACITY_BYTES:
            raise ValueError(f"capacity_bytes is {capacity_bytes}; it must be None or from 1 to {MAX_CAPACITY_BYTES}")
        if not 0 <= window_ns <= MAX_WINDOW_NS:
            raise ValueError(f"window_ns is {window_ns}; it must be from 0 to {MAX_WINDOW_NS}")
        self.batch_size = batch_size
        self.window_ns = window_ns
        self.capacity = capacity
        self.capacity_bytes = capacity_bytes
        self.leave_early = leave_early
        self.clock = clock
        self.closed = False
        self.nudged = False
        self.streams: list[Stream] = []
        self.accepted: list[Ticket] = []
        self.taken_batches: list[tuple[str, list[Ticket]]] = []

    def open_stream(self, owner: Any = None, *, pooled: bool = False) -> Stream:
        stream = Stream(self, owner, pooled)
        self.streams.append(stream)
        return stream

    def poll_batch(self) -> tuple[str, list[Ticket]] | None:
        if self.reason() is None:
            return None
        # A deadline takes effect when somebody looks: the taker here, a waiter in `wait`.
        batch: list[Ticket] = []
        for ticket in self.queue():
            if rows_of(batch) == self.batch_size:
                break
            if ticket.is_past_deadline():
                ticket.state = EXPIRED
            elif rows_of([*batch, ticket]) > self.batch_size:
                break
            else:
                batch.append(ticket)
        reason = self.reason()
        if reason is None:
            return None
        if reason == "timeout":
            for stream in self.streams:
                if stream.answered_ns is not None and stream.answered_ns <= batch[0].pushed_ns:
                    stream.was_absent |= stream.pooled and not self.unfinished_of(stream)
        for ticket in batch:
            ticket.state = TAKEN
            ticket.taken_ns = self.clock.now_ns
        self.taken_batches.append((reason, batch))
        return reason, list(batch)

    def nudge(self) -> None:
        self.nudged = True

    def take_batch(self) -> tuple[str, list[Ticket]] | None:
        """Only for cases in which the core's `take_batch` returns at once."""
        if (taken := self.poll_batch()) is not None:
            return taken
        if self.closed and not self.queue():
            return None
        assert self.nudged, "the core would block here"
        self.nudged = False
        return "nudge", []

    def is_due(self) -> bool:
        return self.reason() is not None

    def finish(self, tickets: Sequence[Ticket], outcomes: Sequence[Any]) -> None:
        if len(tickets) != len(outcomes):
            raise ValueError(f"{len(outcomes)} outcomes for {len(tickets)} tickets; there must be one for each ticket")
        if any(ticket.stream.room is not self for ticket in tickets):
            raise ValueError("one of the tickets belongs to another room")
        for ticket, outcome in zip(tickets, outcomes, strict=True):
            if ticket.state == TAKEN:
                ticket.state = FINISHED
                ticket.outcome = outcome
                ticket.stream.answered_ns = self.clock.now_ns
                ticket.stream.was_absent = False

    def close(self) -> None:
        self.closed = True

    def abandon(self) -> int:
        self.closed = True
        unfinished = [ticket for ticket in self.accepted if not ticket.has_ended()]
        for ticket in unfinished:
            ticket.state = CLOSED
        for stream in self.streams:
            stream.is_open = False
        return len(unfinished)

    @property
    def waiting(self) -> int:
        return len(self.queue())

    @property
    def waiting_rows(self) -> int:
        return rows_of(self.queue())

    @property
    def waiting_bytes(self) -> int:
        return sum(ticket.size_bytes for ticket in self.queue())

    @property
    def pushed(self) -> int:
        return len(self.accepted)

    @property
    def open_streams(self) -> int:
        return len([stream for stream in self.streams if stream.is_open])

    def batches(self) -> tuple[dict[str, int], int, int]:
        reasons = [reason for reason, _batch in self.taken_batches]
        counts = {reason: reasons.count(reason) for reason in REASONS}
        taken = [ticket for _reason, batch in self.taken_batches for ticket in batch]
        return counts, len(taken), rows_of(taken)

    # ---- computed each time ----

    def queue(self) -> list[Ticket]:
        return [ticket for ticket in self.accepted if ticket.state == WAITING]

    def unfinished_of(self, stream: Stream) -> list[Ticket]:
        return [ticket for ticket in self.accepted if ticket.stream is stream and not ticket.has_ended()]

    def reason(self) -> str | None:
        """Why a batch is due now; None if none is."""
        queue = self.queue()
        if not queue:
            return None
        if rows_of(queue) >= self.batch_size:
            return "full"
        if self.leave_early and self.everyone_is_in(queue):
            return "everyone_in"
        if self.clock.now_ns - queue[0].pushed_ns >= self.window_ns:
            return "timeout"
        return "drain" if self.closed else None

    def everyone_is_in(self, queue: list[Ticket]) -> bool:
        waiting_streams = [ticket.stream for ticket in queue]
        expected_streams = [stream for stream in self.streams if stream.is_open and stream.was_answered_recently()]
        return all(stream.answered_ns is not None for stream in waiting_streams) and all(
            stream in waiting_streams for stream in expected_streams
        )
