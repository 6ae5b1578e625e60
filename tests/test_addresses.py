"""Where a batcher listens and a client connects: unix sockets, several servers, and unavailable addresses."""

from __future__ import annotations

import contextlib
import errno
import os
import pickle
import socket
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from grpc_batcher import BindError, MukoeBatcher, MukoeBatcherClient, create_batcher
from grpc_batcher._client import stream_pool
from grpc_batcher._server.session import Session

import grpc
import pytest
from serving import (
    address_of,
    answer,
    echo,
    error_of,
    eventually,
    in_background,
    old_style_request,
    serving,
    start_program,
)

UNAVAILABLE = grpc.StatusCode.UNAVAILABLE

REPR_HI = bytes.fromhex("0a040a026869")  # the message of a "repr" request for b"hi"


# ---- unix sockets ----


@pytest.mark.parametrize("form", ["unix:{}", "unix://{}"])
def test_a_batcher_serves_on_a_unix_socket_and_removes_it_afterwards(form: str, tmp_path: Path) -> None:
    path = tmp_path / "batcher.sock"
    address = form.format(path)
    with serving(host=address, port=50051) as batcher, MukoeBatcherClient(address) as client:
        assert client.send_request(b"x") == answer(b"x")
        assert (batcher.address, batcher.port) == (address, 50051)
        assert path.is_socket()
    assert not path.exists()


def test_a_batcher_serves_on_an_abstract_unix_socket() -> None:
    address = f"unix-abstract:grpc_batcher-{os.getpid()}"
    with serving(host=address), MukoeBatcherClient(address) as client:
        assert client.send_request(b"x") == answer(b"x")
        with pytest.raises(BindError, match=f"cannot listen on {address}: another server is") as caught:
            create_batcher("repr", 1, 0.0, batch_process_fn=echo, host=address).start()
        assert caught.value.errno == errno.EADDRINUSE
        assert client.send_request(b"y") == answer(b"y")


@pytest.mark.parametrize("form", ["unix:{}", "unix://{}"])
def test_two_batchers_never_share_a_unix_socket(form: str, tmp_path: Path) -> None:
    address = form.format(tmp_path / "batcher.sock")
    with serving(host=address):
        with pytest.raises(BindError, match=f"cannot listen on {address}: another server is") as caught:
            create_batcher("repr", 1, 0.0, batch_process_fn=echo, host=address).start()
        assert caught.value.errno == errno.EADDRINUSE
        with MukoeBatcherClient(address) as client:
            assert client.send_request(b"x") == answer(b"x")


def test_a_unix_socket_that_a_killed_process_left_behind_is_replaced(tmp_path: Path) -> None:
    path = tmp_path / "batcher.sock"
    with socket.socket(socket.AF_UNIX) as left_behind:
        left_behind.bind(str(path))
    assert path.is_socket()
    with serving(host=f"unix:{path}"), MukoeBatcherClient(f"unix:{path}") as client:
        assert client.send_request(b"x") == answer(b"x")


# ---- addresses that are not available ----


@pytest.mark.parametrize(
    ("host", "why", "number"),
    [
        pytest.param("no-such-host.invalid", r":0: .*\w+", None, id="a name that does not resolve"),
        pytest.param("not an address", r":0: .*\w+", None, id="not an address"),
        pytest.param(
            "192.0.2.1", ":0: Cannot assign requested address", errno.EADDRNOTAVAIL, id="an address of another machine"
        ),
        pytest.param(
            "unix:/no/such/folder/batcher.sock",
            ": the folder /no/such/folder does not exist",
            errno.ENOENT,
            id="a unix socket in a missing folder",
        ),
        pytest.param("unix:/tmp/" + "x" * 200, "", None, id="a unix socket with a long name"),
        pytest.param(f"unix:{Path(__file__)}", "", None, id="a unix socket where a file is"),
    ],
)
def test_an_unavailable_address_is_a_bind_error_and_leaves_nothing_behind(
    host: str, why: str, number: int | None
) -> None:
    batcher = create_batcher("repr", 1, 0.0, 0, batch_process_fn=len, host=host)
    threads = threading.active_count()
    with pytest.raises(BindError, match=f"cannot listen on {host}{why}") as caught:
        batcher.start()
    assert caught.value.errno == number
    assert not batcher.is_server_ready()
    assert threading.active_count() == threads
    batcher.shutdown()


def test_a_port_in_use_is_a_bind_error_that_says_so() -> None:
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]
        with pytest.raises(BindError, match=f"^cannot listen on 127.0.0.1:{port}: Address already in use$") as caught:
            create_batcher("repr", 1, 0.0, port, batch_process_fn=len, host="127.0.0.1").start()
        assert caught.value.errno == errno.EADDRINUSE


