"""What a client's requests and answers hold."""

from __future__ import annotations

from typing import Any

import grpc
from google.protobuf.message import DecodeError

from .._errors import RequestError
from .._models import read_answer, write_request


class BytesPayloads:
    """Requests and answers of bytes."""

    def encode(self, arguments: dict[str, Any]) -> bytes:
        """Return the message of a request. Raises TypeError or ValueError for arguments that cannot be sent.

        arguments: those of `send_request` that describe the request. Their values may be replaced.
        """
        if "rows" in arguments:
            raise TypeError("rows is True, which needs arrays: create the client with arrays=True")
        if not arguments:
            raise TypeError("data is missing; a request needs it")
        if isinstance(data := arguments.get("data"), str):
            arguments["data"] = data.encode()
        return write_request(arguments)

    def decode(self, reply: bytes) -> tuple[dict[str, bytes], int]:
        """Return the dictionary and the step in a reply. Raises RequestError if it holds none."""
        try:
            return read_answer(reply)
        except DecodeError as error:
            raise RequestError(
                grpc.StatusCode.INTERNAL, f"the server's reply of {len(reply)} bytes is not a MukoeResponse: {error}"
            ) from None
