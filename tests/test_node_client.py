"""A client in Node, whose gRPC shares no code with Python's."""

from __future__ import annotations

import hashlib
import json
import shutil
import subprocess
from pathlib import Path
from typing import Any

from grpc_batcher import Array, Batch

import grpc
import pytest
from conftest import Certificates
from serving import PROGRAM_LIMIT_S, address_of, echo, serving

NODE_CLIENTS = Path(__file__).resolve().parent / "node"
PROTOS = Path(__file__).resolve().parent.parent / "proto"


@pytest.fixture
def node_clients(tmp_path: Path) -> Path:
    """The folder of the clients, with their packages installed."""
    if shutil.which("node") is None or shutil.which("npm") is None:
        pytest.skip("node and npm are not installed here")
    for name in ("package.json", "client.js", "inference.js"):
        shutil.copy(NODE_CLIENTS / name, tmp_path)
    command = ["npm", "install", "--no-audit", "--no-fund", "--no-package-lock", "--prefer-offline"]
    try:
        install = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=PROGRAM_LIMIT_S)
    except subprocess.TimeoutExpired:
        pytest.skip(f"npm did not install the client's packages within {PROGRAM_LIMIT_S} s")
    if install.returncode != 0:
        pytest.skip(f"npm cannot install the client's packages here: {install.stderr.strip()[-500:]}")
    return tmp_path


def run_node(folder: Path, script: str, *arguments: str) -> list[Any]:
    """Run a script, which must succeed; return what its lines of JSON say."""
    program = subprocess.run(
        ["node", str(folder / script), *arguments], capture_output=True, text=True, timeout=PROGRAM_LIMIT_S
    )
    assert program.returncode == 0, program.stderr
    return [json.loads(line) for line in program.stdout.splitlines()]


@pytest.mark.timeout(3 * PROGRAM_LIMIT_S)  # npm may have to download the packages first
@pytest.mark.parametrize("secured_by", ["nothing", "mutual TLS"])
def test_a_node_client_is_answered_by_both_kinds_of_batcher(
    secured_by: str, node_clients: Path, certificates: Certificates
) -> None:
    folder, options = [], {}
    if secured_by == "mutual TLS":
        folder = [str(certificates.folder)]
        options["credentials"] = grpc.ssl_server_credentials([certificates.server], certificates.authority, True)

    def hash_large(requests: list[bytes]) -> Any:
        return [({"result": hashlib.sha256(data).digest() if len(data) > 1000 else data}, 7) for data in requests]

    with serving(hash_large, **options) as repr_batcher, serving(echo, model="dyna", **options) as dyna_batcher:
        addresses = [address_of(repr_batcher), address_of(dyna_batcher)]
        results = run_node(node_clients, "client.js", str(PROTOS / "mukoe_batcher.proto"), *addresses, *folder)
    hi, several, large, dyna, wrong, *numbered = results

    def ended_well(*answers: Any) -> dict[str, Any]:
        return {"answers": [list(answer) for answer in answers], "code": "OK", "details": ""}

    assert hi == ended_well(({"result": b"hi".hex()}, 7))
    assert several == ended_well(*(({"result": (b"%d" % number).hex()}, 7) for number in range(5)))
    assert large == ended_well(({"result": hashlib.sha256(b"\x5a" * 884736).hexdigest()}, 7))
    assert dyna == ended_well(
        ({"result": b"hi".hex()}, 3), ({"result": ""}, -(2**31)), ({"result": b"x".hex()}, 2**31 - 1)
    )
    assert (wrong["answers"], wrong["code"]) == ([], "INVALID_ARGUMENT")
    assert "'repr'" in wrong["details"]
    assert numbered == [ended_well(({"result": (b"%d" % number).hex()}, 7)) for number in range(5)]


@pytest.mark.timeout(3 * PROGRAM_LIMIT_S)
def test_a_node_client_of_the_open_inference_protocol_is_answered(node_clients: Path) -> None:
    def add(batch: Batch) -> Any:
        return {"sum": batch["a"] + batch["b"]}, 7

    arrays = {name: Array((2,), "float32") for name in "ab"}
    with serving(add, model="arrays", arrays=arrays, open_inference=True, model_name="adder") as batcher:
        results = run_node(node_clients, "inference.js", str(PROTOS / "open_inference.proto"), address_of(batcher))
    ready, metadata, raw, typed, missing, streamed = results
    assert ready == {"ready": True}
    assert metadata["inputs"] == [{"name": name, "datatype": "FP32", "shape": ["-1", "2"]} for name in "ab"]
    for answer, number in ((raw, "raw"), (typed, "typed")):
        assert answer == {"id": number, "step": "7", "outputs": {"sum": {"shape": ["1", "2"], "values": [11, 22]}}}
    assert missing == {"code": "NOT_FOUND", "details": "the model is 'resnet'; this server has 'adder'"}
    assert [answer.get("id") for answer in streamed] == ["0", None, "2"]
    assert streamed[1] == {"error": "the model is 'resnet'; this server has 'adder'"}
