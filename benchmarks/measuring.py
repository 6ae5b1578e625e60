"""One measurement of a server under load, and the checks that the load was the one that was meant."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from processes import Child, sleep_until

from grpc_batcher._cli.load import Outcome, Window, percentile

_OPENING_LIMIT_S = 30.0


@dataclass
class Sample:
    """What one measurement found.

    values: by name, with the unit at its end.
    problems: why it may not be what it seems to be.
    window: when it was measured; None where that does not matter.
    """

    values: dict[str, float]
    problems: list[str] = field(default_factory=list)
    window: Window | None = None

    def notes(self, server: Child) -> list[tuple[int, int, int]]:
        """Return when the callback ran in the window: begin, end and CPU time of each, in nanoseconds."""
        notes = server.ask("notes")
        if self.window is None:
            return notes
        return [note for note in notes if self.window.from_ns <= note[0] and note[1] < self.window.until_ns]


@dataclass(frozen=True)
class Group:
    """Callers in one process.

    counted: False for those that only keep the server company.
    """

    child: Child
    callers: int
    pause_s: float = 0.0
    counted: bool = True


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

    settle_s: what the processes get to start their threads.
    least_batch: the mean batch, where the server counts that, must not be smaller.
    everyone: whether each caller must have an answer while warming up and one in the window. If not, the sample tells
        how many had none in the window.
    """
    groups = [group for group in groups if group.callers]
    counts = _counts(server)
    _prepare(groups, payload_bytes)
    start_ns = time.monotonic_ns() + int(settle_s * 1e9)
    from_ns = start_ns + int(warm_s * 1e9)
    window = Window(start_ns, from_ns, from_ns + int(window_s * 1e9))
    for group in groups:
        group.child.tell("run", window, group.pause_s)
    server_cpu, callers_cpu = _cores_used(window, [[server], [group.child for group in groups if group.counted]])
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
            sample.problems.append(f"the mean batch was {mean_batch:.1f}, and should be {least_batch:g} or more")
        if after.get("gear") != server.ready.get("gear"):
            sample.problems.append(f"the server's gear is now {after['gear']}")
        if "open_streams" in after:
            sample.values["open_streams"] = after["open_streams"]
    return sample


def open_streams(server: Child, groups: Sequence[Group]) -> None:
    """Have all callers ask once while the server holds back its answers, so that they need a stream each."""
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
    """Have all processes make their payloads and connections, and wait until they have."""
    first = 0
    for group in groups:
        group.child.tell("prepare", group.callers, first, payload_bytes)
        first += group.callers
    for group in groups:
        group.child.answer()


def _cores_used(window: Window, teams: Sequence[Sequence[Child]]) -> list[float | None]:
    """Wait until the window is over, and return how many cores each team of processes used meanwhile.

    None if this process was not given its own turns in time.
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
    """Take what all processes found. Without any answer there are no values."""
    sample = Sample({}, window=window)
    latencies_ns: list[int] = []
    answers: list[int] = []
    everybody = Outcome()
    for group in groups:
        outcome, gear = group.child.answer()
        everybody.add(outcome)
        if gear != group.child.ready["gear"]:
            sample.problems.append(f"the callers' gear is now {gear}")
        if group.counted:
            latencies_ns += outcome.latencies_ns
            answers += outcome.answers
    if everybody.errors:
        sample.problems.append(f"failed requests: {dict(everybody.errors)}")
    cold = sum(group.callers for group in groups) - everybody.warm
    silent = answers.count(0)
    if everybody.wrong:
        sample.problems.append(f"{everybody.wrong} wrong answers")
    if everyone and cold:
        sample.problems.append(f"{cold} callers had no answer while warming up")
    if everyone and silent:
        sample.problems.append(f"{silent} of {len(answers)} callers had no answer in the window")
    if latencies_ns:
        latencies_ns.sort()
        sample.values = {"requests_per_s": len(latencies_ns) / window.length_s}
        for percent in (50, 90, 99):
            sample.values[f"p{percent}_ms"] = percentile(latencies_ns, percent) / 1e6
        if not everyone:
            sample.values["silent_percent"] = 100 * silent / len(answers)
    return sample


def _counts(server: Child) -> dict[str, Any] | None:
    """What the server counted so far; None if it does not."""
    return server.ask("counts") if server.ready.get("counts") else None
