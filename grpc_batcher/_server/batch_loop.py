"""The batch thread: takes batches from the room, runs the callback, and hands the outcomes on."""

from __future__ import annotations

import logging
import threading
import time
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future
from contextlib import suppress
from typing import Any

from .. import _core
from .callback import Callback, Failed
from .delivery import Delivery
from .metrics import Recorder

_logger = logging.getLogger("grpc_batcher")


class BatchLoop:
    """Runs the callback on a thread of its own, one batch at a time, until the room is closed and empty.

    on_failure: called on the batch thread, as the last thing it does, with what ended it early. Whatever a callback
        does becomes an outcome of its requests; this is for an error of the loop itself, such as MemoryError.
    """

    def __init__(
        self,
        room: _core.WaitingRoom,
        callback: Callback,
        recorder: Recorder,
        delivery: Delivery,
        on_failure: Callable[[BaseException], None],
    ) -> None:
        self._room = room
        self._callback = callback
        self._recorder = recorder
        self._delivery = delivery
        self._on_failure = on_failure
        self._thread: threading.Thread | None = None
        self._warm: Future[None] = Future()
        self._is_cancelled = threading.Event()
        self._between: deque[tuple[Future[Any], Callable[[], Any]]] = deque()
        self._is_running = threading.Lock()  # held by the thread, as one that an interrupted start left may still run
        self._lock = threading.RLock()  # makes "not ended" and "queued" one step in between_batches
        self._has_ended = False

    def start(self) -> Future[None]:
        """Start the thread, which warms the callback up and then takes batches, until `cancel` is called.

        Returns a future that is done when the callback is warm, or has the error. In the second case the thread ends.
        After that, or after `cancel`, this may be called again. Raises RuntimeError if the system has no thread left.
        """
        self._warm = Future()
        self._is_cancelled = threading.Event()
        thread = threading.Thread(
            target=self._run,
            args=(self._warm, self._is_cancelled),
            name="grpc_batcher-batch",
            daemon=True,
        )
        thread.start()
        self._thread = thread
        return self._warm

    def cancel(self) -> None:
        """Have the thread end. Returns when it has, unless the callback is still warming up."""
        self._is_cancelled.set()
        self._room.nudge()
        if self._thread is not None and self._warm.done():
            self._thread.join()

    def join(self, timeout_s: float) -> None:
        """Wait until the loop has ended, for `timeout_s` seconds at most."""
        if self._thread is not None and not self.is_current_thread():
            self._thread.join(timeout_s)

    def is_current_thread(self) -> bool:
        """Whether the batch thread is the caller."""
        return threading.current_thread() is self._thread

    def between_batches(self, function: Callable[[], Any]) -> Future[Any]:
        """Have a function called on the batch thread. Raises RuntimeError after `end`."""
        future: Future[Any] = Future()
        with self._lock:
            if self._has_ended:
                raise RuntimeError("this batcher was shut down")
            self._between.append((future, function))
        # On the batch thread itself it waits for a batch, or a function that asks for its next call would never end.
        if not self.is_current_thread():
            self._room.nudge()
        return future

    def end(self) -> None:
        """Cancel what is still to be called between batches, and take nothing more."""
        with self._lock:
            self._has_ended = True
        while (next_call := self._next_between()) is not None:
            next_call[0].cancel()

    def _run(self, warm: Future[None], is_cancelled: threading.Event) -> None:
        with self._is_running:
            if is_cancelled.is_set():
                return
            try:
                self._call_between()
                self._callback.warm_up()
            except BaseException as error:
                warm.set_exception(error)
                return
            warm.set_result(None)
            try:
                self._take_batches(is_cancelled)
            except BaseException as error:
                self._on_failure(error)

    def _take_batches(self, is_cancelled: threading.Event) -> None:
        self._call_between()
        while not is_cancelled.is_set() and (taken := self._room.take_batch()) is not None:
            _reason, tickets = taken
            self._call_between()  # which may have been asked for before these requests were sent
            if tickets:
                self._process(tickets)
                self._call_between()
            del taken, tickets  # a batcher that waits keeps nothing alive

    def _call_between(self) -> None:
        """Call the functions that are queued now, but not those that they queue."""
        for _ in range(len(self._between)):
            if (next_call := self._next_between()) is None:  # a shutdown has cancelled them
                return
            future, function = next_call
            if future.set_running_or_notify_cancel():
                try:
                    result = function()
                except BaseException as error:
                    future.set_exception(error)
                else:
                    future.set_result(result)
                    del result
            del next_call, future, function

    def _next_between(self) -> tuple[Future[Any], Callable[[], Any]] | None:
        try:
            return self._between.popleft()
        except IndexError:
            return None

    def _process(self, tickets: list[_core.Ticket]) -> None:
        timed = self._recorder.timed
        waits_ns = [ticket.taken_ns - ticket.pushed_ns for ticket in tickets] if timed else ()
        self._recorder.batch_taken(sum([ticket.rows for ticket in tickets]), waits_ns)
        begin_ns = time.monotonic_ns() if timed else 0
        try:
            outcomes = self._callback.outcomes_of([ticket.request for ticket in tickets])
        except BaseException as error:  # no memory for its arrays, for instance: it costs this batch and not the server
            with suppress(BaseException):  # a log handler may be what raised
                _logger.exception("the batcher failed, so its batch of %d requests fails", len(tickets))
            outcomes = [Failed(f"the batcher failed: {type(error).__name__}")] * len(tickets)
        if timed:
            encoding_ns = self._callback.encoding_ns
            self._recorder.callback_timed(time.monotonic_ns() - begin_ns - encoding_ns, encoding_ns)
        self._room.finish(tickets, outcomes)
        self._delivery.deliver(tickets)
