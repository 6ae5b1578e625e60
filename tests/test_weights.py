"""`publish` and `between_batches`: what callbacks and callers see of them, and when."""

from __future__ import annotations

import threading
import weakref
from collections.abc import Iterator
from concurrent.futures import CancelledError, Future
from contextlib import suppress
from typing import Any

from grpc_batcher import Batch, MukoeBatcher, create_batcher

import grpc
import numpy as np
import pytest
from prometheus_client import CollectorRegistry
from serving import Held, connect, echo, error_of, eventually, in_background, in_callback, serving, waiting
from test_arrays_served import DATA, row


@pytest.fixture
def batcher() -> Iterator[MukoeBatcher]:
    """A batcher of bytes that is not started."""
    batcher = create_batcher("repr", 4, 0, 0, batch_process_fn=with_the_published_step, host="127.0.0.1")
    yield batcher
    batcher.shutdown(grace_s=0)


def with_the_published_step(requests: list[bytes]) -> Any:
    return [({"result": data}, None) for data in requests]


# ---- publish ----


def test_a_callback_sees_what_was_published_last_and_its_answers_have_that_step() -> None:
    seen = []

    def infer(batch: Batch) -> Any:
        seen.append((batch.weights, batch.step))
        return dict(batch)

    with (
        Held(infer) as held,
        serving(held, arrays=DATA) as batcher,
        connect(batcher, arrays=True) as client,
    ):
        first = in_callback(held, client, row(0))
        batcher.publish({"w": 1}, step=5)
        second = waiting(batcher, client.send_request, row(0))
        held.release(2)
        # The first batch was taken before.
        assert (first.result()[1], second.result()[1]) == (0, 5)
        held.release(float("inf"))
        batcher.publish(None, step=-1)
        assert client.send_request(row(0))[1] == -1
    assert seen == [(None, 0), ({"w": 1}, 5), (None, -1)]


def test_weights_may_be_published_before_the_start(batcher: MukoeBatcher) -> None:
    batcher.publish("weights", step=np.int64(8))
    batcher.start()
    with connect(batcher) as client:
        assert client.send_request(b"x") == ({"result": b"x"}, 8)


def test_none_for_a_step_of_a_byte_callback_stands_for_the_published_one() -> None:
    steps = [None, 3, 0, None]
    with (
        serving(lambda requests: [({}, steps.pop(0)) for _ in requests]) as batcher,
        connect(batcher) as client,
    ):
        assert client.send_request(b"before") == ({}, 0)
        batcher.publish("weights", step=9)
        assert [client.send_request(b"x")[1] for _ in range(3)] == [3, 0, 9]


@pytest.mark.parametrize(
    ("step", "error"),
    [("3", TypeError), (None, TypeError), (1.0, TypeError), (2**31, ValueError), (-(2**31) - 1, ValueError)],
)
def test_a_step_that_cannot_be_sent_is_refused_and_changes_nothing(
    step: Any, error: type[Exception], batcher: MukoeBatcher
) -> None:
    batcher.publish("old", step=1)
    with pytest.raises(error, match=r"^step is "):
        batcher.publish("new", step=step)
    assert batcher.metrics().step == 1


def test_weights_that_were_replaced_are_let_go() -> None:
    class Weights:
        pass

    with serving(lambda batch: dict(batch), arrays=DATA) as batcher, connect(batcher, arrays=True) as client:
        old = Weights()
        is_alive = weakref.ref(old)
        batcher.publish(old, step=1)
        client.send_request(row(0))
        del old
        batcher.publish(Weights(), step=2)
        eventually(lambda: is_alive() is None)


def test_no_batch_mixes_two_versions_while_weights_are_published_all_the_time() -> None:
    """Weights that equal their step, checked before and after the callback lets other threads run."""
    over = threading.Event()

    def publish() -> int:
        step = 0
        while not over.is_set():
            step += 1
            batcher.publish(step, step=step)
        return step

    mixed = []

    def infer(batch: Batch) -> Any:
        before = batch.weights, batch.step
        threading.Event().wait(0.001)
        mixed.extend({*before, batch.weights, batch.step} - {batch.step})
        return {"step": np.full(batch.size, batch.step)}

    with serving(infer, arrays=DATA, batch_timeout_s=0.001) as batcher, connect(batcher, arrays=True) as client:
        publisher = in_background(publish)
        eventually(lambda: batcher.metrics().step)

        def ask() -> list[int]:
            steps = []
            for _ in range(50):
                answer, step = client.send_request(row(0))
                assert answer["step"] == step
                steps.append(step)
            return steps

        for caller in [in_background(ask) for _ in range(4)]:
            steps = caller.result()
            assert steps == sorted(steps)
            assert len(set(steps)) > 1
        over.set()
        publisher.result()
    assert mixed == []


