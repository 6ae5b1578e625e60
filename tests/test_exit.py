"""Programs that end without closing or shutting down anything, as most do."""

from __future__ import annotations

from pathlib import Path

import pytest
from serving import finish_program, run_program, start_program

SERVE = """
    import sys
    from grpc_batcher import create_batcher

    def echo(requests):
        return [({"result": data}, 0) for data in requests]

    batcher = create_batcher("repr", 16, 0.005, 0, batch_process_fn=echo, host="127.0.0.1")
    batcher.start()
"""
SERVER = (
    SERVE
    + """
    print(batcher.port, flush=True)
    sys.stdin.readline()
"""
)
SEND = """
    from grpc_batcher import MukoeBatcherClient

    client = MukoeBatcherClient(f"127.0.0.1:{port}")
    assert client.send_request(b"hi") == ({"result": b"hi"}, 0)
"""
CLIENT = (
    """
    import sys
    port = sys.argv[1]
"""
    + SEND
    + """
    print("answered", flush=True)
    sys.stdin.readline()
"""
)


@pytest.mark.parametrize("attempt", range(3))
def test_a_program_that_serves_and_calls_ends_silently(attempt: int, tmp_path: Path) -> None:
    with start_program(tmp_path, SERVE + "    port = batcher.port\n" + SEND) as program:
        assert finish_program(program) == (0, "", "")


@pytest.mark.parametrize("attempt", range(3))
def test_callers_print_nothing_when_their_servers_program_ends(attempt: int, tmp_path: Path) -> None:
    """gRPC prints "Got goaway ... Cancelling all calls" for callers of a server that does not let connections go."""
    (tmp_path / "client").mkdir()
    with (
        start_program(tmp_path, SERVER) as server,
        start_program(tmp_path / "client", CLIENT, server.read_line()) as client,
    ):
        assert client.read_line() == "answered"
        assert finish_program(server, "end\n") == (0, "", "")
        assert finish_program(client, "end\n") == (0, "", "")


def test_daemon_threads_that_send_while_the_program_ends_print_no_error(tmp_path: Path) -> None:
    program = (
        SERVE
        + """
    import threading
    from grpc_batcher import MukoeBatcherClient

    answers = threading.Semaphore(0)

    def send_forever():
        client = MukoeBatcherClient(f"127.0.0.1:{batcher.port}")
        while True:
            answers.release()
            client.send_request(b"hi")
            threading.Event().wait(0.01)  # between two requests most of the time

    for _ in range(4):
        threading.Thread(target=send_forever, daemon=True).start()
    for _ in range(20):
        answers.acquire()
    """
    )
    with start_program(tmp_path, program) as running:
        status, output, errors = finish_program(running)
    assert (status, output) == (0, "")
    assert "client is closed" not in errors


def test_the_main_thread_cannot_send_once_the_exit_has_closed_its_client(tmp_path: Path) -> None:
    program = (
        """
    import atexit
    late = []
    atexit.register(lambda: late[0]())  # runs after what is registered later
    """
        + SERVE
        + "    port = batcher.port\n"
        + SEND
        + """
    def send():
        try:
            client.send_request(b"late")
        except RuntimeError as error:
            print(error)

    late.append(send)
    """
    )
    assert run_program(tmp_path, program) == ["the client is closed"]
