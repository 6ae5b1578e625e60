"""What the scripts share that work with several Pythons: which there are, and environments of them."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

VERSIONS = ("3.10", "3.11", "3.12", "3.13", "3.14")


def found_pythons(wanted: str = "") -> list[str]:
    """Return the Pythons on PATH of the wanted versions, such as "3.10 3.13", oldest first; "" for all that are here.

    Exits if a wanted one is not there, or none at all.
    """
    versions = wanted.split() or VERSIONS
    there = [f"python{version}" for version in versions if _runs(f"python{version}")]
    if wanted and len(there) < len(versions):
        sys.exit(f"of the Pythons {wanted} only these run here: {' '.join(there) or 'none'}")
    if not there:
        sys.exit(f"none of the Pythons {' '.join(VERSIONS)} is on PATH as python3.N")
    return there


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


def test_files(tests: str) -> list[str]:
    """The files of tests that are named as "core wire", or "all"."""
    return ["tests"] if tests == "all" else [f"tests/test_{name}.py" for name in tests.split()]
