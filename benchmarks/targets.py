"""The comparisons and their targets: ratios of medians within one run, and a few plain values."""

from __future__ import annotations

from dataclasses import dataclass

from array_kinds import ARRAYS, BLIND, BY_HAND, DTYPES
from rows import actors, arrays, in_flight, open_inference
from rows.first_request import UNBATCHED
from rows.streams import EACH
from rows.throughput import SIZES
from systems import CALLS, CPP, DIRECT, INFERENCE, MOSEC, MOSEC_SOCKET, PUBLIC, PYTRITON, STREAMS


@dataclass(frozen=True)
class Of:
    """A value of a cell."""

    key: str
    value: str = "requests_per_s"


@dataclass(frozen=True)
class Target:
    """A comparison. Without a limit it has no target and is there for information.

    row: the row it is shown under.
    over: the value to judge, divided by `under` if given.
    """

    row: str
    title: str
    over: Of
    under: Of | None = None
    at_least: float | None = None
    below: float | None = None

    @property
    def text(self) -> str:
        if self.at_least is not None:
            return f">= {self.at_least:.3g}"
        return "" if self.below is None else f"< {self.below:.3g}"

    def is_met(self, value: float) -> bool | None:
        if self.at_least is not None:
            return value >= self.at_least
        return None if self.below is None else value < self.below


# Throughput with 16 callers: how many times that of each other system the direct transport should reach.
_THROUGHPUT: dict[str, tuple[str, dict[int, float]]] = {
    PUBLIC: ("the public transport", {64: 2.2}),
    STREAMS: ("plain grpcio, persistent streams", {64: 2.3, 110_592: 1.9, 884_736: 1.3}),
    CALLS: ("plain grpcio, a call per request", {64: 10}),
    CPP: ("C++ echo", {64: 0.8, 110_592: 0.8, 884_736: 0.8}),
    MOSEC: ("mosec", {64: 2.2}),
    MOSEC_SOCKET: ("mosec, bare socket", {64: 0.8}),
}

# Arrays: how many times the throughput of array work by hand, and of no array work, by the bytes of a request.
_ARRAYS = {
    BY_HAND: {110_592: 1.15, 884_736: 1.4},
    BLIND: {110_592: 0.9, 884_736: 0.85},
}

