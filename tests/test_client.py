"""How a client keeps its streams: with many threads, time limits, restarts of its server, and other processes."""

from __future__ import annotations

import gc
import pickle
import queue
import signal
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from grpc_batcher import MukoeBatcherClient
from grpc_batcher._client import stream_pool
from grpc_batcher._contract import TAKEN_IN_KEY

import grpc
import pytest
from serving import (
    METHOD,
    Held,
    address_of,
    answer,
    connect,
    echo,
    error_of,
    eventually,
    finish_program,
    in_background,
    in_callback,
    plain_server,
    run_program,
    serving,
    start_program,
    waiting,
)

UNAVAILABLE = grpc.StatusCode.UNAVAILABLE

# The messages of a "repr" request for b"hi", and of the answer ({}, 0).
REPR_HI = bytes.fromhex("0a040a026869")
EMPTY_ANSWER = bytes.fromhex("0a00")


# ---- streams ----


def test_nothing_is_sent_and_no_connection_made_before_the_first_request() -> None:
    with serving() as batcher, connect(batcher) as client:
        assert batcher.metrics().open_streams == 0
        client.send_request(b"x")
        assert batcher.metrics().open_streams == 1


def test_one_caller_uses_one_stream_for_all_its_requests() -> None:
    with serving() as batcher, connect(batcher) as client:
        for number in range(100):
            data = b"%d" % number
            assert client.send_request(data) == answer(data)
            assert batcher.metrics().open_streams == 1


def test_many_threads_on_one_client_each_get_their_own_answers() -> None:
    threads, requests = 16, 50

    def call(caller: int) -> int:
        begin.wait()
        for number in range(requests):
            data = b"%d of %d" % (number, caller)
            assert client.send_request(data, caller * requests + number) == answer(data, caller * requests + number)
        return requests

    begin = threading.Barrier(threads)
    with serving(model="dyna", batch_size=8, batch_timeout_s=0.001) as batcher, connect(batcher) as client:
        callers = [in_background(call, caller) for caller in range(threads)]
        assert sum(caller.result() for caller in callers) == threads * requests
        metrics = batcher.metrics()
        assert metrics.requests == {"OK": threads * requests}
        assert metrics.batched_requests == threads * requests
        assert metrics.open_streams <= threads


def test_requests_in_flight_have_a_stream_each_and_later_ones_reuse_them() -> None:
    threads = 10
    with Held() as held, serving(held, batch_size=threads) as batcher, connect(batcher) as client:
        for _ in range(3):
            requests = [in_callback(held, client, b"first")]
            requests += [waiting(batcher, client.send_request, b"%d" % number) for number in range(threads - 1)]
            assert batcher.metrics().open_streams == threads
            held.release(2)
            for request in requests:
                request.result()
        held.release()
        client.send_request(b"alone")
        assert batcher.metrics().open_streams == threads


def test_two_clients_have_streams_of_their_own() -> None:
    with serving() as batcher, connect(batcher) as first, connect(batcher) as second:
        first.send_request(b"x")
        second.send_request(b"y")
        assert batcher.metrics().open_streams == 2


def test_a_stream_that_was_idle_for_a_while_is_closed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stream_pool, "IDLE_NS", 20_000_000)
    with serving() as batcher, connect(batcher) as client:
        for _ in range(3):
            assert client.send_request(b"x") == answer(b"x")
            eventually(lambda: batcher.metrics().open_streams == 0)
        assert client.send_request(b"x", timeout_s=1000) == answer(b"x")


def test_a_request_longer_than_the_idle_time_is_answered(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stream_pool, "IDLE_NS", 20_000_000)
    with Held() as held, serving(held) as batcher, connect(batcher) as client, connect(batcher) as other:
        held.release()
        assert other.send_request(b"then idle") == answer(b"then idle")
        request = in_callback(held, client, b"long")
        eventually(lambda: batcher.metrics().open_streams == 1)  # the idle one is closed
        held.release()
        assert request.result() == answer(b"long")


def test_a_client_that_is_garbage_collected_closes_its_streams() -> None:
    with serving() as batcher:
        connect(batcher).send_request(b"x")
        gc.collect()
        eventually(lambda: batcher.metrics().open_streams == 0)


THREADS_PROGRAM = """
    import sys
    import threading
    import time

    from grpc_batcher import MukoeBatcherClient

    def use_a_client():
        with MukoeBatcherClient(sys.argv[1]) as client:
            client.send_request(b"x", timeout_s=1000)

    use_a_client()
    before = threading.active_count()
    for _ in range(20):
        use_a_client()
    while threading.active_count() > before:
        time.sleep(0.001)
"""


