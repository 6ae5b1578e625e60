"""What the batch loop and the sessions need of a callback, whatever it takes and returns."""

from __future__ import annotations

from typing import Any, NamedTuple, Protocol


class Failed(NamedTuple):
    """Why a request has no answer even though the callback was given its batch."""

    text: str


class Callback(Protocol):
    """The user's function, with what turns messages into its arguments and its results into replies.

    encoding_ns: how much of the last `outcomes_of` call went into encoding answers.
    """

    encoding_ns: int

    def read_request(self, message: bytes) -> tuple[Any, int]:
        """Return a request and how many rows it has. Raises BadRequestError. Any thread may call this."""

    def warm_up(self) -> None:
        """Call the function before there are requests, if it is to be warmed up. Raises what it raises, or
        BadResultError."""

    def outcomes_of(self, requests: list[Any]) -> list[Any]:
        """Call the function for a batch, and return a Failed or what `encode` takes per request, in order.

        Raises only what log handlers raise.
        """

    def encode(self, answer: Any) -> bytes:
        """Return the message of an answer. Raises OverflowError if none holds it. Any thread may call this."""


def text_of(error: BaseException) -> str:
    """The name and the text of an error, which may have faults of its own."""
    try:
        return f"{type(error).__name__}: {error}"
    except BaseException:
        return f"{type(error).__name__} (its text is not available)"
