"""Decides whether a long-lived process stayed as it was.

The first fifth of the run, at most 5 minutes, is warm-up and left out. The rest is cut into equal parts, and the last
is compared with the first: the medians of fifths for what a process uses, percentiles of tenths for how long answers
take. Machines are noisy, so the limits are wide; a longer run finds a smaller leak.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from typing import NamedTuple

from grpc_batcher._server.metrics import nearest_rank

MAX_WARM_UP_S = 300.0

# A run this long must have something to compare. In a shorter one memory has not found its level, and is not judged.
JUDGED_FROM_S = 300.0

Series = Sequence[tuple[float, float]]  # (when in s, value)


class Limit(NamedTuple):
    """The last part may be at most `factor` times the first, plus `plus`."""

    factor: float
    plus: float

    def exceeded(self, first: float, last: float) -> bool:
        return last > first * self.factor + self.plus


# memory: glibc keeps freed memory for other sizes. blocks: of Python's allocator; 10 to 100 per request in flight.
RESOURCES = {
    "memory_bytes": Limit(1.2, 16 << 20),
    "blocks": Limit(1.1, 20_000),
    "threads": Limit(1.25, 8),
    "files": Limit(1.25, 16),
}
NO_LIMIT = Limit(math.inf, 0)

# With fewer in a part, as in a run of a few minutes, a single pause of the machine would decide: they are not judged.
MIN_LATENCIES = 1000
LATENCIES_MS = {50: Limit(3, 5), 99: Limit(5, 50)}


class Comparison(NamedTuple):
    name: str
    first: float
    last: float
    limit: Limit

    @property
    def failed(self) -> bool:
        return self.limit.exceeded(self.first, self.last)


def parts(series: Series, begin_s: float, end_s: float, count: int) -> list[list[float]]:
    """The values after the warm-up, in `count` parts of equal time."""
    begin_s += min((end_s - begin_s) / 5, MAX_WARM_UP_S)
    cut: list[list[float]] = [[] for _ in range(count)]
    for at_s, value in series:
        if begin_s <= at_s <= end_s:
            cut[min(int((at_s - begin_s) / (end_s - begin_s) * count), count - 1)].append(value)
    return cut


def compare_use(name: str, series: Series, begin_s: float, end_s: float, limit: Limit) -> Comparison | None:
    """Compare what a process used; None if there is too little to compare."""
    first, *_, last = parts(series, begin_s, end_s, 5)
    if not first or not last:
        return None
    return Comparison(name, statistics.median(first), statistics.median(last), limit)


def compare_latency(series: Series, begin_s: float, end_s: float) -> list[Comparison]:
    first, *_, last = parts(series, begin_s, end_s, 10)
    if not first or not last:
        return []
    first.sort()
    last.sort()
    enough = min(len(first), len(last)) >= MIN_LATENCIES
    return [
        Comparison(f"p{each}", nearest_rank(first, each), nearest_rank(last, each), limit if enough else NO_LIMIT)
        for each, limit in LATENCIES_MS.items()
    ]