def test_closed_clients_leave_no_threads_behind(tmp_path: Path) -> None:
    with serving() as batcher:
        run_program(tmp_path, THREADS_PROGRAM, address_of(batcher))
        eventually(lambda: batcher.metrics().open_streams == 0)
        assert batcher.metrics().requests == {"OK": 21}


# ---- closing ----


def test_a_closed_client_raises_and_may_be_closed_again() -> None:
    with serving() as batcher:
        client = connect(batcher)
        assert client.send_request(b"x") == answer(b"x")
        for _ in range(2):
            client.close()
            with pytest.raises(RuntimeError, match="closed"):
                client.send_request(b"y")
        eventually(lambda: batcher.metrics().open_streams == 0)
        assert batcher.metrics().requests == {"OK": 1}


def test_a_client_may_be_closed_before_it_is_used() -> None:
    client = MukoeBatcherClient("127.0.0.1:1")
    client.close()
    with pytest.raises(RuntimeError, match="closed"):
        client.send_request(b"x")


def test_requests_in_flight_fail_with_cancelled_when_their_client_is_closed() -> None:
    with Held() as held, serving(held) as batcher, connect(batcher) as client:
        requests = [in_callback(held, client, b"in the callback")]
        requests += [waiting(batcher, client.send_request, b"waits")]
        client.close()
        for request in requests:
            error = error_of(request.result)
            assert error.code() is grpc.StatusCode.CANCELLED


def test_leaving_a_client_as_a_context_manager_closes_it() -> None:
    with serving() as batcher:
        with connect(batcher) as client:
            assert client.send_request(b"x") == answer(b"x")
        with pytest.raises(RuntimeError, match="closed"):
            client.send_request(b"y")


# ---- after errors ----


def test_a_client_is_usable_after_a_time_limit_has_passed() -> None:
    with Held() as held, serving(held) as batcher, connect(batcher) as client:
        in_front = in_callback(held, client, b"in front")
        for _ in range(3):
            error = error_of(client.send_request, b"late", timeout_s=0.05)
            assert error.code() is grpc.StatusCode.DEADLINE_EXCEEDED
            assert "timeout_s" in error.details()
        eventually(lambda: batcher.metrics().waiting == 0)
        held.release(2)
        assert in_front.result() == answer(b"in front")
        assert client.send_request(b"next") == answer(b"next")
        assert held.batches == [[b"in front"], [b"next"]]


def test_the_time_limit_of_one_request_does_not_affect_another_of_the_same_client() -> None:
    with Held() as held, serving(held) as batcher, connect(batcher) as client:
        unlimited = in_callback(held, client, b"unlimited")
        long = waiting(batcher, client.send_request, b"long", timeout_s=1000)
        error = error_of(client.send_request, b"short", timeout_s=0.05)
        assert error.code() is grpc.StatusCode.DEADLINE_EXCEEDED
        held.release(2)
        assert unlimited.result() == answer(b"unlimited")
        assert long.result() == answer(b"long")


def test_a_time_limit_holds_if_the_server_never_answers() -> None:
    def read_and_never_answer(messages: Iterator[bytes], context: grpc.ServicerContext) -> Iterator[bytes]:
        over = threading.Event()
        if context.add_callback(over.set):  # False: on a slow machine the time limit passes before this is reached
            over.wait()
        yield from ()

    with plain_server(read_and_never_answer) as address, MukoeBatcherClient(address) as client:
        error = error_of(client.send_request, b"x", timeout_s=0.05)
        assert error.code() is grpc.StatusCode.DEADLINE_EXCEEDED


def test_a_reply_that_is_not_an_answer_is_an_error_and_the_client_stays_usable() -> None:
    replies = iter((b"\xff\xff\xff", EMPTY_ANSWER))

    def serve(messages: Iterator[bytes], context: grpc.ServicerContext) -> Iterator[bytes]:
        for _ in messages:
            yield next(replies)

    with plain_server(serve) as address, MukoeBatcherClient(address) as client:
        error = error_of(client.send_request, b"x")
        assert error.code() is grpc.StatusCode.INTERNAL
        assert "3 bytes" in error.details()
        assert client.send_request(b"x") == ({}, 0)


# ---- a server that goes away and comes back ----


