"""A server's life: started once, shut down once, from any thread, signal handler or callback."""

from __future__ import annotations

import logging
import os
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future, wait
from contextlib import suppress
from typing import Any

import grpc

from .. import _process
from .._errors import BatcherError
from .._models import BadResultError
from .._transport import choice
from . import signals_and_exit
from .batch_loop import BatchLoop
from .delivery import Delivery
from .listening import address_of, check_available, is_local, listen
from .service import Service
from .standard_services import StandardServices
from .threads import DaemonThreadPool

_logger = logging.getLogger("grpc_batcher")

_SHUT_DOWN_MEANWHILE = "this batcher was shut down while it started"

# How long streams get to end when the server stops, so that a reply or a status just sent is not cut off.
_STREAM_END_GRACE_S = 0.05

# ... and connections that were slow to take their last replies.
_SLOW_CONNECTION_GRACE_S = 1.0

# gRPC's keepalive (its doc/keepalive.md): a caller whose host vanishes without a word is noticed after this interval
# and timeout, even while nothing is sent. Callers may ping far more often than gRPC's default of every five minutes.
_KEEPALIVE_INTERVAL_MS = 30_000
_KEEPALIVE_TIMEOUT_MS = 20_000
_MIN_CALLERS_INTERVAL_MS = 5_000

# This library's clients connect again when a stream says so (Session), between two requests. All others get gRPC's
# GOAWAY, which fails streams that are opened just then: gRPC would open them again, but with the direct transport it
# must not (Connection). So it comes only when this library's clients have left, or left the connection unused.
_OTHERS_GRACE_S = 90.0

# gRPC varies the age of each connection by this much, up or down.
_CONNECTION_AGE_JITTER = 0.1

# gRPC counts a connection's age in an int32, whose largest value stands for no limit.
_MAX_CONNECTION_AGE_MS = 2**31 - 2


