"""Who is compared: `lazypages serve`, real `criu lazy-pages`, and the bare loop in its variants."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from lazypages.bench import certificates
from lazypages.bench.checkpoints import BASE, Checkpoint
from lazypages.bench.errors import BenchError
from lazypages.bench.programs import Programs
from lazypages.bench.workloads import Source, Workload
from lazypages.net.names import AUTO, PROTOCOLS

CRIU_DIR = Path("/var/cache/lazypages/criu")

#: Names of peers that are looked up in what was found.
OURS = "lazypages serve"
BOTH = "the same, our page server"
TRACED = "the same, with --trace"
LIMIT = "loop, same CPU"

#: Why a peer has no numbers where nothing is remote; not worth telling.
ONLY_REMOTE = "for remote sources only"

#: The CPU where the bare loop and the task share one.
SHARED_CPU = 0


@dataclass(frozen=True, slots=True)
class Peer:
    """One that serves."""

    name: str

    @property
    def cpu(self) -> int | None:
        """Where the task is put, too."""
        return None

    @property
    def takes_remote(self) -> bool:
        """Whether it asks a page server when the source is remote."""
        return True

    @property
    def is_ours(self) -> bool:
        return False

    def server(self, criu: Path | None, images: Path, work: Path) -> Callable[[int], list[str]]:
        """How its page server is started, given a port: CRIU's, where `criu` is everybody else's.

        Raises BenchError without one. `--status-fd N` is added.
        """
        if criu is None:
            raise BenchError("a page server of CRIU's is needed: name a CRIU")
        return partial(_serve_pages, [str(criu)], images, work)

    def cannot(self, workload: Workload) -> str | None:
        """Why there is no such row for this peer; None if there is."""
        raise NotImplementedError

    def command(self, checkpoint: Checkpoint, work: Path, port: int | None) -> list[str]:
        """What to execute; `--status-fd N` is added. ``port``: of the page server on this machine, if there is one."""
        raise NotImplementedError


@dataclass(frozen=True, slots=True)
class LazyPages(Peer):
    """Ours, started as a user starts it. ``both``: with our page server at the other end, too; else ``protocol`` is
    that of CRIU's there, which CRIU's daemon need not find out either. ``program``: that of another installation."""

    options: tuple[str, ...] = ()
    program: tuple[str, ...] = (sys.executable, "-m", "lazypages")
    both: bool = False
    protocol: str = AUTO

    @property
    def is_ours(self) -> bool:
        return True

    def cannot(self, workload: Workload) -> str | None:
        return ONLY_REMOTE if self.both and workload.layout.source is not Source.REMOTE else None

    def server(self, criu: Path | None, images: Path, work: Path) -> Callable[[int], list[str]]:
        if self.both:
            return partial(_serve_pages, [*self.program], images, work)
        # by name: dataclasses with slots are made anew, and super() alone does not find them (Python < 3.14)
        return Peer.server(self, criu, images, work)

    def command(self, checkpoint: Checkpoint, work: Path, port: int | None) -> list[str]:
        command = [*self.program, "serve", *_directories(checkpoint, work), *self.options]
        command += [*_remote(port, work), "--stats-json", str(stats_path(work))]
        return command if port is None else [*command, "--page-server-protocol", self.protocol]


@dataclass(frozen=True, slots=True)
class CriuDaemon(Peer):
    """CRIU's own. ``program``: its executable."""

    program: Path

    def server(self, criu: Path | None, images: Path, work: Path) -> Callable[[int], list[str]]:  # noqa: ARG002
        # Its own: the protocol has changed with 4.2 (reference/criu-interfaces §4).
        return Peer.server(self, self.program, images, work)

    def cannot(self, workload: Workload) -> str | None:
        # It reads such a page from the parent, never copies it, and the task hangs (reference/criu-interfaces §7).
        return "no lazy pages from parents" if workload.layout.depth else None

    def command(self, checkpoint: Checkpoint, work: Path, port: int | None) -> list[str]:
        log = ["-v1"]
        return [str(self.program), "lazy-pages", *_directories(checkpoint, work), *log, *_remote(port, work)]


