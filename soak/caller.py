"""A process of callers: threads that come, send some requests, check what becomes of each, and go."""

from __future__ import annotations

import array
import asyncio
import concurrent.futures
import itertools
import random
import threading
import time
from collections import Counter
from collections.abc import Coroutine, Mapping
from multiprocessing.connection import Connection
from typing import Any, NamedTuple

from grpc_batcher import AsyncMukoeBatcherClient, MukoeBatcherClient, RequestError

import grpc
import numpy as np
from child import Faults, obey
from traffic import (
    COUNT_BITS,
    ENDS,
    MAX_MESSAGE_BYTES,
    MIN_BYTES,
    SHARES,
    TOO_LARGE_BYTES,
    Kind,
    Request,
    answer_to,
    from_rows,
    is_asked_for,
    name_of,
    random_size,
    step_of,
    to_rows,
    what_is_wrong,
    write_request,
)

MAX_REQUESTS_A_THREAD = 60
MAX_PAUSE_S = 0.03
PROBE_PAUSE_S = 0.01

# When a request is cancelled, or its client closed.
MAX_MOMENT_S = 0.02

# A request without a short time limit that has no outcome by then never gets one.
LOST_S = 30.0


class Target(NamedTuple):
    """A server.

    restarts: it may be away; its callers then get UNAVAILABLE.
    breaks: connections to it break, and any caller may get UNAVAILABLE.
    """

    model: str
    address: str
    restarts: bool = False
    breaks: bool = False


class Load(NamedTuple):
    """What a process of callers does.

    is_probe: send only small plain requests, at an even pace, and note how long each took.
    """

    threads: int
    is_probe: bool = False


class Sender:
    """Sends requests to a server in every way that there is."""

    def __init__(self, target: Target, loop: asyncio.AbstractEventLoop) -> None:
        self._target = target
        self._client = _connect(target)
        self._async_client = AsyncMukoeBatcherClient(target.address, **_options(target))
        self._loop = loop

    def send(self, payload: bytes, arguments: Mapping[str, Any], chance: random.Random) -> Any:
        """Send a request, blocking, as a future, as one of many or as a task, and wait for its answer."""
        arguments = _as_sent(self._target, payload, arguments)
        way = chance.randrange(4)
        if way == 0:
            answer = self._client.send_request(**arguments)
        elif way == 1:
            answer = self._client.submit(**arguments).result()
        elif way == 2:
            timeout_s = arguments.pop("timeout_s")
            (answer,) = self._client.send_many([arguments], timeout_s=timeout_s)
        else:
            answer = self._wait_for(self._async_client.send_request(**arguments))
        return _as_bytes(self._target, answer)

    def send_and_cancel(self, payload: bytes, arguments: Mapping[str, Any], chance: random.Random) -> Any:
        """Send a request as a future or as a task, and cancel it at some moment, unless the answer comes before."""
        arguments = _as_sent(self._target, payload, arguments)
        if chance.random() < 0.5:
            future: concurrent.futures.Future[Any] = self._client.submit(**arguments)
        else:
            future = asyncio.run_coroutine_threadsafe(self._async_client.send_request(**arguments), self._loop)
        concurrent.futures.wait([future], chance.random() * MAX_MOMENT_S)
        future.cancel()
        try:
            return _as_bytes(self._target, future.result())
        except concurrent.futures.CancelledError:
            raise RequestError(grpc.StatusCode.CANCELLED, "cancelled by its caller") from None

    def close(self) -> None:
        self._client.close()
        self._wait_for(self._async_client.close())

    def _wait_for(self, coroutine: Coroutine[Any, Any, Any]) -> Any:
        return asyncio.run_coroutine_threadsafe(coroutine, self._loop).result()


