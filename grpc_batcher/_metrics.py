"""What a batcher counted: a frozen snapshot, and the recorder that it is taken from."""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType


@dataclass(frozen=True)
class Metrics:
    """A batcher's counters at one moment, since it started.

    model: "repr", "dyna" or another kind that is served.
    requests: finished requests by the name of their gRPC status; "OK" for those answered.
    batches: batches given to the callback, by the reason for which they were taken (see WaitingRoom).
    batched_requests: requests in all those batches.
    waiting: requests that wait for a batch now.
    open_streams: callers' streams that are open now.
    mean_batch_size: requests a batch.
    mean_waiting_ms: from arrival until the batch was taken, a request.
    mean_callback_ms: the callback's duration, a batch.
    mean_encoding_ms: making the reply's message, a request.
    mean_end_to_end_ms: from arrival until the reply is handed to gRPC, a request.

    Means are None where nothing was counted yet, and the times also with `track_metrics=False`.
    """

    model: str
    requests: Mapping[str, int]
    batches: Mapping[str, int]
    batched_requests: int
    waiting: int
    open_streams: int
    mean_batch_size: float | None
    mean_waiting_ms: float | None
    mean_callback_ms: float | None
    mean_encoding_ms: float | None
    mean_end_to_end_ms: float | None


class Recorder:
    """Adds up counts and times; any thread may call it.

    timed: whether the callers should look at the clock at all.
    """

    def __init__(self, *, timed: bool) -> None:
        self.timed = timed
        self._lock = threading.Lock()
        self._requests: Counter[str] = Counter()
        self._timed_batches = 0
        self._timed_requests = 0
        self._timed_replies = 0
        self._waiting_ns = 0
        self._callback_ns = 0
        self._encoding_ns = 0
        self._end_to_end_ns = 0

    def batch_timed(self, size: int, waiting_ns: int, callback_ns: int) -> None:
        """waiting_ns: of all the batch's requests together."""
        with self._lock:
            self._timed_batches += 1
            self._timed_requests += size
            self._waiting_ns += waiting_ns
            self._callback_ns += callback_ns

    def reply_timed(self, encoding_ns: int, end_to_end_ns: int) -> None:
        with self._lock:
            self._timed_replies += 1
            self._encoding_ns += encoding_ns
            self._end_to_end_ns += end_to_end_ns

    def request_ended(self, status: str) -> None:
        with self._lock:
            self._requests[status] += 1

    def snapshot(
        self, *, model: str, batches: Mapping[str, int], batched_requests: int, waiting: int, open_streams: int
    ) -> Metrics:
        with self._lock:
            return Metrics(
                model=model,
                requests=MappingProxyType(dict(self._requests)),
                batches=MappingProxyType(dict(batches)),
                batched_requests=batched_requests,
                waiting=waiting,
                open_streams=open_streams,
                mean_batch_size=_mean(batched_requests, sum(batches.values())),
                mean_waiting_ms=_mean(self._waiting_ns / 1e6, self._timed_requests),
                mean_callback_ms=_mean(self._callback_ns / 1e6, self._timed_batches),
                mean_encoding_ms=_mean(self._encoding_ns / 1e6, self._timed_replies),
                mean_end_to_end_ms=_mean(self._end_to_end_ns / 1e6, self._timed_replies),
            )


def summary(metrics: Metrics, *, timed: bool) -> str:
    """A snapshot as a few lines for people."""
    requests = ", ".join(f"{count} {status}" for status, count in sorted(metrics.requests.items())) or "none"
    batches = ", ".join(f"{count} {reason}" for reason, count in metrics.batches.items())
    lines = [
        f"Batcher for {metrics.model!r}",
        f"  requests ended:   {requests}",
        f"  batches taken:    {sum(metrics.batches.values())} ({batches})",
        f"  mean batch size:  {_show(metrics.mean_batch_size)}",
    ]
    if timed:
        lines += [
            "  mean time in ms",
            f"    waiting:        {_show(metrics.mean_waiting_ms)}",
            f"    callback:       {_show(metrics.mean_callback_ms)} a batch",
            f"    encoding:       {_show(metrics.mean_encoding_ms)}",
            f"    end to end:     {_show(metrics.mean_end_to_end_ms)}",
        ]
    else:
        lines.append("  nothing was timed: track_metrics is False")
    return "\n".join(lines)


def _mean(total: float, count: int) -> float | None:
    return total / count if count else None


def _show(value: float | None) -> str:
    return "-" if value is None else f"{value:.3f}"
