"""What every process of the soak does: obey run.py over a pipe, and report what should not have happened."""

from __future__ import annotations

import logging
import sys
import threading
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection
from typing import Any

from grpc_batcher._cli import workers

# Log records that the load is meant to cause.
_EXPECTED_LOGS = ("the callback raised AskedForError", "shutdown after a grace period of")

_MAX_FAULTS_KEPT = 20


class Faults(logging.Handler):
    """Collects what should not have happened in this process: reported by its code, logged, or not caught."""

    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self._texts: list[str] = []
        logging.getLogger().addHandler(self)
        threading.excepthook = lambda hook: self._raised(f"in thread {hook.thread}", hook.exc_value)
        sys.unraisablehook = lambda hook: self._raised(f"in {hook.object!r}", hook.exc_value)

    def report(self, text: str) -> None:
        if len(self._texts) < _MAX_FAULTS_KEPT:
            self._texts.append(text)

    def take(self) -> list[str]:
        texts, self._texts = self._texts, []
        return texts

    def emit(self, record: logging.LogRecord) -> None:
        text = record.getMessage()
        if record.exc_info and record.exc_info[1] is not None:
            if text.startswith("the callback raised"):
                text = f"the callback raised {type(record.exc_info[1]).__name__}"
            text += "\n" + "".join(traceback.format_exception(*record.exc_info))
        if not text.startswith(_EXPECTED_LOGS):
            self.report(f"it logged: {text}")

    def _raised(self, where: str, error: BaseException | None) -> None:
        self.report(f"{where}: {''.join(traceback.format_exception(error)) if error else 'an unknown error'}")


def obey(pipe: Connection, faults: Faults, commands: dict[str, Callable[..., dict[str, Any]]]) -> None:
    """Do what run.py asks for, until the command `stop` is done or run.py is gone.

    Each answer has the faults since the last, and the memory blocks that Python's allocator has given out.
    """

    def wrapped(command: Callable[..., dict[str, Any]]) -> Callable[..., dict[str, Any]]:
        def call(*arguments: Any) -> dict[str, Any]:
            answer = command(*arguments)
            return {"blocks": sys.getallocatedblocks(), "faults": faults.take(), **answer}

        return call

    workers.obey(pipe, {name: wrapped(command) for name, command in commands.items()})
