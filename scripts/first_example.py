"""Run README's first example in this Python, beside modules that are imported first: `first_example.py ray`.

With `--last` they are imported after grpc_batcher, and before the example runs. Exits with 1 unless the example prints
what README says, and grpc_batcher came too late to choose gRPC's poller exactly where a module imported grpc first. It
listens on a free port instead of README's.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib
import io
import re
import socket
import sys
from pathlib import Path

README = Path(__file__).resolve().parent.parent / "README.md"


def main() -> None:
    parser = argparse.ArgumentParser(description="Run README's first example beside other modules.")
    parser.add_argument("modules", nargs="*", help="what to import before grpc_batcher")
    parser.add_argument("--last", action="store_true", help="import the modules after grpc_batcher instead")
    arguments = parser.parse_args()
    if arguments.last:
        importlib.import_module("grpc_batcher")
    for module in arguments.modules:
        importlib.import_module(module)
    is_late = "grpc" in sys.modules and not arguments.last

    (example, *_) = re.findall(r"^```python\n(.*?)^```$", README.read_text(), re.MULTILINE | re.DOTALL)
    (expected,) = re.findall(r"^print\(.*\)  # (.*)$", example, re.MULTILINE)
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        example = example.replace("50051", str(probe.getsockname()[1]))
    with contextlib.redirect_stdout(io.StringIO()) as output:
        exec(compile(example, "README's first example", "exec"), globals())  # which live on until Python ends
    print(output.getvalue(), end="", flush=True)
    if output.getvalue().splitlines() != [expected]:
        sys.exit(f"README's first example did not print {expected}")

    poller = importlib.import_module("grpc_batcher").info()["poller"]
    print("gRPC's poller:", poller, flush=True)
    if is_late != ("too late" in poller):
        sys.exit(f"grpc was {'' if is_late else 'not '}imported before grpc_batcher")


if __name__ == "__main__":
    main()
