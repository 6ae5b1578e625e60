"""How each kind of server is asked: by this library's client, and in two ways each by grpcio, HTTP and Triton's."""

from __future__ import annotations

import asyncio
import http.client
import queue
import re
import socket
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

from grpc_batcher import AsyncMukoeBatcherClient, MukoeBatcherClient
from grpc_batcher._cli.load import Send

import grpc
from answers import INPUT, KEY, MODEL, TAG_BYTES, answer_to
from array_kinds import EMBEDDING_BYTES, number_of, packed_observation, packed_value
from in_flight import Run, runs_many, runs_tasks

METHOD = "/mukoe_batcher.MukoeService/ProcessRequest"


def numbered(payload_bytes: int, number: int) -> bytes:
    """A payload that ends with its number."""
    return bytes(payload_bytes - TAG_BYTES) + number.to_bytes(TAG_BYTES, "big")


@dataclass
class Connection:
    """A process's way to a server.

    senders: returns one sender per thread, given the number of threads. Called again, it keeps those it made. Without
        threads it opens the streams, which for 256 callers at once takes longer than warming up may.
    expected: returns the right answer to a payload.
    payload: makes one, given its bytes and a number that differs between payloads.
    transport: returns the transport of this library's client, and None for others.
    run: has all callers ask during a window, instead of a thread per sender; None for threads.
    """

    senders: Callable[[int], list[Send]]
    expected: Callable[[bytes], Any]
    close: Callable[[], None]
    transport: Callable[[], str | None] = lambda: None
    run: Run | None = None
    payload: Callable[[int, int], bytes] = numbered


def connect(kind: str, address: str) -> Connection:
    return _KINDS[kind](address)


def _batcher(address: str) -> Connection:
    client = MukoeBatcherClient(address)
    return Connection(
        senders=lambda callers: [client.send_request] * callers,  # which has a stream per thread
        expected=_batcher_answer,
        close=client.close,
        transport=lambda: client.transport,
    )


def _batcher_each(address: str) -> Connection:
    """A client, and so a connection, per thread, as callers in processes of their own would have."""
    clients: list[MukoeBatcherClient] = []

    def open_client() -> Send:
        clients.append(MukoeBatcherClient(address))
        return clients[-1].send_request

    def close() -> None:
        for client in clients:
            client.close()

    return Connection(_kept(open_client), _batcher_answer, close, lambda: MukoeBatcherClient(address).transport)


def _batcher_many(address: str) -> Connection:
    """One thread, which sends the requests of all callers at once."""
    client = MukoeBatcherClient(address)

    def open_streams(callers: int) -> list[Send]:
        client.send_many([bytes(64)] * callers)
        return []

    return Connection(open_streams, _batcher_answer, client.close, lambda: client.transport, runs_many(client))


def _batcher_asyncio(address: str) -> Connection:
    """A task per caller."""
    client = AsyncMukoeBatcherClient(address)

    async def ask_once(callers: int) -> None:
        await asyncio.gather(*(client.send_request(bytes(64)) for _ in range(callers)))

    def open_streams(callers: int) -> list[Send]:
        asyncio.run(ask_once(callers))
        return []

    return Connection(
        open_streams,
        _batcher_answer,
        lambda: asyncio.run(client.close()),
        lambda: client.transport,
        runs_tasks(client),
    )


def _batcher_answer(payload: bytes) -> tuple[dict[str, bytes], int]:
    return {KEY: answer_to(payload)}, 0


def _packed(address: str, *, blind: bool = False) -> Connection:
    """Arrays that are packed before, so that the servers differ in nothing else. `blind` servers see no number."""
    client = MukoeBatcherClient(address)

    def send(payload: bytes) -> tuple[list[str], bool, bytes]:
        answer, _step = client.send_request(payload)
        return sorted(answer), len(answer["embedding"]) > EMBEDDING_BYTES, answer["value"]

    return Connection(
        senders=lambda callers: [send] * callers,
        expected=lambda payload: (
            ["embedding", "policy", "reward", "value"],
            True,
            packed_value(0 if blind else number_of(payload)),
        ),
        close=client.close,
        transport=lambda: client.transport,
        payload=packed_observation,
    )


def _grpcio_streams(address: str) -> Connection:
    """Plain grpcio: a stream per thread, kept for all its requests."""
    channel = grpc.insecure_channel(address)

    def open_stream() -> Send:
        outbox: queue.SimpleQueue[bytes] = queue.SimpleQueue()
        answers = channel.stream_stream(METHOD)(iter(outbox.get, None))

        def send(payload: bytes) -> bytes:
            outbox.put(payload)
            return next(answers)  # type: ignore[no-any-return]

        return send

    return Connection(_kept(open_stream), answer_to, channel.close)


