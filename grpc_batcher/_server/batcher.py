"""The server: its parameters, its life cycle, and the thread that runs the callback."""

from __future__ import annotations

import atexit
import logging
import math
import os
import signal
import threading
import time
import weakref
from collections.abc import Callable, Sequence
from types import TracebackType
from typing import Any

import grpc

from .. import _core
from .. import _process as _forks
from .._transport import choice as _gears
from .._server.callback import Failure, outcomes_of
from .._server.delivery import Delivery
from .._server.listening import address_of, is_local, listen
from .._server.metrics import Metrics, Recorder, summary
from .._models import MODELS, Model
from .._server.session import Service
from .._server.standard_services import StandardServices
from .._server.threads import DaemonThreadPool

_logger = logging.getLogger("grpc_batcher")

# What streams get to end when the server stops, so that a reply or a status just sent is not cut off.
_STREAM_END_GRACE_S = 0.05

# ... and connections that were slow to take their last replies.
_SLOW_CONNECTION_GRACE_S = 1.0

# gRPC's keepalive (its doc/keepalive.md): a caller whose host is gone without a word is noticed after this interval and
# timeout, also while nothing is sent. Callers may ping much more often than gRPC's default of every five minutes.
_KEEPALIVE_INTERVAL_MS = 30_000
_KEEPALIVE_TIMEOUT_MS = 20_000
_LEAST_CALLERS_INTERVAL_MS = 5_000

# How long the exit of a program that never called `shutdown` waits for callbacks that run.
_EXIT_GRACE_S = 1.0

# How often the main thread looks for signals: one that comes in just before a wait does not interrupt it.
_SIGNAL_CHECK_S = 0.2

_MAX_TIMEOUT_S = 1e9


