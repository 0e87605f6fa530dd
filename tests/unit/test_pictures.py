"""Pictures: of traces with all kinds of records, and what is said when there can be none."""

from __future__ import annotations

import random
import sys
from collections.abc import Iterable
from pathlib import Path

import pytest
from click.testing import CliRunner

from lazypages.cli.main import cli
from lazypages.engine._uffd import ffi, lib
from lazypages.observe.pictures import PictureError, check_picture
from lazypages.observe.trace_data import TraceData, background_colour, fault_colour
from lazypages.observe.tracing import NO_SOURCE, REMOTE, ZERO, Kind, Tracer, read_trace

BASE = 0x7F00_0000_0000
PAGE = 4096
MAGIC = {".png": b"\x89PNG", ".html": b"<!doctype html>"}
#: kind, memory, page, pages, source, detail
Happened = tuple[Kind, int, int, int, int, int]


def everything() -> Iterable[Happened]:
    """Two tasks and a fork, all kinds of records, memory at three places."""
    rng = random.Random(1)
    yield Kind.RESTORED, 0, 0, 0, NO_SOURCE, 0
    for memory in (1, 2, 3):
        yield Kind.MEMORY, memory, 0, 2000, NO_SOURCE, 1 if memory == 3 else 0
        for _ in range(300):
            page = rng.choice((0, 1 << 20, 1 << 30)) + rng.randrange(600)
            yield Kind.FAULT, memory, page, 1, NO_SOURCE, 0
            source = rng.choice((0, 1, ZERO, REMOTE))
            yield Kind.ANSWERED, memory, page, rng.randrange(1, 9), source, rng.randrange(2000, 500_000)
            yield Kind.BROUGHT, memory, page, 64, rng.choice((0, 1)), 20_000
        for kind in (Kind.LEFT, Kind.ARRIVED, Kind.LOST, Kind.POISONED):
            yield kind, memory, 5, 16, REMOTE, 5
        for kind in (Kind.PUT_OFF, Kind.REMOVED, Kind.UNMAPPED, Kind.REMAPPED, Kind.FORKED, Kind.COMPLETE):
            yield kind, memory, 700, 10, NO_SOURCE, 0


def write(path: Path, happened: Iterable[Happened]) -> None:
    write_at(path, enumerate(happened))


def write_at(path: Path, happened: Iterable[tuple[int, Happened]]) -> None:
    """At these times, in units of 10 us."""
    pids = (1, 2, 3)
    levels, programs = dict.fromkeys(pids, ("local", "parent-1")), dict.fromkeys(pids, "program")
    with Tracer(path, path.parent, levels, programs) as tracer:
        for number, (kind, memory, page, pages, source, detail) in happened:
            fields = {"kind": kind, "task": memory, "memory": memory, "source": source, "pages": pages}
            fields |= {"time": 10**12 + number * 10_000, "addr": BASE + page * PAGE, "detail": detail}
            assert lib.lp_trace_put(tracer.ring.handle, ffi.new("struct lp_trace_record *", fields))


def plot(*arguments: object) -> tuple[int, str]:
    result = CliRunner().invoke(cli, ["plot", *map(str, arguments)])
    assert not result.exception or isinstance(result.exception, SystemExit), result.exception
    return result.exit_code, result.output


@pytest.mark.loop(".html")
@pytest.mark.parametrize("suffix", MAGIC)
def test_all_kinds_of_records_are_drawn(suffix: str, tmp_path: Path) -> None:
    write(tmp_path / "trace", everything())
    picture = tmp_path / f"picture{suffix}"
    assert plot(tmp_path / "trace", "-o", picture) == (0, "")
    assert picture.read_bytes().startswith(MAGIC[suffix])
    if suffix == ".html":
        text = picture.read_text()
        assert text.count("<div class=row>") == 4  # all of them, then each
        assert f"{tmp_path}, 3 tasks, 900 faults" in text
        assert "task 3 (program), memory 3, fork of 1" in text
        for label in (
            "fault: local",
            "background: parent-1",
            "arrived: remote",
            "restore finished",
            "fork",
            "lost",
        ):
            assert f'"name":"{label}"' in text, label


@pytest.mark.parametrize(
    "happened",
    [
        [(Kind.ANSWERED, 1, 0, 1, 0, 1000)],
        [(Kind.BROUGHT, 1, 0, 1, 0, 1000)],
        [(Kind.LOST, 1, 0, 1, 0, 5)],
        [(Kind.ANSWERED, 1, 0, 1, 0, 0), (Kind.ANSWERED, 1, 0, 1, 0, 0)],
    ],
)
@pytest.mark.filterwarnings("error")
def test_traces_with_hardly_anything_are_drawn(happened: list[Happened], tmp_path: Path) -> None:
    write(tmp_path / "trace", happened)
    assert plot(tmp_path / "trace", "-o", tmp_path / "picture.png") == (0, "")


def test_what_can_not_be_drawn_is_one_line(tmp_path: Path) -> None:
    trace, picture = tmp_path / "trace", tmp_path / "picture.png"
    write(trace, [])
    code, said = plot(trace, "-o", picture)
    assert (code, said.count("\n")) == (1, 1)
    assert "nothing to draw" in said
    code, said = plot(tmp_path / "other", "-o", picture)
    assert (code, said) == (1, f"lazypages: {tmp_path}/other: No such file or directory\n")
    code, said = plot(tmp_path / "other", "-o", tmp_path / "no" / "picture.png")  # before the trace is read
    assert code == 1
    assert said.startswith(
        f"lazypages: --output {tmp_path}/no/picture.png: the directory {tmp_path}/no does not"
    )


def test_other_names_are_refused() -> None:
    with pytest.raises(PictureError, match=r"must end in \.png or \.html"):
        check_picture("--plot", Path("picture.svg"))


@pytest.mark.parametrize(
    ("module", "package", "suffix"),
    [("matplotlib.figure", "matplotlib", ".png"), ("plotly.graph_objects", "plotly", ".html")],
)
def test_a_missing_library_is_one_line_that_says_what_to_do(
    module: str, package: str, suffix: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, module, None)
    code, said = plot(tmp_path / "trace", "-o", tmp_path / f"picture{suffix}")
    text = f"lazypages: --output needs {package}: {sys.executable} -m pip install {package}\n"
    assert (code, said) == (1, text)


def test_no_source_has_one_colour_for_faults_and_background() -> None:
    """And no two of the sources that one checkpoint has in practice."""
    sources = [0, 1, 2, REMOTE]
    colours = [colour(source) for source in sources for colour in (fault_colour, background_colour)]
    assert len(set(colours)) == len(colours)


@pytest.mark.parametrize(
    ("restored", "shown"),
    [(-5, True), (205, True), (100, True), (-500, False)],
    ids=["just before", "just after", "between", "long before"],
)
def test_the_end_of_the_restore_is_in_the_picture(restored: int, shown: bool, tmp_path: Path) -> None:
    """The background begins only then, so it is before all that is drawn; times are in units of 10 us."""
    happened: list[tuple[int, Happened]] = [
        (restored, (Kind.RESTORED, 0, 0, 0, NO_SOURCE, 0)),
        *((time, (Kind.BROUGHT, 1, time, 1, 0, 10)) for time in (0, 200)),
    ]
    write_at(tmp_path / "trace", happened)
    data = TraceData(read_trace(tmp_path / "trace"))
    first, last = data.span
    (row,) = data.rows()
    (moment,) = row.moments
    assert (first < moment.time < last) is shown
