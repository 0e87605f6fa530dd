"""Files that are written at the end are checked at the start, and left as they are."""

from __future__ import annotations

import ctypes
import os
import select
from pathlib import Path

import pytest
from click.testing import CliRunner

from lazypages.cli.main import cli
from lazypages.errors import LazyPagesError
from lazypages.outputs import check_output

IN_CREATE = 0x100  # inotify(7)


def test_nothing_is_left_and_nothing_lost(tmp_path: Path) -> None:
    (tmp_path / "old").write_text("contents")
    (tmp_path / "link").symlink_to("not there yet")
    os.mkfifo(tmp_path / "fifo")
    before = sorted(os.listdir(tmp_path))
    for name in (*before, "new"):
        check_output("--json", tmp_path / name)
    assert sorted(os.listdir(tmp_path)) == before
    assert (tmp_path / "old").read_text() == "contents"


def test_who_waits_for_the_file_does_not_see_the_check(tmp_path: Path) -> None:
    libc = ctypes.CDLL(None, use_errno=True)
    events = libc.inotify_init1(os.O_NONBLOCK)
    try:
        assert libc.inotify_add_watch(events, os.fsencode(tmp_path), IN_CREATE) > 0
        check_output("--pidfile", tmp_path / "pid", new=True)
        with pytest.raises(BlockingIOError):
            os.read(events, 4096)
        (tmp_path / "pid").touch()
        assert os.read(events, 4096).rstrip(b"\0").endswith(b"pid")
    finally:
        os.close(events)


def test_what_the_kernel_says_is_said(tmp_path: Path) -> None:
    program = tmp_path / "program"
    program.write_bytes(Path("/bin/sleep").read_bytes())
    program.chmod(0o755)
    pid = os.posix_spawn(program, ["sleep", "60"], os.environ)
    try:
        with pytest.raises(LazyPagesError, match="can't be opened for writing: Text file busy"):
            check_output("--json", program)
    finally:
        os.kill(pid, 9)
        os.waitpid(pid, 0)


def test_a_reader_of_a_fifo_does_not_take_the_check_for_the_end(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "fifo")
    reader = os.open(tmp_path / "fifo", os.O_RDONLY | os.O_NONBLOCK)
    try:
        check_output("--json", tmp_path / "fifo")
        assert not select.select([reader], [], [], 0)[0]  # else it is readable: at its end
    finally:
        os.close(reader)


def test_what_must_not_exist(tmp_path: Path) -> None:
    check_output("--pidfile", tmp_path / "pid", new=True)
    (tmp_path / "pid").symlink_to("nothing")
    with pytest.raises(LazyPagesError, match=r"--pidfile \S*/pid exists: remove it"):
        check_output("--pidfile", tmp_path / "pid", new=True)


@pytest.mark.parametrize("option", ["--stats-json", "-o", "--trace", "--pidfile"])
@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("no/out", "{option} {work}/no/out: the directory {work}/no does not exist: create it first"),
        ("file/out", "{option} {work}/file/out: the directory {work}/file is not a directory"),
        (".", "is a directory: name a file"),
        ("/proc/out", "{option} /proc/out can't be created: "),
    ],
)
def test_serve_checks_all_before_it_changes_anything(
    option: str, name: str, said: str, tmp_path: Path
) -> None:
    """All in the same words; and no other output is emptied, or made, for a command that is refused."""
    if (option, name) == ("--pidfile", "."):
        said = "exists: remove it"
    outputs = {"--stats-json": "stats", "-o": "serve.log", "--trace": "trace", "--pidfile": "pid"}
    kept = ["file", "inventory.img", "serve.log", "stats", "trace"]
    for old in kept:
        (tmp_path / old).write_text("of yesterday")
    words = [word for pair in {**outputs, option: name}.items() for word in pair]
    result = CliRunner().invoke(cli, ["serve", "-d", "-D", str(tmp_path), *words])
    assert result.exit_code == 1
    assert said.format(option=option, work=tmp_path) in result.output
    assert sorted(os.listdir(tmp_path)) == kept
    assert {(tmp_path / old).read_text() for old in kept} == {"of yesterday"}
