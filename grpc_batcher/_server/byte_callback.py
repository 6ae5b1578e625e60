"""Callbacks that get a list of requests and return a list of results: bytes, which only the callback understands."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Sequence
from typing import Any

from .._models import Answer, BadResultError, Model, check_result, write_answer
from .callback import Failed, text_of
from .published import Published

_logger = logging.getLogger("grpc_batcher")


class ByteCallback:
    """See `Callback`. The function owns the list that it gets: it may pad it, or consume it.

    warm_up_requests: what to call the function with before there are requests; empty for not at all.
    """

    encoding_ns = 0  # sessions encode

    def __init__(
        self,
        function: Callable[[list[Any]], Sequence[Any]],
        model: Model,
        published: Published,
        warm_up_requests: Sequence[Any],
    ) -> None:
        self._function = function
        self._model = model
        self._published = published
        self._warm_up_requests = warm_up_requests

    def read_request(self, message: bytes) -> tuple[Any, int]:
        return self._model.read_request(message), 1

    def warm_up(self) -> None:
        if not self._warm_up_requests:
            return
        begin_ns = time.monotonic_ns()
        for result in self._results(list(self._warm_up_requests)):
            if isinstance(result, BaseException):
                raise result
            check_result(result)
        count, seconds = len(self._warm_up_requests), (time.monotonic_ns() - begin_ns) / 1e9
        _logger.info("warmed up with %d requests in %.3f s", count, seconds)

    def outcomes_of(self, requests: list[Any]) -> list[Answer | Failed]:
        count = len(requests)
        step = self._published.version.step
        try:
            results = self._results(requests)
        except BadResultError as error:
            _logger.error("the callback %s", error)
            return [Failed(f"the callback {error}")] * count
        except BaseException as error:  # even SystemExit and KeyboardInterrupt: this is not the main thread
            _logger.exception("the callback raised, so its batch of %d requests fails", count)
            return [Failed(f"the callback raised {text_of(error)}")] * count
        return [_outcome(result, step) for result in results]

    def encode(self, answer: Answer) -> bytes:
        return write_answer(answer)

    def _results(self, requests: list[Any]) -> list[Any]:
        """Call the function. Raises what it raises, and BadResultError unless it returns a result per request."""
        count = len(requests)
        results = self._function(requests)
        if not isinstance(results, Sequence) or isinstance(results, (str, bytes)):
            raise BadResultError(
                f"must return a list with one result per request; it returned a {type(results).__name__}"
            )
        if len(results) != count:
            raise BadResultError(f"must return one result per request; it returned {len(results)} for {count}")
        kind, results = type(results).__name__, list(results)
        if len(results) != count:
            raise BadResultError(f"must return one result per request; its {kind} holds {len(results)}")
        return results


def _outcome(result: Any, default_step: int) -> Answer | Failed:
    if isinstance(result, BaseException):
        return Failed(f"the callback answered this request with {text_of(result)}")
    try:
        return check_result(result, default_step)
    except BadResultError as error:
        _logger.error("the callback's result for one request %s", error)
        return Failed(f"the callback's result for this request {error}")
    except BaseException as error:  # from methods of the result itself
        _logger.exception("the callback's result for one request cannot be read")
        return Failed(f"the callback's result for this request cannot be read: {text_of(error)}")
