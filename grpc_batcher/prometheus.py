"""A batcher's metrics for Prometheus. Needs the extra: pip install "grpc-batcher[prometheus]".

prometheus_client.REGISTRY.register(BatcherCollector(batcher))
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator, Sequence
from typing import TYPE_CHECKING

try:
    from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily, Metric
    from prometheus_client.registry import Collector
    from prometheus_client.utils import floatToGoString
except ImportError as error:
    raise ImportError(
        "grpc_batcher.prometheus needs prometheus-client, which cannot be imported here: "
        'pip install "grpc-batcher[prometheus]"'
    ) from error

from ._contract import is_unix_socket
from ._server.batcher import MukoeBatcher
from ._server.metrics import Histogram, Metrics

if TYPE_CHECKING:
    from .ray import Replicas

__all__ = ["BatcherCollector", "ReplicasCollector"]

_logger = logging.getLogger("grpc_batcher")

_LABELS = ("model", "port")
_REPLICA_LABELS = ("model", "replica")

# The codes that a batcher ends requests with.
_CODES = (
    "OK",
    "CANCELLED",
    "DEADLINE_EXCEEDED",
    "INTERNAL",
    "INVALID_ARGUMENT",
    "RESOURCE_EXHAUSTED",
    "UNAVAILABLE",
)


class BatcherCollector(Collector):
    """Gives a Prometheus registry the metrics of batchers, as they are at each scrape.

    batchers: one or more. Give one collector all batchers of a process: a registry accepts each metric's name once.

    Each sample has the labels `model` and `port`; for a batcher on a unix socket, `port` is its address.
    docs/metrics.md lists the metrics. Raises ValueError if no batcher is given.
    """

    def __init__(self, *batchers: MukoeBatcher) -> None:
        if not batchers:
            raise ValueError("no batcher was given; BatcherCollector takes one or more")
        self._batchers = batchers

    def collect(self) -> Iterator[Metric]:
        """Return the metrics as they are now; a registry calls it."""
        return _families(
            _LABELS,
            (
                ((metrics.model, _port_of(batcher)), metrics, batcher.is_server_ready())
                for batcher in self._batchers
                for metrics in [batcher.metrics()]
            ),
        )


class ReplicasCollector(Collector):
    """Gives a Prometheus registry the metrics of all replicas of `grpc_batcher.ray`, as they are at each scrape.

    replicas: what `launch` or `connect` returned.

    Each sample has the labels `model` and `replica`, which is the replica's number. A replica that is being restarted
    has no samples, and its counters then start at 0, as in any new process. After the replicas were shut down, or this
    process has left Ray, there are no samples at all.
    """

    def __init__(self, replicas: Replicas) -> None:
        self._replicas = replicas

    def collect(self) -> Iterator[Metric]:
        """Return the metrics as they are now; a registry calls it."""
        import ray  # whoever has replicas has it

        found: dict[str, Metrics] = {}
        if ray.is_initialized():  # otherwise Ray would start anew
            try:
                found = self._replicas.metrics()
            except ray.exceptions.RayActorError as error:  # one collector that raises would fail the whole page
                _logger.debug("%r cannot tell their metrics: %s", self._replicas, error)
        return _families(
            _REPLICA_LABELS, (((metrics.model, number), metrics, True) for number, metrics in found.items())
        )


def _families(label_names: Sequence[str], samples: Iterable[tuple[tuple[str, ...], Metrics, bool]]) -> Iterator[Metric]:
    """Return the metrics of several batchers. A sample is the batcher's labels, its counters, and whether it serves."""
    requests = CounterMetricFamily(
        "grpc_batcher_requests", "Requests that ended, by the name of their gRPC status.", labels=(*label_names, "code")
    )
    batches = CounterMetricFamily(
        "grpc_batcher_batches", "Batches taken, by the reason they left.", labels=(*label_names, "reason")
    )
    sizes = HistogramMetricFamily("grpc_batcher_batch_size", "Rows of a batch, without padding.", labels=label_names)
    padded = CounterMetricFamily(
        "grpc_batcher_padded_rows",
        "Rows added to batches of arrays, to make them as large as allowed.",
        labels=label_names,
    )
    waits = HistogramMetricFamily(
        "grpc_batcher_waiting_seconds", "From a request's arrival until its batch was taken.", labels=label_names
    )
    callbacks = HistogramMetricFamily(
        "grpc_batcher_callback_seconds", "How long the callback took, per batch.", labels=label_names
    )
    totals = HistogramMetricFamily(
        "grpc_batcher_end_to_end_seconds",
        "From a request's arrival until its reply is handed to gRPC.",
        labels=label_names,
    )
    waiting = GaugeMetricFamily("grpc_batcher_waiting_requests", "Requests waiting for a batch.", labels=label_names)
    waiting_rows = GaugeMetricFamily(
        "grpc_batcher_waiting_rows", "Rows of the requests waiting for a batch.", labels=label_names
    )
    waiting_bytes = GaugeMetricFamily(
        "grpc_batcher_waiting_bytes", "Bytes of the requests waiting for a batch.", labels=label_names
    )
    streams = GaugeMetricFamily("grpc_batcher_open_streams", "Callers' streams that are open.", labels=label_names)
    step = GaugeMetricFamily("grpc_batcher_step", "The step of the weights published last.", labels=label_names)
    step_age = GaugeMetricFamily("grpc_batcher_step_age_seconds", "Time since they were published.", labels=label_names)
    ready = GaugeMetricFamily("grpc_batcher_ready", "1 while the batcher is serving, else 0.", labels=label_names)
    for labels, metrics, is_ready in samples:
        # Prometheus' rate() misses the first count of a code that has no earlier sample.
        for code, count in (dict.fromkeys(_CODES, 0) | dict(metrics.requests)).items():
            requests.add_metric((*labels, code), count)
        for reason, count in metrics.batches.items():
            batches.add_metric((*labels, reason), count)
        _add(sizes, labels, metrics.batch_sizes)
        padded.add_metric(labels, metrics.padded_rows)
        _add(waits, labels, metrics.waiting_histogram_s)
        _add(callbacks, labels, metrics.callback_histogram_s)
        _add(totals, labels, metrics.end_to_end_histogram_s)
        waiting.add_metric(labels, metrics.waiting)
        waiting_rows.add_metric(labels, metrics.waiting_rows)
        waiting_bytes.add_metric(labels, metrics.waiting_bytes)
        streams.add_metric(labels, metrics.open_streams)
        if metrics.step is not None and metrics.step_age_s is not None:
            step.add_metric(labels, metrics.step)
            step_age.add_metric(labels, metrics.step_age_s)
        ready.add_metric(labels, is_ready)
    yield from (requests, batches, sizes, padded, waits, callbacks, totals)
    yield from (waiting, waiting_rows, waiting_bytes, streams, step, step_age, ready)


def _port_of(batcher: MukoeBatcher) -> str:
    return batcher.address if is_unix_socket(batcher.address) else str(batcher.port)


def _add(family: HistogramMetricFamily, labels: Sequence[str], histogram: Histogram | None) -> None:
    if histogram is not None:
        bounds = map(floatToGoString, histogram.upper_bounds)
        family.add_metric(labels, list(zip(bounds, histogram.counts, strict=True)), histogram.sum)
