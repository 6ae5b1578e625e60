"""A process of callers, driven by run.py: `python call.py KIND ADDRESS` and a command in each line of its input.

{"do": "prepare", "callers": 8, "first": 0, "payload_bytes": 64}
    makes what so many threads need. `first` numbers the callers over all processes.
{"do": "run", "pause_s": 0, "start_ns": 1, "from_ns": 2, "until_ns": 3}
    has them ask in this window, and prints what came of it. With "most_requests" each sends no more than that.
{"do": "close"}
    closes the connection; the next `prepare` makes a new one.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from typing import Any

import lines
from answers import TAG_BYTES
from callers import Connection, connect

from grpc_batcher._cli.load import Job, Outcome, Send, Window, run


def main() -> None:
    kind, address = sys.argv[1:]
    connection = connect(kind, address)
    lines.say(gear=connection.gear())
    closed = False
    shape = None
    senders: list[Send] = []
    jobs: list[list[Job]] = []
    for command in lines.commands():
        if command["do"] == "prepare":
            if closed:
                connection = connect(kind, address)
                closed = False
            senders = connection.senders(command["callers"])
            if shape != (shape := (command["callers"], command["first"], command["payload_bytes"])):
                jobs = list(_jobs(connection, *shape))
            lines.say()
        elif command["do"] == "run":
            window = Window(command["start_ns"], command["from_ns"], command["until_ns"])
            outcome = run(senders, jobs, window, pause_s=command["pause_s"], most_requests=command.get("most_requests"))
            lines.say(gear=connection.gear(), **_record(outcome))
        elif command["do"] == "close":
            connection.close()
            closed = True
            lines.say()
        else:
            raise SystemExit(f"no such command: {command}")


def _jobs(connection: Connection, callers: int, first: int, payload_bytes: int) -> Iterator[list[Job]]:
    """Two payloads for each caller, so that an answer to its last request is not taken for one to this."""
    for caller in range(first, first + callers):
        payloads = [
            bytes(payload_bytes - TAG_BYTES) + (2 * caller + which).to_bytes(TAG_BYTES, "big") for which in range(2)
        ]
        yield [Job(payload, connection.expected(payload)) for payload in payloads]


def _record(outcome: Outcome) -> dict[str, Any]:
    return {
        "latencies_ns": outcome.latencies_ns,
        "answers": outcome.answers,
        "warm": outcome.warm,
        "wrong": outcome.wrong,
        "errors": outcome.errors,
    }


if __name__ == "__main__":
    main()
