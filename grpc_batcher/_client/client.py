"""The caller's side: one request in, one answer out."""

from __future__ import annotations

import logging
import time
import weakref
from collections.abc import Sequence
from functools import partial
from types import TracebackType
from typing import Any

import grpc
from google.protobuf.message import DecodeError

from .._transport import choice as _gears
from .._errors import RequestError
from .._contract import fault_of
from .._models import read_answer, write_request
from .._client.stream_pool import Loan, StreamPool
from .._server.session import METHOD, TAKEN_IN_KEY

_logger = logging.getLogger("grpc_batcher")

# The longest pause between two attempts to connect. gRPC's default is two minutes.
_MAX_RECONNECT_BACKOFF_MS = 1000

# gRPC's keepalive (its doc/keepalive.md): a server whose host is gone without a word is noticed after this interval and
# timeout, also while nothing is sent; if there is something to send, after the timeout alone. Servers that do not say
# otherwise, such as those of the C++ wheel, drop a caller that pings more often than every five minutes.
_KEEPALIVE_INTERVAL_MS = 310_000
_KEEPALIVE_TIMEOUT_MS = 20_000

# With these the channel itself may choose between several servers.
_BALANCING_OPTIONS = ("grpc.lb_policy_name", "grpc.service_config")

# How often a request that its server did not take in is sent again. Of several servers more than one may be closing.
_MOST_RESENDS, _MOST_RESENDS_BALANCED = 1, 3

# A longer time limit is as good as this one: thirty years.
_LONGEST_TIMEOUT_S = 1e9


class MukoeBatcherClient:
    """Sends requests to a batcher, and returns their answers.

    server_address: "host:port", or any target that gRPC resolves, such as "unix:/run/batcher.sock" or
        "ipv4:10.0.0.1:50051,10.0.0.2:50051" (the first that answers; for all of them see `options`).
    max_message_bytes: the largest answer to accept.
    credentials: such as grpc.ssl_channel_credentials gives, for TLS; None for plaintext.
    options: further channel options of gRPC's, which override this library's own. With ("grpc.lb_policy_name",
        "round_robin"), or a service config that says so, new streams go to all the servers of the address in turn.
    interceptors: gRPC's client interceptors. They put this client in the public gear.
    metadata: pairs to send as each stream opens, for instance a token.

    Nothing is sent, and no connection made, before the first request. Any number of threads may use one client; each
    request in flight has a stream of its own, kept for later requests and closed after a minute without one. A client
    can be pickled. After a fork the child's client opens streams of its own (see the README for what gRPC asks for).
    """

    def __init__(
        self,
        server_address: str,
        *,
        max_message_bytes: int = 64 * 1024 * 1024,
        credentials: grpc.ChannelCredentials | None = None,
        options: Sequence[tuple[str, Any]] = (),
        interceptors: Sequence[grpc.StreamStreamClientInterceptor] = (),
        metadata: Sequence[tuple[str, str | bytes]] = (),
    ) -> None:
        if not isinstance(server_address, str) or not server_address:
            raise ValueError(f"server_address is {server_address!r}; it must be a text such as 'host:50051'")
        if not isinstance(max_message_bytes, int) or not 1 <= max_message_bytes < 2**31:
            raise ValueError(f"max_message_bytes is {max_message_bytes!r}; it must be an int from 1 to {2**31 - 1}")
        for pair in metadata:
            if len(pair) != 2:
                raise ValueError(f"metadata has something of {len(pair)} parts; it must be pairs of a key and a value")
            if fault := fault_of(*pair):
                raise ValueError(f"metadata has {fault}")
        if credentials is not None and not isinstance(credentials, grpc.ChannelCredentials):
            raise TypeError(f"credentials is {credentials!r}; it must be a grpc.ChannelCredentials, or None")
        for interceptor in interceptors:
            if not isinstance(interceptor, grpc.StreamStreamClientInterceptor):
                raise TypeError(f"interceptors has {interceptor!r}, which is no grpc.StreamStreamClientInterceptor")
        self._address = server_address
        self._max_message_bytes = max_message_bytes
        self._credentials = credentials
        self._options = tuple(options)
        self._interceptors = tuple(interceptors)
        self._metadata = tuple(metadata)
        connect = partial(_connect, server_address, max_message_bytes, credentials, self._options, self._interceptors)
        self._balanced = any(option[0] in _BALANCING_OPTIONS for option in self._options)
        self._pool = StreamPool(
            connect, METHOD, self._metadata, balanced=self._balanced, intercepted=bool(self._interceptors)
        )
        self._most_resends = _MOST_RESENDS_BALANCED if self._balanced else _MOST_RESENDS
        # For clients that are dropped without `close`. A process that exits needs no such farewell.
        weakref.finalize(self, self._pool.close).atexit = False

    @property
    def gear(self) -> str:
        """Which way the bytes take: "direct", or "public" through grpcio's public API alone."""
        return _gear(self._interceptors)

    def send_request(
        self, data: Any, action: int | None = None, *, timeout_s: float | None = None, **arguments: Any
    ) -> tuple[dict[str, bytes], int]:
        """Send one request, wait for its answer and return it.

        data: bytes, a str (sent as UTF-8), or anything with a buffer, such as a numpy array (sent in C order).
        action: an int32, for "dyna"; None for "repr".
        timeout_s: how long to wait for the answer, in seconds; None for as long as it takes.
        arguments: for further kinds of model, what their message holds.

        Returns the dictionary and the step that the callback gave for this request.

        Raises RequestError (a grpc.RpcError, with `code()` and `details()`) if the request ended without an answer,
        and before anything is sent TypeError or ValueError for arguments that can not be sent, and RuntimeError on a
        closed client.
        """
        arguments["data"] = data.encode() if isinstance(data, str) else data
        if action is not None:
            arguments["action"] = action
        message = write_request(arguments)
        reply = self._exchange(message, _due_ns(timeout_s))
        try:
            return read_answer(reply)
        except DecodeError as error:
            raise RequestError(
                grpc.StatusCode.INTERNAL, f"the server's reply of {len(reply)} bytes is no MukoeResponse: {error}"
            ) from None

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
        if self._credentials is not None or self._interceptors:
            raise TypeError(
                "a client with credentials or interceptors can not be pickled, as gRPC's objects can not; create it in "
                "the process that uses it"
            )
        plain = {
            "max_message_bytes": self._max_message_bytes,
            "options": self._options,
            "metadata": self._metadata,
        }
        return _unpickle, (self._address, plain)

    def __repr__(self) -> str:
        return f"MukoeBatcherClient({self._address!r})"

    def _exchange(self, message: bytes, due_ns: int | None, *, resends: int = 0) -> bytes:
        loan = self._pool.borrow(due_ns, fresh=resends > 0)
        try:
            reply = loan.stream.exchange(message)
        except grpc.RpcError as error:
            code = error.code()
            self._pool.discard(loan, server_lost=self._is_server_lost(loan, error))
            if loan.timed_out:
                raise RequestError(grpc.StatusCode.DEADLINE_EXCEEDED, "no answer within timeout_s") from None
            if resends < self._most_resends and self._was_not_taken_in(loan, error):
                return self._exchange(message, due_ns, resends=resends + 1)
            if code is grpc.StatusCode.CANCELLED and not self._pool.closed:
                # Not by this end: a server that shuts down drops so the streams that it has not looked at yet.
                code = grpc.StatusCode.UNAVAILABLE
            raise RequestError(code, error.details() or "") from None
        except BaseException:  # such as Ctrl-C: what comes on this stream now would be another request's answer
            self._pool.discard(loan, server_lost=False)
            raise
        if reply is None:
            self._pool.discard(loan, server_lost=False)
            raise RequestError(grpc.StatusCode.UNAVAILABLE, "the server ended the stream without an answer")
        self._pool.give_back(loan)
        return reply

    def _is_server_lost(self, loan: Loan, error: Any) -> bool:
        """Whether the channel is of no more use.

        One that has several servers goes on with the others, unless it could reach none of them.
        """
        if error.code() is not grpc.StatusCode.UNAVAILABLE:
            return False
        return not self._balanced or (loan.requests == 1 and _taken_in(error) is None)

    def _was_not_taken_in(self, loan: Loan, error: Any) -> bool:
        """Whether the server itself said that this stream's last request, sent as the stream ended, never came in.

        Only then can it be sent again without a doubt: a connection that broke says nothing about what was done before.
        A stream's first request is not sent again to a lone server: what refused it would refuse it once more.
        """
        if error.code() is not grpc.StatusCode.UNAVAILABLE or (loan.requests < 2 and not self._balanced):
            return False
        return _taken_in(error) == str(loan.requests - 1)


