"""Futures, and a wait for several requests, without a thread for each."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from functools import partial
from typing import Any

from .exchange import Exchange, Exchanges


class RequestFuture(Future[tuple[dict[str, Any], int]]):
    """The outcome of a request. It is pending until then, so that `cancel` works all the time.

    exchange: the request on its way; None if it was never sent.
    """

    exchange: Exchange | None = None

    def cancel(self) -> bool:
        """Withdraw the request; its callback may be running, and runs on. Returns False if the outcome is there."""
        try:
            return super().cancel()
        finally:  # its callbacks run in there, and may raise SystemExit
            if self.exchange is not None and self.cancelled():
                self.exchange.cancel()

    def finish(self, outcome: Any) -> None:
        """Set the result, or the exception if the outcome is one. Those who wait for a cancelled future learn of it."""
        if not self.set_running_or_notify_cancel():
            return
        if isinstance(outcome, Exception):
            self.set_exception(outcome)
        else:
            self.set_result(outcome)


def send_all(
    exchanges: Exchanges, messages: Sequence[Callable[[], bytes]], due_ns: int | None
) -> list[bytes | Exception]:
    """Send all messages and wait until all have ended. Returns the reply or the error of each, in the same order.

    messages: what returns each message, or raises the error that stands in its place.

    Raises RuntimeError if the client was closed before all were sent. Those that were sent are then cancelled.
    """
    ends: list[Any] = [None] * len(messages)
    pending = _Countdown(len(messages))

    def end(number: int, reply: bytes | None, error: Exception | None) -> None:
        ends[number] = error if reply is None else reply
        pending.count()

    places = exchanges.places
    every = [Exchange(exchanges, due_ns, partial(end, number)) for number in range(len(messages))]
    try:
        first = 0
        while first < len(every):
            count = places.take_free(every[first : first + places.limit]) or int(places.take(every[first], due_ns))
            if count == 0:
                every[first].end(None, exchanges.no_place())
                first += 1
                continue
            batch = []
            for number in range(first, first + count):
                try:
                    every[number].message = messages[number]()
                    batch.append(every[number])
                except Exception as error:
                    every[number].end(None, error.with_traceback(None))
            exchanges.begin(batch, due_ns)
            first += count
        pending.wait()
    except BaseException:  # such as Ctrl-C, or the client was closed
        for exchange in every:
            exchange.abandon()
        raise
    return ends


class _Countdown:
    """Waits until something has happened a number of times, which may be 0."""

    def __init__(self, left: int) -> None:
        self._left = left
        self._lock = threading.Lock()
        self._is_over = threading.Event()
        if left == 0:
            self._is_over.set()

    def count(self) -> None:
        with self._lock:
            self._left -= 1
            is_over = self._left == 0
        if is_over:
            self._is_over.set()

    def wait(self) -> None:
        self._is_over.wait()
