"""A callback that warms up before the port is open: when, with what, and what becomes of a start that it fails."""

from __future__ import annotations

import logging
import signal
import socket
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from grpc_batcher import Array, Batch, BatcherError, BindError, MukoeBatcher, MukoeBatcherClient, create_batcher

import numpy as np
import pytest
from serving import (
    Held,
    connect,
    echo,
    error_of,
    eventually,
    finish_program,
    in_background,
    open_files,
    serving,
    start_program,
)
from test_arrays_served import DATA, NAMED, assert_equal, row


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def is_open(port: int) -> bool:
    try:
        socket.create_connection(("127.0.0.1", port)).close()
    except ConnectionRefusedError:
        return False
    return True


def created(callback: Any, **options: Any) -> MukoeBatcher:
    """Create a batcher whose callback warms up; it is not started."""
    arguments = {"port": 0, "host": "127.0.0.1", "arrays": DATA, "warm_up": True, **options}
    return create_batcher("repr", 8, 0, batch_process_fn=callback, **arguments)


def created_of_bytes(callback: Any, **options: Any) -> MukoeBatcher:
    return created(callback, **{"arrays": None, "warm_up": [b"a", b"b"], **options})


def batch_threads() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name == "grpc_batcher-batch"]


# ---- what the callback gets ----


def test_the_callback_gets_zeros_of_each_size_once_on_its_thread_before_the_port_is_open(
    caplog: pytest.LogCaptureFixture,
) -> None:
    caplog.set_level(logging.INFO, "grpc_batcher")
    port = free_port()
    calls = []

    def infer(batch: Batch) -> Any:
        calls.append((batch.size, batch.count, batch["data"].any(), batch["data"].shape, batch["data"].dtype))
        seen.append((threading.get_ident(), is_open(port)))
        return {"data": batch["data"]}, 7

    seen: list[tuple[int, bool]] = []
    with created(infer, port=port, batch_sizes=(8, 1, 4)) as batcher, connect(batcher, arrays=True) as client:
        assert calls == [(size, size, False, (size, 2, 3), np.float32) for size in (1, 4, 8)]
        metrics = batcher.metrics()
        assert (sum(metrics.batches.values()), metrics.batched_rows, metrics.padded_rows) == (0, 0, 0)
        assert metrics.requests == {}
        assert metrics.mean_callback_ms is None
        assert_equal(client.send_request(row(1)), {"data": row(1)}, step=7)
    threads, opened = zip(*seen, strict=True)
    assert len(set(threads)) == 1
    assert threads[0] != threading.get_ident()
    assert opened == (False, False, False, True)
    messages = [record.getMessage() for record in caplog.records if "warmed up" in record.getMessage()]
    assert [message.rpartition(" in ")[0] for message in messages] == [
        f"warmed up with {size} rows" for size in (1, 4, 8)
    ]


def test_a_callback_with_actions_or_named_arrays_gets_zeros_of_all() -> None:
    seen = []

    def infer(batch: Batch) -> Any:
        seen.append({name: (value.shape, value.dtype, value.any()) for name, value in batch.items()})
        return {}

    for model, declared in (("dyna", DATA), ("arrays", NAMED)):
        options: dict[str, Any] = {"arrays": declared, "batch_sizes": (8,), "warm_up": True, "host": "127.0.0.1"}
        with create_batcher(model, 8, 0, 0, batch_process_fn=infer, **options):
            pass
    assert seen == [
        {"data": ((8, 2, 3), np.float32, False), "action": ((8,), np.int32, False)},
        {"image": ((8, 4), np.uint8, False), "state": ((8,), np.float64, False)},
    ]


def test_the_callback_warms_up_with_the_weights_that_were_published() -> None:
    seen = []

    def infer(batch: Batch) -> Any:
        seen.append((batch.weights, batch.step))
        return dict(batch)

    batcher = created(infer, batch_sizes=(8,))
    batcher.publish("weights", step=3)
    with batcher:
        assert seen == [("weights", 3)]


def test_a_byte_callback_gets_the_given_requests_as_a_list_of_its_own() -> None:
    given = [b"a", b"b"]
    seen = []

    def infer(requests: list[bytes]) -> Any:
        seen.append(list(requests))
        results = echo(requests)
        requests.clear()
        return results

    with created_of_bytes(infer, warm_up=given) as batcher, connect(batcher) as client:
        assert batcher.metrics().requests == {}
        assert client.send_request(b"x") == ({"result": b"x"}, 0)
    assert seen == [[b"a", b"b"], [b"x"]]
    assert given == [b"a", b"b"]


