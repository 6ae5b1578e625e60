"""The README and the other texts are right: their Python blocks run unchanged, and their lists match what exists."""

from __future__ import annotations

import csv
import dataclasses
import fcntl
import inspect
import os
import re
import shutil
import signal
import socket
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import grpc_batcher
from grpc_batcher import AsyncMukoeBatcherClient, Metrics, MukoeBatcher, MukoeBatcherClient, _core, create_batcher
from grpc_batcher._client import connection
from grpc_batcher._proto import mukoe_batcher_pb2
from grpc_batcher._server import life_cycle

import pytest
from google.protobuf.descriptor_pb2 import FieldDescriptorProto, FileDescriptorProto
from serving import echo, eventually, finish_program, run_program, start_program

ROOT = Path(__file__).resolve().parent.parent
TEXTS = {
    file.relative_to(ROOT).as_posix(): file.read_text()
    for pattern in ("*.md", "docs/*.md", "[a-z]*/README.md")
    for file in sorted(ROOT.glob(pattern))
}
README = TEXTS["README.md"]
API = TEXTS["docs/api.md"]
CONTRIBUTING = TEXTS["CONTRIBUTING.md"]
NEW_MODEL = TEXTS["docs/new-model.md"]
RELIABILITY = TEXTS["docs/reliability.md"]
SPEED = TEXTS["docs/speed.md"]


# ---- reading Markdown ----


def blocks(text: str, language: str) -> list[str]:
    """The fenced blocks of a language."""
    return re.findall(rf"^```{language}\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)


def section(heading: str, text: str) -> str:
    """The text under a heading, up to the next."""
    found = re.search(rf"^##+ {re.escape(heading)}\n(.*?)(?=^##+ |\Z)", text, re.MULTILINE | re.DOTALL)
    assert found, f"there is no section {heading!r}"
    return found[1]


def rows(text: str) -> list[list[str]]:
    """The cells of the only table in a text, without its header."""
    table = [line for line in text.splitlines() if line.startswith("|")]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in table[2:]]


def code_in(text: str) -> list[str]:
    return re.findall(r"`([^`\n]+)`", text)


def names_in_first_column(text: str) -> list[str]:
    return [name for row in rows(text) for name in code_in(row[0])]


def anchors(text: str) -> set[str]:
    """What links to a text may name after the #, by GitHub's rule."""
    return {
        re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in re.findall(r"^#+ (.*)$", text, re.M)
    }


# ---- the examples ----

DEFAULT_PORT = 50051
# An example that imports one of these is skipped where it is not installed.
OPTIONAL_MODULES = ("jax", "ml_dtypes", "prometheus_client", "ray")
# The example in docs/new-model.md needs a changed package: see below.
BLOCKS = [(name, block) for name, text in TEXTS.items() if text is not NEW_MODEL for block in blocks(text, "python")]
SERVER_EXAMPLES = [(name, block) for name, block in BLOCKS if "serve_forever(" in block]
EXAMPLES = [example for example in BLOCKS if example not in SERVER_EXAMPLES]


def said_output(block: str) -> list[str]:
    """The output of a block according to the comments behind its prints."""
    return re.findall(r"^ *print\(.*\)  # (.*)$", block, re.MULTILINE)


