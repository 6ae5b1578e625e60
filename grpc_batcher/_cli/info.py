"""`grpc-batcher info`: what a bug report needs."""

from __future__ import annotations

import click

from .. import _process
from .._info import info as gather


@click.command(short_help="Print what a bug report needs.")
def info() -> None:
    """Print versions, and what a server or client would choose here: transport, gRPC's poller, glibc's memory."""
    _process.prepare_to_use_grpc()
    found = gather()
    width = max(map(len, found))
    for name, value in found.items():
        print(f"{name:<{width}}  {value}")
