"""`grpc-batcher serve`: a batcher for any importable function."""

from __future__ import annotations

import importlib
import inspect
import logging
import os
import re
import sys
import threading
from collections.abc import Sequence
from contextlib import suppress
from importlib.util import find_spec
from operator import attrgetter
from pathlib import Path
from typing import Any

import click
import grpc

from .._contract import is_unix_socket
from .._errors import BatcherError
from .._models import ARRAYS, MODELS
from .._server.batcher import MukoeBatcher
from .._server.create import create_batcher
from .options import FILE, CommandError, read_certificates, read_pair, seconds, seconds_above_0, sizes

_logger = logging.getLogger("grpc_batcher")

_DEFAULTS = {name: parameter.default for name, parameter in inspect.signature(create_batcher).parameters.items()}


# Options named like a parameter of create_batcher are passed on, and checked there.
@click.command(short_help="Serve a function.")
@click.argument("function", metavar="MODULE:FUNCTION", envvar="GRPC_BATCHER_SERVE_FUNCTION")
@click.option("--model", type=click.Choice([*MODELS, ARRAYS.name]), required=True, help="The kind of request to serve.")
@click.option(
    "--batch-size", type=int, required=True, help="The most requests, or rows, that the function gets at once."
)
@click.option(
    "--batch-sizes",
    type=sizes,
    metavar="SIZES",
    help="How many rows a function with declared arrays may get, such as 1,4,16. Default: every number.",
)
@click.option(
    "--warm-up/--no-warm-up",
    default=_DEFAULTS["warm_up"],
    help="Call a function with declared arrays once per size before the port is open.",
)
@click.option(
    "--batch-timeout-s",
    type=float,
    required=True,
    help="How many seconds the oldest request waits for others at most; 0: not at all.",
)
@click.option("--host", default=_DEFAULTS["host"], help="The address to listen on, or unix:/path for a unix socket.")
@click.option("--port", type=int, default=_DEFAULTS["port"], help="The TCP port; 0: the system chooses.")
@click.option("--tls-cert", type=FILE, help="The server's certificate and its chain, in PEM. Default: plaintext.")
@click.option("--tls-key", type=FILE, help="The private key of --tls-cert, in PEM.")
@click.option("--tls-client-ca", type=FILE, help="In PEM: callers must present a certificate signed by one of these.")
@click.option(
    "--health/--no-health",
    default=None,
    show_default="on where grpcio-health-checking is installed",
    help="Serve gRPC's health service, which `check` queries.",
)
@click.option(
    "--reflection/--no-reflection",
    default=_DEFAULTS["reflection"],
    help="Serve gRPC's reflection service, for grpcurl.",
)
@click.option(
    "--open-inference/--no-open-inference",
    default=_DEFAULTS["open_inference"],
    help="Serve the Open Inference Protocol, KServe's and Triton's, from a function with declared arrays.",
)
@click.option("--model-name", show_default="that of --model", help="The model's name in that protocol.")
@click.option("--metrics-port", type=click.IntRange(0, 65535), help="The port for Prometheus metrics. Default: none.")
@click.option(
    "--metrics-host",
    show_default="that of --host, or 127.0.0.1 if that is a unix socket",
    help="The address to serve Prometheus metrics on.",
)
@click.option("--track-metrics/--no-track-metrics", default=_DEFAULTS["track_metrics"], help="Measure durations.")
@click.option(
    "--grace-s", type=seconds, default=5.0, help="How many seconds requests get to be answered after SIGTERM or SIGINT."
)
@click.option(
    "--max-queue-size",
    type=int,
    show_default="the larger of 8192 and twice --batch-size",
    help="The most requests that may wait.",
)
@click.option(
    "--max-queue-bytes",
    type=int,
    default=_DEFAULTS["max_queue_bytes"],
    help="The most bytes that waiting requests may hold together.",
)
@click.option(
    "--max-streams", type=int, default=_DEFAULTS["max_streams"], help="The most callers' streams open at once."
)
@click.option(
    "--max-connection-age-s",
    type=seconds_above_0,
    show_default="no limit",
    help="The age, in seconds, at which callers are asked to connect again, and so find servers that were added.",
)
@click.option(
    "--max-message-bytes",
    type=int,
    default=_DEFAULTS["max_message_bytes"],
    help="Size of the largest request accepted, in bytes.",
)
@click.option(
    "--leave-early/--no-leave-early",
    default=_DEFAULTS["leave_early"],
    help="Let a batch leave before its time once no known caller could still join it.",
)
@click.option(
    "--interceptor",
    multiple=True,
    metavar="MODULE:OBJECT",
    help="A gRPC server interceptor, for instance one that checks a token. Repeatable.",
)
@click.option(
    "--log-level",
    type=click.Choice(["debug", "info", "warning", "error"]),
    default="info",
    help="What to log to stderr.",
)
def serve(
    function: str,
    tls_cert: Path | None,
    tls_key: Path | None,
    tls_client_ca: Path | None,
    health: bool | None,
    metrics_host: str | None,
    metrics_port: int | None,
    grace_s: float,
    interceptor: Sequence[str],
    log_level: str,
    **parameters: Any,
) -> None:
    """Serve a FUNCTION of MODULE, as in `serve package.module:function`, importing it from the current folder.

    It gets a list of requests and returns a list with one (dictionary, step) for each, like create_batcher's callback.
    If the decorator grpc_batcher.arrays declares its arrays, it gets a Batch.
    SIGTERM or SIGINT ends the server: it answers the requests that it has taken in, and the status is 0.
    MODULE:FUNCTION can also be set by GRPC_BATCHER_SERVE_FUNCTION.
    """
    logging.basicConfig(level=log_level.upper(), format="%(asctime)s %(levelname)s %(name)s: %(message)s")
    credentials = _credentials(tls_cert, tls_key, tls_client_ca)
    callback = _imported(function)
    if not callable(callback):
        raise CommandError(f"{function!r} is {callback!r:.100}, which is not callable")
    try:
        batcher = create_batcher(
            batch_process_fn=callback,
            credentials=credentials,
            interceptors=[_interceptor(name) for name in interceptor],
            health=_is_installed("grpc_health") if health is None else health,
            **parameters,
        )
    except (ValueError, TypeError) as error:
        raise CommandError(re.sub(r"^\w+(?= is )", lambda name: _option(name[0]), str(error))) from None
    except ImportError as error:  # an extra is missing
        raise CommandError(str(error)) from None
    # The metrics first: a batcher that accepts requests must not end because of their port.
    if metrics_port is not None:
        if metrics_host is None:
            host = parameters["host"].strip("[]")
            metrics_host = "127.0.0.1" if is_unix_socket(host) else host
        print(f"metrics on http://{_serve_metrics(batcher, metrics_host, metrics_port)}/metrics", flush=True)
    threading.Thread(target=_announce, args=(batcher,), daemon=True).start()
    try:
        batcher.serve_forever(grace_s)
    except BatcherError as error:
        raise CommandError(str(error)) from None
    except Exception as error:
        if not parameters["warm_up"] and not isinstance(error, ValueError):
            raise
        _logger.debug("starting failed", exc_info=True)
        raise CommandError(f"cannot start: {type(error).__name__}: {error} (--log-level debug shows where)") from None