def test_the_first_request_after_a_restart_of_the_server_is_answered() -> None:
    with serving() as first, connect(first) as client:
        assert client.send_request(b"before") == answer(b"before")
        for number in range(5):
            first.shutdown()
            with serving(port=first.port) as second:
                assert client.send_request(b"%d" % number) == answer(b"%d" % number)
                assert client.send_request(b"again") == answer(b"again")
                assert second.metrics().requests == {"OK": 2}


def test_a_client_is_usable_after_requests_failed_while_the_server_was_away() -> None:
    with serving() as first, connect(first) as client:
        assert client.send_request(b"before") == answer(b"before")
        first.shutdown()
        for _ in range(5):
            assert error_of(client.send_request, b"while it is away").code() is UNAVAILABLE
        with serving(port=first.port):
            for _ in range(3):
                assert client.send_request(b"after") == answer(b"after")


def test_a_client_that_failed_before_its_server_started_is_answered_afterwards() -> None:
    with serving() as finder:
        port = finder.port
    with MukoeBatcherClient(f"127.0.0.1:{port}") as client:
        for _ in range(5):
            assert error_of(client.send_request, b"too early").code() is UNAVAILABLE
        with serving(port=port):
            assert client.send_request(b"x") == answer(b"x")


def test_all_threads_of_a_client_are_answered_after_a_restart() -> None:
    threads = 8
    step = threading.Barrier(threads + 1)

    def call(caller: int) -> list[Any]:
        results = []
        for number in range(3):
            step.wait()
            results.append(client.send_request(b"%d of %d" % (number, caller)))
            step.wait()
        return results

    with serving() as first, connect(first) as client:
        callers = [in_background(call, caller) for caller in range(threads)]
        step.wait()
        step.wait()
        first.shutdown()
        for _ in range(2):
            with serving(port=first.port):
                step.wait()
                step.wait()
        for caller, results in enumerate(callers):
            assert results.result() == [answer(b"%d of %d" % (number, caller)) for number in range(3)]


# ---- what a client resends ----


class PuppetServer:
    """A server whose streams end as the test says. Each stream follows the next script: one action per request.

    received: how many requests arrived on each stream.
    """

    ANSWER = "answer"

    def __init__(self, *scripts: list[Any]) -> None:
        self.received = [0] * len(scripts)
        self._scripts = iter(enumerate(scripts))
        self._lock = threading.Lock()

    def __call__(self, messages: Iterator[bytes], context: grpc.ServicerContext) -> Iterator[bytes]:
        with self._lock:
            number, script = next(self._scripts)
        for action in script:
            next(messages)
            self.received[number] += 1
            if action == self.ANSWER:
                yield EMPTY_ANSWER
                continue
            code, taken_in = action
            if taken_in is not None:
                context.set_trailing_metadata(((TAKEN_IN_KEY, taken_in),))
            context.set_code(code)
            context.set_details("as the script says")
            return


ANSWER = PuppetServer.ANSWER


Ask = Callable[[MukoeBatcherClient, bytes], Any]


def send_request(client: MukoeBatcherClient, data: bytes) -> Any:
    return client.send_request(data)


def submit(client: MukoeBatcherClient, data: bytes) -> Any:
    return client.submit(data).result()


both_ways = pytest.mark.parametrize("ask", [send_request, submit])


@both_ways
def test_a_request_that_the_server_did_not_take_in_is_resent(ask: Ask) -> None:
    puppet = PuppetServer([ANSWER, ANSWER, (UNAVAILABLE, "2")], [ANSWER, ANSWER])
    with plain_server(puppet) as address, MukoeBatcherClient(address) as client:
        for _ in range(4):
            assert ask(client, b"x") == ({}, 0)
        assert puppet.received == [3, 2]


@both_ways
def test_a_request_is_resent_only_once(ask: Ask) -> None:
    puppet = PuppetServer([ANSWER, (UNAVAILABLE, "1")], [(UNAVAILABLE, "0")], [ANSWER])
    with plain_server(puppet) as address, MukoeBatcherClient(address) as client:
        assert ask(client, b"x") == ({}, 0)
        error = error_of(ask, client, b"y")
        assert (error.code(), error.details()) == (UNAVAILABLE, "as the script says")
        assert puppet.received == [2, 1, 0]
        assert ask(client, b"z") == ({}, 0)


