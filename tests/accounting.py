"""Trials with an account: each request has a name of its own, and each answer proves which request it is for.

A trial gives a `Ledger` to everyone in it, in whatever process: callers write down what they ask and what comes of it,
the callback what it sees. In the end `Ledger.account` holds all of it against what the library promises.
"""

from __future__ import annotations

import hashlib
import multiprocessing
import os
import threading
import time
import weakref
import zlib
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence, Set
from contextlib import contextmanager
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any, NamedTuple

from serving import eventually, in_background

from grpc_batcher import MukoeBatcherClient, RequestError, create_batcher

# GRPC_BATCHER_TRIALS=20 in the environment makes the trials that say so twenty times as long.
LENGTH = int(os.environ.get("GRPC_BATCHER_TRIALS", "1"))

# What a caller waits before it tries again, as real ones do; and one in a process of its own between two requests, so
# that twenty of them leave some of a small machine to others.
_PAUSE_S = 0.001
_THINKING_S = 0.01


class Account(NamedTuple):
    """What became of the requests of a trial, by their names."""

    answered: list[str]
    failed: dict[str, str]  # with the names of their statuses
    batches: list[list[str]]  # as the callback saw them


class Ledger:
    """An append-only file with a line per event, which outlives the processes that write to it.

    The system orders the lines: one that was written after another stands behind it, whoever wrote them.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._file = os.open(path, os.O_CREAT | os.O_APPEND | os.O_WRONLY)
        weakref.finalize(self, os.close, self._file)
        self.answers = 0  # those that came to this process

    def __reduce__(self) -> tuple[Any, ...]:
        return Ledger, (self._path,)

    def _write(self, *words: str) -> None:
        line = " ".join(words).encode() + b"\n"
        assert os.write(self._file, line) == len(line)

    # ---- the callback's side ----

    def callback(self, requests: list[bytes]) -> list[Any]:
        """A callback that writes down what it sees, and answers each request with the proof that it is the one."""
        self._write("seen", *(name_in(data) for data in requests))
        return [_proof_for(data) for data in requests]

    # ---- the callers' side ----

    def ask(
        self, client: MukoeBatcherClient, name: str, *, extra_bytes: int = 0, timeout_s: float | None = None
    ) -> bool:
        """Send a request, and write down what comes of it; whether that is an answer.

        name: without spaces, and of this request alone; the part before the last "/" is its caller's.
        """
        data = name.encode() + b" " + bytes(extra_bytes)
        self._write("asked", name)
        try:
            answer = client.send_request(data, timeout_s=timeout_s)
        except RequestError as error:
            self._write("failed", name, error.code().name)
            return False
        self._write("answered" if answer == _proof_for(data) else "got-another's-answer", name)
        self.answers += 1
        return True

    def keep_asking(
        self,
        client: MukoeBatcherClient,
        caller: str,
        is_over: Callable[[], bool],
        *,
        extra_bytes: int = 0,
        thinking_s: float = 0,
    ) -> None:
        """Send one request after the other, with the same client whatever happens, until the trial is over."""
        number = 0
        while not is_over():
            number += 1
            is_answered = self.ask(client, f"{caller}/{number}", extra_bytes=extra_bytes)
            time.sleep(thinking_s if is_answered else _PAUSE_S)

    # ---- the account ----

    def note_gone(self, names: Iterable[str]) -> None:
        """Write down that the server knows that these are gone: requests, or callers with all of theirs."""
        self._write("gone", *names)

    def account(self, *, failures: Set[str] = frozenset(), killed: Set[str] = frozenset()) -> Account:
        """Return what happened, if it is what the library promises.

        failures: the names of the statuses that a request may have failed with in this trial.
        killed: callers whose last request may have ended unseen.
        """
        events: dict[str, list[list[str]]] = {}
        asked: dict[str, int] = {}
        gone: dict[str, int] = {}
        batches: list[list[str]] = []
        ends: Counter[str] = Counter()
        for line in self._path.read_text().splitlines():
            kind, *words = line.split(" ")
            events.setdefault(kind, []).append(words)
            if kind == "asked":
                assert words[0] not in asked, f"the trial asked {words[0]} twice"
                asked[words[0]] = len(batches)
            elif kind == "seen":
                batches.append(words)
            elif kind == "gone":
                gone.update(dict.fromkeys(words, len(batches)))
            else:
                ends[words[0]] += 1
        assert "got-another's-answer" not in events, events["got-another's-answer"]

        seen = Counter(name for batch in batches for name in batch)
        assert [name for name, times in seen.items() if times > 1] == [], "the callback saw requests twice"
        assert seen.keys() <= asked.keys(), "the callback saw what nobody asked"
        for number, batch in enumerate(batches):
            for name in batch:
                # The callback may have been about to write down the batch that it had when they went.
                gone_at = min(gone.get(each, number) for each in (name, _caller_of(name)))
                assert number - gone_at <= 0, f"the callback saw {name} after its caller was known to be gone"

        assert set(ends.values()) <= {1}, "requests ended twice"
        last = {_caller_of(name): name for name in asked}
        lost = asked.keys() - ends.keys() - {last[caller] for caller in killed if caller in last}
        assert not lost, f"requests were neither answered nor failed: {lost}"
        answered = [name for [name] in events.get("answered", [])]
        assert seen.keys() >= set(answered), "answers came to requests that the callback did not see"
        failed = dict(events.get("failed", []))
        assert {name: code for name, code in failed.items() if code not in failures} == {}
        refused = {name for name, code in failed.items() if code in ("RESOURCE_EXHAUSTED", "INVALID_ARGUMENT")}
        assert not refused & seen.keys(), "the callback saw requests that were refused"
        return Account(answered, failed, batches)


@contextmanager
def asking(ledger: Ledger, name: str, clients: Sequence[MukoeBatcherClient]) -> Iterator[None]:
    """A thread for each client, "name-0" and so on, that keeps asking until this is left."""
    over = threading.Event()
    callers = [
        in_background(ledger.keep_asking, client, f"{name}-{number}", over.is_set, extra_bytes=100 * number)
        for number, client in enumerate(clients)
    ]
    try:
        yield
    finally:
        over.set()
    for caller in callers:
        caller.result()


def wait_for_answers(ledger: Ledger, count: int) -> None:
    """Wait until so many more requests are answered."""
    enough = ledger.answers + count
    eventually(lambda: ledger.answers >= enough)


def name_in(data: bytes) -> str:
    """The name of the request with this data."""
    return data.partition(b" ")[0].decode()


def _caller_of(name: str) -> str:
    return name.rpartition("/")[0]


def _proof_for(data: bytes) -> tuple[dict[str, bytes], int]:
    return {"name": name_in(data).encode(), "digest": hashlib.sha256(data).digest()}, zlib.crc32(data) & 0x7FFFFFFF


# ---- processes ----

# Forked from a process that has imported the library and never used it: a hundredth of a second each.
_forkserver = multiprocessing.get_context("forkserver")
_forkserver.set_forkserver_preload(["pytest", "accounting"])


def start_process(function: Callable[..., None], *arguments: Any) -> BaseProcess:
    """Run a function of a module in a process of its own, which ends with this one at the latest."""
    process = _forkserver.Process(target=function, args=arguments, daemon=True)
    process.start()
    return process


def ask_until_killed(ledger: Ledger, address: str, caller: str, extra_bytes: int = 0) -> None:
    """What a caller's process does."""
    with MukoeBatcherClient(address) as client:
        ledger.keep_asking(client, caller, lambda: False, extra_bytes=extra_bytes, thinking_s=_THINKING_S)


def serve_until_killed(ledger: Ledger, host: str, port: int, ready: Connection) -> None:
    """What a server's process does. It says its port once it serves."""
    with create_batcher("repr", 8, 0.001, port, batch_process_fn=ledger.callback, host=host) as batcher:
        ready.send(batcher.port)
        threading.Event().wait()


def start_server(ledger: Ledger, host: str, port: int = 0) -> tuple[BaseProcess, int]:
    """A server's process, and its port."""
    receiver, sender = _forkserver.Pipe(duplex=False)
    with receiver, sender:
        process = start_process(serve_until_killed, ledger, host, port, sender)
        sender.close()
        return process, receiver.recv()
