"""Images of real CRIU in which something is newer than we are: nobody serves, restores or builds on them."""

from __future__ import annotations

import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from google.protobuf.message import Message

from images_spec import images
from images_spec.images import Kind
from lazypages.sources.checkpoint import expect
from tests.support.criu import Criu, all_criu
from tests.support.processes import nothing_left, start
from tests.support.restore import Checkpoints

COMPRESSED = b"\x38\x05"  # field 7, varint
SAYS = "pagemap-{pid}.img: entry 2 has field 7, which this lazypages does not know: written by a newer CRIU?"


@pytest.fixture(params=all_criu())
def newer(request: pytest.FixtureRequest, checkpoints: Checkpoints, tmp_path: Path) -> tuple[Path, int]:
    """Images of a victim, whose second pagemap entry says something that we can't know; and its pid."""
    criu: Criu = request.param
    checkpoint = checkpoints.get(criu, "single")
    shutil.copytree(checkpoint.images, tmp_path / "images")
    path = tmp_path / "images" / Kind.PAGEMAP.file_name(checkpoint.pid)
    messages = images.read(path, Kind.PAGEMAP)
    messages[2].MergeFromString(COMPRESSED)
    images.write(path, Kind.PAGEMAP, messages)
    return tmp_path / "images", checkpoint.pid


def refused(*command: str) -> str:
    done = subprocess.run(
        [sys.executable, "-m", *command], capture_output=True, text=True, timeout=60, check=False
    )
    assert done.returncode == 1, done
    assert "Traceback" not in done.stderr
    return done.stderr


def check_dump(parent: Path, pid: int) -> None:
    """A dump of a process that the parent knows under its pid."""
    with nothing_left():
        process = start(["sleep", "60"])
        shutil.copy(parent / Kind.PAGEMAP.file_name(pid), parent / Kind.PAGEMAP.file_name(process.pid))
        images_dir = parent.parent / "next"
        images_dir.mkdir()
        options = ["-D", str(images_dir), "--prev-images-dir", "../images"]
        assert SAYS.format(pid=process.pid) in refused("dumptool", "dump", "-t", str(process.pid), *options)
        assert process.poll() is None


@pytest.mark.slow
def test_nobody_takes_them(newer: tuple[Path, int], tmp_path: Path) -> None:
    directory, pid = newer
    says = SAYS.format(pid=pid)
    socket = f"unix:{tmp_path / 'socket'}"
    commands: dict[str, Callable[[], str]] = {
        "serve": lambda: refused("lazypages", "serve", "-D", str(directory)),
        "show": lambda: refused("lazypages", "show", str(directory)),
        "restore": lambda: refused("lazypages", "restore", "-D", str(directory), "-d"),
        "page server": lambda: refused(
            "lazypages", "page-server", "--lazy-pages", "-D", str(directory), "--address", socket
        ),
    }
    for name, run in commands.items():
        assert says in run(), name
    check_dump(directory, pid)


@pytest.mark.parametrize(
    ("kind", "name"), [(Kind.CORE, "CoreEntry"), (Kind.MM, "MmEntry"), (Kind.FILES, "FileEntry")]
)
def test_a_restore_would_lose_it(
    kind: Kind[Message], name: str, checkpoints: Checkpoints, tmp_path: Path
) -> None:
    """What means nothing for pages, and so does not stop the daemon."""
    checkpoint = checkpoints.get(Criu("4.2"), "single")
    shutil.copytree(checkpoint.images, tmp_path / "images")
    path = tmp_path / "images" / kind.file_name(checkpoint.pid)
    messages = images.read(path, kind)
    messages[0].MergeFromString(b"\x9a\x06\x03abc")
    images.write(path, kind, messages)
    says = f"{path.name}: {name} has field 99, which this lazypages does not know: written by a newer CRIU?"
    assert says in refused("lazypages", "restore", "-D", str(path.parent), "-d")
    expect(path.parent, remote=False)