class LifeCycle:
    """What `MukoeBatcher` starts and shuts down, in the right order. See its methods for what they promise.

    port: the port it listens on, or will.
    failure: the error that ended the batch thread, and with it the server; None if nothing went wrong.
    """

    def __init__(
        self,
        service: Service,
        *,
        model_name: str,
        host: str,
        port: int,
        max_message_bytes: int,
        max_streams: int,
        max_connection_age_s: float | None,
        credentials: grpc.ServerCredentials | None,
        interceptors: tuple[grpc.ServerInterceptor, ...],
        standard_services: StandardServices,
        other_handlers: tuple[grpc.GenericRpcHandler, ...],
    ) -> None:
        self.port = port
        self.failure: BaseException | None = None
        self._model_name = model_name
        self._host = host
        self._credentials = credentials
        self._interceptors = interceptors
        self._standard_services = standard_services
        self._service = service
        self._handlers = (service, *other_handlers)
        self._room = service.room
        self._options: tuple[tuple[str, int], ...] = (
            # Two servers would share a port, and each get some of the requests.
            ("grpc.so_reuseport", 0),
            ("grpc.max_receive_message_length", max_message_bytes),
            ("grpc.max_send_message_length", -1),
            # New streams that gRPC has not handed over yet. By default it drops some at random if 1000 arrive at once.
            ("grpc.server.max_pending_requests", max_streams),
            ("grpc.server.max_pending_requests_hard_limit", max_streams),
            ("grpc.keepalive_time_ms", _KEEPALIVE_INTERVAL_MS),
            ("grpc.keepalive_timeout_ms", _KEEPALIVE_TIMEOUT_MS),
            ("grpc.keepalive_permit_without_calls", 1),
            ("grpc.http2.max_pings_without_data", 0),
            ("grpc.http2.min_ping_interval_without_data_ms", _MIN_CALLERS_INTERVAL_MS),
        )
        if max_connection_age_s is not None:
            # Without gRPC's own grace period, which would cut off the requests that outlast it.
            age_s = (max_connection_age_s + _OTHERS_GRACE_S) / (1 - _CONNECTION_AGE_JITTER)
            self._options += (("grpc.max_connection_age_ms", min(round(age_s * 1000), _MAX_CONNECTION_AGE_MS)),)
        self._delivery = Delivery(self._room)
        self._loop = BatchLoop(self._room, service.callback, service.recorder, self._delivery, self._fail)
        self._server: grpc.Server | None = None
        self._threads = DaemonThreadPool("grpc_batcher-stream")
        # Reentrant, and no Event beside it: a signal handler may call shutdown in a thread that is in here already.
        self._changed = threading.Condition(threading.RLock())
        self._started_in_pid: int | None = None
        self._is_starting = False
        self._shutdown_begun = False
        self._shutdown_done = False

    @property
    def state(self) -> str:
        """ "not started", "serving" or "shut down"."""
        if self._shutdown_begun:
            return "shut down"
        return "not started" if self._started_in_pid is None else "serving"

    def is_ready(self) -> bool:
        return self._started_in_pid == os.getpid() and not self._shutdown_begun

    def start(self, is_unwanted: Callable[[], bool] = lambda: False) -> None:
        """is_unwanted: asked now and then while the callback warms up, which may take minutes. If it returns True, the
        batcher is shut down, and this returns.
        """
        with self._changed:
            self._check_never_begun()
            self._is_starting = True
        try:
            _process.prepare_to_use_grpc()
            check_available(self._host, self.port)  # now, rather than after minutes of warming up
            self._warm_up(is_unwanted)
            with self._changed:
                if is_unwanted():
                    self._shut_down_once(grace_s=0)
                    return
                if self._shutdown_begun:
                    raise RuntimeError(_SHUT_DOWN_MEANWHILE)
                self._listen()
                signals_and_exit.add_running(self)
                self._started_in_pid = os.getpid()
                self._changed.notify_all()
                self._standard_services.say_serving(not self._shutdown_begun)
                if self._shutdown_begun:  # by a signal handler, on this very thread
                    self._shut_down(grace_s=0)
                    raise RuntimeError(_SHUT_DOWN_MEANWHILE)
        finally:
            self._is_starting = False
            if self._server is None:
                self._loop.cancel()
        self._log_start()

    def _check_never_begun(self) -> None:
        if self._shutdown_begun:
            raise RuntimeError("this batcher was shut down; create another")
        if self._server is not None or self._is_starting:
            raise RuntimeError("this batcher was already started")

    def _warm_up(self, is_unwanted: Callable[[], bool]) -> None:
        """Start the batch thread and wait until the callback is warm, or the server is no longer wanted.

        Raises what the callback raises, and BatcherError for results that cannot be sent.
        """
        warm = self._loop.start()
        while not wait((warm,), signals_and_exit.SIGNAL_CHECK_S).done:
            if self._shutdown_begun or is_unwanted():
                return
        try:
            warm.result()
        except BadResultError as error:
            raise BatcherError(f"the callback cannot be warmed up: it {error}") from error.__cause__

    def _listen(self) -> None:
        """Open the port. The batch thread takes batches already."""
        server = grpc.server(
            self._threads, handlers=self._handlers, interceptors=self._interceptors, options=self._options
        )
        self._standard_services.add_to(server)
        self.port = listen(server, self._host, self.port, self._credentials)
        server.start()
        self._server = server

    def _log_start(self) -> None:
        address = address_of(self._host, self.port)
        with suppress(Exception):  # a log handler that raises must not fail a start that succeeded
            _logger.debug(
                "serving %r on %s with the %s transport", self._model_name, address, choice.server_transport()
            )
            if self._credentials is None and not is_local(self._host):
                _logger.warning(
                    "serving %r on %s in plaintext, to whoever can reach it; give create_batcher credentials=, or "
                    "host='127.0.0.1' to serve this machine only",
                    self._model_name,
                    address,
                )

    def between_batches(self, function: Callable[[], Any]) -> Future[Any]:
        return self._loop.between_batches(function)

    def wait_until_ready(self, timeout_s: float | None) -> None:
        with self._changed:
            if not self._changed.wait_for(lambda: self._shutdown_begun or self._started_in_pid is not None, timeout_s):
                raise TimeoutError(f"the batcher is not ready after {timeout_s} s; was start() called?")
        if self._shutdown_begun:
            raise RuntimeError("this batcher was shut down")

    def shut_down(self, grace_s: float) -> None:
        if self._started_in_pid not in (None, os.getpid()):
            return  # a forked child: the batcher is its parent's
        if self._loop.is_current_thread():
            threading.Thread(target=self.shut_down, args=(grace_s,), name="grpc_batcher-shutdown").start()
            return
        self._shut_down_once(grace_s)

    def wait_until_shut_down(self, timeout_s: float) -> bool:
        """Wait until a shutdown is complete, for `timeout_s` seconds at most; return whether it is."""
        with self._changed:
            return self._changed.wait_for(lambda: self._shutdown_done, timeout_s)

    def _shut_down_once(self, grace_s: float) -> None:
        with self._changed:
            is_first = not self._shutdown_begun
            self._shutdown_begun = True
            self._room.close()
            self._changed.notify_all()
        if not is_first:
            self.wait_until_shut_down(grace_s)
            return
        try:
            self._shut_down(grace_s)
        finally:
            with self._changed:
                self._shutdown_done = True
                self._changed.notify_all()

    def _shut_down(self, grace_s: float) -> None:
        signals_and_exit.remove_running(self)
        if self._server is None:
            self._loop.end()
            return
        connection_grace_s = _STREAM_END_GRACE_S
        try:
            self._standard_services.say_serving(False)
            if not self._drain(grace_s):
                connection_grace_s = _SLOW_CONNECTION_GRACE_S
        finally:  # even if Ctrl-C, a lack of memory, or a log handler that raises, interrupts it
            self._room.abandon()
            self._loop.end()
            self._stop_server(connection_grace_s)
            self._threads.shutdown()

    def _stop_server(self, grace_s: float) -> None:
        """Let connections go, then stop: a server that cancels calls first makes gRPC complain on callers' stderr."""
        assert self._server is not None
        try:
            stopped = self._server.stop(grace_s)
        except RuntimeError:
            # gRPC has begun to stop, and failed to start the thread that ends the grace period: an exiting interpreter
            # allows no new threads.
            self._server.wait_for_termination(grace_s)
            stopped = self._server.stop(None)
        stopped.wait()

    def _drain(self, grace_s: float) -> bool:
        """Let what was taken in end within the grace period; return whether all callers took their replies quickly."""
        end_s = time.monotonic() + grace_s
        self._loop.join(grace_s)
        abandoned = self._room.abandon()
        self._delivery.close(max(end_s - time.monotonic(), _STREAM_END_GRACE_S))
        self._service.end_streams()
        if abandoned:
            _logger.warning("shutdown after a grace period of %s s left %d requests unanswered", grace_s, abandoned)
        quick = self._service.wait_until_replied(_STREAM_END_GRACE_S)
        if not quick:
            # Long replies, or callers that are slow to take them. To gRPC a reply is out when the system has it; given
            # a grace period, gRPC then makes sure by a ping before it closes a connection.
            self._service.wait_until_replied(max(end_s - time.monotonic(), 0))
        self._service.wait_until_closed(_STREAM_END_GRACE_S)
        return quick

    def _fail(self, error: BaseException) -> None:
        """End the server: its batch thread, which calls this, is about to end."""
        self.failure = error
        # A log handler that raises may be the reason.
        with suppress(BaseException):
            self._shut_down_once(grace_s=0)
        with suppress(BaseException):
            _logger.critical("the batch thread failed, and the server has ended", exc_info=error)

    def refuse_requests(self) -> None:
        """Accept nothing more, and say so. For the interpreter's exit, when locks may never be released."""
        self._shutdown_begun = True
        self._room.close()
        self._standard_services.say_serving(False)

    def finish_at_exit(self, grace_s: float) -> None:
        """Finish what `refuse_requests` began."""
        self._shut_down(grace_s)
