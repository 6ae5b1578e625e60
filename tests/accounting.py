"""An account of every request in a trial: each has its own name, and each answer proves which request it is for.

All processes of a trial share a `Ledger`. Callers record what they ask and the outcome; the callback records what it
sees. In the end, `Ledger.account` compares everything with what the library promises.
"""

from __future__ import annotations

import asyncio
import hashlib
import multiprocessing
import os
import threading
import time
import weakref
import zlib
from collections import Counter
from collections.abc import Callable, Coroutine, Iterable, Iterator, Sequence, Set
from contextlib import AbstractContextManager, contextmanager
from multiprocessing import forkserver
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any, NamedTuple

from grpc_batcher import Array, AsyncMukoeBatcherClient, Batch, MukoeBatcher, MukoeBatcherClient, RequestError

import numpy as np
from serving import eventually, in_background, serving

# GRPC_BATCHER_TRIALS=20 in the environment makes the random trials twenty times as long.
LENGTH = int(os.environ.get("GRPC_BATCHER_TRIALS", "1"))

# How long a caller waits before it tries again, as real ones do; and how long one with its own process waits between
# two requests, so that twenty of them leave some of a small machine to others.
_PAUSE_S = 0.001
_THINKING_S = 0.01


class Account(NamedTuple):
    """The outcome of a trial's requests, by name."""

    answered: list[str]
    failed: dict[str, str]  # request to the name of its status
    batches: list[list[str]]  # as the callback saw them


