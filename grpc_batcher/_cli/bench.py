"""`grpc-batcher bench`: how much a running server answers, by the number of callers."""

from __future__ import annotations

import os
import sys
from dataclasses import asdict
from datetime import datetime, timezone
from json import dumps
from pathlib import Path
from typing import Any

import click

from .._cli.callers import Callers, Question
from .._cli.options import (
    FILE,
    NEW_FILE,
    Failure,
    check_has_port,
    metadata_option,
    seconds,
    seconds_above_0,
    security,
    security_options,
    unresolved,
)
from .._cli.report import KNEE_RULE, TABLE_HEAD, Point, check_picture, draw, knee, remarks
from .._errors import RequestError
from .._version import __version__


def _counts(text: str) -> list[int]:
    """Read numbers above 0 with commas between them: sorted, and each once. Raises BadParameter."""
    try:
        counts = sorted({int(part) for part in text.split(",")})
    except ValueError:
        counts = [0]
    if counts[0] < 1:
        raise click.BadParameter(f"{text!r} is no list of numbers above 0, such as 1,2,4.")
    return counts


@click.command(short_help="Measure how much a running server answers.")
@click.argument("address", envvar="GRPC_BATCHER_BENCH_ADDRESS")
@click.option(
    "--callers",
    type=_counts,
    metavar="N,N,...",
    default="1,2,4,8,16",
    help="Numbers of callers to measure with.",
)
@click.option(
    "--duration-s",
    type=seconds_above_0,
    metavar="SECONDS",
    default=5.0,
    help="Seconds that are measured with each number of callers.",
)
@click.option("--warm-up-s", type=seconds, default=1.0, help="Seconds that callers ask before that.")
@click.option(
    "--payload-bytes", type=click.IntRange(0, 2**31 - 1), default=64, help="Size of a request's data, which is zeros."
)
@click.option("--payload-file", type=FILE, help="A file with a request's data, in place of zeros.")
@click.option(
    "--action", type=int, help="The action to send; it makes the requests dyna's. Without it they are repr's."
)
@click.option(
    "--timeout-s",
    type=seconds_above_0,
    metavar="SECONDS",
    default=60.0,
    help="Seconds after which a request counts as failed.",
)
@click.option(
    "--processes", type=click.IntRange(1, 256), default=1, help="Processes among which the callers are shared."
)
@click.option(
    "--max-message-bytes",
    type=click.IntRange(1, 2**31 - 1),
    default=64 * 1024 * 1024,
    help="Bytes of the largest answer taken.",
)
@metadata_option("as streams open")
@security_options
@click.option("--json", type=NEW_FILE, help="Write what was found to this file.")
@click.option("--picture", type=NEW_FILE, help="Draw it to this file, such as bench.png.")
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
    """Load the running server at ADDRESS (host:port or unix:/path), and print a table by the number of callers.

    Each caller asks again as soon as it is answered. The knee is the fewest callers that reach 90 % of the best
    throughput: with more, requests mostly wait longer. One request goes ahead, to see whether there is an answer.

    Status 0: every request was answered. 1: some failed. 2: it could not be measured. ADDRESS may also come from
    GRPC_BATCHER_BENCH_ADDRESS.
    """
    check_has_port(address)
    for option, path in (("--json", json), ("--picture", picture)):
        if path is not None and not os.access(path.parent, os.W_OK):
            raise Failure(f"{option} {path}: there is no folder {path.parent} to write to")
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
    gear = _ask_once(question)
    points = _measure(question, callers, warm_up_s, duration_s, processes)
    print("\n".join(remarks(points, processes)))
    found = knee(points)
    record = {
        "grpc_batcher": __version__,
        "began": began.isoformat(timespec="seconds"),
        "address": address,
        "model": "repr" if action is None else "dyna",
        "gear": gear,
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
            draw(points, f"{address}, {record['model']}, {len(question.payload)} bytes a request", picture)
    except OSError as error:
        raise Failure(f"can not write: {error}") from None
    return 1 if any(point.errors for point in points) else 0


def _ask_once(question: Question) -> str:
    """Send one request, and return the gear it went by. Raises Failure if it has no answer."""
    try:
        with question.connect() as client:
            question.ask(client)
            return client.gear
    except RequestError as error:
        raise Failure(unresolved(question.address) or f"{question.address} gave no answer: {error}") from None
    except (TypeError, ValueError) as error:
        raise Failure(str(error)) from None


def _measure(
    question: Question, callers: list[int], warm_up_s: float, duration_s: float, processes: int
) -> list[Point]:
    """Measure with each number of callers, and print a row of the table for each."""
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
    """How far a measurement is: one line on stderr, written over and over, and only if that is a terminal."""

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
