"""Which way bytes take between gRPC and this library."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

import grpc

from . import _public
from ._service import Session


class ServerGear(Protocol):
    """Moves messages between a server's streams and their sessions."""

    @property
    def name(self) -> str: ...

    def stream_handler(self, open_session: Callable[[grpc.ServicerContext], Session]) -> grpc.RpcMethodHandler: ...


class ClientStream(Protocol):
    """One open stream to a server, for one request at a time."""

    def exchange(self, message: bytes) -> bytes | None: ...
    def is_alive(self) -> bool: ...
    def cancel(self) -> None: ...


class ClientGear(Protocol):
    """Opens a client's streams."""

    @property
    def name(self) -> str: ...

    @property
    def ClientStream(self) -> Callable[[grpc.Channel, str], ClientStream]: ...


server_gear: ServerGear = _public
client_gear: ClientGear = _public
