"""Everything with everything: who dumps x who restores x how memory comes, for programs in the middle of their work.

Dumped by CRIU or dumptool, restored by CRIU or `lazypages restore`, eagerly, under `lazypages serve` or under
CRIU's own daemon, each program goes on where it was: what it puts out is compared with an undisturbed run. A tree
of all of them, stopped at any point, has the same memory, byte for byte.
"""

from __future__ import annotations

import os
import shlex
import shutil
import signal
import sqlite3
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import pytest

from images_spec import images
from images_spec.images import Kind
from tests.real.test_restore import OurRestore
from tests.real.test_restore_programs import SOURCES, memory, rseq_areas
from tests.support.compiling import compiled
from tests.support.criu import Criu
from tests.support.dumptool import DumpedByUs
from tests.support.processes import descendants, describe, nothing_left, reap, start, wait_for
from tests.support.restore import criu_daemon, our_daemon

PROGRAMS = Path(__file__).parent.parent / "support" / "programs"

MODES = {"eager": "4.1", "serve": "4.2", "criu lazy-pages": "4.1"}
"""How memory comes, and the release of CRIU that takes part."""
NAMES = ["counter", "vectors", "python", "shell", "sqlite"]


@dataclass(frozen=True)
class Work:
    """A program: it runs in a directory of its own, slowly until there is a file "go" there."""

    command: list[str]
    ready: int
    """Lines of output from which on it is in the middle."""
    code: int = 0
    sort: bool = False
    """Its threads put out their lines in no order."""
    locks: bool = False

    def output(self, folder: Path) -> list[bytes]:
        lines = (folder / "output").read_bytes().splitlines()
        return sorted(lines) if self.sort else lines


@pytest.fixture(scope="module")
def works() -> Mapping[str, Work]:
    counter, vectors = compiled(PROGRAMS / "counter.c", "-static"), compiled(SOURCES / "vectors.c")
    return {
        "counter": Work([str(counter), "20000"], 20, code=42),
        "vectors": Work([str(vectors), "output", "go"], 1, sort=True),
        "python": Work([sys.executable, str(PROGRAMS / "digests.py")], 1),
        "shell": Work(["/bin/sh", str(PROGRAMS / "pipeline.sh")], 20),
        "sqlite": Work([sys.executable, str(PROGRAMS / "database.py")], 1, locks=True),
    }


@pytest.fixture(scope="module")
def undisturbed(
    works: Mapping[str, Work], tmp_path_factory: pytest.TempPathFactory
) -> Mapping[str, list[bytes]]:
    """What each program puts out when nobody stops it."""
    outputs = {}
    for name, work in works.items():
        folder = tmp_path_factory.mktemp(name)
        (folder / "go").touch()
        with (folder / "output").open("wb") as stream:
            code = subprocess.run(
                work.command, stdin=subprocess.DEVNULL, stdout=stream, cwd=folder, check=False, timeout=60
            ).returncode
        assert code == work.code
        outputs[name] = work.output(folder)
        assert len(outputs[name]) > work.ready
    return outputs


def dumper(name: str, mode: str) -> Criu:
    """By dumptool: eagerly restored, one level; else a chain, as the daemon can have it."""
    release = MODES[mode]
    if name == "criu":
        return Criu(release)
    if mode == "eager":
        return DumpedByUs(release)
    return DumpedByUs(release, pre_dumps=1, parent_pages="lazy" if mode == "serve" else "eager")


def restorer(name: str, mode: str) -> Criu:
    return Criu(MODES[mode]) if name == "criu" else OurRestore(MODES[mode])


@dataclass(frozen=True)
class Dumped:
    """Images of a tree, and its directory as it was then; can be restored again and again."""

    pid: int
    images: Path
    folder: Path
    kept: Path

    @property
    def ids(self) -> list[int]:
        return [int(path.stem.removeprefix("core-")) for path in self.images.glob("core-*.img")]

    def put_back(self) -> None:
        """Files as they were; the directory itself stays, for it is the working directory."""
        for path in self.folder.iterdir():
            shutil.rmtree(path) if path.is_dir() else path.unlink()
        shutil.copytree(self.kept, self.folder, dirs_exist_ok=True)
        wait_for("pids to be free", lambda: not any(Path(f"/proc/{ident}").exists() for ident in self.ids))

    @contextmanager
    def restored(self, by: str, mode: str, run: Path, *options: str) -> Iterator[None]:
        """It runs again, under a daemon in `run` unless eager, which must have ended well at the end of the block."""
        self.put_back()
        with ExitStack() as stack:
            stack.enter_context(nothing_left())
            if mode == "eager":
                restorer(by, mode).restore(self.images, *options, work=run, lazy=False)
                yield
                return
            daemon = our_daemon() if mode == "serve" else criu_daemon(Criu(MODES[mode]))
            server = stack.enter_context(daemon.start(self.images, run))
            server.wait_ready()
            restorer(by, mode).restore(self.images, *options, work=run)
            yield
            assert server.wait() == 0


