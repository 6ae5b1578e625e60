"""Forks under load, and programs that exit with requests in flight.

What a forked child may do, and Ctrl-C, are in test_client.py; how server programs exit is in test_old_wheel.py.
"""

from __future__ import annotations

from pathlib import Path

from grpc_batcher import MukoeBatcherClient

import pytest
from serving import (
    Held,
    address_of,
    answer,
    connect,
    eventually,
    finish_program,
    in_background,
    run_program,
    serving,
    start_program,
)

# Otherwise gRPC prepares the child for gRPC, which newer releases do not always survive.
NO_FORK_SUPPORT = {"GRPC_ENABLE_FORK_SUPPORT": "0"}

FORKS_UNDER_LOAD_PROGRAM = """
    import os
    import signal
    import subprocess
    import sys
    import threading

    from grpc_batcher import MukoeBatcherClient, create_batcher

    def echo(requests):
        return [({"result": data}, 0) for data in requests]

    def ask(caller):
        number = 0
        while not over.is_set():
            number += 1
            data = b"%d of %d" % (number, caller)
            assert client.send_request(data) == ({"result": data}, 0)
            answered[caller] = number
            more.set()

    def wait_for_answers():
        before = list(answered)
        while any(now < then + 3 for now, then in zip(answered, before)):
            more.clear()
            more.wait()

    answered, over, more = [0] * 4, threading.Event(), threading.Event()
    with create_batcher("repr", 4, 0.001, 0, batch_process_fn=echo, host="127.0.0.1") as batcher:
        with MukoeBatcherClient(f"127.0.0.1:{batcher.port}") as client:
            callers = [threading.Thread(target=ask, args=(number,)) for number in range(4)]
            for caller in callers:
                caller.start()
            for number in range(20):
                wait_for_answers()
                child = os.fork()
                if child == 0:
                    try:
                        client.send_request(b"from a child")
                    except RuntimeError:
                        os._exit(7)
                    os._exit(1)
                assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 7, "the child could send a request"
                wait_for_answers()
                assert subprocess.run(["true"]).returncode == 0
                child = os.fork()
                if child == 0:
                    signal.pause()
                os.kill(child, signal.SIGKILL)
                os.waitpid(child, 0)
            wait_for_answers()
            over.set()
            for caller in callers:
                caller.join()
    print(dict(batcher.metrics().requests) == {"OK": sum(answered)})
"""


def test_a_process_that_serves_and_calls_may_fork_under_load(tmp_path: Path) -> None:
    """Its children try to send a request, start another program, and are killed."""
    assert run_program(tmp_path, FORKS_UNDER_LOAD_PROGRAM, environment=NO_FORK_SUPPORT) == ["True"]


FORKED_BEFORE_USE_PROGRAM = """
    import multiprocessing
    import sys

    from grpc_batcher import MukoeBatcherClient

    def ask(client, caller):
        for number in range(100):
            data = b"%d of %d" % (number, caller)
            assert client.send_request(data) == ({"result": data}, 0)

    client = MukoeBatcherClient(sys.argv[1])
    context = multiprocessing.get_context("fork")
    children = [context.Process(target=ask, args=(client, caller)) for caller in range(8)]
    for child in children:
        child.start()
    for child in children:
        child.join()
    print([child.exitcode for child in children])
"""


def test_children_that_share_a_client_made_before_the_fork_each_get_their_own_answers(tmp_path: Path) -> None:
    with serving(batch_timeout_s=0.001) as batcher:
        assert run_program(tmp_path, FORKED_BEFORE_USE_PROGRAM, address_of(batcher)) == [str([0] * 8)]
        assert batcher.metrics().requests == {"OK": 800}
        eventually(lambda: batcher.metrics().open_streams == 0)


ENDING_CALLER_PROGRAM = """
    import os
    import sys
    import threading
    import time

    from grpc_batcher import MukoeBatcherClient

    def ask(data, timeout_s):
        client.send_request(data, timeout_s=timeout_s)

    client = MukoeBatcherClient(sys.argv[1])
    client.send_request(b"first")
    for number in range(4):
        threading.Thread(target=ask, args=(b"%d" % number, (None, 1000)[number % 2]), daemon=True).start()
    sys.stdin.readline()
    ENDING
"""