TARGETS = [
    *(
        Target(
            "throughput",
            f"{size:,} B: direct transport / {title}",
            Of(f"throughput/{size}/{DIRECT}"),
            Of(f"throughput/{size}/{name}"),
            at_least=at_least.get(size),
        )
        for size in SIZES
        for name, (title, at_least) in _THROUGHPUT.items()
    ),
    Target(
        "few_callers",
        "a lone caller: direct transport / the same waiting for the window",
        Of(f"few/1/answer/{DIRECT}"),
        Of(f"few/window/{DIRECT}"),
        at_least=15,
    ),
    *(
        Target(
            "few_callers",
            f"{who}: direct transport / plain grpcio, persistent streams",
            Of(f"few/{count}/answer/{DIRECT}"),
            Of(f"few/{count}/answer/{STREAMS}"),
            at_least=at_least,
        )
        for count, who, at_least in ((1, "a lone caller", 1.45), (8, "eight callers", None))
    ),
    *(
        Target(
            "few_callers",
            f"{who}{callback_title}: direct transport / public transport",
            Of(f"few/{count}/{callback}/{DIRECT}"),
            Of(f"few/{count}/{callback}/{PUBLIC}"),
        )
        for callback, callback_title in (("answer", ""), ("native", ", 2 ms callback"))
        for count, who in ((1, "a lone caller"), (8, "eight callers"))
    ),
    Target(
        "streams",
        "1,024 streams / 16, direct transport",
        Of(f"streams/1024/{DIRECT}"),
        Of(f"streams/16/{DIRECT}"),
        at_least=0.8,
    ),
    Target(
        "streams",
        "memory of the server per open stream at 1,024, direct transport, in KiB",
        Of(f"streams/1024/{DIRECT}", "stream_kib"),
        below=100,
    ),
    Target(
        "streams",
        "the same with a connection per stream",
        Of(f"streams/1024/{EACH}", "stream_kib"),
    ),
    Target(
        "idle",
        "64 B: server CPU per request, in us",
        Of(f"throughput/64/{DIRECT}", "server_cpu_us"),
        below=30,
    ),
    Target(
        "idle",
        "64 B: server CPU per request, direct transport / plain grpcio, persistent streams",
        Of(f"throughput/64/{DIRECT}", "server_cpu_us"),
        Of(f"throughput/64/{STREAMS}", "server_cpu_us"),
        below=1 / 3,  # 30 us where the other takes 90
    ),
    Target(
        "idle", "CPU of the idle server, direct transport, in % of a core", Of(f"idle/{DIRECT}", "cpu_percent"), below=1
    ),
    *(
        Target(
            "callback",
            f"mean time under load / alone, {transport} transport",
            Of(f"callback/load/{transport}", "mean_ms"),
            Of(f"callback/alone/{transport}", "mean_ms"),
            below=1.5 if transport == DIRECT else None,
        )
        for transport in (DIRECT, PUBLIC)
    ),
    *(
        Target(
            "core_alone",
            f"{threads} {'thread' if threads == 1 else 'threads'}: the waiting room / SimpleQueue and locks",
            Of(f"core/{threads}/core"),
            Of(f"core/{threads}/queue"),
        )
        for threads in (1, 4, 16, 64)
    ),
    Target(
        "core_alone",
        "a full queue: leaving from the middle / the oldest leaves",
        Of("core/full/middle"),
        Of("core/full/front"),
        at_least=0.5,
    ),
    Target(
        "overlap",
        "the median gap: direct transport / public transport",
        Of(f"overlap/{DIRECT}", "p50_ms"),
        Of(f"overlap/{PUBLIC}", "p50_ms"),
    ),
    *(
        Target(
            "actors",
            f"{size:,} B, 16 processes: direct transport / plain grpcio, persistent streams",
            Of(f"actors/{size}/{DIRECT}"),
            Of(f"actors/{size}/{STREAMS}"),
            at_least=2.0 if size == 110_592 else None,
        )
        for size in actors.SIZES
    ),
    *(
        Target(
            "in_flight",
            f"{size:,} B: {title} / {threads} blocking threads",
            Of(f"in_flight/{size}/{kind}/{count}/{DIRECT}"),
            Of(f"in_flight/{size}/blocking/{threads}/{DIRECT}"),
            at_least=1.5 if (kind, size, threads) == ("many", 64, 16) else None,
        )
        for size in in_flight.SIZES
        for kind, count, title in (
            ("many", in_flight.MANY, f"one thread, send_many of {in_flight.MANY}"),
            ("tasks", in_flight.TASKS, f"asyncio, {in_flight.TASKS} tasks"),
        )
        for threads in in_flight.BLOCKING
    ),
    Target(
        "in_flight",
        f"64 B: server CPU per request, send_many of {in_flight.MANY} / 16 blocking threads",
        Of(f"in_flight/64/many/{in_flight.MANY}/{DIRECT}", "server_cpu_us"),
        Of(f"in_flight/64/blocking/16/{DIRECT}", "server_cpu_us"),
        below=1.0,
    ),
    *(
        Target(
            "first_request",
            f"first request: {title} / plain grpcio, persistent streams",
            Of(f"first/{name}", "p50_ms"),
            Of(f"first/{STREAMS}", "p50_ms"),
        )
        for name, title in ((DIRECT, "direct transport"), (UNBATCHED, "direct transport, batches of one"))
    ),
    *(
        Target(
            "arrays",
            f"{size:,} B, batches of {batch_size}, {network_title}: arrays= / {arrays.WAYS[way]}",
            Of(arrays.key(size, batch_size, network, ARRAYS)),
            Of(arrays.key(size, batch_size, network, way)),
            at_least=at_least[size],
        )
        for way, at_least in _ARRAYS.items()
        for size in DTYPES
        for batch_size in arrays.BATCH_SIZES
        for network, network_title in arrays.NETWORKS.items()
    ),
    Target(
        "arrays",
        f"{arrays.GIL_BYTES:,} B: the GIL held for a batch of {arrays.GIL_BATCH_SIZE}, in ms",
        Of(arrays.GIL_KEY, "gil_ms"),
        below=0.1,
    ),
    *(
        Target(
            "open_inference",
            f"{size:,} B, {way}: this library / PyTriton",
            Of(f"inference/{size}/{way}/{INFERENCE}"),
            Of(f"inference/{size}/{way}/{PYTRITON}"),
            at_least=1,
        )
        for size in open_inference.SIZES
        for way in open_inference.WAYS
    ),
]