def _credentials(certificate: Path | None, key: Path | None, client_ca: Path | None) -> grpc.ServerCredentials | None:
    private_key, chain = read_pair(certificate, key)
    if chain is None:
        if client_ca is not None:
            raise click.UsageError("--tls-client-ca needs --tls-cert and --tls-key")
        return None
    roots = None if client_ca is None else read_certificates("--tls-client-ca", client_ca)
    return grpc.ssl_server_credentials([(private_key, chain)], roots, require_client_auth=roots is not None)


def _imported(name: str) -> Any:
    """Return what module:object names. Raises CommandError."""
    module_name, _, object_name = name.partition(":")
    if not (module_name and object_name):
        raise click.UsageError(f"{name!r} is not of the form package.module:object")
    if (folder := os.getcwd()) not in sys.path:
        sys.path.insert(0, folder)
    try:
        module = importlib.import_module(module_name)
    except (Exception, SystemExit) as error:
        _logger.debug("importing %r failed", module_name, exc_info=True)
        raise CommandError(
            f"cannot import {module_name!r}: {type(error).__name__}: {error} (--log-level debug shows where)"
        ) from None
    try:
        return attrgetter(object_name)(module)
    except AttributeError as error:
        raise CommandError(f"{module_name!r} has no {object_name!r}: {error}") from None


def _interceptor(name: str) -> grpc.ServerInterceptor:
    interceptor = _imported(name)
    if not isinstance(interceptor, grpc.ServerInterceptor):
        raise CommandError(f"--interceptor {name!r} is {interceptor!r:.100}, which is not a grpc.ServerInterceptor")
    return interceptor


def _serve_metrics(batcher: MukoeBatcher, host: str, port: int) -> str:
    """Serve the batcher's metrics, and any of the function's own, to Prometheus; return the address."""
    try:
        from prometheus_client import REGISTRY, start_http_server

        from ..prometheus import BatcherCollector
    except ImportError:
        raise CommandError('--metrics-port needs prometheus-client: pip install "grpc-batcher[prometheus]"') from None
    if port and port == batcher.port and not is_unix_socket(batcher.address):
        raise CommandError(f"--metrics-port and --port are both {port}; they must differ")
    try:
        server, _thread = start_http_server(port, host)
    except (OSError, UnicodeError) as error:
        raise CommandError(f"--metrics-port: cannot listen on {host}:{port}: {error}") from None
    REGISTRY.register(BatcherCollector(batcher))
    return f"[{host}]:{server.server_port}" if ":" in host else f"{host}:{server.server_port}"


def _announce(batcher: MukoeBatcher) -> None:
    """Print that it is serving, once it is and handles signals: `serve_forever` returns too late for that."""
    with suppress(RuntimeError):  # it ended before it began
        batcher.wait_until_ready()
        print(f"serving {batcher.metrics().model!r} on {batcher.address}", flush=True)


def _is_installed(module: str) -> bool:
    return find_spec(module) is not None


def _option(parameter: str) -> str:
    return "--" + parameter.replace("_", "-")
