"""The callers of `grpc-batcher bench`: threads in processes of their own, over one window of time."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from multiprocessing.connection import Connection, wait
from types import TracebackType

from .._client.client import MukoeBatcherClient
from .load import Job, Outcome, Window, run
from .options import CommandError, Security
from .workers import Worker, WorkerError, obey, stop_all

# From the command to the first request: the command has to reach all processes.
_LEAD_S = 0.1

# `watch` is called at least this often.
_LOOK_EVERY_S = 0.25


@dataclass(frozen=True)
class Question:
    """What callers ask, and whom. Plain values: it goes to other processes.

    action: for "dyna"; None for "repr".
    timeout_s: how long a request may take, in seconds.
    """

    address: str
    security: Security
    metadata: tuple[tuple[str, str], ...]
    payload: bytes
    action: int | None
    timeout_s: float
    max_message_bytes: int

    def connect(self) -> MukoeBatcherClient:
        return MukoeBatcherClient(
            self.address,
            max_message_bytes=self.max_message_bytes,
            credentials=self.security.credentials(),
            options=self.security.options(),
            metadata=self.metadata,
        )

    def ask(self, client: MukoeBatcherClient) -> None:
        """Send one request. Raises what `send_request` raises."""
        client.send_request(self.payload, self.action, timeout_s=self.timeout_s)


@dataclass(frozen=True)
class Asked:
    """What came of a window.

    cpu_cores: cores that the busiest process of callers used, on average.
    """

    outcome: Outcome
    cpu_cores: float


class Callers:
    """Processes of callers, kept for several windows. Leaving it as a context manager ends them."""

    def __init__(self, question: Question, processes: int) -> None:
        self._workers = [Worker("a process of callers", _obey, question) for _ in range(processes)]

    def wait_until_ready(self) -> None:
        with _failure_if_lost():
            for worker in self._workers:
                _ = worker.ready

    def ask(self, callers: int, warm_up_s: float, duration_s: float, watch: Callable[[float, int], None]) -> Asked:
        """Have `callers` threads ask, shared among the processes.

        warm_up_s: what comes in these first seconds does not count.
        watch: called now and then with the seconds that have passed, and the answers that count so far.

        Raises CommandError if a process is lost.
        """
        start_ns = time.monotonic_ns() + int(_LEAD_S * 1e9)
        from_ns = start_ns + int(warm_up_s * 1e9)
        window = Window(start_ns, from_ns, from_ns + int(duration_s * 1e9))
        share, rest = divmod(callers, len(self._workers))
        answers: dict[Connection, int] = {}
        busy = {worker.pipe: worker for worker in self._workers[:callers]}
        merged = Outcome()
        cpu_cores = 0.0
        with _failure_if_lost():
            for number, worker in enumerate(busy.values()):
                worker.tell("ask", share + (number < rest), window)
            while busy:
                for pipe in wait(list(busy), timeout=_LOOK_EVERY_S):
                    assert isinstance(pipe, Connection)
                    said: int | Asked | str = busy[pipe].answer()
                    if isinstance(said, str):
                        raise CommandError(said)
                    if isinstance(said, int):
                        answers[pipe] = said
                    else:
                        merged.add(said.outcome)
                        cpu_cores = max(cpu_cores, said.cpu_cores)
                        del busy[pipe]
                watch(max(0.0, (time.monotonic_ns() - start_ns) / 1e9), sum(answers.values()))
        return Asked(merged, cpu_cores)

    def __enter__(self) -> Callers:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if kind is not None:  # they may have a window to go on with
            for worker in self._workers:
                worker.kill()
        stop_all(self._workers)


@contextmanager
def _failure_if_lost() -> Iterator[None]:
    try:
        yield
    except WorkerError as error:
        raise CommandError(str(error)) from None


def _obey(pipe: Connection, question: Question) -> None:
    """A process of callers. While they ask, it sends how many answers there are so far."""
    with question.connect() as client:
        send = partial(client.send_request, action=question.action, timeout_s=question.timeout_s)

        def ask(callers: int, window: Window) -> Asked | str:
            begin_s, cpu_before_s = time.monotonic(), time.process_time()
            try:
                outcome = run([send] * callers, [[Job(question.payload)]] * callers, window, watch=pipe.send)
            except RuntimeError as error:  # no more threads can be started
                return f"{callers} callers are too many for a process here: {error}"
            cpu_s, lasted_s = time.process_time() - cpu_before_s, time.monotonic() - begin_s
            return Asked(outcome, cpu_s / lasted_s)

        pipe.send(None)
        obey(pipe, {"ask": ask})