def run_in(folder: Path, command: list[str]) -> subprocess.Popen[bytes]:
    return start(command, output=folder / "output", cwd=folder, env={"PATH": os.environ["PATH"]})


def take(by: Criu, pid: int, folder: Path, images: Path, *options: str) -> Dumped:
    """Dump a tree of ours that works in `folder`, and see all of it gone."""
    images.mkdir()
    if isinstance(by, DumpedByUs):
        by.dump(pid, images, *options)
    else:
        # CRIU can't stop a shell whose child is between vfork and exec; it leaves the tree as it was.
        wait_for(
            "CRIU to dump it",
            lambda: by.run("dump", "-t", str(pid), "-D", images, *options, work=images, check=False) == 0,
        )

    def gone() -> bool:
        with suppress(ChildProcessError):
            while os.waitpid(-1, os.WNOHANG)[0]:
                pass
        return not any(Path(f"/proc/{ident}").exists() for ident in dumped.ids)

    dumped = Dumped(pid, images, folder, images.parent / "kept")
    wait_for("the dumped tasks to be gone", gone)
    shutil.copytree(folder, dumped.kept)
    return dumped


@pytest.fixture(scope="module")
def dumps(
    works: Mapping[str, Work], tmp_path_factory: pytest.TempPathFactory
) -> Callable[[str, str, str], Dumped]:
    """The dump of a program by somebody for a mode, taken when it is first asked for."""
    taken: dict[tuple[str, str, str], Dumped] = {}

    def get(name: str, by: str, mode: str) -> Dumped:
        if (name, by, mode) not in taken:
            work, base = works[name], tmp_path_factory.mktemp("dump")
            folder = base / "folder"
            folder.mkdir()
            with nothing_left():
                process = run_in(folder, work.command)
                wait_for(
                    "it to be in the middle",
                    lambda: (folder / "output").read_bytes().count(b"\n") >= work.ready,
                )
                options = ["--file-locks"] if work.locks else []
                taken[name, by, mode] = take(dumper(by, mode), process.pid, folder, base / "images", *options)
        return taken[name, by, mode]

    return get


@pytest.mark.loop("counter-serve-dumptool-lazypages")
@pytest.mark.parametrize("restored_by", ["criu", "lazypages"])
@pytest.mark.parametrize("dumped_by", ["criu", "dumptool"])
@pytest.mark.parametrize("mode", list(MODES))
@pytest.mark.parametrize("name", NAMES)
def test_goes_on_where_it_was(  # noqa: PLR0917 - the axes of the matrix
    name: str,
    mode: str,
    dumped_by: str,
    restored_by: str,
    works: Mapping[str, Work],
    undisturbed: Mapping[str, list[bytes]],
    dumps: Callable[[str, str, str], Dumped],
    tmp_path: Path,
) -> None:
    work, dumped = works[name], dumps(name, dumped_by, mode)
    options = ["--file-locks"] if work.locks and restored_by == "criu" else []
    with dumped.restored(restored_by, mode, tmp_path, *options):
        if name == "sqlite":
            still_locked(dumped.folder / "database")
        assert len(work.output(dumped.kept)) < len(undisturbed[name]), "it had ended before it was dumped"
        (dumped.folder / "go").touch()
        assert os.waitstatus_to_exitcode(reap(dumped.pid)) == work.code
    assert work.output(dumped.folder) == undisturbed[name]


def still_locked(database: Path) -> None:
    """The transaction has its lock again."""
    with (
        sqlite3.connect(database, timeout=0) as other,
        pytest.raises(sqlite3.OperationalError, match="locked"),
    ):
        other.execute("begin immediate")
    other.close()


def stop(root: int) -> list[int]:
    """SIGSTOP for a whole tree; the pids of what can be stopped of it.

    A shell whose child was stopped between vfork and exec does not stop: all go on for a moment then.
    """
    while True:
        pids = signalled(root, signal.SIGSTOP)
        deadline = time.monotonic() + 0.3
        while not is_stopped(pids) and time.monotonic() < deadline:
            time.sleep(0.005)
        if is_stopped(pids) and set(living(root)) == set(pids):
            return pids
        signalled(root, signal.SIGCONT)
        time.sleep(0.02)


def living(root: int) -> list[int]:
    return [root, *(pid for pid, state in descendants(root).items() if state != "Z")]


