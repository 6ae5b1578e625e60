"""How a client connects: the channel, its options, and who may be on the other end."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

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


@dataclass(frozen=True)
class Connection:
    """Everything needed to make a channel. See `MukoeBatcherClient` for what each field means."""

    address: str
    max_message_bytes: int = DEFAULT_MAX_MESSAGE_BYTES
    credentials: grpc.ChannelCredentials | None = None
    options: tuple[tuple[str, Any], ...] = ()
    interceptors: tuple[grpc.StreamStreamClientInterceptor, ...] = ()
    metadata: tuple[tuple[str, str | bytes], ...] = ()

    @property
    def is_balanced(self) -> bool:
        """Whether the channel spreads streams over several servers."""
        return any(option[0] in _BALANCING_OPTIONS for option in self.options)

    def open_channel(self) -> grpc.Channel:
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
            channel = grpc.insecure_channel(self.address, all_options)
        else:
            channel = grpc.secure_channel(self.address, self.credentials, all_options)
        if self.interceptors:
            channel = grpc.intercept_channel(channel, *self.interceptors)
        choice.log_client_transport(self.address, channel)
        return channel
