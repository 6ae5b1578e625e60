"""Peers that send garbage, announce what they never send, or read nothing: they get a clear end, and harm nobody."""

from __future__ import annotations

import random
import socket
import ssl
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any, NamedTuple

from grpc_batcher import Array, MukoeBatcher, MukoeBatcherClient
from grpc_batcher._arrays import ArrayError, Field, RequestReader
from grpc_batcher._models import MODELS
from grpc_batcher._proto.mukoe_batcher_pb2 import Arrays, KeyValue, MukoeRequest

import grpc
import msgpack
import numpy as np
import pytest
from google.protobuf.message import DecodeError
from http2 import HandmadeCaller, message_head
from serving import (
    METHOD,
    Held,
    address_of,
    answer,
    connect,
    error_of,
    eventually,
    in_callback,
    resident_bytes,
    serving,
    waiting,
)

REQUEST = MODELS["repr"].write_request({"data": b"hi"})

GRPC_VERSION = tuple(int(part) for part in grpc.__version__.split(".")[:2])

# The numbers of gRPC's statuses.
OK, CANCELLED, RESOURCE_EXHAUSTED = "0", "1", "8"


@contextmanager
def unharmed_neighbours(**options: int) -> Iterator[MukoeBatcher]:
    """A batcher with a request in the callback and one that waits. In the end both, and a new caller, are answered."""
    with Held() as held, serving(held, **options) as batcher, connect(batcher) as client:
        neighbours = [in_callback(held, client, b"in the callback"), waiting(batcher, client.send_request, b"waits")]
        yield batcher
        eventually(lambda: batcher.metrics().open_streams == len(neighbours))
        held.release(float("inf"))
        assert [each.result() for each in neighbours] == [answer(b"in the callback"), answer(b"waits")]
        with connect(batcher) as another:
            assert another.send_request(b"after") == answer(b"after")
        assert [data for batch in held.batches for data in batch] == [b"in the callback", b"waits", b"after"]


# ---- messages ----


@pytest.mark.parametrize("announced_bytes", [2**31 - 1, 2**31, 2**32 - 1])
def test_a_message_that_announces_gigabytes_takes_no_memory(announced_bytes: int) -> None:
    """Newer gRPC refuses it at once, older gRPC only when all of it has arrived."""
    before = resident_bytes()
    with unharmed_neighbours() as batcher, HandmadeCaller(batcher.port) as caller:
        stream = caller.open_stream()
        caller.send(stream, message_head(announced_bytes) + bytes(1000))
        if GRPC_VERSION >= (1, 85):
            number, text = caller.status(stream)
            assert number == RESOURCE_EXHAUSTED
            assert str(announced_bytes) in text
        else:
            eventually(lambda: batcher.metrics().open_streams == 3)
        assert resident_bytes() - before < 100_000_000


@pytest.mark.parametrize(
    "sent",
    [
        pytest.param(message_head(len(REQUEST), compressed=255) + REQUEST, id="an unknown compression flag"),
        pytest.param(message_head(len(REQUEST)) + REQUEST[:-1], id="shorter than announced"),
        pytest.param(message_head(len(REQUEST))[:3], id="cut off in its length"),
    ],
)
def test_a_message_that_is_cut_off_or_not_grpc_ends_its_stream_without_an_answer(sent: bytes) -> None:
    with unharmed_neighbours() as batcher, HandmadeCaller(batcher.port) as caller:
        stream = caller.open_stream()
        caller.send(stream, sent, end=True)
        caller.status(stream)
        assert caller.received_bytes[stream] == 0


def test_a_message_that_arrives_byte_by_byte_is_answered() -> None:
    with serving() as batcher, HandmadeCaller(batcher.port) as caller:
        stream = caller.open_stream()
        for byte in message_head(len(REQUEST)) + REQUEST:
            caller.send(stream, bytes((byte,)))
        caller.wait_for_bytes(stream, 5)
        caller.send(stream, b"", end=True)
        assert caller.status(stream)[0] == OK


class Requests(NamedTuple):
    """What a server takes."""

    server: dict[str, Any]  # options of one that answers a request with what it holds
    good: dict[str, Any]  # a request
    random_message: Callable[[random.Random], bytes]
    is_in: Callable[[MukoeRequest], bool]  # whether a message holds one


OF_BYTES = Requests(
    {"batch_process_fn": lambda requests: [({"data": data}, 0) for data in requests]},
    {"data": b"good"},
    lambda dice: MODELS["repr"].write_request({"data": dice.randbytes(dice.randrange(100))}),
    lambda message: message.WhichOneof("request_type") == "representations",
)