class MukoeBatcher:
    """A server that gathers requests into batches for a callback. Made by `create_batcher`.

    It is started once, by `start` or by entering it as a context manager, and shut down once, by `shutdown` or by
    leaving it. All its methods may be called from any thread.
    """

    def __init__(
        self,
        *,
        model: Model,
        batch_process_fn: Callable[[list[Any]], Sequence[Any]],
        batch_size: int,
        batch_timeout_s: float,
        host: str,
        port: int,
        max_message_bytes: int,
        max_queue_size: int,
        max_streams: int,
        track_metrics: bool,
        credentials: grpc.ServerCredentials | None,
        interceptors: Sequence[grpc.ServerInterceptor],
        standard_services: StandardServices,
    ) -> None:
        self._model = model
        self._callback = batch_process_fn
        self._batch_timeout_s = batch_timeout_s
        self._host = host
        self._port = port
        self._credentials = credentials
        self._interceptors = interceptors
        self._standard_services = standard_services
        self._room = _core.WaitingRoom(batch_size, round(batch_timeout_s * 1e9), max_queue_size)
        self._recorder = Recorder(timed=track_metrics, batch_size=batch_size)
        self._service = Service(self._room, model, self._recorder, max_streams, _gears.stream_handler)
        self._options = (
            # Two servers would share a port, and each get some of the requests.
            ("grpc.so_reuseport", 0),
            ("grpc.max_receive_message_length", max_message_bytes),
            ("grpc.max_send_message_length", -1),
            # New streams that gRPC has not handed over yet. It would drop some at random if over 1000 come at once.
            ("grpc.server.max_pending_requests", max_streams),
            ("grpc.server.max_pending_requests_hard_limit", max_streams),
            ("grpc.keepalive_time_ms", _KEEPALIVE_INTERVAL_MS),
            ("grpc.keepalive_timeout_ms", _KEEPALIVE_TIMEOUT_MS),
            ("grpc.keepalive_permit_without_calls", 1),
            ("grpc.http2.max_pings_without_data", 0),
            ("grpc.http2.min_ping_interval_without_data_ms", _LEAST_CALLERS_INTERVAL_MS),
        )
        self._delivery = Delivery(self._room)
        self._server: grpc.Server | None = None
        self._threads = DaemonThreadPool("grpc_batcher-stream")
        self._batch_thread = threading.Thread(target=self._run, name="grpc_batcher-batch", daemon=True)
        # Reentrant, and no Event beside it: a signal handler may call shutdown in a thread that is just in here.
        self._changed = threading.Condition(threading.RLock())
        self._started_in: int | None = None  # the process
        self._shutdown_begun = False
        self._shutdown_done = False

    # ---- life cycle ----

    def start(self) -> None:
        """Listen and serve. The batcher is ready when this returns.

        Raises BindError if the address can not be had, and RuntimeError if it was started or shut down before.
        """
        with self._changed:
            if self._shutdown_begun:
                raise RuntimeError("this batcher was shut down; create another")
            if self._server is not None:
                raise RuntimeError("this batcher was started already")
            _forks.check_and_mark_used()
            server = grpc.server(
                self._threads, handlers=(self._service,), interceptors=self._interceptors, options=self._options
            )
            self._standard_services.add_to(server)
            self._port = listen(server, self._host, self._port, self._credentials)
            server.start()
            try:
                self._batch_thread.start()
            except RuntimeError:  # there can be no more threads; nothing was started, then
                server.stop(None).wait()
                raise
            self._server = server
            _running.add(self)
            self._started_in = os.getpid()
            self._changed.notify_all()
            self._standard_services.say_serving(not self._shutdown_begun)
            if self._shutdown_begun:  # by a signal handler, in this very thread
                self._shut_down(grace_s=0)
                raise RuntimeError("this batcher was shut down while it started")
        _logger.debug("serving %r on %s with the %s gear", self._model.name, self.address, self.gear)
        if self._credentials is None and not is_local(self._host):
            _logger.warning(
                "serving %r on %s in plaintext, to whoever can reach it; give create_batcher credentials=, or "
                "host='127.0.0.1' for this machine alone",
                self._model.name,
                self.address,
            )

    def serve_forever(self, grace_s: float = 5.0) -> None:
        """Serve until the process gets SIGTERM or SIGINT (Ctrl-C), then shut down and return.

        grace_s: as for `shutdown`.

        Starts the batcher unless it is started. Returns also when something else shuts it down. A second signal while
        it shuts down raises SystemExit(128 + signal's number). Whatever handled the signals before does so again when
        this returns. Raises what `start` does, and RuntimeError outside the main thread.
        """
        if threading.current_thread() is not threading.main_thread():
            raise RuntimeError(
                f"serve_forever was called in thread {threading.current_thread().name!r}; call it in the main thread, "
                "as Python handles signals in no other, or call start() and later shutdown()"
            )
        _check_grace(grace_s)
        received: list[int] = []

        def on_signal(number: int, _frame: object) -> None:
            if received:
                raise SystemExit(128 + number)
            received.append(number)

        handlers = {number: signal.signal(number, on_signal) for number in (signal.SIGTERM, signal.SIGINT)}
        try:
            if not self.is_server_ready():
                self.start()
            while not received and not self._wait_until_shut_down(_SIGNAL_CHECK_S):
                pass
            if received:
                _logger.info("%s: shutting down within %s s", signal.Signals(received[0]).name, grace_s)
                # On another thread, so that a second signal does not break into its midst.
                threading.Thread(
                    target=self.shutdown, args=(grace_s,), name="grpc_batcher-shutdown", daemon=True
                ).start()
            while not self._wait_until_shut_down(_SIGNAL_CHECK_S):
                pass
        finally:
            for number, handler in handlers.items():
                # None: it was not set from Python, and can not be set again from here.
                signal.signal(number, signal.SIG_DFL if handler is None else handler)

    def is_server_ready(self) -> bool:
        """Whether it is started, in this process, and not shut down."""
        return self._started_in == os.getpid() and not self._shutdown_begun

    def wait_until_ready(self, timeout_s: float | None = None) -> None:
        """Wait until another thread has started it.

        Raises TimeoutError after `timeout_s` seconds (None: never), and RuntimeError if it is shut down.
        """
        with self._changed:
            if not self._changed.wait_for(lambda: self._shutdown_begun or self._started_in is not None, timeout_s):
                raise TimeoutError(f"the batcher is not ready after {timeout_s} s; was start() called?")
        if self._shutdown_begun:
            raise RuntimeError("this batcher was shut down")

    def shutdown(self, grace_s: float = 5.0) -> None:
        """Stop serving. Returns within the grace, give or take the time for gRPC to close its connections.

        grace_s: how long those requests that were taken in may take to be answered, in seconds. New ones get
            UNAVAILABLE at once, and so does what is left when the grace is over.

        May be called again, and from any thread: all calls return when the first is done, or their own grace is over.
        From the callback it returns at once, and the shutdown goes on behind it. In a forked child it does nothing:
        the batcher is its parent's.
        """
        _check_grace(grace_s)
        if self._started_in not in (None, os.getpid()):
            return
        if threading.current_thread() is self._batch_thread:
            threading.Thread(target=self.shutdown, args=(grace_s,), name="grpc_batcher-shutdown").start()
            return
        with self._changed:
            first = not self._shutdown_begun
            self._shutdown_begun = True
            self._room.close()
            self._changed.notify_all()
        if not first:
            self._wait_until_shut_down(grace_s)
            return
        try:
            self._standard_services.say_serving(False)
            self._shut_down(grace_s)
        finally:
            with self._changed:
                self._shutdown_done = True
                self._changed.notify_all()

    def _wait_until_shut_down(self, timeout_s: float) -> bool:
        with self._changed:
            return self._changed.wait_for(lambda: self._shutdown_done, timeout_s)

    def _shut_down(self, grace_s: float, *, at_exit: bool = False) -> None:
        _running.discard(self)
        if self._server is None:
            return
        connection_grace_s = _STREAM_END_GRACE_S
        try:
            if not self._drain(grace_s):
                connection_grace_s = _SLOW_CONNECTION_GRACE_S
        finally:  # also if Ctrl-C, or a handler of the log, broke into it
            self._room.abandon()
            # For a grace gRPC starts a thread, which an interpreter that exits does not allow.
            self._server.stop(None if at_exit else connection_grace_s).wait()
            self._threads.shutdown()

    def _drain(self, grace_s: float) -> bool:
        """Let what was taken in end within the grace; return whether all callers were quick to take it."""
        end_s = time.monotonic() + grace_s
        self._batch_thread.join(grace_s)
        abandoned = self._room.abandon()
        self._delivery.close(max(end_s - time.monotonic(), _STREAM_END_GRACE_S))
        self._service.end_streams()
        if abandoned:
            _logger.warning(
                "shutdown after a grace of %s s: %d requests are left without an answer", grace_s, abandoned
            )
        quick = self._service.wait_until_replied(_STREAM_END_GRACE_S)
        if not quick:
            # Long replies, or callers that are slow to take them. To gRPC one is out when the system has it; within a
            # grace gRPC then makes sure by a ping, before it closes a connection.
            self._service.wait_until_replied(max(end_s - time.monotonic(), 0))
        self._service.wait_until_closed(_STREAM_END_GRACE_S)
        return quick

    def __enter__(self) -> MukoeBatcher:
        self.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.shutdown()

    # ---- what it says of itself ----

    @property
    def address(self) -> str:
        """What it listens on, as gRPC writes it: "0.0.0.0:50051", "[::1]:50051", "unix:/run/batcher.sock"."""
        return address_of(self._host, self._port)

    @property
    def port(self) -> int:
        """The port it listens on; with `port=0` the system's choice, once it is started."""
        return self._port

    @property
    def gear(self) -> str:
        """Which way the bytes take: "direct", or "public" through grpcio's public API alone."""
        return _gears.server_gear()

    def metrics(self) -> Metrics:
        """Return the counters as they are now."""
        batches, batched_requests = self._room.batches()
        return self._recorder.snapshot(
            model=self._model.name,
            batches=batches,
            batched_requests=batched_requests,
            waiting=self._room.waiting,
            open_streams=self._room.open_streams,
        )

    def print_batcher_summary(self) -> None:
        """Print the counters and the mean times."""
        print(summary(self.metrics(), timed=self._recorder.timed))

    def __repr__(self) -> str:
        if self._shutdown_begun:
            state = "shut down"
        elif self._started_in is not None:
            state = "serving"
        else:
            state = "not started"
        return (
            f"<MukoeBatcher {self._model.name!r} on {self.address}, batches of "
            f"{self._room.batch_size} within {self._batch_timeout_s} s, {state}>"
        )

    # ---- the batch thread ----

    def _run(self) -> None:
        timed = self._recorder.timed
        while (taken := self._room.take_batch()) is not None:
            _reason, tickets = taken
            waits_ns = [ticket.taken_ns - ticket.pushed_ns for ticket in tickets] if timed else ()
            self._recorder.batch_taken(len(tickets), waits_ns)
            begin_ns = time.monotonic_ns() if timed else 0
            try:
                outcomes = outcomes_of(self._callback, [ticket.request for ticket in tickets])
            except BaseException as error:  # such as of a handler of the log; this thread must go on
                outcomes = [Failure(f"the batcher failed: {type(error).__name__}")] * len(tickets)
            if timed:
                self._recorder.callback_timed(time.monotonic_ns() - begin_ns)
            self._room.finish(tickets, outcomes)
            self._delivery.deliver(tickets)
            del taken, tickets, outcomes  # a batcher that waits keeps nothing alive


