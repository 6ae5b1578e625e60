"""An actor of jax_muzero.py: a process that plays Catch and asks the network about every move. It needs no JAX.

For each move it sends what it sees to the "repr" batcher. It gets the state's embedding, and sends it to the "arrays"
batcher in one request with a row per move, which asks what each move leads to.
"""

from __future__ import annotations

import signal
from multiprocessing.queues import Queue
from multiprocessing.synchronize import Event
from typing import Any, NamedTuple

from grpc_batcher import MukoeBatcherClient

import numpy as np
import numpy.typing as npt

BOARD_SHAPE = (10, 5)  # rows, columns
MOVE_COUNT = 3  # left, stay, right
GAME_LENGTH = BOARD_SHAPE[0] - 1  # moves until the ball is down

DISCOUNT = 0.98
TEMPERATURE = 0.25  # how often it plays moves that promise less; 0 would be never


class Game(NamedTuple):
    """A game that was played, with a first axis of GAME_LENGTH.

    boards: uint8 (10, 5), before each move.
    policies: float32 (3,), the probabilities with which the moves were drawn.
    rewards: float32, all 0 except the last: 1 for a ball that was caught, -1 for one that was not.
    """

    boards: npt.NDArray[np.uint8]
    moves: npt.NDArray[np.int32]
    policies: npt.NDArray[np.float32]
    rewards: npt.NDArray[np.float32]


def run_actor(seed: int, repr_address: str, dynamics_address: str, stop: Event, games: Queue[Game]) -> None:
    """Run an actor's process: play until `stop` is set, and put every game into the queue."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # a terminal sends Ctrl-C to all; the main process ends this one
    rng = np.random.default_rng(seed)
    with (
        MukoeBatcherClient(repr_address, arrays=True) as repr_client,
        MukoeBatcherClient(dynamics_address, arrays=True) as dynamics_client,
    ):
        while not stop.is_set():
            games.put(play(rng, repr_client, dynamics_client))
    games.cancel_join_thread()  # nobody may be left who takes the last ones


def play(rng: np.random.Generator, repr_client: MukoeBatcherClient, dynamics_client: MukoeBatcherClient) -> Game:
    """Play one game: the ball falls one row per move, and the paddle in the last row must be below it at the end."""
    ball, paddle = int(rng.integers(BOARD_SHAPE[1])), BOARD_SHAPE[1] // 2
    boards, moves, policies = [], [], []
    for row in range(GAME_LENGTH):
        board = np.zeros(BOARD_SHAPE, np.uint8)
        board[row, ball] = board[-1, paddle] = 1
        policy = search(board, repr_client, dynamics_client)
        move = int(rng.choice(MOVE_COUNT, p=policy))
        paddle = min(max(paddle + move - 1, 0), BOARD_SHAPE[1] - 1)
        boards.append(board)
        moves.append(move)
        policies.append(policy)
    rewards = np.zeros(GAME_LENGTH, np.float32)
    rewards[-1] = 1 if paddle == ball else -1
    return Game(np.stack(boards), np.array(moves, np.int32), np.stack(policies).astype(np.float32), rewards)


def search(
    board: npt.NDArray[np.uint8], repr_client: MukoeBatcherClient, dynamics_client: MukoeBatcherClient
) -> npt.NDArray[np.float64]:
    """Return the probabilities of playing each move, by a look-ahead of one step."""
    state, _ = repr_client.send_request(board)
    following, _ = dynamics_client.send_request(
        embedding=np.repeat(state["embedding"][None], MOVE_COUNT, axis=0),  # bfloat16, as it came
        move=np.arange(MOVE_COUNT, dtype=np.int32),
        rows=True,
    )
    promises: npt.NDArray[Any] = following["reward"] + DISCOUNT * following["value"]
    exponentials: npt.NDArray[np.float64] = np.exp((promises - promises.max()).astype(np.float64) / TEMPERATURE)
    return exponentials / exponentials.sum()
