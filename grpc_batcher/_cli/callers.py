"""The callers of `grpc-batcher bench`: threads in processes of their own, over one window of time."""

from __future__ import annotations

import multiprocessing
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from multiprocessing.connection import Connection, wait
from types import TracebackType

from .._cli.options import Failure, Security
from .._client.client import MukoeBatcherClient
from .._cli.load import Job, Outcome, Window, run

# From the order to ask until callers begin: for the order to reach all processes.
_LEAD_S = 0.1

_READY_LIMIT_S = 60.0

# How often whoever watches is told, at the least.
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
    """So many processes of callers, kept for several windows. Leaving it as a context manager ends them."""

    def __init__(self, question: Question, processes: int) -> None:
        context = multiprocessing.get_context("spawn")  # gRPC does not work in forked children
        self._pipes: list[Connection] = []
        self._processes = []
        # They ignore SIGINT from their first moment: a terminal sends it to all, and this process ends them.
        handler = signal.signal(signal.SIGINT, signal.SIG_IGN)
        try:
            for _ in range(processes):
                ours, theirs = context.Pipe()
                process = context.Process(target=_answer_orders, args=(question, theirs), daemon=True)
                process.start()
                theirs.close()
                self._pipes.append(ours)
                self._processes.append(process)
        finally:
            signal.signal(signal.SIGINT, handler)

    def wait_until_ready(self) -> None:
        for pipe in self._pipes:
            if not pipe.poll(_READY_LIMIT_S):
                raise Failure(f"a process of callers is not ready after {_READY_LIMIT_S:.0f} s")
            _receive(pipe)

    def ask(self, callers: int, warm_up_s: float, duration_s: float, watch: Callable[[float, int], None]) -> Asked:
        """Have so many callers ask, shared among the processes.

        warm_up_s: what comes in so many seconds does not count.
        watch: called now and then with the seconds that have passed, and the answers that count so far.

        Raises Failure if a process is lost.
        """
        start_ns = time.monotonic_ns() + int(_LEAD_S * 1e9)
        from_ns = start_ns + int(warm_up_s * 1e9)
        window = Window(start_ns, from_ns, from_ns + int(duration_s * 1e9))
        share, rest = divmod(callers, len(self._pipes))
        busy = list(enumerate(self._pipes[:callers]))
        for number, pipe in busy:
            with _told_if_lost():
                pipe.send((share + (number < rest), window))
        answers = [0] * len(busy)
        merged = Outcome()
        cpu_cores = 0.0
        while busy:
            wait([pipe for _, pipe in busy], timeout=_LOOK_EVERY_S)
            for number, pipe in tuple(busy):
                while (number, pipe) in busy and pipe.poll():
                    said = _receive(pipe)
                    if isinstance(said, int):
                        answers[number] = said
                    else:
                        merged.add(said.outcome)
                        cpu_cores = max(cpu_cores, said.cpu_cores)
                        busy.remove((number, pipe))
            watch(max(0.0, (time.monotonic_ns() - start_ns) / 1e9), sum(answers))
        return Asked(merged, cpu_cores)

    def __enter__(self) -> Callers:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        for pipe in self._pipes:
            pipe.close()
        for process in self._processes:
            if kind is not None:  # it may have a window to go on with
                process.terminate()
            process.join()


@contextmanager
def _told_if_lost() -> Iterator[None]:
    try:
        yield
    except (EOFError, OSError):
        raise Failure("a process of callers ended before its time") from None


def _receive(pipe: Connection) -> int | Asked:
    """What a process says: how many answers it has so far, or what came of its window. Raises Failure for its error."""
    with _told_if_lost():
        said: int | Asked | str = pipe.recv()
    if isinstance(said, str):
        raise Failure(said)
    return said


def _answer_orders(question: Question, pipe: Connection) -> None:
    """What a process of callers does, until the other end of its pipe is closed."""
    with question.connect() as client:
        send = partial(client.send_request, action=question.action, timeout_s=question.timeout_s)
        try:
            pipe.send(0)
            while True:
                callers, window = pipe.recv()
                begin_s, cpu_before_s = time.monotonic(), time.process_time()
                outcome = run([send] * callers, [[Job(question.payload)]] * callers, window, watch=pipe.send)
                cpu_s, lasted_s = time.process_time() - cpu_before_s, time.monotonic() - begin_s
                pipe.send(Asked(outcome, cpu_s / lasted_s))
        except (EOFError, OSError):
            return
        except RuntimeError as error:  # there can be no more threads
            pipe.send(f"{callers} callers are too many for a process here: {error}")
