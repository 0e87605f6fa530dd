"""Files that are written at the end are checked at the start, and left as they are."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from lazypages.errors import LazyPagesError
from lazypages.outputs import check_output


def test_nothing_is_left_and_nothing_lost(tmp_path: Path) -> None:
    (tmp_path / "old").write_text("contents")
    (tmp_path / "link").symlink_to("not there yet")
    os.mkfifo(tmp_path / "fifo")
    before = sorted(os.listdir(tmp_path))
    for name in (*before, "new"):
        check_output("--json", tmp_path / name)
    assert sorted(os.listdir(tmp_path)) == before
    assert (tmp_path / "old").read_text() == "contents"


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
