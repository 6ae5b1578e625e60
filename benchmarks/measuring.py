"""One measurement of a server under load, and the checks that the load was as intended."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from grpc_batcher._cli.load import Outcome, Window
from grpc_batcher._server.metrics import nearest_rank

from processes import Child, sleep_until

_OPENING_LIMIT_S = 30.0


@dataclass
class Sample:
    """What one measurement found.

    values: by name; names end with the unit.
    problems: reasons not to trust the values.
    window: when it was measured; None where that does not matter.
    """

    values: dict[str, float]
    problems: list[str] = field(default_factory=list)
    window: Window | None = None

    def notes(self, server: Child) -> list[tuple[int, int, int]]:
        """Return the callback's runs in the window: start, end and CPU time of each, in nanoseconds."""
        notes = server.ask("notes")
        if self.window is None:
            return notes
        return [note for note in notes if self.window.from_ns <= note[0] and note[1] < self.window.until_ns]


@dataclass(frozen=True)
class Group:
    """Callers in one process."""

    child: Child
    callers: int


def measure(
    server: Child,
    groups: Sequence[Group],
    *,
    payload_bytes: int,
    warm_s: float,
    window_s: float,
    settle_s: float = 0.02,
    least_batch: float = 1,
    everyone: bool = True,
) -> Sample:
    """Have all groups ask at the same time.

    settle_s: the time processes get to start their threads.
    least_batch: the smallest mean batch that is no problem, where the server counts batches.
    everyone: whether each caller must get an answer while warming up and another in the window. If not, the sample
        has the share of callers that got none in the window.
    """
    groups = [group for group in groups if group.callers]
    counts = _counts(server)
    _prepare(groups, payload_bytes)
    start_ns = time.monotonic_ns() + int(settle_s * 1e9)
    from_ns = start_ns + int(warm_s * 1e9)
    window = Window(start_ns, from_ns, from_ns + int(window_s * 1e9))
    for group in groups:
        group.child.tell("run", window)
    server_cpu, callers_cpu = _cores_used(window, [[server], [group.child for group in groups]])
    sample = _collect(groups, window, everyone=everyone)
    if not sample.values:
        return sample
    requests_per_s = sample.values["requests_per_s"]
    if server_cpu is not None and callers_cpu is not None:
        sample.values["server_cpu_us"] = server_cpu / requests_per_s * 1e6
        sample.values["callers_cpu_us"] = callers_cpu / requests_per_s * 1e6
    if counts is not None:
        after = _counts(server)
        assert after is not None
        batches = after["batches"] - counts["batches"]
        mean_batch = (after["batched_requests"] - counts["batched_requests"]) / batches
        sample.values["mean_batch"] = mean_batch
        if mean_batch < least_batch:
            sample.problems.append(f"the mean batch was {mean_batch:.1f}; it should be at least {least_batch:g}")
        if after.get("transport") != server.ready.get("transport"):
            sample.problems.append(f"the server's transport is now {after['transport']}")
        if "open_streams" in after:
            sample.values["open_streams"] = after["open_streams"]
    return sample


def open_streams(server: Child, groups: Sequence[Group]) -> None:
    """Have all callers ask once while the server holds back its answers, so that each needs its own stream."""
    groups = [group for group in groups if group.callers]
    wanted = sum(group.callers for group in groups)
    server.ask("hold")
    _prepare(groups, 64)
    now_ns = time.monotonic_ns()
    window = Window(now_ns, now_ns, now_ns + int(_OPENING_LIMIT_S * 1e9))
    for group in groups:
        group.child.tell("run", window, most_requests=1)
    while server.ask("counts")["open_streams"] < wanted and time.monotonic_ns() < window.until_ns:
        time.sleep(0.01)
    server.ask("release")
    for group in groups:
        group.child.answer()


def _prepare(groups: Sequence[Group], payload_bytes: int) -> None:
    """Have all processes make their payloads and connections, and wait for them."""
    first = 0
    for group in groups:
        group.child.tell("prepare", group.callers, first, payload_bytes)
        first += group.callers
    for group in groups:
        group.child.answer()


def _cores_used(window: Window, teams: Sequence[Sequence[Child]]) -> list[float | None]:
    """Wait until the window is over, and return how many cores each team of processes used during it.

    None if this process did not get the CPU in time to read the clocks.
    """
    readings = []
    for due_ns in (window.from_ns, window.until_ns):
        sleep_until(due_ns)
        readings.append([(time.monotonic_ns(), sum(child.cpu_ns() for child in team)) for team in teams])
    used: list[float | None] = []
    for (begin_ns, cpu_before_ns), (end_ns, cpu_after_ns) in zip(*readings, strict=True):
        in_time = end_ns - begin_ns > (window.until_ns - window.from_ns) / 2
        used.append((cpu_after_ns - cpu_before_ns) / (end_ns - begin_ns) if in_time else None)
    return used


def _collect(groups: Sequence[Group], window: Window, *, everyone: bool) -> Sample:
    """Merge what all processes saw. Without a single answer there are no values."""
    sample = Sample({}, window=window)
    outcome = Outcome()
    for group in groups:
        theirs, transport = group.child.answer()
        outcome.add(theirs)
        if transport != group.child.ready["transport"]:
            sample.problems.append(f"the callers' transport is now {transport}")
    callers = len(outcome.answers)
    cold, silent = callers - outcome.warm, outcome.answers.count(0)
    if outcome.errors:
        sample.problems.append(f"failed requests: {dict(outcome.errors)}")
    if outcome.wrong:
        sample.problems.append(f"{outcome.wrong} wrong answers")
    if everyone and cold:
        sample.problems.append(f"{cold} callers had no answer while warming up")
    if everyone and silent:
        sample.problems.append(f"{silent} of {callers} callers had no answer in the window")
    if latencies_ns := sorted(outcome.latencies_ns):
        sample.values = {"requests_per_s": len(latencies_ns) / window.length_s}
        for percent in (50, 90, 99):
            sample.values[f"p{percent}_ms"] = nearest_rank(latencies_ns, percent) / 1e6
        if not everyone:
            sample.values["silent_percent"] = 100 * silent / callers
    return sample


def _counts(server: Child) -> dict[str, Any] | None:
    """What the server has counted so far; None if it does not count."""
    return server.ask("counts") if server.ready.get("counts") else None
