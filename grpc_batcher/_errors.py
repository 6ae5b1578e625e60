"""The exceptions that users may catch.

BatcherError
├── BindError       also an OSError: the server's address is not available
└── RequestError    also a grpc.RpcError: a request ended without an answer; code() and details() say how
"""

from __future__ import annotations

from typing import Any

import grpc


class BatcherError(Exception):
    """Base of this library's own errors."""


class BindError(BatcherError, OSError):
    """The server cannot listen on its address, most often because another process does.

    errno: the system's reason, such as errno.EADDRINUSE; None where only gRPC knows it.
    """

    def __init__(self, message: str, errno: int | None = None) -> None:
        super().__init__(message)
        self.errno = errno

    def __reduce__(self) -> tuple[Any, ...]:
        return BindError, (str(self), self.errno)


class RequestError(BatcherError, grpc.RpcError):  # type: ignore[misc]
    """A request ended without an answer.

    Unlike gRPC's own errors it holds no call, so it can be pickled and sent to another process.
    """

    def __init__(self, code: grpc.StatusCode, details: str) -> None:
        super().__init__(code, details)
        self._code = code
        self._details = details

    def code(self) -> grpc.StatusCode:
        """The gRPC status code."""
        return self._code

    def details(self) -> str:
        """The status's text."""
        return self._details

    def __str__(self) -> str:
        return f"{self._code.name}: {self._details}"
