"""Draws a run from the JSON it wrote: `python draw.py results/full.json`."""

from __future__ import annotations

import json
import sys
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

# The systems, by their names in the keys of the cells, each with the same colour in all panels.
_SYSTEMS = {
    "direct": ("direct transport", "C0"),
    "public": ("public transport", "C1"),
    "grpcio-streams": ("plain grpcio, streams", "C2"),
    "grpcio-calls": ("plain grpcio, calls", "C3"),
    "cpp": ("C++ echo", "C7"),
    "mosec": ("mosec", "C4"),
    "mosec-socket": ("mosec, bare socket", "C5"),
}
_PERCENTILES = ("p50_ms", "p90_ms", "p99_ms")
_PERCENTILE_COLOURS = ("#9ecae1", "#4292c6", "#084594")


class NotDrawn(Exception):
    """Why there is no picture."""


def picture(record: Mapping[str, Any], path: Path) -> Path:
    """Draw three panels into a PNG and return its path. Raises NotDrawn."""
    try:
        import matplotlib

        matplotlib.use("agg")
        from matplotlib import pyplot
    except ImportError:
        raise NotDrawn("matplotlib is not installed (pip install matplotlib)") from None
    cells = record["cells"]
    if not any(key.startswith(("throughput/", "streams/")) for key in cells):
        raise NotDrawn("none of the rows it shows was measured")
    figure, (by_payload, latency, by_streams) = pyplot.subplots(1, 3, figsize=(16, 5), layout="constrained")
    _throughput_by_payload(by_payload, cells)
    _latency(latency, cells)
    _throughput_by_streams(by_streams, cells)
    figure.suptitle(record["machine_in_words"], fontsize=8)
    figure.savefig(path, dpi=100)
    pyplot.close(figure)
    return path


def _plot_throughput(axes: Any, cells: Mapping[str, Any], row: str) -> None:
    for system, (label, colour) in _SYSTEMS.items():
        points = _points(cells, row, system, "requests_per_s")
        if points:
            axes.plot(*zip(*points, strict=True), marker="o", color=colour, label=label)


def _throughput_by_payload(axes: Any, cells: Mapping[str, Any]) -> None:
    _plot_throughput(axes, cells, "throughput")
    axes.set(title="16 callers: throughput by payload", xlabel="payload, bytes", ylabel="requests per second")
    axes.set(xscale="log", yscale="log")
    axes.set_ylim(bottom=axes.get_ylim()[0] / 4)  # the legend's place
    _finish(axes, {int(key.split("/")[1]) for key in cells if key.startswith("throughput/")})


def _latency(axes: Any, cells: Mapping[str, Any]) -> None:
    shown = [system for system in _SYSTEMS if f"throughput/64/{system}" in cells]
    width = 0.8 / len(_PERCENTILES)
    for number, name in enumerate(_PERCENTILES):
        heights = [cells[f"throughput/64/{system}"]["median"].get(name, 0) for system in shown]
        places = [place + (number - 1) * width for place in range(len(shown))]
        axes.bar(places, heights, width, color=_PERCENTILE_COLOURS[number], label=name.removesuffix("_ms"))
    axes.set(title="16 callers, 64 B: latency", ylabel="milliseconds", yscale="log")
    axes.set_xticks(range(len(shown)), [_SYSTEMS[system][0] for system in shown], rotation=25, ha="right")
    _finish(axes)


def _throughput_by_streams(axes: Any, cells: Mapping[str, Any]) -> None:
    _plot_throughput(axes, cells, "streams")
    axes.set(title="64 B: throughput by open streams", xlabel="open streams, all in use", ylabel="requests per second")
    axes.set_xscale("log", base=2)
    axes.set_ylim(bottom=0)
    _finish(axes, {int(key.split("/")[1]) for key in cells if key.startswith("streams/")})


def _points(cells: Mapping[str, Any], row: str, system: str, value: str) -> list[tuple[int, float]]:
    """The medians of a system's cells, sorted by the number in the middle of their keys."""
    points = []
    for key, cell in cells.items():
        parts = key.split("/")
        if parts[0] == row and parts[-1] == system and cell["median"].get(value) is not None:
            points.append((int(parts[1]), cell["median"][value]))
    return sorted(points)


def _finish(axes: Any, ticks: Collection[int] = ()) -> None:
    """ticks: the measured values to label on the x axis."""
    axes.grid(alpha=0.3)
    if ticks:
        axes.set_xticks(sorted(ticks), [f"{tick:,}" for tick in sorted(ticks)], rotation=25, ha="right")
        axes.minorticks_off()
    if axes.get_legend_handles_labels()[0]:
        axes.legend(fontsize=8, loc="lower left" if axes.get_yscale() == "log" and ticks else "best")


if __name__ == "__main__":
    source = Path(sys.argv[1])
    print(picture(json.loads(source.read_text()), source.with_suffix(".png")))