def test_the_step_and_its_age_are_in_the_metrics_once_something_was_published(
    batcher: MukoeBatcher, capsys: pytest.CaptureFixture[str]
) -> None:
    from grpc_batcher.prometheus import BatcherCollector

    registry = CollectorRegistry()
    registry.register(BatcherCollector(batcher))
    labels = {"model": "repr", "port": "0"}

    def scraped() -> list[float | None]:
        names = ("grpc_batcher_step", "grpc_batcher_step_age_seconds")
        return [registry.get_sample_value(name, labels) for name in names]

    assert (batcher.metrics().step, batcher.metrics().step_age_s) == (None, None)
    assert scraped() == [None, None]
    batcher.print_batcher_summary()
    assert "step" not in capsys.readouterr().out
    batcher.publish("weights", step=0)
    assert batcher.metrics().step == 0
    age_s = batcher.metrics().step_age_s
    assert age_s is not None
    assert age_s >= 0
    step, scraped_age_s = scraped()
    assert step == 0
    assert scraped_age_s is not None
    assert scraped_age_s >= age_s
    batcher.print_batcher_summary()
    assert "step:             0, published 0." in capsys.readouterr().out


# ---- between_batches ----


def name_of_thread() -> str:
    return threading.current_thread().name


def test_a_function_between_batches_runs_on_the_batch_thread_of_an_idle_batcher() -> None:
    names = []

    def infer(requests: list[bytes]) -> Any:
        names.append(name_of_thread())
        return echo(requests)

    with serving(infer) as batcher, connect(batcher) as client:
        client.send_request(b"x")
        assert in_background(lambda: batcher.between_batches(name_of_thread).result()).result() == names[0]
        assert batcher.metrics().batches == {"full": 0, "everyone_in": 0, "timeout": 1, "drain": 0}


def test_a_function_waits_for_the_batch_in_the_callback_and_precedes_the_next() -> None:
    events: list[Any] = []

    def infer(requests: list[bytes]) -> Any:
        events.extend(requests)
        return echo(requests)

    with Held(infer) as held, serving(held, batch_size=1) as batcher, connect(batcher) as client:
        first = in_callback(held, client, b"first")
        second = waiting(batcher, client.send_request, b"second")
        futures = [batcher.between_batches(lambda number=number: events.append(number)) for number in range(3)]
        assert not any(future.running() or future.done() for future in futures)
        held.release(2)
        for future in futures:
            assert future.result() is None
        first.result()
        second.result()
    assert events == [b"first", 0, 1, 2, b"second"]


def test_a_request_sent_after_the_call_is_answered_after_the_function() -> None:
    loaded = [0]

    def load(number: int) -> None:
        loaded[0] = number

    with (
        serving(lambda requests: [({}, loaded[0]) for _ in requests]) as batcher,
        connect(batcher) as client,
    ):
        for number in range(100):
            batcher.between_batches(lambda number=number: load(number))
            assert client.send_request(b"x") == ({}, number)


def test_functions_run_while_there_is_always_a_batch_due() -> None:
    over = threading.Event()

    def ask() -> None:
        while not over.is_set():
            client.send_request(b"x")

    with serving(batch_size=1) as batcher, connect(batcher) as client:
        callers = [in_background(ask) for _ in range(8)]
        eventually(lambda: batcher.metrics().batched_requests > 10)
        for number in range(100):
            assert batcher.between_batches(lambda number=number: number).result() == number
        over.set()
        for caller in callers:
            caller.result()


def test_a_function_that_asks_for_its_next_call_leaves_time_for_batches() -> None:
    """It is called with every batch, and not in between."""
    calls: list[int] = []
    futures: list[Future[None]] = []

    def again() -> None:
        calls.append(batcher.metrics().batched_requests)
        futures.append(batcher.between_batches(again))

    with serving() as batcher, connect(batcher) as client:
        batcher.between_batches(again).result()
        for number in range(1, 6):
            client.send_request(b"x")
            eventually(lambda number=number: len(calls) == 2 * number + 1)  # before and after the batch
    assert calls == [0, 1, 1, 2, 2, 3, 3, 4, 4, 5, 5]
    eventually(futures[-1].done)
    assert futures[-1].cancelled()


def test_functions_that_are_asked_for_all_the_time_leave_time_for_batches_and_for_the_shutdown() -> None:
    def keep_asking() -> None:
        with suppress(RuntimeError, CancelledError):
            while True:
                batcher.between_batches(lambda: None).result()

    with serving() as batcher, connect(batcher) as client:
        askers = [in_background(keep_asking) for _ in range(2)]
        for _ in range(20):
            client.send_request(b"x")
        batcher.shutdown(grace_s=1e6)
        for asker in askers:
            asker.result()


