"""The native modules. Everything else about the package stands in pyproject.toml.

GRPC_BATCHER_DEBUG=1 builds them with their invariants checked and symbols for a debugger.
"""

import os

from Cython.Build import cythonize
from setuptools import Extension, setup

debug = os.environ.get("GRPC_BATCHER_DEBUG", "0") not in ("", "0")

extensions = [
    Extension(
        f"grpc_batcher.{name}",
        [f"grpc_batcher/{name}.pyx"],
        extra_compile_args=["-pthread", "-Wall", *(["-O1", "-g", "-UNDEBUG"] if debug else ["-O2"])],
        extra_link_args=["-pthread"],
        define_macros=[] if debug else [("NDEBUG", "1")],
    )
    for name in ("_core", "_wire")
]

# Apart from each other, or the one build would be taken for the other.
base = "build/debug" if debug else "build/release"
setup(
    ext_modules=cythonize(extensions, language_level=3, build_dir=base),
    options={"build": {"build_base": base}},
)
