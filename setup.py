"""The native core. Everything else about the package stands in pyproject.toml.

GRPC_BATCHER_DEBUG=1 builds it with its invariants checked and symbols for a debugger.
"""

import os

from Cython.Build import cythonize
from setuptools import Extension, setup

debug = os.environ.get("GRPC_BATCHER_DEBUG", "0") not in ("", "0")

core = Extension(
    "grpc_batcher._core",
    ["grpc_batcher/_core.pyx"],
    extra_compile_args=["-pthread", "-Wall", *(["-O1", "-g", "-UNDEBUG"] if debug else ["-O2"])],
    extra_link_args=["-pthread"],
    define_macros=[] if debug else [("NDEBUG", "1")],
)

setup(ext_modules=cythonize([core], language_level=3, build_dir="build"))
