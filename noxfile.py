"""Run the tests with the oldest and the newest releases that the package supports, on each Python.

`make matrix` runs all rows whose Python is on PATH; `nox --list` names them. Arguments after `--` go to pytest, and
GRPC_BATCHER_TRANSPORT chooses the transport:

GRPC_BATCHER_TRANSPORT=public nox -s "tests(3.10-oldest)" -- tests/test_client.py
"""

from __future__ import annotations

from typing import Any

import nox

nox.options.default_venv_backend = "venv"
nox.options.download_python = "never"
nox.options.envdir = "build/nox"

# The lowest releases that pyproject.toml allows and that have wheels for that Python.
OLDEST = {
    "3.10": {"grpcio": "1.49.1", "numpy": "1.23.0"},
    "3.11": {"grpcio": "1.49.1", "numpy": "1.23.2"},
    "3.12": {"grpcio": "1.59.0", "numpy": "1.26.0"},
    "3.13": {"grpcio": "1.66.2", "numpy": "2.1.0"},
    "3.14": {"grpcio": "1.75.1", "numpy": "2.3.2"},
    "3.15": {"grpcio": "1.84.0", "numpy": "2.5.2"},
}
OLDEST_PROTOBUF = "protobuf==3.20.3"
# Releases in between, each on the newest Python that it has wheels for.
BETWEEN = {"1.62.3": "3.12", "1.71.2": "3.13"}
# What MuKoe's users have installed. With Ray among it, the tests of replicas run, too.
MUKOE = ["numpy==1.23.5", "tensorflow-cpu==2.15.*", "ray==2.9.*", "protobuf<5"]

# These are warnings of protobuf 3.20 and 4.25 and of grpcio; the tests take every other warning for an error.
KNOWN_WARNINGS = [
    "-Wignore:datetime.datetime.utcfromtimestamp:DeprecationWarning",
    "-Wignore:datetime.datetime.utcnow:DeprecationWarning",  # grpcio 1.59
    "-Wignore:Unexpected end-group tag:RuntimeWarning",
    "-Wignore:Type google._upb._message:DeprecationWarning",  # protobuf 4.25 on Python 3.12
]

VERSIONS = """
from importlib.metadata import distributions
from grpc_batcher import MukoeBatcherClient
found = {each.metadata["Name"]: each.version for each in distributions()}
print(*(f"{name} {found[name]}" for name in ("grpcio", "protobuf", "numpy", "tensorflow-cpu", "ray") if name in found))
print("client transport:", MukoeBatcherClient("localhost:1").transport)
"""


def grpcio(version: str) -> list[str]:
    """Pins of grpcio and of the packages that belong to its release; newer ones need a newer grpcio."""
    return [f"{name}=={version}" for name in ("grpcio", "grpcio-tools", "grpcio-health-checking", "grpcio-reflection")]


def row(python: str, name: str, pins: list[str], forced: str | None = None, beside: tuple[str, ...] = ()) -> Any:
    return nox.param(python, pins, forced, beside, id=f"{python}-{name}", tags=[name])


ROWS = [
    *(
        # The tests' own tools ask for a newer protobuf than they and the package need.
        row(python, "oldest", [*grpcio(oldest["grpcio"]), f"numpy=={oldest['numpy']}"], forced=OLDEST_PROTOBUF)
        for python, oldest in OLDEST.items()
    ),
    *(row(python, f"grpcio{version}", grpcio(version)) for version, python in BETWEEN.items()),
    *(row(python, "newest", []) for python in OLDEST),
    row("3.10", "mukoe", MUKOE, beside=("tensorflow", "ray")),
]


@nox.session
@nox.parametrize(("python", "pins", "forced", "beside"), ROWS)
def tests(session: nox.Session, pins: list[str], forced: str | None, beside: tuple[str, ...]) -> None:
    """Run the tests with a row's releases.

    pins: what pip installs together with the package.
    forced: what is installed afterwards, although packages other than ours ask for another version.
    beside: modules beside which README's first example must run, imported before grpc_batcher, after grpc, and last.
    """
    session.install("--only-binary", ":all:", ".[test]", *pins)
    if forced:
        session.install("--only-binary", ":all:", "--no-deps", forced)
    session.run("python", "-I", "-c", VERSIONS, log=False)  # -I: the installed package, not the tree
    if beside:
        for first in ([], ["grpc"], ["--last"]):
            session.run("python", "scripts/first_example.py", *first, *beside)
    # By groups: one process runs all tests that use Ray.
    options = ("-q", "-n", "4", "--dist", "loadgroup", "-p", "no:cacheprovider", *KNOWN_WARNINGS)
    session.run("pytest", *options, *(session.posargs or ["tests"]))
