"""An actor: a process that plays one Atari game and asks the network about every move.

For each move it sends its observation to the "repr" batcher, then tries the likeliest actions on the "dyna" batcher,
one after another, and plays one of the most promising.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from multiprocessing.queues import Queue
from multiprocessing.synchronize import Barrier, Event
from threading import BrokenBarrierError
from typing import Any

from grpc_batcher import MukoeBatcherClient

import grpc
import numpy as np
import numpy.typing as npt
from atari_game import AtariGame

ACTIONS_TRIED = 4  # in the look-ahead; a game has 3 to 18
DISCOUNT = 0.997  # what a point after the next move is worth, compared with one now

RETRY_PAUSE_S = 0.2
GIVE_UP_AFTER_S = 10.0  # how long to retry a request
START_LIMIT_S = 60.0  # for all actors' processes to start


@dataclass
class ActorReport:
    """What an actor reports at its end. It is sent to another process, so it has only plain values."""

    game: str
    failure: str | None = None  # why it ended early; None if it did not
    play_s: float = 0.0
    moves: int = 0
    frames: int = 0
    points: int = 0
    games_over: int = 0
    weights_version: int = 0  # of the network that gave the last answer
    failed_tries: int = 0  # requests that had to be resent
    repr_latencies_ms: list[float] = field(default_factory=list)  # one per answer
    dyna_latencies_ms: list[float] = field(default_factory=list)


def run_actor(
    game_name: str,
    seed: int,
    repr_address: str,
    dyna_address: str,
    start_line: Barrier,
    stop: Event,
    reports: Queue[ActorReport],
) -> None:
    """Run an actor's process: wait at the start line for the others, play until `stop` is set, and report."""
    report = ActorReport(game_name)
    try:
        game = AtariGame(game_name, seed)
        rng = np.random.default_rng(seed)
        with (
            MukoeBatcherClient(repr_address, arrays=True) as repr_client,
            MukoeBatcherClient(dyna_address, arrays=True) as dyna_client,
        ):
            start_line.wait(START_LIMIT_S)
            started_s = time.monotonic()
            while not stop.is_set():
                play_move(game, rng, repr_client, dyna_client, report)
            report.play_s = time.monotonic() - started_s
    except BrokenBarrierError:
        report.failure = "not all actors started"
    except Exception as error:
        # Reported instead of raised, so that only one process prints it.
        report.failure = f"{type(error).__name__}: {error}"
        start_line.abort()  # the others must not wait for this one
    reports.put(report)


def play_move(
    game: AtariGame,
    rng: np.random.Generator,
    repr_client: MukoeBatcherClient,
    dyna_client: MukoeBatcherClient,
    report: ActorReport,
) -> None:
    """Choose a move with a look-ahead of one step, play it, and update the report."""
    state = ask(partial(repr_client.send_request, game.observation), report.repr_latencies_ms, report)

    logits = state["policy"]
    likeliest = sorted(game.actions, key=lambda action: -logits[action])[:ACTIONS_TRIED]

    scores = []
    for action in likeliest:
        # The answer contains the next embedding, from which a deeper search would continue.
        following = ask(
            partial(dyna_client.send_request, state["embedding"], action),
            report.dyna_latencies_ms,
            report,
        )
        scores.append(float(following["reward"] + DISCOUNT * following["value"]))

    game.act(int(rng.choice(likeliest, p=preferences(scores))))
    report.moves += 1
    report.frames, report.points = game.frames, game.points
    report.games_over = game.games_over


def ask(
    send: Callable[[], tuple[dict[str, npt.NDArray[Any]], int]],
    latencies_ms: list[float],
    report: ActorReport,
) -> dict[str, npt.NDArray[Any]]:
    """Send one request until it is answered, as an actor that outlives its server must.

    Adds the duration of the successful try to `latencies_ms`. After GIVE_UP_AFTER_S without an answer, raises what the
    last try raised.
    """
    give_up_at_s = time.monotonic() + GIVE_UP_AFTER_S
    while True:
        sent_s = time.perf_counter()
        try:
            answer, report.weights_version = send()
        except grpc.RpcError:  # the server is not up yet, or it is full, or its callback raised
            if time.monotonic() > give_up_at_s:
                raise
            report.failed_tries += 1
            time.sleep(RETRY_PAUSE_S)
        else:
            latencies_ms.append((time.perf_counter() - sent_s) * 1e3)
            return answer


def preferences(scores: Sequence[float]) -> npt.NDArray[np.float64]:
    """Turn the scores of actions into the probabilities (float64) of playing them.

    Drawing an action instead of taking the best keeps a game moving: an untrained network prefers the same action for a
    long time, and that may not be the one that serves the ball.
    """
    scores_array = np.asarray(scores, np.float64)
    exponentials: npt.NDArray[np.float64] = np.exp((scores_array - scores_array.mean()) / (scores_array.std() + 1e-6))
    return exponentials / exponentials.sum()
