"""When a tracker vouches for a level, and when not; soft-dirty bits, which the test machine's kernel lacks."""

from __future__ import annotations

import os
import tempfile
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from dumptool import memory, trackers, tracking
from dumptool._ptrace import lib
from dumptool.errors import DumpError
from dumptool.mappings import Mapping
from dumptool.memory import Marks
from dumptool.proc import FdInfo, OpenFile
from dumptool.trackers import (
    FEATURES,
    MEMFD_LINK,
    OLD_FEATURES,
    SOFT_DIRTY,
    UFFD_LINK,
    UFFD_WP,
    Record,
)
from dumptool.tracking import Armed, Held, Method, Vouched

PROGRAM = "7ffe:00"
RECORD = Record(pid=10, start_time=77, program=PROGRAM, arming="a", level="run-1", method=UFFD_WP)


def task(pid: int = 10, start_time: int = 77) -> Any:
    vdso = SimpleNamespace(start=0x7000, name="[vdso]")
    layout = SimpleNamespace(vmas=(vdso,))
    return SimpleNamespace(pid=pid, stat=SimpleNamespace(start_time=start_time), layout=layout)


def held(record: Record = RECORD, memfd: int = -1, uffd: int | None = 993) -> Held:
    return Held(SimpleNamespace(), record, memfd, uffd)  # type: ignore[arg-type]


