"""A dump counts when all of it is on the disk, and only then is the tree ended, whatever fails before."""

from __future__ import annotations

import errno
import os
import signal
import subprocess
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path

import pytest

from dumptool.dump import Settings, Watcher, dump, pre_dump
from dumptool.errors import DumpError
from dumptool.freeze import FrozenTree
from images_spec.images import Kind, iter, read_one
from images_spec.pagemap import Pagemap
from tests.real.test_dump_kills import in_child
from tests.real.test_dump_tracking import Mover, mover, moves
from tests.support.criu import Criu
from tests.support.dumptool import check, is_unharmed, reap_all, run
from tests.support.processes import descendants, end, wait_for

__all__ = ["mover", "moves"]  # fixtures

INVENTORY = Kind.INVENTORY.file_name()
MOST_STEPS = 60


@contextmanager
def small_disk(place: Path, options: str) -> Iterator[Path]:
    place.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", options, "tmpfs", place], check=True, timeout=30)
    try:
        yield place
    finally:
        subprocess.run(["umount", place], check=True, timeout=30)


def is_as_before(mover: Mover) -> None:
    is_unharmed(mover.pid)
    mover.is_right()


@pytest.mark.loop("action0-size=2m")
@pytest.mark.parametrize("full", ["size=2m", "size=90m,nr_inodes=9"])
@pytest.mark.parametrize("action", [("dump",), ("dump", "-R"), ("pre-dump",), ("dump", "--no-sync")])
def test_a_full_disk(action: tuple[str, ...], full: str, mover: Mover, tmp_path: Path) -> None:
    """Of bytes, or of files: the message names the file that could not be written."""
    with small_disk(tmp_path / "disk", full) as disk:
        images = disk / "images"
        images.mkdir()
        if "inodes" in full and action[0] == "pre-dump":
            for number in range(5):
                (disk / str(number)).touch()  # it has fewer files
        result = run(*action, "-t", mover.pid, "-D", images)
        assert result.returncode == 1, result.stderr
        assert str(images) in result.stderr
        assert "No space left on device" in result.stderr
        assert not (images / INVENTORY).exists()
    is_as_before(mover)


def test_statistics_that_can_t_be_written(mover: Mover, tmp_path: Path) -> None:
    """The dump is complete without them, and the tree has been ended."""
    images = tmp_path / "images"
    images.mkdir()
    (images / "stats-dump").symlink_to("/dev/full")
    result = run("dump", "-t", mover.pid, "-D", images)
    assert result.returncode == 0, result.stderr
    assert "the dump is complete without it" in result.stderr
    is_complete(images, mover.pid)
    wait_for("its end", lambda: descendants().get(mover.pid) in (None, "Z"))


def run_in_child(work: Callable[[], None]) -> int:
    """The exit status of a forked child that runs it: 0, 1 with an error, or below 0 for a signal."""
    _, status = os.waitpid(in_child(lambda: (work(), os._exit(0))), 0)
    return os.waitstatus_to_exitcode(status)


@pytest.mark.loop("pages-1.img-dump")
@pytest.mark.parametrize("action", [dump, pre_dump])
@pytest.mark.parametrize("victim", ["pages-1.img", "pstree.img", ".inventory.img.new", "images"])
def test_the_disk_fails(
    victim: str, action: Callable[[Settings, Watcher], object], mover: Mover, tmp_path: Path
) -> None:
    """An fsync that says EIO: the tree goes on, the message has the file, there is no inventory."""
    images = tmp_path / "images"
    if victim == "pstree.img" and action is pre_dump:
        victim = f"pagemap-{mover.pid}.img"
    real = os.fsync

    def fsync(fd: int) -> None:
        if Path(os.readlink(f"/proc/self/fd/{fd}")).name == victim and not (
            victim == "images" and not (images / INVENTORY).exists()
        ):
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        real(fd)

    def work() -> None:
        os.fsync = fsync
        try:
            action(Settings(mover.pid, images), Watcher())
        except DumpError as error:
            (tmp_path / "error").write_text(str(error))

    assert run_in_child(work) == 0
    message = (tmp_path / "error").read_text()
    assert victim in message
    assert "Input/output error" in message
    assert not (images / INVENTORY).exists()
    is_as_before(mover)


def is_complete(images: Path, pid: int) -> None:
    """Every image of a dump of one process is there, whole."""
    read_one(images / INVENTORY, Kind.INVENTORY)
    for kind, ident in (
        (Kind.PSTREE, None),
        (Kind.FILES, None),
        (Kind.CORE, pid),
        (Kind.MM, pid),
        (Kind.FS, pid),
        (Kind.IDS, pid),
        (Kind.FDINFO, 2),
    ):
        assert list(iter(images / kind.file_name(ident), kind))  # type: ignore[arg-type]
    pagemap = Pagemap.load(images / Kind.PAGEMAP.file_name(pid))
    pages = images / f"pages-{pagemap.pages_id}.img"
    pagemap.check_pages_size(pages.stat().st_size, pages)


