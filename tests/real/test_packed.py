"""Real `criu restore --lazy-pages` whose pages come from a packed checkpoint in a file, every byte compared."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
from collections.abc import Callable, Iterable
from pathlib import Path

import pytest

from images_spec.errors import ImageError
from images_spec.flags import PAGE_SIZE, PE_LAZY
from images_spec.packing import open_pack, pack
from images_spec.pagemap import Pagemap
from images_spec.without_lazy import MARK, place
from tests.support.criu import Criu
from tests.support.packs import BY_FAULTS, NEWEST, packed, work_in
from tests.support.processes import nothing_left, wait_for
from tests.support.remote import leave_at_source, our_page_server
from tests.support.restore import Checkpoints, lazy_restore, our_daemon


def flags(entries: Iterable[tuple[int, int, int]]) -> dict[int, int]:
    """The flags of each page, by address."""
    return {start + at * PAGE_SIZE: bits for start, count, bits in entries for at in range(count)}


@pytest.mark.loop("tree-4.2")
@pytest.mark.parametrize(
    ("scenario", "release"),
    [
        pytest.param("tree", "4.2", id="tree-4.2"),
        pytest.param("threads", "4.1", id="threads-4.1"),
    ],
)
def test_by_faults(scenario: str, release: str, checkpoints: Checkpoints, tmp_path: Path) -> None:
    """A chain of three levels, packed: while the tasks fork and change their layout, all comes from the pack."""
    checkpoint = checkpoints.get(Criu(release), scenario)
    pack = packed(checkpoint, tmp_path, depth=2)
    with lazy_restore(checkpoint, BY_FAULTS, work_in(tmp_path), pack=pack) as restored:
        restored.check_all()
    (source,) = restored.stats()["page_servers"]
    assert source["address"] == str(pack)
    assert source["pages"] > 0


def test_in_the_background(checkpoints: Checkpoints, tmp_path: Path) -> None:
    """Each lazy page once, from the pack alone; then the tasks find every byte."""
    checkpoint = checkpoints.get(NEWEST, "plain")
    pack = packed(checkpoint, tmp_path)
    with lazy_restore(checkpoint, our_daemon(), work_in(tmp_path), pack=pack) as restored:
        assert restored.server.wait() == 0
        stats = restored.stats()
        lazy = sum(
            entry.nr_pages
            for path in checkpoint.images.glob("pagemap-[0-9]*.img")
            for entry in Pagemap.load(path)
            if entry.flags & PE_LAZY
        )
        assert sum(task["pages"]["copied_by_source"]["remote"] for task in stats["tasks"]) == lazy
        restored.go()
        assert restored.wait_tasks() == 0
        restored.check_verdict()


def refused(*arguments: str) -> str:
    """The one line of a `serve` that ends with 1 at once."""
    command = [sys.executable, "-m", "lazypages", "serve", *arguments]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 1
    assert done.stderr.count("lazypages: ") == 1
    return done.stderr


def wait_for_polls(pid: int) -> None:
    """Until the victim has looked for its go so often that it has touched all that this needs."""

    def sleeps() -> int:
        status = Path(f"/proc/{pid}/status").read_text()
        return int(status.split("\nvoluntary_ctxt_switches:")[1].split()[0])

    wait_for("the victim to wait for its go", lambda: sleeps() > 100)


def flip(pack: Path) -> None:
    """A bit of each frame, in place."""
    with open_pack(pack) as reader:
        places = [reader.place(frame) for frame in range(reader.nr_frames)]
    with pack.open("r+b") as file:
        for offset, size in places:
            file.seek(offset + size // 2)
            byte = file.read(1)
            file.seek(-1, os.SEEK_CUR)
            file.write(bytes([byte[0] ^ 1]))


def cut(pack: Path) -> None:
    os.truncate(pack, 4 * PAGE_SIZE)


@pytest.mark.slow
@pytest.mark.parametrize("damage", [flip, cut])
def test_a_pack_that_is_damaged_while_it_is_served(
    damage: Callable[[Path], None], checkpoints: Checkpoints, tmp_path: Path
) -> None:
    """The task gets SIGBUS at a page of a damaged frame, and nothing wrong before. One line names pack and frame."""
    checkpoint = checkpoints.get(NEWEST, "plain")
    pack = packed(checkpoint, tmp_path)
    with lazy_restore(checkpoint, BY_FAULTS, work := work_in(tmp_path), pack=pack) as restored:
        wait_for_polls(checkpoint.pid)
        damage(pack)
        restored.go()
        assert restored.wait_tasks() == -signal.SIGBUS
        assert restored.server.wait() == 1
    assert not [report for report in restored.reports() if report.bad]
    log = (work / "serve.log").read_text()
    what = r"frame \d+ is damaged" if damage is flip else "is cut off"
    said = re.findall(
        rf"^.*{re.escape(str(pack))}: {what} \(at byte \d+\): its pages are not used$", log, re.M
    )
    assert said
    assert len(said) == len(set(said))
    assert "Traceback" not in log


@pytest.mark.slow
def test_a_pack_that_is_replaced_while_it_is_served(checkpoints: Checkpoints, tmp_path: Path) -> None:
    """The one that was opened is served, also when its name is gone or another's."""
    checkpoint = checkpoints.get(NEWEST, "plain")
    pack = packed(checkpoint, tmp_path)
    with lazy_restore(checkpoint, BY_FAULTS, work_in(tmp_path), pack=pack) as restored:
        other = tmp_path / "other"
        other.write_bytes(bytes(pack.stat().st_size))
        other.replace(pack)
        restored.check_all()