class Callers:
    def __init__(self, number: int, targets: list[Target], load: Load, seed: str, faults: Faults) -> None:
        self._number = number
        self._targets = targets
        loop = asyncio.new_event_loop()
        threading.Thread(target=loop.run_forever, daemon=True).start()
        self._clients = {target: Sender(target, loop) for target in targets}
        self._load = load
        self._seed = seed
        self._faults = faults
        self._counts = itertools.count()
        self._names = itertools.count()
        self._stopping = threading.Event()
        self._lock = threading.Lock()  # guards everything below
        self._threads: set[threading.Thread] = set()
        self._in_flight: dict[int, tuple[int, Kind]] = {}
        self._begun = 0
        self._ends: Counter[str] = Counter()
        self._unavailable: list[tuple[int, int, int]] = []
        self._latencies_ms = array.array("d")
        for _ in range(load.threads):
            self._start_thread()

    # ---- what run.py asks for ----

    def sample(self) -> dict[str, Any]:
        with self._lock:
            now_ns = time.monotonic_ns()
            oldest_s = max((now_ns - begin_ns for begin_ns, _ in self._in_flight.values()), default=0) / 1e9
            unavailable, self._unavailable = self._unavailable, []
            latencies_ms, self._latencies_ms = self._latencies_ms, array.array("d")
            return {
                "begun": self._begun,
                "ends": dict(self._ends),
                "in_flight": len(self._in_flight),
                "oldest_s": oldest_s,
                "unavailable": unavailable,
                "latencies_ms": latencies_ms,
            }

    def stop(self) -> dict[str, Any]:
        """Let each thread finish its request, and close the clients."""
        self._stopping.set()
        limit_s = time.monotonic() + LOST_S
        while self._threads and time.monotonic() < limit_s:
            time.sleep(0.01)
        with self._lock:
            for number, (begin_ns, kind) in self._in_flight.items():
                age_s = (time.monotonic_ns() - begin_ns) / 1e9
                self._faults.report(f"{name_of(number)} ({kind.name}) has no outcome after {age_s:.0f} s")
        for client in self._clients.values():
            client.close()
        return self.sample()

    # ---- the threads ----

    def _start_thread(self) -> None:
        thread = threading.Thread(target=self._live, args=(next(self._names),), daemon=True)
        with self._lock:
            self._threads.add(thread)
        thread.start()

    def _live(self, name: int) -> None:
        chance = random.Random(f"{self._seed}/{self._number}/{name}")
        try:
            for _ in range(chance.randint(1, MAX_REQUESTS_A_THREAD)):
                if self._stopping.is_set():
                    break
                self._ask(chance)
                time.sleep(PROBE_PAUSE_S if self._load.is_probe else chance.random() * MAX_PAUSE_S)
        finally:
            if not self._stopping.is_set():
                self._start_thread()
            with self._lock:
                self._threads.discard(threading.current_thread())

    def _ask(self, chance: random.Random) -> None:
        target = chance.choice(self._targets)
        kind = Kind.PLAIN if self._load.is_probe else chance.choices(list(SHARES), list(SHARES.values()))[0]
        number = self._number << COUNT_BITS | next(self._counts)
        size = self._size(kind, chance)
        payload = write_request(Request(number, kind), size, chance)
        begin_ns = time.monotonic_ns()
        with self._lock:
            self._begun += 1
            self._in_flight[number] = begin_ns, kind
        code, wrong = self._outcome(target, number, kind, payload, chance)
        end_ns = time.monotonic_ns()
        with self._lock:
            del self._in_flight[number]
            self._ends[code] += 1
            if code == grpc.StatusCode.UNAVAILABLE.name and target.restarts:
                self._unavailable.append((number, begin_ns, end_ns))
            if code == grpc.StatusCode.OK.name and self._load.is_probe:
                self._latencies_ms.append((end_ns - begin_ns) / 1e6)
        if wrong is not None:
            self._faults.report(f"{name_of(number)} ({kind.name}, {size} bytes, to {target.model}) {wrong}")

    def _size(self, kind: Kind, chance: random.Random) -> int:
        if kind is Kind.TOO_LARGE:
            return TOO_LARGE_BYTES
        return MIN_BYTES if self._load.is_probe else random_size(chance)

    def _outcome(
        self, target: Target, number: int, kind: Kind, payload: bytes, chance: random.Random
    ) -> tuple[str, str | None]:
        """Send a request. Returns the name of its final status, and what is wrong with that, or None."""
        arguments: dict[str, Any] = {"timeout_s": chance.choice([None, 2 * LOST_S])}
        if kind is Kind.HURRIED:
            arguments["timeout_s"] = 10 ** chance.uniform(-4, -1)
        if (target.model == "dyna") != (kind is Kind.WRONG_MODEL):
            arguments["action"] = step_of(number)
        client = self._clients[target]
        try:
            if kind is Kind.CANCELLED and chance.random() < 0.5:
                answer = _send_and_close(target, payload, arguments, chance)
            elif kind is Kind.CANCELLED:
                answer = client.send_and_cancel(payload, arguments, chance)
            else:
                answer = client.send(payload, arguments, chance)
        except RequestError as error:
            return error.code().name, self._wrong_end(target, number, kind, error)
        if answer is None:
            return "NOT_SENT", None
        if grpc.StatusCode.OK not in ENDS[kind]:
            return grpc.StatusCode.OK.name, "was answered"
        return grpc.StatusCode.OK.name, what_is_wrong(answer, number, payload)

    def _wrong_end(self, target: Target, number: int, kind: Kind, error: RequestError) -> str | None:
        code, details = error.code(), error.details()
        if code is grpc.StatusCode.INTERNAL and is_asked_for(details, number):
            return None
        if code is grpc.StatusCode.UNAVAILABLE and (target.restarts or target.breaks):
            return None  # run.py knows when a server that restarts was away
        if code in ENDS[kind] and code is not grpc.StatusCode.INTERNAL:
            return None
        return f"ended with {code.name}: {details}"


