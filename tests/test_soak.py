"""15 seconds of the soak: mixed load, restarts and killed callers, with an account of every request."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from serving import run_program

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


SHUTDOWN_THAT_LEAVES_A_REQUEST = """
    import sys, threading
    sys.path.insert(0, sys.argv[1])
    from child import Faults
    from grpc_batcher import MukoeBatcherClient, RequestError, create_batcher

    in_callback, release = threading.Event(), threading.Event()

    def held(requests):
        in_callback.set()
        release.wait()
        return [({}, 0)] * len(requests)

    def ask():
        try:
            client.send_request(b"hi")
        except RequestError:
            pass

    faults = Faults()
    with create_batcher("repr", 1, 0.0, 0, batch_process_fn=held, host="127.0.0.1") as batcher:
        with MukoeBatcherClient(f"127.0.0.1:{batcher.port}") as client:
            asking = threading.Thread(target=ask)
            asking.start()
            in_callback.wait()
            batcher.shutdown(grace_s=0)
            asking.join()
            release.set()
    print(faults.take())
"""


def test_the_warning_of_a_shutdown_that_leaves_requests_is_no_fault_of_the_soak(tmp_path: Path) -> None:
    assert run_program(tmp_path, SHUTDOWN_THAT_LEAVES_A_REQUEST, str(RUN.parent)) == ["[]"]
