"""A client's open streams: lent to one request at a time, closed after a long idle time or when a request times out.

Opening a call costs gRPC several times what a message on an open stream does, so streams are kept for later requests.
There are two kinds. A plain stream serves a thread that waits for the reply. A pooled one tells of its reply, and many
of them share one thread.
"""

from __future__ import annotations

import threading
import time
import weakref
from contextlib import suppress
from functools import partial
from typing import Any

from .. import _process
from .._contract import CONNECTION_AGE_KEY, METHOD, POOLED_KEY, RECONNECT_KEY
from .._transport import choice
from .._transport.interface import Metadata
from .connection import Connection

# A stream that nobody has borrowed for this long is closed.
IDLE_NS = 60 * 1_000_000_000

# With several servers, a stream is replaced at an age between these, so that a server that came up gets its share. A
# stream's limit is the age its channel had when it was opened: the first ones all go to the server that answers first.
MIN_RENEWAL_NS = 1_000_000_000
MAX_RENEWAL_NS = 60 * 1_000_000_000

_NEVER = 2**63 - 1

# How long the interpreter's exit waits for pooled streams to end, in case a callback never returns.
_EXIT_LIMIT_S = 5.0

# What a forked child inherited of its parent's connections. Closing them would write to the parent's sockets.
_inherited: list[Any] = []


