"""A client whose server is whichever replica the directory assigns to it."""

from __future__ import annotations

import threading
import time
import uuid
from collections.abc import Sequence
from concurrent.futures import Future
from contextlib import suppress
from typing import Any

import grpc
import ray

from .._client.client import MukoeBatcherClient
from .._errors import RequestError
from .names import PREFIX, exists

# How long a client waits before it asks again, if the directory did not answer.
_RETRY_NS = 1_000_000_000

# How long a request waits for the first answer of the directory, at most. Ray restarts one within a few seconds, and it
# then takes up to 8 to find its replicas.
_FIRST_ANSWER_LIMIT_NS = 15_000_000_000

# A client that is late by this many of its intervals was idle. Its replicas may have been restarted at other ports, so
# its next request waits for a fresh answer, at most for this long: the addresses that it knows may still be right.
_LONG_PAUSE_INTERVALS = 3
_FRESH_ANSWER_LIMIT_NS = 1_000_000_000


class ReplicaClient(MukoeBatcherClient):
    """A `MukoeBatcherClient` of replicas. Made by `Replicas.client`."""

    def __init__(self, directory: Any, name: str, **options: Any) -> None:
        self._directory = directory
        self._name = name
        self._route = self._directory_route = _DirectoryRoute(directory, f"{PREFIX}{name}")
        super().__init__(name, **options)

    def close(self) -> None:
        """Close all streams and the connection; requests in flight fail with CANCELLED. May be called again."""
        super().close()
        self._directory_route.leave()

    def __reduce__(self) -> tuple[Any, ...]:
        _, (_, options) = super().__reduce__()
        return _unpickle, (self._directory, self._name, options)

    def __repr__(self) -> str:
        return f"<client of the replicas {self._name!r}>"


def _unpickle(directory: Any, name: str, options: dict[str, Any]) -> ReplicaClient:
    return ReplicaClient(directory, name, **options)


class _DirectoryRoute:
    """A `Route` that asks the directory now and then, in the background, while requests are sent.

    Only the first request, and the first after a long pause, wait for an answer.

    The target lists all replicas, the assigned one first: gRPC sends to the first that it can connect to. So a request
    that could not be sent to the assigned replica goes to another even while the directory is away.
    """

    def __init__(self, directory: Any, actor_name: str) -> None:
        self._directory = directory
        self._actor_name = actor_name
        self._client = uuid.uuid4().hex
        self._changed = threading.Condition()  # its lock is reentrant: a signal handler may send a request
        # These are guarded by it.
        self._replicas: list[str] = []
        self._target = ""
        self._is_asking = False
        self._asks_ns = 0
        self._interval_ns = 0
        self._waits_until_ns = 0  # until when requests wait for an answer; 0 if they need not
        self._fault = ""  # why no replica is known

    def find(self, due_ns: int | None) -> None:
        now_ns = time.monotonic_ns()
        if now_ns >= self._asks_ns or not self._target:
            self._ask_again(now_ns)
        if self._waits_until_ns:
            self._wait(due_ns)
        if not self._target:
            if due_ns is not None and due_ns <= time.monotonic_ns():
                raise RequestError(grpc.StatusCode.DEADLINE_EXCEEDED, "no replica was known within timeout_s")
            raise RequestError(grpc.StatusCode.UNAVAILABLE, self._fault)

    def target(self) -> str:
        return self._target

    def lost(self, target: str) -> None:
        with self._changed:
            if target == self._target and self._replicas:
                self._replicas.append(self._replicas.pop(0))
                self._target = _target_of(self._replicas)
            self._asks_ns = min(self._asks_ns, time.monotonic_ns())  # soon, but it was not idle

    def leave(self) -> None:
        """The client was closed."""
        if ray.is_initialized():
            with suppress(Exception):  # the directory forgets the client in any case, a few seconds later
                if exists(self._actor_name):  # after a shutdown, Ray would print that it retries the call
                    self._directory.leave.remote(self._client)

    def _ask_again(self, now_ns: int) -> None:
        with self._changed:
            if not self._target:
                self._waits_until_ns = now_ns + _FIRST_ANSWER_LIMIT_NS
                self._fault = "the replicas' directory does not answer; Ray may be restarting it"
            elif self._is_asking:
                return
            elif now_ns >= self._asks_ns + _LONG_PAUSE_INTERVALS * self._interval_ns:
                self._waits_until_ns = now_ns + _FRESH_ANSWER_LIMIT_NS
            self._is_asking = True
        try:
            self._ask().add_done_callback(self._note_answer)
        except Exception as error:  # this process has left Ray
            self._note_silence(error)

    def _wait(self, due_ns: int | None) -> None:
        with self._changed:
            until_ns = self._waits_until_ns if due_ns is None else min(self._waits_until_ns, due_ns)
            left_s = max(0.0, (until_ns - time.monotonic_ns()) / 1e9)
            is_over = self._changed.wait_for(lambda: not self._waits_until_ns, left_s)
            if not is_over and self._waits_until_ns <= time.monotonic_ns():
                self._waits_until_ns = 0

    def _ask(self) -> Future[Any]:
        if not ray.is_initialized():  # Ray would start anew
            raise ray.exceptions.RaySystemError("this process has left Ray")
        future: Future[Any] = self._directory.check_in.remote(self._client, self._target_replica()).future()
        return future

    def _target_replica(self) -> str:
        with self._changed:
            return self._replicas[0] if self._replicas else ""

    def _note_answer(self, answer: Future[Any]) -> None:
        """Runs on a thread of Ray's."""
        try:
            self._note(*answer.result())
        except Exception as error:  # it is away, or gone for good; the replicas may still be there
            self._note_silence(error)

    def _note_silence(self, error: Exception) -> None:
        with self._changed:
            self._fault = f"the replicas' directory does not answer: {error}"
            self._asks_ns = time.monotonic_ns() + _RETRY_NS
            self._end_wait()

    def _note(self, replicas: list[str], pause_s: float) -> None:
        with self._changed:
            # A new target means a new connection, which the order of the others is not worth.
            if replicas and (replicas[:1] != self._replicas[:1] or set(replicas) != set(self._replicas)):
                self._target = _target_of(replicas)
            self._replicas = replicas or self._replicas
            self._fault = "no replica is serving now; Ray may be restarting them"
            self._interval_ns = int(pause_s * 1e9)
            self._asks_ns = time.monotonic_ns() + self._interval_ns
            self._end_wait()

    def _end_wait(self) -> None:
        self._is_asking = False
        self._waits_until_ns = 0
        self._changed.notify_all()


def _target_of(replicas: Sequence[str]) -> str:
    """Return a target for gRPC, which takes several addresses only if all are of one family."""
    first_family = _family_of(replicas[0])
    if first_family == "dns":
        return replicas[0]
    return f"{first_family}:{','.join(each for each in replicas if _family_of(each) == first_family)}"


def _family_of(address: str) -> str:
    host = address.rpartition(":")[0]
    if host.startswith("["):
        return "ipv6"
    return "ipv4" if host.replace(".", "").isdecimal() else "dns"