@contextmanager
def steps(call: Callable[[str], None]) -> Iterator[None]:
    """Calls ``call`` before each step towards the disk, in this process, for good."""

    def before(name: str, function: Callable[..., object]) -> Callable[..., object]:
        def wrapped(*arguments: object, **options: object) -> object:
            call(name)
            return function(*arguments, **options)

        return wrapped

    os.fsync = before("fsync", os.fsync)  # type: ignore[assignment]
    Path.replace = before("rename", Path.replace)  # type: ignore[method-assign, assignment]
    FrozenTree.kill = before("kill", FrozenTree.kill)  # type: ignore[method-assign, assignment]
    FrozenTree.hold = before("hold", FrozenTree.hold)  # type: ignore[method-assign, assignment]
    os.open = before("open", os.open)  # type: ignore[assignment]
    yield


@pytest.mark.slow
def test_killed_at_each_step(mover: Mover, tmp_path: Path) -> None:
    """An inventory has all of the dump with it; without one the tree runs on."""
    images = tmp_path / "images"
    published = 0
    for number in range(MOST_STEPS):
        left = number

        def count(name: str) -> None:
            nonlocal left
            if name == "open":
                return
            if left == 0:
                os.kill(os.getpid(), signal.SIGKILL)
            left -= 1

        def work() -> None:
            with steps(count):
                dump(Settings(mover.pid, images), Watcher())

        code = run_in_child(work)
        if (images / INVENTORY).exists():
            is_complete(images, mover.pid)
            published += 1
        if code == 0:
            break
        assert code == -signal.SIGKILL
        is_unharmed(mover.pid)
    else:
        pytest.fail("no end of steps")
    assert published > 1, "the last kills come between the inventory and the end of the tree"
    assert number > 10
    reap_all()
    Criu("4.1").restore(images, work=tmp_path, lazy=False)
    mover.is_right()
    end(mover.pids)


@pytest.mark.loop("dump-True")
@pytest.mark.parametrize("sync", [True, False])
@pytest.mark.parametrize("action", ["dump", "dump -R", "dump --lazy-pages", "pre-dump"])
def test_the_order(action: str, sync: bool, mover: Mover, tmp_path: Path) -> None:
    images, log = tmp_path / "images", tmp_path / "log"
    settings = Settings(mover.pid, images, sync=sync)

    def work() -> None:
        seen: list[str] = []
        thaw = FrozenTree.thaw

        def watched(tree: FrozenTree) -> float:
            seen.append("thaw")
            return thaw(tree)

        FrozenTree.thaw = watched  # type: ignore[method-assign]
        with steps(seen.append):
            match action:
                case "dump":
                    dump(settings, Watcher())
                case "dump -R":
                    dump(replace(settings, leave_running=True), Watcher())
                case "pre-dump":
                    pre_dump(settings, Watcher())
                case _:
                    dump(replace(settings, lazy_pages=True), Watcher(), lambda *_: seen.append("serve"))
        log.write_text("\n".join(name for name in seen if name != "open"))

    assert run_in_child(work) == 0
    found = log.read_text().split()
    assert INVENTORY in os.listdir(images)
    assert ".inventory.img.new" not in os.listdir(images)
    rename = found.index("rename")
    assert found.count("rename") == 1
    if sync:
        assert "fsync" in found[:rename]
        assert found[rename + 1] == "fsync", "of the directory"
        assert "fsync" not in found[rename + 2 :]
    else:
        assert "fsync" not in found
    last = max(place for place, name in enumerate(found) if name in ("rename", "fsync"))
    match action:
        case "dump":
            assert found.index("kill") > last
        case "dump --lazy-pages":
            assert last < found.index("hold") < found.index("serve") < found.index("kill")
        case _:
            assert "kill" not in found
            # No earlier than it has to, the tree stands still: what comes before are the names of the directory.
            assert found[: found.index("thaw")].count("fsync") <= 2
    with suppress(ChildProcessError):
        if "kill" not in found:
            is_as_before(mover)


@pytest.mark.parametrize("options", [(), ("-o", "log"), ("--no-sync",)], ids=["plain", "log", "no-sync"])
def test_missing_parents_are_created(options: tuple[str, ...], mover: Mover, tmp_path: Path) -> None:
    """As the chain of a first pre-dump needs them; the log may be the first file there."""
    top = tmp_path / "new" / "chain"
    check("pre-dump", "-t", mover.pid, "-D", top / "1", *options)
    check("dump", "-t", mover.pid, "-D", top / "2", "--prev-images-dir", "../1", "-R", *options)
    is_complete(top / "2", mover.pid)
    is_as_before(mover)
    result = run("pre-dump", "-t", mover.pid, "-D", top / "1" / INVENTORY / "2", *options)
    assert result.returncode == 1
    assert result.stderr == f"dumptool: {top / '1' / INVENTORY / '2'} can't be created: Not a directory\n"
    is_as_before(mover)
