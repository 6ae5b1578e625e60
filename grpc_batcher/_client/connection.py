"""How a client connects: the channel, its options, and who may be on the other end."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol

import grpc

from .._contract import DEFAULT_MAX_MESSAGE_BYTES
from .._transport import choice

# The longest pause between two attempts to connect. gRPC's default is two minutes.
_MAX_RECONNECT_BACKOFF_MS = 1000

# gRPC's keepalive (its doc/keepalive.md): a server whose host vanishes without a word is noticed after this interval
# and timeout, even while nothing is sent; after the timeout alone if there is something to send. Servers that do not
# say otherwise, such as the C++ wheel's, drop callers that ping more often than every five minutes.
_KEEPALIVE_INTERVAL_MS = 310_000
_KEEPALIVE_TIMEOUT_MS = 20_000

# With these the channel itself may choose between several servers.
_BALANCING_OPTIONS = ("grpc.lb_policy_name", "grpc.service_config")


class Route(Protocol):
    """Finds a client's server, if that may move."""

    def find(self, due_ns: int | None) -> None:
        """Have `target` know a server. May wait for one, for seconds, or until the monotonic time `due_ns`.

        Raises RequestError if there is none.
        """

    def target(self) -> str:
        """Return gRPC's target for the server to use now. Never blocks; `find` comes first."""

    def lost(self, target: str) -> None:
        """Note that the server of a target that `target` returned does not answer, or is leaving."""


@dataclass(frozen=True)
class Connection:
    """Everything needed to make a channel. See `MukoeBatcherClient` for what each field means.

    route: finds the server instead of `address`, which is then only a name; None for a server that stays where it is.
    """

    address: str
    max_message_bytes: int = DEFAULT_MAX_MESSAGE_BYTES
    credentials: grpc.ChannelCredentials | None = None
    options: tuple[tuple[str, Any], ...] = ()
    interceptors: tuple[grpc.StreamStreamClientInterceptor, ...] = ()
    metadata: tuple[tuple[str, str | bytes], ...] = ()
    route: Route | None = None

    @property
    def is_balanced(self) -> bool:
        """Whether the channel spreads streams over several servers."""
        return any(option[0] in _BALANCING_OPTIONS for option in self.options)

    @property
    def has_others(self) -> bool:
        """Whether another stream may lead to another server."""
        return self.route is not None or self.is_balanced

    def find_server(self, due_ns: int | None) -> None:
        """Have `target` know a server that may move. May wait, for seconds; raises RequestError if there is none."""
        if self.route is not None:
            self.route.find(due_ns)

    def target(self) -> str:
        """Return the target of the channel to use now."""
        return self.address if self.route is None else self.route.target()

    def note_lost(self, target: str) -> None:
        """The server of a target does not answer, or is leaving."""
        if self.route is not None:
            self.route.lost(target)

    def open_channel(self, target: str) -> grpc.Channel:
        """Return a new channel. It connects when it is first used."""
        all_options = (
            *self.options,  # first: gRPC takes the first of two
            ("grpc.max_receive_message_length", self.max_message_bytes),
            ("grpc.max_send_message_length", -1),  # the server decides what it accepts
            ("grpc.max_reconnect_backoff_ms", _MAX_RECONNECT_BACKOFF_MS),
            ("grpc.keepalive_time_ms", _KEEPALIVE_INTERVAL_MS),
            ("grpc.keepalive_timeout_ms", _KEEPALIVE_TIMEOUT_MS),
            ("grpc.http2.max_pings_without_data", 0),
            # Or a new channel would inherit the pause after another's failure to connect.
            ("grpc.use_local_subchannel_pool", 1),
            # gRPC resends a stream that a server never looked at, unasked. If a direct stream is answered while it
            # does, grpcio 1.85 delivers neither message nor status, and the caller would wait forever.
            ("grpc.enable_retries", 0),
        )
        if self.credentials is None:
            channel = grpc.insecure_channel(target, all_options)
        else:
            channel = grpc.secure_channel(target, self.credentials, all_options)
        if self.interceptors:
            channel = grpc.intercept_channel(channel, *self.interceptors)
        choice.log_client_transport(target, channel)
        return channel