class _Link:
    """A channel, and how many streams it carries.

    used_ns: when an answer last came. After a long pause, a new channel is safer than one that the server may be about
        to close.
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
    is_cancelled: the request was cancelled, and the stream with it, even if the answer still came.
    requests: how many were sent on it, including this one.
    """

    stream: Any  # a ClientStream, or a PooledClientStream

    def __init__(self, link: _Link, *, is_pooled: bool) -> None:
        self.link = link
        self.is_pooled = is_pooled
        self.timed_out = False
        self.is_cancelled = False
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
        # Guards what follows. Reentrant: the garbage collector may close the pool at any moment.
        self._lock = threading.RLock()
        self._changed = threading.Condition(self._lock)
        self._link: _Link | None = None
        self._idle: list[Loan] = []  # the most recently used last, and first to be lent
        self._idle_pooled: list[Loan] = []  # the same
        self._pooled: set[Loan] = set()  # open pooled streams until they are over, lent or idle
        self._lent: set[Loan] = set()
        self._closed = False
        self._is_exiting = False
        self._timekeeper: threading.Thread | None = None
        self._timekeeper_wakes_ns = _NEVER

    def forget_parent(self) -> None:
        _inherited.append((self._link, self._idle, self._idle_pooled, self._lent))
        was_closed = self._closed
        self._reset()
        self._closed = was_closed

    def borrow(self, due_ns: int | None, *, fresh: bool = False) -> Loan:
        """Return a stream that was alive a moment ago.

        due_ns: monotonic time at which to cancel the stream unless it has been given back; None for never.
        fresh: open a new one even if one is idle.

        Raises RuntimeError if the client is closed, or if no thread can be started to keep the time limit. Raises
        RequestError if its server may move and none is known.
        """
        self._find_server(due_ns)
        dead: list[Loan] = []
        try:
            with self._lock:
                self._check_open()
                return self._lend(self._idle, due_ns, fresh, dead)
        finally:
            for broken in dead:
                self._drop(broken)

    def borrow_pooled(self, count: int, due_ns: int | None, *, fresh: bool = False) -> list[Loan]:
        """Return pooled streams, as `borrow` does. Never blocks, except to find a server that may move.

        The most recently used are lent, and of these the most recently used come last. If requests are sent in this
        order, the server, which knows who was answered a moment ago, sees those that it expects after the others.
        """
        self._find_server(due_ns)
        dead: list[Loan] = []
        loans: list[Loan] = []
        try:
            with self._lock:
                self._check_open(may_wait=False)
                while len(loans) < count:
                    loans.append(self._lend(self._idle_pooled, due_ns, fresh, dead))
        except BaseException:
            for loan in loans:
                self.discard(loan, server_lost=False)
            raise
        finally:
            for broken in dead:
                self._drop(broken)
        loans.reverse()
        return loans

    def _find_server(self, due_ns: int | None) -> None:
        """May wait, so the lock must be free: `close` and other threads need it."""
        if self._moves and not self._closed:
            self._connection.find_server(due_ns)

    def _lend(self, idle: list[Loan], due_ns: int | None, fresh: bool, dead: list[Loan]) -> Loan:
        if self._moves and self._link is not None and self._link.target != self._connection.target():
            self._retire_link()
        loan = None
        while idle and loan is None and not fresh:
            dead.append(idle.pop())
            if self._is_usable(dead[-1]):
                loan = dead.pop()
            else:
                self._note_end(dead[-1])
        if loan is None and self._link is not None and self._link.used_ns < time.monotonic_ns() - IDLE_NS:
            self._retire_link()
        if loan is None:
            loan = self._open(is_pooled=idle is self._idle_pooled)
        if due_ns is not None and not self._can_keep_time():
            idle.append(loan)
            raise RuntimeError("no thread can be started to keep the request's time limit")
        loan.requests += 1
        self._lent.add(loan)
        self._set_due(loan, _NEVER if due_ns is None else due_ns)
        return loan

    def _is_usable(self, loan: Loan) -> bool:
        if self._balanced and loan.renewal_ns <= time.monotonic_ns():
            return False
        return self._is_welcome(loan) and bool(loan.stream.is_alive())

    def _is_welcome(self, loan: Loan) -> bool:
        """Whether the stream's server is still the one to use."""
        return loan.link.is_current or not self._moves

    def _note_end(self, loan: Loan) -> None:
        """An idle stream has ended, or is too old."""
        if loan.link.is_current and not loan.stream.is_alive() and asks_to_reconnect(loan.stream.trailing_metadata()):
            self._retire_link()

    def _retire_link(self) -> None:
        """Have the next stream open a new channel. The old one closes with its last stream."""
        link, self._link = self._link, None
        if link is not None:
            link.is_current = False
            if link.streams == 0:
                link.channel.close()

    def give_back(self, loan: Loan) -> None:
        """The request has its answer."""
        with self._lock:
            self._lent.discard(loan)
            loan.link.used_ns = time.monotonic_ns()
            keep = not (self._closed or loan.timed_out or loan.is_cancelled) and self._is_welcome(loan)
            if keep:
                (self._idle_pooled if loan.is_pooled else self._idle).append(loan)
                if self._timekeeper is not None or self._can_keep_time():
                    self._set_due(loan, time.monotonic_ns() + IDLE_NS)
        if not keep:
            self._drop(loan)

    def discard(self, loan: Loan, *, server_lost: bool) -> None:
        """The request failed, and its stream with it.

        server_lost: the next stream needs a new connection. On the old channel it could fail merely because an attempt
            to connect failed a while ago.
        """
        with self._lock:
            self._lent.discard(loan)
            if server_lost and loan.link is self._link:
                self._retire_link()
                self._connection.note_lost(loan.link.target)
        self._drop(loan)

    def cancel(self, loan: Loan, number: int) -> None:
        """End a stream if it still has this request, by its number on the stream."""
        with self._lock:
            if loan in self._lent and loan.requests == number:
                loan.is_cancelled = True
                loan.stream.cancel()

    def close(self) -> None:
        """End all streams; requests in flight fail. May be called again."""
        with self._lock:
            self._closed = True
            link, self._link = self._link, None
            if link is not None:
                link.is_current = False
            unused = link is not None and link.streams == 0
            idle, self._idle, self._idle_pooled = [*self._idle, *self._idle_pooled], [], []
            streams = self._lent | self._pooled  # a signal handler may have raised before a pooled one was lent
            self._changed.notify_all()
        for loan in streams:
            loan.stream.cancel()
        for loan in idle:
            self._drop(loan)  # the last stream of a link takes the channel along
        if link is not None and unused:
            link.channel.close()

    def wait_until_over(self, timeout_s: float | None = None) -> None:
        """Wait until no pooled stream is left, so that whoever sent on one has been told. Call `close` first."""
        with self._changed:
            self._changed.wait_for(lambda: not self._pooled, timeout_s)

    def close_at_exit(self) -> None:
        """Close the connection, unless a thread waits for an answer: it may still come.

        Only daemon threads are left now. The next request of one waits for the end of the process, as the thread itself
        would soon do; an error would only be printed over the program's last words. Nobody waits for what is on pooled
        streams.
        """
        self._is_exiting = True
        with self._lock:
            pooled = tuple(self._pooled)
            is_awaited = any(not loan.is_pooled for loan in self._lent)
        if not is_awaited:
            self.close()
        for loan in pooled:
            loan.stream.cancel()
        self.wait_until_over(_EXIT_LIMIT_S)

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

    def _check_open(self, *, may_wait: bool = True) -> None:
        if self._is_exiting and not may_wait:
            raise RuntimeError("the client is closed, as the interpreter exits")
        if self._is_exiting and threading.current_thread() is not threading.main_thread():
            while True:
                self._changed.wait()
        if self._closed:
            raise RuntimeError("the client is closed")

    def _open(self, *, is_pooled: bool) -> Loan:
        if self._link is None:
            _process.prepare_to_use_grpc()
            self._link = _Link(self._connection)
        link = self._link
        loan = Loan(link, is_pooled=is_pooled)
        age_ms = (time.monotonic_ns() - link.since_ns) // 1_000_000
        metadata = (*self._connection.metadata, (CONNECTION_AGE_KEY, str(age_ms)))
        if is_pooled:
            self._open_pooled(loan, (*metadata, (POOLED_KEY, "1")))
        else:
            loan.stream = choice.open_stream(link.channel, METHOD, metadata)
        link.streams += 1
        if self._balanced:
            now_ns = time.monotonic_ns()
            loan.renewal_ns = now_ns + min(max(now_ns - link.since_ns, MIN_RENEWAL_NS), MAX_RENEWAL_NS)
        return loan

    def _open_pooled(self, loan: Loan, metadata: Metadata) -> None:
        try:
            on_over = partial(self._stream_over, loan)
            loan.stream = choice.open_pooled_stream(loan.link.channel, METHOD, metadata, on_over)
        except RuntimeError:
            # No thread could be started. grpcio may think that the channel has one, so it is of no further use.
            self._link, loan.link.is_current = None, False
            raise
        self._pooled.add(loan)

    def _drop(self, loan: Loan) -> None:
        """End a stream that is neither lent nor idle."""
        try:
            loan.stream.close()
        finally:
            if not loan.is_pooled:  # that tells when it is over
                self._stream_over(loan)

    def _stream_over(self, loan: Loan) -> None:
        """A stream is over. The last of a link takes the channel along."""
        with self._lock:
            if loan in self._idle_pooled:
                self._note_end(loan)
            loan.link.streams -= 1
            is_last = loan.link.streams == 0 and not loan.link.is_current
        try:
            if is_last:
                loan.link.channel.close()
        finally:
            if loan.is_pooled:
                with self._lock:
                    if loan in self._idle_pooled:
                        self._idle_pooled.remove(loan)
                    self._pooled.discard(loan)
                    self._changed.notify_all()

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
            with self._lock:
                now_ns = time.monotonic_ns()
                idle_too_long = []
                for idle in (self._idle, self._idle_pooled):
                    idle_too_long += [loan for loan in idle if loan.due_ns <= now_ns]
                    idle[:] = [loan for loan in idle if loan.due_ns > now_ns]
                for loan in self._lent:
                    if loan.due_ns <= now_ns and not loan.timed_out:
                        loan.timed_out = True
                        loan.stream.cancel()
                    if loan.timed_out:
                        loan.due_ns = _NEVER
                due_ns = min((loan.due_ns for loan in (*self._idle, *self._idle_pooled, *self._lent)), default=_NEVER)
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
