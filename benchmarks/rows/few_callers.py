"""A lone caller and eight, where a batch has room for 16."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from functools import partial

from measuring import Group, Sample, measure
from processes import Child
from row import Bench, Cell, Row, shared
from systems import DIRECT, PUBLIC, batcher

TITLE = "few callers"

# A caller that was answered within the last second is waited for. One that asks every half second keeps a lone caller
# waiting for the window each time, but for the two moments a second at which both ask.
_COMPANION_PAUSE_S = 0.5

_CALLBACKS = {"answer": "", "native": ", 2 ms callback"}


def open_row(bench: Bench, stack: ExitStack) -> Row:
    cells = []

    def add(key: str, title: str, server: Child, groups: Sequence[Group]) -> None:
        cells.append(Cell(f"few/{key}", title, "requests_per_s", partial(_measure_afresh, bench, server, groups)))

    systems = {
        (callback, transport): batcher(transport, callback) for callback in _CALLBACKS for transport in (DIRECT, PUBLIC)
    }
    for (callback, transport), (server, callers) in bench.start(stack, systems).items():
        title = systems[callback, transport].title
        for count, who in ((1, "a lone caller"), (8, "eight callers")):
            add(
                f"{count}/{callback}/{transport}",
                f"{who}{_CALLBACKS[callback]}: {title}",
                server,
                shared(count, callers),
            )
        if callback == "answer":
            add(
                f"window/{transport}",
                f"a lone caller, window alone: {title}",
                server,
                (Group(callers[0], 1), Group(callers[1], 1, pause_s=_COMPANION_PAUSE_S, counted=False)),
            )
    return Row(sorted(cells, key=lambda cell: cell.key.rpartition("/")[0]))


def _measure_afresh(bench: Bench, server: Child, groups: Sequence[Group]) -> Sample:
    """Measure on new streams, and close them: callers who were just here would be waited for."""
    sample = measure(
        server,
        groups,
        payload_bytes=64,
        warm_s=bench.settings.warm_s,
        window_s=bench.settings.window_s,
        least_batch=sum(group.callers for group in groups if group.counted) / 2,
    )
    for group in groups:
        group.child.ask("close")
    return sample
