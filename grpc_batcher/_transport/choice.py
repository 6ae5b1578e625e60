"""Which way bytes take between gRPC and this library: the direct gear where it works, else the public one.

GRPC_BATCHER_GEAR=public (or direct) in the environment chooses, before the library is imported; server/client, such as
public/direct, chooses for each end.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Sequence
from typing import Any, Protocol

import grpc

from .._transport import direct as _direct
from .. import _process as _forks
from .._transport import public as _public
from .._server.session import Session

_logger = logging.getLogger("grpc_batcher")


class ClientStream(Protocol):
    """One open stream to a server, for one request at a time."""

    def exchange(self, message: bytes) -> bytes | None: ...
    def is_alive(self) -> bool: ...
    def cancel(self) -> None: ...
    def close(self) -> None: ...


def server_gear() -> str:
    """The gear of the streams that callers open from now on."""
    return _server


def client_gear() -> str:
    """The gear of the streams that this process opens from now on."""
    return _client


def stream_handler(open_session: Callable[[grpc.ServicerContext], Session]) -> grpc.RpcMethodHandler:
    """Return what serves a stream that a caller opens now."""
    if _server == "direct":
        return _direct.stream_handler(open_session, _give_up_direct)
    return _public.stream_handler(open_session)


def open_stream(
    channel: grpc.Channel, method: str, metadata: Sequence[tuple[str, Any]] = (), *, intercepted: bool = False
) -> ClientStream:
    """Open a stream to a server.

    intercepted: the channel has interceptors, which only the public API runs.
    """
    if _client == "direct" and not intercepted:
        try:
            return _direct.ClientStream(channel, method, metadata, _give_up_direct)
        except (AttributeError, TypeError) as error:
            _give_up_direct(error)
    return _public.ClientStream(channel, method, metadata)


def _give_up_direct(why: object) -> None:
    global _server, _client
    if "direct" in (_server, _client):
        _server = _client = "public"
        _logger.warning(
            "grpcio %s is not as the direct gear needs it (%s); the public gear serves, at less speed",
            grpc.__version__,
            why,
        )


def _chosen() -> tuple[str, str]:
    wanted = os.environ.get("GRPC_BATCHER_GEAR") or "direct"
    server, _, client = wanted.partition("/")
    client = client or server
    if not {server, client} <= {"direct", "public"}:
        raise ImportError(f"GRPC_BATCHER_GEAR is {wanted!r} in the environment; it must be 'direct' or 'public'")
    if _forks.supported and client == "direct":
        # In a forked child grpcio waits for the calls of its parent's channels, and those of this gear never end there.
        client = "public"
    return server, client


_server, _client = _chosen()
if missing := _direct.missing():
    _give_up_direct(missing)
