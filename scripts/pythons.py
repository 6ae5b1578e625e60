"""What the scripts share that work with several Pythons: which there are, environments of them, README's example."""

from __future__ import annotations

import os
import re
import shutil
import socket
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
SUPPORTED = ("3.10", "3.11", "3.12", "3.13", "3.14")
NEWER = tuple(f"3.{minor}" for minor in range(15, 30))  # taken along where they are here


def found_pythons(wanted: str = "") -> list[str]:
    """Return the Pythons on PATH of the wanted versions, such as "3.10 3.13", oldest first; "" for all that are here.

    Exits if a wanted one is not there, or none at all.
    """
    versions = wanted.split() or (*SUPPORTED, *NEWER)
    there = [f"python{version}" for version in versions if _runs(f"python{version}")]
    if wanted and len(there) < len(versions):
        sys.exit(f"of the Pythons {wanted} only these run here: {' '.join(there) or 'none'}")
    if not there:
        sys.exit(f"none of the Pythons {' '.join(SUPPORTED)} is on PATH as python3.N")
    return there


def missing_pythons(there: list[str]) -> str:
    """A line that names the supported Pythons that are not among these; "" if all are."""
    missing = [f"python{version}" for version in SUPPORTED if f"python{version}" not in there]
    return f"LEFT OUT, as they are not on PATH or not asked for: {' '.join(missing)}" if missing else ""


def _runs(python: str) -> bool:
    # A shim of pyenv's is there for Pythons that are installed but not chosen, and fails.
    return shutil.which(python) is not None and subprocess.run([python, "-c", ""], capture_output=True).returncode == 0


def make_environment(python: str, folder: Path) -> Path:
    """Make a clean environment, and return its Python."""
    run(python, "-m", "venv", "--clear", folder)
    return folder / "bin" / "python"


def run(*command: str | Path, folder: Path | None = None, environment: dict[str, str] | None = None) -> None:
    """Run a command, and exit if it fails."""
    words = [str(word) for word in command]
    print("+", *words, flush=True)
    status = subprocess.run(words, cwd=folder, env={**os.environ, **(environment or {})}).returncode
    if status != 0:
        sys.exit(f"status {status} from: {' '.join(words)}")


def example_runs(python: Path, folder: Path, before: str = "", environment: dict[str, str] | None = None) -> bool:
    """Run README's first example, after some lines of Python; return whether it prints what README says.

    It listens on a port that is free, in place of README's.
    """
    (example, *_) = re.findall(r"^```python\n(.*?)^```$", (ROOT / "README.md").read_text(), re.MULTILINE | re.DOTALL)
    (expected,) = re.findall(r"^print\(.*\)  # (.*)$", example, re.MULTILINE)
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        example = example.replace("50051", str(probe.getsockname()[1]))
    print(f"+ {python} -c '{before}' and README's first example", flush=True)
    done = subprocess.run(
        [python, "-c", f"{before}\n{example}"],
        cwd=folder, env={**os.environ, **(environment or {})}, stdout=subprocess.PIPE, text=True,
    )  # fmt: skip
    print(done.stdout, end="", flush=True)
    return done.returncode == 0 and done.stdout.splitlines() == [expected]


def test_files(tests: str) -> list[str]:
    """The files of tests that are named as "core wire", or "all"."""
    return ["tests"] if tests == "all" else [f"tests/test_{name}.py" for name in tests.split()]
