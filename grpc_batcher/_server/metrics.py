"""What a batcher counts: the recorder, and the frozen snapshot taken from it."""

from __future__ import annotations

import math
import threading
from bisect import bisect_left
from collections import Counter, deque
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate
from types import MappingProxyType
from typing import NamedTuple

# Percentiles cover this many of the latest requests, or batches.
PERCENTILE_WINDOW = 4096

# Upper bounds of the duration histograms, in ns: half a millisecond to a minute.
_BOUNDS_NS = tuple(
    int(bound_ms * 1e6)
    for bound_ms in (0.5, 1, 2.5, 5, 10, 25, 50, 100, 250, 500, 1000, 2500, 5000, 10_000, 30_000, 60_000)
)


class Percentiles(NamedTuple):
    """Nearest-rank percentiles."""

    p50: float
    p90: float
    p99: float


@dataclass(frozen=True)
class Histogram:
    """The distribution of all values since the start.

    upper_bounds: ascending; the last is infinity.
    counts: for each bound, how many values did not exceed it; the last is the number of all values.
    sum: the sum of all values.
    """

    upper_bounds: tuple[float, ...]
    counts: tuple[int, ...]
    sum: float


@dataclass(frozen=True)
class Metrics:
    """A batcher's counters at one moment, since it started.

    model: the kind of request that is served, such as "repr" or "dyna".
    requests: requests that have ended, by the name of their gRPC status; "OK" for those answered.
    batches: batches given to the callback, by the reason they left (see WaitingRoom).
    batched_requests: requests in all those batches.
    batched_rows: rows of those requests. A request has one row unless a caller of arrays sends several.
    padded_rows: rows that were added to batches of arrays, to make them as large as one of `batch_sizes`.
    waiting: requests waiting for a batch now.
    waiting_rows: their rows, which `max_queue_size` limits.
    waiting_bytes: bytes of their messages.
    open_streams: callers' streams open now.
    step: the step of the weights that were published last; None before the first `publish`.
    step_age_s: how long ago that was, in seconds.
    mean_batch_size: rows per batch.
    mean_waiting_ms: per request, from its arrival until its batch was taken.
    mean_callback_ms: per batch, how long the callback took. With arrays, that includes copying the requests' rows into
        them, and waiting for the results of an asynchronous framework.
    mean_encoding_ms: per request, how long encoding the reply took.
    mean_end_to_end_ms: per request, from its arrival until its reply was handed to gRPC.
    waiting_percentiles_ms, callback_percentiles_ms, end_to_end_percentiles_ms: p50, p90 and p99 of the same durations,
        over the last 4,096 of each.
    batch_sizes: how many rows the batches had, without padding.
    waiting_histogram_s, callback_histogram_s, end_to_end_histogram_s: the same durations, in seconds.

    Means and percentiles are None until something was counted, and durations are None with `track_metrics=False`.
    """

    model: str
    requests: Mapping[str, int]
    batches: Mapping[str, int]
    batched_requests: int
    batched_rows: int
    padded_rows: int
    waiting: int
    waiting_rows: int
    waiting_bytes: int
    open_streams: int
    step: int | None
    step_age_s: float | None
    mean_batch_size: float | None
    mean_waiting_ms: float | None
    mean_callback_ms: float | None
    mean_encoding_ms: float | None
    mean_end_to_end_ms: float | None
    waiting_percentiles_ms: Percentiles | None
    callback_percentiles_ms: Percentiles | None
    end_to_end_percentiles_ms: Percentiles | None
    batch_sizes: Histogram
    waiting_histogram_s: Histogram | None
    callback_histogram_s: Histogram | None
    end_to_end_histogram_s: Histogram | None


class _Times:
    """Durations of one kind. Guarded by the recorder's lock."""

    def __init__(self) -> None:
        self.sum_ns = 0
        self.counts = [0] * (len(_BOUNDS_NS) + 1)  # not cumulative: readers add up
        self.last_ns: deque[int] = deque(maxlen=PERCENTILE_WINDOW)

    def add(self, duration_ns: int) -> None:
        self.sum_ns += duration_ns
        self.counts[bisect_left(_BOUNDS_NS, duration_ns)] += 1
        self.last_ns.append(duration_ns)

    def copy(self) -> _Times:
        copy = _Times()
        copy.sum_ns, copy.counts, copy.last_ns = self.sum_ns, self.counts.copy(), self.last_ns.copy()
        return copy

    def mean_ms(self) -> float | None:
        return _mean(self.sum_ns / 1e6, sum(self.counts))

    def percentiles_ms(self) -> Percentiles | None:
        if not self.last_ns:
            return None
        ordered = sorted(self.last_ns)
        return Percentiles(*(nearest_rank(ordered, percent) / 1e6 for percent in (50, 90, 99)))

    def histogram_s(self) -> Histogram:
        return _histogram([bound_ns / 1e9 for bound_ns in _BOUNDS_NS], self.counts, self.sum_ns / 1e9)


