"""MuZero in JAX learns the game Catch, while its actors ask its network through grpc_batcher.

    pip install ".[demo-jax]"
    python examples/jax_muzero.py

This process has the network. It serves representation and dynamics on two ports, trains the weights on the games that
come in, and publishes them while the actors play. Each actor is a process that plays one game after another.
"""

from __future__ import annotations

import argparse
import multiprocessing
import queue
import sys
import time
from collections import deque
from collections.abc import Sequence
from contextlib import suppress
from multiprocessing.process import BaseProcess
from multiprocessing.queues import Queue
from typing import TYPE_CHECKING

from grpc_batcher import MukoeBatcher, create_batcher

from catch_actor import MOVE_COUNT, Game, run_actor

if TYPE_CHECKING:
    from jax_muzero_network import Learner

REPLAY_SIZE = 500  # the last games, from which it learns
FIRST_UPDATE_AT = 20  # games
PUBLISH_EVERY = 5  # updates
START_LIMIT_S = 60.0  # for the first game
STOP_LIMIT_S = 10.0  # for the actors to finish their last game


def main() -> int:
    """Serve, play, learn and print. Returns the exit status: 0 if every actor played to the end."""
    options = parse_options()
    # Not at the top: the actors' processes import this file, too, and need no JAX.
    from jax_muzero_network import Learner, answer_boards, answer_moves

    began_s = time.monotonic()
    learner = Learner(seed=0)
    learner.warm_up()
    # A jitted function is compiled once per shape, so there are few shapes, and `start` compiles them all.
    repr_batcher = create_batcher(
        "repr",
        batch_size=options.actors,
        batch_timeout_s=0.005,
        port=0,  # any free one
        batch_process_fn=answer_boards,
        batch_sizes=halves(options.actors),
        warm_up=True,
        host="127.0.0.1",
    )
    # An actor's request has a row per move.
    dynamics_batcher = create_batcher(
        "arrays",
        batch_size=options.actors * MOVE_COUNT,
        batch_timeout_s=0.005,
        port=0,
        batch_process_fn=answer_moves,
        batch_sizes=[size * MOVE_COUNT for size in halves(options.actors)],
        warm_up=True,
        host="127.0.0.1",
    )
    batchers = repr_batcher, dynamics_batcher
    publish(learner, batchers)  # before the start, because the warm-up needs weights, too
    with repr_batcher, dynamics_batcher:
        print(f"Compiled and warmed up in {time.monotonic() - began_s:.1f} s.", flush=True)
        return play_and_learn(options, learner, batchers)


def parse_options() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        description="MuZero in JAX learns Catch while its actors ask its network through grpc_batcher.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("--seconds", type=float, default=12.0, help="how long to play, from the first game's end")
    parser.add_argument("--games", type=int, default=1_000_000, help="stop earlier, after this many games")
    parser.add_argument("--actors", type=int, default=4, help="processes that play")
    options = parser.parse_args()
    if options.actors < 1:
        parser.error("--actors must be at least 1")
    return options


def halves(most: int) -> list[int]:
    """Return `most`, its half, and so on down to 1: a batch is padded to less than twice its rows."""
    return [most] if most == 1 else [*halves(most // 2), most]


def publish(learner: Learner, batchers: Sequence[MukoeBatcher]) -> None:
    """Have both batchers answer with the learner's weights from their next batch on."""
    for batcher in batchers:
        batcher.publish(learner.weights, step=learner.updates)


def play_and_learn(options: argparse.Namespace, learner: Learner, batchers: Sequence[MukoeBatcher]) -> int:
    """Run the actors, and train on their games. Returns the exit status."""
    context = multiprocessing.get_context("spawn")  # gRPC's threads do not survive a fork
    stop = context.Event()
    games: Queue[Game] = context.Queue()
    addresses = [f"127.0.0.1:{batcher.port}" for batcher in batchers]
    actors = [
        context.Process(target=run_actor, args=(seed, *addresses, stop, games), name=f"actor {seed}", daemon=True)
        for seed in range(options.actors)
    ]
    for actor in actors:
        actor.start()
    table = Table(batchers)
    try:
        learn(options, learner, batchers, actors, games, table)
    except KeyboardInterrupt:
        print("Stopped by Ctrl-C.")
    stop.set()
    for actor in actors:
        actor.join(STOP_LIMIT_S)
    failed = [actor.name for actor in actors if actor.exitcode != 0]
    if failed or not table.games:
        print(f"failed: {', '.join(failed) or 'no game was finished'}", file=sys.stderr)
        return 1
    print(
        "\nCaught: of the last 200 balls. A random player catches a fifth. Rows per batch: without padding."
        "\nRead next: docs/arrays.md."
    )
    return 0


def learn(
    options: argparse.Namespace,
    learner: Learner,
    batchers: Sequence[MukoeBatcher],
    actors: Sequence[BaseProcess],
    games: Queue[Game],
    table: Table,
) -> None:
    """Train on the games that come in, publish the weights, and print, until there were enough or an actor ends."""
    replay: deque[Game] = deque(maxlen=REPLAY_SIZE)
    end_s = time.monotonic() + START_LIMIT_S
    while time.monotonic() < end_s and table.games < options.games and all(actor.is_alive() for actor in actors):
        for game in those_in(games):
            if not table.games:
                end_s = time.monotonic() + options.seconds
            replay.append(game)
            table.add(game)
        if len(replay) >= FIRST_UPDATE_AT and learner.updates < table.games:
            learner.update(replay)
            if learner.updates % PUBLISH_EVERY == 0:
                publish(learner, batchers)
        table.print_line_in_time(learner.updates)
    table.print_line(learner.updates)


def those_in(games: Queue[Game]) -> list[Game]:
    """Return the games that are in the queue; wait a moment if there is none."""
    found = []
    with suppress(queue.Empty):
        found.append(games.get(timeout=0.1))
        while True:
            found.append(games.get_nowait())
    return found


class Table:
    """Prints a line every few seconds.

    games: how many were played.
    """

    _LINE_EVERY_S = 2.0

    def __init__(self, batchers: Sequence[MukoeBatcher]) -> None:
        self.games = 0
        self._batchers = batchers
        self._caught: deque[bool] = deque(maxlen=200)
        self._began_s = time.monotonic()
        self._next_line_s = self._began_s + self._LINE_EVERY_S
        print(f"\n{'time':>7}{'step':>7}{'games':>8}{'caught':>8}{'requests':>10}{'rows per batch':>16}")

    def add(self, game: Game) -> None:
        self.games += 1
        self._caught.append(bool(game.rewards[-1] > 0))

    def print_line_in_time(self, step: int) -> None:
        if time.monotonic() >= self._next_line_s:
            self.print_line(step)

    def print_line(self, step: int) -> None:
        self._next_line_s = time.monotonic() + self._LINE_EVERY_S
        if not self.games:
            return
        metrics = [batcher.metrics() for batcher in self._batchers]
        requests = sum(each.requests.get("OK", 0) for each in metrics)
        sizes = " and ".join(f"{each.mean_batch_size or 0:.1f}" for each in metrics)
        print(
            f"{time.monotonic() - self._began_s:>5.0f} s{step:>7,}{self.games:>8,}"
            f"{sum(self._caught) / len(self._caught):>8.0%}{requests:>10,}{sizes:>16}",
            flush=True,
        )


if __name__ == "__main__":
    sys.exit(main())
