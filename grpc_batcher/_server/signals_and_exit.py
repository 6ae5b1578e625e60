"""How a serving process ends: by a signal, or by running to its end without `shutdown`."""

from __future__ import annotations

import logging
import os
import signal
import threading
import time
import weakref
from functools import partial
from typing import TYPE_CHECKING

from .. import _process

if TYPE_CHECKING:
    from .life_cycle import LifeCycle

_logger = logging.getLogger("grpc_batcher")

# How often the main thread looks for signals: one that arrives just before a wait does not interrupt it.
SIGNAL_CHECK_S = 0.2

# How long the exit of a program that never called `shutdown` waits for running callbacks.
_EXIT_GRACE_S = 1.0


def serve_until_signal(life: LifeCycle, grace_s: float) -> None:
    """Serve until SIGTERM, SIGINT or something else ends the server. See `MukoeBatcher.serve_forever`."""
    if threading.current_thread() is not threading.main_thread():
        raise RuntimeError(
            f"serve_forever was called in thread {threading.current_thread().name!r}; call it in the main thread, the "
            "only one in which Python handles signals, or call start() and later shutdown()"
        )
    received: list[int] = []

    def on_signal(number: int, _frame: object) -> None:
        if received:
            raise SystemExit(128 + number)
        received.append(number)

    handlers = {number: signal.signal(number, on_signal) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        if not life.is_ready():
            life.start(is_unwanted=lambda: bool(received))
        while not received and not life.wait_until_shut_down(SIGNAL_CHECK_S):
            pass
        if received:
            _logger.info("%s: shutting down within %s s", signal.Signals(received[0]).name, grace_s)
            # On another thread, so that a second signal does not interrupt it half-way.
            threading.Thread(target=life.shut_down, args=(grace_s,), name="grpc_batcher-shutdown", daemon=True).start()
        while not life.wait_until_shut_down(SIGNAL_CHECK_S):
            pass
    finally:
        for number, handler in handlers.items():
            # None: it was not installed from Python, and cannot be restored from here.
            signal.signal(number, signal.SIG_DFL if handler is None else handler)


_running: weakref.WeakSet[LifeCycle] = weakref.WeakSet()


def add_running(life: LifeCycle) -> None:
    """Have a server shut down when the interpreter exits, unless `remove_running` is called first."""
    _running.add(life)


def remove_running(life: LifeCycle) -> None:
    """The server is shutting down already."""
    _running.discard(life)


def _shut_down_all() -> None:
    """End the batch threads while they can still take the GIL; later they could hang or abort the exit."""
    lives = tuple(_running)
    end_s = time.monotonic() + _EXIT_GRACE_S
    for life in lives:
        _process.call_at_exit(life.refuse_requests)
    for life in lives:
        _process.call_at_exit(partial(life.finish_at_exit, max(end_s - time.monotonic(), 0)))


_process.close_servers_at_exit(_shut_down_all)
os.register_at_fork(after_in_child=_running.clear)
