"""Processes that do what they are told over a pipe. `grpc-batcher bench`, the benchmarks and the soak use them."""

from __future__ import annotations

import faulthandler
import multiprocessing
import os
import signal
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from functools import cached_property
from multiprocessing.connection import Connection
from typing import Any

spawning = multiprocessing.get_context("spawn")  # gRPC does not work in forked children

_STOP_LIMIT_S = 10.0


class WorkerError(Exception):
    """A worker ended before its time, or hangs."""


class Worker:
    """A process that runs `function(pipe, *arguments)`, which sends one object when it is ready and then obeys.

    name: what errors call it.
    answer_limit_s: an answer that takes longer never comes.
    """

    answer_limit_s = 60.0

    def __init__(self, name: str, function: Callable[..., None], *arguments: Any) -> None:
        self.name = name
        self.pipe, theirs = spawning.Pipe()
        self._process = spawning.Process(target=_work, args=(function, theirs, *arguments), name=name, daemon=True)
        # Workers ignore SIGINT from their first moment: a terminal sends it to all, and this process ends them.
        handler = signal.signal(signal.SIGINT, signal.SIG_IGN)
        try:
            self._process.start()
        finally:
            signal.signal(signal.SIGINT, handler)
        theirs.close()

    @property
    def pid(self) -> int:
        return self._process.pid or 0

    @cached_property
    def ready(self) -> Any:
        """Wait until it is ready, and return what it sent then. Raises WorkerError."""
        return self.answer()

    def tell(self, do: str, *arguments: Any, **options: Any) -> None:
        """Send a command, whose answer `answer` returns."""
        _ = self.ready  # or it would be taken for the answer
        with suppress(BrokenPipeError):  # then `answer` says why
            self.pipe.send((do, arguments, options))

    def answer(self) -> Any:
        """Return the next object it sends. Raises WorkerError."""
        try:
            if self.pipe.poll(self.answer_limit_s):
                return self.pipe.recv()
        except (EOFError, OSError):
            pass
        raise self._error()

    def ask(self, do: str, *arguments: Any, **options: Any) -> Any:
        self.tell(do, *arguments, **options)
        return self.answer()

    def end(self) -> None:
        """Wait until a worker that obeyed `stop` has ended. Raises WorkerError unless its exit status is 0."""
        self._process.join(self.answer_limit_s)
        if self._process.exitcode != 0:
            raise self._error()

    def stop(self) -> None:
        """Close its pipe, wait until it has ended, and kill it if that takes long."""
        self.pipe.close()
        self._process.join(_STOP_LIMIT_S)
        self.kill()

    def kill(self) -> None:
        """End it with SIGKILL."""
        self._process.kill()
        self._process.join()
        self.pipe.close()

    def _error(self) -> WorkerError:
        self._process.join(1)
        if self._process.exitcode is not None:
            return WorkerError(f"{self.name} ended with exit status {self._process.exitcode}")
        os.kill(self.pid, signal.SIGABRT)  # which prints the stack of each of its threads
        return WorkerError(f"{self.name} gave no answer within {self.answer_limit_s:.0f} s; its stacks are on stderr")


def stop_all(workers: Sequence[Worker]) -> None:
    """Stop them at the same time."""
    for worker in workers:
        worker.pipe.close()
    for worker in workers:
        worker.stop()


def obey(pipe: Connection, commands: Mapping[str, Callable[..., Any]]) -> None:
    """Call what each command names and send back what it returns, until `stop` has or the other end is closed."""
    do = ""
    with suppress(EOFError, ConnectionError):
        while do != "stop":
            do, arguments, options = pipe.recv()
            pipe.send(commands[do](*arguments, **options))


def _work(function: Callable[..., None], pipe: Connection, *arguments: Any) -> None:
    faulthandler.enable()
    function(pipe, *arguments)