@pytest.mark.slow
def test_pages_in_the_pack_and_at_a_page_server(checkpoints: Checkpoints, tmp_path: Path) -> None:
    """Each gives what it has; without the page server, serve refuses at once."""
    checkpoint = checkpoints.get(NEWEST, "plain")
    images = tmp_path / "images"
    leave_at_source(checkpoint.images, images, share=0.5)
    pack(images, tmp_path / "pack")
    work = work_in(tmp_path)
    said = refused("-D", str(tmp_path / "pack"), "-W", str(work))
    assert "lazy pages are not in it; if they are still at the source" in said
    (tmp_path / "server").mkdir()
    with nothing_left(), our_page_server(checkpoint.images, tmp_path / "server") as (port, _):
        daemon = our_daemon("--page-server", "--port", str(port))
        with lazy_restore(checkpoint, daemon, work, pack=tmp_path / "pack") as restored:
            assert restored.server.wait() == 0
            restored.go()
            assert restored.wait_tasks() == 0
            restored.check_verdict()
    assert all(source["pages"] for source in restored.stats()["page_servers"])


@pytest.mark.parametrize("scenario", ["plain", pytest.param("tree", marks=pytest.mark.slow)])
def test_what_is_placed(scenario: str, checkpoints: Checkpoints, tmp_path: Path) -> None:
    """What `criu dump --lazy-pages` leaves: again over its own, never over others."""
    checkpoint = checkpoints.get(NEWEST, scenario)
    work = work_in(tmp_path)
    leave_at_source(checkpoint.images, expected := tmp_path / "expected")
    with open_pack(packed(checkpoint, tmp_path, depth=1)) as reader:
        for _ in range(2):
            placed = place(reader, work)
        assert placed.elsewhere == 0
        assert {str(pid) for pid in placed.tasks} == {
            path.stem.removeprefix("pagemap-") for path in expected.glob("pagemap-[0-9]*.img")
        }
        for path in expected.iterdir():
            if path.name.startswith("pagemap-"):
                assert flags(Pagemap.load(work / path.name)) == flags(Pagemap.load(path))
            else:
                assert (work / path.name).read_bytes() == path.read_bytes()
        assert {path.name for path in work.iterdir()} == {MARK, *(path.name for path in expected.iterdir())}
        (work / MARK).write_text("another")
        for place_of_others in (work, checkpoint.images):
            with pytest.raises(ImageError, match="has the images of another checkpoint"):
                place(reader, place_of_others)


def test_errors(checkpoints: Checkpoints, tmp_path: Path) -> None:
    """One line each, before anything is placed."""
    checkpoint = checkpoints.get(NEWEST, "plain")
    pack = packed(checkpoint, tmp_path)
    work = work_in(tmp_path)
    (no_pack := tmp_path / "file").write_bytes(bytes(300))
    (damaged := tmp_path / "damaged").write_bytes(pack.read_bytes()[:-1] + b"x")
    for arguments, what in (
        (["-D", pack], "name one for its images with -W"),
        (["-D", pack, "-W", tmp_path / "nowhere"], "does not exist"),
        (["-D", pack, "-W", checkpoint.images], "has the images of another checkpoint"),
        (["-D", pack, "-W", work, "--via", tmp_path / "socket"], "leave out --via"),
        (["-D", no_pack, "-W", work], "is no packed checkpoint"),
        (["-D", damaged, "-W", work], "is cut off, or its end is damaged"),
    ):
        assert what in refused(*map(str, arguments))
    assert not any(work.iterdir())