@pytest.fixture
def default_port() -> Iterator[None]:
    """Ensure that nobody listens on the default port, and that no other run of these tests is about to."""
    with open(Path(tempfile.gettempdir()) / f"grpc_batcher-{DEFAULT_PORT}-{os.getuid()}.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        with socket.socket() as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                probe.bind(("0.0.0.0", DEFAULT_PORT))
            except OSError as error:
                pytest.skip(f"another program uses port {DEFAULT_PORT}, which the example needs: {error}")
        yield


@pytest.mark.parametrize(("name", "block"), EXAMPLES, ids=[name for name, _ in EXAMPLES])
def test_an_example_runs_unchanged_and_prints_what_it_says(
    name: str, block: str, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    for module in OPTIONAL_MODULES:
        if re.search(rf"^(import|from) {module}\b", block, re.MULTILINE):
            pytest.importorskip(module)
    if f"port={DEFAULT_PORT}" in block:
        request.getfixturevalue("default_port")
    output = run_program(tmp_path, block)
    assert output == said_output(block)
    assert output


def test_the_examples_are_found() -> None:
    assert [(name, f"port={DEFAULT_PORT}" in block) for name, block in EXAMPLES] == [
        ("README.md", True),
        *[("docs/arrays.md", False)] * 6,
        ("docs/batching.md", False),
        ("docs/clients.md", False),
        ("docs/clients.md", False),
        ("docs/metrics.md", False),
        ("docs/production.md", False),
        ("docs/scaling.md", False),
        ("docs/scaling.md", False),
    ]
    assert [name for name, _ in SERVER_EXAMPLES] == ["docs/production.md"]


def test_the_examples_import_grpc_batcher_before_what_imports_grpc() -> None:
    """Later it could not choose gRPC's poller."""
    orders = [re.findall(r"^ *(?:import|from) (grpc_batcher|grpc|ray)\b", block, re.MULTILINE) for _, block in BLOCKS]
    mixed = [order for order in orders if len(set(order)) > 1]
    assert mixed
    assert {order[0] for order in mixed} == {"grpc_batcher"}


def catches(process: int, number: int) -> bool:
    """Whether a process has a handler for a signal."""
    (mask,) = re.findall(r"^SigCgt:\s*(\w+)$", Path(f"/proc/{process}/status").read_text(), re.MULTILINE)
    return bool(int(mask, 16) >> (number - 1) & 1)


def test_the_server_example_ends_with_status_0_on_sigterm(tmp_path: Path) -> None:
    ((_, block),) = SERVER_EXAMPLES
    program = start_program(tmp_path, block)
    assert program.stdout is not None
    first_line = program.stdout.readline()
    eventually(lambda: catches(program.pid, signal.SIGTERM) or program.poll() is not None)
    program.send_signal(signal.SIGTERM)
    status, _, errors = finish_program(program)
    assert re.fullmatch(r"serving on port [1-9]\d*\n", first_line), errors
    assert (status, "Traceback" in errors) == (0, False), errors


# ---- the API ----


def said_default(parameter: inspect.Parameter) -> str:
    if parameter.default is parameter.empty:
        return "required"
    return f'`"{parameter.default}"`' if isinstance(parameter.default, str) else f"`{parameter.default!r}`"


def signature_of(function: Any) -> str:
    """A function's parameters and defaults, without `self` and without types."""
    signature = inspect.signature(function)
    parameters = [
        parameter.replace(annotation=parameter.empty)
        for name, parameter in signature.parameters.items()
        if name != "self"
    ]
    return str(inspect.Signature(parameters))


def test_the_parameters_of_create_batcher_and_their_defaults_are_as_documented() -> None:
    parameters = inspect.signature(create_batcher).parameters.values()
    documented = [(code_in(name), default) for name, default, _, _ in rows(section("create_batcher", API))]
    assert documented == [([parameter.name], said_default(parameter)) for parameter in parameters]


def test_the_first_six_parameters_of_create_batcher_may_go_by_position_and_no_other() -> None:
    said = "The first six parameters may be given by position, the others only by keyword."
    assert said in " ".join(API.split())
    kinds = [parameter.kind for parameter in inspect.signature(create_batcher).parameters.values()]
    positional, keyword = inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY
    assert kinds == [positional] * 6 + [keyword] * (len(kinds) - 6)


RANGES = {
    code_in(name)[0]: (int(ends[1]), int(ends[2]))
    for name, _, allowed, _ in rows(section("create_batcher", API))
    if (ends := re.fullmatch(r"(\d+) to (\d+)", allowed))
}


@pytest.mark.parametrize("name", RANGES)
def test_create_batcher_takes_the_documented_range_and_nothing_beyond(name: str) -> None:
    arguments: dict[str, Any] = {"model": "repr", "batch_size": 1, "batch_timeout_s": 0, "batch_process_fn": echo}
    least, most = RANGES[name]
    for good in (least, most):
        create_batcher(**{**arguments, name: good})
    for bad in (least - 1, most + 1):
        with pytest.raises(ValueError, match=rf"^{name} is {bad}; it must be .* from {least} to {most}$"):
            create_batcher(**{**arguments, name: bad})


def test_every_parameter_that_is_a_number_has_a_documented_range() -> None:
    parameters = inspect.signature(create_batcher).parameters.values()
    numbers = ("int", "int | None", "float")
    assert list(RANGES) == [parameter.name for parameter in parameters if parameter.annotation in numbers]


@pytest.mark.parametrize("owner", [MukoeBatcher, MukoeBatcherClient, AsyncMukoeBatcherClient])
def test_the_public_members_and_their_signatures_are_as_documented(owner: type) -> None:
    actual = {
        name + signature_of(member) if callable(member) else name
        for name, member in vars(owner).items()
        if not name.startswith("_")
    }
    if owner is not MukoeBatcher:  # create_batcher makes a MukoeBatcher
        actual.add(owner.__name__ + signature_of(owner))
    documented = names_in_first_column(section(owner.__name__, API))
    assert sorted(documented) == sorted(actual)


def test_the_names_of_grpc_batcher_ray_and_their_signatures_are_as_documented() -> None:
    pytest.importorskip("ray")
    from grpc_batcher.ray import Replicas, connect, launch

    members = {name: member for name, member in vars(Replicas).items() if not name.startswith("_")}
    actual = {name + signature_of(each) for name, each in {"launch": launch, "connect": connect, **members}.items()}
    assert sorted(names_in_first_column(section("Replicas", API))) == sorted(actual)


def test_the_fields_of_the_metrics_are_as_documented() -> None:
    assert names_in_first_column(section("Metrics", API)) == [field.name for field in dataclasses.fields(Metrics)]


def test_the_reasons_of_the_window_are_as_documented() -> None:
    assert names_in_first_column(section("The window", TEXTS["docs/batching.md"])) == list(_core.REASONS)


def test_every_public_name_is_documented() -> None:
    documented = {name for code in code_in(API) for name in re.findall(r"\w+", code)}
    documented |= set(re.findall(r"^## (\w+)$", API, re.M))
    assert set(grpc_batcher.__all__) - {"__version__"} <= documented


# ---- what the texts point to ----


@pytest.mark.parametrize("name", TEXTS)
def test_every_link_of_a_text_leads_somewhere(name: str) -> None:
    for target in re.findall(r"\]\(([^)]+)\)", TEXTS[name]):
        if re.match(r"https?://", target):
            continue
        path, _, anchor = target.partition("#")
        file = (ROOT / name).parent / path if path else ROOT / name
        assert file.exists(), target
        assert not anchor or anchor in anchors(file.read_text()), target


@pytest.mark.parametrize("name", TEXTS)
def test_every_make_target_that_a_text_names_exists(name: str) -> None:
    code = [*code_in(TEXTS[name]), *blocks(TEXTS[name], "sh")]
    named = {target for part in code for target in re.findall(r"^make ([a-z-]+)", part, re.M)}
    assert named <= set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.M))


