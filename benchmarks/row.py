"""What a row of the benchmark is made of."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any, TypeVar

from grpc_batcher._cli.workers import WorkerError, stop_all

from measuring import Group, Sample, measure
from processes import Child
from systems import SYSTEMS, System, Unavailable

K = TypeVar("K")


@dataclass(frozen=True)
class Settings:
    """How long and how much to measure.

    rounds: how often each cell is measured; each round goes through all cells of a row once.
    warm_s, window_s: how long callers ask before their answers count, and how long they count.
    idle_s: how long idle processes are watched.
    most_public_streams: the public transport is left out above this number; opening more takes it seconds.
    """

    rounds: int
    warm_s: float
    window_s: float
    idle_s: float
    most_public_streams: int


@dataclass(frozen=True)
class Cell:
    """One thing to measure.

    key: its name in results and targets, such as "throughput/64/direct". It ends with the system.
    title: its name in the table.
    value: the sample's value that represents it.
    """

    key: str
    title: str
    value: str
    measure: Callable[[], Sample]

    @property
    def system(self) -> str:
        return self.key.rpartition("/")[2]


@dataclass
class Row:
    """Cells that are measured in turn, once per round.

    in_order: whether every round must keep this order; otherwise every second round goes backwards.
    most_rounds: a limit, where fewer rounds than the settings ask for are enough.
    begin_round: called before each round.
    """

    cells: list[Cell]
    in_order: bool = False
    most_rounds: int = 1000
    begin_round: Callable[[], None] = field(default=lambda: None)


Started = tuple[Child, list[Child]]


class Bench:
    """What rows share: the settings, the processes of all systems, what could not run, and how processes are tuned.

    not_run: the reason, by the system's title.
    info: what `grpc_batcher.info()` returned in the processes, by their names.
    mistuned: processes that this library tuned and should not have tuned, or the other way round.
    """

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        self.not_run: dict[str, str] = {}
        self.info: dict[str, dict[str, str]] = {}
        self.mistuned: list[str] = []
        self._all = ExitStack()
        self._all_started: dict[str, Started] | None = None

    def all_systems(self) -> dict[str, Started]:
        """Return the processes of all systems, by name. They run until `release`."""
        if self._all_started is None:
            self._all_started = self.start(self._all, SYSTEMS)
        return self._all_started

    def release(self) -> None:
        self._all.close()
        self._all_started = None

    def measure(self, server: Child, groups: Sequence[Group], *, payload_bytes: int = 64, **options: Any) -> Sample:
        """Measure for as long as the settings say. options: as `measuring.measure` has them."""
        times = {"warm_s": self.settings.warm_s, "window_s": self.settings.window_s}
        sample = measure(server, groups, payload_bytes=payload_bytes, **{**times, **options})
        self.check_tuning(server, *(group.child for group in groups if group.callers))
        return sample

    def check_tuning(self, *children: Child) -> None:
        """Note how processes that were used are tuned: this library's own by default, and others not at all."""
        for child in children:
            if child.info is not None:
                self.info[child.name] = child.info
            self.mistuned += [problem for problem in child.mistuned() if problem not in self.mistuned]

    def start(self, stack: ExitStack, systems: Mapping[K, System], processes: int = 2) -> dict[K, Started]:
        """Start a server and some processes of callers for each system, until the stack is closed.

        Systems that cannot run here are left out and noted in `not_run`.
        """
        children: list[Child] = []
        stack.callback(stop_all, children)
        servers: dict[K, Child] = {}
        started: dict[K, Started] = {}
        for name, system in systems.items():
            with self._noting(system):
                servers[name] = system.spawn_server()
                children.append(servers[name])
        for name, server in servers.items():
            system = systems[name]
            with self._noting(system):
                system.check_ready(server)
                callers = [system.spawn_callers(server) for _ in range(processes)]
                children += callers
                started[name] = server, callers
        for name, (_, callers) in tuple(started.items()):
            with self._noting(systems[name]):
                try:
                    for child in callers:
                        systems[name].check_ready(child)
                except BaseException:
                    del started[name]
                    raise
        return started

    @contextmanager
    def _noting(self, system: System) -> Iterator[None]:
        try:
            yield
        except (Unavailable, WorkerError) as error:
            self.not_run[system.title] = str(error)


def shared(callers: int, children: list[Child]) -> list[Group]:
    """Spread callers over processes; the first ones get one more where the number does not divide evenly."""
    share, more = divmod(callers, len(children))
    return [Group(child, share + (number < more)) for number, child in enumerate(children)]
