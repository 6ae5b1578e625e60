"""Atari games on Ray: actors play, replicas of a network answer, weights change, and a replica is killed half-way.

    pip install ".[demo-ray]"
    python examples/ray_atari.py

Two replicas embed what actors see ("repr"), and two predict what actions lead to ("dyna"). This program only launches
them, publishes weights, and does the damage: requests go straight from the actors to the replicas.
"""

from __future__ import annotations

import argparse
import os
import time
from functools import partial
from pathlib import Path

from grpc_batcher import MukoeBatcher, MukoeBatcherClient, create_batcher
from grpc_batcher.ray import Replicas, launch

import numpy as np
import ray
from atari_actor import ActorReport, play_move
from atari_game import AtariGame
from atari_network import Network, represent, step

GAMES = ["breakout", "pong", "space_invaders", "ms_pacman", "seaquest", "qbert"]
REPLICAS = 2
PUBLISH_EVERY_S = 1.0

# Ray plans with processor cores. These processes share them: the network here is small.
SHARED = {"num_cpus": 0}


def make_batcher(model: str) -> MukoeBatcher:
    """Return a replica's batcher."""
    return create_batcher(model, 4, 0.005, batch_process_fn=represent if model == "repr" else step)


@ray.remote(**SHARED)
class Actor:
    """Plays one game."""

    def play(
        self,
        game_name: str,
        seed: int,
        repr_client: MukoeBatcherClient,
        dyna_client: MukoeBatcherClient,
        seconds: float,
    ) -> ActorReport:
        report = ActorReport(game_name)
        game, rng = AtariGame(game_name, seed), np.random.default_rng(seed)
        begin_s = time.monotonic()
        while time.monotonic() - begin_s < seconds:
            play_move(game, rng, repr_client, dyna_client, report)
        report.play_s = time.monotonic() - begin_s
        return report


def main() -> int:
    """Launch, play, kill and print. Returns the exit status: 0 if every actor played to the end."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seconds", type=float, default=15.0, help="how long to play (15)")
    parser.add_argument("--actors", type=int, default=6, help="Ray actors that play, one game each (6)")
    options = parser.parse_args()

    os.chdir(Path(__file__).parent)  # where Ray's processes find this program's modules
    ray.init(namespace="atari", include_dashboard=False, log_to_driver=False)
    encoders, dynamics = (
        launch(partial(make_batcher, model), REPLICAS, actor_options=SHARED, name=model) for model in ("repr", "dyna")
    )
    print(f"{options.actors} actors play for {options.seconds:.0f} s, with {REPLICAS} replicas of each network")
    publish(encoders, dynamics, step_number=0)
    clients = encoders.client(arrays=True), dynamics.client(arrays=True)
    games = [
        Actor.remote().play.remote(GAMES[number % len(GAMES)], number, *clients, options.seconds)
        for number in range(options.actors)
    ]
    steps = disturb(encoders, dynamics, games, options.seconds)
    reports = ray.get(games)
    print_reports(reports, steps)
    print_replicas(encoders, dynamics)
    encoders.shutdown()
    dynamics.shutdown()
    return 0 if all(report.moves for report in reports) else 1


def disturb(encoders: Replicas, dynamics: Replicas, games: list[ray.ObjectRef], seconds: float) -> int:
    """Publish weights until the games are over, and kill a replica half-way. Returns the last step."""
    begin_s, step_number, is_killed = time.monotonic(), 0, False
    while len(ray.wait(games, num_returns=len(games), timeout=PUBLISH_EVERY_S)[0]) < len(games):
        step_number += 1
        publish(encoders, dynamics, step_number=step_number)
        if not is_killed and time.monotonic() - begin_s > seconds / 2:
            is_killed = True
            print(f"after {time.monotonic() - begin_s:.0f} s, replica 0 of the encoder is killed")
            ray.kill(ray.get_actor("grpc_batcher.repr.0"), no_restart=False)
    return step_number


def publish(*kinds: Replicas, step_number: int) -> None:
    """Give all replicas a new network. A learner's would be better."""
    weights = ray.put(Network(seed=step_number))
    for replicas in kinds:
        replicas.publish(weights, step=step_number)


def print_reports(reports: list[ActorReport], steps: int) -> None:
    """Print a line per actor. Whoever noticed the killed replica had to send a request again."""
    print(f"\n{'game':16}{'moves/s':>9}{'points':>8}{'weights':>9}{'sent again':>12}")
    for report in reports:
        moves_per_s = report.moves / report.play_s
        print(f"{report.game:16}{moves_per_s:9.1f}{report.points:8}{report.weights_version:9}{report.failed_tries:12}")
    total = sum(len(report.repr_latencies_ms) + len(report.dyna_latencies_ms) for report in reports)
    again = sum(report.failed_tries for report in reports)
    print(f"\n{total} requests were answered with {steps + 1} versions of the weights, and {again} were sent again.")


def print_replicas(*kinds: Replicas) -> None:
    """Print what each replica that is there now has answered. The killed one began again at 0."""
    print(f"\n{'replica':16}{'answers':>9}{'mean batch':>12}{'weights':>9}")
    for replicas in kinds:
        for number, metrics in sorted(replicas.metrics().items()):
            mean = metrics.mean_batch_size or 0
            print(f"{metrics.model + ' ' + number:16}{metrics.requests.get('OK', 0):9}{mean:12.2f}{metrics.step:9}")


if __name__ == "__main__":
    raise SystemExit(main())