def test_contributing_names_every_make_target() -> None:
    (phony,) = re.findall(r"^\.PHONY: (.*)$", (ROOT / "Makefile").read_text(), re.M)
    assert {f"make {target}" for target in phony.split()} == set(names_in_first_column(section("Set up", CONTRIBUTING)))


def modules() -> set[str]:
    """The files of the package that somebody wrote, except the folders' `__init__.py`, which only have a docstring."""
    package = ROOT / "grpc_batcher"
    files = {file for pattern in ("*.py", "*.pyx", "*.pxd", "*.pyi") for file in package.rglob(pattern)}
    files -= set(package.glob("*/__init__.py")) | set(package.glob("_proto/*"))
    return {file.relative_to(package).as_posix() for file in files}


def test_contributing_says_where_every_module_is() -> None:
    assert sorted(names_in_first_column(section("Files", CONTRIBUTING))) == sorted(modules())


def test_the_way_of_a_request_leads_through_modules_that_exist() -> None:
    named = {name for name in code_in(section("How a request travels, in one minute", CONTRIBUTING)) if ".py" in name}
    assert named
    assert named <= modules()


@pytest.mark.parametrize("folder", ["docker", "tests", "scripts", "soak"])
def test_the_readme_of_a_folder_has_a_line_per_file(folder: str) -> None:
    there = {entry.name + "/" * entry.is_dir() for entry in (ROOT / folder).iterdir() if entry.name[0] != "."}
    named = names_in_first_column(TEXTS[f"{folder}/README.md"])
    assert sorted(named) == sorted(there - {"README.md", "__pycache__/"})


