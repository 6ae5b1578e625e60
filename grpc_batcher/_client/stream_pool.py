"""A client's open streams: lent to one request at a time, closed after a long idle time or when a request times out.

Opening a call costs gRPC several times what a message on an open stream does, so streams are kept for later requests.
"""

from __future__ import annotations

import threading
import time
import weakref
from contextlib import suppress
from typing import Any

import grpc

from .. import _process
from .._contract import CONNECTION_AGE_KEY, METHOD, RECONNECT_KEY
from .._transport import choice
from .._transport.interface import ClientStream
from .connection import Connection

# A stream that nobody has borrowed for this long is closed.
IDLE_NS = 60 * 1_000_000_000

# With several servers, a stream is replaced at an age between these, so that a server that came up gets its share. A
# stream's limit is the age its channel had when it was opened: the first ones all go to the server that answers first.
MIN_RENEWAL_NS = 1_000_000_000
MAX_RENEWAL_NS = 60 * 1_000_000_000

_NEVER = 2**63 - 1

# What a forked child inherited of its parent's connections. Closing them would write to the parent's sockets.
_inherited: list[Any] = []


class _Link:
    """A channel, and how many streams it carries.

    used_ns: when an answer last came. After a long time, a new channel is a better choice than one whose server may be
        about to close it.
    """

    def __init__(self, connection: Connection) -> None:
        self.target = connection.target()
        self.channel = connection.open_channel(self.target)
        self.since_ns = self.used_ns = time.monotonic_ns()
        self.streams = 0
        self.is_current = True


class Loan:
    """A stream while a request has it.

    timed_out: its time limit passed, and the stream was cancelled for that reason.
    requests: how many were sent on it, including this one.
    """

    def __init__(self, link: _Link, stream: ClientStream) -> None:
        self.link = link
        self.stream = stream
        self.timed_out = False
        self.requests = 0
        self.renewal_ns = _NEVER  # when it is too old for another request
        self.due_ns = _NEVER  # when the request times out; for an idle stream, when to close it