class Recorder:
    """Adds up counts and durations. Any thread may call it, even from a signal handler.

    timed: whether callers should look at the clock at all.
    batch_size: the size of a full batch.
    """

    def __init__(self, *, timed: bool, batch_size: int) -> None:
        self.timed = timed
        self._lock = threading.RLock()  # a signal handler may interrupt a thread that holds it, and call shutdown
        self._requests: Counter[str] = Counter()
        self._size_bounds = (*(2**power for power in range((batch_size - 1).bit_length())), batch_size)
        self._size_counts = [0] * (len(self._size_bounds) + 1)
        self._size_sum = 0
        self._padded_rows = 0
        self._waiting = _Times()
        self._callback = _Times()
        self._end_to_end = _Times()
        self._encoding_ns = 0

    def batch_taken(self, size: int, waits_ns: Iterable[int]) -> None:
        """size: its rows. waits_ns: how long each of its requests waited; empty if not timed."""
        with self._lock:
            self._size_counts[bisect_left(self._size_bounds, size)] += 1
            self._size_sum += size
            for wait_ns in waits_ns:
                self._waiting.add(wait_ns)

    def batch_padded(self, rows: int) -> None:
        with self._lock:
            self._padded_rows += rows

    def callback_timed(self, duration_ns: int, encoding_ns: int = 0) -> None:
        """encoding_ns: how long encoding the whole batch's replies took after that."""
        with self._lock:
            self._callback.add(duration_ns)
            self._encoding_ns += encoding_ns

    def request_answered(self, encoding_ns: int, end_to_end_ns: int) -> None:
        """The durations are ignored unless `timed`."""
        with self._lock:
            self._requests["OK"] += 1
            if self.timed:
                self._encoding_ns += encoding_ns
                self._end_to_end.add(end_to_end_ns)

    def request_failed(self, status: str) -> None:
        with self._lock:
            self._requests[status] += 1

    def snapshot(
        self,
        *,
        model: str,
        batches: Mapping[str, int],
        batched_requests: int,
        batched_rows: int,
        waiting: int,
        waiting_rows: int,
        waiting_bytes: int,
        open_streams: int,
        step: int | None,
        step_age_s: float | None,
    ) -> Metrics:
        with self._lock:  # only to copy: the hot path waits for it
            requests = dict(self._requests)
            batch_sizes = _histogram(self._size_bounds, self._size_counts, self._size_sum)
            padded_rows = self._padded_rows
            encoding_ns = self._encoding_ns
            waits, callbacks, totals = self._waiting.copy(), self._callback.copy(), self._end_to_end.copy()
        return Metrics(
            model=model,
            requests=MappingProxyType(requests),
            batches=MappingProxyType(dict(batches)),
            batched_requests=batched_requests,
            batched_rows=batched_rows,
            padded_rows=padded_rows,
            waiting=waiting,
            waiting_rows=waiting_rows,
            waiting_bytes=waiting_bytes,
            open_streams=open_streams,
            step=step,
            step_age_s=step_age_s,
            mean_batch_size=_mean(batched_rows, sum(batches.values())),
            mean_waiting_ms=waits.mean_ms(),
            mean_callback_ms=callbacks.mean_ms(),
            mean_encoding_ms=_mean(encoding_ns / 1e6, sum(totals.counts)),
            mean_end_to_end_ms=totals.mean_ms(),
            waiting_percentiles_ms=waits.percentiles_ms(),
            callback_percentiles_ms=callbacks.percentiles_ms(),
            end_to_end_percentiles_ms=totals.percentiles_ms(),
            batch_sizes=batch_sizes,
            waiting_histogram_s=waits.histogram_s() if self.timed else None,
            callback_histogram_s=callbacks.histogram_s() if self.timed else None,
            end_to_end_histogram_s=totals.histogram_s() if self.timed else None,
        )


def summary(metrics: Metrics, *, timed: bool) -> str:
    """Return a snapshot as a few lines for people to read."""
    requests = ", ".join(f"{count} {status}" for status, count in sorted(metrics.requests.items())) or "none"
    batches = ", ".join(f"{count} {reason}" for reason, count in metrics.batches.items())
    lines = [
        f"Batcher for {metrics.model!r}",
        f"  requests ended:   {requests}",
        f"  batches taken:    {sum(metrics.batches.values())} ({batches})",
        f"  mean batch size:  {_show(metrics.mean_batch_size)}",
    ]
    if metrics.padded_rows:
        lines.append(f"  padded rows:      {metrics.padded_rows}, added to {metrics.batched_rows} requested rows")
    if metrics.step is not None:
        lines.append(f"  step:             {metrics.step}, published {metrics.step_age_s:.1f} s ago")
    if timed:
        lines += [
            "  mean time in ms   (p50, p90 and p99 of the latest)",
            f"    waiting:        {_show(metrics.mean_waiting_ms, metrics.waiting_percentiles_ms)}",
            f"    callback:       {_show(metrics.mean_callback_ms, metrics.callback_percentiles_ms)} per batch",
            f"    encoding:       {_show(metrics.mean_encoding_ms)}",
            f"    end to end:     {_show(metrics.mean_end_to_end_ms, metrics.end_to_end_percentiles_ms)}",
        ]
    else:
        lines.append("  durations were not measured: track_metrics is False")
    return "\n".join(lines)


def nearest_rank(ordered: Sequence[float], percent: float) -> float:
    """Return the smallest value that at least `percent` % of the values do not exceed.

    ordered: ascending, and not empty.
    """
    return ordered[max(0, math.ceil(len(ordered) * percent / 100) - 1)]


def _mean(total: float, count: int) -> float | None:
    return total / count if count else None


def _histogram(bounds: Sequence[float], counts: Iterable[int], total: float) -> Histogram:
    return Histogram((*bounds, math.inf), tuple(accumulate(counts)), total)


def _show(mean: float | None, percentiles: Percentiles | None = None) -> str:
    if mean is None:
        return "-"
    if percentiles is None:
        return f"{mean:.3f}"
    return f"{mean:.3f} ({', '.join(f'{value:.3f}' for value in percentiles)})"
