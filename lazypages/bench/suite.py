"""The lists of workloads, and running them in rounds."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass, field
from pathlib import Path

from lazypages.bench import checkpoints, real, runs
from lazypages.bench.errors import BenchError
from lazypages.bench.machine import OthersWatch
from lazypages.bench.metrics import Spread
from lazypages.bench.peers import CriuDaemon, Peer
from lazypages.bench.pipes import raised_pipe_limit
from lazypages.bench.programs import Programs
from lazypages.bench.runs import Run
from lazypages.bench.workloads import MIB, PAGE_SIZE, Layout, Order, Source, Workload

TOUCHES = 5000
_MILLION = 1_000_000


def _pages(mib: int) -> int:
    return mib * MIB // PAGE_SIZE


def _idle(
    name: str,
    mib: int,
    *,
    cold: bool = False,
    depth: int = 0,
    source: Source = Source.LOCAL,
    tls: bool = False,
) -> Workload:
    layout = Layout(_pages(mib), depth=depth, source=source, tls=tls)
    return Workload(name, layout, Order.RANDOM, 1, background=True, cold=cold)


def _random(
    name: str, mib: int, *, touches: int = TOUCHES, cold: bool = False, **layout: int | Source
) -> Workload:
    return Workload(name, Layout(_pages(mib), **layout), Order.RANDOM, touches, cold=cold)  # type: ignore[arg-type]


def _tasks(name: str, tasks: int, *, turns: bool) -> Workload:
    layout = Layout(max(64, TOUCHES // tasks), tasks=tasks)
    return Workload(name, layout, Order.RANDOM, max(10, TOUCHES // tasks), turns=turns)


def _far(round_trip: int, touches: int, mib: int) -> tuple[Workload, ...]:
    """Two workloads over a link with a round trip of `round_trip` ms: faults alone, the background alone."""
    name = f"remote, {round_trip} ms"
    layout = Layout(_pages(mib), source=Source.REMOTE, round_trip=round_trip)
    return (
        Workload(f"{name}: random, {mib} MiB", layout, Order.RANDOM, touches),
        Workload(f"{name}: idle, {mib} MiB", layout, Order.RANDOM, 1, background=True),
    )


def _remote(name: str, order: Order, touches: int, *, threads: int = 1, round_trip: int = 0) -> Workload:
    """Touches during the background transfer, then a pass over all 64 MiB."""
    layout = Layout(_pages(64), source=Source.REMOTE, round_trip=round_trip)
    return Workload(name, layout, order, touches, threads=threads, background=True, passes=True)


#: What `targets` needs, by name; the other lists take from it.
RANDOM = _random("random, 64 MiB", 64)
BACKGROUND = Workload(
    "random with background, 512 MiB",
    Layout(_pages(512)),
    Order.RANDOM,
    TOUCHES,
    background=True,
    passes=True,
)
IDLE = _idle("idle, 1 GiB", 1024)
REAL = Workload(
    "criu restore: random, then all, 512 MiB",
    Layout(_pages(512)),
    Order.RANDOM,
    TOUCHES,
    background=True,
    passes=True,
    real=True,
)
REAL_REMOTE = Workload(
    "criu restore, remote: the same",
    Layout(_pages(512), source=Source.REMOTE),
    Order.RANDOM,
    TOUCHES,
    background=True,
    passes=True,
    real=True,
)
REMOTE = _random("remote: random, 64 MiB", 64, source=Source.REMOTE)
REMOTE_TLS = _random("remote, TLS: random, 64 MiB", 64, source=Source.REMOTE, tls=True)
ONE_TASK = _tasks("1 task, in turns", 1, turns=True)
THOUSAND_TASKS = _tasks("1000 tasks, in turns", 1000, turns=True)
FEW_ENTRIES = Workload("4 entries, 4 GB, random", Layout(_MILLION, sparse=True), Order.RANDOM, 300)
MILLION_ENTRIES = Workload(
    "1,000,000 entries, random", Layout(_MILLION, stride=2, sparse=True), Order.RANDOM, 300
)
IDLE_8G = _idle("idle, 8 GiB", 8192)

TARGETS = (
    RANDOM,
    BACKGROUND,
    IDLE,
    REAL,
    REAL_REMOTE,
    REMOTE,
    ONE_TASK,
    THOUSAND_TASKS,
    FEW_ENTRIES,
    MILLION_ENTRIES,
    IDLE_8G,
)

DEFAULT = (
    RANDOM,
    _random("random, 64 MiB, cold", 64, cold=True),
    _random("random, 1 GiB", 1024),
    Workload("writes, 64 MiB", Layout(_pages(64)), Order.RANDOM, TOUCHES, write=True),
    Workload("pointer chase, 64 MiB", Layout(_pages(64)), Order.CHASE, TOUCHES),
    Workload("sequential, 64 MiB", Layout(_pages(64)), Order.SEQUENTIAL, _pages(64)),
    Workload("sequential, 64 MiB, cold", Layout(_pages(64)), Order.SEQUENTIAL, _pages(64), cold=True),
    BACKGROUND,
    Workload("2 threads, 64 MiB", Layout(_pages(64)), Order.RANDOM, TOUCHES, threads=2),
    Workload("8 threads, 64 MiB", Layout(_pages(64)), Order.RANDOM, TOUCHES, threads=8),
    ONE_TASK,
    _tasks("10 tasks, in turns", 10, turns=True),
    _tasks("100 tasks, in turns", 100, turns=True),
    THOUSAND_TASKS,
    _tasks("10 tasks at once", 10, turns=False),
    _tasks("1000 tasks at once", 1000, turns=False),
    FEW_ENTRIES,
    MILLION_ENTRIES,
    _random("chain of 1 parent: random, 64 MiB", 64, depth=1),
    _random("chain of 5 parents: random, 64 MiB", 64, depth=5),
    _idle("chain of 1 parent: idle, 256 MiB", 256, depth=1),
    _idle("chain of 5 parents: idle, 256 MiB", 256, depth=5),
    _idle("idle, 64 MiB", 64),
    IDLE,
    _idle("idle, 1 GiB, cold", 1024, cold=True),
    REMOTE,
    _idle("remote: idle, 256 MiB", 256, source=Source.REMOTE),
    REMOTE_TLS,
    _idle("remote, TLS: idle, 256 MiB", 256, source=Source.REMOTE, tls=True),
    *_far(1, 1000, 128),
    *_far(20, 100, 32),
    REAL,
    REAL_REMOTE,
)

FULL = (
    *DEFAULT,
    _random("random, 8 GiB", 8192),
    _random("random, 1 GiB, cold", 1024, cold=True),
    _tasks("100 tasks at once", 100, turns=False),
    Workload("pointer chase, 1 GiB", Layout(_pages(1024)), Order.CHASE, TOUCHES),
    Workload(
        "writes with background, 512 MiB",
        BACKGROUND.layout,
        Order.RANDOM,
        TOUCHES,
        write=True,
        background=True,
    ),
    Workload(
        "8 threads with background, 512 MiB",
        BACKGROUND.layout,
        Order.RANDOM,
        TOUCHES,
        threads=8,
        background=True,
    ),
    _remote("remote: sequential with background, 64 MiB", Order.SEQUENTIAL, _pages(64)),
    _remote("remote: pointer chase with background, 64 MiB", Order.CHASE, TOUCHES),
    _remote("remote: 8 threads with background, 64 MiB", Order.RANDOM, TOUCHES, threads=8),
    _remote("remote, 1 ms: random with background, 64 MiB", Order.RANDOM, 1000, round_trip=1),
    _remote("remote, 20 ms: random with background, 64 MiB", Order.RANDOM, 100, round_trip=20),
    Workload("sequential, 1 GiB", Layout(_pages(1024)), Order.SEQUENTIAL, _pages(1024)),
    Workload("fragmented: idle, 50,000 entries", Layout(50_000, stride=2), Order.RANDOM, 1, background=True),
    IDLE_8G,
)

#: Small workloads, to check that everything works.
QUICK = (
    _random("random, 16 MiB", 16, touches=1000),
    Workload("writes, 16 MiB", Layout(_pages(16)), Order.RANDOM, 1000, write=True),
    Workload("pointer chase, 16 MiB", Layout(_pages(16)), Order.CHASE, 1000),
    Workload("sequential, 16 MiB", Layout(_pages(16)), Order.SEQUENTIAL, _pages(16)),
    Workload("4 threads, 16 MiB", Layout(_pages(16)), Order.RANDOM, 1000, threads=4),
    Workload("20 tasks", Layout(64, tasks=20), Order.RANDOM, 40, turns=True),
    Workload("20,000 entries", Layout(20_000, stride=2, sparse=True), Order.RANDOM, 200),
    _random("chain of 5 parents, 16 MiB", 16, touches=1000, depth=5),
    _idle("idle, 64 MiB", 64),
    _idle("idle, 16 MiB, cold", 16, cold=True),
    Workload(
        "random with background, 64 MiB", Layout(_pages(64)), Order.RANDOM, 1000, background=True, passes=True
    ),
    _random("remote: random, 16 MiB", 16, touches=1000, source=Source.REMOTE),
    _random("remote, 1 ms: random, 16 MiB", 16, touches=100, source=Source.REMOTE, round_trip=1),
    Workload(
        "criu restore: random, then all, 32 MiB",
        Layout(_pages(32)),
        Order.RANDOM,
        1000,
        background=True,
        passes=True,
        real=True,
    ),
)


@dataclass(slots=True)
class Row:
    """A workload and its runs by peer. ``absent``: reasons why peers have none. ``others``: CPU share of others."""

    workload: Workload
    rounds: dict[str, list[Run]] = field(default_factory=dict)
    absent: dict[str, str] = field(default_factory=dict)
    others: float = 0.0

    def values(self, peer: str, key: str) -> list[float]:
        """The values of a metric in the rounds that have it."""
        return [run.metrics[key] for run in self.rounds.get(peer, []) if key in run.metrics]

    def spread(self, peer: str, key: str) -> Spread | None:
        values = self.values(peer, key)
        return Spread.of(values) if values else None


def turns(peers: Sequence[Peer], turn: int) -> list[Peer]:
    """The order of peers in a round. Over the rounds each peer is first, and follows either neighbour."""
    shift = turn // 2 % len(peers)
    order = [*peers[shift:], *peers[:shift]]
    return order[::-1] if turn % 2 else order


@dataclass(frozen=True, slots=True)
class Suite:
    """Runs workloads. ``folder``: for images and other files. ``progress`` gets a line before each run."""

    programs: Programs
    peers: Sequence[Peer]
    folder: Path
    rounds: int
    progress: Callable[[str], None]

    def run(self, workloads: Sequence[Workload]) -> Iterator[Row]:
        """Yield each row when it is complete. A peer that fails is absent from its row, with the reason.

        Raises BenchError only if a checkpoint can't be created.
        """
        with ExitStack() as stack:
            criu = any(isinstance(peer, CriuDaemon) for peer in self.peers)
            if criu and any(workload.layout.source is Source.REMOTE for workload in workloads):
                stack.enter_context(raised_pipe_limit())
            for number, workload in enumerate(workloads):
                folder = self.folder / f"row-{number}"
                try:
                    yield self._row(workload, folder)
                finally:
                    shutil.rmtree(folder, ignore_errors=True)

    def _row(self, workload: Workload, folder: Path) -> Row:
        row = Row(workload)
        able = []
        for peer in self.peers:
            why = peer.cannot(workload)
            if why:
                row.absent[peer.name] = why
            else:
                able.append(peer)
        runner = self._runner(workload, folder)
        if self.rounds > 1:
            self._warm_up(runner, able[-1], folder)
        watch = OthersWatch()
        for turn in range(self.rounds):
            for peer in turns(able, turn):
                if peer.name in row.absent:
                    continue
                self.progress(f"{workload.name}: round {turn + 1} of {self.rounds}, {peer.name}")
                work = folder / f"{turn}-{able.index(peer)}"
                work.mkdir()
                try:
                    row.rounds.setdefault(peer.name, []).append(runner(peer, work))
                except BenchError as error:
                    row.absent[peer.name] = str(error)
                    row.rounds.pop(peer.name, None)
        row.others = watch.share()
        return row

    def _warm_up(self, runner: Callable[[Peer, Path], Run], peer: Peer, folder: Path) -> None:
        """A run whose results are discarded: the first use of memory in a virtual machine is slow."""
        work = folder / "warm-up"
        work.mkdir()
        with suppress(BenchError):  # a failure will repeat in the measured runs
            runner(peer, work)

    def _runner(self, workload: Workload, folder: Path) -> Callable[[Peer, Path], Run]:
        self.progress(f"{workload.name}: images")
        if workload.real:
            criu = next(peer.program for peer in self.peers if isinstance(peer, CriuDaemon))
            dumped = real.dump(workload, folder, self.programs, criu)
            return lambda peer, work: real.run(dumped, peer, self.programs, work)
        checkpoint = checkpoints.write(workload, folder, self.programs)
        criu_server = next((peer.program for peer in self.peers if isinstance(peer, CriuDaemon)), None)
        return lambda peer, work: runs.run(workload, checkpoint, peer, self.programs, work, criu=criu_server)
