"""Run README's first example in this Python, after importing the modules that are named: `first_example.py ray`.

Exits with 1 unless it prints what README says. It listens on a free port instead of README's.
"""

from __future__ import annotations

import contextlib
import importlib
import io
import re
import socket
import sys
from pathlib import Path

README = Path(__file__).resolve().parent.parent / "README.md"


def main() -> None:
    for module in sys.argv[1:]:
        importlib.import_module(module)
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


if __name__ == "__main__":
    main()
