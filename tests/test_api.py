"""What the public names promise, over a real socket wherever a server is involved."""

from __future__ import annotations

import dataclasses
import inspect
import re
import signal
import socket
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import grpc_batcher
from grpc_batcher import BatcherError, BindError, MukoeBatcher, MukoeBatcherClient, RequestError, create_batcher

import grpc
import numpy as np
import pytest
from serving import (
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


def new_batcher(**changes: Any) -> MukoeBatcher:
    arguments: dict[str, Any] = {
        "model": "repr",
        "batch_size": 8,
        "batch_timeout_s": 0.0,
        "port": 0,
        "batch_process_fn": echo,
        "host": "127.0.0.1",
    }
    return create_batcher(**{**arguments, **changes})


def has_ipv6() -> bool:
    try:
        with socket.socket(socket.AF_INET6) as probe:
            probe.bind(("::1", 0))
    except OSError:
        return False
    return True


# ---- names and signatures ----


def test_the_version_begins_with_two_numbers() -> None:
    assert re.fullmatch(r"\d+\.\d+.*", grpc_batcher.__version__)


def test_create_batcher_has_the_wheels_parameters_in_the_wheels_order() -> None:
    parameters = inspect.signature(create_batcher).parameters.values()
    positional = [parameter for parameter in parameters if parameter.kind is parameter.POSITIONAL_OR_KEYWORD]
    names = [parameter.name for parameter in positional]
    assert names == ["model", "batch_size", "batch_timeout_s", "port", "num_threads", "batch_process_fn"]
    assert [parameter.default for parameter in positional[3:5]] == [50051, 16]


def test_the_client_has_the_wheels_parameters() -> None:
    assert next(iter(inspect.signature(MukoeBatcherClient).parameters)) == "server_address"
    assert list(inspect.signature(MukoeBatcherClient.send_request).parameters)[:3] == ["self", "data", "action"]


def test_the_error_tree_is_as_documented() -> None:
    assert issubclass(BindError, BatcherError)
    assert issubclass(BindError, OSError)
    assert issubclass(RequestError, BatcherError)
    assert issubclass(RequestError, grpc.RpcError)


# ---- the example of the reference ----


def test_the_reference_example_gets_exactly_the_expected_answer() -> None:
    with (
        create_batcher("repr", 1, 0.001, 0, 16, lambda batch: [({"result": data}, 0) for data in batch]) as batcher,
        MukoeBatcherClient(f"localhost:{batcher.port}") as client,
    ):
        result = client.send_request(b"hi")
        assert result == ({"result": b"hi"}, 0)
        assert repr(result) == "({'result': b'hi'}, 0)"


def test_every_argument_may_be_given_by_keyword() -> None:
    with create_batcher(
        model="dyna",
        batch_size=1,
        batch_timeout_s=0.001,
        port=0,
        num_threads=4,
        batch_process_fn=echo,
        track_metrics=False,
    ) as batcher:
        client = MukoeBatcherClient(server_address=address_of(batcher))
        assert client.send_request(data=b"hi", action=3) == ({"result": b"hi"}, 3)
        client.close()


def test_a_dyna_callback_gets_pairs_and_a_repr_callback_bytes() -> None:
    for model, arguments, seen in (("repr", (b"x",), b"x"), ("dyna", (b"x", -5), (b"x", -5))):
        with Held() as held, serving(held, model=model) as batcher, connect(batcher) as client:
            held.release()
            client.send_request(*arguments)
            assert held.batches == [[seen]]
            assert type(held.batches[0][0]) is type(seen)


# ---- the arguments of create_batcher ----


def test_an_unknown_model_is_refused_with_the_wheels_message() -> None:
    with pytest.raises(ValueError, match=r"\AInvalid model: zzz\Z"):
        new_batcher(model="zzz")


@pytest.mark.parametrize("model", [None, 3, ["repr"], "", "Repr", b"repr"])
def test_a_model_that_is_not_a_known_name_is_refused(model: Any) -> None:
    with pytest.raises(ValueError, match=re.escape(f"Invalid model: {model}")):
        new_batcher(model=model)


@pytest.mark.parametrize(
    ("name", "value", "allowed"),
    [
        ("batch_size", 0, "from 1 to"),
        ("batch_size", -1, "from 1 to"),
        ("batch_size", 1.5, "an int"),
        ("batch_size", "8", "an int"),
        ("batch_size", None, "an int"),
        ("batch_size", True, "an int"),
        ("batch_size", 2**40, "from 1 to"),
        ("batch_timeout_s", -0.001, "seconds from 0"),
        ("batch_timeout_s", float("nan"), "seconds from 0"),
        ("batch_timeout_s", float("inf"), "seconds from 0"),
        ("batch_timeout_s", "1", "a number of seconds"),
        ("batch_timeout_s", None, "a number of seconds"),
        ("port", -1, "from 0 to 65535"),
        ("port", 65536, "from 0 to 65535"),
        ("port", "50051", "an int"),
        ("port", None, "an int"),
        ("num_threads", 0, "from 1 to"),
        ("num_threads", 2.0, "an int"),
        ("max_message_bytes", 0, "from 1 to"),
        ("max_message_bytes", 2**31, "from 1 to"),
        ("max_queue_size", 0, "from 1 to"),
        ("max_queue_size", "many", "an int"),
        ("max_queue_size", 7, "at least batch_size (8)"),
        ("max_queue_bytes", 0, "from 1 to"),
        ("max_queue_bytes", 1.5, "an int"),
        ("max_queue_bytes", None, "an int"),
        ("max_streams", 0, "from 1 to"),
        ("max_connection_age_s", 0, "above 0"),
        ("max_connection_age_s", -1, "from 0 to"),
        ("max_connection_age_s", "a day", "a number of seconds"),
        ("host", "", "an address"),
        ("host", None, "an address"),
        ("host", b"::1", "an address"),
    ],
)
def test_a_bad_argument_is_refused_with_its_value_and_what_is_allowed(name: str, value: Any, allowed: str) -> None:
    with pytest.raises((ValueError, TypeError)) as caught:
        new_batcher(**{name: value})
    assert str(caught.value).startswith(f"{name} is {value!r};")
    assert allowed in str(caught.value)


@pytest.mark.parametrize("callback", [None, 3, "echo", [echo]])
def test_a_callback_that_is_not_callable_is_refused_with_what_it_should_be(callback: Any) -> None:
    with pytest.raises(TypeError) as caught:
        new_batcher(batch_process_fn=callback)
    assert str(caught.value).startswith(f"batch_process_fn is {callback!r};")
    assert "a function that takes a list of requests" in str(caught.value)


def test_a_missing_callback_is_refused() -> None:
    with pytest.raises(TypeError, match="batch_process_fn is None"):
        create_batcher("repr", 8, 0.001)


@pytest.mark.parametrize(("batch_size", "capacity"), [(1, 8192), (4096, 8192), (4097, 8194), (2**20, 2**21)])
def test_by_default_the_larger_of_8192_requests_and_two_batches_may_wait(batch_size: int, capacity: int) -> None:
    assert new_batcher(batch_size=batch_size)._room.capacity == capacity
    assert new_batcher(batch_size=batch_size, max_queue_size=None)._room.capacity == capacity


def test_by_default_requests_of_a_gibibyte_may_wait() -> None:
    assert new_batcher()._room.capacity_bytes == 2**30


def test_the_limits_of_the_queue_may_be_as_low_as_one_batch_and_one_byte() -> None:
    room = new_batcher(batch_size=8, max_queue_size=8, max_queue_bytes=1)._room
    assert (room.capacity, room.capacity_bytes) == (8, 1)


def test_numpy_numbers_are_accepted_as_arguments() -> None:
    with (
        create_batcher("repr", np.int64(2), np.float32(0), np.int32(0), np.int16(4), echo, host="127.0.0.1") as batcher,
        connect(batcher) as client,
    ):
        assert client.send_request(b"x") == answer(b"x")


# ---- the life cycle ----


def test_a_batcher_is_ready_once_start_returns() -> None:
    batcher = new_batcher()
    assert batcher.is_server_ready() is False
    batcher.start()
    assert batcher.is_server_ready() is True
    batcher.shutdown()
    assert batcher.is_server_ready() is False


def test_a_batcher_can_be_started_only_once() -> None:
    with serving() as batcher, connect(batcher) as client:
        with pytest.raises(RuntimeError, match="already started"):
            batcher.start()
        assert client.send_request(b"x") == answer(b"x")


def test_a_batcher_cannot_be_started_after_a_shutdown() -> None:
    batcher = new_batcher()
    batcher.start()
    batcher.shutdown()
    with pytest.raises(RuntimeError, match="shut down"):
        batcher.start()


def test_a_batcher_may_be_shut_down_before_it_is_started_and_then_cannot_be() -> None:
    batcher = new_batcher()
    batcher.shutdown()
    assert batcher.is_server_ready() is False
    with pytest.raises(RuntimeError, match="shut down"):
        batcher.start()


def test_shutdown_may_be_called_again() -> None:
    batcher = new_batcher()
    batcher.start()
    for _ in range(3):
        batcher.shutdown()
    assert batcher.is_server_ready() is False


@pytest.mark.parametrize("grace_s", [-1, float("nan"), float("inf"), "1", None])
def test_a_bad_grace_period_is_refused_with_its_value_and_what_is_allowed(grace_s: Any) -> None:
    with serving() as batcher, connect(batcher) as client:
        with pytest.raises(ValueError, match=re.escape(f"grace_s is {grace_s!r}; it must be a number of seconds")):
            batcher.shutdown(grace_s)
        assert client.send_request(b"x") == answer(b"x")


def test_a_callback_may_shut_its_batcher_down_and_its_batch_is_still_answered() -> None:
    def answer_and_shut_down(requests: list[bytes]) -> Any:
        batcher.shutdown()
        return echo(requests)

    with serving(answer_and_shut_down) as batcher, connect(batcher) as client:
        assert client.send_request(b"the last") == answer(b"the last")
        batcher.shutdown(grace_s=60)  # returns when the one from the callback is done
        assert error_of(client.send_request, b"too late").code() is grpc.StatusCode.UNAVAILABLE


def test_two_threads_may_shut_down_at_once_and_both_wait_for_the_requests_taken_in() -> None:
    with Held() as held, serving(held) as batcher, connect(batcher) as client:
        request = in_callback(held, client, b"taken in")
        begin, released = threading.Barrier(2), threading.Event()

        def shut_down() -> bool:
            begin.wait()
            batcher.shutdown(grace_s=60)
            return released.is_set()

        shutdowns = [in_background(shut_down) for _ in range(2)]
        eventually(lambda: not batcher.is_server_ready())
        assert error_of(client.send_request, b"too late").code() is grpc.StatusCode.UNAVAILABLE
        released.set()
        held.release()
        assert request.result() == answer(b"taken in")
        assert [shutdown.result() for shutdown in shutdowns] == [True, True]


def test_a_second_shutdown_with_a_shorter_grace_returns_before_the_first() -> None:
    with Held() as held, serving(held) as batcher, connect(batcher) as client:
        request = in_callback(held, client, b"taken in")
        first = in_background(batcher.shutdown, grace_s=60)
        eventually(lambda: not batcher.is_server_ready())
        batcher.shutdown(grace_s=0)
        assert not first.done()
        held.release()
        first.result()
        assert request.result() == answer(b"taken in")


SIGNALLED_PROGRAM = """
    import signal
    import time

    from grpc_batcher import create_batcher

    def shut_down(*_):
        batcher.shutdown()
        print("shut down", flush=True)

    signal.signal(signal.SIGTERM, shut_down)
    batcher = create_batcher(
        "repr", 1, 0, port=0, batch_process_fn=lambda batch: [({"result": data}, 0) for data in batch]
    )
    batcher.start()
    print(batcher.port, flush=True)
    while batcher.is_server_ready():
        time.sleep(0.01)  # signal.pause() would miss a signal that comes just before it
    print("over", flush=True)
"""


def test_a_signal_handler_may_shut_the_batcher_down(tmp_path: Path) -> None:
    with (
        start_program(tmp_path, SIGNALLED_PROGRAM) as program,
        MukoeBatcherClient(f"127.0.0.1:{program.read_line()}") as client,
    ):
        assert client.send_request(b"x") == answer(b"x")
        program.send_signal(signal.SIGTERM)
        status, output, errors = finish_program(program)
    assert (status, output) == (0, "shut down\nover\n"), errors


INTERRUPTED_SHUTDOWN_PROGRAM = """
    import os
    import signal
    import threading
    import time

    from grpc_batcher import MukoeBatcherClient, create_batcher

    entered, release = threading.Event(), threading.Event()

    def answer(batch):
        entered.set()
        release.wait()
        return [({"result": data}, 0) for data in batch]

    def shut_down(*_):
        batcher.shutdown(grace_s=0)
        print("handler done", flush=True)
        release.set()

    def send_signal():
        while batcher.is_server_ready():
            time.sleep(0.001)
        os.kill(os.getpid(), signal.SIGTERM)

    signal.signal(signal.SIGTERM, shut_down)
    batcher = create_batcher("repr", 1, 0, port=0, batch_process_fn=answer)
    batcher.start()
    client = MukoeBatcherClient(f"127.0.0.1:{batcher.port}")
    request = threading.Thread(target=lambda: print(client.send_request(b"x"), flush=True))
    request.start()
    entered.wait()
    threading.Thread(target=send_signal).start()
    batcher.shutdown(grace_s=1000)
    request.join()
    print("over", flush=True)
"""


def test_a_signal_handler_may_call_shutdown_while_the_main_thread_does(tmp_path: Path) -> None:
    output = run_program(tmp_path, INTERRUPTED_SHUTDOWN_PROGRAM)
    assert output == ["handler done", "({'result': b'x'}, 0)", "over"]


def test_wait_until_ready_returns_once_another_thread_has_started_the_batcher() -> None:
    batcher = new_batcher()
    waits = [in_background(batcher.wait_until_ready), in_background(batcher.wait_until_ready, 1000.0)]
    batcher.start()
    for wait in waits:
        assert wait.result() is None
    assert batcher.wait_until_ready() is None
    assert batcher.wait_until_ready(timeout_s=0) is None
    batcher.shutdown()


def test_wait_until_ready_raises_when_it_times_out() -> None:
    batcher = new_batcher()
    with pytest.raises(TimeoutError, match=r"not ready after 0\.01 s"):
        batcher.wait_until_ready(timeout_s=0.01)
    batcher.start()
    batcher.wait_until_ready(timeout_s=0.01)
    batcher.shutdown()


def test_wait_until_ready_raises_if_the_batcher_is_shut_down() -> None:
    batcher = new_batcher()
    wait = in_background(batcher.wait_until_ready)
    batcher.shutdown()
    with pytest.raises(RuntimeError, match="shut down"):
        wait.result()
    with pytest.raises(RuntimeError, match="shut down"):
        batcher.wait_until_ready()


def test_a_with_statement_starts_and_shuts_down() -> None:
    with new_batcher() as batcher:
        assert batcher.is_server_ready()
        with connect(batcher) as client:
            assert client.send_request(b"x") == answer(b"x")
    assert not batcher.is_server_ready()


def test_a_with_statement_shuts_down_when_its_body_raises() -> None:
    with pytest.raises(ZeroDivisionError), new_batcher() as batcher:
        raise ZeroDivisionError
    assert not batcher.is_server_ready()


# ---- addresses ----


def test_port_0_lets_the_system_choose() -> None:
    batcher = new_batcher()
    assert batcher.port == 0
    batcher.start()
    assert 0 < batcher.port < 65536
    batcher.shutdown()


def test_a_batcher_listens_on_every_ipv4_interface_by_default() -> None:
    with (
        create_batcher("repr", 1, 0, port=0, batch_process_fn=echo) as batcher,
        MukoeBatcherClient(f"127.0.0.1:{batcher.port}") as client,
        MukoeBatcherClient(f"127.0.0.2:{batcher.port}") as another,
    ):
        assert client.send_request(b"x") == another.send_request(b"x") == answer(b"x")


def test_a_batcher_on_one_address_does_not_listen_on_another() -> None:
    with serving(host="127.0.0.1") as batcher, MukoeBatcherClient(f"127.0.0.2:{batcher.port}") as client:
        assert error_of(client.send_request, b"x").code() is grpc.StatusCode.UNAVAILABLE


@pytest.mark.skipif(not has_ipv6(), reason="this machine has no IPv6 loopback address")
@pytest.mark.parametrize("host", ["::1", "[::1]"])
def test_a_batcher_serves_on_ipv6(host: str) -> None:
    with serving(host=host) as batcher, MukoeBatcherClient(f"[::1]:{batcher.port}") as client:
        assert client.send_request(b"x") == answer(b"x")
        assert f"[::1]:{batcher.port}" in repr(batcher)


@pytest.mark.parametrize("first_host", ["127.0.0.1", "0.0.0.0"])
@pytest.mark.parametrize("second_host", ["127.0.0.1", "0.0.0.0"])
def test_two_batchers_never_share_a_port(first_host: str, second_host: str) -> None:
    with serving(host=first_host) as first, connect(first) as client:
        second = new_batcher(host=second_host, port=first.port)
        with pytest.raises(BindError, match=f"{second_host}:{first.port}"):
            second.start()
        assert client.send_request(b"x") == answer(b"x")


def test_a_batcher_never_shares_a_port_with_a_plain_grpc_server() -> None:
    with plain_server(lambda messages, context: messages) as address, pytest.raises(BindError):
        new_batcher(port=int(address.rpartition(":")[2])).start()
    with serving() as batcher:
        server = grpc.server(ThreadPoolExecutor(1))
        try:
            port = server.add_insecure_port(address_of(batcher))
        except RuntimeError:
            port = 0  # what older releases return
        assert port == 0
        server.stop(None).wait()


def test_a_batcher_whose_port_was_in_use_can_be_started_once_it_is_free() -> None:
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        port = other.getsockname()[1]
        batcher = new_batcher(port=port)
        for _ in range(2):
            with pytest.raises(BindError, match=f"127.0.0.1:{port}"):
                batcher.start()
        assert batcher.is_server_ready() is False
        assert "not started" in repr(batcher)
        assert batcher.port == port
        with pytest.raises(TimeoutError):
            batcher.wait_until_ready(timeout_s=0)
    with batcher, connect(batcher) as client:
        assert client.send_request(b"x") == answer(b"x")


def test_a_batcher_that_could_not_bind_may_be_shut_down() -> None:
    with serving() as first:
        second = new_batcher(port=first.port)
        with pytest.raises(OSError, match="cannot listen"):
            second.start()
        second.shutdown()
        with pytest.raises(RuntimeError, match="shut down"):
            second.start()


def test_an_address_of_another_machine_is_a_bind_error() -> None:
    with pytest.raises(BindError, match=r"192\.0\.2\.1"):
        new_batcher(host="192.0.2.1").start()


# ---- what a batcher says about itself ----


def test_the_repr_of_a_batcher_says_what_it_serves_where_and_its_state() -> None:
    batcher = new_batcher(model="dyna", batch_size=16, batch_timeout_s=0.005)
    assert repr(batcher) == "<MukoeBatcher 'dyna' on 127.0.0.1:0, batches of 16 within 0.005 s, not started>"
    batcher.start()
    begin = f"<MukoeBatcher 'dyna' on 127.0.0.1:{batcher.port}, batches of 16 within 0.005 s,"
    assert repr(batcher) == f"{begin} serving>"
    batcher.shutdown()
    assert repr(batcher) == f"{begin} shut down>"


def test_the_repr_of_a_client_says_its_address() -> None:
    assert repr(MukoeBatcherClient("somewhere:50051")) == "MukoeBatcherClient('somewhere:50051')"


def test_metrics_count_requests_by_outcome_and_batches_by_reason() -> None:
    with Held() as held, serving(held, batch_size=2) as batcher, connect(batcher) as client:
        before = batcher.metrics()
        assert (before.model, before.requests, before.batched_requests) == ("repr", {}, 0)
        assert before.batches == {"full": 0, "everyone_in": 0, "timeout": 0, "drain": 0}
        assert before.mean_batch_size is before.mean_waiting_ms is before.mean_end_to_end_ms is None

        requests = [in_callback(held, client, b"first")]
        requests += [waiting(batcher, client.send_request, data) for data in (b"second", b"third")]
        error_of(client.send_request, b"of the wrong kind", 3)
        eventually(lambda: batcher.metrics().open_streams == 3)  # the refused request's stream ends
        assert batcher.metrics().waiting == 2
        assert batcher.metrics().waiting_bytes == (4 + len(b"second")) + (4 + len(b"third"))
        assert batcher.metrics().requests == {"INVALID_ARGUMENT": 1}

        held.release(2)
        for request in requests:
            request.result()
        after = batcher.metrics()
        assert after.requests == {"OK": 3, "INVALID_ARGUMENT": 1}
        assert after.batches == {"full": 1, "everyone_in": 0, "timeout": 1, "drain": 0}
        assert (after.batched_requests, after.mean_batch_size) == (3, 1.5)
        assert (after.waiting, after.waiting_bytes) == (0, 0)
        client.close()
        eventually(lambda: batcher.metrics().open_streams == 0)


def test_batches_are_counted_under_drain_timeout_and_everyone_in() -> None:
    with Held() as held, serving(held, batch_timeout_s=1000.0) as batcher, connect(batcher) as client:
        held.release()
        stranger = waiting(batcher, client.send_request, b"first")  # a new caller's request waits for its window
        shutdown = in_background(batcher.shutdown, grace_s=60)
        assert stranger.result() == answer(b"first")
        shutdown.result()
        assert batcher.metrics().batches == {"full": 0, "everyone_in": 0, "timeout": 0, "drain": 1}
    with serving(batch_size=2, batch_timeout_s=0.01) as batcher, connect(batcher) as client:
        for data in (b"first", b"second"):
            client.send_request(data)
        # The second leaves early only if it came within a second of the first one's answer.
        batches = batcher.metrics().batches
        assert batches["timeout"] >= 1
        assert batches["timeout"] + batches["everyone_in"] == 2


def test_without_leave_early_every_batch_that_is_not_full_waits_for_its_window() -> None:
    with (
        serving(batch_size=2, batch_timeout_s=0.01, leave_early=False) as batcher,
        connect(batcher) as client,
    ):
        for number in range(10):
            client.send_request(b"%d" % number)
        assert batcher.metrics().batches == {"full": 0, "everyone_in": 0, "timeout": 10, "drain": 0}


def test_without_leave_early_a_full_batch_still_leaves_at_once() -> None:
    with (
        serving(batch_size=2, batch_timeout_s=1000.0, leave_early=False) as batcher,
        connect(batcher) as client,
    ):
        for _ in range(3):
            for request in [in_background(client.send_request, b"x") for _ in range(2)]:
                assert request.result() == answer(b"x")
        assert batcher.metrics().batches == {"full": 3, "everyone_in": 0, "timeout": 0, "drain": 0}


def test_metrics_are_immutable() -> None:
    with serving() as batcher, connect(batcher) as client:
        client.send_request(b"x")
        metrics = batcher.metrics()
        with pytest.raises(dataclasses.FrozenInstanceError):
            metrics.waiting = 3  # type: ignore[misc]
        with pytest.raises(TypeError):
            metrics.requests["OK"] = 3  # type: ignore[index]
        with pytest.raises(TypeError):
            metrics.batches["full"] = 3  # type: ignore[index]
        client.send_request(b"y")
        assert metrics.requests == {"OK": 1}
        assert batcher.metrics().requests == {"OK": 2}


def test_the_mean_durations_of_the_stages_fit_into_the_whole() -> None:
    with serving(batch_size=2, batch_timeout_s=0.02) as batcher, connect(batcher) as client:
        client.send_request(b"waits for its window, as a new caller's request does")
        metrics = batcher.metrics()
        assert metrics.mean_waiting_ms is not None
        assert metrics.mean_callback_ms is not None
        assert metrics.mean_encoding_ms is not None
        assert metrics.mean_end_to_end_ms is not None
        assert metrics.mean_waiting_ms >= 20
        assert metrics.mean_callback_ms > 0
        assert metrics.mean_encoding_ms > 0
        stages = metrics.mean_waiting_ms + metrics.mean_callback_ms + metrics.mean_encoding_ms
        assert metrics.mean_end_to_end_ms >= stages - 1e-6


def test_without_track_metrics_everything_is_counted_and_nothing_timed() -> None:
    with serving(track_metrics=False) as batcher, connect(batcher) as client:
        client.send_request(b"x")
        metrics = batcher.metrics()
        assert metrics.requests == {"OK": 1}
        assert metrics.mean_batch_size == 1
        times = (name for name in vars(metrics) if name.endswith("_ms"))
        assert {name: getattr(metrics, name) for name in times} == {
            "mean_waiting_ms": None,
            "mean_callback_ms": None,
            "mean_encoding_ms": None,
            "mean_end_to_end_ms": None,
            "waiting_percentiles_ms": None,
            "callback_percentiles_ms": None,
            "end_to_end_percentiles_ms": None,
        }


def test_the_summary_prints_counts_and_mean_durations_in_ms(capsys: pytest.CaptureFixture[str]) -> None:
    with serving() as batcher, connect(batcher) as client:
        client.send_request(b"x")
        client.send_request(b"y")
        assert batcher.print_batcher_summary() is None
    text = capsys.readouterr().out
    assert "'repr'" in text
    assert "2 OK" in text
    for reason in ("full", "everyone_in", "timeout", "drain"):
        assert re.search(rf"\d+ {reason}\b", text), text
    assert re.search(r"mean batch size: +1\.0", text), text
    for stage in ("waiting", "callback", "encoding", "end to end"):
        assert re.search(rf"{stage}: +\d+\.\d\d", text), text


def test_the_summary_says_if_durations_are_not_measured(capsys: pytest.CaptureFixture[str]) -> None:
    with serving(track_metrics=False) as batcher, connect(batcher) as client:
        client.send_request(b"x")
        batcher.print_batcher_summary()
    text = capsys.readouterr().out
    assert "1 OK" in text
    assert "track_metrics is False" in text
    assert "end to end" not in text


def test_the_summary_can_be_printed_before_any_request(capsys: pytest.CaptureFixture[str]) -> None:
    new_batcher().print_batcher_summary()
    assert "'repr'" in capsys.readouterr().out


# ---- what a client sends ----


@pytest.mark.parametrize(
    ("data", "received"),
    [
        pytest.param(b"bytes", b"bytes", id="bytes"),
        pytest.param("text: \u00e4\u20ac\U0001f642", "text: \u00e4\u20ac\U0001f642".encode(), id="str"),
        pytest.param(bytearray(b"array"), b"array", id="bytearray"),
        pytest.param(memoryview(b"0123456789")[2:7], b"23456", id="memoryview"),
        pytest.param(memoryview(b"0123456789")[::-2], b"97531", id="memoryview backwards"),
        pytest.param(np.arange(6, dtype=np.uint8), bytes(range(6)), id="numpy"),
        pytest.param(np.float64(1.5), np.float64(1.5).tobytes(), id="numpy number"),
        pytest.param(np.arange(6, dtype=np.uint8).reshape(2, 3).T, bytes([0, 3, 1, 4, 2, 5]), id="numpy transposed"),
        pytest.param(
            np.asfortranarray(np.arange(6, dtype=np.uint8).reshape(2, 3)), bytes(range(6)), id="numpy Fortran"
        ),
        pytest.param(np.arange(10, dtype=np.uint8)[1::3], bytes([1, 4, 7]), id="numpy strided"),
        pytest.param(np.arange(3, dtype="<f8"), np.arange(3, dtype="<f8").tobytes(), id="numpy float64"),
        pytest.param(b"", b"", id="no bytes"),
        pytest.param("", b"", id="no text"),
        pytest.param(bytearray(), b"", id="empty bytearray"),
        pytest.param(np.empty((0, 3)), b"", id="empty numpy"),
        pytest.param(bytes(range(256)) * 4000, bytes(range(256)) * 4000, id="a megabyte"),
    ],
)
def test_data_arrives_as_its_bytes(data: Any, received: bytes) -> None:
    for model, arguments in (("repr", (data,)), ("dyna", (data, 0))):
        with serving(model=model) as batcher, connect(batcher) as client:
            result = client.send_request(*arguments)
            assert result == answer(received)
            assert type(result[0]["result"]) is bytes


def test_data_may_be_changed_once_its_answer_has_arrived() -> None:
    with serving() as batcher, connect(batcher) as client:
        data = bytearray(b"first")
        first = client.send_request(data)
        data[:] = b"other"
        assert (first, client.send_request(data)) == (answer(b"first"), answer(b"other"))


@pytest.mark.parametrize("data", [3, 1.5, [1, 2], {"a": 1}, {1}], ids=repr)
def test_data_without_a_buffer_is_refused_before_anything_is_sent(data: Any) -> None:
    with serving() as batcher, connect(batcher) as client:
        with pytest.raises(TypeError, match=r"\Adata is ") as caught:
            client.send_request(data)
        assert type(data).__name__ in str(caught.value)
        assert batcher.metrics().open_streams == 0
        assert client.send_request(b"x") == answer(b"x")


@pytest.mark.parametrize("arguments", [(), (None,)])
def test_a_request_without_data_is_refused_before_anything_is_sent(arguments: tuple[None, ...]) -> None:
    with serving() as batcher, connect(batcher) as client:
        with pytest.raises(TypeError, match=r"^data is missing; a request needs it$"):
            client.send_request(*arguments)
        assert batcher.metrics().open_streams == 0
        assert client.send_request(b"x") == answer(b"x")


@pytest.mark.parametrize("action", [0, 1, -1, 2**31 - 1, -(2**31), np.int64(7), np.int32(-7), np.uint8(7)])
def test_every_int32_is_an_action(action: Any) -> None:
    with serving(model="dyna") as batcher, connect(batcher) as client:
        assert client.send_request(b"x", action) == answer(b"x", int(action))


@pytest.mark.parametrize("action", [2**31, -(2**31) - 1, 2**40, 2**100, np.int64(2**31)])
def test_an_action_outside_int32_is_refused_before_anything_is_sent(action: Any) -> None:
    with serving(model="dyna") as batcher, connect(batcher) as client:
        with pytest.raises(ValueError, match=r"\Aaction is ") as caught:
            client.send_request(b"x", action)
        assert str(int(action)) in str(caught.value)
        assert batcher.metrics().open_streams == 0


@pytest.mark.parametrize("action", ["3", 1.5, b"3", [3], object()])
def test_an_action_that_is_not_an_int_is_refused_before_anything_is_sent(action: Any) -> None:
    with serving(model="dyna") as batcher, connect(batcher) as client:
        with pytest.raises(TypeError, match=r"\Aaction is "):
            client.send_request(b"x", action)
        assert batcher.metrics().open_streams == 0


def test_an_argument_that_no_model_takes_is_refused_before_anything_is_sent() -> None:
    with serving() as batcher, connect(batcher) as client:
        with pytest.raises(TypeError, match="temperature"):
            client.send_request(b"x", temperature=0.5)
        assert batcher.metrics().open_streams == 0


@pytest.mark.parametrize("timeout_s", [0, -1, -0.5, float("nan"), float("inf"), "1", b"1", [1]])
def test_a_bad_time_limit_is_refused_before_anything_is_sent(timeout_s: Any) -> None:
    with serving() as batcher, connect(batcher) as client:
        with pytest.raises(ValueError, match=re.escape(f"timeout_s is {timeout_s!r}; it must be a number of seconds")):
            client.send_request(b"x", timeout_s=timeout_s)
        assert batcher.metrics().open_streams == 0


@pytest.mark.parametrize("timeout_s", [1000, 1e6, 1e10, 1e300, np.float64(1000), np.float32(1000), np.int64(1000)])
def test_a_request_may_have_any_time_limit_above_0(timeout_s: Any) -> None:
    with serving() as batcher, connect(batcher) as client:
        assert client.send_request(b"x", timeout_s=timeout_s) == answer(b"x")


def test_a_huge_time_limit_does_not_affect_other_time_limits() -> None:
    with Held() as held, serving(held) as batcher, connect(batcher) as client, connect(batcher) as another:
        long = in_callback(held, client, b"long", timeout_s=1e10)
        for _ in range(2):
            # One request that ends before its time limit, then one that does not.
            error_of(client.send_request, b"of the wrong kind", 3, timeout_s=0.05)
            for sender in (another, client):
                error = error_of(sender.send_request, b"short", timeout_s=0.1)
                assert error.code() is grpc.StatusCode.DEADLINE_EXCEEDED
        held.release()
        assert long.result() == answer(b"long")


@pytest.mark.parametrize("address", [None, "", 50051, b"localhost:50051"])
def test_a_server_address_that_is_not_text_is_refused(address: Any) -> None:
    with pytest.raises((ValueError, TypeError), match=re.escape(f"server_address is {address!r}; it must be")):
        MukoeBatcherClient(address)


@pytest.mark.parametrize("limit", [0, -1, 2**31, 1.5, "1", None])
def test_a_bad_max_message_bytes_is_refused_by_a_client(limit: Any) -> None:
    with pytest.raises((ValueError, TypeError), match=re.escape(f"max_message_bytes is {limit!r}; it must be")):
        MukoeBatcherClient("localhost:50051", max_message_bytes=limit)


@pytest.mark.parametrize("arguments", [{"credentials": "x"}, {"interceptors": [grpc.ServerInterceptor]}])
def test_credentials_and_interceptors_of_the_wrong_type_are_refused(arguments: Any) -> None:
    """A class instead of its instance would otherwise start, and then fail every request."""
    with pytest.raises(TypeError, match=next(iter(arguments))):
        create_batcher("repr", 1, 0, 0, batch_process_fn=echo, **arguments)
