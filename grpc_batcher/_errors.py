"""The exceptions that users may catch.

BatcherError
├── BindError       also an OSError: the server's address can not be had
└── RequestError    also a grpc.RpcError: a request ended without an answer; code() and details() say how
"""

from __future__ import annotations

import grpc


class BatcherError(Exception):
    """Base of the errors that are this library's own."""


class BindError(BatcherError, OSError):
    """The server can not listen on its address, most often because another process does."""


class RequestError(BatcherError, grpc.RpcError):  # type: ignore[misc]
    """A request ended without an answer.

    Unlike gRPC's own errors it holds no call, so it can be pickled and sent to another process.
    """

    def __init__(self, code: grpc.StatusCode, details: str) -> None:
        super().__init__(code, details)
        self._code = code
        self._details = details

    def code(self) -> grpc.StatusCode:
        return self._code

    def details(self) -> str:
        return self._details

    def __str__(self) -> str:
        return f"{self._code.name}: {self._details}"
