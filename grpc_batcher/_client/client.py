"""The caller's side: one request in, one answer out."""

from __future__ import annotations

import time
import weakref
from collections.abc import Iterable
from types import TracebackType
from typing import Any

import grpc

from .._contract import (
    DEFAULT_MAX_MESSAGE_BYTES,
    MAX_DURATION_S,
    MAX_MESSAGE_BYTES,
    TAKEN_IN_KEY,
    as_tuple,
    metadata_fault,
)
from .._errors import RequestError
from .array_payloads import ArrayPayloads
from .connection import Connection, Route
from .payloads import BytesPayloads
from .stream_pool import Loan, StreamPool, asks_to_reconnect

# How often a request that its server did not take in is resent. Of several servers, more than one may be closing.
_MAX_RESENDS, _MAX_RESENDS_BALANCED = 1, 3


class MukoeBatcherClient:
    """Sends requests to a batcher, and returns their answers.

    server_address: "host:port", or any target that gRPC resolves, such as "unix:/run/batcher.sock" or
        "ipv4:10.0.0.1:50051,10.0.0.2:50051" (the first that answers; `options` can name a policy that uses them all).
    max_message_bytes: the largest answer to accept.
    credentials: for TLS, for instance from grpc.ssl_channel_credentials; None for plaintext.
    options: further gRPC channel options, which override this library's own. With ("grpc.lb_policy_name",
        "round_robin"), or a service config that says so, new streams go to all servers of the address in turn.
    interceptors: gRPC client interceptors. They put this client on the public transport.
    metadata: pairs to send as each stream opens, for instance a token.
    arrays: whether requests and answers are numpy arrays, for a batcher that declares its arrays. The default is bytes.

    Nothing is sent, and no connection made, before the first request. Any number of threads may share a client; each
    request in flight has its own stream, which is kept for later requests and closed after a minute without one. A
    client can be pickled. After a fork, the child opens its own streams (docs/production.md says what gRPC allows).

    Raises ValueError or TypeError naming the argument and what is allowed; for `arrays` ImportError without numpy.
    """

    _route: Route | None = None  # set before `__init__` by clients whose server may move

    def __init__(
        self,
        server_address: str,
        *,
        max_message_bytes: int = DEFAULT_MAX_MESSAGE_BYTES,
        credentials: grpc.ChannelCredentials | None = None,
        options: Iterable[tuple[str, Any]] = (),
        interceptors: Iterable[grpc.StreamStreamClientInterceptor] = (),
        metadata: Iterable[tuple[str, str | bytes]] = (),
        arrays: bool = False,
    ) -> None:
        options, metadata = as_tuple("options", options), as_tuple("metadata", metadata)
        interceptors = as_tuple("interceptors", interceptors)
        if not isinstance(server_address, str) or not server_address:
            raise ValueError(f"server_address is {server_address!r}; it must be a text such as 'host:50051'")
        if not isinstance(max_message_bytes, int) or not 1 <= max_message_bytes <= MAX_MESSAGE_BYTES:
            raise ValueError(
                f"max_message_bytes is {max_message_bytes!r}; it must be an int from 1 to {MAX_MESSAGE_BYTES}"
            )
        for pair in metadata:
            if len(pair) != 2:
                raise ValueError(f"metadata contains an entry of length {len(pair)}; entries are (key, value) pairs")
            if fault := metadata_fault(*pair):
                raise ValueError(f"metadata contains {fault}")
        if credentials is not None and not isinstance(credentials, grpc.ChannelCredentials):
            raise TypeError(f"credentials is {credentials!r}; it must be a grpc.ChannelCredentials, or None")
        for interceptor in interceptors:
            if not isinstance(interceptor, grpc.StreamStreamClientInterceptor):
                raise TypeError(
                    f"interceptors contains {interceptor!r}, which is not a grpc.StreamStreamClientInterceptor"
                )
        self._connection = Connection(
            server_address, max_message_bytes, credentials, options, interceptors, metadata, self._route
        )
        self._payloads: BytesPayloads | ArrayPayloads = ArrayPayloads() if arrays else BytesPayloads()
        self._pool = StreamPool(self._connection)
        self._max_resends = _MAX_RESENDS_BALANCED if self._connection.has_others else _MAX_RESENDS
        # For clients dropped without `close`. At exit the pool closes itself, in the right order.
        weakref.finalize(self, self._pool.close).atexit = False

    @property
    def transport(self) -> str:
        """Which transport carries the requests: "direct", or "public" if only grpcio's public API is used."""
        return self._pool.transport

    def send_request(
        self,
        data: Any = None,
        action: int | None = None,
        *,
        rows: bool = False,
        timeout_s: float | None = None,
        **arguments: Any,
    ) -> tuple[dict[str, Any], int]:
        """Send one request, wait for its answer and return it.

        data: bytes, a str (sent as UTF-8), or anything with a buffer, such as a numpy array (sent in C order). With
            `arrays`, anything that numpy.asarray takes: one row of the shape that the batcher declares, or several
            rows, along a first axis.
        action: an int32, for "dyna"; None for "repr".
        rows: with `arrays`, whether the first axis is rows even if there is only one. The answer then has that axis, as
            it always does for several rows.
        timeout_s: how long to wait for the answer, in seconds; None waits as long as it takes.
        arguments: for "arrays", the arrays by their names, instead of data and action. Otherwise, what the messages of
            further kinds of model hold.

        Returns the dictionary and the step that the callback gave for this request. Its values are bytes; with
        `arrays`, numpy arrays, which are the caller's to change.

        Raises RequestError (a grpc.RpcError, with `code()` and `details()`) if the request ended without an answer.
        Before anything is sent, raises TypeError or ValueError for arguments that cannot be sent, and RuntimeError on a
        closed client.
        """
        if action is not None:
            arguments = {"action": action, **arguments}
        if data is not None:
            arguments = {"data": data, **arguments}
        if rows:
            arguments["rows"] = True
        message = self._payloads.encode(arguments)
        return self._payloads.decode(self._exchange(message, _due_ns(timeout_s)))

    def close(self) -> None:
        """Close all streams and the connection; requests in flight fail with CANCELLED. May be called again."""
        self._pool.close()

    def __enter__(self) -> MukoeBatcherClient:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def __reduce__(self) -> tuple[Any, ...]:
        connection = self._connection
        if connection.credentials is not None or connection.interceptors:
            raise TypeError(
                "a client with credentials or interceptors cannot be pickled, because gRPC's objects cannot; create it "
                "in the process that uses it"
            )
        options = {
            "max_message_bytes": connection.max_message_bytes,
            "options": connection.options,
            "metadata": connection.metadata,
            "arrays": isinstance(self._payloads, ArrayPayloads),
        }
        return _unpickle, (connection.address, options)

    def __repr__(self) -> str:
        return f"MukoeBatcherClient({self._connection.address!r})"

    def _exchange(self, message: bytes, due_ns: int | None, *, resends: int = 0) -> bytes:
        loan = self._pool.borrow(due_ns, fresh=resends > 0)
        try:
            reply = loan.stream.exchange(message)
        except grpc.RpcError as error:
            code = error.code()
            self._pool.discard(loan, server_lost=self._is_server_lost(loan, error))
            if loan.timed_out:
                raise RequestError(grpc.StatusCode.DEADLINE_EXCEEDED, "no answer within timeout_s") from None
            if resends < self._max_resends and self._was_not_taken_in(loan, error):
                return self._exchange(message, due_ns, resends=resends + 1)
            if code is grpc.StatusCode.CANCELLED and not self._pool.closed:
                # Not by this end: a server that is shutting down cancels streams it has not accepted.
                code = grpc.StatusCode.UNAVAILABLE
            raise RequestError(code, error.details() or "") from None
        except BaseException:  # such as Ctrl-C: the next reply on this stream would answer another request
            self._pool.discard(loan, server_lost=False)
            raise
        if reply is None:
            self._pool.discard(loan, server_lost=False)
            raise RequestError(grpc.StatusCode.UNAVAILABLE, "the server ended the stream without an answer")
        self._pool.give_back(loan)
        return reply

    def _is_server_lost(self, loan: Loan, error: Any) -> bool:
        """Whether the channel is of no further use.

        A channel with several servers goes on with the others, unless it could reach none of them.
        """
        if error.code() is not grpc.StatusCode.UNAVAILABLE:
            return False
        if asks_to_reconnect(error.trailing_metadata()):
            return True
        return not self._connection.is_balanced or (loan.requests == 1 and _taken_in(error) is None)

    def _was_not_taken_in(self, loan: Loan, error: Any) -> bool:
        """Whether the server itself said that this stream's last request, sent as the stream ended, was refused.

        Only then is it safe to resend: a broken connection says nothing about what was done before. A stream's first
        request is not resent to a lone server, which would refuse it again for the same reason.
        """
        if error.code() is not grpc.StatusCode.UNAVAILABLE:
            return False
        if loan.requests < 2 and not self._connection.has_others:
            return False
        return _taken_in(error) == str(loan.requests - 1)


def _due_ns(timeout_s: float | None) -> int | None:
    if timeout_s is None:
        return None
    try:
        if 0 < timeout_s < float("inf"):
            return time.monotonic_ns() + int(min(float(timeout_s), MAX_DURATION_S) * 1e9)
    except TypeError:
        pass
    raise ValueError(f"timeout_s is {timeout_s!r}; it must be a number of seconds above 0, or None")


def _unpickle(address: str, options: dict[str, Any]) -> MukoeBatcherClient:
    return MukoeBatcherClient(address, **options)


def _taken_in(error: Any) -> str | None:
    """How many of a stream's requests its server says it took in."""
    return dict(error.trailing_metadata() or ()).get(TAKEN_IN_KEY)
