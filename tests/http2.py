"""A gRPC caller built on a plain socket, which does what no gRPC library would."""

from __future__ import annotations

import socket
from collections import defaultdict

import h2.config
import h2.connection
import h2.events
import h2.settings
from serving import METHOD

_HEADERS = (
    (":method", "POST"),
    (":scheme", "http"),
    (":path", METHOD),
    (":authority", "localhost"),
    ("te", "trailers"),
    ("content-type", "application/grpc"),
)


def message_head(length: int, *, compressed: int = 0) -> bytes:
    """Return what precedes each gRPC message: whether it is compressed, and its length."""
    return bytes((compressed,)) + length.to_bytes(4, "big")


class HandmadeCaller:
    """One connection. Leaving the context manager closes it without telling the server.

    window_bytes: how many bytes of answers it accepts on each stream. It never asks for more.
    """

    def __init__(self, port: int, *, window_bytes: int = 65535) -> None:
        self._socket = socket.create_connection(("127.0.0.1", port))
        self._connection = h2.connection.H2Connection(h2.config.H2Configuration(header_encoding="utf-8"))
        self._connection.local_settings = h2.settings.Settings(
            client=True, initial_values={h2.settings.SettingCodes.INITIAL_WINDOW_SIZE: window_bytes}
        )
        self._connection.initiate_connection()
        self._statuses: dict[int, tuple[str, str]] = {}
        self._has_begun = False
        self.received_bytes: defaultdict[int, int] = defaultdict(int)
        self._flush()

    def __enter__(self) -> HandmadeCaller:
        return self

    def __exit__(self, *_: object) -> None:
        self._socket.close()

    def open_stream(self, method: str = METHOD) -> int:
        """Open a stream without sending anything on it; return its number."""
        (number,) = self.open_streams(1, method)
        return number

    def open_streams(self, count: int, method: str = METHOD) -> list[int]:
        """Open several streams at once; return their numbers."""
        headers = [(name, method if name == ":path" else value) for name, value in _HEADERS]
        numbers = []
        for _ in range(count):
            numbers.append(self._connection.get_next_available_stream_id())
            self._connection.send_headers(numbers[-1], headers)
        self._flush()
        return numbers

    def send(self, stream: int, data: bytes, *, end: bool = False) -> None:
        """Send raw bytes, a few KB at most."""
        self._connection.send_data(stream, data, end_stream=end)
        self._flush()

    def status(self, stream: int) -> tuple[str, str]:
        """Wait until the server has ended a stream; return the number of its gRPC status, and the details."""
        while stream not in self._statuses:
            self._receive()
        return self._statuses[stream]

    def wait_for_statuses(self, count: int) -> list[tuple[str, str]]:
        """Wait until the server has ended this many streams; return their statuses."""
        while len(self._statuses) < count:
            self._receive()
        return list(self._statuses.values())

    def wait_for_bytes(self, stream: int, count: int) -> None:
        """Wait until this many bytes of answers have arrived on a stream."""
        while self.received_bytes[stream] < count:
            self._receive()

    def wait_for_headers(self) -> None:
        """Wait until the server has begun to answer on some stream."""
        while not self._has_begun:
            self._receive()

    def _receive(self) -> None:
        data = self._socket.recv(65536)
        if not data:
            raise ConnectionError("the server closed the connection")
        for event in self._connection.receive_data(data):
            if isinstance(event, (h2.events.ResponseReceived, h2.events.TrailersReceived)):
                assert event.stream_id is not None
                self._has_begun = True
                headers = dict(event.headers or ())
                if "grpc-status" in headers:
                    self._statuses[event.stream_id] = headers["grpc-status"], headers.get("grpc-message", "")
            elif isinstance(event, h2.events.DataReceived):
                assert event.stream_id is not None
                self.received_bytes[event.stream_id] += len(event.data or b"")
            elif isinstance(event, h2.events.StreamReset):
                assert event.stream_id is not None
                self._statuses.setdefault(event.stream_id, ("reset", str(event.error_code)))
        self._flush()

    def _flush(self) -> None:
        self._socket.sendall(self._connection.data_to_send())
