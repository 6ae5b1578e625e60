"""The native modules. Everything else about the package is in pyproject.toml.

GRPC_BATCHER_DEBUG=1 builds them with their invariants checked and symbols for a debugger, GRPC_BATCHER_SANITIZE=thread
or address does the same with a sanitizer, whose runtime must then be preloaded (see scripts/sanitize.py).
"""

import os
import sys
import sysconfig

from Cython.Build import cythonize
from setuptools import Extension, setup

# grpcio has no wheels for free-threaded Pythons, and importing it there would turn the GIL on again. pip comes here
# before it compiles grpcio, which takes long.
if sysconfig.get_config_var("Py_GIL_DISABLED"):
    sys.exit(
        f"grpc_batcher does not support free-threaded Python, because grpcio does not; this is {sys.version}. "
        "Use the ordinary build of Python."
    )

sanitizer = os.environ.get("GRPC_BATCHER_SANITIZE", "")
debug = sanitizer != "" or os.environ.get("GRPC_BATCHER_DEBUG", "0") not in ("", "0")
sanitizer_flags = {
    "": [],
    "thread": ["-fsanitize=thread"],
    "address": ["-fsanitize=address,undefined", "-fno-sanitize-recover=all"],
}[sanitizer]

extensions = [
    Extension(
        f"grpc_batcher.{name}",
        [f"grpc_batcher/{name}.pyx"],
        extra_compile_args=["-pthread", "-Wall", *(["-O1", "-g", "-UNDEBUG"] if debug else ["-O2"]), *sanitizer_flags],
        extra_link_args=["-pthread", *sanitizer_flags],
        define_macros=[] if debug else [("NDEBUG", "1")],
    )
    for name in ("_arrays", "_core", "_wire")
]

# Separate folders, so that one build is not mistaken for another.
base = f"build/{sanitizer or ('debug' if debug else 'release')}"
setup(
    ext_modules=cythonize(extensions, language_level=3, build_dir=base),
    options={"build": {"build_base": base}},
)
