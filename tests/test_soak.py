"""15 seconds of the soak: mixed load, restarts and killed callers, with an account of every request."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

RUN = Path(__file__).resolve().parent.parent / "soak" / "run.py"


@pytest.mark.timeout(240)
def test_every_request_has_its_one_outcome_under_mixed_load_and_nothing_grows() -> None:
    with subprocess.Popen(
        [sys.executable, str(RUN), "--seconds", "15"],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    ) as process:
        try:
            output, _ = process.communicate(timeout=200)
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)  # its own processes, too
    assert process.returncode == 0, output
    assert "all held" in output
