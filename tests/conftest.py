"""What several test files share."""

from __future__ import annotations

import sys
from collections.abc import Callable

import hypothesis
import pytest

from grpc_batcher import _core

# No deadline: where tests run, other things run too.
hypothesis.settings.register_profile("grpc_batcher", deadline=None, print_blob=True)
hypothesis.settings.load_profile("grpc_batcher")

# The core without the package around it: to import gRPC would take longer than all the rest of a small script. One that
# hangs is ended, also if it holds the GIL.
_CORE_SCRIPT_HEAD = f"""\
import faulthandler, importlib.util
faulthandler.dump_traceback_later(30, exit=True)
spec = importlib.util.spec_from_file_location("grpc_batcher._core", {_core.__file__!r})
_core = importlib.util.module_from_spec(spec)
spec.loader.exec_module(_core)
"""


@pytest.fixture(scope="session")
def core_command() -> Callable[[str], list[str]]:
    """The command that runs a script in a Python of its own, with the core as `_core`.

    For what could crash or hang the process that runs the tests.
    """
    return lambda script: [sys.executable, "-X", "faulthandler", "-c", _CORE_SCRIPT_HEAD + script]
