"""A process of callers, which run.py tells what to do."""

from __future__ import annotations

import time
from collections.abc import Iterator
from multiprocessing.connection import Connection as Pipe

from grpc_batcher import info
from grpc_batcher._cli.load import Job, Outcome, Send, Window, run
from grpc_batcher._cli.workers import obey

from callers import Connection, connect

# gRPC closes a socket a moment after its channel. Until then, plain grpcio's next channel would share it.
_CLOSING_S = 0.01


class Callers:
    """Callers of one server; its public methods are the commands."""

    def __init__(self, kind: str, address: str) -> None:
        self._server = kind, address
        self.connection = connect(kind, address)
        self._closed = False
        self._shape = (0, 0, 0)
        self._senders: list[Send] = []
        self._jobs: list[list[Job]] = []

    def prepare(self, callers: int, first: int, payload_bytes: int) -> None:
        """Make what `callers` threads need. `first` numbers the callers over all processes."""
        if self._closed:
            self.connection = connect(*self._server)
            self._closed = False
        self._senders = self.connection.senders(callers)
        if self._shape != (shape := (callers, first, payload_bytes)):
            self._shape = shape
            self._jobs = list(_jobs(self.connection, *shape))

    def run(self, window: Window, most_requests: int | None = None) -> tuple[Outcome, str | None]:
        """Have them ask in this window, each at most `most_requests` times. Returns the outcome and the transport."""
        if self.connection.run is not None:
            outcome = self.connection.run(self._jobs, window)
        else:
            outcome = run(self._senders, self._jobs, window, most_requests=most_requests)
        return outcome, self.connection.transport()

    def first_requests(self, window_s: float) -> list[int]:
        """Make one connection after the other; return how long each took from its making to its first answer, in ns."""
        self.close()
        payload = bytes(64)
        durations_ns = []
        until_ns = time.monotonic_ns() + int(window_s * 1e9)
        while (begin_ns := time.monotonic_ns()) < until_ns:
            connection = connect(*self._server)
            (send,) = connection.senders(1)
            answer = send(payload)
            durations_ns.append(time.monotonic_ns() - begin_ns)
            if answer != connection.expected(payload):
                raise RuntimeError(f"a wrong answer: {answer!r}")
            connection.close()
            time.sleep(_CLOSING_S)
        return durations_ns

    def connect(self, address: str) -> None:
        """Ask another server of the same kind from now on."""
        self.close()
        self._server = self._server[0], address

    def close(self) -> None:
        """Close the connection; the next `prepare` makes a new one."""
        self.connection.close()
        self._closed = True


def call(pipe: Pipe, kind: str, address: str) -> None:
    """The process."""
    callers = Callers(kind, address)
    pipe.send({"transport": callers.connection.transport()})
    commands = {name: getattr(callers, name) for name in ("prepare", "run", "first_requests", "connect", "close")}
    obey(pipe, {**commands, "info": info})


def _jobs(connection: Connection, callers: int, first: int, payload_bytes: int) -> Iterator[list[Job]]:
    """Two payloads per caller, so that an answer to its last request does not pass for one to this request."""
    for caller in range(first, first + callers):
        payloads = [connection.payload(payload_bytes, 2 * caller + which) for which in range(2)]
        yield [Job(payload, connection.expected(payload)) for payload in payloads]
