"""The network of jax_muzero.py in JAX: MuZero's representation, dynamics and prediction, the callbacks, the training.

Embeddings are bfloat16 where they travel, which halves their bytes; the network computes in float32.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from grpc_batcher import Array, Batch, arrays

import jax
import jax.numpy as jnp
import numpy as np
from catch_actor import BOARD_SHAPE, DISCOUNT, GAME_LENGTH, MOVE_COUNT, Game
from jax.flatten_util import ravel_pytree

EMBEDDING_SIZE = 64
HIDDEN_SIZE = 128
UNROLLED = 5  # steps that are trained from one board

LEARNING_RATE = 5e-3
POSITIONS = 256  # boards per update

Weights = dict[str, Any]  # layers, each with a weight matrix and a bias


# ---- the network ----


def new_weights(seed: int) -> Weights:
    """Return random weights."""
    sizes = {
        "board": (BOARD_SHAPE[0] * BOARD_SHAPE[1], HIDDEN_SIZE),
        "embedding": (HIDDEN_SIZE, EMBEDDING_SIZE),
        "move": (EMBEDDING_SIZE + MOVE_COUNT, HIDDEN_SIZE),
        "next": (HIDDEN_SIZE, EMBEDDING_SIZE),
        "reward": (HIDDEN_SIZE, 1),
        "heads": (EMBEDDING_SIZE, HIDDEN_SIZE),
        "policy": (HIDDEN_SIZE, MOVE_COUNT),
        "value": (HIDDEN_SIZE, 1),
    }
    rng = np.random.default_rng(seed)
    return {
        name: {
            "w": (rng.standard_normal((inputs, outputs)) / inputs**0.5).astype(np.float32),
            "b": np.zeros(outputs, np.float32),
        }
        for name, (inputs, outputs) in sizes.items()
    }


def layer(weights: Weights, name: str, inputs: jax.Array) -> jax.Array:
    return inputs @ weights[name]["w"] + weights[name]["b"]


def represent(weights: Weights, boards: jax.Array) -> jax.Array:
    """Embed boards: uint8 (B, 10, 5) to float32 (B, 64)."""
    hidden = jax.nn.relu(layer(weights, "board", boards.reshape(len(boards), -1).astype(jnp.float32)))
    return jnp.tanh(layer(weights, "embedding", hidden))


def advance(weights: Weights, embeddings: jax.Array, moves: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Return the embeddings after moves, float32 (B, 64), and the rewards for getting there, (B,)."""
    moves = jax.nn.one_hot(moves, MOVE_COUNT)
    hidden = jax.nn.relu(layer(weights, "move", jnp.concatenate([embeddings, moves], axis=1)))
    return jnp.tanh(layer(weights, "next", hidden)), layer(weights, "reward", hidden)[:, 0]


