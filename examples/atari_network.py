"""A small network in numpy with the parts that MuZero has, and the two callbacks that serve it as arrays.

The weights are random and never trained, so it plays no better than chance. But its work is real: the arrays have the
sizes that real users send, and every answer is computed from its own request.
"""

from __future__ import annotations

from grpc_batcher import Array, Batch, arrays

import numpy as np
import numpy.typing as npt

FloatArray = npt.NDArray[np.float32]
ByteArray = npt.NDArray[np.uint8]
IntArray = npt.NDArray[np.int32]

OBSERVATION_SHAPE = (96, 96, 3, 4)  # rows, columns, colours, the last four screens: 110,592 bytes
EMBEDDING_SHAPE = (6, 6, 256)  # rows, columns, channels; as float32 36,864 bytes
ACTION_COUNT = 18  # each joystick position, with the button up or down

GRID, CHANNELS = EMBEDDING_SHAPE[0], EMBEDDING_SHAPE[2]
PATCH_SIDE = OBSERVATION_SHAPE[0] // GRID  # in pixels
PATCH_VALUES = PATCH_SIDE * PATCH_SIDE * OBSERVATION_SHAPE[2] * OBSERVATION_SHAPE[3]


class Network:
    """Random weights, and the two functions that MuZero calls representation and dynamics.

    Both take a batch of B rows and return a dict of arrays whose first axis is B.
    """

    def __init__(self, seed: int) -> None:
        rng = np.random.default_rng(seed)

        def weights(inputs: int, outputs: int) -> FloatArray:
            # With this scale, values have about the same size in every layer.
            return rng.standard_normal((inputs, outputs), np.float32) / np.float32(inputs**0.5)

        self._patch_weights = weights(PATCH_VALUES, CHANNELS)
        self._action_vectors = weights(1, ACTION_COUNT * CHANNELS).reshape(ACTION_COUNT, CHANNELS)
        self._residual_in = weights(CHANNELS, CHANNELS)
        self._residual_out = weights(CHANNELS, CHANNELS)
        self._policy_weights = weights(CHANNELS, ACTION_COUNT)
        self._value_weights = weights(CHANNELS, 1)
        self._reward_weights = weights(CHANNELS, 1)

    def represent(self, observations: ByteArray) -> dict[str, FloatArray]:
        """Embed observations.

        Takes (B, 96, 96, 3, 4) uint8. Returns float32 arrays: "embedding" (B, 6, 6, 256),
        "policy" (B, 18) as logits, "value" (B,).
        """
        batch_size = len(observations)
        # Cut each screen into 6 x 6 patches of 16 x 16 pixels. One matrix product embeds all of them.
        patches = (
            observations.reshape(batch_size, GRID, PATCH_SIDE, GRID, PATCH_SIDE, -1)
            .transpose(0, 1, 3, 2, 4, 5)
            .reshape(-1, PATCH_VALUES)
            .astype(np.float32)
        )
        hidden = _relu(patches @ self._patch_weights)
        embeddings = _normalised(hidden).reshape(batch_size, *EMBEDDING_SHAPE)
        return {"embedding": embeddings, **self._heads(embeddings)}

    def step(self, embeddings: FloatArray, actions: IntArray) -> dict[str, FloatArray]:
        """Predict what follows each action in the state of its embedding.

        Takes (B, 6, 6, 256) float32 and (B,) int32 from 0 to 17. Returns the same as `represent`, for the next state,
        and the "reward" (B,) float32 for getting there.
        """
        inputs: FloatArray = embeddings + self._action_vectors[actions][:, None, None, :]
        hidden = _relu(inputs @ self._residual_in)
        following = _normalised(embeddings + hidden @ self._residual_out)
        rewards = (following.mean(axis=(1, 2)) @ self._reward_weights)[:, 0]
        return {"embedding": following, "reward": rewards, **self._heads(following)}

    def _heads(self, embeddings: FloatArray) -> dict[str, FloatArray]:
        """Policy (B, 18) and value (B,) of embeddings (B, 6, 6, 256)."""
        pooled = embeddings.mean(axis=(1, 2))
        return {
            "policy": pooled @ self._policy_weights,
            "value": (pooled @ self._value_weights)[:, 0],
        }


def _relu(values: FloatArray) -> FloatArray:
    return np.maximum(values, np.float32(0))


def _normalised(values: FloatArray) -> FloatArray:
    """Shift and scale along the last axis to mean 0 and standard deviation 1."""
    centred = values - values.mean(axis=-1, keepdims=True)
    # The small number avoids a division by zero for a constant input, such as a black patch.
    return centred / (centred.std(axis=-1, keepdims=True) + np.float32(1e-5))


# The callbacks. A batcher copies the requests into one array per name, and sends each caller its rows of what is
# returned. `weights` is the network that was published last.


@arrays(data=Array(OBSERVATION_SHAPE, "uint8"))
def represent(batch: Batch) -> dict[str, FloatArray]:
    """Answer a batch of a "repr" batcher: observations in, embeddings out."""
    network: Network = batch.weights
    return network.represent(batch["data"])


@arrays(data=Array(EMBEDDING_SHAPE, "float32"))
def step(batch: Batch) -> dict[str, FloatArray]:
    """Answer a batch of a "dyna" batcher: embeddings and actions in, the next embeddings out."""
    network: Network = batch.weights
    return network.step(batch["data"], batch["action"])
