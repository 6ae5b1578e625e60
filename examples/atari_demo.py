"""Real Atari games, played by many processes that share one network through grpc_batcher.

    pip install ".[demo]"
    python examples/atari_demo.py

This process has the network and serves it on two ports: a "repr" batcher that embeds what an actor sees, and a "dyna"
batcher that predicts what an action leads to. Each actor is a process that plays one game and asks about every move,
and all their requests go through the network in batches. The network is small and untrained: see atari_network.py.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import queue
import signal
import sys
import time
from collections.abc import Sequence
from multiprocessing.process import BaseProcess
from multiprocessing.queues import Queue
from threading import BrokenBarrierError

from grpc_batcher import MukoeBatcher, create_batcher

import numpy as np
from atari_actor import START_LIMIT_S, ActorReport, run_actor
from atari_network import Network, represent, step

GAMES = ["breakout", "pong", "space_invaders", "ms_pacman", "seaquest", "qbert", "boxing", "enduro"]

WEIGHTS_STEP = 1  # the version of the weights, which every answer has

PROGRESS_EVERY_S = 0.5  # in a terminal, where the line is overwritten
PROGRESS_LINE_EVERY_S = 4.0  # in a file or a log, where every line stays
REPORT_LIMIT_S = 15.0  # for the actors to finish their last move and report


def main() -> int:
    """Serve, play and print. Returns the exit status: 0 if every actor played to the end."""
    options = parse_options()

    repr_batcher = create_batcher(
        "repr",
        batch_size=options.batch_size,
        batch_timeout_s=options.batch_timeout_s,
        port=0,  # any free one
        batch_process_fn=represent,
        host="127.0.0.1",  # for actors on this machine only
    )
    dyna_batcher = create_batcher(
        "dyna",
        batch_size=options.batch_size,
        batch_timeout_s=options.batch_timeout_s,
        port=0,
        batch_process_fn=step,
        host="127.0.0.1",
    )
    # A learner would publish again after each update, with the next step. Nothing learns here.
    network = Network(seed=0)
    for batcher in (repr_batcher, dyna_batcher):
        batcher.publish(network, step=WEIGHTS_STEP)
    with repr_batcher, dyna_batcher:
        reports, interrupted = play_games(options, repr_batcher, dyna_batcher)

    if any(report.moves for report in reports):
        print_batchers(repr_batcher, dyna_batcher, reports, options.batch_size)
        print_games(reports)
    if interrupted:
        print("\nStopped by Ctrl-C.")
        return 130  # as shells report Ctrl-C
    return 0 if all_went_well(reports, options.actors) else 1


def parse_options() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        description="Atari games, played by processes that share one network through grpc_batcher.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("--seconds", type=float, default=20.0, help="how long to play")
    parser.add_argument("--actors", type=int, default=8, help="processes that play, one game each")
    parser.add_argument("--batch-size", type=int, default=4, help="the most requests in a batch")
    parser.add_argument(
        "--batch-timeout-s",
        type=float,
        default=0.005,
        help="the longest that a request waits for others to fill its batch, in seconds",
    )
    options = parser.parse_args()
    if options.actors < 1:
        parser.error("--actors must be at least 1")
    return options


def play_games(
    options: argparse.Namespace, repr_batcher: MukoeBatcher, dyna_batcher: MukoeBatcher
) -> tuple[list[ActorReport], bool]:
    """Run the actors for `options.seconds`.

    Returns the reports received, and whether Ctrl-C interrupted it.
    """
    # Actors need no BLAS threads: all matrix products are computed in this process. numpy's BLAS reads these when it is
    # loaded, and each actor's process loads its own.
    for name in ("OPENBLAS_NUM_THREADS", "OMP_NUM_THREADS", "MKL_NUM_THREADS"):
        os.environ.setdefault(name, "1")

    context = multiprocessing.get_context("spawn")  # gRPC's threads do not survive a fork
    start_line = context.Barrier(options.actors + 1)
    stop = context.Event()
    report_queue: Queue[ActorReport] = context.Queue()
    actors = [
        context.Process(
            target=run_actor,
            name=f"actor {index}",
            args=(
                GAMES[index % len(GAMES)],
                index,  # the seed
                f"127.0.0.1:{repr_batcher.port}",
                f"127.0.0.1:{dyna_batcher.port}",
                start_line,
                stop,
                report_queue,
            ),
            daemon=True,  # or it might outlive this process
        )
        for index in range(options.actors)
    ]

    print(f"Starting actors: {options.actors}, to play for {options.seconds:g} s ...", flush=True)
    start_ignoring_ctrl_c(actors)
    interrupted = False
    try:
        start_line.wait(START_LIMIT_S)
        show_progress(options.seconds, actors, repr_batcher, dyna_batcher)
    except BrokenBarrierError:
        pass  # an actor could not start; its report says why
    except KeyboardInterrupt:
        interrupted = True
        start_line.abort()
    stop.set()

    reports: list[ActorReport] = []
    try:
        while len(reports) < len(actors):
            reports.append(report_queue.get(timeout=REPORT_LIMIT_S))
    except queue.Empty:
        pass  # a process died or hangs; `all_went_well` reports it
    return sorted(reports, key=lambda report: report.game), interrupted


def start_ignoring_ctrl_c(processes: Sequence[BaseProcess]) -> None:
    """Start processes that ignore Ctrl-C, so that this one can end them in an orderly way.

    A terminal sends it to all of them. A new process inherits what its parent ignores.
    """
    handler = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        for process in processes:
            process.start()
    finally:
        signal.signal(signal.SIGINT, handler)


def show_progress(
    seconds: float,
    actors: Sequence[BaseProcess],
    repr_batcher: MukoeBatcher,
    dyna_batcher: MukoeBatcher,
) -> None:
    """Print the progress for `seconds`, or until an actor ends early."""
    in_terminal = sys.stdout.isatty()
    pause_s = PROGRESS_EVERY_S if in_terminal else PROGRESS_LINE_EVERY_S
    started_s = time.monotonic()
    while all(actor.is_alive() for actor in actors):
        played_s = time.monotonic() - started_s
        if played_s >= seconds:
            break
        time.sleep(min(pause_s, seconds - played_s))
        states, steps = repr_batcher.metrics(), dyna_batcher.metrics()
        line = (
            f"{time.monotonic() - started_s:5.1f} s"
            f"{states.requests.get('OK', 0):8,} moves"
            f"{steps.requests.get('OK', 0):8,} looks ahead"
            f"   mean batch {states.mean_batch_size or 0:.1f} repr, {steps.mean_batch_size or 0:.1f} dyna"
        )
        print(line, end="\r" if in_terminal else "\n", flush=True)
    if in_terminal:
        print()  # keep the last line


def print_batchers(
    repr_batcher: MukoeBatcher,
    dyna_batcher: MukoeBatcher,
    reports: list[ActorReport],
    batch_size: int,
) -> None:
    """Print what the two batchers counted, next to the latencies that the actors measured."""
    both = [repr_batcher.metrics(), dyna_batcher.metrics()]
    latencies_ms = [
        np.array([latency for report in reports for latency in report.repr_latencies_ms]),
        np.array([latency for report in reports for latency in report.dyna_latencies_ms]),
    ]

    def row(label: str, *cells: str) -> None:
        print(f"{label:<40}" + "".join(f"{cell:>12}" for cell in cells))

    def time_cell(milliseconds: float | None) -> str:
        return "-" if milliseconds is None else f"{milliseconds:.1f} ms"

    print()
    row("", *(metrics.model for metrics in both))
    row("requests", *(f"{sum(metrics.requests.values()):,}" for metrics in both))
    row("batches", *(f"{sum(metrics.batches.values()):,}" for metrics in both))
    for reason in ("full", "everyone_in", "timeout", "drain"):
        row(
            f"    left because: {reason.replace('_', ' ')}",
            *(f"{metrics.batches.get(reason, 0):,}" for metrics in both),
        )
    row(f"mean batch, of {batch_size} at most", *(f"{m.mean_batch_size or 0:.2f}" for m in both))
    for percent in (50, 99):
        row(
            f"latency p{percent}, as the actors see it",
            *(time_cell(float(np.percentile(sample, percent)) if sample.size else None) for sample in latencies_ms),
        )
    row("    of it, mean: waiting for the batch", *(time_cell(m.mean_waiting_ms) for m in both))
    row("    of it, mean: in the callback", *(time_cell(m.mean_callback_ms) for m in both))


def print_games(reports: list[ActorReport]) -> None:
    """Print what each actor played, and how fast they were in total."""
    print(f"\n{'game':<16}{'moves':>9}{'frames':>9}{'points':>9}{'games over':>12}")
    for report in reports:
        print(f"{report.game:<16}{report.moves:>9,}{report.frames:>9,}{report.points:>9,}{report.games_over:>12,}")
    frames_per_s = sum(report.frames / report.play_s for report in reports if report.play_s)
    versions = sorted({report.weights_version for report in reports})
    failed_tries = sum(report.failed_tries for report in reports)
    print(
        f"\n{frames_per_s:,.0f} frames per second in total; a console shows 60."
        f"\nAnswered by version {', '.join(map(str, versions))} of the weights, which are random:"
        " scores are random."
        f"\nRequests resent after an error: {failed_tries:,}."
    )


def all_went_well(reports: list[ActorReport], actor_count: int) -> bool:
    """Print what went wrong, or what to read next; return whether all went well."""
    problems = [f"{report.game}: {report.failure}" for report in reports if report.failure]
    if len(reports) < actor_count:
        problems.append(f"{actor_count - len(reports)} actors ended without a report")
    if not any(report.frames for report in reports):
        problems.append("no frame was played")
    for problem in problems:
        print(problem, file=sys.stderr)
    if not problems:
        print(
            "\nRead next: docs/api.md (every argument and error) and docs/batching.md (when a batch leaves,"
            "\nand what the four reasons above mean)."
        )
    return not problems


if __name__ == "__main__":
    sys.exit(main())
