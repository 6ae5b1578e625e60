"""Hosts that vanish silently. Each is a network namespace, and vanishes when its end of a cable is taken down.

gRPC's keepalive notices it. Its times are shortened here so that the trials take seconds; docs/reliability.md has the
real ones.
"""

from __future__ import annotations

import ctypes
import os
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from grpc_batcher._server import life_cycle

import grpc
import pytest
from serving import (
    Held,
    Program,
    address_of,
    answer,
    connect,
    echo,
    error_of,
    eventually,
    run_program,
    serving,
    start_program,
)

# Each program first moves to its host.
_ON_HOST = """
    import ctypes
    import os
    import sys

    if ctypes.CDLL(None).setns(os.open(f"/run/netns/{sys.argv[1]}", os.O_RDONLY), 0) != 0:
        sys.exit("cannot enter the namespace")
"""

# Prints its port; then, for each line it reads, the open streams, the waiting requests, and the counts of ended ones.
SERVER_PROGRAM = (
    _ON_HOST
    + """
    import threading

    from grpc_batcher import create_batcher
    from grpc_batcher._server import life_cycle

    life_cycle._KEEPALIVE_INTERVAL_MS = life_cycle._KEEPALIVE_TIMEOUT_MS = int(sys.argv[2])
    life_cycle._MIN_CALLERS_INTERVAL_MS = 50
    released = threading.Event()

    def answer(requests):
        if b"slow" in requests:
            released.wait()
        return [({"result": data}, 0) for data in requests]

    with create_batcher("repr", 8, 0.0, 0, batch_process_fn=answer) as batcher:
        print(batcher.port, flush=True)
        for line in sys.stdin:
            if line == "release\\n":
                released.set()
            metrics = batcher.metrics()
            print(metrics.open_streams, metrics.waiting, dict(metrics.requests), flush=True)
        released.set()
"""
)

# Sends each line it reads, and prints the answer or the status.
CALLER_PROGRAM = (
    _ON_HOST
    + """
    from grpc_batcher import MukoeBatcherClient, RequestError

    time_ms, timeout_ms = map(int, sys.argv[3:])
    options = (("grpc.keepalive_time_ms", time_ms), ("grpc.keepalive_timeout_ms", timeout_ms))
    with MukoeBatcherClient(sys.argv[2], options=options) as client:
        for line in sys.stdin:
            try:
                print(client.send_request(line.strip()), flush=True)
            except RequestError as error:
                print(error.code().name, flush=True)
"""
)

# Keepalive's interval and timeout in these trials, which a busy machine must not exceed by itself; and an interval
# longer than any trial.
SHORT_MS, LONG_MS = "4000", "3600000"


def ip(*arguments: str) -> None:
    subprocess.run(("ip", *arguments), check=True, capture_output=True)


class Hosts:
    """A server's host, and the hosts of two callers, each with its own cable to the server."""

    def __init__(self) -> None:
        self.server, self.first, self.second = (f"batcher-{os.getpid()}-{number}" for number in range(3))
        self.made: list[str] = []

    def make(self) -> None:
        for host in (self.server, self.first, self.second):
            ip("netns", "add", host)
            self.made.append(host)
        for number, host in enumerate((self.first, self.second)):
            self._link(f"cable{number}", self.server, f"10.213.{number}.1/24", host, f"10.213.{number}.2/24")

    @staticmethod
    def _link(name: str, server: str, server_address: str, caller: str, caller_address: str) -> None:
        ip("link", "add", name, "netns", server, "type", "veth", "peer", "name", name, "netns", caller)
        for host, address in ((server, server_address), (caller, caller_address)):
            ip("-n", host, "address", "add", address, "dev", name)
            ip("-n", host, "link", "set", name, "up")

    def address_for_first(self, port: str) -> str:
        return f"10.213.0.1:{port}"

    def address_for_second(self, port: str) -> str:
        return f"10.213.1.1:{port}"

    def set_first_cable(self, host: str, state: str) -> None:
        """Take one end of the first caller's cable "down" or "up". The other host does not notice."""
        ip("-n", host, "link", "set", "cable0", state)

    def remove(self) -> None:
        for host in self.made:
            ip("netns", "delete", host)


@pytest.fixture
def hosts() -> Iterator[Hosts]:
    if shutil.which("ip") is None:
        pytest.skip("there is no `ip` (iproute2) here, which creates the hosts")
    hosts = Hosts()
    try:
        hosts.make()
    except subprocess.CalledProcessError as error:
        hosts.remove()
        pytest.skip(f"this user may not create network namespaces: {error.stderr.decode().strip()}")
    yield hosts
    hosts.remove()


def start(folder: Path, name: str, program: str, *arguments: str) -> Program:
    (folder / name).mkdir()
    return start_program(folder / name, program, *arguments)


def state_of(server: Program, command: str = "state") -> str:
    server.type_line(command)
    return server.read_line()


def wait_for_state(server: Program, state: str) -> None:
    eventually(lambda: state_of(server).startswith(state))


