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

# How long a client waits before it asks again, if the directory did not answer.
_RETRY_NS = 1_000_000_000


class ReplicaClient(MukoeBatcherClient):
    """A `MukoeBatcherClient` of replicas. Made by `Replicas.client`."""

    def __init__(self, directory: Any, name: str, **options: Any) -> None:
        self._directory = directory
        self._name = name
        self._route = self._directory_route = _DirectoryRoute(directory)
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

    The target lists all replicas, the assigned one first: gRPC sends to the first that it can connect to. So a request
    that could not be sent to the assigned replica goes to another even while the directory is away.
    """

    def __init__(self, directory: Any) -> None:
        self._directory = directory
        self._client = uuid.uuid4().hex
        self._lock = threading.Lock()
        # These are guarded by it.
        self._replicas: list[str] = []
        self._target = ""
        self._is_asking = False
        self._asks_ns = 0

    def target(self) -> str:
        if not self._target:
            self._find_first()
        elif time.monotonic_ns() >= self._asks_ns:
            with self._lock:
                if self._is_asking:
                    return self._target
                self._is_asking = True
            try:
                self._ask().add_done_callback(self._note_answer)
            except Exception:  # this process has left Ray
                self._note_silence()
        return self._target

    def _find_first(self) -> None:
        """Wait for the directory's first answer. Raises RequestError if there is no replica now."""
        try:
            self._note(self._ask().result())
        except ray.exceptions.RayError as error:
            raise RequestError(
                grpc.StatusCode.UNAVAILABLE, f"the replicas' directory does not answer: {error}"
            ) from None
        if not self._target:
            raise RequestError(grpc.StatusCode.UNAVAILABLE, "no replica is serving now; Ray may be restarting them")

    def lost(self, target: str) -> None:
        with self._lock:
            if target == self._target and self._replicas:
                self._replicas.append(self._replicas.pop(0))
                self._target = _target_of(self._replicas)
            self._asks_ns = 0

    def leave(self) -> None:
        """The client was closed."""
        if ray.is_initialized():
            with suppress(Exception):  # the directory forgets the client in any case, a few seconds later
                self._directory.leave.remote(self._client)

    def _ask(self) -> Future[Any]:
        if not ray.is_initialized():  # Ray would start anew
            raise ray.exceptions.RaySystemError("this process has left Ray")
        future: Future[Any] = self._directory.check_in.remote(self._client, self._target_replica()).future()
        return future

    def _target_replica(self) -> str:
        with self._lock:
            return self._replicas[0] if self._replicas else ""

    def _note_answer(self, answer: Future[Any]) -> None:
        """Runs on a thread of Ray's."""
        try:
            self._note(answer.result())
        except Exception:  # it is away, or gone for good; the replicas may still be there
            self._note_silence()

    def _note_silence(self) -> None:
        with self._lock:
            self._asks_ns = time.monotonic_ns() + _RETRY_NS
            self._is_asking = False

    def _note(self, answer: tuple[list[str], float]) -> None:
        replicas, pause_s = answer
        with self._lock:
            if replicas and replicas[:1] != self._replicas[:1]:
                self._target = _target_of(replicas)
            self._replicas = replicas or self._replicas
            self._asks_ns = time.monotonic_ns() + int(pause_s * 1e9)
            self._is_asking = False


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