class StreamPool:
    """Lends streams to the server of a connection, which is made as late as possible, and again after it was lost."""

    def __init__(self, connection: Connection) -> None:
        self._connection = connection
        self._balanced = connection.is_balanced
        self._moves = connection.route is not None
        self._reset()
        _process.start_afresh_after_fork(self)
        _open_pools.add(self)

    def _reset(self) -> None:
        self._changed = threading.Condition()  # reentrant: the garbage collector may close the pool at any moment
        self._link: _Link | None = None
        self._idle: list[Loan] = []  # the most recently used last, and first to be lent
        self._lent: set[Loan] = set()
        self._closed = False
        self._is_exiting = False
        self._timekeeper: threading.Thread | None = None
        self._timekeeper_wakes_ns = _NEVER

    def forget_parent(self) -> None:
        _inherited.append((self._link, self._idle, self._lent))
        was_closed = self._closed
        self._reset()
        self._closed = was_closed

    def borrow(self, due_ns: int | None, *, fresh: bool = False) -> Loan:
        """Return a stream that was alive a moment ago.

        due_ns: monotonic time at which to cancel the stream unless it has been given back; None for never.
        fresh: open a new one even if one is idle.

        Raises RuntimeError if the client is closed, or if no thread can be started to keep the time limit.
        """
        dead = []
        try:
            with self._changed:
                self._check_open()
                if self._moves and self._link is not None and self._link.target != self._connection.target():
                    self._leave_link()
                loan = None
                while self._idle and loan is None and not fresh:
                    dead.append(self._idle.pop())
                    if self._is_usable(dead[-1]):
                        loan = dead.pop()
                    else:
                        self._note_end(dead[-1])
                if self._link is not None and self._link.used_ns < time.monotonic_ns() - IDLE_NS:
                    self._leave_link()
                if loan is None:
                    loan = self._open()
                if due_ns is not None and not self._can_keep_time():
                    self._idle.append(loan)
                    raise RuntimeError("no thread can be started to keep the request's time limit")
                loan.requests += 1
                self._lent.add(loan)
                self._set_due(loan, _NEVER if due_ns is None else due_ns)
        finally:
            for broken in dead:
                self._drop(broken)
        return loan

    def _is_usable(self, loan: Loan) -> bool:
        return self._is_welcome(loan) and loan.stream.is_alive() and not (self._balanced and loan.renewal_ns <= time.monotonic_ns())

    def _is_welcome(self, loan: Loan) -> bool:
        """Whether the stream's server is still the one to use."""
        return loan.link.is_current or not self._moves

    def _note_end(self, loan: Loan) -> None:
        """An idle stream has ended, or is too old."""
        if loan.link.is_current and not loan.stream.is_alive() and asks_to_reconnect(loan.stream.trailing_metadata()):
            self._leave_link()

    def _leave_link(self) -> None:
        """Have the next stream open a new channel. The old one closes with its last stream."""
        link, self._link = self._link, None
        if link is not None:
            link.is_current = False
            if link.streams == 0:
                link.channel.close()

    def give_back(self, loan: Loan) -> None:
        """The request has its answer."""
        with self._changed:
            self._lent.discard(loan)
            loan.link.used_ns = time.monotonic_ns()
            keep = not self._closed and not loan.timed_out and self._is_welcome(loan)
            if keep:
                self._idle.append(loan)
                if self._can_keep_time():
                    self._set_due(loan, time.monotonic_ns() + IDLE_NS)
        if not keep:
            self._drop(loan)

    def discard(self, loan: Loan, *, server_lost: bool) -> None:
        """The request failed, and its stream with it.

        server_lost: the next stream needs a new connection. On the old channel it could fail merely because an attempt
            to connect failed a while ago.
        """
        with self._changed:
            self._lent.discard(loan)
            if server_lost and loan.link is self._link:
                self._link = None
                loan.link.is_current = False
                self._connection.note_lost(loan.link.target)
        self._drop(loan)

    def close(self) -> None:
        """End all streams; requests in flight fail. May be called again."""
        with self._changed:
            self._closed = True
            link, self._link = self._link, None
            if link is not None:
                link.is_current = False
            unused = link is not None and link.streams == 0
            idle, self._idle = self._idle, []
            lent = tuple(self._lent)
            self._changed.notify_all()
        for loan in lent:
            loan.stream.cancel()
        for loan in idle:
            self._drop(loan)  # the last stream of a link takes the channel along
        if link is not None and unused:
            link.channel.close()

    def close_at_exit(self) -> None:
        """Close the connection, unless a request is in flight: it may still be answered.

        Only daemon threads are left now. The next request of one waits for the end of the process, as the thread itself
        would soon do; an error would only be printed over the program's last words.
        """
        self._is_exiting = True
        if not self._lent:
            self.close()

    @property
    def transport(self) -> str:
        """The transport of the next stream."""
        link = self._link
        if link is None and self._connection.interceptors:
            return "public"
        return choice.client_transport(None if link is None else link.channel)

    @property
    def closed(self) -> bool:
        """Whether `close` was called."""
        return self._closed

    def _check_open(self) -> None:
        if self._is_exiting and threading.current_thread() is not threading.main_thread():
            while True:
                self._changed.wait()
        if self._closed:
            raise RuntimeError("the client is closed")

    def _open(self) -> Loan:
        if self._link is None:
            _process.prepare_to_use_grpc()
            self._link = _Link(self._connection)
        age_ms = (time.monotonic_ns() - self._link.since_ns) // 1_000_000
        metadata = (*self._connection.metadata, (CONNECTION_AGE_KEY, str(age_ms)))
        stream = choice.open_stream(self._link.channel, METHOD, metadata)
        loan = Loan(self._link, stream)
        self._link.streams += 1
        if self._balanced:
            now_ns = time.monotonic_ns()
            loan.renewal_ns = now_ns + min(max(now_ns - self._link.since_ns, MIN_RENEWAL_NS), MAX_RENEWAL_NS)
        return loan

    def _drop(self, loan: Loan) -> None:
        try:
            loan.stream.close()
        finally:
            with self._changed:
                loan.link.streams -= 1
                is_last = loan.link.streams == 0 and not loan.link.is_current
            if is_last:
                loan.link.channel.close()

    # ---- time limits ----

    def _set_due(self, loan: Loan, due_ns: int) -> None:
        loan.due_ns = due_ns
        if due_ns < self._timekeeper_wakes_ns:
            self._timekeeper_wakes_ns = due_ns
            self._changed.notify_all()

    def _can_keep_time(self) -> bool:
        """Whether the timekeeper runs, or can be started."""
        if self._timekeeper is None:
            timekeeper = threading.Thread(target=self._keep_time, name="grpc_batcher-timekeeper", daemon=True)
            try:
                timekeeper.start()
            except RuntimeError:
                return False
            self._timekeeper = timekeeper
        return True

    def _keep_time(self) -> None:
        """Cancel what is due and sleep until the next is. Ends when nothing is left to wait for."""
        while True:
            with self._changed:
                now_ns = time.monotonic_ns()
                idle_too_long = [loan for loan in self._idle if loan.due_ns <= now_ns]
                self._idle = [loan for loan in self._idle if loan not in idle_too_long]
                for loan in self._lent:
                    if loan.due_ns <= now_ns and not loan.timed_out:
                        loan.timed_out = True
                        loan.stream.cancel()
                    if loan.timed_out:
                        loan.due_ns = _NEVER
                due_ns = min((loan.due_ns for loan in (*self._idle, *self._lent)), default=_NEVER)
                self._timekeeper_wakes_ns = due_ns
                if not idle_too_long:
                    if due_ns == _NEVER or self._closed:
                        self._timekeeper = None
                        return
                    self._changed.wait(min((due_ns - now_ns) / 1e9, threading.TIMEOUT_MAX))
            for loan in idle_too_long:
                self._drop(loan)


def asks_to_reconnect(trailing_metadata: Any) -> bool:
    """Whether a server ended a stream because its connection should not be used for further streams."""
    return any(key == RECONNECT_KEY for key, _value in trailing_metadata or ())


_open_pools: weakref.WeakSet[StreamPool] = weakref.WeakSet()


def _close_all() -> None:
    for pool in _snapshot():
        _process.call_at_exit(pool.close_at_exit)


def _snapshot() -> tuple[StreamPool, ...]:
    while True:
        with suppress(RuntimeError):  # a daemon thread made another client meanwhile
            return tuple(_open_pools)


_process.close_clients_at_exit(_close_all)
