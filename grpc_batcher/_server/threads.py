"""The threads on which gRPC runs handlers."""

from __future__ import annotations

import logging
import threading
from collections import deque
from collections.abc import Callable
from concurrent.futures import Executor, Future
from contextlib import suppress
from typing import Any

_logger = logging.getLogger("grpc_batcher")


class DaemonThreadPool(Executor):
    """Runs every call at once, on an idle thread or else on a new one.

    `concurrent.futures.ThreadPoolExecutor` can grow the same way, but the interpreter waits for its threads before it
    runs exit handlers, so a program that never shuts its server down could not end.

    idle_s: how many seconds without work a thread lives.
    """

    def __init__(self, name: str, idle_s: float = 10.0) -> None:
        self._name = name
        self._idle_s = idle_s
        self._changed = threading.Condition()
        self._work: deque[tuple[Future[Any], Callable[[], Any]]] = deque()
        self._idle = 0
        self._closed = False

    def submit(self, fn: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Future[Any]:
        future: Future[Any] = Future()
        with self._changed:
            self._work.append((future, lambda: fn(*args, **kwargs)))
            if self._idle >= len(self._work):
                self._changed.notify()
                return future
        try:
            threading.Thread(target=self._run, name=self._name, daemon=True).start()
        except RuntimeError as error:
            # gRPC's polling thread is the caller, and must survive this. The next thread that becomes free takes the
            # work.
            with suppress(Exception):
                _logger.error("no thread for a new stream, which waits until another stream ends: %s", error)
        return future

    def shutdown(self, wait: bool = True, *, cancel_futures: bool = False) -> None:
        """End idle threads now, and busy ones after their work. Never waits: they are daemons."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()

    def _run(self) -> None:
        while (item := self._next()) is not None:
            future, call = item
            if not future.set_running_or_notify_cancel():
                continue
            try:
                future.set_result(call())
            except BaseException as error:
                future.set_exception(error)
            del item, future, call  # an idle thread keeps nothing alive

    def _next(self) -> tuple[Future[Any], Callable[[], Any]] | None:
        with self._changed:
            self._idle += 1
            while not self._work and not self._closed and self._changed.wait(self._idle_s):
                pass
            self._idle -= 1
            return self._work.popleft() if self._work else None
