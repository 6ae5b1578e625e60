"""The large example that needs no game files runs, where what it needs is installed."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).resolve().parent.parent / "examples"


@pytest.mark.timeout(240)  # it compiles, which takes long on a busy machine
def test_muzero_in_jax_plays_and_learns_with_weights_that_it_publishes(tmp_path: Path) -> None:
    pytest.importorskip("jax")
    program = subprocess.run(
        [sys.executable, EXAMPLES / "jax_muzero.py", "--games", "100", "--seconds", "150", "--actors", "2"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=200,
    )
    assert program.returncode == 0, program.stderr
    *_, last = re.findall(r"^ *\d+ s +([\d,]+) +([\d,]+) +\d+% +([\d,]+) ", program.stdout, re.MULTILINE)
    step, games, requests = (int(number.replace(",", "")) for number in last)
    assert step > 0
    assert games >= 100
    assert requests >= games * 18  # two for each of its nine moves
