"""From 1 to 1,024 open streams, all in use, and the memory that an open stream costs the server."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import ExitStack
from functools import partial

from measuring import Sample, open_streams
from row import Bench, Cell, Row, Started, shared
from systems import DIRECT, PUBLIC, batcher

TITLE = "open streams, each with a caller"

COUNTS = (1, 16, 128, 1024)

# A connection per stream, as callers in processes of their own have; the others share one in each of the two processes.
EACH = "direct-connections"

_SYSTEMS = {
    DIRECT: batcher(DIRECT),
    PUBLIC: batcher(PUBLIC),
    EACH: batcher(DIRECT, caller="batcher-each"),
}

# A thousand threads take a while to start, and each waits longer for its turn.
_SETTLE_S_PER_STREAM = 0.0003
_WINDOW_S_PER_STREAM = 0.001


class _Servers:
    """Servers and callers, new in each round: memory that was once used is seldom given back."""

    def __init__(self, bench: Bench) -> None:
        self._bench = bench
        self._stack = ExitStack()
        self._started: Mapping[str, Started] = {}
        self._rss_with_one: dict[str, int] = {}

    def renew(self) -> None:
        self.close()
        self._started = self._bench.start(self._stack, _SYSTEMS)
        for name in self._started:
            server, callers = self._started[name]
            open_streams(server, shared(1, callers))
            self._rss_with_one[name] = server.rss_bytes()

    def close(self) -> None:
        self._stack.close()

    def measure(self, name: str, streams: int) -> Sample:
        if name not in self._started:
            return Sample({}, ["its processes could not be started"])
        server, callers = self._started[name]
        open_streams(server, shared(streams, callers))
        sample = self._bench.measure(
            server,
            shared(streams, callers),
            window_s=self._bench.settings.window_s + streams * _WINDOW_S_PER_STREAM,
            settle_s=0.02 + streams * _SETTLE_S_PER_STREAM,
            everyone=False,
        )
        if sample.values.get("open_streams") != streams:
            sample.problems.append(f"{sample.values.get('open_streams')} streams were open instead of {streams}")
        if streams > 1:
            sample.values["stream_kib"] = (server.rss_bytes() - self._rss_with_one[name]) / (streams - 1) / 1024
        return sample


def open_row(bench: Bench, stack: ExitStack) -> Row:
    servers = _Servers(bench)
    stack.callback(servers.close)
    cells = []

    def add(count: int, name: str, title: str) -> None:
        key = f"streams/{count}/{name}"
        cells.append(Cell(key, title, "requests_per_s", partial(servers.measure, name, count)))

    for count in COUNTS:
        for name in (DIRECT, PUBLIC):
            if name == PUBLIC and count > bench.settings.most_public_streams:
                continue
            streams = "1 stream" if count == 1 else f"{count:,} streams"
            add(count, name, f"{streams}: {_SYSTEMS[name].title}")
    add(COUNTS[-1], EACH, f"{COUNTS[-1]:,} streams, a connection each: {_SYSTEMS[EACH].title}")
    # The streams of one count stay open for the next larger one.
    return Row(cells, in_order=True, begin_round=servers.renew)
