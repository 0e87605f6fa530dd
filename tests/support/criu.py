"""Real CRIU, as the tests run it: both layouts of the wire header and of the pagemap, 4.1.1 and 4.2.1.

`.ci/fetch-criu` puts them into LAZYPAGES_CRIU_DIR (default /var/cache/lazypages/criu). A missing CRIU fails
the test that needs it: nothing here skips.
"""

from __future__ import annotations

import functools
import os
import re
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import pytest
from _pytest.mark import ParameterSet

from images_spec.flags import PAGE_SIZE
from images_spec.images import Kind, read_one
from tests.support.processes import Server, tail

CRIU_DIR = Path(os.environ.get("LAZYPAGES_CRIU_DIR", "/var/cache/lazypages/criu"))
RELEASES = ("4.1", "4.2")


@dataclass(frozen=True)
class Criu:
    """One installed release of CRIU. Every call has a time-out; a failure shows CRIU's log."""

    release: str

    @property
    def path(self) -> Path:
        """The executable; fails the test when it is not there."""
        path = CRIU_DIR / self.release / "criu"
        if not path.exists():
            pytest.fail(
                f"no CRIU {self.release} at {path}: fetch it with `.ci/fetch-criu {CRIU_DIR}`", pytrace=False
            )
        return path

    @functools.cached_property
    def version(self) -> tuple[int, ...]:
        """As numbers: (4, 1, 1)."""
        text = subprocess.run(
            [self.path, "--version"], check=True, capture_output=True, text=True, timeout=30
        ).stdout
        found = re.search(r"^Version: ([\d.]+)", text, re.MULTILINE)
        assert found, text
        return tuple(int(part) for part in found[1].split("."))

    @property
    def wire_header_size(self) -> int:
        """Bytes of a page server's header (docs/criu.md, "Page server protocol")."""
        return 32 if self.version >= (4, 2) else 24

    def run(
        self, action: str, *arguments: str | Path, work: Path, timeout: float = 60, check: bool = True
    ) -> int:
        """Run `criu ACTION -W work -v4 -o ACTION.log ARGUMENTS…`: its exit code; 0 or failure when `check`.

        What it prints goes to a file, not a pipe: tasks under way would keep a pipe open past a time-out.
        """
        log, output = work / f"{action}.log", work / f"{action}.out"
        command = [str(self.path), action, "-W", str(work), "-v4", "-o", log.name, *map(str, arguments)]
        with output.open("wb") as stream:
            try:
                code = subprocess.run(
                    command,
                    stdin=subprocess.DEVNULL,
                    stdout=stream,
                    stderr=stream,
                    timeout=timeout,
                    check=False,
                ).returncode
            except subprocess.TimeoutExpired:
                pytest.fail(
                    f"{' '.join(command)}: still not done after {timeout:g} s\n{tail(output)}{tail(log)}"
                )
        if check and code:
            pytest.fail(f"{' '.join(command)}: exit {code}\n{tail(output)}{tail(log)}", pytrace=False)
        return code

    def dump(self, pid: int, images: Path, *arguments: str | Path, work: Path | None = None) -> None:
        """Checkpoint the tree of `pid` into the existing directory `images`, and (by default) end it."""
        self.run("dump", "-t", str(pid), "-D", images, *arguments, work=work or images)

    def restore(
        self,
        images: Path,
        *arguments: str | Path,
        work: Path | None = None,
        lazy: bool = True,
        timeout: float = 60,
        check: bool = True,
    ) -> int:
        """Bring `images` back, detached; lazily when a daemon listens in `work` (default: `images`)."""
        mode = ["--lazy-pages"] if lazy else []
        return self.run(
            "restore",
            "-D",
            images,
            "-d",
            *mode,
            *arguments,
            work=work or images,
            timeout=timeout,
            check=check,
        )

    def lazy_pages(self, images: Path, *arguments: str | Path, work: Path | None = None) -> Server:
        """CRIU's own lazy-pages daemon, started; wait_ready() before the restore."""
        return self._server("lazy-pages", images, arguments, work or images)

    def page_server(self, images: Path, *arguments: str | Path, work: Path | None = None) -> Server:
        """A page server on `images`; `--lazy-pages` makes it answer GETs (see lazypages.bench.pipes)."""
        return self._server("page-server", images, arguments, work or images)

    def lazy_dump(self, pid: int, images: Path, *arguments: str | Path, work: Path | None = None) -> Server:
        """`criu dump --lazy-pages`: keeps the task frozen and serves its pages; ready when it listens."""
        return self._server("dump", images, ["-t", str(pid), "--lazy-pages", *arguments], work or images)

    def _server(self, action: str, images: Path, arguments: Sequence[str | Path], work: Path) -> Server:
        log = work / f"{action}.log"
        command = [self.path, action, "-D", images, "-W", work, "-v4", "-o", log.name, *arguments]
        return Server([str(word) for word in command], output=work / f"{action}.out", logs=[log])


def all_criu() -> list[ParameterSet]:
    """Both releases, for @pytest.mark.parametrize("criu", all_criu())."""
    return [pytest.param(Criu(release), id=f"criu-{release}") for release in RELEASES]


def newest_on_every_kernel() -> list[ParameterSet]:
    """As all_criu; what is done with the newest is done under other kernels, too (tests/kernels)."""
    *older, newest = RELEASES
    return [
        *(pytest.param(Criu(release), id=f"criu-{release}") for release in older),
        pytest.param(Criu(newest), id=f"criu-{newest}", marks=pytest.mark.every_kernel),
    ]


def makes_none_lazy(images: Path) -> bool:
    """Whether CRIU took all pages of a task for its stack: one in a core is the start of a page (criu/mem.c, is_stack).

    That is so by chance for one thread in 256: such a dump is right, but nothing of it can be restored lazily.
    """
    cores = [read_one(path, Kind.CORE) for path in images.glob("core-*.img")]
    assert cores
    return any(core.thread_info.gpregs.sp % PAGE_SIZE == 0 for core in cores if core.HasField("thread_info"))