@pytest.mark.parametrize("number", [errno.EADDRINUSE, None])
def test_a_bind_error_can_be_pickled(number: int | None) -> None:
    copy = pickle.loads(pickle.dumps(BindError("cannot listen on 127.0.0.1:50051", number)))
    assert type(copy) is BindError
    assert (str(copy), copy.errno) == ("cannot listen on 127.0.0.1:50051", number)


@pytest.mark.parametrize("address", ["no-such-host.invalid:50051", "unix:/no/such/folder/batcher.sock", "127.0.0.1:1"])
def test_a_client_gets_unavailable_where_no_server_listens(address: str) -> None:
    with MukoeBatcherClient(address) as client:
        assert error_of(client.send_request, b"x").code() is UNAVAILABLE


# ---- several servers ----

ROUND_ROBIN = (("grpc.lb_policy_name", "round_robin"),)
SERVICE_CONFIG = (("grpc.service_config", '{"loadBalancingConfig": [{"round_robin": {}}]}'),)


def target(ports: list[int]) -> str:
    return "ipv4:" + ",".join(f"127.0.0.1:{port}" for port in ports)


def answering_with(step: int) -> Callable[[list[bytes]], list[tuple[dict[str, bytes], int]]]:
    """Return a callback whose step tells which server it is."""
    return lambda requests: [answer(data, step) for data in requests]


@contextlib.contextmanager
def three_servers() -> Iterator[list[MukoeBatcher]]:
    """Three batchers, which answer with the steps 0, 1 and 2."""
    with contextlib.ExitStack() as stack:
        yield [stack.enter_context(serving(answering_with(step))) for step in range(3)]


def client_of(batchers: list[MukoeBatcher], options: tuple[tuple[str, str], ...] = ROUND_ROBIN) -> MukoeBatcherClient:
    return MukoeBatcherClient(target([batcher.port for batcher in batchers]), options=options)


def sessions_of(*batchers: MukoeBatcher) -> set[Session]:
    """Return the sessions that are open now: a renewed stream has another."""
    return {session for batcher in batchers for session in batcher._life._service._sessions}


@contextlib.contextmanager
def callers(client: MukoeBatcherClient, count: int) -> Iterator[Callable[[], list[Any]]]:
    """Start threads. Yields a function that has each send a request, and returns the steps or errors they got."""
    begin, results = threading.Barrier(count + 1), [None] * count

    def call(number: int) -> None:
        with contextlib.suppress(threading.BrokenBarrierError):
            while True:
                begin.wait()
                try:
                    results[number] = client.send_request(b"x")[1]
                except grpc.RpcError as error:
                    results[number] = error
                begin.wait()

    def send() -> list[Any]:
        begin.wait()
        begin.wait()
        return list(results)

    threads = [in_background(call, number) for number in range(count)]
    try:
        yield send
    finally:
        begin.abort()
        for thread in threads:
            thread.result()


def renew_streams(client: MukoeBatcherClient) -> None:
    """Make the next requests open new streams, as they would after some time."""
    for loan in client._pool._idle:
        loan.renewal_ns = 0


def spread(client: MukoeBatcherClient, send: Callable[[], list[Any]]) -> list[int]:
    """Renew the streams until each server has some; return the last steps."""
    while set(steps := send()) != {0, 1, 2}:
        assert set(steps) < {0, 1, 2}
        renew_streams(client)
    return steps


@pytest.fixture
def _long_lived_streams(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stream_pool, "MIN_RENEWAL_NS", 10**15)
    monkeypatch.setattr(stream_pool, "MAX_RENEWAL_NS", 10**15)


@pytest.mark.parametrize("options", [ROUND_ROBIN, SERVICE_CONFIG])
def test_streams_spread_over_all_servers_even_if_some_connect_late(
    options: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(stream_pool, "MIN_RENEWAL_NS", 1_000_000)
    with three_servers() as batchers, client_of(batchers, options) as client, callers(client, 6) as send:
        eventually(lambda: set(send()) == {0, 1, 2})


def test_without_a_policy_all_streams_go_to_one_server() -> None:
    with three_servers() as batchers, client_of(batchers, ()) as client, callers(client, 6) as send:
        assert len({step for _ in range(10) for step in send()}) == 1


def test_a_stream_to_a_lone_server_is_not_renewed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stream_pool, "MIN_RENEWAL_NS", 0)
    monkeypatch.setattr(stream_pool, "MAX_RENEWAL_NS", 0)
    with serving() as batcher, MukoeBatcherClient(f"127.0.0.1:{batcher.port}") as client:
        client.send_request(b"x")
        sessions = sessions_of(batcher)
        for _ in range(10):
            client.send_request(b"x")
            assert sessions_of(batcher) == sessions