@pytest.mark.parametrize(
    "end",
    [
        pytest.param((UNAVAILABLE, "2"), id="it was taken in"),
        pytest.param((UNAVAILABLE, None), id="the server did not say"),
        pytest.param((UNAVAILABLE, "many"), id="the server said nonsense"),
        pytest.param((grpc.StatusCode.INTERNAL, "1"), id="another status"),
        pytest.param((grpc.StatusCode.RESOURCE_EXHAUSTED, "1"), id="refused for a reason"),
    ],
)
@both_ways
def test_a_request_that_may_have_been_taken_in_is_not_resent(end: Any, ask: Ask) -> None:
    puppet = PuppetServer([ANSWER, end], [ANSWER])
    with plain_server(puppet) as address, MukoeBatcherClient(address) as client:
        assert ask(client, b"x") == ({}, 0)
        error = error_of(ask, client, b"y")
        assert (error.code(), error.details()) == (end[0], "as the script says")
        assert puppet.received == [2, 0]
        assert ask(client, b"z") == ({}, 0)


@both_ways
def test_the_first_request_of_a_stream_is_not_resent(ask: Ask) -> None:
    puppet = PuppetServer([(UNAVAILABLE, "0")], [ANSWER])
    with plain_server(puppet) as address, MukoeBatcherClient(address) as client:
        assert error_of(ask, client, b"x").code() is UNAVAILABLE
        assert puppet.received == [1, 0]
        assert ask(client, b"y") == ({}, 0)


@both_ways
def test_a_stream_that_ends_with_ok_instead_of_an_answer_is_an_error(ask: Ask) -> None:
    puppet = PuppetServer([(grpc.StatusCode.OK, None)], [ANSWER])
    with plain_server(puppet) as address, MukoeBatcherClient(address) as client:
        error = error_of(ask, client, b"x")
        assert error.code() is UNAVAILABLE
        assert "without an answer" in error.details()
        assert ask(client, b"y") == ({}, 0)
        assert puppet.received == [1, 1]


def test_a_batcher_that_shuts_down_says_how_many_requests_of_a_stream_it_took_in() -> None:
    with Held() as held, serving(held) as batcher, connect(batcher) as client:
        held.release(2)
        outbox: queue.SimpleQueue[bytes | None] = queue.SimpleQueue()
        with grpc.insecure_channel(address_of(batcher)) as channel:
            call = channel.stream_stream(METHOD)(iter(outbox.get, None))
            for _ in range(2):
                outbox.put(REPR_HI)
                next(call)
            taken_in = in_callback(held, client, b"taken in")
            shutdown = in_background(batcher.shutdown, grace_s=60)
            eventually(lambda: not batcher.is_server_ready())
            outbox.put(REPR_HI)
            with pytest.raises(grpc.RpcError):
                next(call)
            assert call.code() is UNAVAILABLE
            assert dict(call.trailing_metadata())[TAKEN_IN_KEY] == "2"
            outbox.put(None)
        held.release()
        assert taken_in.result() == answer(b"taken in")
        shutdown.result()
        assert held.batches == [[b"hi"], [b"hi"], [b"taken in"]]


# ---- pickles and processes ----


def test_a_pickled_client_keeps_its_server_and_its_limits() -> None:
    def answer_by_number(requests: list[bytes]) -> Any:
        return [({"r": bytes(int(data))}, 0) for data in requests]

    with serving(answer_by_number) as batcher, connect(batcher, max_message_bytes=1000) as client:
        client.send_request(b"1")
        with pickle.loads(pickle.dumps(client)) as copy:
            assert type(copy) is MukoeBatcherClient
            assert repr(copy) == repr(client)
            assert copy.send_request(b"1") == client.send_request(b"1")
            assert batcher.metrics().open_streams == 2
            assert error_of(copy.send_request, b"2000").code() is grpc.StatusCode.RESOURCE_EXHAUSTED
        assert client.send_request(b"1") == ({"r": b"\0"}, 0)


SPAWN_PROGRAM = """
    import multiprocessing
    import sys

    from grpc_batcher import MukoeBatcherClient

    def call(client, data):
        return client.send_request(data)

    if __name__ == "__main__":
        client = MukoeBatcherClient(sys.argv[1])
        print(client.send_request(b"parent"))
        with multiprocessing.get_context(sys.argv[2]).Pool(2) as pool:
            for result in pool.starmap(call, [(client, b"child"), (client, b"child")]):
                print(result)
        print(client.send_request(b"parent"))
"""


@pytest.mark.parametrize("method", ["spawn", "forkserver"])
def test_a_used_client_can_be_sent_to_spawned_processes(method: str, tmp_path: Path) -> None:
    with serving() as batcher:
        output = run_program(tmp_path, SPAWN_PROGRAM, address_of(batcher), method)
    assert output == [str(answer(data)) for data in (b"parent", b"child", b"child", b"parent")]


