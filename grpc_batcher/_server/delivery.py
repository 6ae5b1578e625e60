"""Who sends a batch's replies: the batch thread, unless it has something better to do."""

from __future__ import annotations

import logging
import queue
import threading
from contextlib import suppress

from .. import _core

_logger = logging.getLogger("grpc_batcher")


class Delivery:
    """Hands ended tickets to the transports of their sessions.

    The thread that ran the callback does it itself, which saves waking another, as long as no further batch is due.
    What is left then goes to a second thread, so that replies are sent while the next callback runs.
    """

    def __init__(self, room: _core.WaitingRoom) -> None:
        self._room = room
        self._left_over: queue.SimpleQueue[list[_core.Ticket] | None] = queue.SimpleQueue()
        self._thread: threading.Thread | None = None

    def deliver(self, tickets: list[_core.Ticket]) -> None:
        """Deliver the tickets of a batch. To be called by one thread."""
        for number, ticket in enumerate(tickets):
            if ticket.owner.transport is None:  # its own thread waits for it, or the stream is over
                continue
            if self._room.is_due() and self._leave(tickets[number:]):
                return
            _deliver(ticket)

    def close(self, timeout_s: float) -> None:
        """Wait, for so long at the most, until all is delivered. To be called after the last `deliver`."""
        if self._thread is not None:
            self._left_over.put(None)
            self._thread.join(timeout_s)

    def _leave(self, tickets: list[_core.Ticket]) -> bool:
        """Hand tickets to the second thread; False if there can be none."""
        if self._thread is None:
            thread = threading.Thread(target=self._run, name="grpc_batcher-replies", daemon=True)
            try:
                thread.start()
            except RuntimeError as error:
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
    """One reply that can not be sent must not keep others from being sent."""
    transport = ticket.owner.transport
    try:
        if transport is not None:
            transport.send_reply(ticket)
    except Exception:
        with suppress(Exception):  # a handler of the log may raise, too
            _logger.exception("a reply could not be sent")
