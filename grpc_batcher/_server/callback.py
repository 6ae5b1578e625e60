"""Turns whatever a callback does into one outcome per request."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from .._models import Answer, BadResultError, check_result

_logger = logging.getLogger("grpc_batcher")


class Failure(NamedTuple):
    """Why a request has no answer even though the callback was given its batch."""

    text: str


def outcomes_of(callback: Callable[[list[Any]], Any], requests: list[Any]) -> list[Answer | Failure]:
    """Call the callback, and return one outcome per request, in order. Raises only what log handlers raise.

    The callback owns the list: it may pad it, or consume it.
    """
    count = len(requests)
    try:
        results = callback(requests)
        if not isinstance(results, Sequence) or isinstance(results, (str, bytes)):
            raise BadResultError(
                f"must return a list with one result per request; it returned a {type(results).__name__}"
            )
        if len(results) != count:
            raise BadResultError(f"must return one result per request; it returned {len(results)} for {count}")
        kind, results = type(results).__name__, list(results)
        if len(results) != count:
            raise BadResultError(f"must return one result per request; its {kind} holds {len(results)}")
    except BadResultError as error:
        _logger.error("the callback %s", error)
        return [Failure(f"the callback {error}")] * count
    except BaseException as error:  # even SystemExit and KeyboardInterrupt: this is not the main thread
        _logger.exception("the callback raised, so its batch of %d requests fails", count)
        return [Failure(f"the callback raised {_text(error)}")] * count
    return [_outcome(result) for result in results]


def _outcome(result: Any) -> Answer | Failure:
    if isinstance(result, BaseException):
        return Failure(f"the callback answered this request with {_text(result)}")
    try:
        return check_result(result)
    except BadResultError as error:
        _logger.error("the callback's result for one request %s", error)
        return Failure(f"the callback's result for this request {error}")
    except BaseException as error:  # from methods of the result itself
        _logger.exception("the callback's result for one request cannot be read")
        return Failure(f"the callback's result for this request cannot be read: {_text(error)}")


def _text(error: BaseException) -> str:
    try:
        return f"{type(error).__name__}: {error}"
    except BaseException:
        return f"{type(error).__name__} (its text is not available)"