def signalled(root: int, number: signal.Signals) -> list[int]:
    pids = living(root)
    for pid in pids:
        with suppress(ProcessLookupError):
            os.kill(pid, number)
    return pids


def is_stopped(pids: list[int]) -> bool:
    try:
        return all(
            "\nState:\tT" in path.read_text()
            for pid in pids
            for path in Path(f"/proc/{pid}/task").glob("*/status")
        )
    except OSError:
        return False


def script(works: Mapping[str, Work]) -> str:
    """A shell that starts all programs and waits for them."""
    lines = [f"(cd {name} && exec {shlex.join(work.command)} > output) &" for name, work in works.items()]
    return "\n".join([*lines, "wait"])


@pytest.fixture(scope="module")
def stopped(
    works: Mapping[str, Work], tmp_path_factory: pytest.TempPathFactory
) -> Callable[[str, str], tuple[Dumped, dict[int, dict[str, bytes]]]]:
    """A dump of all programs in one tree, stopped; and the memory of each of its processes."""
    taken: dict[tuple[str, str], tuple[Dumped, dict[int, dict[str, bytes]]]] = {}

    def get(by: str, mode: str) -> tuple[Dumped, dict[int, dict[str, bytes]]]:
        if (by, mode) not in taken:
            base = tmp_path_factory.mktemp("stopped")
            folder = base / "folder"
            for name in works:
                (folder / name).mkdir(parents=True)
            with nothing_left():
                process = run_in(folder, ["/bin/sh", "-c", script(works)])

                def busy() -> bool:
                    outputs = [(folder / name / "output", work.ready) for name, work in works.items()]
                    return all(
                        path.exists() and path.read_bytes().count(b"\n") >= ready for path, ready in outputs
                    )

                wait_for("all to be in the middle", busy)
                pids = stop(process.pid)
                contents = {pid: memory(pid, []) for pid in pids}
                dumped = take(dumper(by, mode), process.pid, folder, base / "images", "--file-locks")
            taken[by, mode] = dumped, contents
        return taken[by, mode]

    return get


@pytest.mark.slow
@pytest.mark.parametrize("restored_by", ["criu", "lazypages"])
@pytest.mark.parametrize("dumped_by", ["criu", "dumptool"])
@pytest.mark.parametrize("mode", list(MODES))
def test_memory(
    mode: str,
    dumped_by: str,
    restored_by: str,
    stopped: Callable[[str, str], tuple[Dumped, dict[int, dict[str, bytes]]]],
    tmp_path: Path,
) -> None:
    """Read from outside, while it comes."""
    dumped, contents = stopped(dumped_by, mode)
    apart = rseq_areas(dumped.images) + below_stacks(dumped.images)
    options = ["--file-locks"] if restored_by == "criu" else []
    with dumped.restored(restored_by, mode, tmp_path, *options):
        assert len(contents) >= 8
        wait_for("all to be stopped again", lambda: is_stopped(list(contents)))
        for pid, before in contents.items():
            with open(f"/proc/{pid}/mem", "rb", buffering=0) as file:
                for where, data in before.items():
                    begin = int(where.split("-")[0], 16)
                    now = whole(file.fileno(), begin, len(data))
                    assert without(apart, begin, now) == without(apart, begin, data), (
                        f"{where} of {describe(pid)}"
                    )


def below_stacks(directory: Path) -> list[range]:
    """Where nothing is, below the red zone of each thread.

    The frame of a handler is there when a pending signal came before the stop. CRIU's dumps leave traces (observed).
    """
    infos = [images.read_one(path, Kind.CORE).thread_info for path in directory.glob("core-*.img")]
    return [range(info.gpregs.sp - 128 - 32768, info.gpregs.sp - 128) for info in infos if info.gpregs.sp]


def without(areas: list[range], begin: int, data: bytes) -> bytes:
    """The contents of memory from `begin` on with zeros in the areas: e.g. where the kernel notes the CPU (rseq)."""
    left = bytearray(data)
    for area in areas:
        low, high = max(area.start - begin, 0), min(area.stop - begin, len(data))
        if low < high:
            left[low:high] = bytes(high - low)
    return bytes(left)


def whole(fd: int, at: int, size: int) -> bytes:
    """Memory that may be under way: a read of such a page from outside can fail now and then, and is done again."""
    data = bytearray()
    deadline = time.monotonic() + 30
    while len(data) < size:
        try:
            piece = os.pread(fd, size - len(data), at + len(data))
        except OSError:
            if time.monotonic() > deadline:
                raise
            time.sleep(0.001)
            continue
        assert piece
        data += piece
    return bytes(data)
