"""Many requests in flight from one thread: futures, batches of requests, and asyncio."""

from __future__ import annotations

import asyncio
import concurrent.futures
import gc
import logging
import pickle
import threading
import weakref
from collections import deque
from collections.abc import Callable, Coroutine, Iterator
from pathlib import Path
from typing import Any

from grpc_batcher import Array, AsyncMukoeBatcherClient, MukoeBatcherClient, RequestError
from grpc_batcher._client.stream_pool import StreamPool

import grpc
import pytest
from conftest import Certificates
from serving import (
    Held,
    address_of,
    answer,
    connect,
    echo,
    error_of,
    eventually,
    in_background,
    plain_server,
    run_program,
    serving,
)

CANCELLED, DEADLINE_EXCEEDED = grpc.StatusCode.CANCELLED, grpc.StatusCode.DEADLINE_EXCEEDED
INVALID_ARGUMENT, UNAVAILABLE = grpc.StatusCode.INVALID_ARGUMENT, grpc.StatusCode.UNAVAILABLE


def connect_async(batcher: Any, **options: Any) -> AsyncMukoeBatcherClient:
    return AsyncMukoeBatcherClient(address_of(batcher), **options)


class PassOn(grpc.StreamStreamClientInterceptor):  # type: ignore[misc]
    def intercept_stream_stream(self, continuation: Callable[..., Any], details: Any, messages: Any) -> Any:
        return continuation(details, messages)


# ---- futures ----


def test_a_future_has_the_answer_that_send_request_would_return() -> None:
    with serving(model="dyna") as batcher, connect(batcher) as client:
        assert client.submit(b"x", 3).result() == answer(b"x", 3)
        assert client.submit(data="text", action=4).result() == answer(b"text", 4)


def test_each_future_gets_its_own_answer() -> None:
    with serving(batch_timeout_s=0.001) as batcher, connect(batcher) as client:
        futures = {client.submit(b"%d" % number): number for number in range(1000)}
        for future in concurrent.futures.as_completed(futures):
            assert future.result() == answer(b"%d" % futures[future])
        assert batcher.metrics().requests == {"OK": 1000}


def test_a_future_has_the_error_that_send_request_would_raise() -> None:
    with serving() as batcher, connect(batcher) as client:
        assert error_of(client.submit(b"x", 3).result).code() is INVALID_ARGUMENT
        with pytest.raises(TypeError):
            client.submit(3.5)
        with pytest.raises(ValueError, match="timeout_s"):
            client.submit(b"x", timeout_s=-1)
        assert client.submit(b"x").result() == answer(b"x")


def test_cancelling_a_future_withdraws_a_request_that_waits() -> None:
    with Held() as held, serving(held) as batcher, connect(batcher) as client:
        first = client.submit(b"in the callback")
        eventually(lambda: held.batches)
        second = client.submit(b"waits")
        eventually(lambda: batcher.metrics().waiting == 1)
        assert second.cancel()
        assert second.cancelled()
        assert concurrent.futures.wait([second]).done == {second}
        eventually(lambda: batcher.metrics().waiting == 0)
        held.release(2)
        assert first.result() == answer(b"in the callback")
        assert client.submit(b"next").result() == answer(b"next")
        assert held.batches == [[b"in the callback"], [b"next"]]


def test_cancelling_a_future_whose_request_is_in_the_callback_drops_its_answer() -> None:
    with Held() as held, serving(held) as batcher, connect(batcher) as client:
        future = client.submit(b"x")
        eventually(lambda: held.batches)
        assert future.cancel()
        held.release(2)
        assert client.submit(b"y").result() == answer(b"y")
        assert held.batches == [[b"x"], [b"y"]]
        with pytest.raises(concurrent.futures.CancelledError):
            future.result()


