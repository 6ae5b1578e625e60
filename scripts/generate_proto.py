"""Generate grpc_batcher/_proto from the files in proto/. With --check, exit with 1 if that would change it.

`make proto` and `make check-proto` run it with the one version of the generator that the Makefile names.
"""

from __future__ import annotations

import filecmp
import sys
import tempfile
from pathlib import Path

from grpc_tools import protoc

ROOT = Path(__file__).resolve().parent.parent
PROTOS = ("mukoe_batcher", "open_inference")
GENERATED = [f"{proto}_pb2{suffix}" for proto in PROTOS for suffix in (".py", ".pyi")]

# Other packages, such as tritonclient, bring their own messages of these names. In one process both can exist only if
# ours are in a pool of their own.
OWN_POOL = "open_inference"


def generate(folder: Path) -> None:
    arguments = [f"--proto_path={ROOT / 'proto'}", f"--python_out={folder}", f"--pyi_out={folder}"]
    if protoc.main(["protoc", *arguments, *(f"{proto}.proto" for proto in PROTOS)]) != 0:
        sys.exit("protoc failed")
    module = folder / f"{OWN_POOL}_pb2.py"
    text = module.read_text()
    assert text.count("_descriptor_pool.Default()") == 1
    module.write_text(text.replace("_descriptor_pool.Default()", "_descriptor_pool.DescriptorPool()"))


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
