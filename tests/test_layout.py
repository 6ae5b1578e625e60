"""Which part of the package may import which, and what the package exports."""

from __future__ import annotations

import ast
import inspect
import re
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import grpc_batcher

import pytest

PACKAGE = Path(__file__).resolve().parent.parent / "grpc_batcher"

FOLDERS = {"_server", "_client", "_transport", "_cli", "_replicas", "ray"}

# What a part, which is a folder or a module at the top, must not import.
FORBIDDEN = {
    "_server": {"_client", "_cli", "_replicas", "ray"},
    "_client": {"_server", "_cli", "_replicas", "ray"},
    "_transport": {"_server", "_client", "_cli", "_replicas", "ray"},
    "_cli": {"_replicas", "ray"},
    "_replicas": {"_transport", "_cli"},
    "ray": {"_transport", "_cli"},
    **dict.fromkeys(("_arrays", "_core", "_wire", "_contract", "_errors", "_process", "_models", "_array"), FOLDERS),
    "_info": {"_server", "_client", "_cli"},
    "prometheus": {"_client", "_transport", "_cli"},
}


def part_of(file: Path) -> str:
    return file.relative_to(PACKAGE).parts[0].partition(".")[0]


def files() -> list[Path]:
    """The files that somebody wrote, including those for Cython."""
    suffixes = {".py", ".pyi", ".pyx", ".pxd"}
    return sorted(file for file in PACKAGE.rglob("*.p*") if file.suffix in suffixes and part_of(file) != "_proto")


def tree_of(file: Path) -> ast.Module:
    """Parse a file. Of Cython's language only the import statements are kept."""
    text = file.read_text()
    if file.suffix in (".pyx", ".pxd"):
        statements = re.findall(r"^\s*((?:from\s+\S+\s+)?c?import\s(?:\([^)]*\)|.*))$", text, re.MULTILINE)
        text = "\n".join(re.sub(r"\bcimport\b", "import", statement) for statement in statements)
    return ast.parse(text)


def imports_of(file: Path) -> Iterator[str]:
    """Every name that a file imports, absolute. Includes imports in functions and for type checkers."""
    package = ("grpc_batcher", *file.relative_to(PACKAGE).parent.parts)
    for node in ast.walk(tree_of(file)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else ()
            module = ".".join((*base, *filter(None, [node.module])))
            yield from (f"{module}.{alias.name}" for alias in node.names)


def parts_imported_by(part: str) -> set[str]:
    names = {name for file in files() if part_of(file) == part for name in imports_of(file)}
    return {name.split(".")[1] for name in names if name.startswith("grpc_batcher.")}


@pytest.mark.parametrize("part", FORBIDDEN)
def test_a_part_imports_nothing_that_it_must_not_know(part: str) -> None:
    assert parts_imported_by(part) & FORBIDDEN[part] == set()


def test_imports_are_found() -> None:
    assert parts_imported_by("_client") >= {"_contract", "_errors", "_models", "_process", "_transport"}
    assert parts_imported_by("_server") >= {"_core", "_transport", "_models"}
    assert parts_imported_by("_models") == {"_proto", "_wire"}
    assert set(imports_of(PACKAGE / "_core.pyx")) >= {"cpython.ref.Py_INCREF"}
    assert set(imports_of(PACKAGE / "_arrays.pyx")) >= {"libc.string.memcpy", "grpc_batcher._wire.read_varint"}
    assert "grpc_batcher._server.service.Service" in set(imports_of(PACKAGE / "_server" / "session.py"))


@pytest.mark.parametrize(
    "file", ["direct_server.py", "direct_client.py", "direct_pooled.py", "public.py", "choice.py", "interface.py"]
)
def test_no_other_file_uses_private_attributes_of_grpcios_objects(file: str) -> None:
    tree = tree_of(PACKAGE / "_transport" / file)
    private = [node for node in ast.walk(tree) if isinstance(node, ast.Attribute) and node.attr.startswith("_")]
    owners = {ast.unparse(node.value) for node in private if not node.attr.startswith("__")}
    assert owners <= {"self", "grpc._cython"}


@pytest.mark.parametrize("file", ["direct_server.py", "direct_client.py", "direct_pooled.py"])
def test_no_other_file_looks_into_what_grpcios_private_calls_return(file: str) -> None:
    """Except for `operate` and `next_event` of the client's calls, as `grpcio_private.py` says."""
    nodes = [node for node in ast.walk(tree_of(PACKAGE / "_transport" / file)) if isinstance(node, ast.Attribute)]
    grpcios = {"batch_operations", "tag", "message", "segregated_call", "start_server_batch"}
    assert {node.attr for node in nodes} & grpcios == set()
    of_call = {node.attr for node in nodes if ast.unparse(node.value) == "self._call"}
    ours = {"condition", "start", "finish", "forget"}  # a ServerCall's
    assert of_call <= (ours if file == "direct_server.py" else {"operate", "next_event"})


def test_every_part_is_known() -> None:
    parts = {part_of(file) for file in files()}
    assert parts == set(FORBIDDEN) | {"__init__", "__main__", "_version"}


def test_no_two_classes_share_a_name() -> None:
    classes = [
        node.name
        for file in files()
        if file.suffix == ".py"
        for node in ast.walk(tree_of(file))
        if isinstance(node, ast.ClassDef)
    ]
    assert len(classes) > 40
    assert {name: count for name, count in Counter(classes).items() if count > 1} == {}


def private_names_of_grpcio(file: Path) -> set[str]:
    """The private names of grpcio that a file imports, gets from a module, or names in a string."""
    names = {name for name in imports_of(file) if re.match(r"grpc\._|(?!grpc_batcher\.).*\bcygrpc\b", name)}
    for node in ast.walk(tree_of(file)):
        if isinstance(node, ast.Attribute) and re.match(r"grpc\.(\w+\.)*_[a-z]", ast.unparse(node)):
            names.add(ast.unparse(node))
        elif isinstance(node, ast.Constant) and isinstance(node.value, str) and re.fullmatch(r"grpc\._.*", node.value):
            names.add(node.value)
        elif isinstance(node, ast.Name) and node.id == "cygrpc":
            names.add(node.id)
    return names


def test_only_one_file_uses_grpcios_private_names() -> None:
    users = {file.relative_to(PACKAGE).as_posix() for file in files() if private_names_of_grpcio(file)}
    assert users == {"_transport/grpcio_private.py"}


def test_the_package_exports_exactly_the_names_in_all() -> None:
    public = {
        name for name, value in vars(grpc_batcher).items() if not name.startswith("_") and not inspect.ismodule(value)
    }
    assert public | {"__version__"} == set(grpc_batcher.__all__)


def test_prometheus_and_ray_are_the_only_public_modules() -> None:
    modules = {entry.name for entry in PACKAGE.iterdir() if not entry.name.startswith((".", "_"))}
    assert modules - {"py.typed"} == {"prometheus.py", "ray.py"}
