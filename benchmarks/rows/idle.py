"""What a server costs while nobody asks, with 16 open streams that were in use a moment ago."""

from __future__ import annotations

import time
from contextlib import ExitStack

from measuring import Sample
from row import Bench, Cell, Row, Started, shared
from systems import SYSTEMS

TITLE = "CPU per request (see row 1), and CPU of an idle server with 16 open streams"

CALLERS = 16
_CALM_S = 0.5


class _Watch:
    """Watches all servers at the same time, once per round; each cell then looks up its own."""

    def __init__(self, bench: Bench, servers: dict[str, Started]) -> None:
        self._bench = bench
        self._servers = servers
        self._samples: dict[str, Sample] = {}

    def watch(self) -> None:
        problems = {}
        for name, (server, callers) in self._servers.items():
            sample = self._bench.measure(server, shared(CALLERS, callers), warm_s=0.2, window_s=0.2)
            problems[name] = sample.problems
        time.sleep(_CALM_S)
        begin_ns = time.monotonic_ns()
        before = {name: server.cpu_ns() for name, (server, _) in self._servers.items()}
        time.sleep(self._bench.settings.idle_s)
        after = {name: server.cpu_ns() for name, (server, _) in self._servers.items()}
        passed_ns = time.monotonic_ns() - begin_ns
        self._samples = {
            name: Sample({"cpu_percent": (after[name] - before[name]) / passed_ns * 100}, problems[name])
            for name in self._servers
        }

    def sample(self, name: str) -> Sample:
        return self._samples[name]


def open_row(bench: Bench, stack: ExitStack) -> Row:
    servers = bench.all_systems()
    watch = _Watch(bench, servers)
    return Row(
        [
            Cell(f"idle/{name}", f"idle: {SYSTEMS[name].title}", "cpu_percent", lambda name=name: watch.sample(name))  # type: ignore[misc]
            for name in servers
        ],
        most_rounds=3,  # each takes long, and they agree
        begin_round=watch.watch,
    )
