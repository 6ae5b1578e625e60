"""The load generator: many threads send requests during one window of time, which several processes can share.

It knows no server and no network: anything that sends a request and returns its answer can be measured. `grpc-batcher
bench` and the project's benchmarks use it.
"""

from __future__ import annotations

import threading
import time
from array import array
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

Send = Callable[[Any], Any]

# How long a caller waits after a failed request; otherwise it would measure how fast a server can refuse.
_PAUSE_AFTER_ERROR_S = 0.01

# How often `watch` is told of the progress.
_TOLD_EVERY_S = 0.25


@dataclass(frozen=True)
class Window:
    """When to send requests, on the monotonic clock, which all processes of a machine share.

    start_ns: callers begin. What they do before `from_ns` is a warm-up and does not count.
    from_ns, until_ns: answers that arrive in between count. At `until_ns` callers stop.
    """

    start_ns: int
    from_ns: int
    until_ns: int

    @property
    def length_s(self) -> float:
        return (self.until_ns - self.from_ns) / 1e9


@dataclass(frozen=True)
class Job:
    """A request. A caller sends its jobs in turn, over and over.

    expected: the right answer; None accepts any.
    """

    payload: Any
    expected: Any = None


@dataclass
class Outcome:
    """What one caller saw, or all of them together.

    latencies_ns: one for each request whose right answer arrived in the window.
    answers: how many those were, for each caller.
    sent: requests sent, in the window or not.
    warm: callers that got an answer before the window began.
    wrong: answers, in the window or not, other than the expected ones.
    errors: failed requests, in the window or not, by status or exception.
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
    """Call each sender on its own thread until the window ends, and return what all of them saw.

    jobs: what each sender sends.
    pause_s: how long a caller waits between an answer and its next request.
    most_requests: how many requests each caller sends unless the window ends first; None for no limit.
    watch: called now and then, on this thread, with the number of answers in the window so far.
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
