"""The compared daemons (peers): `lazypages serve`, real `criu lazy-pages`, and variants of the bare loop."""

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

#: In the first lines of a `criu` that `lazypages criu-shim` has made.
SHIM_MARK = "# lazypages criu-shim"

#: Names of peers by which results are looked up.
OURS = "lazypages serve"
BOTH = "the same, our page server"
TRACED = "the same, with --trace"
LIMIT = "loop, same CPU"

#: Reason why a peer has no row for local sources; tables do not print it.
ONLY_REMOTE = "for remote sources only"

#: The CPU that the bare loop and the task share.
SHARED_CPU = 0


@dataclass(frozen=True, slots=True)
class Peer:
    """A daemon that is compared."""

    name: str

    @property
    def cpu(self) -> int | None:
        """The CPU on which both peer and task run; None: any."""
        return None

    @property
    def takes_remote(self) -> bool:
        """Whether it uses a page server if the source is remote."""
        return True

    @property
    def is_ours(self) -> bool:
        return False

    def server(self, criu: Path | None, images: Path, work: Path) -> Callable[[int], list[str]]:
        """The command of its page server, as a function of the port; `criu` is the CRIU that other peers use.

        `--status-fd N` is added to the command. Raises BenchError if a CRIU is needed and there is none.
        """
        if criu is None:
            raise BenchError("this needs a page server of CRIU's: name a CRIU with --criu")
        return partial(_serve_pages, [str(criu)], images, work)

    def cannot(self, workload: Workload) -> str | None:
        """The reason why this peer can't run the workload; None if it can."""
        raise NotImplementedError

    def command(self, checkpoint: Checkpoint, work: Path, port: int | None) -> list[str]:
        """The command; `--status-fd N` is added. ``port``: of the page server on this machine, or None."""
        raise NotImplementedError


@dataclass(frozen=True, slots=True)
class LazyPages(Peer):
    """`lazypages serve`, with default options. ``program``: its command, or that of another installation.

    ``both``: the page server is ours, too. Otherwise ``protocol`` is that of CRIU's page server: without detection, as
    with CRIU's daemon.
    """

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
        # Not super(): it fails in dataclasses with slots, which are created a second time (Python < 3.14).
        return Peer.server(self, criu, images, work)

    def command(self, checkpoint: Checkpoint, work: Path, port: int | None) -> list[str]:
        command = [*self.program, "serve", *_directories(checkpoint, work), *self.options]
        command += [*_remote(port, work), "--stats-json", str(stats_path(work))]
        return command if port is None else [*command, "--page-server-protocol", self.protocol]


@dataclass(frozen=True, slots=True)
class CriuDaemon(Peer):
    """`criu lazy-pages`. ``program``: its executable."""

    program: Path

    def server(self, criu: Path | None, images: Path, work: Path) -> Callable[[int], list[str]]:  # noqa: ARG002
        # Of the same release: CRIU 4.2 has changed the protocol (docs/criu.md, "Page server protocol").
        return Peer.server(self, self.program, images, work)

    def cannot(self, workload: Workload) -> str | None:
        # It reads such a page from the parent, never copies it, and the task hangs (docs/criu.md, "Pagemap").
        return "no lazy pages from parents" if workload.layout.depth else None

    def command(self, checkpoint: Checkpoint, work: Path, port: int | None) -> list[str]:
        log = ["-v1"]
        return [str(self.program), "lazy-pages", *_directories(checkpoint, work), *log, *_remote(port, work)]


@dataclass(frozen=True, slots=True)
class BareLoop(Peer):
    """The least work of a fault handler (loop.c). ``threads``: number that copy everything after the restore."""

    programs: Programs
    shared_cpu: bool = False
    threads: int = 0

    @property
    def cpu(self) -> int | None:
        return SHARED_CPU if self.shared_cpu else None

    @property
    def takes_remote(self) -> bool:
        # It serves local pages, which is the limit for a remote source.
        return False

    def cannot(self, workload: Workload) -> str | None:
        if workload.real:
            return "can read the bench's images only"
        if workload.background and not self.threads:
            return "answers faults only"
        if not workload.background and self.threads:
            return "makes bulk copies only"
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
    """All peers, ours first. ``criu``: names and executables. ``traced``: include ours with a trace.

    ``against``: executables of other installations of lazypages.
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
    """The --page-server-protocol of "criu 4.1.1"."""
    version = criu.removeprefix("criu ").split(".")
    return PROTOCOLS[(int(version[0]), int(version[1])) >= (4, 2)]


def bulk_name(threads: int) -> str:
    """The name of the bare loop that copies everything with `threads` threads."""
    return f"bulk loop x {threads}"


def stats_path(work: Path) -> Path:
    """The file for --stats-json of our daemon."""
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
    """Names and executables of CRIU: those given, or the first found of $LAZYPAGES_CRIU, .ci/fetch-criu's, PATH.

    Raises BenchError if one does not run, or if there is none.
    """
    if given:
        return [criu_version(path) for path in given]
    candidates = [
        os.environ.get("LAZYPAGES_CRIU"),
        CRIU_DIR / "4.1/criu",
        CRIU_DIR / "4.2/criu",
        shutil.which("criu"),
    ]
    for candidate in candidates:
        if candidate and Path(candidate).exists() and not is_shim(Path(candidate)):
            return [criu_version(Path(candidate))]
    raise BenchError(
        "no CRIU found to compare with: name one with --criu or LAZYPAGES_CRIU, or use --no-criu"
    )


def is_shim(path: Path) -> bool:
    """Whether this `criu` is one of `lazypages criu-shim`, whose lazy-pages is ours."""
    try:
        with path.open("rb") as file:
            return SHIM_MARK.encode() in file.read(200)
    except OSError:
        return False


def criu_version(path: Path) -> tuple[str, Path]:
    """Name ("criu 4.1.1") and executable. Raises BenchError."""
    try:
        text = subprocess.run(
            [path, "--version"], check=True, capture_output=True, text=True, timeout=30
        ).stdout
    except (OSError, subprocess.SubprocessError) as error:
        raise BenchError(f"cannot run {path}: {error}") from None
    found = re.search(r"^Version: (\S+)", text, re.MULTILINE)
    if not found:
        raise BenchError(f"{path} --version prints no version")
    return f"criu {found[1]}", path