def create_batcher(
    model: str,
    batch_size: int,
    batch_timeout_s: float,
    port: int = 50051,
    num_threads: int = 16,
    batch_process_fn: Callable[[list[Any]], Sequence[Any]] | None = None,
    *,
    track_metrics: bool = True,
    host: str = "0.0.0.0",
    max_message_bytes: int = 64 * 1024 * 1024,
    max_queue_size: int = 8192,
    max_streams: int = 8192,
    credentials: grpc.ServerCredentials | None = None,
    interceptors: Sequence[grpc.ServerInterceptor] = (),
    health: bool = False,
    reflection: bool = False,
) -> MukoeBatcher:
    """Return a batcher, not yet started, that serves a model to many callers.

    model: "repr", whose callback gets a list of bytes, or "dyna", with a list of (bytes, int).
    batch_size: most requests that the callback gets at once, from 1.
    batch_timeout_s: how long the oldest request waits for others to fill its batch, in seconds; 0 for not at all.
    port: the TCP port to listen on; 0 for one of the system's choice, then found in `.port`.
    num_threads: taken so that calls written for the C++ wheel work; at least 1. It limits nothing.
    batch_process_fn: called with the list of a batch's requests, on one thread, one batch at a time. Returns a list
        with one result per request, in order: (dictionary, step), with bytes for values and an int32, or an Exception
        instance where only that request fails. See the README for what its errors become.
    track_metrics: whether times are measured, for `metrics()` and `print_batcher_summary()`.
    host: the address to listen on, such as "127.0.0.1" or "::1", or a unix socket, such as "unix:/run/batcher.sock",
        which has no port; the default is every IPv4 interface.
    max_message_bytes: the largest request taken; its sender gets RESOURCE_EXHAUSTED.
    max_queue_size: most requests that may wait; the next one gets RESOURCE_EXHAUSTED.
    max_streams: most callers' streams open at once; the next one gets RESOURCE_EXHAUSTED.
    credentials: such as grpc.ssl_server_credentials gives, for TLS; None for plaintext.
    interceptors: gRPC's server interceptors, for instance to check a token in the metadata.
    health: whether gRPC's health service answers, too: SERVING from the end of `start` to the begin of `shutdown`.
    reflection: whether gRPC's reflection service answers, too, by which tools such as grpcurl find what there is.

    Raises ValueError or TypeError that names the argument, its value and what is allowed, and ImportError that names
    what to install for `health` and `reflection`.
    """
    if not isinstance(model, str) or model not in MODELS:
        raise ValueError(f"Invalid model: {model}")
    for name, value, least, most in (
        ("batch_size", batch_size, 1, 2**20),
        ("port", port, 0, 65535),
        ("num_threads", num_threads, 1, 2**31 - 1),
        ("max_message_bytes", max_message_bytes, 1, 2**31 - 1),
        ("max_queue_size", max_queue_size, 1, 2**24),
        ("max_streams", max_streams, 1, 2**24),
    ):
        _check(name, value, _is_int(value) and least <= value <= most, f"an int from {least} to {most}")
    _check(
        "batch_timeout_s",
        batch_timeout_s,
        _is_duration(batch_timeout_s),
        f"a number of seconds from 0 to {_MAX_TIMEOUT_S:.0f}",
    )
    _check("host", host, isinstance(host, str) and host != "", "an address such as '0.0.0.0' or '::1'")
    if not callable(batch_process_fn):
        raise TypeError(
            f"batch_process_fn is {batch_process_fn!r}; it must be a function that takes a list of requests and "
            "returns a list with one (dictionary, step) for each"
        )
    if credentials is not None and not isinstance(credentials, grpc.ServerCredentials):
        raise TypeError(f"credentials is {credentials!r}; it must be a grpc.ServerCredentials, or None")
    for interceptor in interceptors:
        if not isinstance(interceptor, grpc.ServerInterceptor):
            raise TypeError(f"interceptors has {interceptor!r}, which is no grpc.ServerInterceptor")
    return MukoeBatcher(
        model=MODELS[model],
        batch_process_fn=batch_process_fn,
        batch_size=int(batch_size),
        batch_timeout_s=float(batch_timeout_s),
        host=host.strip("[]"),
        port=int(port),
        max_message_bytes=int(max_message_bytes),
        max_queue_size=int(max_queue_size),
        max_streams=int(max_streams),
        track_metrics=bool(track_metrics),
        credentials=credentials,
        interceptors=tuple(interceptors),
        standard_services=StandardServices(health=bool(health), reflection=bool(reflection)),
    )


