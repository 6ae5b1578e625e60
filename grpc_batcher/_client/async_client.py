"""The caller's side for asyncio: a request is awaited."""

from __future__ import annotations

import asyncio
import weakref
from collections import deque
from collections.abc import Iterable
from contextlib import suppress
from functools import partial
from types import TracebackType
from typing import Any

import grpc

from .._contract import DEFAULT_MAX_MESSAGE_BYTES
from .client import MukoeBatcherClient, due_ns
from .exchange import Exchange
from .places import Wish


class AsyncMukoeBatcherClient:
    """Sends requests to a batcher from coroutines.

    The arguments are those of `MukoeBatcherClient`. It may be created outside a loop, and used from any loop of asyncio
    or uvloop, or from several at once.

    Raises ValueError or TypeError naming the argument and what is allowed.
    """

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
        self._set_up(
            MukoeBatcherClient(
                server_address,
                max_message_bytes=max_message_bytes,
                credentials=credentials,
                options=options,
                interceptors=interceptors,
                metadata=metadata,
                arrays=arrays,
                max_in_flight=max_in_flight,
            )
        )

    def _set_up(self, client: MukoeBatcherClient) -> None:
        self._client = client
        self._mailboxes: weakref.WeakKeyDictionary[asyncio.AbstractEventLoop, _Mailbox] = weakref.WeakKeyDictionary()

    @property
    def transport(self) -> str:
        """Which transport carries the requests: "direct", or "public" if only grpcio's public API is used.

        Before the first request this is "direct" even if something, such as OpenTelemetry, will wrap the channel.
        """
        return self._client.transport

    async def send_request(
        self,
        data: Any = None,
        action: int | None = None,
        *,
        rows: bool = False,
        timeout_s: float | None = None,
        **arguments: Any,
    ) -> tuple[dict[str, Any], int]:
        """Send one request, wait for its answer and return it, as `MukoeBatcherClient.send_request` does.

        Waits while `max_in_flight` requests are on their way. If the task is cancelled, so is the request: one that
        waits never reaches the callback; one that is in the callback runs on, and its answer is dropped.
        """
        client = self._client
        message = client._encode(data, action, rows, arguments)
        limit_ns = due_ns(timeout_s)
        loop = asyncio.get_running_loop()
        mailbox = self._mailboxes.get(loop)
        if mailbox is None:
            mailbox = self._mailboxes[loop] = _Mailbox()
        exchanges = client._exchanges
        future: asyncio.Future[bytes] = loop.create_future()
        exchange = Exchange(exchanges, limit_ns, partial(mailbox.post, future), message)
        try:
            if not exchanges.places.take_free((exchange,)):
                await self._take_place(exchange, loop, mailbox, timeout_s)
            exchanges.begin((exchange,), limit_ns)
        except BaseException:  # the task is cancelled, there is no place in time, or the client is closed
            exchange.abandon()
            raise
        try:
            reply = await future
        except asyncio.CancelledError:
            exchange.cancel()
            raise
        return client._payloads.decode(reply)

    async def close(self) -> None:
        """Close all streams and the connection; requests in flight fail with CANCELLED. May be called again."""
        self._client._pool.close()
        await asyncio.get_running_loop().run_in_executor(None, self._client._pool.wait_until_over)

    async def __aenter__(self) -> AsyncMukoeBatcherClient:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        await self.close()

    def __reduce__(self) -> tuple[Any, ...]:
        return _unpickle, (self._client,)

    def __repr__(self) -> str:
        return f"Async{self._client!r}"

    async def _take_place(
        self, exchange: Exchange, loop: asyncio.AbstractEventLoop, mailbox: _Mailbox, timeout_s: float | None
    ) -> None:
        """Wait for a place. Raises RequestError after the time limit."""
        exchanges = self._client._exchanges
        given: asyncio.Future[bytes] = loop.create_future()
        wish = Wish(exchange, partial(mailbox.post, given, b"", None))
        try:
            exchanges.places.ask(wish)
            await asyncio.wait((given,), timeout=timeout_s)  # `wait_for` may lose a cancellation before Python 3.12
            was_given = not exchanges.places.withdraw(wish)
        except BaseException:  # such as the task's cancellation
            exchanges.places.withdraw(wish)
            raise
        if not was_given:
            raise exchanges.no_place()


class _Mailbox:
    """Brings outcomes from a client's own thread to a loop. What comes while the loop is busy wakes it once."""

    def __init__(self) -> None:
        self._letters: deque[tuple[asyncio.Future[bytes], bytes | None, Exception | None]] = deque()
        self._is_due = False

    def post(self, future: asyncio.Future[bytes], reply: bytes | None, error: Exception | None) -> None:
        self._letters.append((future, reply, error))
        if not self._is_due:
            self._is_due = True
            with suppress(RuntimeError):  # the loop is closed, and nobody waits any more
                future.get_loop().call_soon_threadsafe(self._open)

    def _open(self) -> None:
        """Runs in the loop."""
        self._is_due = False  # first: what is posted from here on either is seen below, or wakes the loop again
        while self._letters:
            future, reply, error = self._letters.popleft()
            if future.done():  # its task was cancelled
                continue
            if error is not None:
                future.set_exception(error)
            else:
                assert reply is not None
                future.set_result(reply)


def _unpickle(client: MukoeBatcherClient) -> AsyncMukoeBatcherClient:
    unpickled = AsyncMukoeBatcherClient.__new__(AsyncMukoeBatcherClient)
    unpickled._set_up(client)
    return unpickled
