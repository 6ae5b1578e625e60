"""What several test files share."""

from __future__ import annotations

import signal
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from grpc_batcher import _core

import hypothesis
import pytest

# A shell that starts the tests in the background makes them ignore SIGINT, and their programs would inherit that.
if threading.current_thread() is threading.main_thread():
    signal.signal(signal.SIGINT, signal.default_int_handler)

# No deadline: the machine may be busy with other things.
hypothesis.settings.register_profile("grpc_batcher", deadline=None, print_blob=True)
hypothesis.settings.load_profile("grpc_batcher")

# Imports only the core: importing gRPC takes longer than a small script. faulthandler ends a script that hangs, even if
# it holds the GIL.
_CORE_SCRIPT_HEAD = f"""\
import faulthandler, importlib.util
faulthandler.dump_traceback_later(30, exit=True)
spec = importlib.util.spec_from_file_location("grpc_batcher._core", {_core.__file__!r})
_core = importlib.util.module_from_spec(spec)
spec.loader.exec_module(_core)
"""


@pytest.fixture(scope="session")
def core_command() -> Callable[[str], list[str]]:
    """Return the command that runs a script in its own Python process, with the core as `_core`.

    For scripts that could crash or hang the process that runs the tests.
    """
    return lambda script: [sys.executable, "-X", "faulthandler", "-c", _CORE_SCRIPT_HEAD + script]


class Pair(NamedTuple):
    """A private key and its certificate, as PEM."""

    key: bytes
    certificate: bytes


class Certificates(NamedTuple):
    """Certificates issued by one authority. `server` is for 127.0.0.1 and localhost.

    folder: contains authority.pem, client.key and client.pem.
    """

    authority: bytes
    server: Pair
    client: Pair
    folder: Path


def _issue(folder: Path) -> Certificates:
    trustme = pytest.importorskip("trustme")
    authority = trustme.CA()
    pairs = []
    for names in (("127.0.0.1", "localhost"), ("actor-1.example",)):
        certificate = authority.issue_cert(*names)
        pairs.append(Pair(certificate.private_key_pem.bytes(), certificate.cert_chain_pems[0].bytes()))
    certificates = Certificates(authority.cert_pem.bytes(), *pairs, folder)
    (folder / "authority.pem").write_bytes(certificates.authority)
    (folder / "client.key").write_bytes(certificates.client.key)
    (folder / "client.pem").write_bytes(certificates.client.certificate)
    return certificates


@pytest.fixture(scope="session")
def certificates(tmp_path_factory: pytest.TempPathFactory) -> Certificates:
    return _issue(tmp_path_factory.mktemp("certificates"))


@pytest.fixture(scope="session")
def strange_certificates(tmp_path_factory: pytest.TempPathFactory) -> Certificates:
    """Certificates of an authority that nobody trusts."""
    return _issue(tmp_path_factory.mktemp("strange_certificates"))
