"""Which thread sends a batch's replies: the batch thread, unless another batch is already due."""

from __future__ import annotations

import logging
import queue
import threading
from contextlib import suppress

from .. import _core

_logger = logging.getLogger("grpc_batcher")


class Delivery:
    """Hands ended tickets to their sessions.

    The batch thread does so itself, which saves waking another, for as long as no further batch is due. What is left
    then goes to a second thread, so that replies are sent while the next callback runs.
    """

    def __init__(self, room: _core.WaitingRoom) -> None:
        self._room = room
        self._left_over: queue.SimpleQueue[list[_core.Ticket] | None] = queue.SimpleQueue()
        self._thread: threading.Thread | None = None

    def deliver(self, tickets: list[_core.Ticket]) -> None:
        """Deliver the tickets of a batch. Only one thread may call this."""
        for index, ticket in enumerate(tickets):
            if ticket.owner.stream is None:  # the transport's own thread waits for it, or the stream is over
                continue
            if self._room.is_due() and self._hand_over(tickets[index:]):
                return
            _deliver(ticket)

    def close(self, timeout_s: float) -> None:
        """Wait until all is delivered, for `timeout_s` seconds at most. Call this after the last `deliver`."""
        if self._thread is not None:
            self._left_over.put(None)
            self._thread.join(timeout_s)

    def _hand_over(self, tickets: list[_core.Ticket]) -> bool:
        """Give tickets to the second thread; False if it cannot be started."""
        if self._thread is None or not self._thread.is_alive():
            thread = threading.Thread(target=self._run, name="grpc_batcher-replies", daemon=True)
            try:
                thread.start()
            except RuntimeError as error:
                with suppress(Exception):
                    _logger.error("no thread to send replies while the callback runs: %s", error)
                return False
            self._thread = thread
        self._left_over.put(tickets)
        return True

    def _run(self) -> None:
        while (tickets := self._left_over.get()) is not None:
            for ticket in tickets:
                _deliver(ticket)
            del tickets, ticket  # a thread that waits keeps nothing alive


def _deliver(ticket: _core.Ticket) -> None:
    """Deliver a ticket. A reply that cannot be sent must not keep the others from being sent."""
    try:
        ticket.owner.deliver(ticket)
    except BaseException:
        with suppress(BaseException):  # a log handler may raise, too
            _logger.exception("a reply could not be sent")