def test_a_server_that_comes_back_gets_its_share_again(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stream_pool, "MIN_RENEWAL_NS", 1_000_000)
    monkeypatch.setattr(stream_pool, "MAX_RENEWAL_NS", 1_000_000)
    with three_servers() as batchers, client_of(batchers) as client, callers(client, 6) as send:
        eventually(lambda: set(send()) == {0, 1, 2})
        batchers[0].shutdown()
        eventually(lambda: set(send()) == {1, 2})
        with serving(answering_with(0), port=batchers[0].port):
            eventually(lambda: set(send()) == {0, 1, 2})


def test_a_client_that_reached_none_of_its_servers_is_answered_once_one_is_back() -> None:
    with three_servers() as batchers, client_of(batchers) as client:
        client.send_request(b"x")
        for batcher in batchers:
            batcher.shutdown()
        for _ in range(5):
            assert error_of(client.send_request, b"x").code() is UNAVAILABLE
        with serving(answering_with(7), port=batchers[0].port):
            assert client.send_request(b"x")[1] == 7


SERVER_PROGRAM = """
    import sys

    from grpc_batcher import create_batcher

    with create_batcher("repr", 8, 0, port=0, batch_process_fn=lambda batch: [({}, 2)] * len(batch)) as batcher:
        print(batcher.port, flush=True)
        sys.stdin.readline()
"""


@pytest.mark.usefixtures("_long_lived_streams")
@pytest.mark.parametrize("end", ["killed", "shut down"])
def test_a_server_that_ends_costs_each_of_its_own_streams_at_most_one_error(end: str, tmp_path: Path) -> None:
    with (
        serving(answering_with(0)) as first,
        serving(answering_with(1)) as second,
        start_program(tmp_path, SERVER_PROGRAM) as program,
        MukoeBatcherClient(target([first.port, second.port, int(program.read_line())]), options=ROUND_ROBIN) as client,
        callers(client, 9) as send,
    ):
        steps = spread(client, send)
        sessions = sessions_of(first, second)
        if end == "killed":
            program.kill()
        else:
            program.type_line("end")
        program.wait()
        results = [result for _ in range(20) for result in send()]
        errors = [result for result in results if isinstance(result, grpc.RpcError)]
        assert {error.code() for error in errors} <= {UNAVAILABLE}
        assert len(errors) <= steps.count(2)
        assert set(results) - set(errors) == {0, 1}
        assert sessions <= sessions_of(first, second)


@pytest.mark.usefixtures("_long_lived_streams")
def test_while_two_servers_drain_the_third_answers() -> None:
    gate = threading.Event()
    gate.set()
    held_batches: list[int] = []

    def answering_through_the_gate(step: int) -> Callable[[list[bytes]], Any]:
        def answer_once_it_is_open(requests: list[bytes]) -> Any:
            if not gate.is_set():
                held_batches.append(step)
            gate.wait()
            return answering_with(step)(requests)

        return answer_once_it_is_open

    with (
        serving(answering_through_the_gate(0)) as first,
        serving(answering_through_the_gate(1)) as second,
        serving(answering_with(2)) as third,
        client_of([first, second, third]) as client,
        callers(client, 9) as send,
    ):
        spread(client, send)
        gate.clear()
        requests = [in_background(old_style_request, address_of(batcher), REPR_HI) for batcher in (first, second)]
        eventually(lambda: sorted(held_batches) == [0, 1])
        shutdowns = [in_background(batcher.shutdown, grace_s=60) for batcher in (first, second)]
        eventually(lambda: not first.is_server_ready() and not second.is_server_ready())
        for _ in range(30):
            assert client.send_request(b"x")[1] == 2
            renew_streams(client)
        gate.set()
        for request in requests:
            assert len(request.result().messages) == 1
        for shutdown in shutdowns:
            shutdown.result()


def test_a_host_name_with_one_address_taken_is_a_bind_error() -> None:
    """gRPC would listen on the other one, and callers would reach one server or the other."""
    if len({found[4][0] for found in socket.getaddrinfo("localhost", 0, type=socket.SOCK_STREAM)}) < 2:
        pytest.skip("localhost has one address here")
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        batcher = create_batcher("repr", 1, 0, port, batch_process_fn=echo, host="localhost")
        with pytest.raises(BindError, match=f"localhost:{port}: Address already in use") as caught:
            batcher.start()
        assert caught.value.errno == errno.EADDRINUSE
