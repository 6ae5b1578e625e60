"""Put mixed load on three servers, and check that every promise holds for every request. See soak/README.md."""

from __future__ import annotations

import argparse
import itertools
import os
import random
import sys
import threading
import time
from collections import Counter
from multiprocessing.connection import Connection
from typing import Any

# gRPC's core complains on stderr about killed servers. It reads this when grpc is imported.
os.environ.setdefault("GRPC_VERBOSITY", "NONE")

from grpc_batcher._cli.workers import WorkerError, spawning

import verdict
from caller import LOST_S, Load, Target, call
from processes import Child, Seen
from relay import relay
from server import serve
from traffic import name_of

MAX_FAULTS = 20

# After a server is back, a caller may still get UNAVAILABLE from a connection that failed while it was away.
UNAVAILABLE_SLACK_NS = 10_000_000_000

GRACES_S = (0.0, 0.05, 1.0, 5.0)
STEADY, RESTARTED, OF_ARRAYS = "steady server", "restarted server", "server of arrays"
RELAYED = "relay to the steady server"
# The model of each server, and so of its callers' requests.
MODELS = {STEADY: "repr", RESTARTED: "dyna", OF_ARRAYS: "arrays", RELAYED: "repr"}
LONG_LIVED = (STEADY, OF_ARRAYS, "its callers", "its probe", "callers of both")