FORK_PROGRAM = """
    import multiprocessing
    import os
    import sys

    from grpc_batcher import MukoeBatcherClient

    address, how, used_before = sys.argv[1], sys.argv[2], sys.argv[3] == "used"
    client = MukoeBatcherClient(address)
    if used_before:
        print("before", client.send_request(b"before"), flush=True)

    def call(name):
        for _ in range(2):
            try:
                print(name, client.send_request(name.encode()), flush=True)
            except RuntimeError as error:
                print(name, "RuntimeError", error, flush=True)

    if how == "os.fork":
        child = os.fork()
        if child == 0:
            call("child")
            sys.exit(0)
        status = os.waitpid(child, 0)[1]
    else:
        process = multiprocessing.get_context("fork").Process(target=call, args=("child",))
        process.start()
        process.join()
        status = process.exitcode
    print("status", status, flush=True)
    call("parent")
"""

by_every_fork = pytest.mark.parametrize("how", ["os.fork", "multiprocessing"])


def answers_to(name: str) -> list[str]:
    return [f"{name} {answer(name.encode())}"] * 2


@by_every_fork
def test_a_client_made_but_not_used_before_a_fork_works_in_child_and_parent(how: str, tmp_path: Path) -> None:
    with serving() as batcher:
        output = run_program(tmp_path, FORK_PROGRAM, address_of(batcher), how, "unused")
    assert output == [*answers_to("child"), "status 0", *answers_to("parent")]


@by_every_fork
def test_a_client_used_before_a_fork_raises_in_the_child_and_works_in_the_parent(how: str, tmp_path: Path) -> None:
    environment = {"GRPC_ENABLE_FORK_SUPPORT": "0"}
    with serving() as batcher:
        output = run_program(tmp_path, FORK_PROGRAM, address_of(batcher), how, "used", environment=environment)
    assert output[0] == f"before {answer(b'before')}"
    for line in output[1:3]:
        assert line.startswith("child RuntimeError this process was forked")
        assert "GRPC_ENABLE_FORK_SUPPORT=1" in line
    assert output[3:] == ["status 0", *answers_to("parent")]


@by_every_fork
def test_with_grpcs_fork_support_a_client_used_before_a_fork_works_in_the_child(how: str, tmp_path: Path) -> None:
    environment = {"GRPC_ENABLE_FORK_SUPPORT": "1"}
    with serving() as batcher:
        output = run_program(tmp_path, FORK_PROGRAM, address_of(batcher), how, "used", environment=environment)
    assert output == [f"before {answer(b'before')}", *answers_to("child"), "status 0", *answers_to("parent")]


FORKED_SERVER_PROGRAM = """
    import os
    import sys

    from grpc_batcher import MukoeBatcherClient, create_batcher

    def echo(batch):
        return [({"result": data}, 0) for data in batch]

    batcher = create_batcher("repr", 1, 0, port=0, batch_process_fn=echo)
    batcher.start()
    print(batcher.port, flush=True)
    sys.stdin.readline()
    child = os.fork()
    if child == 0:
        try:
            create_batcher("repr", 1, 0, port=0, batch_process_fn=echo).start()
        except RuntimeError as error:
            print("child", str(error).partition(",")[0], flush=True)
        sys.exit(0)
    print("status", os.waitpid(child, 0)[1], flush=True)
    sys.stdin.readline()
    batcher.shutdown()
"""


def test_a_server_keeps_serving_when_its_process_forks_and_the_child_ends(tmp_path: Path) -> None:
    # Otherwise gRPC prepares the child for gRPC, which newer releases do not survive while a server runs.
    environment = {"GRPC_ENABLE_FORK_SUPPORT": "0"}
    with (
        start_program(tmp_path, FORKED_SERVER_PROGRAM, environment=environment) as program,
        MukoeBatcherClient(f"127.0.0.1:{program.read_line()}") as client,
    ):
        assert client.send_request(b"before") == answer(b"before")
        program.type_line("fork")
        assert program.read_line() == "child this process was forked from one that had used gRPC"
        assert program.read_line() == "status 0"
        assert client.send_request(b"after") == answer(b"after")
        status, output, errors = finish_program(program, "end\n")
    assert (status, output) == (0, ""), errors


# ---- Ctrl-C ----

