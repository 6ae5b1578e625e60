"""The counts and durations of a batcher: percentiles, histograms, and what a Prometheus scrape returns."""

from __future__ import annotations

import math
import re
import threading
from pathlib import Path
from typing import Any

from grpc_batcher import Histogram, Percentiles
from grpc_batcher._server.metrics import PERCENTILE_WINDOW, Recorder

import pytest
from serving import Held, connect, in_background, in_callback, serving, waiting

PAGE = (Path(__file__).resolve().parent.parent / "docs" / "metrics.md").read_text()

MS = 1_000_000


def recorder(batch_size: int = 8, *, timed: bool = True) -> Recorder:
    return Recorder(timed=timed, batch_size=batch_size)


def snapshot(of: Recorder) -> Any:
    return of.snapshot(
        model="repr",
        batches={"full": 0},
        batched_requests=0,
        batched_rows=0,
        waiting=0,
        waiting_rows=0,
        waiting_bytes=0,
        open_streams=0,
        step=None,
        step_age_s=None,
    )


# ---- percentiles ----


def test_percentiles_are_nearest_rank() -> None:
    of = recorder()
    of.batch_taken(8, [number * MS for number in range(100, 0, -1)])
    for duration_ms in (3, 1, 2):
        of.callback_timed(duration_ms * MS)
    of.request_answered(0, 7 * MS)
    metrics = snapshot(of)
    assert metrics.waiting_percentiles_ms == Percentiles(p50=50, p90=90, p99=99)
    assert metrics.callback_percentiles_ms == (2, 3, 3)
    assert metrics.end_to_end_percentiles_ms == (7, 7, 7)


def test_percentiles_cover_the_last_4096_and_means_everything() -> None:
    assert PERCENTILE_WINDOW == 4096
    of = recorder()
    for _ in range(4096):
        of.request_answered(0, 3 * MS)
    for _ in range(4095):
        of.request_answered(0, 1 * MS)
    assert snapshot(of).end_to_end_percentiles_ms == (1, 1, 1)
    assert snapshot(of).mean_end_to_end_ms == pytest.approx(2, abs=0.001)
    for _ in range(41):
        of.request_answered(0, 5 * MS)
    assert snapshot(of).end_to_end_percentiles_ms == (1, 1, 5)


def test_there_are_no_percentiles_before_anything_is_timed() -> None:
    metrics = snapshot(recorder())
    assert (
        metrics.waiting_percentiles_ms is metrics.callback_percentiles_ms is metrics.end_to_end_percentiles_ms is None
    )


# ---- histograms ----