class Soak:
    def __init__(self, seconds: float, seed: int) -> None:
        self._seconds = seconds
        self._seed = seed
        self._chance = random.Random(seed)
        self._fault_count = 0
        self._report_lock = threading.Lock()
        self._seen = Seen(self.report)
        self._seen_by: Counter[str] = Counter()
        self._readers: dict[str, threading.Thread] = {}
        self._servers: dict[str, Child] = {}
        self._callers: dict[str, Child] = {}
        self._ports = {STEADY: 0, RESTARTED: 0, OF_ARRAYS: 0}
        self._numbers = itertools.count(1)
        self._ends: dict[str, Counter[str]] = {}
        self._in_flight: dict[str, int] = {}
        self._away: list[tuple[int, float]] = []  # when the restarted server was away: from, until, in ns
        self._counts: Counter[str] = Counter()
        self._series: dict[tuple[str, str], list[tuple[float, float]]] = {}
        self._latencies_ms: list[tuple[float, float]] = []
        self._begin_s = self._end_s = 0.0

    def report(self, text: str) -> None:
        with self._report_lock:
            self._fault_count += 1
            print(f"FAULT at {time.monotonic() - self._begin_s:.1f} s: {text}", flush=True)

    def run(self) -> bool:
        """Return whether all promises held."""
        try:
            self._start()
            self._loop()
            self._finish()
        except WorkerError as error:
            self.report(str(error))
        finally:
            for child in (*self._callers.values(), *self._servers.values()):
                child.kill()
        self._judge()
        return self._fault_count == 0

    # ---- processes ----

    def _start(self) -> None:
        for name in self._ports:
            self._start_server(name)
        for name in self._ports:
            self._server_is_back(name)
        self._servers[RELAYED] = Child(RELAYED, relay, self._ports[STEADY], str(self._seed))
        steady, restarted, arrays, broken = (
            Target(MODELS[name], f"127.0.0.1:{port}", restarts=name is RESTARTED, breaks=name is RELAYED)
            for name, port in (*self._ports.items(), (RELAYED, self._servers[RELAYED].ready["port"]))
        )
        self._targets = {"its callers": [steady], "its probe": [steady], "callers of both": [broken, restarted, arrays]}
        self._start_callers("its callers", Load(8))
        self._start_callers("its probe", Load(1, is_probe=True))
        self._start_callers("callers of both", Load(6))
        self._start_callers("mortal callers", Load(4))
        transports = {self._servers[name].ready["transport"] for name in self._ports}
        for child in self._callers.values():
            _ = child.ready
        print(f"seed {self._seed}; servers on transport {', '.join(transports)}; {self._seconds:.0f} s", flush=True)

    def _start_server(self, name: str) -> None:
        ours, theirs = spawning.Pipe(duplex=False)
        seed = f"{self._seed}/{name}/{self._counts[name]}"
        self._servers[name] = Child(name, serve, theirs, MODELS[name], self._ports[name], seed)
        theirs.close()
        self._readers[name] = threading.Thread(target=self._read_seen, args=(name, ours), daemon=True)
        self._readers[name].start()

    def _server_is_back(self, name: str) -> None:
        self._ports[name] = self._servers[name].ready["port"]
        self._counts[name] += 1

    def _read_seen(self, name: str, pipe: Connection) -> None:
        with pipe:
            while True:
                try:
                    numbers = memoryview(pipe.recv_bytes()).cast("Q")
                except (EOFError, OSError):
                    return
                for number in numbers:
                    self._seen.mark(name, number)
                self._seen_by[name] += len(numbers)

    def _start_callers(self, name: str, load: Load) -> None:
        number = next(self._numbers)
        targets = self._targets.get(name) or self._targets["callers of both"]
        self._callers[name] = Child(name, call, number, targets, load, str(self._seed))

    # ---- what happens meanwhile ----

    def _loop(self) -> None:
        every_s = {
            self._sample_all: min(max(self._seconds / 200, 0.25), 10),
            self._say: min(max(self._seconds / 60, 2), 60),
            self._restart: min(max(self._seconds / 20, 2.5), 20),
            self._kill_callers: min(max(self._seconds / 15, 3), 15),
        }
        self._begin_s = time.monotonic()
        self._end_s = self._begin_s + self._seconds
        due_s = {what: self._begin_s + each_s for what, each_s in every_s.items()}
        while self._fault_count < MAX_FAULTS:
            what = min(due_s, key=lambda each: due_s[each])
            if due_s[what] > self._end_s:
                break
            time.sleep(max(due_s[what] - time.monotonic(), 0))
            what()
            pause_s = every_s[what]
            if what in (self._restart, self._kill_callers):
                pause_s *= self._chance.uniform(0.5, 1.5)
            due_s[what] = max(due_s[what] + pause_s, time.monotonic())
        self._end_s = min(time.monotonic(), self._end_s)

    def _sample_all(self) -> None:
        for name, child in (*self._callers.items(), *self._servers.items()):
            self._take(name, child.ask("sample"))
            if name in LONG_LIVED:
                self._note(name, child.resources())

    def _take(self, name: str, answer: dict[str, Any]) -> None:
        for text in answer["faults"]:
            self.report(f"{name}: {text}")
        if name in LONG_LIVED:
            self._note(name, {"blocks": answer["blocks"]})
        if name in self._servers:
            return
        now_s = time.monotonic()
        self._ends[name] = Counter(answer["ends"])
        self._in_flight[name] = answer["in_flight"]
        self._latencies_ms += ((now_s, each_ms) for each_ms in answer["latencies_ms"])
        ended = sum(answer["ends"].values())
        if answer["begun"] != ended + answer["in_flight"]:
            self.report(f"{name}: {answer['begun']} requests began, {ended} ended, {answer['in_flight']} are in flight")
        if answer["oldest_s"] > LOST_S:
            self.report(f"{name}: a request has had no outcome for {answer['oldest_s']:.0f} s")
        for number, begin_ns, end_ns in answer["unavailable"]:
            if not any(
                from_ns <= end_ns and begin_ns <= until_ns + UNAVAILABLE_SLACK_NS for from_ns, until_ns in self._away
            ):
                self.report(f"{name_of(number)} ended with UNAVAILABLE although its server was not away")

    def _note(self, name: str, values: dict[str, int]) -> None:
        now_s = time.monotonic()
        for what, value in values.items():
            self._series.setdefault((name, what), []).append((now_s, value))

    def _restart(self) -> None:
        server = self._servers[RESTARTED]
        self._away = [*self._away[-3:], (time.monotonic_ns(), float("inf"))]
        if self._counts[RESTARTED] % 2:
            server.kill()
            self._counts["killed servers"] += 1
        else:
            self._take(RESTARTED, server.ask("stop", self._chance.choice(GRACES_S)))
            server.end()
            self._counts["stopped servers"] += 1
        self._readers[RESTARTED].join()
        self._start_server(RESTARTED)
        self._server_is_back(RESTARTED)
        self._away[-1] = self._away[-1][0], time.monotonic_ns()

    def _kill_callers(self) -> None:
        self._take("mortal callers", self._callers["mortal callers"].ask("sample"))
        self._callers["mortal callers"].kill()
        self._counts["killed callers"] += 1
        self._bury("mortal callers")
        self._start_callers("mortal callers", Load(4))

    def _bury(self, name: str) -> None:
        """Keep the counts of a process that is gone."""
        self._ends.setdefault("gone callers", Counter()).update(self._ends.pop(name, Counter()))
        self._counts["lost from sight"] += self._in_flight.pop(name, 0)

    def _say(self) -> None:
        ends = sum(self._ends.values(), Counter())
        memory = ", ".join(
            f"{self._series[name, 'memory_bytes'][-1][1] / 2**20:.0f}"
            for name in LONG_LIVED
            if (name, "blocks") in self._series
        )
        print(
            f"{time.monotonic() - self._begin_s:6.0f} s: {ends.total()} requests ended, {ends['OK']} of them answered; "
            f"{self._seen.count} seen by callbacks; {self._counts[RESTARTED] - 1} restarts, "
            f"{self._counts['killed callers']} callers killed; {self._fault_count} faults; {memory} MiB",
            flush=True,
        )

    # ---- the end ----

    def _finish(self) -> None:
        for child in self._callers.values():
            child.tell("stop")
        for name, child in self._callers.items():
            self._take(name, child.answer())
            child.end()
        self._still_serves()
        left: dict[str, Any] = {}
        limit_s = time.monotonic() + LOST_S
        while time.monotonic() < limit_s:
            left = {name: self._servers[name].ask("sample") for name in (STEADY, OF_ARRAYS)}
            if all(each["open_streams"] == each["waiting"] == 0 for each in left.values()):
                break
            time.sleep(0.05)
        else:
            for name, each in left.items():
                self.report(
                    f"without callers, {name} has {each['open_streams']} open streams and {each['waiting']} requests"
                )
        for name, child in self._servers.items():
            answer = child.ask("stop", 5.0)
            self._take(name, answer)
            child.end()
            if name is RELAYED:
                self._counts["broken connections"] = answer["broken"]
                continue
            self._readers[name].join()
            if name is not RESTARTED and answer["batched"] != self._seen_by[name]:
                self.report(
                    f"{name} counted {answer['batched']} requests in batches; its callback saw {self._seen_by[name]}"
                )

    def _still_serves(self) -> None:
        """Check that all servers answer a new caller. Its requests are numbered like all others."""
        for name, port in self._ports.items():
            target = Target(MODELS[name], f"127.0.0.1:{port}")
            last = Child(
                f"last caller of the {name}", call, next(self._numbers), [target], Load(1, is_probe=True), "last"
            )
            while not sum((answer := last.ask("sample"))["ends"].values()) and answer["oldest_s"] < LOST_S:
                time.sleep(0.05)
            self._take(last.name, last.ask("stop"))
            last.end()
            if not self._ends[last.name]["OK"]:
                self.report(f"in the end, {name} answered no new caller: {dict(self._ends[last.name])}")

    def _judge(self) -> None:
        ends = sum(self._ends.values(), Counter())
        print(f"\n{ends.total()} requests ended, without those of callers that were killed meanwhile:")
        for code, count in ends.most_common():
            print(f"  {code:20}{count:10}")
        for what in ("stopped servers", "killed servers", "killed callers", "broken connections"):
            print(f"{what}: {self._counts[what]}")
        print(
            "\nThe first and the last part of the run after its warm-up (see soak/verdict.py):\n"
            f"{'':40}{'first':>10}{'last':>10}{'ratio':>8}"
        )
        is_long = self._end_s - self._begin_s >= verdict.JUDGED_FROM_S
        for name, what in sorted(self._series):
            limit = verdict.RESOURCES[what] if is_long or what != "memory_bytes" else verdict.NO_LIMIT
            compared = verdict.compare_use(
                f"{name}: {what}", self._series[name, what], self._begin_s, self._end_s, limit
            )
            if compared is not None:
                self._print(compared, 1 / 2**20 if what == "memory_bytes" else 1)
        latencies = verdict.compare_latency(self._latencies_ms, self._begin_s, self._end_s)
        if is_long and not (self._series and latencies):
            self.report("there was nothing to compare")
        for compared in latencies:
            self._print(compared._replace(name=f"the probe's {compared.name}, ms"), 1)
        print(f"\n{'all held' if not self._fault_count else f'{self._fault_count} FAULTS'}", flush=True)

    def _print(self, compared: verdict.Comparison, scale: float) -> None:
        first, last = compared.first * scale, compared.last * scale
        ratio = last / first if first else float("nan")
        print(f"{compared.name:40}{first:10.1f}{last:10.1f}{ratio:8.2f}{'  GREW' if compared.failed else ''}")
        if compared.failed:
            self.report(f"{compared.name} grew from {first:.1f} to {last:.1f}")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=float, default=600.0, help="duration of the load (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="seed of all random choices (default: %(default)s)")
    options = parser.parse_args()
    return 0 if Soak(options.seconds, options.seed).run() else 1


if __name__ == "__main__":
    sys.exit(main())