@dataclass(frozen=True, slots=True)
class BareLoop(Peer):
    """The least that a handler must do (loop.c). ``threads``: copy everything once the restore is finished."""

    programs: Programs
    shared_cpu: bool = False
    threads: int = 0

    @property
    def cpu(self) -> int | None:
        return SHARED_CPU if self.shared_cpu else None

    @property
    def takes_remote(self) -> bool:
        # From local pages all the same: the limit of what a remote source could reach.
        return False

    def cannot(self, workload: Workload) -> str | None:
        if workload.real:
            return "knows only the bench's images"
        if workload.background and not self.threads:
            return "answers faults only"
        if not workload.background and self.threads:
            return "is for bulk copies"
        return None

    def command(self, checkpoint: Checkpoint, work: Path, port: int | None) -> list[str]:  # noqa: ARG002
        layout = checkpoint.layout
        command = [str(self.programs.loop), "--work", str(work), "--pages", checkpoint.flat]
        command += ["--base", hex(BASE), "--size", str(layout.span), "--stride", str(layout.stride)]
        if self.threads:
            command += ["--bulk", str(self.threads)]
        return [*command, "--cpu", str(SHARED_CPU)] if self.shared_cpu else command


def all_peers(
    programs: Programs,
    criu: Sequence[tuple[str, Path]],
    *,
    traced: bool = False,
    against: Sequence[Path] = (),
) -> list[Peer]:
    """Everybody, ours first. ``criu``: names and executables. ``traced``: ours with a trace, too.

    ``against``: the executables of other installations of ours.
    """
    protocol = _protocol_of(criu[0][0]) if criu else AUTO
    return [
        LazyPages(OURS, protocol=protocol),
        *([LazyPages(TRACED, ("--trace", "trace"), protocol=protocol)] if traced else []),
        *(
            LazyPages(f"the other {i}", protocol=protocol, program=(str(path),))
            for i, path in enumerate(against, 1)
        ),
        LazyPages(BOTH, both=True),
        *(CriuDaemon(name, path) for name, path in criu),
        BareLoop(LIMIT, programs, shared_cpu=True),
        BareLoop("loop, any CPU", programs),
        *(BareLoop(bulk_name(threads), programs, threads=threads) for threads in (1, 2)),
    ]


def _protocol_of(criu: str) -> str:
    """Which --page-server-protocol "criu 4.1.1" speaks."""
    version = criu.removeprefix("criu ").split(".")
    return PROTOCOLS[(int(version[0]), int(version[1])) >= (4, 2)]


def bulk_name(threads: int) -> str:
    """The bare loop that copies everything with as many threads."""
    return f"bulk loop x {threads}"


def stats_path(work: Path) -> Path:
    """Where our daemon leaves its numbers."""
    return work / "stats.json"


def _directories(checkpoint: Checkpoint, work: Path) -> list[str]:
    return ["-D", str(checkpoint.images), "-W", str(work)]


def _serve_pages(program: list[str], images: Path, work: Path, port: int) -> list[str]:
    command = [*program, "page-server", "--lazy-pages", "-D", str(images), "-W", str(work), "-v1"]
    return [*command, "--address", "127.0.0.1", "--port", str(port), *certificates.options(work)]


def _remote(port: int | None, work: Path) -> list[str]:
    if port is None:
        return []
    where = ["--page-server", "--address", "127.0.0.1", "--port", str(port)]
    return [*where, *certificates.options(work)]


def find_criu(given: Sequence[Path]) -> list[tuple[str, Path]]:
    """Names and executables of CRIU: the given ones, or the first of $LAZYPAGES_CRIU, where the tests' `.ci/fetch-criu`
    puts it, and PATH. Raises BenchError for one that does not run, and when there is none."""
    if given:
        return [criu_version(path) for path in given]
    candidates = [
        os.environ.get("LAZYPAGES_CRIU"),
        CRIU_DIR / "4.1/criu",
        CRIU_DIR / "4.2/criu",
        shutil.which("criu"),
    ]
    for candidate in candidates:
        if candidate and Path(candidate).exists():
            return [criu_version(Path(candidate))]
    raise BenchError(
        "no CRIU to compare with: name one with --criu or LAZYPAGES_CRIU, or leave it out with --no-criu"
    )


def criu_version(path: Path) -> tuple[str, Path]:
    """("criu 4.1.1", its executable). Raises BenchError."""
    try:
        text = subprocess.run(
            [path, "--version"], check=True, capture_output=True, text=True, timeout=30
        ).stdout
    except (OSError, subprocess.SubprocessError) as error:
        raise BenchError(f"{path} does not run: {error}") from None
    found = re.search(r"^Version: (\S+)", text, re.MULTILINE)
    if not found:
        raise BenchError(f"{path} does not tell its version")
    return f"criu {found[1]}", path