DECLARED = {"image": Array((10, 10), "uint8"), "state": Array((2,), "float32")}
READER = RequestReader(
    MukoeRequest.ARRAYS_FIELD_NUMBER,
    [Field(name, array.shape, array.dtype.name, array.dtype.itemsize) for name, array in DECLARED.items()],
    max_rows=8,
)


def random_arrays(dice: random.Random) -> bytes:
    rows = dice.randrange(1, 4)
    values = {
        name: msgpack.packb(((rows, *array.shape), array.dtype.name, dice.randbytes(rows * array.row_bytes)))
        for name, array in DECLARED.items()
    }
    pairs = [KeyValue(key=name, values=packed) for name, packed in values.items()]
    return MukoeRequest(arrays=Arrays(arrays=pairs), keep_rows_axis=dice.random() < 0.5).SerializeToString()


def holds_declared_arrays(message: MukoeRequest) -> bool:
    try:
        READER.of_payloads(((pair.key, pair.values) for pair in message.arrays.arrays), 0, message.keep_rows_axis)
    except ArrayError:
        return False
    return True


OF_ARRAYS = Requests(
    {"batch_process_fn": dict, "model": "arrays", "arrays": DECLARED},
    {name: np.ones(array.shape, array.dtype) for name, array in DECLARED.items()},
    random_arrays,
    holds_declared_arrays,
)


def corrupted(message: bytes, dice: random.Random) -> bytes:
    """Return random bytes, or a message that lost, gained or changed some."""
    if dice.random() < 0.3:
        return dice.randbytes(dice.randrange(200))
    changed = bytearray(message)
    for _ in range(dice.randrange(1, 4)):
        place = dice.randrange(len(changed) + 1)
        changed[place : place + dice.randrange(3)] = dice.randbytes(dice.randrange(3))
    return bytes(changed)


@pytest.mark.timeout(180)
@pytest.mark.parametrize("requests", [OF_BYTES, OF_ARRAYS], ids=["bytes", "arrays"])
def test_of_1000_corrupted_messages_exactly_those_that_are_requests_are_answered(requests: Requests) -> None:
    dice, answered = random.Random(4), 0
    with (
        serving(**requests.server) as batcher,
        grpc.insecure_channel(address_of(batcher)) as channel,
        connect(batcher, arrays=requests is OF_ARRAYS) as client,
    ):
        for number in range(1000):
            message = corrupted(requests.random_message(dice), dice)
            try:
                is_request = requests.is_in(MukoeRequest.FromString(message))
            except (DecodeError, UnicodeDecodeError, SystemError):  # the latter two from protobuf 3.20
                is_request = False
            call = channel.stream_stream(METHOD)(iter((message,)))
            with suppress(grpc.RpcError):
                list(call)
            assert (call.code() is grpc.StatusCode.OK) is is_request, message.hex()
            assert is_request or call.code() is grpc.StatusCode.INVALID_ARGUMENT, message.hex()
            answered += is_request
            if number % 100 == 0:
                np.testing.assert_equal(client.send_request(**requests.good), (requests.good, 0))
    assert 20 < answered < 980


# ---- peers that do not speak gRPC ----


def http_1(connection: socket.socket) -> None:
    connection.sendall(b"GET / HTTP/1.1\r\nHost: localhost\r\n\r\n")


def tls(connection: socket.socket) -> None:
    context = ssl.create_default_context()
    context.check_hostname = False
    context.verify_mode = ssl.CERT_NONE
    with pytest.raises((ssl.SSLError, OSError)), context.wrap_socket(connection, do_handshake_on_connect=False) as ends:
        ends.do_handshake()


def random_bytes(connection: socket.socket) -> None:
    connection.sendall(random.Random(5).randbytes(10_000))


def frames_of_garbage(connection: socket.socket) -> None:
    connection.sendall(b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + random.Random(6).randbytes(10_000))


@pytest.mark.parametrize("speak", [http_1, tls, random_bytes, frames_of_garbage])
def test_a_peer_that_speaks_something_else_is_dropped(speak: Callable[[socket.socket], None]) -> None:
    with unharmed_neighbours() as batcher, socket.create_connection(("127.0.0.1", batcher.port)) as connection:
        with suppress(ConnectionError):
            speak(connection)
        with suppress(OSError):  # reset, or closed already by TLS
            while connection.recv(65536):
                pass


def test_300_silent_connections_keep_nobody_out() -> None:
    with unharmed_neighbours() as batcher:
        silent = [socket.create_connection(("127.0.0.1", batcher.port)) for _ in range(300)]
        with HandmadeCaller(batcher.port) as caller:
            stream = caller.open_stream()
            caller.send(stream, b"", end=True)
            assert caller.status(stream)[0] == OK
        for connection in silent:
            connection.close()


# ---- streams that are opened and left, answers that are never read ----