@pytest.fixture(autouse=True)
def _no_process(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is read of processes that there are not."""
    monkeypatch.setattr(tracking, "program", lambda _pid: PROGRAM)
    monkeypatch.setattr(tracking, "is_soft_dirty", lambda _pid, address: address == WITNESS)


WITNESS = 0x7000


def test_a_record_is_written_in_one_piece() -> None:
    assert Record.decode(RECORD.encode()) == RECORD
    assert len(RECORD.encode()) == len(Record(1, 1).encode()) == trackers.RECORD_SIZE


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"{}",
        b"[]",
        b"junk",
        b'{"pid": "1", "start_time": 1}',
        b'{"pid": 1, "start_time": 1, "uffd": 1}',
        RECORD.encode()[:40],
    ],
)
def test_what_is_no_record(data: bytes) -> None:
    assert Record.decode(data) is None


def test_vouches_for_its_own_level_only(monkeypatch: pytest.MonkeyPatch) -> None:
    known = tracking.vouched(held(), "run-1")
    assert known is not None
    assert (known.with_, known.without) == (lib.LP_PAGE_WPALLOWED, lib.LP_PAGE_WRITTEN)
    assert tracking.vouched(held(), "run-0") is None
    assert tracking.vouched(held(), "") is None
    assert tracking.vouched(held(replace(RECORD, level="")), "run-1") is None
    assert tracking.vouched(held(replace(RECORD, level="")), "") is None
    assert (
        tracking.vouched(held(replace(RECORD, method="")), "run-1") is None
    )  # the run that made it was killed
    assert tracking.vouched(None, "run-1") is None
    for now in ("7ffe:01", ""):  # after an execve; unknown
        monkeypatch.setattr(tracking, "program", lambda _pid, now=now: now)
        assert tracking.vouched(held(), "run-1") is None
        assert not tracking.fits(held(), Method.AUTO)


def test_which_trackers_can_be_armed() -> None:
    assert tracking.fits(held(), Method.AUTO)
    assert tracking.fits(held(), Method.UFFD_WP)
    assert not tracking.fits(held(), Method.SOFT_DIRTY)
    assert not tracking.fits(held(replace(RECORD, method="")), Method.AUTO)


def mapping(start: int, size: int = 0x4000) -> Mapping:
    entry = SimpleNamespace(start=start, end=start + size)
    found: Any = SimpleNamespace(
        entry=entry, private=True, file_backed=False, lazy=True, readable=True, whole=False
    )
    return found  # type: ignore[no-any-return]


def test_soft_dirty_bits_need_no_userfaultfd() -> None:
    """But then a mapping from which a page table may have been moved as a whole is not known."""
    record = replace(RECORD, method=SOFT_DIRTY, witness=WITNESS)
    known = tracking.vouched(held(record, uffd=None), "run-1")
    assert known is not None
    assert known.with_ == 0
    assert known.without == lib.LP_PAGE_SOFT_DIRTY | lib.LP_PAGE_PFNZERO
    assert known.fresh([mapping(0x1000), mapping(0x1FF000, 0x1000), mapping(0x3FF000, 0x2000)]) == {
        0x1FF000,
        0x3FF000,
    }


@pytest.mark.parametrize("witness", [0, 0x9000])
def test_soft_dirty_bits_that_somebody_else_has_cleared(witness: int) -> None:
    record = replace(RECORD, method=SOFT_DIRTY, witness=witness)
    assert tracking.vouched(held(record), "run-1") is None


def test_which_mappings_are_still_registered(monkeypatch: pytest.MonkeyPatch) -> None:
    registered = {0x1000, 0x400000}
    fake = SimpleNamespace(lp_is_registered=lambda _uffd, start: start in registered)
    monkeypatch.setattr(tracking, "lib", fake)
    monkeypatch.setattr(tracking, "_register", lambda _uffd, start, _end: start in registered)
    mappings = [mapping(start, 0x400000) for start in (0x1000, 0x400000, 0x800000)] + [mapping(0xC00000)]
    assert Vouched(UFFD_WP, 993).fresh(mappings) == {0x800000, 0xC00000}
    assert Vouched(SOFT_DIRTY, 993).fresh(mappings) == {0x800000}


def open_file(fd: int, link: str, features: int | None = None) -> OpenFile:
    other = {} if features is None else {"API": f"aa:{features:x}:1ffff"}
    return OpenFile(fd, link, os.stat("/"), FdInfo(0, 0, 0, (), other))


def test_what_is_left_in_a_process() -> None:
    """By earlier versions, whose memfd tells that the rest is theirs; by a killed run, whose record tells it."""
    own = [open_file(3, UFFD_LINK, 1 << 1), open_file(4, UFFD_LINK, 1 << 31), open_file(5, UFFD_LINK, 0)]
    assert trackers.leftovers(own, None) == ()
    assert trackers.leftovers(own, RECORD) == ()
    assert trackers.leftovers(own[:1], replace(RECORD, method="")) == ()
    assert trackers.leftovers(own[2:], replace(RECORD, method="")) == (5,)
    for features in (FEATURES, OLD_FEATURES):
        theirs = [open_file(992, MEMFD_LINK), open_file(993, UFFD_LINK, features | 1 << 31)]
        assert trackers.leftovers([*own[:1], *theirs], None) == (993, 992)


def test_soft_dirty_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    """Pages without the bit are unchanged, but for mappings made since the bits were cleared."""
    found = {
        0x1000: [(0x1000, 0x2000, 0), (0x2000, 0x4000, lib.LP_PAGE_SOFT_DIRTY)],
        0x9000: [(0x9000, 0xA000, 0)],
    }

    def scan_mapping(_fd: int, mapping: Any, _protect: bool, runs: memory.Runs) -> None:
        for run in found[mapping.entry.start]:
            runs.append(*run)

    monkeypatch.setattr(memory, "_scan_mapping", scan_mapping)
    marks = Marks(*tracking.CATEGORIES["soft-dirty"])
    (part,) = memory.scan(-1, [mapping(0x1000), mapping(0x9000)], marks, fresh={0x9000})
    assert list(part.runs) == [(0x1000, 0x2000, 3), (0x2000, 0x4000, 6), (0x9000, 0xA000, 6)]


def test_soft_dirty_bits_are_cleared(monkeypatch: pytest.MonkeyPatch) -> None:
    written: list[tuple[str, bytes]] = []

    class File:
        def __init__(self, name: str, *_arguments: object, **_options: object) -> None:
            self._name = name

        def __enter__(self) -> File:
            return self

        def __exit__(self, *_exception: object) -> None:
            pass

        def write(self, data: bytes) -> None:
            written.append((self._name, data))

    monkeypatch.setattr(tracking, "open", File, raising=False)
    for marked in (True, False):
        written.clear()
        monkeypatch.setattr(
            tracking, "_mark", lambda _pid, address, marked=marked: marked and address == WITNESS
        )
        armed = Armed(task(), held(), replace(RECORD, method=SOFT_DIRTY))
        armed.clear()
        assert written == [("/proc/10/clear_refs", b"4")]
        assert armed.record.witness == (WITNESS if marked else 0)
    Armed(task(), held(), RECORD).clear()
    assert len(written) == 1


def test_only_the_last_arming_is_completed() -> None:
    with tempfile.TemporaryFile() as file:
        trackers.store(file.fileno(), replace(RECORD, arming="mine", level=""))
        ours = held(memfd=file.fileno())
        Armed(task(), ours, replace(RECORD, arming="mine", level="")).complete("run-2")
        stored = Record.decode(os.pread(file.fileno(), trackers.RECORD_SIZE, 0))
        assert stored is not None
        assert stored.level == "run-2"
        trackers.store(file.fileno(), replace(RECORD, arming="another", level=""))
        Armed(task(), ours, replace(RECORD, arming="mine", level="")).complete("run-3")
        stored = Record.decode(os.pread(file.fileno(), trackers.RECORD_SIZE, 0))
        assert stored is not None
        assert stored.level == ""


def test_this_kernel_and_soft_dirty_bits() -> None:
    config = Path("/proc/config.gz")
    if config.exists():
        import gzip

        has = "CONFIG_MEM_SOFT_DIRTY=y" in gzip.decompress(config.read_bytes()).decode()
        assert tracking.soft_dirty_works() == has


def test_asking_for_soft_dirty_bits_where_there_are_none(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tracking, "soft_dirty_works", lambda: False)
    with pytest.raises(DumpError, match="no soft-dirty"):
        tracking.make(task(), -1, SimpleNamespace(), Method.SOFT_DIRTY, SimpleNamespace())  # type: ignore[arg-type]


def test_the_huge_zero_page_counts_as_written(tmp_path: Path) -> None:
    """Where PAGEMAP_SCAN does not tell it: pagemap says that it is no anonymous page."""
    pagemap = tmp_path / "pagemap"
    pagemap.write_bytes(b"".join((entry << 61).to_bytes(8, "little") * 512 for entry in (4, 4, 5, 4)))
    runs, huge = memory.Runs(), lib.LP_PAGE_HUGE
    for start, end, flags in (
        (0, 0x400000, huge),
        (0x400000, 0x600000, huge),
        (0x600000, 0x601000, huge),
        (0x400000, 0x401000, 0),
    ):
        runs.append(start, end, flags)
    with pagemap.open("rb") as file:
        memory.doubt_huge_zeros(file.fileno(), runs, 0)
    assert [flags for _, _, flags in runs] == [huge, huge | lib.LP_PAGE_SOFT_DIRTY, huge, 0]


def test_one_that_is_closed_is_not_dropped() -> None:
    """Its descriptors may be somebody else's, and so may the tracker."""
    tracker = held(memfd=-1, uffd=None)
    tracker.drop()  # the holder here has no method
