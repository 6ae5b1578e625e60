"""`Batch`: what a callback with declared arrays gets."""

from __future__ import annotations

import operator
from collections.abc import Iterator, Mapping
from typing import Any

from .published import Version


class Batch(Mapping[str, Any]):
    """A batch of requests as arrays: `batch["data"]` is a numpy array of the shape `(size, *shape)`.

    count: rows that callers sent. They come first, in the order of their arrival.
    size: rows of each array: one of `batch_sizes`. The rows after `count` repeat row 0, and what the callback returns
        for them is dropped.
    weights: what was published last when the batch was taken; None before the first `publish`.
    step: the step it was published with, which the answers get unless the callback returns another; 0 before.

    It is a mapping from the declared names; for "dyna", "action" is an int32 array of the shape `(size,)`. The arrays
    are the callback's to keep or to change.
    """

    def __init__(
        self, arrays: dict[str, Any], count: int, size: int, version: Version, failed_rows: dict[int, BaseException]
    ) -> None:
        self.count = count
        self.size = size
        self.weights = version.weights
        self.step = version.step
        self._arrays = arrays
        self._failed_rows = failed_rows

    def fail(self, row: int, exception: BaseException) -> None:
        """Have the request that sent this row end with INTERNAL and the exception's text, whatever is returned for it.

        A request of several rows fails as a whole. Other requests are answered as usual.

        Raises IndexError for a row that nobody sent, and TypeError for what is not an int or an exception.
        """
        row = operator.index(row)
        if not 0 <= row < self.count:
            raise IndexError(f"row is {row}; this batch has rows from 0 to {self.count - 1}")
        if not isinstance(exception, BaseException):
            raise TypeError(f"exception is {exception!r:.100}; it must be an exception")
        self._failed_rows[row] = exception

    def __getitem__(self, name: str) -> Any:
        return self._arrays[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._arrays)

    def __len__(self) -> int:
        return len(self._arrays)

    def __repr__(self) -> str:
        described = ", ".join(f"{name}: {array.dtype} {list(array.shape)}" for name, array in self._arrays.items())
        return f"<Batch of {self.count} rows and {self.size - self.count} more; {described}; step {self.step}>"