def _gear(interceptors: Sequence[grpc.StreamStreamClientInterceptor]) -> str:
    """Only the public API runs a client's interceptors."""
    return "public" if interceptors else _gears.client_gear()


def _connect(
    address: str,
    max_message_bytes: int,
    credentials: grpc.ChannelCredentials | None,
    options: Sequence[tuple[str, Any]],
    interceptors: Sequence[grpc.StreamStreamClientInterceptor],
) -> grpc.Channel:
    _logger.debug("connecting to %s with the %s gear", address, _gear(interceptors))
    all_options = (
        *options,  # first: gRPC takes the first of two
        ("grpc.max_receive_message_length", max_message_bytes),
        ("grpc.max_send_message_length", -1),  # the server says what it takes
        ("grpc.max_reconnect_backoff_ms", _MAX_RECONNECT_BACKOFF_MS),
        ("grpc.keepalive_time_ms", _KEEPALIVE_INTERVAL_MS),
        ("grpc.keepalive_timeout_ms", _KEEPALIVE_TIMEOUT_MS),
        ("grpc.http2.max_pings_without_data", 0),
        # Or a new channel would inherit the pause after another's failure to connect.
        ("grpc.use_local_subchannel_pool", 1),
        # gRPC sends a stream that a server never looked at again by itself. On a stream of the direct gear that answers
        # while it does so, grpcio 1.85 then gives no message and no status, and the caller would wait for ever.
        ("grpc.enable_retries", 0),
    )
    if credentials is None:
        channel = grpc.insecure_channel(address, all_options)
    else:
        channel = grpc.secure_channel(address, credentials, all_options)
    return grpc.intercept_channel(channel, *interceptors) if interceptors else channel


def _due_ns(timeout_s: float | None) -> int | None:
    if timeout_s is None:
        return None
    try:
        if 0 < timeout_s < float("inf"):
            return time.monotonic_ns() + int(min(float(timeout_s), _LONGEST_TIMEOUT_S) * 1e9)
    except TypeError:
        pass
    raise ValueError(f"timeout_s is {timeout_s!r}; it must be a number of seconds above 0, or None")


def _unpickle(address: str, options: dict[str, Any]) -> MukoeBatcherClient:
    return MukoeBatcherClient(address, **options)


def _taken_in(error: Any) -> str | None:
    """How many of a stream's requests its server says it took in."""
    return dict(error.trailing_metadata() or ()).get(TAKEN_IN_KEY)
