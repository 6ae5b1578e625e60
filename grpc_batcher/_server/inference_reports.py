"""What Triton's tools ask of a model besides the protocol: its configuration, and its statistics."""

from __future__ import annotations

from collections.abc import Sequence

from .._proto import open_inference_pb2 as messages
from .metrics import Histogram, Metrics

PLATFORM = "grpc_batcher"

_Tensors = Sequence[messages.ModelMetadataResponse.TensorMetadata]


def configuration(
    name: str, inputs: _Tensors, outputs: _Tensors, *, batch_size: int, window_ns: int
) -> messages.ModelConfig:
    """Describe a model as Triton's configuration of one that it batches; shapes are of a row there.

    inputs, outputs: as the model's metadata has them, with an axis of rows.
    window_ns: how long the oldest request waits for others.
    """
    config = messages.ModelConfig(name=name, platform=PLATFORM, backend=PLATFORM, max_batch_size=batch_size)
    config.dynamic_batching.max_queue_delay_microseconds = window_ns // 1000
    for tensor in inputs:
        config.input.add(name=tensor.name, data_type=f"TYPE_{tensor.datatype}", dims=tensor.shape[1:])
    for tensor in outputs:
        config.output.add(name=tensor.name, data_type=f"TYPE_{tensor.datatype}", dims=tensor.shape[1:])
    return config


def statistics(name: str, version: str, metrics: Metrics) -> messages.ModelStatistics:
    """Return what was counted since the start, for all callers. Durations are 0 without `track_metrics`.

    Triton's `queue` is the wait for a batch, counted per request, and its `compute_infer` the callback, counted per
    batch. The callback's time includes that of its inputs and outputs.
    """
    answered = metrics.requests.get("OK", 0)
    batches = sum(metrics.batches.values())
    return messages.ModelStatistics(
        name=name,
        version=version,
        inference_count=metrics.batched_rows,
        execution_count=batches,
        inference_stats=messages.InferStatistics(
            success=messages.StatisticDuration(count=answered, ns=_sum_ns(metrics.end_to_end_histogram_s)),
            fail=messages.StatisticDuration(count=sum(metrics.requests.values()) - answered),
            queue=messages.StatisticDuration(count=metrics.batched_requests, ns=_sum_ns(metrics.waiting_histogram_s)),
            compute_input=messages.StatisticDuration(count=batches),
            compute_infer=messages.StatisticDuration(count=batches, ns=_sum_ns(metrics.callback_histogram_s)),
            compute_output=messages.StatisticDuration(count=batches),
        ),
    )


def _sum_ns(histogram: Histogram | None) -> int:
    return 0 if histogram is None else round(histogram.sum * 1e9)