def _check(name: str, value: Any, is_good: bool, allowed: str) -> None:
    if not is_good:
        raise ValueError(f"{name} is {value!r}; it must be {allowed}")


def _check_grace(grace_s: Any) -> None:
    _check("grace_s", grace_s, _is_duration(grace_s), f"a number of seconds from 0 to {_MAX_TIMEOUT_S:.0f}")


def _is_int(value: Any) -> bool:
    return hasattr(value, "__index__") and not isinstance(value, bool)


def _is_duration(value: Any) -> bool:
    try:
        return math.isfinite(value) and 0 <= value <= _MAX_TIMEOUT_S
    except TypeError:
        return False


# ---- a program that ends without `shutdown`, and forked children ----

_running: weakref.WeakSet[MukoeBatcher] = weakref.WeakSet()


def _shut_down_at_exit() -> None:
    """End the batch threads while they can still take the GIL; later they might hang or abort the exit."""
    batchers = tuple(_running)
    end_s = time.monotonic() + _EXIT_GRACE_S
    for batcher in batchers:
        batcher._shutdown_begun = True
        batcher._room.close()
        batcher._standard_services.say_serving(False)
    for batcher in batchers:
        try:
            batcher._shut_down(max(end_s - time.monotonic(), 0), at_exit=True)
        except Exception:
            _logger.exception("%r did not shut down well", batcher)


atexit.register(_shut_down_at_exit)
os.register_at_fork(after_in_child=_running.clear)
