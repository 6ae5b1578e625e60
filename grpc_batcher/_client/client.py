"""The caller's side: blocking requests, futures, and many requests at once."""

from __future__ import annotations

import time
import weakref
from collections.abc import Iterable, Mapping
from functools import partial
from types import TracebackType
from typing import Any, Literal, overload

import grpc

from .._contract import (
    DEFAULT_MAX_MESSAGE_BYTES,
    MAX_DURATION_S,
    MAX_MESSAGE_BYTES,
    as_tuple,
    metadata_fault,
)
from .._errors import RequestError
from .array_payloads import ArrayPayloads
from .connection import Connection, Route
from .exchange import Exchange, Exchanges, is_reporting
from .in_flight import RequestFuture, send_all
from .payloads import BytesPayloads
from .places import PlacesInFlight
from .stream_pool import StreamPool


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
    max_in_flight: how many requests of `submit` and `send_many` may be on their way at once, at least 1.

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
        max_in_flight: int = 256,
    ) -> None:
        options, metadata = as_tuple("options", options), as_tuple("metadata", metadata)
        interceptors = as_tuple("interceptors", interceptors)
        if not isinstance(server_address, str) or not server_address:
            raise ValueError(f"server_address is {server_address!r}; it must be a text such as 'host:50051'")
        if not isinstance(max_message_bytes, int) or not 1 <= max_message_bytes <= MAX_MESSAGE_BYTES:
            raise ValueError(
                f"max_message_bytes is {max_message_bytes!r}; it must be an int from 1 to {MAX_MESSAGE_BYTES}"
            )
        if not isinstance(max_in_flight, int) or max_in_flight < 1:
            raise ValueError(f"max_in_flight is {max_in_flight!r}; it must be an int from 1")
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
        self._exchanges = Exchanges(self._connection, self._pool, PlacesInFlight(max_in_flight))
        # For clients dropped without `close`. At exit the pool closes itself, in the right order.
        weakref.finalize(self, self._pool.close).atexit = False

    @property
    def transport(self) -> str:
        """Which transport carries the requests: "direct", or "public" if only grpcio's public API is used.

        Before the first request this is "direct" even if something, such as OpenTelemetry, will wrap the channel.
        """
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
        message = self._encode(data, action, rows, arguments)
        return self._payloads.decode(self._exchanges.wait(message, due_ns(timeout_s)))

    def submit(
        self,
        data: Any = None,
        action: int | None = None,
        *,
        rows: bool = False,
        timeout_s: float | None = None,
        **arguments: Any,
    ) -> RequestFuture:
        """Send one request and return a concurrent.futures.Future of what `send_request` would return or raise.

        The arguments are those of `send_request`. Blocks while `max_in_flight` requests are on their way, for
        `timeout_s` at most, which counts from here.

        `cancel()` works until the answer is there: a request that waits never reaches the callback; one that is in the
        callback runs on, and its answer is dropped. Callbacks of the future run on the client's own thread, which
        receives all its answers, so they should be quick. They may submit, which does not block there: past
        `max_in_flight` it sends all the same.

        Raises TypeError or ValueError for arguments that cannot be sent, and RuntimeError on a closed client.
        """
        message = self._encode(data, action, rows, arguments)
        limit_ns = due_ns(timeout_s)
        exchanges = self._exchanges
        future = RequestFuture()
        # It keeps the client alive until the answer is there.
        exchange = Exchange(exchanges, limit_ns, partial(self._resolve, future), message)
        future.exchange = exchange
        try:
            if is_reporting():
                exchanges.places.take_regardless(exchange)
            elif not exchanges.places.take(exchange, limit_ns):
                exchange.end(None, exchanges.no_place())
                return future
            exchanges.begin((exchange,), limit_ns)
        except BaseException:  # such as Ctrl-C, or the client is closed
            exchange.abandon()
            raise
        return future

    @overload
    def send_many(
        self, requests: Iterable[Any], *, timeout_s: float | None = None, return_exceptions: Literal[False] = False
    ) -> list[tuple[dict[str, Any], int]]: ...
    @overload
    def send_many(
        self, requests: Iterable[Any], *, timeout_s: float | None = None, return_exceptions: bool
    ) -> list[tuple[dict[str, Any], int] | Exception]: ...
    def send_many(
        self, requests: Iterable[Any], *, timeout_s: float | None = None, return_exceptions: bool = False
    ) -> list[Any]:
        """Send requests at once, wait for all their answers and return them in the same order.

        requests: each is `data`, a tuple `(data, action)`, or a mapping of the arguments of `send_request` by name
            (without `timeout_s`). At most `max_in_flight` are on their way at once.
        timeout_s: how long to wait for all of them, in seconds; None waits as long as it takes.
        return_exceptions: whether an error stands in its request's place. Otherwise the first, in the order of the
            requests, is raised after all have ended.

        Raises the errors of `send_request`, and RuntimeError in a callback of a future, where it would wait for itself.
        """
        if is_reporting():
            raise RuntimeError("send_many would wait for itself in a future's callback; use submit there")
        messages = [partial(self._encode_one, request) for request in requests]
        ends = send_all(self._exchanges, messages, due_ns(timeout_s))
        answers = [end if isinstance(end, Exception) else self._decode(end) for end in ends]
        if not return_exceptions:
            for answer in answers:
                if isinstance(answer, Exception):
                    raise answer
        return answers

    def close(self) -> None:
        """Close all streams and the connection; requests in flight fail with CANCELLED. May be called again.

        When it returns, every future of this client is done, unless it is called in a future's callback.
        """
        self._pool.close()
        if not is_reporting():
            self._pool.wait_until_over()

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
            "max_in_flight": self._exchanges.places.limit,
        }
        return _unpickle, (connection.address, options)

    def __repr__(self) -> str:
        return f"MukoeBatcherClient({self._connection.address!r})"

    def _encode(self, data: Any, action: int | None, rows: bool, arguments: dict[str, Any]) -> bytes:
        if action is not None:
            arguments = {"action": action, **arguments}
        if data is not None:
            arguments = {"data": data, **arguments}
        if rows:
            arguments["rows"] = True
        return self._payloads.encode(arguments)

    def _encode_one(self, request: Any) -> bytes:
        """Return the message of one request of `send_many`."""
        if isinstance(request, Mapping):
            named = dict(request)
            return self._encode(named.pop("data", None), named.pop("action", None), named.pop("rows", False), named)
        if isinstance(request, tuple):
            if len(request) != 2:
                raise TypeError(f"a request is a tuple of length {len(request)}; it must be (data, action)")
            return self._encode(*request, False, {})
        return self._encode(request, None, False, {})

    def _decode(self, reply: bytes) -> tuple[dict[str, Any], int] | RequestError:
        try:
            return self._payloads.decode(reply)
        except RequestError as error:
            return error.with_traceback(None)

    def _resolve(self, future: RequestFuture, reply: bytes | None, error: Exception | None) -> None:
        future.finish(self._decode(reply) if reply is not None else error)


def due_ns(timeout_s: float | None) -> int | None:
    """Return the monotonic time at which a time limit that begins now is over. Raises ValueError for what is none."""
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
