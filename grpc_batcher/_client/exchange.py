"""How a client's message gets its reply: on which stream, when it is sent again, and what a failure means.

Both ways of sending use it: `Exchanges.wait` blocks the calling thread, and an `Exchange` tells when it has ended.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import Any

import grpc

from .._contract import TAKEN_IN_KEY
from .._errors import RequestError
from .connection import Connection
from .places import PlacesInFlight
from .stream_pool import Loan, StreamPool, asks_to_reconnect

_logger = logging.getLogger("grpc_batcher")

# How often a request that its server did not take in is resent. Of several servers, more than one may be closing.
_MAX_RESENDS, _MAX_RESENDS_BALANCED = 1, 3

# What is called when a request has ended: with its reply and None, or None and the error.
OnOutcome = Callable[[bytes | None, Exception | None], None]


class _Here(threading.local):
    """What this thread does."""

    is_reporting = False  # it is running a user's callback, and other outcomes wait


_here = _Here()


def is_reporting() -> bool:
    """Whether this is a client's own thread, which must not wait for answers."""
    return _here.is_reporting


class Exchanges:
    """Exchanges messages for replies with the servers of a connection."""

    def __init__(self, connection: Connection, pool: StreamPool, places: PlacesInFlight) -> None:
        self.pool = pool
        self.places = places
        self._is_balanced = connection.is_balanced
        self._has_others = connection.has_others
        self._max_resends = _MAX_RESENDS_BALANCED if self._has_others else _MAX_RESENDS

    def wait(self, message: bytes, due_ns: int | None) -> bytes:
        """Send a message, wait for its reply and return it. Raises RequestError, and RuntimeError as the pool does."""
        resends = 0
        while True:
            loan = self.pool.borrow(due_ns, fresh=resends > 0)
            reply, error = None, None
            try:
                reply = loan.stream.exchange(message)
            except grpc.RpcError as raised:
                error = raised.with_traceback(None)  # or it and this frame would keep each other alive
            except BaseException:  # such as Ctrl-C: the next reply on this stream would answer another request
                self.pool.discard(loan, server_lost=False)
                raise
            reply = self.conclude(loan, reply, error, resends)
            if reply is not None:
                return reply
            resends += 1

    def begin(self, exchanges: Sequence[Exchange], due_ns: int | None) -> None:
        """Send messages that have places, and call `OnOutcome` of each when it has ended.

        That may be before this returns: if no server is known, it is every request's outcome.

        Raises RuntimeError as the pool does; then nothing was sent. After any exception, the caller has to abandon the
        exchanges.
        """
        try:
            loans = self.pool.borrow_pooled(len(exchanges), due_ns)
        except RequestError as error:  # no server is known
            for exchange in exchanges:
                exchange.end(None, RequestError(error.code(), error.details()))
            return
        unstarted = list(zip(exchanges, loans, strict=True))[::-1]
        try:
            while unstarted:
                unstarted[-1][0].start(unstarted[-1][1])
                unstarted.pop()
        except BaseException:  # such as Ctrl-C
            for exchange, loan in unstarted:
                exchange.stop(loan)
            raise

    def no_place(self) -> RequestError:
        """Return the error of a request that was not sent within its time limit."""
        limit = self.places.limit
        details = f"{limit} requests were on their way, the most allowed (max_in_flight), until timeout_s was over"
        return RequestError(grpc.StatusCode.DEADLINE_EXCEEDED, details)

    def conclude(self, loan: Loan, reply: bytes | None, error: Any, resends: int) -> bytes | None:
        """Decide what the end of a request on a stream means, and return or discard the stream.

        Returns the reply, or None if the request is to be sent again. Raises RequestError.
        """
        if reply is not None:
            self.pool.give_back(loan)
            return reply
        if error is None:
            self.pool.discard(loan, server_lost=False)
            raise RequestError(grpc.StatusCode.UNAVAILABLE, "the server ended the stream without an answer")
        code = error.code()
        self.pool.discard(loan, server_lost=self._is_server_lost(loan, error))
        if loan.timed_out:
            raise RequestError(grpc.StatusCode.DEADLINE_EXCEEDED, "no answer within timeout_s")
        if resends < self._max_resends and self._was_not_taken_in(loan, error):
            return None
        if code is grpc.StatusCode.CANCELLED and not self.pool.closed:
            # Not by this end: a server that is shutting down cancels streams it has not accepted.
            code = grpc.StatusCode.UNAVAILABLE
        raise RequestError(code, error.details() or "")

    def _is_server_lost(self, loan: Loan, error: Any) -> bool:
        """Whether the channel is of no further use.

        A channel with several servers goes on with the others, unless it could reach none of them.
        """
        if error.code() is not grpc.StatusCode.UNAVAILABLE:
            return False
        if asks_to_reconnect(error.trailing_metadata()):
            return True
        return not self._is_balanced or (loan.requests == 1 and _taken_in(error) is None)

    def _was_not_taken_in(self, loan: Loan, error: Any) -> bool:
        """Whether the server itself said that this stream's last request, sent as the stream ended, was refused.

        Only then is it safe to resend: a broken connection says nothing about what was done before. A stream's first
        request is not resent to a lone server, which would refuse it again for the same reason.
        """
        if error.code() is not grpc.StatusCode.UNAVAILABLE:
            return False
        if loan.requests < 2 and not self._has_others:
            return False
        return _taken_in(error) == str(loan.requests - 1)


