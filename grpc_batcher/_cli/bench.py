"""`grpc-batcher bench`: the throughput and latency of a running server, by the number of callers."""

from __future__ import annotations

import os
import sys
from dataclasses import asdict
from datetime import datetime, timezone
from json import dumps
from pathlib import Path
from typing import Any

import click

from .._contract import DEFAULT_MAX_MESSAGE_BYTES, MAX_MESSAGE_BYTES
from .._errors import RequestError
from .._version import __version__
from .callers import Callers, Question
from .options import (
    FILE,
    NEW_FILE,
    CommandError,
    check_has_port,
    metadata_option,
    seconds,
    seconds_above_0,
    security,
    security_options,
    unresolved,
)
from .report import KNEE_RULE, TABLE_HEAD, Point, check_picture, draw, knee, remarks


def _counts(text: str) -> list[int]:
    """Parse comma-separated numbers above 0; return each once, sorted. Raises BadParameter."""
    try:
        counts = sorted({int(part) for part in text.split(",")})
    except ValueError:
        counts = [0]
    if counts[0] < 1:
        raise click.BadParameter(f"{text!r} is not a list of numbers above 0, such as 1,2,4.")
    return counts


@click.command(short_help="Measure a running server.")
@click.argument("address", envvar="GRPC_BATCHER_BENCH_ADDRESS")
@click.option(
    "--callers",
    type=_counts,
    metavar="N,N,...",
    default="1,2,4,8,16",
    help="The numbers of callers to measure with.",
)
@click.option(
    "--duration-s",
    type=seconds_above_0,
    metavar="SECONDS",
    default=5.0,
    help="How long to measure each number of callers.",
)
@click.option("--warm-up-s", type=seconds, default=1.0, help="How long callers send requests before that.")
@click.option(
    "--payload-bytes",
    type=click.IntRange(0, MAX_MESSAGE_BYTES),
    default=64,
    help="Size of a request's data, all zeros.",
)
@click.option("--payload-file", type=FILE, help="A file with a request's data, instead of zeros.")
@click.option(
    "--action", type=int, help="The action to send, which makes the requests dyna's. Default: repr's requests."
)
@click.option(
    "--timeout-s",
    type=seconds_above_0,
    metavar="SECONDS",
    default=60.0,
    help="After how long a request counts as failed.",
)
@click.option("--processes", type=click.IntRange(1, 256), default=1, help="How many processes share the callers.")
@click.option(
    "--max-message-bytes",
    type=click.IntRange(1, MAX_MESSAGE_BYTES),
    default=DEFAULT_MAX_MESSAGE_BYTES,
    help="Size of the largest answer accepted, in bytes.",
)
@metadata_option("as streams open")
@security_options
@click.option("--json", type=NEW_FILE, help="Write the results to this file.")
@click.option("--picture", type=NEW_FILE, help="Draw them to this file, such as bench.png.")
def bench(
    address: str,
    callers: list[int],
    duration_s: float,
    warm_up_s: float,
    payload_bytes: int,
    payload_file: Path | None,
    action: int | None,
    timeout_s: float,
    processes: int,
    max_message_bytes: int,
    metadata: tuple[tuple[str, str], ...],
    json: Path | None,
    picture: Path | None,
    **tls: Any,
) -> int:
    """Load the running server at ADDRESS (host:port or unix:/path), and print a table with a row per number of callers.

    Each caller sends its next request as soon as the last is answered. The knee is the fewest callers that reach 90 %
    of the best throughput: with more callers, requests mostly wait longer. One request goes ahead, to check that the
    server answers.

    Status 0: every request was answered. 1: some failed. 2: nothing could be measured. ADDRESS can also be set by
    GRPC_BATCHER_BENCH_ADDRESS.
    """
    check_has_port(address)
    for option, path in (("--json", json), ("--picture", picture)):
        if path is not None and not os.access(path.parent, os.W_OK):
            raise CommandError(f"{option} {path}: the folder {path.parent} does not exist or is not writable")
    if picture is not None:
        check_picture(picture)
    question = Question(
        address=address,
        security=security(**tls),
        metadata=metadata,
        payload=bytes(payload_bytes) if payload_file is None else payload_file.read_bytes(),
        action=action,
        timeout_s=timeout_s,
        max_message_bytes=max_message_bytes,
    )
    began = datetime.now(timezone.utc)
    transport = _ask_once(question)
    points = _measure(question, callers, warm_up_s, duration_s, processes)
    print("\n".join(remarks(points, processes)))
    found = knee(points)
    record = {
        "grpc_batcher": __version__,
        "began": began.isoformat(timespec="seconds"),
        "address": address,
        "model": "repr" if action is None else "dyna",
        "transport": transport,
        "payload_bytes": len(question.payload),
        "duration_s": duration_s,
        "warm_up_s": warm_up_s,
        "processes": processes,
        "requests_ahead": 1,
        "points": [asdict(point) for point in points],
        "knee": {"rule": KNEE_RULE, "callers": found.callers if found else None},
    }
    try:
        if json is not None:
            json.write_text(dumps(record, indent=2) + "\n")
        if picture is not None:
            draw(points, f"{address}, {record['model']}, {len(question.payload)} bytes per request", picture)
    except OSError as error:
        raise CommandError(f"cannot write: {error}") from None
    return 1 if any(point.errors for point in points) else 0


def _ask_once(question: Question) -> str:
    """Send one request, and return the transport it used. Raises CommandError if it gets no answer."""
    try:
        with question.connect() as client:
            question.ask(client)
            return client.transport
    except RequestError as error:
        raise CommandError(unresolved(question.address) or f"{question.address} did not answer: {error}") from None
    except (TypeError, ValueError) as error:
        raise CommandError(str(error)) from None


def _measure(
    question: Question, callers: list[int], warm_up_s: float, duration_s: float, processes: int
) -> list[Point]:
    """Measure each number of callers, and print a row of the table for each."""
    points = []
    with Callers(question, min(processes, callers[-1])) as asking:
        asking.wait_until_ready()
        print(TABLE_HEAD, flush=True)
        for number in callers:
            live = _LiveLine(number, warm_up_s, duration_s)
            try:
                asked = asking.ask(number, warm_up_s, duration_s, live.show)
            finally:
                live.clear()
            points.append(Point.of(asked, duration_s))
            print(points[-1].table_row(), flush=True)
    return points


class _LiveLine:
    """The progress of a measurement: one line, rewritten in place, on stderr if that is a terminal."""

    def __init__(self, callers: int, warm_up_s: float, duration_s: float) -> None:
        self._callers = callers
        self._warm_up_s = warm_up_s
        self._duration_s = duration_s
        self._shown = sys.stderr.isatty()

    def show(self, passed_s: float, answers: int) -> None:
        if not self._shown:
            return
        measured_s = min(passed_s - self._warm_up_s, self._duration_s)
        state = "warming up" if measured_s < 0 else f"{measured_s:.1f} of {self._duration_s:g} s, {answers} answers"
        print(f"\r\x1b[K{self._callers} callers: {state}", end="", file=sys.stderr, flush=True)

    def clear(self) -> None:
        if self._shown:
            print("\r\x1b[K", end="", file=sys.stderr, flush=True)
