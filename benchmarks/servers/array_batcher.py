"""This library's server with array work, done in one of three ways.

ARRAYS: with `arrays=`.
BY_HAND: a callback of bytes that unpacks, pads, concatenates, splits and packs with msgpack and numpy, as MuKoe's does.
BLIND: a callback of bytes that looks at nothing and answers with bytes made before, which is the limit of the others.

All call the same network on a batch that is padded to the batch size. Either it is a jitted JAX function, or it returns
arrays made before, of which only the one that says whose answer it is depends on the request.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from multiprocessing.connection import Connection
from typing import Any

from grpc_batcher import Array, create_batcher, info
from grpc_batcher._cli.workers import obey

import msgpack
import numpy as np
from array_kinds import ARRAYS, BY_HAND, DTYPES, EMBEDDING_SHAPE, OBSERVATION_SHAPE
from servers.batcher import counts_of

POLICY_SIZE = 18

Outputs = Mapping[str, Any]
Network = Callable[[Any], Outputs]
Results = list[tuple[dict[str, bytes], int]]


def prepared_network(batch_size: int) -> Network:
    """The work of a network, without a network."""
    embedding = np.zeros((batch_size, *EMBEDDING_SHAPE), np.float32)
    policy = np.zeros((batch_size, POLICY_SIZE), np.float32)
    reward = np.zeros(batch_size, np.float32)

    def network(observations: Any) -> Outputs:
        return {
            "embedding": embedding,
            "policy": policy,
            "reward": reward,
            "value": observations[:, -1, -1, -1, -1].astype(np.float32),
        }

    return network


def jax_network() -> Network:
    """A function of as many values of an observation as an embedding has, which is little work for a network."""
    import jax
    import jax.numpy as jnp

    @jax.jit
    def network(observations: Any) -> Outputs:
        size = len(observations)
        flat = observations.reshape(size, -1)
        embedding = jnp.tanh(flat[:, : np.prod(EMBEDDING_SHAPE)].astype(jnp.float32))
        return {
            "embedding": embedding.reshape(size, *EMBEDDING_SHAPE),
            "policy": embedding[:, :POLICY_SIZE],
            "reward": embedding.mean(axis=1),
            "value": flat[:, -1].astype(jnp.float32),
        }

    return network  # type: ignore[no-any-return]


def unpack(packed: bytes) -> Any:
    shape, dtype, data = msgpack.unpackb(packed)
    return np.frombuffer(data, dtype).reshape(shape)


def pack(array: Any) -> bytes:
    return msgpack.packb((array.shape, array.dtype.name, array.tobytes()))  # type: ignore[no-any-return]


def by_hand(network: Network, batch_size: int) -> Callable[[Sequence[bytes]], Results]:
    def callback(requests: Sequence[bytes]) -> Results:
        observations = [unpack(request) for request in requests]
        observations += [observations[0]] * (batch_size - len(requests))
        outputs = network(np.concatenate(observations, axis=0))
        rows = {name: list(np.asarray(output)) for name, output in outputs.items()}
        return [
            ({name: pack(np.asarray(each[index])) for name, each in rows.items()}, 0) for index in range(len(requests))
        ]

    return callback


def blind(network: Network, batch_size: int, dtype: str) -> Callable[[Sequence[bytes]], Results]:
    observations = np.zeros((batch_size, *OBSERVATION_SHAPE), dtype)
    (result,) = by_hand(network, batch_size)([pack(observations[:1])])

    def callback(requests: Sequence[bytes]) -> Results:
        for output in network(observations).values():
            np.asarray(output)  # waits for it
        return [result] * len(requests)

    return callback


class Server:
    """Serves one batcher at a time; its public methods are the commands."""

    def __init__(self, way: str, batch_timeout_s: float) -> None:
        self._way = way
        self._batch_timeout_s = batch_timeout_s
        self._jax_network: Network | None = None
        self._running = ExitStack()

    def serve(self, observation_bytes: int, batch_size: int, with_jax: bool) -> int:
        """Serve these observations in place of what was served, and return the port."""
        self.close()
        network = self._jax() if with_jax else prepared_network(batch_size)
        self.batcher = self._running.enter_context(
            create_batcher(
                "repr",
                batch_size,
                self._batch_timeout_s,
                port=0,
                host="127.0.0.1",
                track_metrics=False,
                **self._callback(network, batch_size, DTYPES[observation_bytes]),
            )
        )
        return self.batcher.port

    def counts(self) -> dict[str, Any]:
        return counts_of(self.batcher)

    def close(self) -> None:
        self._running.close()

    def _callback(self, network: Network, batch_size: int, dtype: str) -> dict[str, Any]:
        """The callback, and what else depends on how it works."""
        if self._way == ARRAYS:
            return {
                "batch_process_fn": lambda batch: network(batch["data"]),
                "arrays": {"data": Array(OBSERVATION_SHAPE, dtype)},
                "batch_sizes": [batch_size],
                "warm_up": True,
            }
        callback = by_hand(network, batch_size) if self._way == BY_HAND else blind(network, batch_size, dtype)
        return {"batch_process_fn": callback, "warm_up": [pack(np.zeros((1, *OBSERVATION_SHAPE), dtype))]}

    def _jax(self) -> Network:
        """One function for all, which is compiled once per shape and dtype."""
        if self._jax_network is None:
            self._jax_network = jax_network()
        return self._jax_network


def run(pipe: Connection, way: str, batch_timeout_s: float) -> None:
    """The process."""
    server = Server(way, batch_timeout_s)
    port = server.serve(min(DTYPES), 16, False)
    pipe.send({"port": port, "transport": server.batcher.transport, "counts": True})
    obey(pipe, {"serve": server.serve, "counts": server.counts, "info": info})
    server.close()
