"""What a source tree says that is imported without being compiled, or compiled for a Python that is not supported."""

from __future__ import annotations

import shutil
import subprocess
import sys
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


def test_a_free_threaded_python_is_refused_before_anything_is_compiled() -> None:
    program = """if True:
        import runpy, sys, sysconfig, types
        sysconfig.get_config_vars()["Py_GIL_DISABLED"] = 1
        for name in ("Cython", "Cython.Build", "setuptools"):  # nothing may be built: these cannot
            sys.modules[name] = types.SimpleNamespace(cythonize=None, Extension=None, setup=None)
        runpy.run_path("setup.py")
    """
    tree = Path(__file__).resolve().parent.parent
    ended = subprocess.run([sys.executable, "-c", program], cwd=tree, capture_output=True, text=True)
    assert ended.returncode == 1
    assert "does not support free-threaded Python, because grpcio does not" in ended.stderr
    assert "Traceback" not in ended.stderr