def test_without_a_warm_up_the_callback_is_not_called() -> None:
    with Held() as held, serving(held), created(held, warm_up=False):
        assert held.batches == []


# ---- a warm-up that fails ----


def raise_first(error: BaseException) -> Any:
    """A callback that raises once."""
    errors = [error]

    def infer(batch: Batch) -> Any:
        if errors:
            raise errors.pop()
        return {"data": batch["data"]}

    return infer


@pytest.mark.parametrize("error", [ValueError("no memory on the GPU"), SystemExit(3), KeyboardInterrupt()])
def test_start_raises_what_the_callback_raises_leaves_nothing_open_and_may_be_called_again(
    error: BaseException,
) -> None:
    port = free_port()
    batcher = created(raise_first(error), port=port)
    threads, files = threading.active_count(), open_files()
    with pytest.raises(type(error)) as raised:
        batcher.start()
    assert raised.value is error
    assert not is_open(port)
    assert not batcher.is_server_ready()
    assert batch_threads() == []
    assert (threading.active_count(), open_files()) == (threads, files)
    assert "not started" in repr(batcher)
    with batcher, connect(batcher, arrays=True) as client:
        assert_equal(client.send_request(row(1)), {"data": row(1)})


def test_a_batcher_whose_warm_up_failed_may_be_shut_down() -> None:
    batcher = created(raise_first(ValueError("no")))
    with pytest.raises(ValueError, match="no"):
        batcher.start()
    batcher.shutdown()
    with pytest.raises(RuntimeError, match="was shut down"):
        batcher.start()


class Failing:
    def __array__(self, dtype: Any = None, copy: Any = None) -> Any:
        raise RuntimeError("the computation failed")


@pytest.mark.parametrize(
    ("result", "text", "cause"),
    [
        (None, "it must return a mapping from names to arrays, or a pair of that and a step", type(None)),
        ({"data": np.zeros((3, 2))}, "it must return a row for each of the batch's 8; 'data' is float64", type(None)),
        ({"data": Failing()}, "it returned 'data', which cannot be sent as an array: RuntimeError: the", RuntimeError),
        ({"\udc80": np.zeros(8)}, "it returned arrays that cannot be sent: 'utf-8' codec can't", UnicodeEncodeError),
    ],
)
def test_start_raises_if_the_callback_returns_what_cannot_be_sent(result: Any, text: str, cause: type) -> None:
    batcher = created(lambda batch: result, batch_sizes=(8,))
    with pytest.raises(BatcherError, match=f"^the callback cannot be warmed up: {text}") as raised:
        batcher.start()
    assert isinstance(raised.value.__cause__, cause)
    assert batch_threads() == []


@pytest.mark.parametrize(
    ("results", "text"),
    [
        (None, "it must return a list with one result per request; it returned a NoneType"),
        ([({}, 0)], "it must return one result per request; it returned 1 for 2"),
        ([({}, 0), ({"x": 1}, 0)], "it must have bytes for values; 'x' has a int: 1"),
        ([({}, 0), ({}, "3")], "it has a step that cannot be sent: step is a str: '3'; it must be an int"),
    ],
)
def test_start_raises_if_a_byte_callback_returns_what_cannot_be_sent(results: Any, text: str) -> None:
    with pytest.raises(BatcherError, match=f"^the callback cannot be warmed up: {text}"):
        created_of_bytes(lambda requests: results).start()


def test_start_raises_the_exception_that_a_byte_callback_returns_for_a_request() -> None:
    error = ValueError("this one")
    with pytest.raises(ValueError, match="this one") as raised:
        created_of_bytes(lambda requests: [({}, None), error]).start()
    assert raised.value is error


def test_an_address_that_is_taken_is_reported_before_the_warm_up() -> None:
    with Held() as held, serving() as other:
        with pytest.raises(BindError):
            created(held, port=other.port).start()
        assert held.batches == []


# ---- while it warms up ----


@pytest.fixture
def held() -> Iterator[Held]:
    with Held(lambda batch: dict(batch)) as held:
        yield held


def warming_up(held: Held, batcher: MukoeBatcher) -> Any:
    """Start a batcher in the background; return once its callback is warming up."""
    before = len(held.batches)
    start = in_background(batcher.start)
    eventually(lambda: len(held.batches) > before)
    return start


def test_a_batcher_that_warms_up_is_not_ready_and_cannot_be_started_twice(held: Held) -> None:
    batcher = created(held, batch_sizes=(8,))
    start = warming_up(held, batcher)
    assert not batcher.is_server_ready()
    with pytest.raises(RuntimeError, match="already started"):
        batcher.start()
    with pytest.raises(TimeoutError):
        batcher.wait_until_ready(0.01)
    ready = in_background(batcher.wait_until_ready)
    held.release()
    start.result()
    ready.result()
    assert batcher.is_server_ready()
    batcher.shutdown()