class Exchange:
    """One message on its way, which nobody's thread waits for. It has one of the client's places until it ends.

    message: what is sent; it may be set later, but before it is sent.
    """

    def __init__(self, exchanges: Exchanges, due_ns: int | None, on_outcome: OnOutcome, message: bytes = b"") -> None:
        self.message = message
        self._exchanges = exchanges
        self._due_ns = due_ns
        self._on_outcome = on_outcome
        self._resends = 0
        self._is_cancelled = False
        self._was_started = False
        # The stream and the number of the request on it, until that has ended. Whoever pops them has to deal with it.
        self._on: list[tuple[Loan, int]] = []

    def start(self, loan: Loan) -> None:
        """Send the message on a stream."""
        self._on.append((loan, loan.requests))
        self._was_started = True
        if self._is_cancelled:  # `cancel` may have come too early to see the stream
            self.cancel()
        loan.stream.start(self.message, self._ended)

    def stop(self, loan: Loan) -> None:
        """Discard the stream of a message that was interrupted while it was being sent, or before."""
        if self._was_started:
            try:
                loan, _number = self._on.pop()
            except IndexError:  # it has ended
                return
        self._exchanges.pool.discard(loan, server_lost=False)

    def abandon(self) -> None:
        """End a request that nobody waits for, at whatever point its sender was interrupted, and free its place."""
        self.cancel()
        self._exchanges.places.free(self)

    def cancel(self) -> None:
        """End the request as far as that is possible: its callback may be running. May be called again."""
        self._is_cancelled = True
        for loan, number in tuple(self._on):
            self._exchanges.pool.cancel(loan, number)

    def _ended(self, reply: bytes | None, error: Any) -> None:
        try:
            loan, _number = self._on.pop()
        except IndexError:  # it was stopped
            return
        outcome: Exception | None = None
        try:
            reply = self._exchanges.conclude(loan, reply, error, self._resends)
            if reply is None and not self._is_cancelled:
                self._resends += 1
                (loan,) = self._exchanges.pool.borrow_pooled(1, self._due_ns, fresh=True)
                self.start(loan)
                return
        except RequestError as failed:
            outcome = failed.with_traceback(None)
        except Exception as failed:
            outcome = failed
            if self._exchanges.pool.closed:
                outcome = RequestError(grpc.StatusCode.CANCELLED, "the client was closed")
        if reply is None and outcome is None:
            outcome = RequestError(grpc.StatusCode.CANCELLED, "the request was cancelled")
        self.end(reply, outcome)

    def end(self, reply: bytes | None, outcome: Exception | None) -> None:
        """Free the place, and tell of the outcome."""
        self.message = b""
        # A future has its exchange. Were the exchange to keep the future, only the garbage collector could free both,
        # and the answer with them.
        on_outcome, self._on_outcome = self._on_outcome, _ignore
        self._exchanges.places.free(self)
        was_reporting, _here.is_reporting = _here.is_reporting, True
        try:
            on_outcome(reply, outcome)
        except BaseException:  # a future's callback may raise SystemExit, and a log handler anything
            if threading.current_thread() is threading.main_thread():
                raise  # a signal handler's: callbacks of futures run on the client's own threads
            with suppress(BaseException):
                _logger.exception("a request's outcome could not be delivered")
        finally:
            _here.is_reporting = was_reporting


def _ignore(_reply: bytes | None, _error: Exception | None) -> None:
    """Replaces `on_outcome` once the exchange has ended."""


def _taken_in(error: Any) -> str | None:
    """How many of a stream's requests its server says it took in."""
    return dict(error.trailing_metadata() or ()).get(TAKEN_IN_KEY)