@pytest.mark.parametrize(
    ("ending", "expected"),
    [
        ("pass", 0),
        ("sys.exit(3)", 3),
        ("raise ValueError('of the program')", 1),
        ("os._exit(4)", 4),
        ("threading.Thread(target=client.close, daemon=True).start()", 0),
    ],
    ids=["at its end", "by sys.exit", "by an exception", "by os._exit", "while it closes its client"],
)
def test_a_caller_may_exit_with_requests_in_flight_and_they_leave_the_server(
    ending: str, expected: int, tmp_path: Path
) -> None:
    """Its daemon threads wait in gRPC while the interpreter exits."""
    with (
        Held() as held,
        serving(held, batch_size=1) as batcher,
        connect(batcher) as client,
        start_program(tmp_path, ENDING_CALLER_PROGRAM.replace("ENDING", ending), address_of(batcher)) as program,
    ):
        held.release()
        eventually(lambda: len(held.batches) == 2 and batcher.metrics().waiting == 3)
        status, output, errors = finish_program(program, "end\n")
        assert (status, output) == (expected, ""), errors
        eventually(lambda: (batcher.metrics().open_streams, batcher.metrics().waiting) == (0, 0))
        held.release(float("inf"))
        assert client.send_request(b"after") == answer(b"after")
        assert held.batches[2:] == [[b"after"]]


ENDING_SERVER_PROGRAM = """
    import os
    import sys
    import threading

    from grpc_batcher import Array, MukoeBatcherClient, create_batcher

    if sys.argv[1] == "arrays":
        import numpy
        options, data = {"arrays": {"data": Array((1000,), "uint8")}}, numpy.zeros(1000, "uint8")
    else:
        options, data = {}, b"x"

    def answer(requests):
        entered.set()
        threading.Event().wait()

    def ask():
        try:
            client.send_request(data)
        except Exception:
            pass

    entered = threading.Event()
    batcher = create_batcher("repr", 1, 0.0, 0, batch_process_fn=answer, host="127.0.0.1", **options)
    batcher.start()
    client = MukoeBatcherClient(f"127.0.0.1:{batcher.port}", arrays=bool(options))
    for _ in range(10):
        threading.Thread(target=ask, daemon=True).start()
    entered.wait()
    while batcher.metrics().waiting < 9:
        pass
    ENDING
"""


@pytest.mark.parametrize(
    ("ending", "expected"),
    [("sys.exit(3)", 3), ("os._exit(4)", 4), ("threading.Thread(target=batcher.shutdown, daemon=True).start()", 0)],
    ids=["by sys.exit", "by os._exit", "while it shuts down"],
)
@pytest.mark.parametrize("kind", ["bytes", "arrays"])
def test_a_program_that_serves_and_calls_may_exit_with_requests_in_flight(
    kind: str, ending: str, expected: int, tmp_path: Path
) -> None:
    with start_program(tmp_path, ENDING_SERVER_PROGRAM.replace("ENDING", ending), kind) as program:
        status, output, errors = finish_program(program)
    assert (status, output) == (expected, ""), errors


FORKING_SERVER_PROGRAM = """
    import faulthandler, os, sys, threading, warnings
    from grpc_batcher import create_batcher

    warnings.simplefilter("ignore")  # newer Pythons warn about forks with threads
    entered, forked_child_ended, seen = threading.Event(), threading.Event(), []

    def callback(requests):
        seen.extend(requests)
        if b"second" in requests:
            entered.set()
            forked_child_ended.wait()
        return [({"result": data}, 0) for data in requests]

    with create_batcher("repr", 1, 0.0, 0, batch_process_fn=callback, host="127.0.0.1") as batcher:
        print(batcher.port, flush=True)
        sys.stdin.readline()
        reading, writing = os.pipe()
        child = os.fork()
        if child == 0:
            faulthandler.dump_traceback_later(40, exit=True)
            os.close(writing)
            os.read(reading, 1)
            sys.exit(7)  # this also leaves the batcher's context
        print("forked", flush=True)
        entered.wait()
        os.write(writing, b"x")
        print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
        forked_child_ended.set()
        sys.stdin.readline()
        print(seen, batcher.is_server_ready())
"""


def test_a_forked_child_that_leaves_its_parents_batcher_exits_and_the_parent_serves_on(tmp_path: Path) -> None:
    environment = {"GRPC_ENABLE_FORK_SUPPORT": "0"}
    with start_program(tmp_path, FORKING_SERVER_PROGRAM, environment=environment) as program:
        with MukoeBatcherClient(f"127.0.0.1:{program.read_line()}") as client:
            assert client.send_request(b"first") == ({"result": b"first"}, 0)
            program.type_line("fork")
            assert program.read_line() == "forked"
            second = in_background(client.send_request, b"second")
            assert program.read_line() == "7"
            assert second.result() == ({"result": b"second"}, 0)
        status, output, errors = finish_program(program, "end\n")
        assert (status, output) == (0, "[b'first', b'second'] True\n"), errors