def test_a_callback_may_ask_for_a_function_which_runs_right_after_its_batch() -> None:
    events = []

    def infer(requests: list[bytes]) -> Any:
        batcher.between_batches(lambda: events.append("between"))
        events.append("batch")
        return echo(requests)

    with serving(infer) as batcher, connect(batcher) as client:
        for _ in range(3):
            client.send_request(b"x")
        eventually(lambda: len(events) == 6)
    assert events == ["batch", "between"] * 3


@pytest.mark.parametrize("error", [ValueError("no"), SystemExit(3), KeyboardInterrupt()])
def test_what_a_function_raises_is_in_its_future_and_nowhere_else(
    error: BaseException, caplog: pytest.LogCaptureFixture
) -> None:
    def fail() -> None:
        raise error

    with serving() as batcher, connect(batcher) as client:
        assert batcher.between_batches(fail).exception() is error
        assert client.send_request(b"x") == ({"result": b"x"}, 0)
        assert batcher.between_batches(lambda: 5).result() == 5
    assert caplog.records == []


def test_a_function_that_was_cancelled_in_time_is_not_called() -> None:
    called = []
    with Held() as held, serving(held) as batcher, connect(batcher) as client:
        first = in_callback(held, client, b"x")
        cancelled = batcher.between_batches(lambda: called.append(1))
        other = batcher.between_batches(lambda: called.append(2))
        assert cancelled.cancel()
        held.release()
        other.result()
        first.result()
    assert called == [2]


def test_what_is_asked_for_before_the_start_is_called_before_the_warm_up() -> None:
    events: list[Any] = []

    def infer(requests: list[bytes]) -> Any:
        events.append(requests)
        return echo(requests)

    batcher = create_batcher("repr", 4, 0, 0, batch_process_fn=infer, host="127.0.0.1", warm_up=[b"warm"])
    future = batcher.between_batches(lambda: events.append(name_of_thread()))
    assert not future.done()
    with batcher:
        assert future.done()
    assert events == ["grpc_batcher-batch", [b"warm"]]


def test_a_function_asked_for_by_a_warm_up_is_called_before_the_first_batch() -> None:
    events: list[Any] = []

    def infer(requests: list[bytes]) -> Any:
        if requests == [b"warm"]:
            batcher.between_batches(lambda: events.append("between"))
        events.extend(requests)
        return echo(requests)

    batcher = create_batcher("repr", 4, 0, 0, batch_process_fn=infer, host="127.0.0.1", warm_up=[b"warm"])
    with batcher, connect(batcher) as client:
        client.send_request(b"x")
    assert events == [b"warm", "between", b"x"]


def test_a_shutdown_cancels_what_was_asked_for_before_a_start(batcher: MukoeBatcher) -> None:
    future = batcher.between_batches(lambda: None)
    batcher.shutdown()
    with pytest.raises(CancelledError):
        future.result()
    with pytest.raises(RuntimeError, match="this batcher was shut down"):
        batcher.between_batches(lambda: None)


def test_a_shutdown_cancels_what_waits_for_a_callback_that_outlives_the_grace_period() -> None:
    with Held() as held, serving(held) as batcher, connect(batcher) as client:
        request = in_callback(held, client, b"x")
        future = batcher.between_batches(lambda: None)
        batcher.shutdown(grace_s=0)
        with pytest.raises(CancelledError):
            future.result()
        with pytest.raises(RuntimeError, match="this batcher was shut down"):
            batcher.between_batches(lambda: None)
        assert error_of(request.result).code() is grpc.StatusCode.UNAVAILABLE


def test_every_function_ends_while_the_batcher_shuts_down() -> None:
    """Called, cancelled or refused: no future is left pending."""
    for _ in range(20):
        futures: list[Future[int]] = []

        def keep_asking(batcher: MukoeBatcher, futures: list[Future[int]] = futures) -> None:
            with suppress(RuntimeError, CancelledError):
                while True:
                    futures.append(batcher.between_batches(lambda: 1))
                    futures[-1].result()

        with serving() as batcher:
            askers = [in_background(keep_asking, batcher) for _ in range(3)]
            eventually(lambda futures=futures: len(futures) > 20)
            batcher.shutdown()
            for asker in askers:
                asker.result()
        for future in futures:
            assert future.cancelled() or future.result() == 1


def test_a_function_may_shut_the_batcher_down() -> None:
    with serving() as batcher:
        batcher.between_batches(batcher.shutdown).result()
        eventually(lambda: not batcher.is_server_ready())


def test_what_a_function_returned_is_not_kept_by_an_idle_batcher() -> None:
    class Thing:
        pass

    with serving() as batcher:
        is_alive = weakref.ref(batcher.between_batches(Thing).result())
        eventually(lambda: is_alive() is None)
