"""Measures this library and other servers on this machine, over loopback: `python benchmarks/run.py --help`.

README.md in this folder says how to read the results.
"""

from __future__ import annotations

import argparse
import dataclasses
import resource
import sys
import time
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from types import ModuleType

from grpc_batcher._cli.workers import WorkerError

import draw
import machine
import report
from measuring import Sample
from report import Measured
from row import Bench, Row, Settings
from rows import (
    actors,
    arrays,
    callback,
    core_alone,
    few_callers,
    first_request,
    idle,
    in_flight,
    open_inference,
    overlap,
    streams,
    throughput,
)

ROWS: dict[str, ModuleType] = {
    "throughput": throughput,
    "few_callers": few_callers,
    "streams": streams,
    "idle": idle,
    "callback": callback,
    "core_alone": core_alone,
    "overlap": overlap,
    "actors": actors,
    "first_request": first_request,
    "in_flight": in_flight,
    "arrays": arrays,
    "open_inference": open_inference,
}

# The order in which they are measured: the first two share their processes.
ORDER = ("throughput", "idle", *(name for name in ROWS if name not in ("throughput", "idle")))

FULL = Settings(rounds=4, warm_s=0.3, window_s=1.0, idle_s=60, most_public_streams=1024)
QUICK = Settings(rounds=1, warm_s=0.2, window_s=0.3, idle_s=3, most_public_streams=128)

RESULTS = Path(__file__).parent / "results"

# How much of the machine others may use during a run.
_MOST_OTHERS_PERCENT = 5


class Progress:
    """A line that says what is being measured: rewritten in a terminal; elsewhere, a line per round of each row."""

    def __init__(self) -> None:
        self._begin_s = time.monotonic()
        self._rewrites = sys.stderr.isatty()
        self._last = ""

    def show(self, row: str, round_number: int, rounds: int, step: str) -> None:
        head = f"row {list(ROWS).index(row) + 1} of {len(ROWS)}, round {round_number} of {rounds}"
        passed_s = int(time.monotonic() - self._begin_s)
        clock = f"{passed_s // 60}:{passed_s % 60:02}"
        if self._rewrites:
            print(f"\r\x1b[K{clock}  {head}: {step}"[:150], end="", file=sys.stderr, flush=True)
        elif head != self._last:
            print(f"{clock}  {head}: {ROWS[row].TITLE}", file=sys.stderr, flush=True)
        self._last = head

    def clear(self) -> None:
        if self._rewrites:
            print("\r\x1b[K", end="", file=sys.stderr, flush=True)

    @property
    def passed_s(self) -> float:
        return time.monotonic() - self._begin_s


def measure_row(name: str, bench: Bench, progress: Progress) -> dict[str, Measured]:
    """Go through the row's cells once per round, backwards in every second one, so that no cell is always first.

    A system is left out after one of its processes fails.
    """
    with ExitStack() as stack:
        progress.show(name, 1, bench.settings.rounds, "starting")
        row: Row = ROWS[name].open_row(bench, stack)
        rounds = min(bench.settings.rounds, row.most_rounds)
        samples: dict[str, list[Sample]] = {cell.key: [] for cell in row.cells}
        broken = set()
        for number in range(1, rounds + 1):
            progress.show(name, number, rounds, "preparing")
            row.begin_round()
            backwards = number % 2 == 0 and not row.in_order
            for cell in reversed(row.cells) if backwards else row.cells:
                if cell.system in broken:
                    continue
                progress.show(name, number, rounds, cell.title)
                try:
                    samples[cell.key].append(cell.measure())
                except WorkerError as error:
                    broken.add(cell.system)
                    samples[cell.key].append(Sample({}, [str(error)]))
        return {cell.key: Measured(name, cell, samples[cell.key]) for cell in row.cells if samples[cell.key]}


def allow_open_files() -> None:
    """Raise the limit, which processes inherit: a thousand connections need more than the usual one."""
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))


def problems_of(results: dict[str, Measured]) -> list[str]:
    return [
        f"{measured.cell.title}, round {number}: {problem}"
        for measured in results.values()
        for number, sample in enumerate(measured.samples, 1)
        for problem in sample.problems
    ]


def parse(arguments: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Measure this library and other servers over loopback.")
    parser.add_argument("--quick", action="store_true", help="one short round, to see that it runs")
    parser.add_argument("--rounds", type=int, help=f"how often to measure each cell (default: {FULL.rounds})")
    parser.add_argument("--window-s", type=float, help=f"seconds per measurement (default: {FULL.window_s:g})")
    parser.add_argument("--rows", help=f"measure only these rows, separated by commas: {','.join(ROWS)}")
    parser.add_argument("--output", type=Path, default=RESULTS, help="the folder to write to (default: %(default)s)")
    options = parser.parse_args(arguments)
    options.rows = options.rows.split(",") if options.rows else list(ROWS)
    if unknown := set(options.rows) - set(ROWS):
        parser.error(f"--rows has {', '.join(sorted(unknown))}; the rows are {', '.join(ROWS)}")
    if options.rounds is not None and options.rounds < 1:
        parser.error(f"--rounds is {options.rounds}; it must be at least 1")
    if options.window_s is not None and options.window_s < 0.1:
        parser.error(f"--window-s is {options.window_s}; it must be at least 0.1")
    return options


def main(arguments: Sequence[str]) -> int:
    options = parse(arguments)
    settings = QUICK if options.quick else FULL
    if options.rounds is not None:
        settings = dataclasses.replace(settings, rounds=options.rounds)
    if options.window_s is not None:
        settings = dataclasses.replace(settings, window_s=options.window_s)
    allow_open_files()
    here = machine.describe()
    watch = machine.Watch()
    print(machine.in_words(here), flush=True)

    bench = Bench(settings)
    progress = Progress()
    results: dict[str, Measured] = {}
    problems: list[str] = []
    try:
        for name in ORDER:
            if name in options.rows:
                if name not in ("throughput", "idle"):
                    bench.release()
                try:
                    results.update(measure_row(name, bench, progress))
                except WorkerError as error:
                    problems.append(f"row {name!r}: {error}")
    except KeyboardInterrupt:
        progress.clear()
        print("interrupted; nothing was written", file=sys.stderr)
        return 130
    finally:
        bench.release()
    progress.clear()
    here["others_percent"] = round(watch.others_percent(), 1)
    problems += bench.mistuned + problems_of(results)

    titles = {name: module.TITLE for name, module in ROWS.items()}
    table = report.table(titles, results)
    record = report.record(here, dataclasses.asdict(settings), bench.info, results, bench.not_run, problems)
    stem = "quick" if options.quick else "full"
    paths = report.write(options.output, stem, record, table)
    try:
        paths.append(draw.picture(record, options.output / f"{stem}.png"))
    except draw.NotDrawn as error:
        bench.not_run["the picture"] = str(error)

    print(
        "Unless stated otherwise: batches of 16 / 5 ms, requests of 64 B, answers of 1 KiB, callers in 2 processes.\n"
    )
    print(report.as_text(table))
    rounds = "one round" if settings.rounds == 1 else f"the medians of {settings.rounds} rounds"
    print(f"\nThese are {rounds}; the spread is the largest minus the smallest. It took {progress.passed_s:.0f} s.")
    if here["others_percent"] > _MOST_OTHERS_PERCENT:
        print(f"Other programs used {here['others_percent']} % of this machine: do not trust these figures.")
    for title, reason in bench.not_run.items():
        print(f"Not run: {title}: {reason}")
    for problem in problems:
        print(f"Not as meant: {problem}")
    print("Written: " + ", ".join(map(str, paths)))
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
