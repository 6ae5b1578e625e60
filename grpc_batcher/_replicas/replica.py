"""A replica: the Ray actor in whose process a batcher serves."""

from __future__ import annotations

import logging
import os
import threading
from collections.abc import Callable
from typing import Any

import ray
from ray import cloudpickle

from .._contract import is_unix_socket
from .._server.batcher import MukoeBatcher
from .._server.metrics import Metrics
from .names import exists

_logger = logging.getLogger("grpc_batcher")

# Hosts that stand for every address of the machine. A server can listen there, but nobody can connect to them.
_EVERY_INTERFACE = ("0.0.0.0", "::", "")

# How long a replica whose directory is gone for good answers what it has taken in.
_LAST_GRACE_S = 5.0

# How long the directory's call waits for the batcher's end, at most. It occupies a thread after the directory has died.
_WAIT_S = 5.0


class Publication:
    """What was published last.

    box: a list with the reference of the weights in Ray's store; empty if nothing was published. (In a list, Ray passes
        on the reference instead of the weights.)
    number: grows with each publication; 0 stands for none.
    """

    def __init__(self, box: list[Any], step: int, number: int) -> None:
        self.box = box
        self.step = step
        self.number = number


NOTHING_PUBLISHED = Publication([], 0, 0)


class Replica:
    """The methods of the actor. Ray runs them on several threads."""

    def __init__(self, name: str, pickled_make_batcher: bytes, directory: Any, directory_name: str) -> None:
        self._name = name
        self._pickled_make_batcher = pickled_make_batcher
        self._directory_name = directory_name
        self._batcher: MukoeBatcher | None = None
        self._address = ""
        self._publication = NOTHING_PUBLISHED
        self._lock = threading.Lock()
        threading.Thread(target=self._outlive_no_directory, args=(directory,), daemon=True).start()

    def serve(self, publication: Publication) -> str:
        """Start the batcher with these weights, and return its address. Called again, only updates the weights."""
        with self._lock:
            if self._batcher is None:
                make_batcher: Callable[[], MukoeBatcher] = cloudpickle.loads(self._pickled_make_batcher)
                batcher = make_batcher()
                if not isinstance(batcher, MukoeBatcher):
                    raise TypeError(
                        f"make_batcher returned {batcher!r:.200}; it must return what create_batcher returns"
                    )
                batcher._life.port = 0  # several replicas share a machine
                self._publication = NOTHING_PUBLISHED  # an earlier attempt may have failed after it had the weights
                self._publish(batcher, publication)
                batcher.start()
                self._address = _address_of(batcher)
                self._batcher = batcher
        self.publish(publication)
        return self._address

    def publish(self, publication: Publication) -> None:
        """Have the next batch see these weights, unless it sees newer ones already."""
        with self._lock:
            if self._batcher is not None:
                self._publish(self._batcher, publication)

    def publication(self) -> Publication:
        """Return what was published last, for a directory that has forgotten it."""
        return self._publication

    def wait_until_it_ended(self) -> bool | None:
        """Wait until the batcher has ended, for a few seconds. Returns whether it has.

        Returns None if it was never started, because Ray has restarted this process since `serve` was called.
        """
        if self._batcher is None:
            return None
        return self._batcher._life.wait_until_shut_down(_WAIT_S)

    def metrics(self) -> Metrics | None:
        """Return the batcher's counters; None if it is not started."""
        return None if self._batcher is None else self._batcher.metrics()

    def drain(self, grace_s: float) -> None:
        """Answer what was taken in, and refuse everything else."""
        if self._batcher is not None:
            self._batcher.shutdown(grace_s)

    def _publish(self, batcher: MukoeBatcher, publication: Publication) -> None:
        if publication.number > self._publication.number:
            batcher.publish(ray.get(publication.box[0]), step=publication.step)
            self._publication = publication

    def _outlive_no_directory(self, directory: Any) -> None:
        """End this process when the directory is gone for good, as it is when the program that launched it has ended.

        Replicas are detached actors, so that a directory that dies and comes back finds them alive.
        """
        while exists(self._directory_name):
            try:
                ray.get(directory.hold.remote())
            except ray.exceptions.RayError:
                threading.Event().wait(0.5)  # it is about to come back, or to vanish from Ray's names
        _logger.info("replica %s ends, as its directory is gone", self._name)
        if self._batcher is not None:
            self._batcher.shutdown(_LAST_GRACE_S)
        try:
            ray.kill(ray.get_actor(self._name), no_restart=True)
        finally:
            os._exit(0)


def _address_of(batcher: MukoeBatcher) -> str:
    """Return the address at which other machines of the cluster reach a batcher."""
    host = batcher.address.rpartition(":")[0].strip("[]")
    if is_unix_socket(batcher.address):
        raise ValueError(f"the batcher listens on {batcher.address}; a replica needs an address that others can reach")
    if host in _EVERY_INTERFACE:
        host = ray.util.get_node_ip_address()
    return f"[{host}]:{batcher.port}" if ":" in host else f"{host}:{batcher.port}"
