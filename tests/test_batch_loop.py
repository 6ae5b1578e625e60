"""What becomes of a server whose batch thread fails outside the callback."""

from __future__ import annotations

import logging
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from grpc_batcher._server.metrics import Recorder
from grpc_batcher._server.standard_services import StandardServices

import grpc
import pytest
from serving import connect, echo, error_of, eventually, in_background, run_program, serving


@pytest.fixture
def failing_loop(monkeypatch: pytest.MonkeyPatch) -> None:
    """The batch thread fails as soon as it has a batch."""

    def fail(*_arguments: Any) -> None:
        raise MemoryError("no memory left for the batch")

    monkeypatch.setattr(Recorder, "batch_taken", fail)


@pytest.mark.usefixtures("failing_loop")
def test_an_error_outside_the_callback_ends_the_server_visibly(caplog: pytest.LogCaptureFixture) -> None:
    from grpc_health.v1 import health_pb2, health_pb2_grpc

    with (
        serving(batch_size=2, batch_timeout_s=60, health=True) as batcher,
        grpc.insecure_channel(f"127.0.0.1:{batcher.port}") as channel,
        connect(batcher) as client,
    ):
        watch = health_pb2_grpc.HealthStub(channel).Watch(health_pb2.HealthCheckRequest())
        assert next(watch).status == health_pb2.HealthCheckResponse.SERVING
        requests = [in_background(client.send_request, b"%d" % each) for each in range(2)]
        assert {error_of(request.result).code() for request in requests} == {grpc.StatusCode.UNAVAILABLE}
        assert next(watch).status == health_pb2.HealthCheckResponse.NOT_SERVING
        eventually(lambda: not batcher.is_server_ready())
        assert error_of(client.send_request, b"later").code() is grpc.StatusCode.UNAVAILABLE
    eventually(lambda: "has ended" in caplog.text)
    (record,) = [record for record in caplog.records if record.levelno == logging.CRITICAL]
    assert record.exc_info is not None
    assert "no memory left" in str(record.exc_info[1])


def test_serve_forever_raises_when_the_batch_thread_fails(tmp_path: Path) -> None:
    program = """
        import threading
        from grpc_batcher import BatcherError, MukoeBatcherClient, RequestError, create_batcher
        from grpc_batcher._server.metrics import Recorder

        def fail(*arguments):
            raise MemoryError("no memory left for the batch")

        Recorder.batch_taken = fail
        batcher = create_batcher("repr", 1, 0, 0, batch_process_fn=list, host="127.0.0.1")

        def ask():
            batcher.wait_until_ready()
            with MukoeBatcherClient(f"127.0.0.1:{batcher.port}") as client:
                try:
                    client.send_request(b"hi")
                except RequestError as error:
                    print(error.code().name)

        asking = threading.Thread(target=ask)
        asking.start()
        try:
            batcher.serve_forever()
        except BatcherError as error:
            asking.join()
            print(error)
    """
    assert run_program(tmp_path, program) == [
        "UNAVAILABLE",
        "the batch thread failed, and the server ended: MemoryError: no memory left for the batch",
    ]


@pytest.mark.usefixtures("failing_loop")
def test_a_health_service_that_fails_does_not_keep_a_failed_server_from_stopping(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def fail(*_arguments: Any) -> None:
        raise MemoryError("no memory left for the status")

    def refuses_connections() -> bool:
        try:
            socket.create_connection(("127.0.0.1", batcher.port)).close()
        except ConnectionRefusedError:
            return True
        return False

    with serving(batch_size=1, health=True) as batcher, connect(batcher) as client:
        monkeypatch.setattr(StandardServices, "say_serving", fail)
        assert error_of(client.send_request, b"hi").code() is grpc.StatusCode.UNAVAILABLE
        eventually(refuses_connections)
        eventually(lambda: "has ended" in caplog.text)


class RaisingHandler(logging.Handler):
    """A log handler with a fault of its own."""

    def __init__(self, error: BaseException) -> None:
        super().__init__()
        self._error = error

    def emit(self, record: logging.LogRecord) -> None:
        raise self._error


@contextmanager
def logging_raises(error: BaseException) -> Iterator[None]:
    logger = logging.getLogger("grpc_batcher")
    handler = RaisingHandler(error)
    logger.addHandler(handler)
    try:
        yield
    finally:
        logger.removeHandler(handler)


@pytest.mark.usefixtures("failing_loop")
@pytest.mark.parametrize("error", [OSError("the log's disk is full"), SystemExit("this handler exits on errors")])
def test_a_log_handler_that_raises_does_not_keep_a_failed_server_from_ending(error: BaseException) -> None:
    with serving(batch_size=1) as batcher, connect(batcher) as client, logging_raises(error):
        assert error_of(client.send_request, b"hi").code() is grpc.StatusCode.UNAVAILABLE
        eventually(lambda: not batcher.is_server_ready())


def test_a_log_handler_that_raises_does_not_fail_a_start_that_succeeded() -> None:
    with (
        logging_raises(OSError("the log's disk is full")),
        serving(host="0.0.0.0") as batcher,
        connect(batcher) as client,
    ):
        assert client.send_request(b"hi") == ({"result": b"hi"}, 0)


@pytest.mark.parametrize("error", [OSError("the log's disk is full"), SystemExit("this handler exits on errors")])
def test_a_log_handler_that_raises_costs_the_batch_it_reports_and_not_the_server(error: BaseException) -> None:
    def fail_once(requests: list[bytes]) -> Any:
        if b"bad" in requests:
            raise ValueError("bad")
        return echo(requests)

    with serving(fail_once, batch_size=1) as batcher, connect(batcher) as client:
        with logging_raises(error):
            assert error_of(client.send_request, b"bad").code() is grpc.StatusCode.INTERNAL
        assert client.send_request(b"good") == ({"result": b"good"}, 0)
