"""The caller engine: many threads ask at once, over one window of time that several processes can share.

It knows no server and no network: whatever sends a request and returns its answer can be measured. It needs nothing
but the standard library. `grpc-batcher bench` uses it, and so do the project's own benchmarks.
"""

from __future__ import annotations

import math
import threading
import time
from array import array
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

Send = Callable[[Any], Any]

# After a request that failed a caller waits so long, or it would only measure how fast a server can refuse.
_PAUSE_AFTER_ERROR_S = 0.01

# How often whoever watches is told of progress.
_TOLD_EVERY_S = 0.25


@dataclass(frozen=True)
class Window:
    """When to ask, on the monotonic clock, which all processes of a machine share.

    start_ns: callers begin. What they do until `from_ns` is warming up and does not count.
    from_ns, until_ns: answers that come in between count. At `until_ns` a caller sends no more.
    """

    start_ns: int
    from_ns: int
    until_ns: int

    @property
    def length_s(self) -> float:
        return (self.until_ns - self.from_ns) / 1e9


@dataclass(frozen=True)
class Job:
    """What a caller sends, in turn and again from the first.

    expected: the right answer; None to take any.
    """

    payload: Any
    expected: Any = None


@dataclass
class Outcome:
    """What one caller or, merged, all of them saw.

    latencies_ns: of each request whose right answer came in the window.
    answers: of each caller, how many those were.
    sent: requests that were sent, in the window or not.
    warm: callers that had an answer before the window began.
    wrong: answers, in the window or not, that were not the expected one.
    errors: failed requests, in the window or not, by what they raised.
    """

    latencies_ns: list[int] = field(default_factory=list)
    answers: list[int] = field(default_factory=list)
    sent: int = 0
    warm: int = 0
    wrong: int = 0
    errors: Counter[str] = field(default_factory=Counter)

    def add(self, other: Outcome) -> None:
        self.latencies_ns += other.latencies_ns
        self.answers += other.answers
        self.sent += other.sent
        self.warm += other.warm
        self.wrong += other.wrong
        self.errors += other.errors


def run(
    senders: Sequence[Send],
    jobs: Sequence[Sequence[Job]],
    window: Window,
    *,
    pause_s: float = 0.0,
    most_requests: int | None = None,
    watch: Callable[[int], None] | None = None,
) -> Outcome:
    """Have each sender called by a thread of its own until the window is over, and return what came of it.

    jobs: what each of them sends.
    pause_s: how long a caller waits between an answer and its next request.
    most_requests: how many each caller sends, if the window does not end before; None for no limit.
    watch: called now and then, on this thread, with how many answers have come in the window so far.
    """
    outcomes = [Outcome() for _ in senders]
    latencies_ns = [array("q") for _ in senders]
    threads = [
        threading.Thread(target=_call, args=(*of_caller, window, pause_s, most_requests), daemon=True)
        for of_caller in zip(senders, jobs, outcomes, latencies_ns, strict=True)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        while watch is not None and thread.is_alive():
            watch(sum(map(len, latencies_ns)))
            thread.join(_TOLD_EVERY_S)
        thread.join()
    merged = Outcome()
    for outcome in outcomes:
        merged.add(outcome)
    return merged


def percentile(values: Sequence[float], percent: float) -> float:
    """Return the smallest value that so many percent are not above; `values` must be sorted and not empty."""
    return values[max(0, math.ceil(len(values) * percent / 100) - 1)]


def _call(
    send: Send,
    jobs: Sequence[Job],
    outcome: Outcome,
    latencies_ns: array[int],
    window: Window,
    pause_s: float,
    most_requests: int | None,
) -> None:
    now_ns = time.monotonic_ns
    from_ns, until_ns = window.from_ns, window.until_ns
    warm = False
    number = 0
    _sleep_until(window.start_ns)
    begin_ns = now_ns()
    while begin_ns < until_ns and number != most_requests:
        job = jobs[number % len(jobs)]
        number += 1
        try:
            answer = send(job.payload)
        except Exception as error:
            outcome.errors[_name(error)] += 1
            _sleep_until(min(until_ns, now_ns() + int(_PAUSE_AFTER_ERROR_S * 1e9)))
            begin_ns = now_ns()
            continue
        end_ns = now_ns()
        if job.expected is not None and answer != job.expected:
            outcome.wrong += 1
        elif end_ns < from_ns:
            warm = True
        elif end_ns < until_ns:
            latencies_ns.append(end_ns - begin_ns)
        if pause_s:
            _sleep_until(min(until_ns, end_ns + int(pause_s * 1e9)))
            end_ns = now_ns()
        begin_ns = end_ns
    outcome.latencies_ns = latencies_ns.tolist()
    outcome.answers = [len(latencies_ns)]
    outcome.sent = number
    outcome.warm = int(warm)


def _sleep_until(due_ns: int) -> None:
    left_ns = due_ns - time.monotonic_ns()
    if left_ns > 0:
        time.sleep(left_ns / 1e9)


def _name(error: Exception) -> str:
    code = getattr(error, "code", None)
    status = code() if callable(code) else None
    return getattr(status, "name", type(error).__name__)
