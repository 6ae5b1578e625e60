"""The directory: the Ray actor that creates replicas, knows where they serve, and says which clients use which."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Mapping
from contextlib import suppress
from typing import Any

import ray

from .._server.metrics import Metrics
from .names import exists
from .replica import NOTHING_PUBLISHED, Publication, Replica

_logger = logging.getLogger("grpc_batcher")

# How often a client asks which replica to use. With many clients less often, so that the directory keeps up.
_CHECK_IN_S = 0.5
_MAX_CHECK_INS_PER_S = 500

# A client that has not asked for this many of its intervals is gone, or sends nothing.
_LEASE_INTERVALS = 6

# How soon the directory looks again at a replica that is being restarted, and tries again to start one that failed.
_POLL_S = 0.1
_FAILURE_PAUSE_S = 1.0

# How long a restarted directory waits for a replica to say what it knows, and again for it to serve. New clients wait
# meanwhile, so both together must be well below `_FIRST_ANSWER_LIMIT_NS`. One that Ray has not placed yet is silent.
_RECOVERY_LIMIT_S = 4.0

# How long a replica may take beyond its grace period, or to tell its counters, before it counts as hanging. Fetching
# weights takes longer.
_HANG_S = 5.0
_PUBLISH_LIMIT_S = 60.0

# How long `hold` takes.
_HOLD_S = 60.0

# How many threads serve a replica's methods. One always waits for the batcher's end.
_REPLICA_THREADS = 8


class _Entry:
    """What the directory knows of a replica.

    is_new: whether it was created by this incarnation of the directory, and never served yet.
    address: where it serves; None while it starts or is restarted.
    failure: why it never served.
    """

    def __init__(self, number: int, actor: Any, *, is_new: bool) -> None:
        self.number = number
        self.actor = actor
        self.is_new = is_new
        self.address: str | None = None
        self.is_draining = False
        self.failure: BaseException | None = None
        self.follower: asyncio.Task[None] | None = None
        self.drain: asyncio.Task[None] | None = None
        self._is_decided = asyncio.Event()  # set once it serves or has failed

    def serves(self, address: str) -> None:
        self.address = address
        self.is_new = False
        self._is_decided.set()

    def fails(self, error: BaseException) -> None:
        self.failure = error
        self._is_decided.set()

    async def wait_until_it_serves(self) -> None:
        """Raises what kept it from serving."""
        await self._is_decided.wait()
        if self.failure is not None:
            raise self.failure


class _Client:
    """What the directory knows of a client: which replica it uses, and when it last asked."""

    def __init__(self, number: int) -> None:
        self.number = number
        self.seen_s = 0.0


class Directory:
    """The methods of the actor, which run on one event loop: between two awaits nothing else happens.

    Ray restarts it if it dies. It then finds the replicas by their names, and asks them what was published last.
    """

    def __init__(self, name: str, pickled_make_batcher: bytes, actor_options: Mapping[str, Any]) -> None:
        self._name = name
        self._pickled_make_batcher = pickled_make_batcher  # only replicas are sure to have what it imports
        self._actor_options = dict(actor_options)
        self._replicas: dict[int, _Entry] = {}
        self._clients: dict[str, _Client] = {}
        self._clients_known_s = 0.0  # when all clients of an earlier incarnation have asked this one
        self._publication = NOTHING_PUBLISHED
        self._recovery: asyncio.Task[None] | None = None
        self._scaling: asyncio.Task[None] | None = None

    # ---- what replicas call ----

    async def hold(self) -> None:
        """Return after a while: a replica that waits for it notices when this actor dies.

        If it never did, the calls of replicas that have died would pile up.
        """
        await self._recovered()
        await asyncio.sleep(_HOLD_S)

    # ---- what clients call ----

    async def check_in(self, client: str, address: str) -> tuple[list[str], float]:
        """Return the addresses of all replicas, the one that the client should use first, and when to ask again.

        address: of the replica that the client uses now; "" for none.

        There are no addresses while all replicas are being restarted.
        """
        await self._recovered()
        pause_s = self._forget_clients()
        serving = self._serving()
        if not serving:
            return [], pause_s
        clients = dict.fromkeys(serving, 0)
        for name, each in self._clients.items():
            if each.number in clients and name != client:
                clients[each.number] += 1
        known = self._clients.get(client)
        if known is None:
            # It may have used that replica before the directory was restarted, or before a pause.
            number = next((number for number, entry in serving.items() if entry.address == address), None)
        else:
            number = known.number
        least = min(clients, key=lambda each: (clients[each], each))
        if number not in clients or clients[number] > clients[least]:
            number = least
        self._clients[client] = known = known or _Client(number)
        known.number, known.seen_s = number, time.monotonic()
        others = sorted((each for each in serving if each != number), key=lambda each: (clients[each], each))
        return [str(serving[each].address) for each in (number, *others)], pause_s

    async def leave(self, client: str) -> None:
        """A client was closed."""
        self._clients.pop(client, None)

    # ---- what Replicas calls ----

    async def scale(self, count: int, grace_s: float) -> None:
        """Have this many replicas. Raises what the first one raised that could not start, and ends all new ones."""
        await self._recovered()
        self._stop_scaling()
        self._scaling = asyncio.get_running_loop().create_task(self._scale(count, grace_s))
        try:
            await self._scaling
        except asyncio.CancelledError:
            raise RuntimeError(f"scaling to {count} was given up: scale or shutdown was called again") from None

    def _stop_scaling(self) -> None:
        """A later call decides. What the earlier one created counts as there; what it drains goes on draining."""
        if self._scaling is not None:
            self._scaling.cancel()

    async def _scale(self, count: int, grace_s: float) -> None:
        staying = [entry for entry in self._replicas.values() if not entry.is_draining]
        surplus, staying = staying[count:], staying[:count]
        for entry in surplus:
            entry.is_draining = True
            entry.drain = asyncio.get_running_loop().create_task(self._drain(entry, grace_s))
        added: list[_Entry] = []
        try:
            while len(staying) + len(added) < count:
                added.append(self._create())
            await asyncio.gather(*(entry.wait_until_it_serves() for entry in (*staying, *added)))
        except Exception:
            # One that an earlier call added may be the one that failed.
            failed = [each for each in self._replicas.values() if each.failure is not None and each not in added]
            ended = asyncio.gather(*map(self._end, (*added, *failed)))
            await asyncio.shield(ended)  # even if a later call takes over
            raise
        for entry in surplus:
            assert entry.drain is not None
            await asyncio.shield(entry.drain)

    async def publish(self, box: list[Any], step: int) -> None:
        """Return when all replicas that serve now have the weights, except those that hang."""
        await self._recovered()
        # Replicas ignore lower numbers. By the clock, it is higher even if nobody could say what was published last.
        number = max(self._publication.number + 1, time.time_ns())
        self._publication = Publication(box, step, number)
        serving = self._serving()
        outcomes = await asyncio.gather(
            *(_within(_PUBLISH_LIMIT_S, entry.actor.publish.remote(self._publication)) for entry in serving.values()),
            return_exceptions=True,
        )
        for replica, outcome in zip(serving, outcomes, strict=True):
            if isinstance(outcome, asyncio.TimeoutError):
                message = "replica %d has not taken the weights of step %d within %g s; it gets them once it goes on"
                _logger.warning(message, replica, step, _PUBLISH_LIMIT_S)
            # A replica that dies meanwhile starts with these weights.
            elif isinstance(outcome, BaseException) and not isinstance(outcome, ray.exceptions.RayActorError):
                raise outcome

    async def metrics(self) -> dict[str, Metrics]:
        """Return the counters of the replicas that serve now, by their numbers."""
        await self._recovered()
        serving = self._serving()
        found = await asyncio.gather(
            *(_within(_HANG_S, entry.actor.metrics.remote()) for entry in serving.values()), return_exceptions=True
        )
        return {
            str(number): metrics for number, metrics in zip(serving, found, strict=True) if isinstance(metrics, Metrics)
        }

    async def shut_down(self, grace_s: float) -> None:
        """End all replicas."""
        await self._recovered()
        self._stop_scaling()
        entries = tuple(self._replicas.values())
        for entry in entries:
            entry.is_draining = True
        await asyncio.gather(
            *(_within(grace_s + _HANG_S, entry.actor.drain.remote(grace_s)) for entry in entries if entry.address),
            return_exceptions=True,
        )
        await asyncio.gather(*map(self._end, entries))

    # ---- replicas ----

    def _serving(self) -> dict[int, _Entry]:
        return {number: entry for number, entry in self._replicas.items() if entry.address and not entry.is_draining}

    def _actor_name(self, number: int) -> str:
        return f"{self._name}.{number}"

    def _create(self) -> _Entry:
        number = next(number for number in range(len(self._replicas) + 1) if number not in self._replicas)
        directory = ray.get_runtime_context().current_actor
        actor = (
            ray.remote(Replica)
            .options(
                **{"max_restarts": -1, **self._actor_options},
                name=self._actor_name(number),
                lifetime="detached",
                max_concurrency=_REPLICA_THREADS,
            )
            .remote(self._actor_name(number), self._pickled_make_batcher, directory, self._name)
        )
        return self._add(number, actor, is_new=True)

    def _add(self, number: int, actor: Any, *, is_new: bool) -> _Entry:
        entry = self._replicas[number] = _Entry(number, actor, is_new=is_new)
        entry.follower = asyncio.get_running_loop().create_task(self._follow(entry))
        return entry

    async def _end(self, entry: _Entry) -> None:
        """End a replica's process. Its number is free when this returns."""
        entry.is_draining = True
        ray.kill(entry.actor, no_restart=True)
        while self._has_name(entry):
            await asyncio.sleep(_POLL_S)
        if self._replicas.get(entry.number) is entry:
            del self._replicas[entry.number]

    async def _drain(self, entry: _Entry, grace_s: float) -> None:
        """Let a replica's clients move to others, then have it answer what it has taken in, and end it."""
        end_s = time.monotonic() + grace_s
        while self._may_have_clients(entry) and time.monotonic() < end_s:
            await asyncio.sleep(_POLL_S)
            self._forget_clients()
        if entry.address:
            try:
                left_s = max(end_s - time.monotonic(), 0.0)
                await _within(left_s + _HANG_S, entry.actor.drain.remote(left_s))
            except ray.exceptions.RayError as error:
                _logger.warning("replica %d died while it drained: %s", entry.number, error)
            except asyncio.TimeoutError:
                _logger.warning("replica %d hangs, and is ended without answering what it has taken in", entry.number)
        await self._end(entry)

    async def _follow(self, entry: _Entry) -> None:
        """Keep a replica serving, and know where, until it is drained or Ray no longer restarts it."""
        while not entry.is_draining:
            try:
                publication = self._publication
                address = await entry.actor.serve.remote(publication)
                if publication is not self._publication:
                    continue  # it must not serve older weights than the others
                entry.serves(address)
                while (has_ended := await entry.actor.wait_until_it_ended.remote()) is False:
                    pass
                entry.address = None
                if has_ended and not entry.is_draining:  # otherwise the process is a new one, which is to serve
                    _logger.warning("the batcher of replica %d has ended; the replica is restarted", entry.number)
                    ray.kill(entry.actor, no_restart=False)
            except ray.exceptions.RayActorError as error:
                entry.address = None
                if entry.is_draining:
                    return
                is_gone = not self._has_name(entry)  # Ray has given up on it, or somebody killed it
                if is_gone:
                    _logger.warning("replica %d is gone for good: %s", entry.number, error)
                    self._replicas.pop(entry.number, None)
                if is_gone or entry.is_new:
                    entry.fails(RuntimeError(f"replica {entry.number} died before it served: {error}"))
                    return
                await asyncio.sleep(_POLL_S)
            except Exception as error:
                entry.address = None
                if entry.is_draining:
                    return
                if entry.is_new:
                    entry.fails(_cause_of(error))
                    return
                _logger.exception("replica %d does not start; it is restarted", entry.number)
                await asyncio.sleep(_FAILURE_PAUSE_S)
                if not entry.is_draining:
                    ray.kill(entry.actor, no_restart=False)

    def _has_name(self, entry: _Entry) -> bool:
        return exists(self._actor_name(entry.number))

    def _may_have_clients(self, entry: _Entry) -> bool:
        if time.monotonic() < self._clients_known_s:
            return True
        return any(client.number == entry.number for client in self._clients.values())

    def _forget_clients(self) -> float:
        """Forget clients that have not asked for a while. Returns how soon a client should ask again."""
        pause_s = max(_CHECK_IN_S, len(self._clients) / _MAX_CHECK_INS_PER_S)
        before_s = time.monotonic() - _LEASE_INTERVALS * pause_s
        self._clients = {name: client for name, client in self._clients.items() if client.seen_s >= before_s}
        return pause_s

    # ---- after a restart ----

    async def _recovered(self) -> None:
        if self._recovery is None:
            self._recovery = asyncio.get_running_loop().create_task(self._recover())
        await asyncio.shield(self._recovery)

    async def _recover(self) -> None:
        """Find the replicas that an earlier incarnation of this actor created, and where they serve."""
        try:
            found = self._find()
        except Exception:  # Ray itself may be restarting
            self._recovery = None  # the next call tries again
            raise
        answers = await asyncio.gather(*map(_publication_of, found.values()))
        self._publication = max((NOTHING_PUBLISHED, *filter(None, answers)), key=lambda each: each.number)
        entries = [self._add(number, actor, is_new=False) for number, actor in found.items()]
        answering = [entry for entry, answer in zip(entries, answers, strict=True) if answer is not None]
        all_serve = asyncio.gather(*(entry.wait_until_it_serves() for entry in answering), return_exceptions=True)
        with suppress(asyncio.TimeoutError):  # one may have been starting, which takes as long as it takes
            await asyncio.wait_for(all_serve, _RECOVERY_LIMIT_S)
        if found:
            self._clients_known_s = time.monotonic() + _LEASE_INTERVALS * _CHECK_IN_S

    def _find(self) -> dict[int, Any]:
        """Return the actors of the replicas by their numbers, in order."""
        prefix = f"{self._name}."
        found = {}
        for name in ray.util.list_named_actors():
            number = name.removeprefix(prefix)
            if name.startswith(prefix) and number.isdecimal():
                with suppress(ValueError):  # it vanished meanwhile
                    found[int(number)] = ray.get_actor(name)
        return dict(sorted(found.items()))


async def _publication_of(actor: Any) -> Publication | None:
    """Return what a replica knows to be published last; None if it does not answer."""
    try:
        found: Publication = await _within(_RECOVERY_LIMIT_S, actor.publication.remote())
    except (ray.exceptions.RayError, asyncio.TimeoutError):
        return None
    return found


async def _within(limit_s: float, reference: Any) -> Any:
    """Wait for a call's result. Raises asyncio.TimeoutError if it takes longer."""
    return await asyncio.wait_for(_awaitable(reference), limit_s)


async def _awaitable(reference: Any) -> Any:
    return await reference


def _cause_of(error: Exception) -> BaseException:
    """Return what a replica itself raised."""
    cause = getattr(error, "cause", None)
    return cause if isinstance(cause, BaseException) else error
