"""What becomes of a callback's results: an outcome for each request, whatever the callback does."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from .._models import Answer, BadResultError, check_result

_logger = logging.getLogger("grpc_batcher")


class Failure(NamedTuple):
    """Why a request has no answer although its batch was given to the callback."""

    text: str


def outcomes_of(callback: Callable[[list[Any]], Any], requests: list[Any]) -> list[Answer | Failure]:
    """Call the callback, and return one outcome per request, in order. Never raises.

    The list is the callback's own: it may pad it, or consume it.
    """
    count = len(requests)
    try:
        results = callback(requests)
        if not isinstance(results, Sequence) or isinstance(results, (str, bytes)):
            raise BadResultError(f"must return a list with one result per request; it is a {type(results).__name__}")
        if len(results) != count:
            raise BadResultError(f"must return one result per request; it returned {len(results)} for {count}")
        kind, results = type(results).__name__, list(results)
        if len(results) != count:
            raise BadResultError(f"must return one result per request; its {kind} has {len(results)}")
    except BadResultError as error:
        _logger.error("the callback %s", error)
        return [Failure(f"the callback {error}")] * count
    except BaseException as error:  # SystemExit and KeyboardInterrupt, too: this is not the main thread
        _logger.exception("the callback raised, and its batch of %d requests fails", count)
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
        _logger.exception("the callback's result for one request can not be read")
        return Failure(f"the callback's result for this request can not be read: {_text(error)}")


def _text(error: BaseException) -> str:
    try:
        return f"{type(error).__name__}: {error}"
    except BaseException:
        return f"{type(error).__name__}, whose text can not be had"
