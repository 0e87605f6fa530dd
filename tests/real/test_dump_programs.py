"""Ordinary programs in the middle of work: dumped by dumptool, restored by real CRIU, they end as if nothing had been.

What each prints is compared with an undisturbed run.
"""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest

from tests.support.criu import Criu, all_criu
from tests.support.dumptool import check, reap_all
from tests.support.processes import nothing_left, reap, start, wait_for

PROGRAMS = Path(__file__).parent.parent / "support" / "programs"
PIPELINE = (
    'i=0; while [ $i -lt 1000 ]; do echo $i; i=$((i+1)); [ -e "$0" ] || sleep 0.02; done | '
    'while read x; do echo "$x has come"; done; echo end'
)


@dataclass(frozen=True)
class Program:
    """What to run, slowly until there is the file `go`, and then fast; or fast from the start.

    Run slowly it takes ten seconds at least. `lines`: to wait for before the dump.
    """

    slow: list[str]
    fast: list[str]
    lines: int
    options: tuple[str, ...] = ()


@pytest.fixture(scope="module")
def built() -> Iterator[Path]:
    """The programs in C: one static, one not."""
    with TemporaryDirectory(prefix="lazypages-programs-") as folder:
        for name, options in (("counter", ["-static"]), ("workers", ["-pthread"])):
            command = ["gcc", "-std=gnu11", "-O2", "-Wall", "-Wextra", "-Werror", *options]
            source = PROGRAMS / f"{name}.c"
            subprocess.run([*command, "-o", f"{folder}/{name}", source], check=True, timeout=120)
        yield Path(folder)


def program(name: str, built: Path, folder: Path, go: Path) -> Program:
    match name:
        case "counter" | "workers":
            path = str(built / name)
            rounds = "6000"
            fast = [path, rounds, "0", str(go)]
            return Program([path, rounds, "2000", str(go)], fast, 50 if name == "counter" else 1)
        case "shell":
            command = ["/bin/sh", "-c", PIPELINE]
            return Program([*command, str(go)], [*command, "/"], 10)
        case _:
            command = [sys.executable, str(PROGRAMS / "database.py")]
            slow_file, fast_file = str(folder / "slow.db"), str(folder / "fast.db")
            return Program(
                [*command, slow_file, "10000", "0.001", str(go)],
                [*command, fast_file, "10000", "0", str(go)],
                1,
                ("--file-locks",),
            )


@pytest.mark.parametrize("pre_dump", [False, True], ids=["dump", "pre-dump"])
@pytest.mark.parametrize("criu", all_criu())
@pytest.mark.parametrize("name", ["counter", "workers", "shell", "sqlite"])
def test_goes_on_where_it_was(name: str, criu: Criu, pre_dump: bool, built: Path, tmp_path: Path) -> None:
    go = tmp_path / "go"
    what = program(name, built, tmp_path, go)
    expected = subprocess.run(what.fast, check=True, capture_output=True, timeout=60).stdout
    output, images = tmp_path / "output", tmp_path / "images"
    with nothing_left():
        process = start(what.slow, output=output, env={"PATH": os.environ["PATH"]})
        wait_for("output", lambda: output.read_bytes().count(b"\n") >= what.lines)
        parent = []
        if pre_dump:
            check("pre-dump", "-t", process.pid, "-D", tmp_path / "level")
            time.sleep(0.05)
            parent = ["--prev-images-dir", "../level"]
        check("dump", "-t", process.pid, "-D", images, *parent, *what.options)
        assert process.wait(30) == -9
        reap_all()
        caught = output.read_bytes()
        assert len(caught) < len(expected), "it had ended before it was dumped"
        criu.restore(images, *what.options, lazy=False)
        if what.lines > 1:
            wait_for("more output", lambda: len(output.read_bytes()) > len(caught))
        go.touch()
        code = os.waitstatus_to_exitcode(reap(process.pid))
    assert output.read_bytes() == expected
    assert code == 0