def _grpcio_calls(address: str) -> Connection:
    """Plain grpcio: a new call per request, as the oldest clients make it."""
    channel = grpc.insecure_channel(address)
    method = channel.stream_stream(METHOD)

    def send(payload: bytes) -> bytes:
        (answer,) = method(iter((payload,)))
        return answer  # type: ignore[no-any-return]

    return Connection(lambda callers: [send] * callers, answer_to, channel.close)


def _http(address: str) -> Connection:
    """The standard library's HTTP client: a connection per thread, kept for all its requests."""
    connections = []

    def open_connection() -> Send:
        connection = http.client.HTTPConnection(address)
        connections.append(connection)

        def send(payload: bytes) -> bytes:
            connection.request("POST", "/inference", payload)
            response = connection.getresponse()
            body = response.read()
            if response.status != 200:
                raise RuntimeError(f"HTTP status {response.status}: {body[:200]!r}")
            return body

        return send

    def close() -> None:
        for connection in connections:
            connection.close()

    return Connection(_kept(open_connection), answer_to, close)


def _http_by_hand(address: str) -> Connection:
    """HTTP over a bare socket, so that no client library costs anything. A connection per thread, kept."""
    host, _, port = address.rpartition(":")
    connections = []

    def open_connection() -> Send:
        connection = socket.create_connection((host, int(port)))
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        connections.append(connection)

        def receive() -> bytes:
            if received := connection.recv(65536):
                return received
            raise ConnectionError("the server closed the connection")

        def send(payload: bytes) -> bytes:
            head = f"POST /inference HTTP/1.1\r\nHost: {address}\r\nContent-Length: {len(payload)}\r\n\r\n".encode()
            if connection.sendmsg((head, payload)) < len(head) + len(payload):
                raise ConnectionError("the request was not sent as a whole")
            answer = receive()
            while b"\r\n\r\n" not in answer:
                answer += receive()
            head, _, body = answer.partition(b"\r\n\r\n")
            if not head.startswith(b"HTTP/1.1 200 ") or not (length := _CONTENT_LENGTH.search(head)):
                raise RuntimeError(f"not an answer of known length: {head[:200]!r}")
            while len(body) < int(length[1]):
                body += receive()
            return body

        return send

    def close() -> None:
        for connection in connections:
            connection.close()

    return Connection(_kept(open_connection), answer_to, close)


def _triton(address: str) -> Connection:
    """Triton's client, which the threads share: a call per request."""
    client = _triton_client(address)

    def send(payload: bytes) -> bytes:
        return _output(client.infer(MODEL, _inputs(payload)))

    return Connection(lambda callers: [send] * callers, answer_to, client.close)


def _triton_streams(address: str) -> Connection:
    """Triton's client per thread, because each has one stream, which is kept."""
    clients = []

    def open_stream() -> Send:
        client = _triton_client(address)
        clients.append(client)
        arrived: queue.SimpleQueue[tuple[Any, Exception | None]] = queue.SimpleQueue()
        client.start_stream(lambda result, error: arrived.put((result, error)))

        def send(payload: bytes) -> bytes:
            client.async_stream_infer(MODEL, _inputs(payload))
            result, error = arrived.get()
            if error is not None:
                raise error
            return _output(result)

        return send

    def close() -> None:
        for client in clients:
            client.close()

    return Connection(_kept(open_stream), answer_to, close)


def _triton_client(address: str) -> Any:
    from tritonclient.grpc import InferenceServerClient

    return InferenceServerClient(address)


def _inputs(payload: bytes) -> list[Any]:
    import numpy
    from tritonclient.grpc import InferInput

    tensor = InferInput(INPUT, [1, len(payload)], "UINT8")
    tensor.set_data_from_numpy(numpy.frombuffer(payload, numpy.uint8).reshape(1, -1))
    return [tensor]


def _output(result: Any) -> bytes:
    return result.as_numpy(KEY).tobytes()  # type: ignore[no-any-return]


_CONTENT_LENGTH = re.compile(rb"\r\nContent-Length: *(\d+)", re.IGNORECASE)


def _kept(open_sender: Callable[[], Send]) -> Callable[[int], list[Send]]:
    senders: list[Send] = []

    def give(callers: int) -> list[Send]:
        while len(senders) < callers:
            senders.append(open_sender())
        return senders[:callers]

    return give


_KINDS = {
    "batcher": _batcher,
    "batcher-each": _batcher_each,
    "batcher-many": _batcher_many,
    "batcher-asyncio": _batcher_asyncio,
    "packed": _packed,
    "blind": partial(_packed, blind=True),
    "grpcio-streams": _grpcio_streams,
    "grpcio-calls": _grpcio_calls,
    "http": _http,
    "http-by-hand": _http_by_hand,
    "triton": _triton,
    "triton-streams": _triton_streams,
}
