"""What `grpc-batcher bench` reports: table, knee, picture."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .._server.metrics import nearest_rank
from .callers import Asked
from .options import CommandError

# The knee: the fewest callers that reach this share of the best throughput.
KNEE_SHARE = 0.9
KNEE_RULE = f"the fewest callers that reach {KNEE_SHARE:.0%} of the best throughput"

TABLE_HEAD = f"{'callers':>8} {'requests/s':>11} {'p50 ms':>9} {'p90 ms':>9} {'p99 ms':>9} {'errors':>8}"


@dataclass(frozen=True)
class Point:
    """The result for one number of callers.

    answers: the number of answers in the window. Throughput and latencies are theirs; latencies are None without any.
    sent: all requests sent, including those before the window.
    errors: how many of the requests sent failed, by status.
    silent_callers: callers without an answer in the window.
    callers_cpu_cores: cores used by the busiest process of callers.
    """

    callers: int
    requests_per_s: float
    p50_ms: float | None
    p90_ms: float | None
    p99_ms: float | None
    answers: int
    sent: int
    errors: dict[str, int]
    silent_callers: int
    callers_cpu_cores: float

    @classmethod
    def of(cls, asked: Asked, duration_s: float) -> Point:
        outcome = asked.outcome
        latencies_ns = sorted(outcome.latencies_ns)
        p50_ms, p90_ms, p99_ms = (
            nearest_rank(latencies_ns, percent) / 1e6 if latencies_ns else None for percent in (50, 90, 99)
        )
        return cls(
            callers=len(outcome.answers),
            requests_per_s=len(latencies_ns) / duration_s,
            p50_ms=p50_ms,
            p90_ms=p90_ms,
            p99_ms=p99_ms,
            answers=len(latencies_ns),
            sent=outcome.sent,
            errors=dict(sorted(outcome.errors.items())),
            silent_callers=outcome.answers.count(0),
            callers_cpu_cores=asked.cpu_cores,
        )

    def table_row(self) -> str:
        latencies = " ".join(
            f"{'-' if ms is None else f'{ms:.2f}':>9}" for ms in (self.p50_ms, self.p90_ms, self.p99_ms)
        )
        return f"{self.callers:>8} {self.requests_per_s:>11.1f} {latencies} {sum(self.errors.values()):>8}"


def knee(points: Sequence[Point]) -> Point | None:
    """Return the point that the rule picks; None if nothing was answered."""
    best = max(point.requests_per_s for point in points)
    good = [point for point in points if point.answers and point.requests_per_s >= KNEE_SHARE * best]
    return min(good, key=lambda point: point.callers, default=None)


def remarks(points: Sequence[Point], processes: int) -> list[str]:
    """Return what a reader should know besides the table, line by line."""
    lines = []
    found = knee(points)
    if found is None:
        lines.append("Knee: none, because no request was answered.")
    else:
        best = max(points, key=lambda point: point.requests_per_s)
        lines.append(
            f"Knee: {_callers(found)} ({KNEE_RULE}, {best.requests_per_s:.1f} requests/s with {best.callers})."
        )
        if found is points[-1] and len(points) > 1:
            lines.append("That is the highest number tried; more callers may reach more.")
    for point in points:
        for status, count in point.errors.items():
            lines.append(f"{_callers(point)}: {count} of {point.sent} requests failed with {status}.")
        if point.silent_callers:
            lines.append(f"{_callers(point)}: {point.silent_callers} of them got no answer in time.")
    if (busiest := max(point.callers_cpu_cores for point in points)) >= 0.9:
        lines.append(
            f"A process of callers used {busiest:.1f} cores, which may have been the limit; try --processes "
            f"{2 * processes} if this machine has more."
        )
    return lines


def _callers(point: Point) -> str:
    return f"{point.callers} caller{'s' if point.callers != 1 else ''}"


def check_picture(path: Path) -> None:
    """Raise CommandError, before time is spent on measuring, if no picture could be drawn there."""
    logging.getLogger("matplotlib").setLevel(logging.ERROR)  # or it reports on its font cache
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise CommandError('--picture needs matplotlib: pip install "grpc-batcher[bench]"') from None
    known = Figure().canvas.get_supported_filetypes()
    if path.suffix[1:].lower() not in known:
        raise CommandError(
            f"--picture {path}: its name must end with one of {', '.join('.' + each for each in sorted(known))}"
        )


def draw(points: Sequence[Point], title: str, path: Path) -> None:
    """Draw throughput and latency against the number of callers. Raises OSError."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 4.5), layout="constrained")
    throughput, latency = figure.subplots(1, 2)
    callers = [point.callers for point in points]
    throughput.plot(callers, [point.requests_per_s for point in points], marker="o")
    throughput.set(title="Throughput", ylabel="requests a second")
    if found := knee(points):
        throughput.axvline(found.callers, color="C7", linestyle="--", label=f"knee: {_callers(found)}")
        throughput.legend()
    for name in ("p50_ms", "p90_ms", "p99_ms"):
        latency.plot(callers, [_or_gap(getattr(point, name)) for point in points], marker="o", label=name[:3])
    latency.set(title="Latency", ylabel="milliseconds")
    latency.legend()
    for axes in (throughput, latency):
        axes.set_xscale("log", base=2)
        axes.set_xticks(callers, [str(number) for number in callers])
        axes.set_xlabel("callers")
        axes.set_ylim(bottom=0)
        axes.grid(alpha=0.3)
    figure.suptitle(title)
    figure.savefig(path, dpi=100)


def _or_gap(value: Any) -> float:
    return float("nan") if value is None else float(value)
