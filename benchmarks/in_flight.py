"""Callers without a thread each: requests that one thread sends at once, and the tasks of a loop.

They keep the same account as the engine of callers in `grpc_batcher._cli.load`, with one outcome per caller.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Sequence
from typing import Any

from grpc_batcher import AsyncMukoeBatcherClient, MukoeBatcherClient
from grpc_batcher._cli.load import Job, Outcome, Window

Run = Callable[[Sequence[Sequence[Job]], Window], Outcome]


class _Caller:
    """One caller's account."""

    def __init__(self, jobs: Sequence[Job], window: Window) -> None:
        self.outcome = Outcome(answers=[0])
        self._jobs = jobs
        self._window = window

    def next_job(self) -> Job:
        self.outcome.sent += 1
        return self._jobs[self.outcome.sent % len(self._jobs)]

    def note(self, job: Job, answer: Any, begin_ns: int, end_ns: int) -> None:
        if isinstance(answer, Exception):
            self.outcome.errors[type(answer).__name__] += 1
        elif answer != job.expected:
            self.outcome.wrong += 1
        elif end_ns < self._window.from_ns:
            self.outcome.warm = 1
        elif end_ns < self._window.until_ns:
            self.outcome.latencies_ns.append(end_ns - begin_ns)
            self.outcome.answers[0] += 1


def runs_many(client: MukoeBatcherClient) -> Run:
    """One thread sends the next request of every caller at once, and waits for all answers."""

    def run(jobs: Sequence[Sequence[Job]], window: Window) -> Outcome:
        callers = [_Caller(each, window) for each in jobs]
        time.sleep(max(0, window.start_ns - time.monotonic_ns()) / 1e9)
        while (begin_ns := time.monotonic_ns()) < window.until_ns:
            round_of_jobs = [caller.next_job() for caller in callers]
            answers = client.send_many([job.payload for job in round_of_jobs], return_exceptions=True)
            end_ns = time.monotonic_ns()
            for caller, job, answer in zip(callers, round_of_jobs, answers, strict=True):
                caller.note(job, answer, begin_ns, end_ns)
        return _together(callers)

    return run


def runs_tasks(client: AsyncMukoeBatcherClient) -> Run:
    """Every caller is a task, and all tasks share a loop."""

    async def ask(caller: _Caller, window: Window) -> None:
        while (begin_ns := time.monotonic_ns()) < window.until_ns:
            job = caller.next_job()
            try:
                answer: Any = await client.send_request(job.payload)
            except Exception as error:
                answer = error
            caller.note(job, answer, begin_ns, time.monotonic_ns())

    async def ask_all(callers: Sequence[_Caller], window: Window) -> None:
        await asyncio.sleep(max(0, window.start_ns - time.monotonic_ns()) / 1e9)
        await asyncio.gather(*(ask(caller, window) for caller in callers))

    def run(jobs: Sequence[Sequence[Job]], window: Window) -> Outcome:
        callers = [_Caller(each, window) for each in jobs]
        asyncio.run(ask_all(callers, window))
        return _together(callers)

    return run


def _together(callers: Sequence[_Caller]) -> Outcome:
    merged = Outcome()
    for caller in callers:
        merged.add(caller.outcome)
    return merged