def _options(target: Target) -> dict[str, Any]:
    # The server of arrays returns its input and some more.
    return {"max_message_bytes": 2 * MAX_MESSAGE_BYTES, "arrays": target.model == "arrays"}


def _connect(target: Target) -> MukoeBatcherClient:
    return MukoeBatcherClient(target.address, **_options(target))


def _as_sent(target: Target, payload: bytes, arguments: Mapping[str, Any]) -> dict[str, Any]:
    """Return the arguments of `send_request` for a payload."""
    if target.model != "arrays":
        return {"data": payload, **arguments}
    if "action" in arguments:  # the other model's
        return {"data": np.frombuffer(payload, np.uint8), **arguments}
    return {**to_rows(payload), "rows": True, **arguments}


def _as_bytes(target: Target, answer: tuple[dict[str, Any], int]) -> tuple[dict[str, bytes], int]:
    """Return an answer as one of bytes."""
    if target.model != "arrays":
        return answer
    arrays, _step = answer
    ((_first, payload),) = from_rows(arrays, len(arrays["number"]))
    (number,) = set(arrays["number"].tolist())
    return answer_to(number, payload)


def _send_and_close(
    target: Target, payload: bytes, arguments: Mapping[str, Any], chance: random.Random
) -> tuple[dict[str, bytes], int] | None:
    """Send with a client that another thread closes meanwhile. Returns None if it was closed too early to send."""
    client = _connect(target)
    closing = threading.Timer(chance.random() * MAX_MOMENT_S, client.close)
    closing.start()
    try:
        return _as_bytes(target, client.send_request(**_as_sent(target, payload, arguments)))
    except RuntimeError:
        return None
    finally:
        closing.join()


def call(pipe: Connection, number: int, targets: list[Target], load: Load, seed: str) -> None:
    """The process. Its callers go on until it is told to stop."""
    faults = Faults()
    callers = Callers(number, targets, load, seed, faults)
    pipe.send({})
    obey(pipe, faults, {"sample": callers.sample, "stop": callers.stop})
