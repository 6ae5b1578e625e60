"""Callbacks that get a batch as arrays, and return arrays."""

from __future__ import annotations

import logging
import math
import time
from bisect import bisect_left, bisect_right
from collections.abc import Callable, Mapping, Sequence
from itertools import accumulate
from typing import Any

from .. import _arrays
from .._array import Array, as_array, import_numpy
from .._models import ARRAYS, BadRequestError, BadResultError, Model, check_int32
from .arenas import Arenas
from .batch import Batch
from .callback import Failed, text_of
from .metrics import Recorder
from .published import Published

_logger = logging.getLogger("grpc_batcher")

_ACTION = "action"

# What an output needs to be encoded: its key, its rows, the shape of one, and the name of its dtype.
_Output = tuple[str, Any, tuple[int, ...], str]


class ArrayCallback:
    """See `Callback`. The messages' data is copied once, from the messages into the arrays of the batch.

    declared: the arrays of a request, by name. For other models than "arrays", the only one is "data".
    batch_sizes: how many rows the function may get, ascending; the last is the batch size.
    warms_up: whether to call the function once per size before there are requests.
    """

    def __init__(
        self,
        function: Callable[[Batch], Any],
        model: Model,
        declared: Mapping[str, Array],
        batch_sizes: Sequence[int],
        published: Published,
        recorder: Recorder,
        *,
        warms_up: bool,
    ) -> None:
        self.encoding_ns = 0
        self._function = function
        self._model = model
        self.declared = dict(declared)
        self.takes_actions = _ACTION in model.arguments
        # (name, dtype name, shape of a row) of each array that the function returned last.
        self.outputs_seen: list[tuple[str, str, tuple[int, ...]]] = []
        self._batch_sizes = batch_sizes
        self._published = published
        self._recorder = recorder
        self._warms_up = warms_up
        numbers = model.field_numbers
        self.reader = _arrays.RequestReader(
            numbers[model.message_field],
            [
                _arrays.Field(name, array.shape, array.dtype.name, array.dtype.itemsize)
                for name, array in self.declared.items()
            ],
            data_number=numbers.get("data"),
            action_number=numbers.get(_ACTION),
            max_rows=batch_sizes[-1],
        )
        self._arenas = [Arenas(batch_sizes[-1] * array.row_bytes) for array in self.declared.values()]

    def read_request(self, message: bytes) -> tuple[_arrays.ArrayRequest, int]:
        try:
            request = self.reader.read(message)
            if request is None:
                request = self._read_with_protobuf(message)
        except _arrays.ArrayError as error:
            raise BadRequestError(str(error)) from None
        return request, request.rows

    def _read_with_protobuf(self, message: bytes) -> _arrays.ArrayRequest:
        parsed = self._model.parse(message)
        body = getattr(parsed, self._model.message_field)
        pairs = [(pair.key, pair.values) for pair in body.arrays] if self._model is ARRAYS else [("data", body.data)]
        return self.reader.of_payloads(pairs, getattr(body, _ACTION, 0), parsed.keep_rows_axis)

    def warm_up(self) -> None:
        if not self._warms_up:
            return
        numpy = import_numpy()
        request = self._zeros()
        for size in self._batch_sizes:
            begin_ns = time.monotonic_ns()
            arrays = {name: numpy.zeros((size, *array.shape), array.dtype) for name, array in self.declared.items()}
            if self.takes_actions:
                arrays[_ACTION] = numpy.zeros(size, numpy.int32)
            batch = Batch(arrays, size, size, self._published.version, failed_rows={})
            outputs, step = self._outputs(self._function(batch), batch)
            self._encoded([request], outputs, step)
            _logger.info("warmed up with %d rows in %.3f s", size, (time.monotonic_ns() - begin_ns) / 1e9)

    def _zeros(self) -> _arrays.ArrayRequest:
        """Return a request of one row."""
        columns = [bytes(array.row_bytes) for array in self.declared.values()]
        return self.reader.of_rows(columns, 1, bytes(4) if self.takes_actions else None)

    def outcomes_of(self, requests: list[_arrays.ArrayRequest]) -> list[bytes | Failed]:
        self.encoding_ns = 0
        failed_rows: dict[int, BaseException] = {}
        batch = self._gather(requests, failed_rows)
        try:
            result = self._function(batch)
            if (failed := _failed_requests(requests, failed_rows)) and len(failed) == len(requests):
                return [failed[index] for index in range(len(requests))]
            outputs, step = self._outputs(result, batch)
            begin_ns = time.monotonic_ns()
            answers: list[bytes | Failed] = list(self._encoded(requests, outputs, step))
            self.encoding_ns = time.monotonic_ns() - begin_ns
        except BadResultError as error:
            _logger.error("the callback %s", error, exc_info=error.__cause__)
            answers = [Failed(f"the callback {error}")] * len(requests)
        except BaseException as error:  # even SystemExit and KeyboardInterrupt: this is not the main thread
            _logger.exception("the callback raised, so its batch of %d requests fails", len(requests))
            answers = [Failed(f"the callback raised {text_of(error)}")] * len(requests)
        for index, failure in _failed_requests(requests, failed_rows).items():
            answers[index] = failure
        return answers

    def encode(self, answer: bytes) -> bytes:
        return answer  # already a message: the function may use the memory of its results again

    def _gather(self, requests: list[_arrays.ArrayRequest], failed_rows: dict[int, BaseException]) -> Batch:
        """Copy the requests' rows into a batch."""
        numpy = import_numpy()
        count = sum([request.rows for request in requests])
        size = self._batch_sizes[bisect_left(self._batch_sizes, count)]
        arrays = {}
        for index, (name, array) in enumerate(self.declared.items()):
            rows = numpy.frombuffer(self._arenas[index].lend(), array.dtype, size * math.prod(array.shape))
            rows = rows.reshape((size, *array.shape))
            _arrays.gather(requests, index, rows, size)
            arrays[name] = rows
        if self.takes_actions:
            arrays[_ACTION] = numpy.empty(size, numpy.int32)
            _arrays.gather_actions(requests, arrays[_ACTION], size)
        if size > count:
            self._recorder.batch_padded(size - count)
        return Batch(arrays, count, size, self._published.version, failed_rows)

    def _outputs(self, result: Any, batch: Batch) -> tuple[list[_Output], int]:
        """Return what the function returned, ready to be encoded, and the step. Raises BadResultError."""
        step: Any = batch.step
        if isinstance(result, tuple) and len(result) == 2:
            result, returned_step = result
            try:
                step = batch.step if returned_step is None else check_int32("step", returned_step)
            except (TypeError, ValueError) as error:
                raise BadResultError(f"returned a step that cannot be sent: {error}") from None
        if not isinstance(result, Mapping):
            raise BadResultError(
                f"must return a mapping from names to arrays, or a pair of that and a step; it returned a "
                f"{type(result).__name__}"
            )
        outputs: list[_Output] = []
        for name, value in result.items():
            if not isinstance(name, str):
                raise BadResultError(f"must return names that are str; it returned {name!r:.100}")
            try:
                array, dtype = as_array(value)
            except BaseException as error:  # an asynchronous computation may fail only now
                raise BadResultError(
                    f"returned {name!r}, which cannot be sent as an array: {text_of(error)}"
                ) from error
            if array.ndim == 0 or array.shape[0] < batch.count:
                raise BadResultError(
                    f"must return a row for each of the batch's {batch.count}; {name!r} is {dtype} {list(array.shape)}"
                )
            outputs.append((name, array, array.shape[1:], dtype))
        self.outputs_seen = [(name, dtype, shape) for name, _rows, shape, dtype in outputs]
        return outputs, step

    def _encoded(self, requests: list[_arrays.ArrayRequest], outputs: list[_Output], step: int) -> list[bytes]:
        """Return a message per request. Raises BadResultError if that is not possible."""
        try:
            return _arrays.encode_answers(requests, outputs, step)
        except (ValueError, OverflowError) as error:
            raise BadResultError(f"returned arrays that cannot be sent: {error}") from error
        except MemoryError as error:
            raise BadResultError("returned arrays that cannot be sent: there is no memory for the answers") from error


def _failed_requests(
    requests: list[_arrays.ArrayRequest], failed_rows: Mapping[int, BaseException]
) -> dict[int, Failed]:
    """Return the requests that lost a row to `Batch.fail`, by their index."""
    if not failed_rows:
        return {}
    begins = [0, *accumulate([request.rows for request in requests])]
    failed: dict[int, Failed] = {}
    for row, error in sorted(failed_rows.items()):
        index = bisect_right(begins, row) - 1
        which = "this request" if requests[index].rows == 1 else f"row {row - begins[index]} of this request"
        failed.setdefault(index, Failed(f"the callback answered {which} with {text_of(error)}"))
    return failed