# ---- releases ----


def test_the_changelog_begins_with_the_version_of_the_package() -> None:
    versions = re.findall(r"^## \[(.*?)\] - (?:unreleased|\d{4}-\d\d-\d\d)$", TEXTS["CHANGELOG.md"], re.M)
    assert versions[0] == grpc_batcher.__version__


def test_the_page_about_releases_has_ten_steps() -> None:
    steps = re.findall(r"^(\d+)\. ", TEXTS["docs/releasing.md"], re.M)
    assert steps == [str(number) for number in range(1, 11)]


# ---- docs/reliability.md ----


def test_every_test_that_the_page_about_reliability_names_exists() -> None:
    tests = "\n".join(file.read_text() for file in (ROOT / "tests").glob("test_*.py"))
    named = {code for code in code_in(RELIABILITY) if code.startswith("test_")}
    assert named
    assert named <= set(re.findall(r"^def (test_\w+)\(", tests, re.MULTILINE))


def test_every_promise_of_the_page_about_reliability_names_a_test() -> None:
    for heading, table in re.findall(r"^(\| promise \|.*\n)((?:\|.*\n)+)", section_of_promises(), re.MULTILINE):
        for promise, shown_by in rows(heading + table):
            assert any(code.startswith("test_") for code in code_in(shown_by)), promise


def section_of_promises() -> str:
    return RELIABILITY.partition("\n## What is promised\n")[2].partition("\n## ")[0]


def test_reliability_and_readme_say_the_bounds_that_keepalive_is_set_to() -> None:
    server_s = life_cycle._KEEPALIVE_INTERVAL_MS // 1000, life_cycle._KEEPALIVE_TIMEOUT_MS // 1000
    caller_s = connection._KEEPALIVE_INTERVAL_MS // 1000, connection._KEEPALIVE_TIMEOUT_MS // 1000
    hosts = section("Hosts that vanish silently", RELIABILITY)
    for bound_s, (interval_s, timeout_s) in ((sum(server_s), server_s), (sum(caller_s), caller_s)):
        (row,) = [row for row in rows(hosts) if row[1] == f"{bound_s} s"]
        assert row[2].startswith(f"pings after {interval_s} s of silence, waits {timeout_s} s")
    assert f"It must be at least {life_cycle._MIN_CALLERS_INTERVAL_MS // 1000} seconds" in " ".join(hosts.split())
    limits = " ".join(section("Limits", README).split())
    assert f"A server notices a vanished caller within {sum(server_s)} seconds" in limits
    assert f"within {caller_s[1]} seconds if a request is on its way, otherwise within {sum(caller_s)}" in limits


# ---- docs/new-model.md ----

PROTO_CHANGE, MODELS_CHANGE = blocks(NEW_MODEL, "diff")
FIELD_TYPES = {"bytes": FieldDescriptorProto.TYPE_BYTES, "float": FieldDescriptorProto.TYPE_FLOAT}


def changed(text: str, diff: str) -> str:
    """A text with the change that a diff block shows."""
    before = "".join(line[1:] for line in diff.splitlines(keepends=True) if not line.startswith("+"))
    after = "".join(line[1:] for line in diff.splitlines(keepends=True) if not line.startswith("-"))
    assert text.count(before) == 1, f"these lines do not occur exactly once:\n{before}"
    return text.replace(before, after)


def test_the_page_about_a_new_model_starts_from_the_proto_as_it_is() -> None:
    assert changed((ROOT / "proto" / "mukoe_batcher.proto").read_text(), PROTO_CHANGE)


