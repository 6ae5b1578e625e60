"""A client in Node, whose gRPC shares no code with Python's."""

from __future__ import annotations

import hashlib
import json
import shutil
import subprocess
from pathlib import Path
from typing import Any

import grpc
import pytest
from conftest import Certificates
from serving import PROGRAM_LIMIT_S, address_of, echo, serving

NODE_CLIENT = Path(__file__).resolve().parent / "node"
PROTO = Path(__file__).resolve().parent.parent / "proto" / "mukoe_batcher.proto"


@pytest.fixture
def node_client(tmp_path: Path) -> Path:
    """The client in its own folder, with its packages installed."""
    if shutil.which("node") is None or shutil.which("npm") is None:
        pytest.skip("node and npm are not installed here")
    for name in ("package.json", "client.js"):
        shutil.copy(NODE_CLIENT / name, tmp_path)
    command = ["npm", "install", "--no-audit", "--no-fund", "--no-package-lock", "--prefer-offline"]
    try:
        install = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=PROGRAM_LIMIT_S)
    except subprocess.TimeoutExpired:
        pytest.skip(f"npm did not install the client's packages within {PROGRAM_LIMIT_S} s")
    if install.returncode != 0:
        pytest.skip(f"npm cannot install the client's packages here: {install.stderr.strip()[-500:]}")
    return tmp_path / "client.js"


@pytest.mark.timeout(3 * PROGRAM_LIMIT_S)  # npm may have to download the packages first
@pytest.mark.parametrize("secured_by", ["nothing", "mutual TLS"])
def test_a_node_client_is_answered_by_both_kinds_of_batcher(
    secured_by: str, node_client: Path, certificates: Certificates
) -> None:
    folder, options = [], {}
    if secured_by == "mutual TLS":
        folder = [str(certificates.folder)]
        options["credentials"] = grpc.ssl_server_credentials([certificates.server], certificates.authority, True)

    def hash_large(requests: list[bytes]) -> Any:
        return [({"result": hashlib.sha256(data).digest() if len(data) > 1000 else data}, 7) for data in requests]

    with serving(hash_large, **options) as repr_batcher, serving(echo, model="dyna", **options) as dyna_batcher:
        program = subprocess.run(
            ["node", str(node_client), str(PROTO), address_of(repr_batcher), address_of(dyna_batcher), *folder],
            capture_output=True,
            text=True,
            timeout=PROGRAM_LIMIT_S,
        )
    assert program.returncode == 0, program.stderr
    hi, several, large, dyna, wrong, *numbered = map(json.loads, program.stdout.splitlines())

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