def test_a_histogram_counts_the_values_up_to_each_bound() -> None:
    of = recorder()
    of.batch_taken(3, [0, MS // 2, MS // 2 + 1, MS, 60_000 * MS, 60_000 * MS + 1])
    histogram = snapshot(of).waiting_histogram_s
    assert histogram.upper_bounds[:3] == (0.0005, 0.001, 0.0025)
    assert histogram.upper_bounds[-2:] == (60, math.inf)
    assert histogram.counts[:3] == (2, 4, 4)
    assert histogram.counts[-2:] == (5, 6)
    assert histogram.sum == pytest.approx(120.002, abs=1e-5)


@pytest.mark.parametrize(
    ("batch_size", "bounds"),
    [(1, (1,)), (2, (1, 2)), (5, (1, 2, 4, 5)), (16, (1, 2, 4, 8, 16)), (2**20, tuple(2**n for n in range(21)))],
)
def test_batch_sizes_are_counted_by_powers_of_two_up_to_the_batch_size(batch_size: int, bounds: Any) -> None:
    of = recorder(batch_size)
    for size in (1, batch_size):
        of.batch_taken(size, ())
    sizes = snapshot(of).batch_sizes
    assert sizes.upper_bounds == (*bounds, math.inf)
    assert sizes.counts[0] == (2 if batch_size == 1 else 1)
    assert sizes.counts[-2:] == (2, 2)
    assert sizes.sum == 1 + batch_size


def test_nothing_that_many_threads_record_is_lost() -> None:
    of = recorder()
    begin = threading.Barrier(8)

    def record() -> None:
        begin.wait()
        for _ in range(2000):
            of.request_answered(1, MS)
            of.batch_taken(1, (MS,))

    threads = [in_background(record) for _ in range(8)]
    for thread in threads:
        thread.result()
    metrics = snapshot(of)
    assert metrics.requests == {"OK": 16_000}
    for histogram in (metrics.end_to_end_histogram_s, metrics.waiting_histogram_s, metrics.batch_sizes):
        assert histogram.counts[-1] == 16_000


# ---- the metrics of a batcher ----


def test_each_request_and_each_batch_is_in_the_histograms() -> None:
    with Held() as held, serving(held, batch_size=4) as batcher, connect(batcher) as client:
        requests = [in_callback(held, client, b"first")]
        requests += [waiting(batcher, client.send_request, b"%d" % number) for number in range(3)]
        assert batcher.metrics().batch_sizes == Histogram((1, 2, 4, math.inf), (1, 1, 1, 1), 1)
        held.release(2)
        for request in requests:
            request.result()
        metrics = batcher.metrics()
        assert metrics.batch_sizes == Histogram((1, 2, 4, math.inf), (1, 1, 2, 2), 4)
        counts = [
            histogram and histogram.counts[-1]
            for histogram in (
                metrics.waiting_histogram_s,
                metrics.callback_histogram_s,
                metrics.end_to_end_histogram_s,
            )
        ]
        assert counts == [4, 2, 4]
        waits, totals = metrics.waiting_percentiles_ms, metrics.end_to_end_percentiles_ms
        assert waits is not None
        assert totals is not None
        assert 0 <= waits.p50 <= waits.p90 <= waits.p99 <= totals.p99


def test_without_track_metrics_batch_sizes_are_counted_and_durations_are_not() -> None:
    with serving(track_metrics=False, batch_size=2) as batcher, connect(batcher) as client:
        client.send_request(b"x")
        metrics = batcher.metrics()
        assert metrics.batch_sizes == Histogram((1, 2, math.inf), (1, 1, 1), 1)
        assert metrics.waiting_histogram_s is metrics.callback_histogram_s is metrics.end_to_end_histogram_s is None


# ---- Prometheus ----


def scraped(*batchers: Any) -> dict[str, Any]:
    """Return the families that a scrape returns, by name, as a Prometheus server reads them."""
    prometheus_client = pytest.importorskip("prometheus_client")
    from grpc_batcher.prometheus import BatcherCollector

    from prometheus_client.parser import text_string_to_metric_families

    registry = prometheus_client.CollectorRegistry()
    registry.register(BatcherCollector(*batchers))
    text = prometheus_client.generate_latest(registry).decode()
    return {family.name: family for family in text_string_to_metric_families(text)}


def values(family: Any, label: str = "port") -> dict[tuple[str, str], float]:
    return {(sample.name, sample.labels[label]): sample.value for sample in family.samples}


def coded(family: Any) -> dict[tuple[str, str], float]:
    return {(sample.labels["port"], sample.labels["code"]): sample.value for sample in family.samples}


def test_a_scrape_labels_the_counts_of_each_batcher_with_its_model_and_port() -> None:
    with (
        Held() as held,
        serving(held, batch_size=2) as first,
        serving(model="dyna") as second,
        connect(first) as client,
        connect(second) as other,
    ):
        held.release()
        client.send_request(b"answered")
        other.send_request(b"answered", 3)
        requests = [in_callback(held, client, b"in the callback")]
        requests += [waiting(first, client.send_request, b"waits")]
        families = scraped(first, second)
        port, other_port = str(first.port), str(second.port)
        answered = {key: count for key, count in coded(families["grpc_batcher_requests"]).items() if count}
        assert answered == {(port, "OK"): 1, (other_port, "OK"): 1}
        assert {sample.labels["model"] for sample in families["grpc_batcher_requests"].samples} == {"repr", "dyna"}
        batches = families["grpc_batcher_batches"].samples
        assert sum(sample.value for sample in batches if sample.labels["port"] == port) == 2
        sizes = values(families["grpc_batcher_batch_size"])
        assert sizes["grpc_batcher_batch_size_count", port] == sizes["grpc_batcher_batch_size_sum", port] == 2
        waits = values(families["grpc_batcher_waiting_seconds"])
        assert waits["grpc_batcher_waiting_seconds_count", port] == 2
        assert waits["grpc_batcher_waiting_seconds_sum", port] > 0
        for gauge, value, other_value in (
            ("waiting_requests", 1, 0),
            ("waiting_bytes", 4 + len(b"waits"), 0),
            ("open_streams", 2, 1),
            ("ready", 1, 1),
        ):
            name = f"grpc_batcher_{gauge}"
            assert values(families[name]) == {(name, port): value, (name, other_port): other_value}
        held.release(2)
        for request in requests:
            request.result()
    assert set(values(scraped(first)["grpc_batcher_ready"]).values()) == {0}


def test_every_outcome_has_a_count_of_0_before_the_first_request() -> None:
    """Prometheus' rate() misses the first increase of a count that has no earlier sample."""
    with serving() as batcher:
        counts = coded(scraped(batcher)["grpc_batcher_requests"])
        assert set(counts.values()) == {0}
        assert {code for _port, code in counts} == {
            "OK",
            "CANCELLED",
            "DEADLINE_EXCEEDED",
            "INTERNAL",
            "INVALID_ARGUMENT",
            "RESOURCE_EXHAUSTED",
            "UNAVAILABLE",
        }


def test_the_port_label_of_a_batcher_on_a_unix_socket_is_its_address(tmp_path: Path) -> None:
    with serving(host=f"unix:{tmp_path}/batcher.sock") as batcher:
        (sample,) = scraped(batcher)["grpc_batcher_ready"].samples
        assert sample.labels == {"model": "repr", "port": f"unix:{tmp_path}/batcher.sock"}


def test_without_track_metrics_a_scrape_has_no_durations() -> None:
    with serving(track_metrics=False) as batcher:
        families = scraped(batcher)
    assert families["grpc_batcher_batch_size"].samples
    assert not [name for name, family in families.items() if name.endswith("_seconds") and family.samples]


def test_a_collector_without_a_batcher_is_refused() -> None:
    pytest.importorskip("prometheus_client")
    from grpc_batcher.prometheus import BatcherCollector

    with pytest.raises(ValueError, match="no batcher was given"):
        BatcherCollector()


# ---- docs/metrics.md ----


def test_the_page_lists_exactly_the_metrics_of_a_scrape_with_their_types_and_labels() -> None:
    with serving() as batcher, connect(batcher) as client:
        batcher.publish("weights", step=1)  # or two of them have no sample
        client.send_request(b"x")
        families = scraped(batcher)
    given = {}
    for family in families.values():
        name = f"{family.name}_total" if family.type == "counter" else family.name
        labels = {label for sample in family.samples for label in sample.labels}
        assert labels >= {"model", "port"}
        given[name] = (family.type, labels - {"model", "port", "le"})
    table = re.findall(r"^\| `(\w+)` \| (\w+) \| (?:`(\w+)` )?\|", PAGE, re.MULTILINE)
    assert {name: (kind, {label} - {""}) for name, kind, label in table} == given
    assert len(table) == len(given)


def test_the_rules_of_the_page_name_metrics_that_exist() -> None:
    with serving() as batcher:
        families = scraped(batcher)
    samples = {sample.name for family in families.values() for sample in family.samples} | set(families)
    named = set(re.findall(r"\bgrpc_batcher_\w+", PAGE))
    assert named <= samples
