"""Generate grpc_batcher/_proto from proto/mukoe_batcher.proto. With --check, exit with 1 if that would change it.

`make proto` and `make check-proto` run it with the one version of the generator that the Makefile names.
"""

from __future__ import annotations

import filecmp
import sys
import tempfile
from pathlib import Path

from grpc_tools import protoc

ROOT = Path(__file__).resolve().parent.parent
GENERATED = ("mukoe_batcher_pb2.py", "mukoe_batcher_pb2.pyi")


def generate(folder: Path) -> None:
    arguments = [f"--proto_path={ROOT / 'proto'}", f"--python_out={folder}", f"--pyi_out={folder}"]
    if protoc.main(["protoc", *arguments, "mukoe_batcher.proto"]) != 0:
        sys.exit("protoc failed")


def main() -> None:
    committed = ROOT / "grpc_batcher" / "_proto"
    if "--check" not in sys.argv[1:]:
        generate(committed)
        return
    with tempfile.TemporaryDirectory() as folder:
        generate(Path(folder))
        different = [
            name for name in GENERATED if not filecmp.cmp(Path(folder) / name, committed / name, shallow=False)
        ]
    if different:
        sys.exit(f"{', '.join(different)} in grpc_batcher/_proto differ from the proto; run `make proto`")
    print("grpc_batcher/_proto is what the proto generates")


if __name__ == "__main__":
    main()
