"""Run the tests on each Python here with the oldest and the newest grpcio, protobuf and numpy that work there.

A row is named `<Python>-oldest` or `<Python>-newest`; `3.10-mukoe` has what MuKoe's users have installed beside it. The
package is built once for a Python and installed with each row's pins, in an environment of its own in build/matrix.

    MATRIX_ROWS   which rows, by pattern, such as "3.10-* 3.13-newest"; by default all whose Python is on PATH
    MATRIX_TESTS  which tests: names such as "core wire" (tests/test_core.py, tests/test_wire.py), or "all"

Prints a table in the end, and exits with 1 if a row failed. `make matrix` runs it, with any Python.
"""

from __future__ import annotations

import fnmatch
import os
import re
import subprocess
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path

from pythons import ROOT, example_runs, found_pythons, make_environment, missing_pythons, run, test_files

FOLDER = ROOT / "build" / "matrix"

# The lowest releases that pyproject.toml allows and that have wheels for that Python.
OLDEST = {
    "3.10": {"grpcio": "1.49.1", "protobuf": "3.20.3", "numpy": "1.23.0"},
    "3.11": {"grpcio": "1.49.1", "protobuf": "3.20.3", "numpy": "1.23.2"},
    "3.12": {"grpcio": "1.59.0", "protobuf": "3.20.3", "numpy": "1.26.0"},
    "3.13": {"grpcio": "1.66.2", "protobuf": "3.20.3", "numpy": "2.1.0"},
    "3.14": {"grpcio": "1.75.1", "protobuf": "3.20.3", "numpy": "2.3.2"},
}
# Of the same release as grpcio: newer ones need a newer grpcio.
BESIDE_GRPCIO = ("grpcio-tools", "grpcio-health-checking", "grpcio-reflection")
# Of protobuf 3.20 and of grpcio itself; the tests take every other warning for an error.
KNOWN_WARNINGS = (
    "-Wignore:datetime.datetime.utcfromtimestamp:DeprecationWarning",
    "-Wignore:datetime.datetime.utcnow:DeprecationWarning",  # grpcio 1.59's
    "-Wignore:Unexpected end-group tag:RuntimeWarning",
)
# What is there beside it: after its import, README's first example has to run.
BESIDE_MUKOE = ("tensorflow", "ray")
MUKOE = ("numpy==1.23.5", "tensorflow-cpu==2.15.*", "ray==2.9.*", "protobuf<5")


@dataclass
class Row:
    """A surrounding to test in, and what came of it.

    pins: what pip installs together with the package.
    forced: what is installed after that against the wishes of other packages than ours.
    beside: modules after whose import README's first example has to run.
    """

    name: str
    python: str
    pins: tuple[str, ...] = ()
    forced: tuple[str, ...] = ()
    beside: tuple[str, ...] = ()
    outcome: str = "not run"
    seconds: float = 0.0
    versions: dict[str, str] = field(default_factory=dict)

    @property
    def passed(self) -> bool:
        return " passed" in self.outcome and not re.search("failed|error|status", self.outcome)


def all_rows() -> list[Row]:
    """The rows of the Pythons that are here."""
    rows = []
    for python in found_pythons():
        version = python.removeprefix("python")
        if oldest := OLDEST.get(version):
            beside = tuple(f"{name}=={oldest['grpcio']}" for name in BESIDE_GRPCIO)
            pins = (f"grpcio=={oldest['grpcio']}", f"numpy=={oldest['numpy']}", *beside)
            # The tools of the tests ask for a newer protobuf than they, and the package, run with.
            rows.append(Row(f"{version}-oldest", python, pins, (f"protobuf=={oldest['protobuf']}",)))
        rows.append(Row(f"{version}-newest", python))
        if version == "3.10":
            rows.append(Row(f"{version}-mukoe", python, MUKOE, beside=BESIDE_MUKOE))
    return rows


def chosen_rows(patterns: list[str]) -> list[Row]:
    """The rows that match one of the patterns; all if there is none. Exits if a pattern matches no row."""
    rows = all_rows()
    names = [row.name for row in rows]
    for pattern in patterns:
        if not fnmatch.filter(names, pattern):
            sys.exit(f"MATRIX_ROWS has {pattern!r}, which is no row here; there are {' '.join(names)}")
    return [row for row in rows if not patterns or any(fnmatch.fnmatch(row.name, pattern) for pattern in patterns)]


