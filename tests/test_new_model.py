"""A third kind of request takes one message in the proto and one entry in `_models.py`, as docs/new-model.md says.

Makes the two edits that the page shows in a copy of the package, generates the messages as `make proto` does, and uses
the new kind. `test_docs.py` runs the page's example without protoc.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import grpc_batcher

import pytest
from serving import PROGRAM_LIMIT_S, run_program

ROOT = Path(__file__).resolve().parent.parent
PAGE = (ROOT / "docs" / "new-model.md").read_text()


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```$", PAGE, re.MULTILINE | re.DOTALL)


def lines_of(diff: str, *marks: str) -> str:
    return "".join(line[1:] for line in diff.splitlines(keepends=True) if line[0] in marks)


def make_edit(file: Path, diff: str) -> None:
    """Make the edit that a diff block shows. Its unchanged lines must occur once in the file, in a row."""
    text, unchanged = file.read_text(), lines_of(diff, " ")
    assert text.count(unchanged) == 1
    file.write_text(text.replace(unchanged, lines_of(diff, " ", "+")))


def python(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, *arguments], capture_output=True, text=True, timeout=PROGRAM_LIMIT_S)


@pytest.fixture
def extended(tmp_path: Path) -> Path:
    """A folder with a copy of the package that also serves the page's kind."""
    # Not imported here: its older releases import modules that warn, or that newer setuptools lacks.
    probe = python("-c", "from grpc_tools import protoc")
    if probe.returncode != 0:
        reason = probe.stderr.strip().splitlines()[-1]
        pytest.skip(f"grpcio-tools, which generates the messages, does not work here: {reason}")
    shutil.copytree(Path(grpc_batcher.__file__).parent, tmp_path / "grpc_batcher")
    for folder in ("proto", "scripts"):
        shutil.copytree(ROOT / folder, tmp_path / folder)
    proto_diff, models_diff = blocks("diff")
    make_edit(tmp_path / "proto" / "mukoe_batcher.proto", proto_diff)
    make_edit(tmp_path / "grpc_batcher" / "_models.py", models_diff)
    generator = python(str(tmp_path / "scripts" / "generate_proto.py"))
    assert generator.returncode == 0, generator.stderr
    return tmp_path


def run_extended(folder: Path, text: str) -> list[str]:
    path = os.pathsep.join(filter(None, (str(folder), os.environ.get("PYTHONPATH"))))
    return run_program(folder, text, environment={"PYTHONPATH": path})


def test_the_page_adds_only_one_message_with_its_field_and_one_entry() -> None:
    proto_diff, models_diff = blocks("diff")
    assert not any(line.startswith("-") for line in (proto_diff + models_diff).splitlines())
    added = lines_of(proto_diff, "+")
    message, field = re.fullmatch(r"// .*\nmessage (\w+) \{\n[^}]*\}\n\n +(\w+ \w+) = \d+;\n", added).groups()  # type: ignore[union-attr]
    assert field.split()[0] == message
    assert len(lines_of(models_diff, "+").splitlines()) == 1


def test_the_pages_example_runs_after_generating_the_messages_with_protoc(extended: Path) -> None:
    [example] = blocks("python")
    expected = re.findall(r"print\(.*\)  # (.*)$", example, re.MULTILINE)
    assert len(expected) == 2
    output = run_extended(extended, "import grpc_batcher, sys\nprint(grpc_batcher.__file__)\n" + example)
    assert output == [str(extended / "grpc_batcher" / "__init__.py"), *expected]


TEMPERATURE_PROGRAM = """
    import threading

    from grpc_batcher import MukoeBatcherClient, RequestError, create_batcher

    def answer(requests):
        return [({"data": request[0] if isinstance(request, tuple) else request}, 1) for request in requests]

    def answer_with_temperature(requests):
        return [({"data": data, "temperature": repr(temperature).encode()}, 2) for data, temperature in requests]

    with create_batcher("prediction", 8, 0.001, port=0, batch_process_fn=answer_with_temperature) as batcher:
        with MukoeBatcherClient(f"127.0.0.1:{batcher.port}") as client:
            print(client.send_request(data=b"x", temperature=0.25))
            print(client.send_request(b"x", temperature=0))
            print(client.send_request("", temperature=-1e30))
            for arguments in ({}, {"action": 3}):
                try:
                    print(client.send_request(b"x", **arguments))
                except RequestError as error:
                    print(error.code().name, "'prediction'" in error.details())
            for temperature in ("hot", None, [1.0]):
                try:
                    print(client.send_request(b"x", temperature=temperature))
                except TypeError as error:
                    print("TypeError", str(error).partition(":")[0])
            print(client.send_request(b"x", temperature=0.5))

    for model, arguments in (("repr", (b"x",)), ("dyna", (b"x", 3))):
        with create_batcher(model, 8, 0.001, port=0, batch_process_fn=answer) as batcher:
            with MukoeBatcherClient(f"127.0.0.1:{batcher.port}") as client:
                print(client.send_request(*arguments))
                try:
                    print(client.send_request(b"x", temperature=0.5))
                except RequestError as error:
                    print(error.code().name, repr(model) in error.details())
"""


def test_a_new_kind_works_like_the_others_which_are_unchanged(extended: Path) -> None:
    assert run_extended(extended, TEMPERATURE_PROGRAM) == [
        "({'data': b'x', 'temperature': b'0.25'}, 2)",
        "({'data': b'x', 'temperature': b'0.0'}, 2)",
        "({'data': b'', 'temperature': b'-1.0000000150474662e+30'}, 2)",
        "INVALID_ARGUMENT True",
        "INVALID_ARGUMENT True",
        "TypeError temperature is 'hot'",
        "TypeError temperature is None",
        "TypeError temperature is [1.0]",
        "({'data': b'x', 'temperature': b'0.5'}, 2)",
        "({'data': b'x'}, 1)",
        "INVALID_ARGUMENT True",
        "({'data': b'x'}, 1)",
        "INVALID_ARGUMENT True",
    ]