INTERRUPTED_PROGRAM = """
    import signal
    import sys

    from grpc_batcher import MukoeBatcherClient

    signal.signal(signal.SIGINT, signal.default_int_handler)  # whatever the parent process set
    client = MukoeBatcherClient(sys.argv[1])
    print(client.send_request(b"before"), flush=True)
    try:
        print(client.send_request(b"interrupted"), flush=True)
    except KeyboardInterrupt:
        print("KeyboardInterrupt", flush=True)
    print(client.send_request(b"after"), flush=True)
"""


def test_ctrl_c_ends_a_request_of_the_main_thread_and_the_client_stays_usable(tmp_path: Path) -> None:
    with (
        Held() as held,
        serving(held) as batcher,
        start_program(tmp_path, INTERRUPTED_PROGRAM, address_of(batcher)) as program,
    ):
        held.release()
        assert program.read_line() == f"{answer(b'before')}"
        eventually(lambda: len(held.batches) == 2 or program.poll() is not None)
        program.send_signal(signal.SIGINT)
        assert program.read_line() == "KeyboardInterrupt"
        held.release(2)
        status, output, errors = finish_program(program)
        assert (status, output) == (0, f"{answer(b'after')}\n"), errors
        assert held.batches[1:] == [[b"interrupted"], [b"after"]]


SIGNALLED_PROGRAM = """
    import signal
    import sys

    from grpc_batcher import MukoeBatcherClient

    class Enough(Exception):
        pass

    def enough(*_):
        raise Enough

    signal.signal(signal.SIGALRM, enough)
    client = MukoeBatcherClient(sys.argv[1])
    for number in range(20):
        try:
            signal.setitimer(signal.ITIMER_REAL, 0.02)
            client.send_request(b"%d" % number)
        except Enough:
            pass
        signal.setitimer(signal.ITIMER_REAL, 0)
    print(client.send_request(b"after"), flush=True)
    sys.stdin.read()
"""


def test_requests_interrupted_by_a_signal_handler_leave_no_streams_behind(tmp_path: Path) -> None:
    """The exception may be raised between gRPC's event and the code that waits for it.

    Only in the direct transport: in the public one it may be raised inside grpcio, which then keeps a lock for ever.
    """

    def slow_echo(requests: list[bytes]) -> list[tuple[dict[str, bytes], int]]:
        time.sleep(0.03)  # longer than the program waits
        return echo(requests)

    direct = {"GRPC_BATCHER_TRANSPORT": "direct"}
    with (
        serving(slow_echo) as batcher,
        start_program(tmp_path, SIGNALLED_PROGRAM, address_of(batcher), environment=direct) as program,
    ):
        assert program.read_line() == f"{answer(b'after')}"
        # An exception just as a stream is borrowed or given back may leave that stream open.
        eventually(lambda: batcher.metrics().open_streams <= 5)
        status, output, errors = finish_program(program)
        assert (status, output) == (0, ""), errors


def test_a_request_whose_time_limit_no_thread_can_keep_is_not_sent(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nor is it counted as one of its stream's requests, or a later one might be sent twice."""
    with serving() as batcher, connect(batcher) as client:
        client.send_request(b"first")
        with monkeypatch.context() as patch:
            patch.setattr(stream_pool.StreamPool, "_can_keep_time", lambda pool: False)
            with pytest.raises(RuntimeError, match="no thread"):
                client.send_request(b"second", timeout_s=50)
        client.send_request(b"third")
        (loan,) = client._pool._idle
        assert loan.requests == 2


@pytest.mark.parametrize(
    ("pair", "fault"),
    [
        (("token-bin", "s3cr3t"), "'token-bin'.*bytes"),
        (("Token", "s3cr3t"), "the key 'Token'"),
        (("token", "s3cr3t\n"), "'token' with characters other than printable ASCII"),
        (("token", 7), "a int for 'token'"),
    ],
)
def test_metadata_that_grpc_cannot_send_is_refused_by_the_constructor(pair: Any, fault: str) -> None:
    with pytest.raises(ValueError, match=fault) as caught:
        MukoeBatcherClient("localhost:1", metadata=(pair,))
    assert "s3cr3t" not in str(caught.value)


@pytest.mark.parametrize("arguments", [{"credentials": "x"}, {"interceptors": [grpc.StreamStreamClientInterceptor]}])
def test_credentials_and_interceptors_of_the_wrong_type_are_refused_by_a_client(arguments: Any) -> None:
    with pytest.raises(TypeError, match=next(iter(arguments))):
        MukoeBatcherClient("localhost:1", **arguments)