def build_wheel(python: str) -> Path:
    """Build the package for a Python, with this machine's compiler."""
    folder = FOLDER / f"wheel-{python}"
    there = make_environment(python, folder / "environment")
    run(there, "-m", "pip", "wheel", "--quiet", "--no-deps", "--wheel-dir", folder, ROOT)
    return max(folder.glob("*.whl"), key=lambda wheel: wheel.stat().st_mtime)


def run_row(row: Row, wheel: Path, tests: list[str]) -> None:
    """Install a row's packages and run the tests there; says in the row what came of it."""
    started = time.monotonic()
    environment = FOLDER / row.name
    there = make_environment(row.python, environment)
    pip = [there, "-m", "pip", "install", "--quiet", "--only-binary", ":all:"]
    if not attempt(*pip, f"{wheel}[test]", *row.pins):
        row.outcome = "error: pip can not install this"
    elif row.forced and not attempt(*pip, "--no-deps", *row.forced):
        row.outcome = f"error: pip can not install {' '.join(row.forced)}"
    else:
        row.versions = versions(there, row.beside)
        log = environment / "tests.log"
        with subprocess.Popen(
            [environment / "bin" / "pytest", "-q", "-n", "4", "-p", "no:cacheprovider", *KNOWN_WARNINGS, *tests],
            cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        ) as program, log.open("w") as copy:  # fmt: skip
            assert program.stdout is not None
            lines = []
            for line in program.stdout:
                print(line, end="", flush=True)
                copy.write(line)
                lines.append(line)
        summaries = [line for line in lines if re.search(r"\d+ \w+.* in [\d.]+", line)]
        row.outcome = re.sub(r" in [\d.]+s.*", "", summaries[-1].strip("= \n")) if summaries else "error: see above"
        if program.returncode != 0 and row.passed:
            row.outcome += f", status {program.returncode}"
        if row.beside:
            imports = f"import {', '.join(row.beside)}"
            ran = example_runs(there, environment, before=imports)
            row.outcome += f"; example after `{imports}` {'ran' if ran else 'failed'}"
    row.seconds = time.monotonic() - started


def attempt(*command: str | Path) -> bool:
    words = [str(word) for word in command]
    print("+", *words, flush=True)
    return subprocess.run(words).returncode == 0


def versions(there: Path, beside: tuple[str, ...]) -> dict[str, str]:
    """What is installed, and the gear that the package chose."""
    program = f"""
from importlib.metadata import version
from grpc_batcher._transport import choice as _gears
print("gear", _gears.server_gear())
for module in ("grpcio", "protobuf", "numpy", *{beside!r}):
    print(module, version("tensorflow-cpu" if module == "tensorflow" else module))
"""
    output = subprocess.run([there, "-c", program], capture_output=True, text=True, cwd=there.parent).stdout
    return dict(line.split() for line in output.splitlines())


def print_table(rows: list[Row]) -> None:
    heads = ["row", "grpcio", "protobuf", "numpy", "gear", "beside", "seconds", "tests"]
    columns = ("grpcio", "protobuf", "numpy", "gear")
    cells = [
        [
            row.name,
            *(row.versions.get(name, "?") for name in columns),
            ", ".join(f"{name} {row.versions.get(name, '?')}" for name in row.beside),
            f"{row.seconds:.0f}",
            row.outcome,
        ]
        for row in rows
    ]
    widths = [max(len(line[i]) for line in (heads, *cells)) for i in range(len(heads))]
    for line in (heads, ["-" * width for width in widths], *cells):
        print("| " + " | ".join(f"{cell:<{width}}" for cell, width in zip(line, widths, strict=True)) + " |")


def main() -> None:
    rows = chosen_rows(os.environ.get("MATRIX_ROWS", "").split())
    tests = test_files(os.environ.get("MATRIX_TESTS") or "all")
    wheels: dict[str, Path] = {}
    for row in rows:
        print(f"\n== {row.name}", flush=True)
        if row.python not in wheels:
            wheels[row.python] = build_wheel(row.python)
        run_row(row, wheels[row.python], tests)
    print()
    print_table(rows)
    if missing := missing_pythons([row.python for row in rows]):
        print(missing)
    sys.exit(0 if all(row.passed for row in rows) else 1)


if __name__ == "__main__":
    main()