def test_a_future_that_is_done_cannot_be_cancelled_and_the_stream_goes_on() -> None:
    with serving() as batcher, connect(batcher) as client:
        for _ in range(50):
            future = client.submit(b"x")
            future.result()
            assert not future.cancel()
        assert batcher.metrics().requests == {"OK": 50}
        assert batcher.metrics().open_streams == 1


def test_a_callback_of_a_future_may_submit_even_at_the_limit() -> None:
    results: list[Any] = []
    over = threading.Event()

    def go_on(future: concurrent.futures.Future[Any]) -> None:
        results.append(future.result())
        if len(results) < 100:
            client.submit(b"%d" % len(results)).add_done_callback(go_on)
        else:
            over.set()

    with serving() as batcher, connect(batcher, max_in_flight=1) as client:
        client.submit(b"0").add_done_callback(go_on)
        over.wait()
        assert results == [answer(b"%d" % number) for number in range(100)]


class Unloggable(logging.Handler):
    """A log handler that raises, as few do."""

    def emit(self, record: logging.LogRecord) -> None:
        raise SystemExit(f"cannot log {record.getMessage()}")


# Each is received by one thread per client on the direct transport, and by one per stream on the public one.
@pytest.mark.parametrize("options", [{}, {"interceptors": [PassOn()]}], ids=["plain", "intercepted"])
@pytest.mark.parametrize("is_log_broken", [False, True], ids=["", "log is broken"])
def test_whatever_a_callback_of_a_future_raises_the_client_goes_on(options: Any, is_log_broken: bool) -> None:
    def fail(_: object) -> None:
        raise (ValueError if is_log_broken else SystemExit)("in the callback")

    handler = Unloggable() if is_log_broken else logging.NullHandler()
    loggers = logging.getLogger("grpc_batcher"), logging.getLogger("concurrent.futures")
    with Held() as held, serving(held, batch_size=1) as batcher, connect(batcher, **options) as client:
        futures = [client.submit(b"%d" % number) for number in range(2)]
        futures[0].add_done_callback(fail)
        for logger in loggers:
            logger.addHandler(handler)
        try:
            held.release(float("inf"))
            assert [future.result() for future in futures] == [answer(b"0"), answer(b"1")]
            for number in range(3):
                assert client.submit(b"%d" % number).result() == answer(b"%d" % number)
        finally:
            for logger in loggers:
                logger.removeHandler(handler)


def test_a_callback_that_raises_system_exit_does_not_keep_a_cancelled_request_waiting() -> None:
    def fail(_: object) -> None:
        raise SystemExit(1)

    with Held() as held, serving(held, batch_size=1) as batcher, connect(batcher) as client:
        first = client.submit(b"in the callback")
        eventually(lambda: held.batches)
        second = client.submit(b"waits")
        eventually(lambda: batcher.metrics().waiting == 1)
        second.add_done_callback(fail)
        with pytest.raises(SystemExit):
            second.cancel()
        eventually(lambda: batcher.metrics().waiting == 0)
        held.release()
        assert first.result() == answer(b"in the callback")


