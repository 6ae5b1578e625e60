"""The batch thread: takes batches from the room, runs the callback, and hands the outcomes on."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence
from typing import Any

from .. import _core
from .callback import Failure, outcomes_of
from .delivery import Delivery
from .metrics import Recorder


class BatchLoop:
    """Runs the callback on a thread of its own, one batch at a time, until the room is closed and empty.

    on_failure: called on the batch thread, as the last thing it does, with what ended it early. Whatever a callback
        does becomes an outcome of its requests; this is for an error of the loop itself, such as MemoryError.
    """

    def __init__(
        self,
        room: _core.WaitingRoom,
        callback: Callable[[list[Any]], Sequence[Any]],
        recorder: Recorder,
        delivery: Delivery,
        on_failure: Callable[[BaseException], None],
    ) -> None:
        self._room = room
        self._callback = callback
        self._recorder = recorder
        self._delivery = delivery
        self._on_failure = on_failure
        self._thread = threading.Thread(target=self._run, name="grpc_batcher-batch", daemon=True)

    def start(self) -> None:
        """Start the thread. Raises RuntimeError if the system has none left."""
        self._thread.start()

    def join(self, timeout_s: float) -> None:
        """Wait until the loop has ended, for `timeout_s` seconds at most."""
        if not self.is_current_thread():
            self._thread.join(timeout_s)

    def is_current_thread(self) -> bool:
        """Whether the batch thread is the caller."""
        return threading.current_thread() is self._thread

    def _run(self) -> None:
        try:
            while (taken := self._room.take_batch()) is not None:
                _reason, tickets = taken
                self._process(tickets)
                del taken, tickets  # a batcher that waits keeps nothing alive
        except BaseException as error:
            self._on_failure(error)

    def _process(self, tickets: list[_core.Ticket]) -> None:
        timed = self._recorder.timed
        waits_ns = [ticket.taken_ns - ticket.pushed_ns for ticket in tickets] if timed else ()
        self._recorder.batch_taken(len(tickets), waits_ns)
        begin_ns = time.monotonic_ns() if timed else 0
        try:
            outcomes = outcomes_of(self._callback, [ticket.request for ticket in tickets])
        except BaseException as error:  # from a log handler, for instance: it costs this batch and not the server
            outcomes = [Failure(f"the batcher failed: {type(error).__name__}")] * len(tickets)
        if timed:
            self._recorder.callback_timed(time.monotonic_ns() - begin_ns)
        self._room.finish(tickets, outcomes)
        self._delivery.deliver(tickets)
