"""`max_connection_age_s`: callers connect again and find servers that were added, and no request fails."""

from __future__ import annotations

import contextlib
import os
import queue
import time
from collections.abc import Callable, Iterator
from typing import Any

from grpc_batcher import MukoeBatcher, MukoeBatcherClient, create_batcher
from grpc_batcher._client import stream_pool
from grpc_batcher._contract import METHOD
from grpc_batcher._models import read_answer, write_request
from grpc_batcher._server import life_cycle

import grpc
import pytest
from accounting import Ledger, asking, wait_for_answers
from dnslib import QTYPE, RCODE, RR, A, DNSRecord
from dnslib.server import BaseResolver, DNSLogger, DNSServer
from serving import Held, answer, connect, eventually, in_callback, serving

ROUND_ROBIN = ("grpc.lb_policy_name", "round_robin")


class PassThrough(grpc.ServerInterceptor):  # type: ignore[misc]
    """Has the server use the public transport, as any interceptor that wraps a handler does."""

    def intercept_service(self, continuation: Callable[[Any], Any], details: grpc.HandlerCallDetails) -> Any:
        handler = continuation(details)
        if handler is None or handler.stream_stream is None:
            return handler
        behaviour = handler.stream_stream
        return grpc.stream_stream_rpc_method_handler(lambda messages, context: behaviour(messages, context))


class ClientPassThrough(grpc.StreamStreamClientInterceptor):  # type: ignore[misc]
    def intercept_stream_stream(self, continuation: Any, details: Any, messages: Any) -> Any:
        return continuation(details, messages)


TRANSPORTS = [
    pytest.param((), (), id="direct"),
    pytest.param((PassThrough(),), (), id="public server"),
    pytest.param((), (ClientPassThrough(),), id="public client"),
    pytest.param((PassThrough(),), (ClientPassThrough(),), id="public"),
]


@pytest.mark.parametrize(("server_interceptors", "client_interceptors"), TRANSPORTS)
@pytest.mark.parametrize("options", [(), (ROUND_ROBIN,)], ids=["one server", "balanced"])
@pytest.mark.parametrize("age_s", [0.001, 0.05])
def test_no_request_fails_however_short_connections_live(
    server_interceptors: Any, client_interceptors: Any, options: Any, age_s: float, tmp_path: Any
) -> None:
    ledger = Ledger(tmp_path / "ledger")
    with (
        serving(
            ledger.callback,
            batch_size=8,
            batch_timeout_s=0.001,
            max_connection_age_s=age_s,
            interceptors=server_interceptors,
        ) as batcher,
        connect(batcher, options=options, interceptors=client_interceptors) as first,
        connect(batcher, options=options, interceptors=client_interceptors) as second,
        asking(ledger, "caller", (first, second) * 4),
    ):
        wait_for_answers(ledger, 200)
    account = ledger.account()
    assert account.failed == {}


@pytest.mark.parametrize(("server_interceptors", "client_interceptors"), TRANSPORTS)
@pytest.mark.parametrize("options", [(), (ROUND_ROBIN,)], ids=["one server", "balanced"])
def test_no_request_of_many_in_flight_fails_however_short_connections_live(
    server_interceptors: Any, client_interceptors: Any, options: Any
) -> None:
    with (
        serving(
            batch_size=8, batch_timeout_s=0.001, max_connection_age_s=0.02, interceptors=server_interceptors
        ) as batcher,
        connect(batcher, options=options, interceptors=client_interceptors) as client,
    ):
        names = [b"%d" % number for number in range(8)]
        for _ in range(30):
            assert client.send_many(names) == [answer(name) for name in names]
        assert set(batcher.metrics().requests) == {"OK"}


@pytest.mark.parametrize("interceptors", [(), (PassThrough(),)], ids=["direct", "public"])
def test_a_request_that_outlives_the_age_is_answered_and_the_next_one_connects_again(interceptors: Any) -> None:
    with (
        Held() as held,
        serving(held, max_connection_age_s=0.01, interceptors=interceptors) as batcher,
        connect(batcher) as client,
    ):
        request = in_callback(held, client, b"x")
        (old,) = batcher._life._service._sessions
        link = client._pool._link
        eventually(lambda: old._too_old_ns < time.monotonic_ns())
        held.release(float("inf"))
        assert request.result() == answer(b"x")
        eventually(lambda: old not in batcher._life._service._sessions)
        assert client.send_request(b"y") == answer(b"y")
        assert client._pool._link is not link
        assert batcher.metrics().requests == {"OK": 2}


