"""What importing an uncompiled source tree says."""

from __future__ import annotations

import shutil
from pathlib import Path

import grpc_batcher

from serving import run_program


def test_an_uncompiled_tree_says_on_import_what_to_run(tmp_path: Path) -> None:
    package = Path(grpc_batcher.__file__).parent
    shutil.copytree(package, tmp_path / "grpc_batcher", ignore=shutil.ignore_patterns("*.so", "__pycache__"))
    program = """
        try:
            import grpc_batcher
        except ImportError as error:
            print(error)
    """
    (text,) = run_program(tmp_path, program)
    assert "not compiled" in text
    assert "pip install ." in text
