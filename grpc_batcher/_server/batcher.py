"""The batcher, as users see it."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from types import TracebackType
from typing import Any

import grpc

from .. import _core
from .._array import Array
from .._contract import check_duration
from .._errors import BatcherError
from .._models import Model
from .._transport import choice
from . import signals_and_exit
from .array_callback import ArrayCallback
from .byte_callback import ByteCallback
from .callback import Callback
from .life_cycle import LifeCycle
from .listening import address_of
from .metrics import Metrics, Recorder, summary
from .published import Published
from .service import Service
from .standard_services import StandardServices


class MukoeBatcher:
    """A server that gathers requests into batches for a callback. Made by `create_batcher`.

    It is started once, by `start` or by entering it as a context manager, and shut down once, by `shutdown` or by
    leaving it. All methods may be called from any thread.
    """

    def __init__(
        self,
        *,
        model: Model,
        batch_process_fn: Callable[[Any], Any],
        arrays: Mapping[str, Array] | None,
        batch_sizes: Sequence[int],
        warm_up: Sequence[Any] | bool,
        inference_name: str | None,
        batch_size: int,
        batch_timeout_s: float,
        host: str,
        port: int,
        max_message_bytes: int,
        max_queue_size: int,
        max_queue_bytes: int,
        max_streams: int,
        max_connection_age_s: float | None,
        leave_early: bool,
        track_metrics: bool,
        credentials: grpc.ServerCredentials | None,
        interceptors: tuple[grpc.ServerInterceptor, ...],
        standard_services: StandardServices,
    ) -> None:
        self._model = model
        self._host = host
        self._batch_timeout_s = batch_timeout_s
        self._room = _core.WaitingRoom(
            batch_size,
            round(batch_timeout_s * 1e9),
            max_queue_size,
            capacity_bytes=max_queue_bytes,
            leave_early=leave_early,
        )
        self._recorder = Recorder(timed=track_metrics, batch_size=batch_size)
        self._published = Published()
        callback: Callback
        others: tuple[grpc.GenericRpcHandler, ...] = ()
        if arrays is None:
            requests = () if isinstance(warm_up, bool) else warm_up
            callback = ByteCallback(batch_process_fn, model, self._published, requests)
        else:
            callback = ArrayCallback(
                batch_process_fn, model, arrays, batch_sizes, self._published, self._recorder, warms_up=bool(warm_up)
            )
        service = Service(self._room, callback, self._recorder, max_streams, max_connection_age_s)
        if inference_name is not None and isinstance(callback, ArrayCallback):
            from .open_inference import OpenInference  # only now: its messages take time to load

            others = (OpenInference(service, callback, inference_name, self.metrics),)
        self._life = LifeCycle(
            service,
            model_name=model.name,
            host=host,
            port=port,
            max_message_bytes=max_message_bytes,
            max_streams=max_streams,
            max_connection_age_s=max_connection_age_s,
            credentials=credentials,
            interceptors=interceptors,
            standard_services=standard_services,
            other_handlers=others,
        )

    # ---- life cycle ----

    def start(self) -> None:
        """Warm the callback up if that was asked for, then listen and serve. The batcher is ready when this returns.

        Raises BindError if the address is not available, whatever the callback raises as it warms up, and BatcherError
        if it then returns what cannot be sent. Nothing is left open then, and the batcher may be started again. Raises
        RuntimeError if it was started or shut down before.
        """
        self._life.start()

    def serve_forever(self, grace_s: float = 5.0) -> None:
        """Serve until the process gets SIGTERM or SIGINT (Ctrl-C), then shut down and return.

        grace_s: as for `shutdown`.

        Starts the batcher unless it is started already. Also returns when something else shuts the batcher down. A
        second signal during the shutdown raises SystemExit(128 + the signal's number). The previous signal handlers are
        back in place when this returns. Raises what `start` raises, RuntimeError outside the main thread, and
        BatcherError if an internal error ended the server.
        """
        check_duration("grace_s", grace_s)
        signals_and_exit.serve_until_signal(self._life, grace_s)
        if (failure := self._life.failure) is not None:
            raise BatcherError(
                f"the batch thread failed, and the server ended: {type(failure).__name__}: {failure}"
            ) from failure

    def is_server_ready(self) -> bool:
        """Whether it is started, in this process, and not shut down."""
        return self._life.is_ready()

    def wait_until_ready(self, timeout_s: float | None = None) -> None:
        """Wait until another thread has started it.

        Raises TimeoutError after `timeout_s` seconds (None: never), and RuntimeError if it is shut down.
        """
        self._life.wait_until_ready(timeout_s)

    def shutdown(self, grace_s: float = 5.0) -> None:
        """Stop serving. Returns within the grace period, plus the moment gRPC takes to close its connections.

        grace_s: how long the requests that were taken in may take to be answered, in seconds. New ones get UNAVAILABLE
            at once, and so do those left when the grace period ends.

        May be called again, and from any thread: every call returns when the first is done, or when its own grace
        period ends. Called from the callback, it returns at once and the shutdown goes on in the background. In a
        forked child it does nothing: the batcher is the parent's.
        """
        check_duration("grace_s", grace_s)
        self._life.shut_down(grace_s)

    def __enter__(self) -> MukoeBatcher:
        self.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.shutdown()

    # ---- weights ----

    def publish(self, weights: Any, *, step: int) -> None:
        """Replace the weights that callbacks see, from the next batch on. No batch mixes two versions.

        weights: any object. Callbacks with arrays find it as `batch.weights`.
        step: an int32, the answers' step unless the callback gives another. For callbacks that return bytes, None as a
            result's step stands for it.

        May be called from any thread and at any time, before `start` too. Raises TypeError or ValueError for a step
        that is not an int32.
        """
        self._published.publish(weights, step)

    def between_batches(self, fn: Callable[[], Any]) -> Future[Any]:
        """Have a function called on the batch thread before the next batch, and return the future of its result.

        Use it for what must not happen during a callback, such as loading weights in place. May be called from any
        thread. What is asked for before `start` is called when the batcher starts, before it warms up; what such a
        function asks for itself, with the next batch. A shutdown cancels what was not called yet.

        Raises RuntimeError after a shutdown.
        """
        return self._life.between_batches(fn)

    # ---- what it tells about itself ----

    @property
    def address(self) -> str:
        """What it listens on, as gRPC writes it: "0.0.0.0:50051", "[::1]:50051", "unix:/run/batcher.sock"."""
        return address_of(self._host, self.port)

    @property
    def port(self) -> int:
        """The port it listens on; with `port=0` the system's choice, once it is started."""
        return self._life.port

    @property
    def transport(self) -> str:
        """Which transport carries new streams: "direct", or "public" if only grpcio's public API is used.

        A stream whose handler an interceptor wraps always uses the public transport.
        """
        return choice.server_transport()

    def metrics(self) -> Metrics:
        """Return the counters as they are now."""
        batches, batched_requests, batched_rows = self._room.batches()
        _weights, step, published_ns = self._published.version
        return self._recorder.snapshot(
            model=self._model.name,
            batches=batches,
            batched_requests=batched_requests,
            batched_rows=batched_rows,
            waiting=self._room.waiting,
            waiting_rows=self._room.waiting_rows,
            waiting_bytes=self._room.waiting_bytes,
            open_streams=self._room.open_streams,
            step=None if published_ns is None else step,
            step_age_s=None if published_ns is None else (time.monotonic_ns() - published_ns) / 1e9,
        )

    def print_batcher_summary(self) -> None:
        """Print the counters and the mean durations."""
        print(summary(self.metrics(), timed=self._recorder.timed))

    def __repr__(self) -> str:
        return (
            f"<MukoeBatcher {self._model.name!r} on {self.address}, batches of "
            f"{self._room.batch_size} within {self._batch_timeout_s} s, {self._life.state}>"
        )
