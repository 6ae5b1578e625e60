"""Which transport carries a stream: direct where grpcio allows it, public elsewhere.

Server and client choose separately, and a client chooses per channel. GRPC_BATCHER_TRANSPORT in the environment, read
when the package is imported, asks for one transport ("public" or "direct") or for one per end ("public/direct": the
server's, then the client's).
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable

import grpc

from .. import _process
from . import direct_server, grpcio_private, public
from .direct_client import DirectClientStream
from .direct_pooled import DirectPooledStream
from .interface import ClientStream, Metadata, PooledClientStream, ServerSession

_logger = logging.getLogger("grpc_batcher")

_VARIABLE = "GRPC_BATCHER_TRANSPORT"


class _End:
    """The choice of the process's servers, or of its clients.

    why_public: why this end uses the public transport, or None if it uses the direct one.
    """

    def __init__(self, name: str, wanted: str) -> None:
        self._name = name
        self.why_public = None if wanted == "direct" else f"{_VARIABLE} asks for it"

    @property
    def transport(self) -> str:
        return "direct" if self.why_public is None else "public"

    def give_up_direct(self, problem: object) -> None:
        """Use the public transport from now on: grpcio lacks something, or does not behave as expected."""
        if self.why_public is None:
            self.why_public = f"grpcio {grpc.__version__} does not suit the direct one: {problem}"
            _logger.warning(
                "this process's %ss use the public transport, which is slower; %s", self._name, self.why_public
            )


def server_transport() -> str:
    """Return the transport of streams that callers open from now on, unless an interceptor wraps their handler."""
    return _server.transport


def client_transport(channel: grpc.Channel | None) -> str:
    """Return the transport of streams on this channel; None stands for one that grpcio makes and nothing wraps."""
    return "public" if _why_public(channel) else "direct"


def server_reason() -> str:
    """Return the transport of this process's servers, and why."""
    return _reason(_server.why_public)


def client_reason() -> str:
    """Return the transport of this process's clients on channels that nothing wraps, and why."""
    return _reason(_client.why_public)


def stream_handler(open_session: Callable[[grpc.ServicerContext], ServerSession]) -> grpc.RpcMethodHandler:
    """Return what serves a stream that a caller opens now."""
    if _server.why_public is None:
        return direct_server.stream_handler(open_session, _server.give_up_direct)
    return public.stream_handler(open_session)


def open_stream(channel: grpc.Channel, method: str, metadata: Metadata) -> ClientStream:
    """Open a stream to a server."""
    if _why_public(channel) is None:
        try:
            return DirectClientStream(channel, method, metadata, _client.give_up_direct)
        except (AttributeError, TypeError) as error:
            if not grpcio_private.is_mismatch(error):
                raise
            _client.give_up_direct(error)
    return public.PublicClientStream(channel, method, metadata)


def open_pooled_stream(
    channel: grpc.Channel, method: str, metadata: Metadata, on_over: Callable[[], None]
) -> PooledClientStream:
    """Open a stream to a server that tells of its replies; `on_over` is called when it has ended."""
    if _why_public(channel) is None:
        try:
            return DirectPooledStream(channel, method, metadata, on_over, _client.give_up_direct)
        except (AttributeError, TypeError) as error:
            if not grpcio_private.is_mismatch(error):
                raise
            _client.give_up_direct(error)
    return public.PublicPooledStream(channel, method, metadata, on_over)


def log_client_transport(address: str, channel: grpc.Channel) -> None:
    """Say which transport a new channel uses, and why if it is the public one."""
    why = _why_public(channel)
    _logger.debug(
        "connecting to %s with the %s transport%s", address, client_transport(channel), f": {why}" if why else ""
    )


def _reason(why_public: str | None) -> str:
    return f"public: {why_public}" if why_public else f"direct: grpcio {grpc.__version__} has all it needs"


def _why_public(channel: grpc.Channel | None) -> str | None:
    if _client.why_public is not None:
        return _client.why_public
    if channel is not None and (wrapper := grpcio_private.wrapped_by(channel)):
        return f"the channel is a {wrapper}, and only grpcio's public API runs what wraps a channel"
    return None


def _wanted() -> tuple[str, str]:
    wanted = os.environ.get(_VARIABLE) or "direct"
    server, _, client = wanted.partition("/")
    client = client or server
    if not {server, client} <= {"direct", "public"}:
        raise ImportError(
            f"{_VARIABLE} is {wanted!r} in the environment; it must be 'direct', 'public', or one for each end such as "
            "'public/direct'"
        )
    return server, client


_server, _client = (_End(*end) for end in zip(("server", "client"), _wanted(), strict=True))
if problem := grpcio_private.missing_for_server():
    _server.give_up_direct(problem)
if problem := grpcio_private.missing_for_client():
    _client.give_up_direct(problem)
if _process.fork_support_is_on and _client.why_public is None:
    # In a forked child grpcio waits for the calls of its parent's channels, and those of the direct transport never
    # end.
    _client.why_public = "GRPC_ENABLE_FORK_SUPPORT is on, which the direct one does not support"
if grpcio_private.is_newer_than_tested() and "direct" in (_server.transport, _client.transport):
    _logger.debug(
        "grpcio %s is newer than any that was tested (%s); the direct transport is used all the same",
        grpc.__version__,
        ".".join(map(str, _process.NEWEST_TESTED_GRPCIO)),
    )