def test_a_server_notices_a_callers_vanished_host_despite_a_slow_callback(hosts: Hosts, tmp_path: Path) -> None:
    """The other caller's request is in the callback for longer: neither it nor the server gives the other up."""
    with (
        start(tmp_path, "server", SERVER_PROGRAM, hosts.server, SHORT_MS) as server,
        start_caller(tmp_path, hosts, "first", port := server.read_line(), LONG_MS, LONG_MS) as vanishing,
        start_caller(tmp_path, hosts, "second", port, SHORT_MS, SHORT_MS) as staying,
    ):
        staying.type_line("slow")
        wait_for_state(server, "1 0")
        vanishing.type_line("waits")
        wait_for_state(server, "2 1")
        hosts.set_first_cable(hosts.first, "down")
        wait_for_state(server, "1 0 {'CANCELLED': 1}")
        assert state_of(server, "release").startswith("1 0")
        assert staying.read_line() == f"{answer(b'slow')}"
        staying.type_line("after")
        assert staying.read_line() == f"{answer(b'after')}"
        wait_for_state(server, "1 0 {'CANCELLED': 1, 'OK': 2}")


def start_caller(folder: Path, hosts: Hosts, name: str, port: str, time_ms: str, timeout_ms: str) -> Program:
    host, address = {
        "first": (hosts.first, hosts.address_for_first(port)),
        "second": (hosts.second, hosts.address_for_second(port)),
    }[name]
    return start(folder, name, CALLER_PROGRAM, host, address, time_ms, timeout_ms)


def test_a_caller_notices_its_servers_vanished_host_and_continues_when_it_is_back(hosts: Hosts, tmp_path: Path) -> None:
    """Meanwhile another caller, whose cable is up, waits for a slow callback."""
    with (
        start(tmp_path, "server", SERVER_PROGRAM, hosts.server, LONG_MS) as server,
        start_caller(tmp_path, hosts, "first", port := server.read_line(), SHORT_MS, SHORT_MS) as cut_off,
        start_caller(tmp_path, hosts, "second", port, SHORT_MS, SHORT_MS) as other,
    ):
        other.type_line("slow")
        wait_for_state(server, "1 0")
        cut_off.type_line("waits")
        wait_for_state(server, "2 1")
        hosts.set_first_cable(hosts.server, "down")
        assert cut_off.read_line() == "UNAVAILABLE"
        state_of(server, "release")
        assert other.read_line() == f"{answer(b'slow')}"
        hosts.set_first_cable(hosts.server, "up")
        results = []
        while results[-1:] != [f"{answer(b'after')}"]:
            cut_off.type_line("after")
            results.append(cut_off.read_line())
        assert set(results[:-1]) <= {"UNAVAILABLE"}


def test_a_request_to_a_host_that_has_vanished_fails_after_the_keepalive_timeout(hosts: Hosts, tmp_path: Path) -> None:
    with (
        start(tmp_path, "server", SERVER_PROGRAM, hosts.server, LONG_MS) as server,
        start_caller(tmp_path, hosts, "first", server.read_line(), LONG_MS, SHORT_MS) as caller,
    ):
        caller.type_line("first")
        assert caller.read_line() == f"{answer(b'first')}"
        hosts.set_first_cable(hosts.server, "down")
        caller.type_line("second")
        assert caller.read_line() == "UNAVAILABLE"


def test_a_caller_that_pings_too_often_is_told_so_and_can_continue() -> None:
    too_often = (("grpc.keepalive_time_ms", 50),)
    with Held() as held, serving(held) as batcher, connect(batcher, options=too_often) as client:
        error = error_of(client.send_request, b"in the callback for a while")
        assert error.code() is grpc.StatusCode.UNAVAILABLE
        assert "pings" in error.details()
        held.release(float("inf"))
        assert client.send_request(b"after") == answer(b"after")


CALLING_PROGRAM = """
    import sys

    from grpc_batcher import MukoeBatcherClient

    with MukoeBatcherClient(sys.argv[1]) as client:
        for data in (b"before", b"slow", b"after"):
            print(client.send_request(data), flush=True)
"""


@pytest.mark.skipif(
    tuple(int(part) for part in grpc.__version__.split(".")[:2]) < (1, 62),
    reason="older gRPC does not read the answers to its pings while Python code holds the GIL",
)
def test_a_callback_that_holds_the_gil_longer_than_keepalive_waits_loses_no_caller(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(life_cycle, "_KEEPALIVE_INTERVAL_MS", int(SHORT_MS))
    monkeypatch.setattr(life_cycle, "_KEEPALIVE_TIMEOUT_MS", int(SHORT_MS))

    def hold_the_gil(requests: list[bytes]) -> Any:
        if b"slow" in requests:
            ctypes.PyDLL(None).usleep(4 * 1000 * int(SHORT_MS))  # a PyDLL does not release the GIL
        return echo(requests)

    with serving(hold_the_gil) as batcher:
        output = run_program(tmp_path, CALLING_PROGRAM, address_of(batcher))
    assert output == [str(answer(data)) for data in (b"before", b"slow", b"after")]