def test_a_stream_that_was_cancelled_just_as_its_answer_came_takes_no_other_request(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    is_kept: list[bool] = []
    give_back = StreamPool.give_back

    def cancel_and_give_back(pool: StreamPool, loan: Any) -> None:
        pool.cancel(loan, loan.requests)
        give_back(pool, loan)
        is_kept.append(loan in pool._idle_pooled)

    with serving() as batcher, connect(batcher) as client:
        with monkeypatch.context() as patch:
            patch.setattr(StreamPool, "give_back", cancel_and_give_back)
            assert client.submit(b"x").result() == answer(b"x")
        assert is_kept == [False]
        assert client.submit(b"y").result() == answer(b"y")


def test_send_many_in_a_callback_of_a_future_raises_instead_of_waiting_for_itself() -> None:
    raised: concurrent.futures.Future[Any] = concurrent.futures.Future()

    def send_many(_: object) -> None:
        try:
            raised.set_result(client.send_many([b"y"]))
        except RuntimeError as error:
            raised.set_exception(error)

    with Held() as held, serving(held) as batcher, connect(batcher) as client:
        client.submit(b"x").add_done_callback(send_many)
        held.release(2)
        assert "use submit" in str(raised.exception())


def test_a_time_limit_ends_a_future() -> None:
    with Held() as held, serving(held) as batcher, connect(batcher) as client:
        patient = client.submit(b"patient", timeout_s=1000)
        eventually(lambda: held.batches)
        assert error_of(client.submit(b"late", timeout_s=0.05).result).code() is DEADLINE_EXCEEDED
        held.release()
        assert patient.result() == answer(b"patient")


# ---- the limit ----


def test_submit_blocks_while_as_many_as_allowed_are_on_their_way() -> None:
    with Held() as held, serving(held, batch_size=1) as batcher, connect(batcher, max_in_flight=2) as client:
        futures = [client.submit(b"0"), client.submit(b"1")]
        blocked = in_background(client.submit, b"2")
        eventually(lambda: held.batches and batcher.metrics().waiting == 1)
        late = client.submit(b"late", timeout_s=0.05)
        assert error_of(late.result).code() is DEADLINE_EXCEEDED
        assert "max_in_flight" in error_of(late.result).details()
        assert not blocked.done()
        held.release()
        futures.append(blocked.result())
        held.release(2)
        assert [future.result() for future in futures] == [answer(b"%d" % number) for number in range(3)]


def test_a_cancelled_future_frees_its_place() -> None:
    with Held() as held, serving(held, batch_size=1) as batcher, connect(batcher, max_in_flight=1) as client:
        first = client.submit(b"first")
        eventually(lambda: held.batches)
        blocked = in_background(client.submit, b"second")
        first.cancel()
        held.release(2)
        assert blocked.result().result() == answer(b"second")


@pytest.mark.parametrize("limit", [0, -1, 1.5, None])
def test_a_limit_that_makes_no_sense_is_refused(limit: Any) -> None:
    with pytest.raises(ValueError, match="max_in_flight"):
        MukoeBatcherClient("localhost:1", max_in_flight=limit)


def test_waiting_coroutines_get_places_in_the_order_they_asked() -> None:
    async def ask() -> list[Any]:
        async with connect_async(batcher, max_in_flight=1) as client:
            return await asyncio.gather(*(client.send_request(b"%d" % number) for number in range(20)))

    seen: list[bytes] = []

    def note(requests: list[bytes]) -> list[Any]:
        seen.extend(requests)
        return echo(requests)

    with serving(note) as batcher:
        assert asyncio.run(ask()) == [answer(b"%d" % number) for number in range(20)]
    assert seen == [b"%d" % number for number in range(20)]


# ---- many at once ----


def test_send_many_returns_the_answers_in_order() -> None:
    with serving(model="dyna", batch_timeout_s=0.001) as batcher, connect(batcher, max_in_flight=7) as client:
        requests = [(b"%d" % number, number) for number in range(100)]
        assert client.send_many(requests) == [answer(*request) for request in requests]
        assert client.send_many(iter([{"action": 1, "rows": False, "data": b"named"}])) == [answer(b"named", 1)]
        assert client.send_many([]) == []


def test_send_many_raises_the_first_error_after_all_have_ended() -> None:
    def fail_some(requests: list[bytes]) -> list[Any]:
        return [ValueError(data.decode()) if data.startswith(b"bad") else echo([data])[0] for data in requests]

    with serving(fail_some) as batcher, connect(batcher) as client:
        error = error_of(client.send_many, [b"good", b"bad 1", b"bad 2", b"good"])
        assert "bad 1" in error.details()
        assert batcher.metrics().requests == {"OK": 2, "INTERNAL": 2}


def test_send_many_puts_errors_in_their_places_if_asked() -> None:
    with serving() as batcher, connect(batcher) as client:
        ends = client.send_many([b"a", (b"b", 1), 3.5, (b"c", 1, 2), {"data": b"d"}], return_exceptions=True)
        assert ends[0] == answer(b"a")
        assert isinstance(ends[1], RequestError)
        assert [type(end) for end in ends[2:4]] == [TypeError, TypeError]
        assert ends[4] == answer(b"d")


def test_the_time_limit_of_send_many_is_for_all_of_them() -> None:
    with Held() as held, serving(held, batch_size=1) as batcher, connect(batcher, max_in_flight=2) as client:
        ends = client.send_many([b"a", b"b", b"c"], timeout_s=0.1, return_exceptions=True)
        assert [end.code() for end in ends if isinstance(end, RequestError)] == [DEADLINE_EXCEEDED] * 3


# ---- the window ----


def test_requests_that_one_thread_sends_at_once_leave_as_one_full_batch() -> None:
    with serving(batch_size=64, batch_timeout_s=1000.0) as batcher, connect(batcher) as client:
        for _ in range(5):
            client.send_many([b"x"] * 64)
        assert batcher.metrics().batches == {"full": 5, "everyone_in": 0, "timeout": 0, "drain": 0}


def test_a_pipeline_does_not_wait_out_the_window() -> None:
    """16 in flight leave together although the batch has room for 64, and 64 requests at once still fill it."""
    with serving(batch_size=64, batch_timeout_s=1000.0) as batcher, connect(batcher) as client:
        client.send_many([b"x"] * 64)
        for _ in range(10):
            futures = [client.submit(b"%d" % number) for number in range(16)]
            assert [future.result() for future in futures] == [answer(b"%d" % number) for number in range(16)]
        assert batcher.metrics().batches == {"full": 1, "everyone_in": 10, "timeout": 0, "drain": 0}
        client.send_many([b"x"] * 64)
        if batcher.transport == client.transport == "direct":  # threads of the public one send and receive in any order
            assert batcher.metrics().batches == {"full": 2, "everyone_in": 10, "timeout": 0, "drain": 0}
        assert batcher.metrics().open_streams == 64


def test_a_pipeline_that_slides_does_not_wait_out_the_window() -> None:
    """Each answer that is taken makes room for one more request."""
    with serving(batch_size=64, batch_timeout_s=1000.0) as batcher, connect(batcher) as client:
        client.send_many([b"x"] * 64)
        in_flight = deque(client.submit(b"%d" % number) for number in range(16))
        for number in range(500):
            assert in_flight.popleft().result() == answer(b"%d" % number)
            in_flight.append(client.submit(b"%d" % (number + 16)))
        assert [future.result() for future in in_flight] == [answer(b"%d" % number) for number in range(500, 516)]
        assert batcher.metrics().batches["timeout"] == 0


# ---- asyncio ----


def in_loops() -> list[Any]:
    loops = [pytest.param(asyncio.run, id="asyncio")]
    try:
        import uvloop
    except ImportError:
        return [*loops, pytest.param(None, id="uvloop", marks=pytest.mark.skip("uvloop is not installed"))]
    return [*loops, pytest.param(uvloop.run, id="uvloop")]


@pytest.mark.parametrize("run", in_loops())
def test_coroutines_get_their_own_answers(run: Callable[[Coroutine[Any, Any, Any]], Any]) -> None:
    async def ask() -> list[Any]:
        requests = [client.send_request(b"%d" % number, number) for number in range(500)]
        return await asyncio.gather(*requests)

    with serving(model="dyna", batch_timeout_s=0.001) as batcher:
        client = connect_async(batcher)  # outside any loop
        for _ in range(2):  # and used in several
            assert run(ask()) == [answer(b"%d" % number, number) for number in range(500)]
        run(client.close())


def test_two_loops_may_use_a_client_at_once() -> None:
    async def ask() -> None:
        for number in range(100):
            assert await client.send_request(b"%d" % number) == answer(b"%d" % number)

    with serving() as batcher:
        client = connect_async(batcher)
        for thread in [in_background(asyncio.run, ask()) for _ in range(2)]:
            thread.result()
        asyncio.run(client.close())


def test_cancelling_a_task_cancels_its_request() -> None:
    async def ask() -> None:
        async with connect_async(batcher) as client:
            first = asyncio.create_task(client.send_request(b"in the callback"))
            while not held.batches:
                await asyncio.sleep(0)
            second = asyncio.create_task(client.send_request(b"waits"))
            while batcher.metrics().waiting != 1:
                await asyncio.sleep(0)
            second.cancel()
            with pytest.raises(asyncio.CancelledError):
                await second
            while batcher.metrics().waiting:
                await asyncio.sleep(0)
            held.release(2)
            assert await first == answer(b"in the callback")
            assert await client.send_request(b"next") == answer(b"next")

    with Held() as held, serving(held) as batcher:
        asyncio.run(ask())
        assert held.batches == [[b"in the callback"], [b"next"]]


def test_a_task_that_is_cancelled_while_it_waits_for_a_place_leaves_it_to_others() -> None:
    async def ask() -> None:
        async with connect_async(batcher, max_in_flight=1) as client:
            first = asyncio.create_task(client.send_request(b"first"))
            while not held.batches:
                await asyncio.sleep(0)
            cancelled, third = (asyncio.create_task(client.send_request(data)) for data in (b"second", b"third"))
            await asyncio.sleep(0)
            cancelled.cancel()
            late = asyncio.create_task(client.send_request(b"late", timeout_s=0.05))
            with pytest.raises(RequestError, match="max_in_flight"):
                await late
            held.release(2)
            assert [await first, await third] == [answer(b"first"), answer(b"third")]

    with Held() as held, serving(held) as batcher:
        asyncio.run(ask())
        assert held.batches == [[b"first"], [b"third"]]


def test_a_task_that_is_cancelled_just_as_it_gets_its_place_is_cancelled() -> None:
    async def ask() -> None:
        async with connect_async(batcher, max_in_flight=1) as client:

            async def ask_first() -> None:
                assert await client.send_request(b"first") == answer(b"first")
                second.cancel()  # in the turn of the loop in which its place is given

            first = asyncio.create_task(ask_first())
            while not held.batches:
                await asyncio.sleep(0)
            second = asyncio.create_task(client.send_request(b"second", timeout_s=1000))
            await asyncio.sleep(0)
            held.release(2)
            (mailbox,) = client._mailboxes.values()
            eventually(lambda: len(mailbox._letters) == 2)  # the place, and the first answer
            await first
            with pytest.raises(asyncio.CancelledError):
                await second
            assert await client.send_request(b"third") == answer(b"third")

    with Held() as held, serving(held) as batcher:
        asyncio.run(ask())
        assert held.batches == [[b"first"], [b"third"]]


def test_errors_and_time_limits_are_raised_in_coroutines() -> None:
    async def ask() -> None:
        async with connect_async(batcher) as client:
            with pytest.raises(RequestError) as wrong:
                await client.send_request(b"x", 1)
            assert wrong.value.code() is INVALID_ARGUMENT
            in_callback = asyncio.create_task(client.send_request(b"in the callback"))
            while not held.batches:
                await asyncio.sleep(0)
            with pytest.raises(RequestError) as late:
                await client.send_request(b"late", timeout_s=0.05)
            assert late.value.code() is DEADLINE_EXCEEDED
            held.release()
            await in_callback

    with Held() as held, serving(held) as batcher:
        asyncio.run(ask())


def test_an_async_client_says_what_it_is_and_can_be_pickled() -> None:
    with serving() as batcher:
        client = connect_async(batcher)
        assert repr(client) == f"AsyncMukoeBatcherClient('{address_of(batcher)}')"
        copy = pickle.loads(pickle.dumps(client))
        assert asyncio.run(copy.send_request(b"x")) == answer(b"x")
        assert copy.transport == client.transport
        asyncio.run(copy.close())


# ---- both ways, and the end ----


def test_blocking_requests_and_futures_share_a_client() -> None:
    with serving(batch_timeout_s=0.001) as batcher, connect(batcher) as client:
        futures = [client.submit(b"%d" % number) for number in range(100)]
        assert client.send_request(b"blocking") == answer(b"blocking")
        assert [future.result() for future in futures] == [answer(b"%d" % number) for number in range(100)]


def test_closing_a_client_ends_what_is_in_flight_with_cancelled() -> None:
    with Held() as held, serving(held) as batcher, connect(batcher) as client:
        futures = [client.submit(b"%d" % number) for number in range(10)]
        client.close()
        assert all(future.done() for future in futures)
        assert {error_of(future.result).code() for future in futures} == {CANCELLED}
        for use in (client.submit, lambda data: client.send_many([data])):
            with pytest.raises(RuntimeError, match="closed"):
                use(b"x")


def test_closing_an_async_client_ends_what_is_in_flight_with_cancelled() -> None:
    async def ask() -> set[Any]:
        client = connect_async(batcher)
        tasks = [asyncio.create_task(client.send_request(b"%d" % number)) for number in range(10)]
        while not held.batches:
            await asyncio.sleep(0)
        await client.close()
        return {error.code() for error in await asyncio.gather(*tasks, return_exceptions=True)}  # type: ignore[union-attr]

    with Held() as held, serving(held) as batcher:
        assert asyncio.run(ask()) == {CANCELLED}


def test_a_callback_of_a_future_may_close_the_client() -> None:
    closed = threading.Event()

    def close(_: object) -> None:
        client.close()
        closed.set()

    with serving() as batcher:
        client = connect(batcher)
        client.submit(b"x").add_done_callback(close)
        closed.wait()
        client.close()
        eventually(lambda: batcher.metrics().open_streams == 0)


def test_a_future_of_a_client_that_was_dropped_is_still_answered_and_nothing_is_left() -> None:
    with serving() as batcher:
        assert connect(batcher).submit(b"x").result() == answer(b"x")
        gc.collect()
        eventually(lambda: batcher.metrics().open_streams == 0)


def test_a_request_that_the_server_did_not_take_in_is_sent_again() -> None:
    with serving() as first, connect(first) as client:
        assert client.submit(b"before").result() == answer(b"before")
        port = first.port
        first.shutdown()
        if first.transport == "public":  # it cannot say what it took in, so the client has to have noticed
            eventually(lambda: not client._pool._idle_pooled)
        with serving(port=port):
            assert client.submit(b"after").result() == answer(b"after")


def test_a_server_that_is_away_is_unavailable() -> None:
    with MukoeBatcherClient("127.0.0.1:1") as client:
        assert error_of(client.submit(b"x").result).code() is UNAVAILABLE
        assert {end.code() for end in client.send_many([b"x"] * 5, return_exceptions=True)} == {UNAVAILABLE}  # type: ignore[union-attr]


def test_a_server_that_ends_the_stream_without_an_answer_is_an_error() -> None:
    def end(messages: Iterator[bytes], context: grpc.ServicerContext) -> Iterator[bytes]:
        next(messages)
        yield from ()

    with plain_server(end) as address, MukoeBatcherClient(address) as client:
        error = error_of(client.submit(b"x").result)
        assert (error.code(), "without an answer" in error.details()) == (UNAVAILABLE, True)


def test_a_future_of_a_client_that_is_garbage_collected_in_flight_is_answered_and_nothing_is_left() -> None:
    with Held() as held, serving(held) as batcher:
        held.release()
        connect(batcher).submit(b"first").result()  # starts threads that the server keeps
        gc.collect()
        eventually(lambda: batcher.metrics().open_streams == 0)
        held.batches.clear()
        threads = threading.active_count()
        futures = [connect(batcher).submit(b"%d" % number) for number in range(3)]
        eventually(lambda: held.batches)
        gc.collect()
        held.release(3)
        assert [future.result() for future in futures] == [answer(b"%d" % number) for number in range(3)]
        gc.collect()
        eventually(lambda: batcher.metrics().open_streams == 0)
        eventually(lambda: threading.active_count() <= threads)


def test_an_answer_is_freed_with_its_future_without_the_garbage_collector() -> None:
    with serving() as batcher, connect(batcher) as client:
        client.submit(b"x").result()
        gc.collect()
        gc.disable()
        try:
            future = client.submit(b"x")
            gone = weakref.ref(future)
            future.result()
            del future
            eventually(lambda: gone() is None)
        finally:
            gc.enable()


# ---- arrays, TLS, several servers ----


def test_arrays_go_every_way() -> None:
    np = pytest.importorskip("numpy")
    rows = [np.full((2, 3), number, "float32") for number in range(20)]

    async def ask() -> list[Any]:
        async with connect_async(batcher, arrays=True) as client:
            return await asyncio.gather(*(client.send_request(row) for row in rows))

    def double(batch: Any) -> Any:
        return {"doubled": batch["data"] * 2}

    with (
        serving(double, batch_timeout_s=0.001, arrays={"data": Array((2, 3), "float32")}) as batcher,
        connect(batcher, arrays=True) as client,
    ):
        futures = [client.submit(row) for row in rows]
        for answers in ([future.result() for future in futures], client.send_many(rows), asyncio.run(ask())):
            for row, (arrays, step) in zip(rows, answers, strict=True):
                np.testing.assert_array_equal(arrays["doubled"], row * 2)
                assert step == 0
        ends = client.send_many([rows[1], np.zeros((5, 5), "float32")], return_exceptions=True)
        np.testing.assert_array_equal(ends[0][0]["doubled"], rows[1] * 2)
        assert ends[1].code() is INVALID_ARGUMENT


def test_futures_and_coroutines_work_over_tls(certificates: Certificates) -> None:
    async def ask() -> list[Any]:
        async with AsyncMukoeBatcherClient(f"localhost:{batcher.port}", credentials=trusted) as client:
            return await asyncio.gather(*(client.send_request(b"%d" % number) for number in range(20)))

    expected = [answer(b"%d" % number) for number in range(20)]
    trusted = grpc.ssl_channel_credentials(certificates.authority)
    with (
        serving(host="localhost", credentials=grpc.ssl_server_credentials([certificates.server])) as batcher,
        MukoeBatcherClient(f"localhost:{batcher.port}", credentials=trusted) as client,
    ):
        assert client.send_many([b"%d" % number for number in range(20)]) == expected
        assert [future.result() for future in [client.submit(b"%d" % number) for number in range(20)]] == expected
        assert asyncio.run(ask()) == expected


def test_requests_in_flight_go_to_all_servers_and_survive_the_end_of_one() -> None:
    def answering_with(step: int) -> Callable[[list[bytes]], list[Any]]:
        return lambda requests: [answer(data, step) for data in requests]

    with serving(answering_with(1)) as first, serving(answering_with(2)) as second:
        servers = f"ipv4:127.0.0.1:{first.port},127.0.0.1:{second.port}"
        options = (("grpc.lb_policy_name", "round_robin"),)
        with MukoeBatcherClient(servers, options=options) as client:

            def steps() -> set[int]:
                """Who answers. A server that ends can say nothing of a stream that was just opening."""
                ends = client.send_many([b"x"] * 20, return_exceptions=True)
                errors = [end for end in ends if isinstance(end, RequestError)]
                assert {error.code() for error in errors} <= {grpc.StatusCode.UNAVAILABLE}
                return {end[1] for end in ends if not isinstance(end, Exception)}

            eventually(lambda: steps() == {1, 2})
            first.shutdown()
            eventually(lambda: steps() == {2})


TWO_THOUSAND = """
    import threading
    from grpc_batcher import MukoeBatcherClient, create_batcher

    release = threading.Event()

    def hold(requests):
        release.wait()
        return [({"result": data}, 0) for data in requests]

    with create_batcher("repr", 4096, 0.0, 0, batch_process_fn=hold, host="127.0.0.1") as batcher:
        with MukoeBatcherClient(f"127.0.0.1:{batcher.port}", max_in_flight=2000) as client:
            before = threading.active_count()
            futures = [client.submit(b"%d" % number) for number in range(2000)]
            while batcher.metrics().open_streams < 2000:
                pass
            while threading.active_count() - before >= 40:  # threads of the server, which end when a stream is open
                pass
            release.set()
            assert [future.result()[0]["result"] for future in futures] == [b"%d" % number for number in range(2000)]
    print("done")
"""


def test_two_thousand_requests_in_flight_add_fewer_than_forty_threads(tmp_path: Path) -> None:
    assert run_program(tmp_path, TWO_THOUSAND, environment={"GRPC_BATCHER_TRANSPORT": "direct"}) == ["done"]


EXITS = """
    import sys
    from grpc_batcher import MukoeBatcherClient

    client = MukoeBatcherClient(sys.argv[1])
    futures = [client.submit(b"%d" % number) for number in range(20)]
    futures[0].add_done_callback(lambda future: print(type(future.exception()).__name__))
"""


EXITS_WITH_TASKS = """
    import asyncio, sys
    from grpc_batcher import AsyncMukoeBatcherClient

    async def begin():
        tasks.extend(asyncio.create_task(client.send_request(b"%d" % number)) for number in range(20))
        await asyncio.sleep(0)

    client, tasks, loop = AsyncMukoeBatcherClient(sys.argv[1]), [], asyncio.new_event_loop()
    loop.run_until_complete(begin())
    print(sum(task.done() for task in tasks))
"""


@pytest.mark.parametrize(
    ("program", "output"), [(EXITS, "RequestError"), (EXITS_WITH_TASKS, "0")], ids=["futures", "asyncio"]
)
def test_a_program_that_ends_with_requests_in_flight_ends_at_once_and_cancels_them(
    program: str, output: str, tmp_path: Path
) -> None:
    with Held() as held, serving(held) as batcher:
        assert run_program(tmp_path, program, address_of(batcher)) == [output]
        eventually(lambda: batcher.metrics().open_streams == 0)


FORKS = """
    import os, sys
    from grpc_batcher import MukoeBatcherClient

    client = MukoeBatcherClient(sys.argv[1], max_in_flight=1)
    child = os.fork()
    os.write(1, f"{client.submit(b'x').result()}\\n".encode())  # at once: both sides write here
    if child:
        assert os.waitpid(child, 0)[1] == 0
"""


def test_a_client_that_was_not_used_before_a_fork_works_on_both_sides(tmp_path: Path) -> None:
    with serving() as batcher:
        assert run_program(tmp_path, FORKS, address_of(batcher)) == [f"{answer(b'x')}"] * 2


def test_futures_work_with_interceptors() -> None:
    with serving(batch_size=64) as batcher, connect(batcher, interceptors=[PassOn()]) as client:
        assert client.transport == "public"
        assert client.send_many([b"%d" % number for number in range(64)]) == [
            answer(b"%d" % number) for number in range(64)
        ]
        future = client.submit(b"x")
        future.cancel()
        assert client.submit(b"y").result() == answer(b"y")
    with MukoeBatcherClient("127.0.0.1:1", interceptors=[PassOn()]) as client:
        assert error_of(client.submit(b"x").result).code() is UNAVAILABLE
