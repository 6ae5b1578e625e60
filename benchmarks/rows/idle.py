"""While nobody asks: the CPU of servers with 16 open streams, and the memory kept after a burst of requests."""

from __future__ import annotations

import dataclasses
import time
from contextlib import ExitStack
from functools import partial

from grpc_batcher._cli.load import Window

from measuring import Sample, open_streams
from processes import Child
from row import Bench, Cell, Row, Started, shared
from systems import DIRECT, SYSTEMS

TITLE = "CPU per request (see row 1); CPU of an idle server with 16 open streams, and memory kept after a burst"

CALLERS = 16
_CALM_S = 0.5

# The burst has about a thousand requests.
BURST_BYTES = 884_736
BURST_REQUESTS_PER_CALLER = 63
_BURST_LIMIT_S = 30

KEEPING, RETURNING = DIRECT, "direct-without-malloc"

_BURST_SYSTEMS = {
    KEEPING: SYSTEMS[DIRECT],
    RETURNING: dataclasses.replace(
        SYSTEMS[DIRECT],
        title="direct transport, GRPC_BATCHER_TUNE_MALLOC=0",
        environment={"GRPC_BATCHER_TUNE_MALLOC": "0"},
    ),
}


class _Burst:
    """A burst of large requests from one process, and the memory of both ends. They are new, and asked only once."""

    def __init__(self, bench: Bench, server: Child, caller: Child) -> None:
        self._bench = bench
        self._ends = {"server": server, "caller": caller}
        self._values: dict[str, dict[str, float]] = {end: {} for end in self._ends}
        self._problems: list[str] = []

    def run(self) -> None:
        server, caller = self._ends.values()
        open_streams(server, shared(CALLERS, [caller]))
        caller.ask("prepare", CALLERS, 0, BURST_BYTES)
        self.read("before_mib")
        now_ns = time.monotonic_ns()
        window = Window(now_ns, now_ns, now_ns + _BURST_LIMIT_S * 10**9)
        outcome, _ = caller.ask("run", window, most_requests=BURST_REQUESTS_PER_CALLER)
        self.read("burst_mib")
        wanted, answered = CALLERS * BURST_REQUESTS_PER_CALLER, sum(outcome.answers)
        if answered < wanted:
            self._problems.append(f"{answered} of {wanted} requests were answered: {dict(outcome.errors)}")
        self._bench.check_tuning(server, caller)

    def read(self, name: str) -> None:
        for end, child in self._ends.items():
            self._values[end][name] = child.rss_bytes() / 2**20

    def sample(self, end: str) -> Sample:
        return Sample(self._values[end], self._problems)


class _Rest:
    """Leaves all processes alone at the same time; each cell then looks up its own."""

    def __init__(self, bench: Bench, servers: dict[str, Started], bursts: dict[str, _Burst]) -> None:
        self._bench = bench
        self._servers = servers
        self._bursts = bursts
        self._samples: dict[str, Sample] = {}

    def watch(self) -> None:
        for burst in self._bursts.values():
            burst.run()
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
        for burst in self._bursts.values():
            burst.read("idle_mib")

    def sample(self, name: str) -> Sample:
        return self._samples[name]


def open_row(bench: Bench, stack: ExitStack) -> Row:
    servers = bench.all_systems()
    bursts = {
        name: _Burst(bench, server, caller)
        for name, (server, (caller,)) in bench.start(stack, _BURST_SYSTEMS, processes=1).items()
    }
    rest = _Rest(bench, servers, bursts)
    return Row(
        [
            *(
                Cell(f"idle/{name}", f"idle: {SYSTEMS[name].title}", "cpu_percent", partial(rest.sample, name))
                for name in servers
            ),
            *(
                Cell(
                    f"memory/{end}/{name}",
                    f"memory of the {end} after a burst and a rest: {_BURST_SYSTEMS[name].title}",
                    "idle_mib",
                    partial(burst.sample, end),
                )
                for end in ("server", "caller")
                for name, burst in bursts.items()
            ),
        ],
        most_rounds=1,  # it takes long
        begin_round=rest.watch,
    )