def predict(weights: Weights, embeddings: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Return logits of the moves, float32 (B, 3), and values, (B,)."""
    hidden = jax.nn.relu(layer(weights, "heads", embeddings))
    return layer(weights, "policy", hidden), layer(weights, "value", hidden)[:, 0]


# ---- the callbacks ----


@jax.jit
def represent_batch(weights: Weights, boards: jax.Array) -> dict[str, jax.Array]:
    embeddings = represent(weights, boards)
    policy, value = predict(weights, embeddings)
    return {"embedding": embeddings.astype(jnp.bfloat16), "policy": policy, "value": value}


@jax.jit
def advance_batch(weights: Weights, embeddings: jax.Array, moves: jax.Array) -> dict[str, jax.Array]:
    following, reward = advance(weights, embeddings.astype(jnp.float32), moves)
    policy, value = predict(weights, following)
    return {"embedding": following.astype(jnp.bfloat16), "reward": reward, "policy": policy, "value": value}


@arrays(data=Array(BOARD_SHAPE, "uint8"))
def answer_boards(batch: Batch) -> dict[str, jax.Array]:
    return represent_batch(batch.weights, batch["data"])


@arrays(embedding=Array((EMBEDDING_SIZE,), "bfloat16"), move=Array((), "int32"))
def answer_moves(batch: Batch) -> dict[str, jax.Array]:
    return advance_batch(batch.weights, batch["embedding"], batch["move"])


# ---- training ----


def training_batch(rng: np.random.Generator, games: Sequence[Game]) -> dict[str, np.ndarray]:
    """Draw boards from games, each with what happened in the UNROLLED moves from there, by move and then by board.

    After the end of a game, rewards and values are 0, and no policy is trained.
    """
    drawn = [games[index] for index in rng.integers(len(games), size=POSITIONS)]
    begins = rng.integers(GAME_LENGTH, size=POSITIONS)
    steps = begins + np.arange(UNROLLED)[:, None]
    in_game = steps < GAME_LENGTH
    which = np.arange(POSITIONS), np.minimum(steps, GAME_LENGTH - 1)
    boards, moves, policies, rewards = (np.stack(values) for values in zip(*drawn, strict=True))
    values = rewards[:, -1] * DISCOUNT ** (GAME_LENGTH - 1 - steps)  # the only reward is the last
    return {
        "boards": boards[np.arange(POSITIONS), begins],
        "moves": moves[which],
        "policies": policies[which] * in_game[..., None],
        "rewards": rewards[which] * in_game,
        "values": (values * in_game).astype(np.float32),
    }


def loss(weights: Weights, batch: dict[str, jax.Array]) -> jax.Array:
    """Of all predictions, from the boards themselves and from embeddings that the dynamics made of them."""

    def step(embeddings: jax.Array, told: dict[str, jax.Array]) -> tuple[jax.Array, jax.Array]:
        policy, value = predict(weights, embeddings)
        following, reward = advance(weights, embeddings, told["moves"])
        errors = (value - told["values"]) ** 2 + (reward - told["rewards"]) ** 2
        likelihoods = jnp.sum(told["policies"] * jax.nn.log_softmax(policy), axis=1)
        return following, jnp.mean(errors - likelihoods)

    boards, told = batch["boards"], {name: array for name, array in batch.items() if name != "boards"}
    _, losses = jax.lax.scan(step, represent(weights, boards), told)
    return losses.sum()


class Learner:
    """Holds the weights and trains them, with Adam.

    weights: never changed in place, so they may be published as they are.
    """

    def __init__(self, seed: int) -> None:
        weights = new_weights(seed)
        zeros = np.zeros(sum(array.size for array in jax.tree.leaves(weights)), np.float32)
        self.weights: Weights = jax.device_put(weights)
        self.updates = 0
        self._moments = zeros, zeros
        self._rng = np.random.default_rng(seed)

    def warm_up(self) -> None:
        """Have the update compiled, which takes longer than the rest of the network."""
        game = Game(
            boards=np.zeros((GAME_LENGTH, *BOARD_SHAPE), np.uint8),
            moves=np.zeros(GAME_LENGTH, np.int32),
            policies=np.zeros((GAME_LENGTH, MOVE_COUNT), np.float32),
            rewards=np.zeros(GAME_LENGTH, np.float32),
        )
        _updated(self.weights, self._moments, 1, training_batch(self._rng, [game]))

    def update(self, games: Sequence[Game]) -> None:
        self.updates += 1
        batch = training_batch(self._rng, games)
        self.weights, self._moments = _updated(self.weights, self._moments, self.updates, batch)


@jax.jit
def _updated(weights: Weights, moments: tuple[Any, Any], count: int, batch: dict[str, Any]) -> tuple[Any, Any]:
    flat, unravel = ravel_pytree(weights)
    gradient, _ = ravel_pytree(jax.grad(loss)(weights, batch))
    mean = 0.9 * moments[0] + 0.1 * gradient
    square = 0.999 * moments[1] + 0.001 * gradient**2
    rate = LEARNING_RATE * jnp.sqrt(1 - 0.999**count) / (1 - 0.9**count)
    return unravel(flat - rate * mean / (jnp.sqrt(square) + 1e-8)), (mean, square)