def test_3000_streams_opened_at_once_disappear_with_their_caller() -> None:
    streams, neighbours = 3000, 2
    before = resident_bytes()
    with unharmed_neighbours() as batcher, HandmadeCaller(batcher.port) as caller:
        opened = caller.open_streams(streams)
        eventually(lambda: batcher.metrics().open_streams == streams + neighbours)
        caller.send(opened[-1], b"", end=True)
        assert caller.status(opened[-1])[0] == OK
        assert resident_bytes() - before < 500_000_000


def test_streams_beyond_max_streams_are_refused_however_many_are_opened() -> None:
    streams, limit, neighbours = 2000, 500, 2
    with unharmed_neighbours(max_streams=limit) as batcher, HandmadeCaller(batcher.port) as caller:
        caller.open_streams(streams)
        ends = caller.wait_for_statuses(streams - (limit - neighbours))
        # gRPC itself rejects streams that arrive faster than it can hand them over.
        assert RESOURCE_EXHAUSTED in {number for number, _ in ends} <= {RESOURCE_EXHAUSTED, CANCELLED}
        assert batcher.metrics().open_streams == limit


def test_a_caller_that_never_reads_costs_one_answer_per_stream_and_delays_nobody() -> None:
    """Each stream sends many requests. The server holds the answer to the first, and reads no further."""
    answer_bytes, streams, requests_on_each = 4_000_000, 8, 10
    before = resident_bytes()

    def long_answers(requests: list[bytes]) -> list[tuple[dict[str, bytes], int]]:
        return [({"result": bytes(answer_bytes) if data == b"hi" else data}, 0) for data in requests]

    with serving(long_answers) as batcher, connect(batcher) as client:
        with HandmadeCaller(batcher.port) as caller:
            for stream in caller.open_streams(streams):
                caller.send(stream, (message_head(len(REQUEST)) + REQUEST) * requests_on_each)
            eventually(lambda: batcher.metrics().requests.get("OK") == streams)
            for number in range(100):
                assert client.send_request(b"%d" % number) == answer(b"%d" % number)
            assert batcher.metrics().requests["OK"] == streams + 100
            assert resident_bytes() - before < answer_bytes * streams * 4
        eventually(lambda: batcher.metrics().open_streams == 1)
        assert client.send_request(b"after") == answer(b"after")


def test_a_caller_that_never_reads_does_not_delay_a_shutdown() -> None:
    def long_answers(requests: list[bytes]) -> list[tuple[dict[str, bytes], int]]:
        return [({"result": bytes(4_000_000)}, 0) for _ in requests]

    with serving(long_answers) as batcher, HandmadeCaller(batcher.port) as caller:
        caller.send(caller.open_stream(), message_head(len(REQUEST)) + REQUEST)
        eventually(lambda: batcher.metrics().requests.get("OK") == 1)
        batcher.shutdown(grace_s=0.1)
        assert not batcher.is_server_ready()


# ---- servers that speak something else ----


@contextmanager
def strange_server(serve: Callable[[socket.socket], None]) -> Iterator[str]:
    """Accept connections, and do something with each. Yields the address."""
    with socket.create_server(("127.0.0.1", 0)) as listener:

        def accept() -> None:
            with suppress(OSError):
                while True:
                    connection, _ = listener.accept()
                    with connection, suppress(OSError):
                        serve(connection)

        accepting = threading.Thread(target=accept, daemon=True)
        accepting.start()
        yield f"127.0.0.1:{listener.getsockname()[1]}"
        listener.shutdown(socket.SHUT_RDWR)
        accepting.join()


def hang_up(connection: socket.socket) -> None:
    pass


def answer_in_http_1(connection: socket.socket) -> None:
    connection.recv(65536)
    connection.sendall(b"HTTP/1.1 400 Bad Request\r\nContent-Length: 0\r\n\r\n")


def answer_in_garbage(connection: socket.socket) -> None:
    connection.recv(65536)
    connection.sendall(random.Random(7).randbytes(1000))


@pytest.mark.parametrize("serve", [hang_up, answer_in_http_1, answer_in_garbage])
def test_a_server_that_speaks_something_else_is_unavailable(serve: Callable[[socket.socket], None]) -> None:
    with strange_server(serve) as address, MukoeBatcherClient(address) as client:
        for _ in range(3):
            assert error_of(client.send_request, b"x").code() is grpc.StatusCode.UNAVAILABLE


def test_a_time_limit_holds_if_the_server_accepts_connections_and_says_nothing() -> None:
    over = threading.Event()
    with strange_server(lambda _: over.wait()) as address, MukoeBatcherClient(address) as client:
        error = error_of(client.send_request, b"x", timeout_s=0.1)
        assert error.code() is grpc.StatusCode.DEADLINE_EXCEEDED
        over.set()
