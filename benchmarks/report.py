"""Turns samples into the table, and into the files that hold it."""

from __future__ import annotations

import csv
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

import machine as machines
from measuring import Sample
from row import Cell
from targets import TARGETS, Of, Target

# The table's columns, and the format of their numbers.
COLUMNS = {
    "row": "{}",
    "what": "{}",
    "median": "{:,.0f}",
    "unit": "{}",
    "spread %": "{:.0f}",
    "p50 ms": "{:.3f}",
    "p99 ms": "{:.3f}",
    "mean batch": "{:.1f}",
    "server CPU us": "{:.1f}",
    "callers CPU us": "{:.1f}",
    "also": "{}",
    "target": "{}",
    "met": "{}",
}
_LEFT = ("what", "unit", "also")

Line = dict[str, str | float]

_UNITS = {
    "requests_per_s": "req/s",
    "cpu_percent": "% of a core",
    "mean_ms": "ms",
    "p50_ms": "ms",
    "idle_mib": "MiB",
    "gil_ms": "ms",
}

# Digits of medians below 100, where they are not 3.
_DIGITS = {"times": 2, "MiB": 0}

_VALUE_COLUMNS = {
    "p50 ms": "p50_ms",
    "p99 ms": "p99_ms",
    "mean batch": "mean_batch",
    "server CPU us": "server_cpu_us",
    "callers CPU us": "callers_cpu_us",
}

# What the column "also" shows, if it was measured.
_ALSO = {
    "stream_kib": "{:.1f} KiB per stream",
    "before_mib": "{:.0f} MiB before the burst",
    "burst_mib": "{:.0f} MiB after it",
    "silent_percent": "{:.0f} % of callers got no answer",
    "callback_cpu_ms": "{:.2f} ms of CPU",
    "push_to_taken_us": "push to taken {:.0f} us",
    "finish_to_woken_us": "finish to woken {:.0f} us",
}


@dataclass(frozen=True)
class Measured:
    """A cell with its samples, one per round."""

    row: str
    cell: Cell
    samples: Sequence[Sample]

    @property
    def names(self) -> list[str]:
        return sorted({name for sample in self.samples for name in sample.values})

    def rounds(self, value: str) -> list[float]:
        return [sample.values[value] for sample in self.samples if value in sample.values]

    def median(self, value: str) -> float | None:
        rounds = self.rounds(value)
        return median(rounds) if rounds else None


Results = Mapping[str, Measured]


def table(titles: Mapping[str, str], results: Results) -> list[Line]:
    """Return the table's lines: each row's cells, then its comparisons.

    titles: the rows' titles, in order.
    """
    lines: list[Line] = []
    for number, row in enumerate(titles, 1):
        measured = [each for each in results.values() if each.row == row]
        if measured:
            lines.append({"row": number, "what": titles[row]})
            lines += [_cell_line(number, each) for each in measured]
            lines += [_target_line(number, target, results) for target in TARGETS if target.row == row]
    return lines


def as_text(lines: Sequence[Line]) -> str:
    """The table as aligned Markdown."""
    rows = [{name: name for name in COLUMNS}, *({name: _show(name, line) for name in COLUMNS} for line in lines)]
    widths = {name: max(len(row[name]) for row in rows) for name in COLUMNS}
    rows.insert(
        1,
        {name: "-" * width if name in _LEFT else "-" * (width - 1) + ":" for name, width in widths.items()},
    )
    return "\n".join(
        "| "
        + " | ".join(
            row[name].ljust(width) if name in _LEFT else row[name].rjust(width) for name, width in widths.items()
        )
        + " |"
        for row in rows
    )


def write(folder: Path, stem: str, record: Mapping[str, Any], lines: Sequence[Line]) -> list[Path]:
    """Write the JSON with every round of everything, and the CSV with the table."""
    folder.mkdir(parents=True, exist_ok=True)
    json_path, csv_path = folder / f"{stem}.json", folder / f"{stem}.csv"
    json_path.write_text(json.dumps(record, indent=1) + "\n")
    with csv_path.open("w", newline="") as file:
        writer = csv.DictWriter(file, COLUMNS, lineterminator="\n")
        writer.writeheader()
        writer.writerows(
            {name: f"{value:.6g}" if isinstance(value, float) else value for name, value in line.items()}
            for line in lines
            if "median" in line
        )
    return [json_path, csv_path]


def record(
    machine: Mapping[str, Any],
    settings: Mapping[str, Any],
    info: Mapping[str, Mapping[str, str]],
    results: Results,
    not_run: Mapping[str, str],
    problems: Sequence[str],
) -> dict[str, Any]:
    return {
        "machine": machine,
        "machine_in_words": machines.in_words(dict(machine)),
        "settings": settings,
        "info": info,
        "cells": {
            key: {
                "row": measured.row,
                "title": measured.cell.title,
                "value": measured.cell.value,
                "median": {
                    name: measured.median(name) for name in sorted(set().union(*(s.values for s in measured.samples)))
                },
                "rounds": [sample.values for sample in measured.samples],
            }
            for key, measured in results.items()
        },
        "targets": [
            {"row": target.row, "title": target.title, "target": target.text, "value": value, "met": met}
            for target in TARGETS
            for value, met in (judge(target, results),)
        ],
        "not_run": not_run,
        "problems": problems,
    }


def judge(target: Target, results: Results) -> tuple[float | None, bool | None]:
    """Return the ratio of medians, or the median, and whether the target is met; None where there is none."""
    over = _median(target.over, results)
    under = 1.0 if target.under is None else _median(target.under, results)
    if over is None or not under:
        return None, None
    return over / under, target.is_met(over / under)


def _median(of: Of, results: Results) -> float | None:
    return results[of.key].median(of.value) if of.key in results else None


def _cell_line(number: int, measured: Measured) -> Line:
    value = measured.cell.value
    rounds = measured.rounds(value)
    line: Line = {"row": number, "what": measured.cell.title}
    if not rounds:
        return line | {"median": "-"}
    line["median"] = median(rounds)
    line["unit"] = _UNITS[value]
    line |= _spread(rounds)
    for column, name in _VALUE_COLUMNS.items():
        found = measured.median(name)
        if found is not None:
            line[column] = found
    line["also"] = ", ".join(text.format(found) for name, text in _ALSO.items() if (found := measured.median(name)))
    return line


def _target_line(number: int, target: Target, results: Results) -> Line:
    value, met = judge(target, results)
    line: Line = {"row": number, "what": target.title, "target": target.text}
    if value is None:
        return line | {"median": "-", "met": "not run" if target.text else ""}
    line["median"] = value
    line["unit"] = "" if target.under is None else "times"
    line["met"] = {True: "yes", False: "no", None: ""}[met]
    rounds = results[target.over.key].rounds(target.over.value)
    if target.under is not None:
        unders = results[target.under.key].rounds(target.under.value)
        # If a round of either is missing, nobody knows which rounds belong together.
        rounds = (
            [over / under for over, under in zip(rounds, unders, strict=True)] if len(rounds) == len(unders) else []
        )
    return line | _spread(rounds)


def _spread(rounds: Sequence[float]) -> Line:
    """The largest minus the smallest, as a percentage of the median."""
    middle = median(rounds) if rounds else 0
    return {"spread %": (max(rounds) - min(rounds)) / middle * 100} if len(rounds) > 1 and middle else {}


def _show(column: str, line: Line) -> str:
    value = line.get(column, "")
    if isinstance(value, str):
        return value
    if column == "median" and value < 100:
        return f"{value:.{_DIGITS.get(str(line.get('unit')), 3)}f}"
    return COLUMNS[column].format(value)
