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
from tests.support.processes import nothing_left, reap, wait_for

PROGRAMS = Path(__file__).parent.parent / "support" / "programs"
PIPELINE = (
    "i=0; while [ $i -lt {lines} ]; do echo $i; i=$((i+1)); sleep {pause}; done | "
    'while read x; do echo "$x has come"; done; echo end'
)


@dataclass(frozen=True)
class Program:
    """How to run it slowly, so that it can be caught, and undisturbed; `lines`: to wait for before the dump."""

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


def program(name: str, built: Path, folder: Path) -> Program:
    match name:
        case "counter" | "workers":
            path = str(built / name)
            rounds, pause = ("500", "2000") if name == "counter" else ("1500", "2000")
            return Program([path, rounds, pause], [path, rounds, "0"], 50 if name == "counter" else 1)
        case "shell":
            slow, fast = (PIPELINE.format(lines=60, pause=pause) for pause in ("0.02", "0"))
            return Program(["/bin/sh", "-c", slow], ["/bin/sh", "-c", fast], 10)
        case _:
            start = [sys.executable, str(PROGRAMS / "database.py")]
            slow_file, fast_file = str(folder / "slow.db"), str(folder / "fast.db")
            return Program(
                [*start, slow_file, "1000", "0.001"],
                [*start, fast_file, "1000", "0"],
                1,
                ("--file-locks",),
            )


@pytest.mark.parametrize("pre_dump", [False, True], ids=["dump", "pre-dump"])
@pytest.mark.parametrize("criu", all_criu())
@pytest.mark.parametrize("name", ["counter", "workers", "shell", "sqlite"])
def test_goes_on_where_it_was(name: str, criu: Criu, pre_dump: bool, built: Path, tmp_path: Path) -> None:
    what = program(name, built, tmp_path)
    expected = subprocess.run(what.fast, check=True, capture_output=True, timeout=60).stdout
    output, images = tmp_path / "output", tmp_path / "images"
    with nothing_left():
        with output.open("wb") as stream:
            process = subprocess.Popen(
                what.slow,
                stdin=subprocess.DEVNULL,
                stdout=stream,
                stderr=stream,
                start_new_session=True,
                env={"PATH": os.environ["PATH"]},
            )
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
        criu.restore(images, *what.options, lazy=False)
        code = os.waitstatus_to_exitcode(reap(process.pid))
    assert output.read_bytes() == expected
    assert code == 0
    assert len(caught) < len(expected), "it had ended before it was dumped"