class Ledger:
    """An append-only file with a line per event, which outlives the processes that write to it.

    The lines are in the order in which they were written, whichever process wrote them.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._file = os.open(path, os.O_CREAT | os.O_APPEND | os.O_WRONLY)
        weakref.finalize(self, os.close, self._file)
        self.answers = 0  # received by this process

    def __reduce__(self) -> tuple[Any, ...]:
        return Ledger, (self._path,)

    def _write(self, *words: str) -> None:
        line = " ".join(words).encode() + b"\n"
        assert os.write(self._file, line) == len(line)

    # ---- the callback's side ----

    def callback(self, requests: list[bytes]) -> list[Any]:
        """A callback that records what it sees, and answers each request with a proof that only fits this request."""
        self._write("seen", *(_name_in(data) for data in requests))
        return [_proof_for(data) for data in requests]

    # ---- the callers' side ----

    def ask(
        self, client: MukoeBatcherClient, name: str, *, extra_bytes: int = 0, timeout_s: float | None = None
    ) -> bool:
        """Send a request and record the outcome; return whether it was answered.

        name: unique and without spaces; the part before the last "/" names the caller.
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

    def ask_many(self, client: MukoeBatcherClient, names: Sequence[str]) -> None:
        """Send requests at once and record their outcomes."""
        for name in names:
            self._write("asked", name)
        data = [f"{name} ".encode() for name in names]
        for name, sent, end in zip(names, data, client.send_many(data, return_exceptions=True), strict=True):
            if isinstance(end, RequestError):
                self._write("failed", name, end.code().name)
            else:
                self._write("answered" if end == _proof_for(sent) else "got-another's-answer", name)
                self.answers += 1

    def keep_asking(
        self,
        client: MukoeBatcherClient,
        caller: str,
        is_over: Callable[[], bool],
        *,
        extra_bytes: int = 0,
        thinking_s: float = 0,
    ) -> None:
        """Send one request after another with the same client, whatever happens, until the trial is over."""
        number = 0
        while not is_over():
            number += 1
            is_answered = self.ask(client, f"{caller}/{number}", extra_bytes=extra_bytes)
            time.sleep(thinking_s if is_answered else _PAUSE_S)

    # ---- the account ----

    def unended(self) -> set[str]:
        """Return the requests that have neither been answered nor failed yet."""
        unended: set[str] = set()
        for line in self._path.read_text().splitlines():
            kind, *words = line.split(" ")
            if kind == "asked":
                unended.update(words)
            elif kind in ("answered", "failed"):
                unended.discard(words[0])
        return unended

    def note_gone(self, names: Iterable[str]) -> None:
        """Record that the server knows that these requests, or all requests of these callers, are gone."""
        self._write("gone", *names)

    def account(self, *, failures: Set[str] = frozenset(), killed: Set[str] = frozenset()) -> Account:
        """Return what happened. Fails if it is not what the library promises.

        failures: the names of the statuses that requests may fail with in this trial.
        killed: callers whose last request may have ended unrecorded.
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
                assert words[0] not in asked, f"the trial sent {words[0]} twice"
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
        assert seen.keys() <= asked.keys(), "the callback saw requests that nobody sent"
        for number, batch in enumerate(batches):
            for name in batch:
                # The callback may have been about to record the batch it had when they left.
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
def asking(
    ledger: Ledger, name: str, clients: Sequence[MukoeBatcherClient], *, step_bytes: int = 100
) -> Iterator[None]:
    """Keep sending requests until this is left, on a thread per client named "name-0" and so on.

    step_bytes: how much longer each one's requests are than those of the one before.
    """
    over = threading.Event()
    callers = [
        in_background(ledger.keep_asking, client, f"{name}-{number}", over.is_set, extra_bytes=step_bytes * number)
        for number, client in enumerate(clients)
    ]
    try:
        yield
    finally:
        over.set()
    for caller in callers:
        caller.result()


def wait_for_answers(ledger: Ledger, count: int) -> None:
    """Wait until this process has got this many more answers."""
    enough = ledger.answers + count
    eventually(lambda: ledger.answers >= enough)


def _name_in(data: bytes) -> str:
    """Return the name of the request with this data."""
    return data.partition(b" ")[0].decode()


def _caller_of(name: str) -> str:
    return name.rpartition("/")[0]


def _proof_for(data: bytes) -> tuple[dict[str, bytes], int]:
    return {"name": _name_in(data).encode(), "digest": hashlib.sha256(data).digest()}, zlib.crc32(data) & 0x7FFFFFFF


# ---- ways to send ----


class FuturesClient(MukoeBatcherClient):
    """Sends each request with `submit`, and waits for its future."""

    def send_request(self, *arguments: Any, **named: Any) -> Any:
        return self.submit(*arguments, **named).result()


class AsyncioClient:
    """Sends each request as a task of a loop, which runs on a thread of its own."""

    def __init__(self, address: str) -> None:
        self.client = AsyncMukoeBatcherClient(address)
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, daemon=True)
        self._thread.start()

    def send_request(self, *arguments: Any, **named: Any) -> Any:
        return self.run(self.client.send_request(*arguments, **named))

    def run(self, coroutine: Coroutine[Any, Any, Any]) -> Any:
        """Run a coroutine in the loop, and wait for it."""
        return asyncio.run_coroutine_threadsafe(coroutine, self._loop).result()

    def close(self) -> None:
        if not self._loop.is_closed():
            self.run(self._close())
            self._loop.call_soon_threadsafe(self._loop.stop)
            self._thread.join()
            self._loop.close()

    def __enter__(self) -> AsyncioClient:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    async def _close(self) -> None:
        await self.client.close()
        await asyncio.gather(*asyncio.all_tasks() - {asyncio.current_task()}, return_exceptions=True)  # type: ignore[arg-type]


# ---- the same with arrays ----

_ROW_BYTES = 32768  # so that 200,000 bytes are seven rows, which a batch of eight holds
_MAX_NAME_BYTES = 64
# A request's bytes fill as many rows as they need. In all of them but the first, size_bytes is 0.
_ARRAYS = {"payload": Array((_ROW_BYTES,), "uint8"), "size_bytes": Array((), "int64")}


class ArrayClient:
    """Sends bytes to a batcher of _ARRAYS as a client of bytes would, in as many rows as they need; gets bytes back."""

    def __init__(self, address: str) -> None:
        self._client = MukoeBatcherClient(address, arrays=True)

    def send_request(self, data: bytes, *, timeout_s: float | None = None) -> tuple[dict[str, bytes], int]:
        rows = _rows_of(len(data))
        payload = np.frombuffer(data.ljust(rows * _ROW_BYTES, b"\0"), np.uint8).reshape(rows, _ROW_BYTES)
        size_bytes = np.array([len(data)] + [0] * (rows - 1), np.int64)
        answer, _ = self._client.send_request(payload=payload, size_bytes=size_bytes, timeout_s=timeout_s)
        first = {name: value if rows == 1 else value[0] for name, value in answer.items()}
        dictionary = {"name": first["name"].tobytes().rstrip(b"\0"), "digest": first["digest"].tobytes()}
        return dictionary, int(first["step"])

    def close(self) -> None:
        self._client.close()

    def __enter__(self) -> ArrayClient:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _rows_of(size_bytes: int) -> int:
    return -(-size_bytes // _ROW_BYTES)


def _with_arrays(callback: Callable[[list[bytes]], Any]) -> Callable[[Batch], dict[str, Any]]:
    """Return the callback for such a batcher that does what this one does with bytes."""

    def infer(batch: Batch) -> dict[str, Any]:
        sizes = {row: int(size) for row, size in enumerate(batch["size_bytes"][: batch.count]) if size}
        payload = batch["payload"]
        answers = callback([payload[row : row + _rows_of(size)].tobytes()[:size] for row, size in sizes.items()])
        outputs = {
            "name": np.zeros((batch.count, _MAX_NAME_BYTES), np.uint8),
            "digest": np.zeros((batch.count, 32), np.uint8),
            "step": np.zeros(batch.count, np.int64),
        }
        for row, (answer, step) in zip(sizes, answers, strict=True):
            outputs["name"][row, : len(answer["name"])] = list(answer["name"])
            outputs["digest"][row] = list(answer["digest"])
            outputs["step"][row] = step
        return outputs

    return infer


# How a trial's requests travel, by the client that sends them.
KINDS: dict[str, Callable[[str], Any]] = {
    "blocking": MukoeBatcherClient,
    "futures": FuturesClient,
    "asyncio": AsyncioClient,
    "arrays": ArrayClient,
}


def serving_kind(
    kind: str, callback: Callable[[list[bytes]], Any], *, batch_size: int = 8, **options: Any
) -> AbstractContextManager[MukoeBatcher]:
    """A started batcher for clients of a kind, as `serving` yields it. The callback gets bytes, whichever the kind."""
    if kind == "arrays":
        sizes = sorted({1, (batch_size + 1) // 2, batch_size})
        options.update(model="arrays", arrays=_ARRAYS, batch_sizes=sizes)
        return serving(_with_arrays(callback), batch_size=batch_size, **options)
    return serving(callback, batch_size=batch_size, **options)


# ---- processes ----

# Each process is forked from one that has imported the library but never used it, which takes about 10 ms.
_forkserver = multiprocessing.get_context("forkserver")
_forkserver.set_forkserver_preload(["pytest", "accounting"])


def _ensure_forkserver() -> None:
    """The fork server imports from the folder it is started in, and is silent about modules that it does not find."""
    folder = os.getcwd()
    os.chdir(Path(__file__).parent)
    try:
        forkserver.ensure_running()
    finally:
        os.chdir(folder)


def start_process(function: Callable[..., None], *arguments: Any) -> BaseProcess:
    """Run a module's function in its own process, which ends with this one at the latest."""
    _ensure_forkserver()
    process = _forkserver.Process(target=function, args=arguments, daemon=True)
    process.start()
    return process


def ask_until_killed(ledger: Ledger, address: str, caller: str, extra_bytes: int, kind: str) -> None:
    """Run a caller, in its own process."""
    with KINDS[kind](address) as client:
        ledger.keep_asking(client, caller, lambda: False, extra_bytes=extra_bytes, thinking_s=_THINKING_S)


def serve_until_killed(ledger: Ledger, kind: str, host: str, port: int, ready: Connection) -> None:
    """Run a server, in its own process. It sends its port to `ready` once it serves."""
    with serving_kind(kind, ledger.callback, batch_timeout_s=0.001, port=port, host=host) as batcher:
        ready.send(batcher.port)
        threading.Event().wait()


def start_server(ledger: Ledger, kind: str, host: str, port: int = 0) -> tuple[BaseProcess, int]:
    """Start a server; return its process and its port."""
    receiver, sender = _forkserver.Pipe(duplex=False)
    with receiver, sender:
        process = start_process(serve_until_killed, ledger, kind, host, port, sender)
        sender.close()
        return process, receiver.recv()
