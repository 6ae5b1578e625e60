"""A process that serves until a signal: the grace period, the exit status, and what it prints."""

from __future__ import annotations

import ast
import signal
from pathlib import Path
from typing import Any

from grpc_batcher import BindError, MukoeBatcherClient, create_batcher

import grpc
import pytest
from serving import (
    address_of,
    answer,
    connect,
    echo,
    error_of,
    eventually,
    finish_program,
    in_background,
    run_program,
    serving,
    start_program,
)

SIGNALS = [signal.SIGTERM, signal.SIGINT]


def handlers() -> list[Any]:
    return [signal.getsignal(number) for number in SIGNALS]


# The callback prints what it holds, and answers when it reads a line.
PROGRAM = """
    import signal
    import sys

    from grpc_batcher import create_batcher

    def answer_on_a_line(batch):
        print("holds", batch, flush=True)
        sys.stdin.readline()
        return [({"result": data}, 0) for data in batch]

    def own_handler(*_):
        pass

    signal.signal(signal.SIGTERM, own_handler)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    batcher = create_batcher("repr", 1, 0, port=0, host="127.0.0.1", batch_process_fn=answer_on_a_line)
    if "start" in sys.argv:
        batcher.start()
    def print_port():
        batcher.wait_until_ready()
        print(batcher.port, flush=True)
    import threading
    threading.Thread(target=print_port).start()
    batcher.serve_forever(grace_s=1000)
    is_restored = signal.getsignal(signal.SIGTERM) is own_handler and signal.getsignal(signal.SIGINT) is signal.SIG_IGN
    print("over", batcher.is_server_ready(), is_restored, flush=True)
"""


@pytest.mark.parametrize("number", SIGNALS, ids=lambda number: number.name)
@pytest.mark.parametrize("started", ["started before", "not started before"])
def test_on_a_signal_serve_forever_answers_what_was_taken_in_and_returns(
    number: int, started: str, tmp_path: Path
) -> None:
    arguments = ("start",) if started == "started before" else ()
    with (
        start_program(tmp_path, PROGRAM, *arguments) as program,
        MukoeBatcherClient(f"127.0.0.1:{program.read_line()}") as client,
        MukoeBatcherClient(client._connection.address) as late,
    ):
        request = in_background(client.send_request, b"taken in")
        assert program.read_line() == "holds [b'taken in']"
        program.send_signal(number)
        eventually(lambda: is_refused(late))
        assert not request.done()
        status, output, errors = finish_program(program, "answer\n")
        assert request.result() == answer(b"taken in")
        assert (status, output, errors) == (0, "over False True\n", "")


def is_refused(client: MukoeBatcherClient) -> bool:
    """Whether the server refuses requests. One that it still accepts would wait, and is given up."""
    error = error_of(client.send_request, b"too late?", timeout_s=0.2)
    return error.code() is grpc.StatusCode.UNAVAILABLE


@pytest.mark.parametrize("first", SIGNALS, ids=lambda number: number.name)
@pytest.mark.parametrize("second", SIGNALS, ids=lambda number: number.name)
def test_a_second_signal_ends_the_process_even_if_the_callback_is_stuck(
    first: int, second: int, tmp_path: Path
) -> None:
    with (
        start_program(tmp_path, PROGRAM) as program,
        MukoeBatcherClient(f"127.0.0.1:{program.read_line()}") as client,
        MukoeBatcherClient(client._connection.address) as late,
    ):
        request = in_background(client.send_request, b"never answered")
        program.read_line()
        program.send_signal(first)
        eventually(lambda: is_refused(late))
        program.send_signal(second)
        program.wait()  # its stdin stays open, and the callback waits for it
        status, output, errors = finish_program(program)
        assert (status, output, errors) == (128 + second, "", "")
        assert error_of(request.result).code() is grpc.StatusCode.UNAVAILABLE


def test_serve_forever_returns_when_another_thread_shuts_the_batcher_down() -> None:
    before = handlers()
    batcher = create_batcher("repr", 1, 0.0, 0, batch_process_fn=echo, host="127.0.0.1")

    def use_and_shut_down() -> None:
        batcher.wait_until_ready()
        with connect(batcher) as client:
            assert client.send_request(b"x") == answer(b"x")
        batcher.shutdown()

    other = in_background(use_and_shut_down)
    batcher.serve_forever()
    other.result()
    assert not batcher.is_server_ready()
    assert handlers() == before


def test_serve_forever_raises_outside_the_main_thread_and_changes_nothing() -> None:
    with serving() as batcher, connect(batcher) as client:
        with pytest.raises(RuntimeError, match="call it in the main thread"):
            in_background(batcher.serve_forever).result()
        assert client.send_request(b"x") == answer(b"x")


def test_serve_forever_raises_bind_error_and_restores_the_signal_handlers() -> None:
    before = handlers()
    with serving() as other:
        batcher = create_batcher("repr", 1, 0.0, other.port, batch_process_fn=echo, host="127.0.0.1")
        with pytest.raises(BindError, match=address_of(other)):
            batcher.serve_forever()
    assert handlers() == before


def test_serve_forever_raises_after_a_shutdown() -> None:
    before = handlers()
    with serving() as batcher:
        batcher.shutdown()
        with pytest.raises(RuntimeError, match="was shut down"):
            batcher.serve_forever()
    assert handlers() == before


@pytest.mark.parametrize("grace_s", [-1, float("inf"), "1", None])
def test_serve_forever_refuses_a_bad_grace_period_before_it_starts_anything(grace_s: Any) -> None:
    batcher = create_batcher("repr", 1, 0.0, 0, batch_process_fn=echo, host="127.0.0.1")
    with pytest.raises(ValueError, match=r"^grace_s is "):
        batcher.serve_forever(grace_s)
    assert not batcher.is_server_ready()


MODULES = """
    import sys

    import grpc_batcher

    for name, module in sys.modules.items():
        if name.partition(".")[0] == "grpc_batcher" and module.__file__.endswith(".py"):
            print(module.__file__)
"""


def test_the_library_prints_only_the_summary_and_has_one_logger(tmp_path: Path) -> None:
    printing, loggers = [], set()
    for file in run_program(tmp_path, MODULES):
        for node in ast.walk(ast.parse(Path(file).read_text())):
            call = ast.unparse(node) if isinstance(node, ast.Call) else ""
            if call.startswith("print("):
                printing.append(call)
            elif call.startswith("logging.getLogger("):
                loggers.add(call)
    assert printing == ["print(summary(self.metrics(), timed=self._recorder.timed))"]
    assert loggers == {"logging.getLogger('grpc_batcher')"}