def test_the_example_of_a_new_model_runs_after_the_changes_that_its_page_shows(tmp_path: Path) -> None:
    package = tmp_path / "grpc_batcher"
    shutil.copytree(Path(grpc_batcher.__file__).parent, package, ignore=shutil.ignore_patterns("__pycache__"))
    models = package / "_models.py"
    models.write_text(changed(models.read_text(), MODELS_CHANGE))
    (package / "_proto" / "mukoe_batcher_pb2.py").write_text(generated_messages())
    (block,) = blocks(NEW_MODEL, "python")
    assert run_program(tmp_path, block) == said_output(block)


def generated_messages() -> str:
    """What `make proto` would generate, but without protoc: the same descriptor and the same builder."""
    file = FileDescriptorProto()
    mukoe_batcher_pb2.DESCRIPTOR.CopyToProto(file)
    ((message, body),) = re.findall(r"^\+message (\w+) \{\n(.*?)^\+\}", PROTO_CHANGE, re.MULTILINE | re.DOTALL)
    fields = file.message_type.add(name=message).field
    for kind, name, number in re.findall(r"^\+  (\w+) (\w+) = (\d+);$", body, re.MULTILINE):
        fields.add(name=name, number=int(number), type=FIELD_TYPES[kind], label=FieldDescriptorProto.LABEL_OPTIONAL)
    ((kind, name, number),) = re.findall(r"^\+    (\w+) (\w+) = (\d+);$", PROTO_CHANGE, re.MULTILINE)
    (request,) = [each for each in file.message_type if each.name == "MukoeRequest"]
    request.field.add(
        name=name,
        number=int(number),
        type=FieldDescriptorProto.TYPE_MESSAGE,
        type_name=f".{file.package}.{kind}",
        label=FieldDescriptorProto.LABEL_OPTIONAL,
        oneof_index=0,
    )
    # protobuf 3.20 wants the members of a oneof next to each other, as protoc writes them.
    request.field.sort(key=lambda field: not field.HasField("oneof_index"))
    return f"""\
from google.protobuf import descriptor_pool
from google.protobuf.internal import builder

DESCRIPTOR = descriptor_pool.Default().AddSerializedFile({file.SerializeToString()!r})
builder.BuildMessageAndEnumDescriptors(DESCRIPTOR, globals())
builder.BuildTopDescriptorsAndMessages(DESCRIPTOR, "mukoe_batcher_pb2", globals())
"""


# ---- the figures ----

SPEED_ROWS = {
    "this library, direct transport": "direct transport",
    "this library, public transport": "public transport",
    "plain grpcio echo, no batching, streams kept": "plain grpcio, persistent streams",
    "plain grpcio echo, no batching, a call per request": "plain grpcio, a call per request",
    "C++ gRPC echo: no batching, no Python": "C++ echo",
    "mosec, over HTTP/1": "mosec",
    "mosec, over HTTP/1, from a bare socket": "mosec, bare socket",
}


def measured() -> dict[str, str]:
    """The median throughput of everything in the kept run, as the table of speeds writes it."""
    with open(ROOT / "benchmarks" / "results" / "full.csv", newline="") as file:
        return {row["what"]: f"{float(row['median']):,.0f}" for row in csv.DictReader(file) if row["unit"] == "req/s"}


def test_the_table_of_speeds_shows_what_was_measured() -> None:
    run = measured()
    sizes = ("64 B", "110,592 B", "884,736 B")
    shown = {name: figures for name, *figures in rows(section("The figures", SPEED))}
    assert shown == {
        name: [run[f"{size}: {system}"] for size in sizes]
        for name, system in SPEED_ROWS.items()
        if f"64 B: {system}" in run  # the kept run may be older than a system
    }
    assert "this library, direct transport" in shown


def test_the_figures_in_the_readme_are_those_of_the_page_about_speed() -> None:
    figures = set(re.findall(r"\b\d{1,3},\d{3}\b", README))
    assert figures
    assert figures <= set(re.findall(r"\b\d{1,3},\d{3}\b", SPEED))
