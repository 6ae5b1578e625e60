"""`grpc-batcher check`: a container's health check."""

from __future__ import annotations

import sys
from typing import Any

import click
import grpc

from .options import (
    CommandError,
    check_has_port,
    metadata_option,
    seconds_above_0,
    security,
    security_options,
    unresolved,
)


@click.command(short_help="Ask a server whether it is serving.")
@click.argument("address", envvar="GRPC_BATCHER_CHECK_ADDRESS")
@click.option("--service", default="", help="The service to ask about. Default: the server as a whole.")
@click.option(
    "--timeout-s",
    type=seconds_above_0,
    metavar="SECONDS",
    default=5.0,
    help="How long to wait for the answer.",
)
@metadata_option("with the query")
@security_options
def check(address: str, service: str, timeout_s: float, metadata: tuple[tuple[str, str], ...], **tls: Any) -> int:
    """Ask the health service at ADDRESS (host:port or unix:/path) whether the server is serving.

    Status 0: it says SERVING. 1: it says something else, has no health service, or there is no server. 2: ADDRESS does
    not resolve, or an option is wrong. ADDRESS can also be set by GRPC_BATCHER_CHECK_ADDRESS.
    """
    try:
        from grpc_health.v1 import health_pb2, health_pb2_grpc
    except ImportError:
        raise CommandError('grpcio-health-checking is not installed: pip install "grpc-batcher[health]"') from None
    check_has_port(address)
    secured = security(**tls)
    credentials = secured.credentials()
    # A container asks its own server, and not through a proxy.
    options = (*secured.options(), ("grpc.enable_http_proxy", 0))
    if credentials is None:
        channel = grpc.insecure_channel(address, options)
    else:
        channel = grpc.secure_channel(address, credentials, options)
    with channel:
        try:
            answer = health_pb2_grpc.HealthStub(channel).Check(
                health_pb2.HealthCheckRequest(service=service), timeout=timeout_s, metadata=metadata
            )
        except grpc.RpcError as error:
            if why := unresolved(address):
                raise CommandError(why) from None
            return _not_serving(address, _reason(error, service))
    status = health_pb2.HealthCheckResponse.ServingStatus.Name(answer.status)
    if status != "SERVING":
        return _not_serving(address, status)
    print(status)
    return 0


def _reason(error: grpc.RpcError, service: str) -> str:
    if error.code() is grpc.StatusCode.UNIMPLEMENTED:
        return "the server has no health service"
    if error.code() is grpc.StatusCode.NOT_FOUND:
        return f"the server has no service {service!r}"
    return f"{error.code().name}: {error.details()}"


def _not_serving(address: str, why: str) -> int:
    print(f"{address}: {' '.join(why.split())}", file=sys.stderr)
    return 1