def test_a_shutdown_while_it_warms_up_returns_and_makes_start_raise(held: Held) -> None:
    port = free_port()
    batcher = created(held, port=port, batch_sizes=(8,))
    start = warming_up(held, batcher)
    batcher.shutdown()
    with pytest.raises(RuntimeError, match="was shut down while it started"):
        start.result()
    assert not is_open(port)
    held.release()
    eventually(lambda: batch_threads() == [])
    assert len(held.batches) == 1


def test_a_callback_may_shut_its_batcher_down_while_it_warms_up() -> None:
    def infer(batch: Batch) -> Any:
        batcher.shutdown()
        return dict(batch)

    batcher = created(infer)
    with pytest.raises(RuntimeError, match="was shut down while it started"):
        batcher.start()
    eventually(lambda: batch_threads() == [])


def test_a_start_that_was_interrupted_may_be_repeated_and_never_runs_the_callback_on_two_threads() -> None:
    """Ctrl-C leaves the warm-up on its thread; the next start waits for it."""
    running, most, calls = [0], [0], [0]
    may_go_on = threading.Event()

    def infer(batch: Batch) -> Any:
        running[0] += 1
        calls[0] += 1
        most[0] = max(most[0], running[0])
        if calls[0] == 1:
            signal.raise_signal(signal.SIGINT)  # as Python does, on the main thread
        may_go_on.wait()
        running[0] -= 1
        return dict(batch)

    batcher = created(infer, batch_sizes=(8,))
    with pytest.raises(KeyboardInterrupt):
        batcher.start()
    assert calls == [1]
    assert not batcher.is_server_ready()
    threading.Timer(0, lambda: (eventually(lambda: len(batch_threads()) == 2), may_go_on.set())).start()
    with batcher, connect(batcher, arrays=True) as client:
        assert len(batch_threads()) == 1
        assert_equal(client.send_request(row(1)), {"data": row(1)})
    assert most == [1]
    assert calls == [3]


# ---- programs ----

PROGRAM = """
    import signal, sys, threading
    from grpc_batcher import Array, create_batcher

    def infer(batch):
        print("warms up", flush=True)
        threading.Event().wait()

    batcher = create_batcher("repr", 1, 0, 0, batch_process_fn=infer, host="127.0.0.1", warm_up=True,
                             arrays={"data": Array((2,), "uint8")})
    if "shutdown" in sys.argv:
        signal.signal(signal.SIGTERM, lambda *_: batcher.shutdown())
        try:
            batcher.start()
        except RuntimeError as error:
            print(error)
    else:
        batcher.serve_forever()
        print("over", batcher.is_server_ready())
"""


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT], ids=lambda number: number.name)
def test_a_signal_ends_serve_forever_while_the_callback_warms_up(number: int, tmp_path: Path) -> None:
    with start_program(tmp_path, PROGRAM) as program:
        assert program.read_line() == "warms up"
        program.send_signal(number)
        assert finish_program(program) == (0, "over False\n", "")


def test_a_signal_handler_may_shut_the_batcher_down_while_it_warms_up(tmp_path: Path) -> None:
    with start_program(tmp_path, PROGRAM, "shutdown") as program:
        assert program.read_line() == "warms up"
        program.send_signal(signal.SIGTERM)
        assert finish_program(program) == (0, "this batcher was shut down while it started\n", "")


def test_ctrl_c_ends_a_program_in_start_while_the_callback_warms_up(tmp_path: Path) -> None:
    with start_program(tmp_path, PROGRAM, "shutdown") as program:
        assert program.read_line() == "warms up"
        program.send_signal(signal.SIGINT)
        status, output, errors = finish_program(program)
    assert (status, output) == (-signal.SIGINT, "")
    assert errors.endswith("KeyboardInterrupt\n")


def test_a_client_that_waits_for_its_server_is_served_once_it_is_warm(held: Held) -> None:
    port = free_port()
    batcher = created(held, port=port, arrays={"data": Array((), "int8")}, batch_sizes=(8,))
    start = warming_up(held, batcher)
    with MukoeBatcherClient(f"127.0.0.1:{port}", arrays=True) as client:
        assert error_of(client.send_request, np.int8(5)).code().name == "UNAVAILABLE"
        held.release(2)
        start.result()
        eventually(lambda: is_served(client))
    batcher.shutdown()


def is_served(client: MukoeBatcherClient) -> bool:
    try:
        return client.send_request(np.int8(5))[0]["data"] == 5
    except Exception:
        return False
