"""Replicas of a batcher on Ray. Needs the extra: pip install "grpc-batcher[ray]".

replicas = launch(make_batcher, count=2, actor_options={"num_gpus": 1})
client = replicas.client()  # picklable: hand it to Ray actors and tasks
replicas.publish(weights, step=1200)

Ray places and restarts the replicas and distributes the weights. Requests go straight from clients to batchers.
"""

from __future__ import annotations

import uuid
from collections.abc import Callable, Mapping
from typing import Any

from ._contract import check_duration  # first: this package chooses how gRPC polls before anything imports grpc

try:
    import ray
    from ray import cloudpickle
except ImportError as error:
    raise ImportError(
        'grpc_batcher.ray needs Ray, which cannot be imported here: pip install "grpc-batcher[ray]"'
    ) from error

from ._models import check_int32
from ._replicas.client import ReplicaClient
from ._replicas.directory import Directory
from ._replicas.names import PREFIX
from ._server.batcher import MukoeBatcher
from ._server.metrics import Metrics

__all__ = ["Replicas", "connect", "launch"]

# How many calls may wait in the directory. Each replica always has one there.
_DIRECTORY_CALLS = 100_000

# Options of Ray's actors that the replicas set themselves.
_OWN_OPTIONS = ("name", "namespace", "get_if_exists", "max_concurrency", "max_task_retries")


def launch(
    make_batcher: Callable[[], MukoeBatcher],
    count: int,
    *,
    actor_options: Mapping[str, Any] | None = None,
    name: str | None = None,
) -> Replicas:
    """Start replicas of a batcher, each in a Ray actor of its own, and return once all of them serve.

    make_batcher: runs in each replica's process and returns a batcher that is not started. Its port is ignored: the
        system chooses one. Clients reach it at the address of its node, unless it has a `host` of its own.
    count: how many replicas, from 1.
    actor_options: options of Ray's actors for each replica, such as {"num_gpus": 1}, {"resources": {"TPU": 4}} or a
        scheduling_strategy. Ray restarts a replica that dies, without limit unless `max_restarts` says otherwise.
        {"lifetime": "detached"} has the replicas outlive this program; otherwise they end with it.
    name: lets programs of the same Ray namespace `connect` to the replicas; None: they cannot. It must not end in a dot
        and a number, as the replicas' own names do.

    Raises what the first replica that failed to start raised, with its type and traceback, after ending all others.
    Raises TypeError or ValueError for arguments that cannot be used, and ValueError if the name is taken.
    """
    if not callable(make_batcher):
        raise TypeError(f"make_batcher is {make_batcher!r}; it must be a function that returns a batcher")
    _check_count(count)
    if name is not None:
        _check_name(name)
    options = dict(actor_options or {})
    if taken := sorted(set(options).intersection(_OWN_OPTIONS)):
        raise ValueError(f"actor_options contains {taken[0]!r}, which the replicas set themselves")
    lifetime = options.pop("lifetime", None)
    actor_name = f"{PREFIX}{name or uuid.uuid4().hex}"
    directory = (
        ray.remote(Directory)
        .options(
            name=actor_name,
            lifetime=lifetime,
            num_cpus=0,
            max_restarts=-1,
            max_task_retries=-1,
            max_concurrency=_DIRECTORY_CALLS,
        )
        .remote(actor_name, cloudpickle.dumps(make_batcher), options)
    )
    replicas = Replicas(directory, actor_name)
    try:
        replicas.scale(count)
    except BaseException:  # such as Ctrl-C while Ray has no place for one
        replicas.shutdown(grace_s=0)
        raise
    return replicas


def connect(name: str) -> Replicas:
    """Return the replicas that another program of the same Ray namespace launched under this name.

    Raises ValueError if there are none.
    """
    _check_name(name)
    try:
        directory = ray.get_actor(f"{PREFIX}{name}")
    except ValueError:
        raise ValueError(f"name is {name!r}; no replicas of that name run in this Ray namespace") from None
    return Replicas(directory, f"{PREFIX}{name}")


class Replicas:
    """Batchers that serve the same model, each in a Ray actor. Made by `launch` and `connect`.

    Can be pickled, so actors and tasks can publish and scale as well.
    """

    def __init__(self, directory: Any, actor_name: str) -> None:
        self._directory = directory
        self._actor_name = actor_name

    def client(self, **options: Any) -> ReplicaClient:
        """Return a client: a `MukoeBatcherClient` whose server is the replica with the fewest clients.

        options: those of `MukoeBatcherClient`, such as `arrays=True`.

        It moves to another replica when its own dies or drains, and when replicas are added. A request that certainly
        did not reach the callback is sent to another replica; any other that fails raises RequestError, as always.
        Can be pickled, for Ray's actors and tasks: each copy is a client of its own.
        """
        return ReplicaClient(self._directory, self._actor_name.removeprefix(PREFIX), **options)

    def publish(self, weights: Any, *, step: int) -> None:
        """Make all replicas use these weights from their next batch on. Returns when all have them.

        Returns after a minute at most. A replica that hangs gets them once it goes on, and Ray's logs have a warning.

        weights: any object that Ray can store, or its ObjectRef. Each replica fetches it once. Replicas that are added
            or restarted later start with the latest.
        step: an int32, as for `MukoeBatcher.publish`.

        Ray loses an object when the process that stored it ends, so publish from one that stays.
        """
        check_int32("step", step)
        reference = weights if isinstance(weights, ray.ObjectRef) else ray.put(weights)
        ray.get(self._directory.publish.remote([reference], step))

    def scale(self, count: int, *, grace_s: float = 30.0) -> None:
        """Add or drain replicas, to have `count`, from 1. Returns once added ones serve and surplus ones have ended.

        grace_s: how long the surplus ones may take to answer what they have taken in, in seconds.

        Raises what the first replica that failed to start raised; there are then as many as before. Waits for as long
        as Ray has no place for a replica. A later call, of this or another program, takes over from one that waits,
        which then raises RuntimeError.
        """
        _check_count(count)
        check_duration("grace_s", grace_s)
        ray.get(self._directory.scale.remote(count, grace_s))

    def metrics(self) -> dict[str, Metrics]:
        """Return each replica's counters, by its number: "0", "1" and so on.

        Replicas that are being restarted or do not answer are absent.
        """
        found: dict[str, Metrics] = ray.get(self._directory.metrics.remote())
        return found

    def shutdown(self, *, grace_s: float = 5.0) -> None:
        """End all replicas. They answer what they have taken in, within the grace period. May be called again.

        grace_s: in seconds.
        """
        check_duration("grace_s", grace_s)
        try:
            ray.get(self._directory.shut_down.remote(grace_s))
        except ray.exceptions.RayActorError:  # it was shut down before
            return
        ray.kill(self._directory, no_restart=True)

    def __repr__(self) -> str:
        return f"<replicas {self._actor_name.removeprefix(PREFIX)!r}>"


def _check_name(name: str) -> None:
    if not isinstance(name, str) or not name:
        raise ValueError(f"name is {name!r}; it must be a str that is not empty")
    _, dot, number = name.rpartition(".")
    if dot and number.isdecimal():  # this may be what another name's replica is called
        raise ValueError(f"name is {name!r}; it must not end in a dot and a number, as the replicas' own names do")


def _check_count(count: int) -> None:
    if not isinstance(count, int) or isinstance(count, bool) or count < 1:
        raise ValueError(f"count is {count!r}; it must be an int from 1")