def test_a_connection_that_nobody_used_for_long_is_not_used_again(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its server may be about to close it, and would fail what is sent at that moment."""
    with serving() as batcher, connect(batcher) as client:
        client.send_request(b"x")
        link = client._pool._link
        monkeypatch.setattr(stream_pool, "IDLE_NS", 0)
        client._pool._drop(client._pool._idle.pop())
        client.send_request(b"x")
        assert client._pool._link is not link


def test_streams_are_kept_without_an_age() -> None:
    with serving() as batcher, connect(batcher) as client:
        client.send_request(b"x")
        (session,) = batcher._life._service._sessions
        for _ in range(10):
            client.send_request(b"x")
        assert batcher._life._service._sessions == {session}


def test_other_peoples_clients_are_not_told_to_reconnect_and_get_grpcs_own_message_later(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(life_cycle, "_OTHERS_GRACE_S", 0.05)
    with (
        serving(max_connection_age_s=0.001) as batcher,
        grpc.insecure_channel(f"127.0.0.1:{batcher.port}") as channel,
    ):
        states: list[grpc.ChannelConnectivity] = []
        messages: queue.SimpleQueue[bytes | None] = queue.SimpleQueue()
        call = channel.stream_stream(METHOD)(iter(messages.get, None))
        for _ in range(3):
            messages.put(write_request({"data": b"x"}))
            assert read_answer(next(call)) == answer(b"x")
        channel.subscribe(states.append)  # only now: a channel that has not connected yet is idle, too
        eventually(lambda: states[-1:] == [grpc.ChannelConnectivity.IDLE])  # gRPC's GOAWAY has arrived
        messages.put(write_request({"data": b"y"}))
        assert read_answer(next(call)) == answer(b"y")
        messages.put(None)
        assert list(call) == []
        assert call.code() is grpc.StatusCode.OK


# ---- a name that grows ----

NAME = "batchers.example."


class _Quiet(DNSLogger):
    def __init__(self) -> None:
        super().__init__(log="-request,-reply,-truncated,-error", logf=lambda _: None)


class NameServer(BaseResolver):
    """A DNS server that knows one name.

    addresses: the name's IPv4 addresses.
    asked: how often somebody asked for them.
    """

    def __init__(self) -> None:
        self.addresses: list[str] = []
        self.asked = 0
        self._server = DNSServer(self, address="127.0.0.1", port=0, logger=_Quiet())
        self.port = self._server.server.server_address[1]

    def resolve(self, request: DNSRecord, handler: Any) -> DNSRecord:
        reply = request.reply()
        if request.q.qname != NAME:
            reply.header.rcode = RCODE.NXDOMAIN
        elif request.q.qtype == QTYPE.A:
            self.asked += 1
            for address in self.addresses:
                reply.add_answer(RR(NAME, QTYPE.A, rdata=A(address), ttl=0))
        return reply

    def __enter__(self) -> NameServer:
        self._server.start_thread()
        return self

    def __exit__(self, *_: object) -> None:
        self._server.stop()
        self._server.server.server_close()


def host_of_this_process(number: int) -> str:
    """Return a loopback address that no other test uses."""
    return f"127.{1 + os.getpid() % 250}.{os.getpid() // 250 % 250}.{100 + number}"


@pytest.fixture
def _streams_that_are_renewed_often(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stream_pool, "MIN_RENEWAL_NS", 1_000_000)
    monkeypatch.setattr(stream_pool, "MAX_RENEWAL_NS", 1_000_000)


@contextlib.contextmanager
def answering_with(step: int, host: str, port: int, age_s: float | None) -> Iterator[MukoeBatcher]:
    """A batcher whose step tells which one it is."""
    with create_batcher(
        "repr",
        1,
        0.0,
        port,
        batch_process_fn=lambda requests: [answer(data, step) for data in requests],
        host=host,
        max_connection_age_s=age_s,
    ) as batcher:
        yield batcher


def client_of(names: NameServer, port: int) -> MukoeBatcherClient:
    options = [ROUND_ROBIN, ("grpc.dns_min_time_between_resolutions_ms", 10)]
    return MukoeBatcherClient(f"dns://127.0.0.1:{names.port}/{NAME}:{port}", options=options)


@pytest.mark.usefixtures("_streams_that_are_renewed_often")
def test_callers_of_a_dns_name_find_a_server_that_was_added_once_their_connection_is_old() -> None:
    first_host, second_host = host_of_this_process(1), host_of_this_process(2)
    with NameServer() as names, answering_with(1, first_host, 0, age_s=0.1) as first:
        names.addresses = [first_host]
        with client_of(names, first.port) as client, answering_with(2, second_host, first.port, age_s=0.1):
            assert client.send_request(b"x") == answer(b"x", 1)
            names.addresses = [first_host, second_host]
            eventually(lambda: client.send_request(b"x")[1] == 2)
            eventually(lambda: client.send_request(b"x")[1] == 1)


@pytest.mark.usefixtures("_streams_that_are_renewed_often")
def test_without_an_age_grpc_never_asks_for_a_names_addresses_again() -> None:
    """The reason why there is an age. If this fails one day, gRPC has learned it, and the pages can say so."""
    first_host, second_host = host_of_this_process(1), host_of_this_process(2)
    with NameServer() as names, answering_with(1, first_host, 0, age_s=None) as first:
        names.addresses = [first_host]
        with client_of(names, first.port) as client, answering_with(2, second_host, first.port, age_s=None):
            client.send_request(b"x")
            asked = names.asked
            names.addresses = [first_host, second_host]
            sessions = set()
            while len(sessions) < 20:  # streams that were renewed since
                assert client.send_request(b"x") == answer(b"x", 1)
                sessions |= first._life._service._sessions
            assert names.asked == asked
