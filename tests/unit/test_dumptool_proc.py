"""Parsers of /proc, with names that nobody expects; survey rules that need no process."""

from __future__ import annotations

import os
import stat

import pytest

from dumptool import proc
from dumptool.errors import Refusal, UnsupportedError
from dumptool.mappings import AUXV_WORDS, auxiliary_vector, describe
from dumptool.proc import Layout, Vma
from images_spec.flags import (
    MAP_ANONYMOUS,
    MAP_GROWSDOWN,
    MAP_LOCKED,
    MAP_PRIVATE,
    MAP_SHARED,
    VMA_ANON_PRIVATE,
    VMA_ANON_SHARED,
    VMA_FILE_PRIVATE,
    VMA_FILE_SHARED,
    VMA_HEAP,
    VMA_REGULAR,
    VMA_VDSO,
    VMA_VSYSCALL,
    VMA_VVAR,
)


def test_stat_of_a_nasty_name() -> None:
    words = " ".join(map(str, range(4, 53)))
    parsed = proc.parse_stat(b"12 (a) b (\xff) S " + words.encode() + b"\n")
    assert parsed.comm == b"a) b (\xff"
    assert (parsed.state, parsed.ppid, parsed.pgrp, parsed.session, parsed.tty) == ("S", 4, 5, 6, 7)
    assert (parsed.start_time, parsed.start_brk, parsed.exit_code) == (22, 47, 52)


def test_limits() -> None:
    lines = ["Limit                     Soft Limit           Hard Limit           Units     "]
    for number, name in enumerate(proc.RLIMITS):
        hard = "unlimited" if number % 2 else str(number * 10)
        lines.append(f"{name:<25} {number:<20} {hard:<20} bytes")
    limits = proc.parse_limits("\n".join(lines))
    assert limits[7] == (7, proc.RLIM_INFINITY)
    assert limits[14] == (14, 140)
    assert len(limits) == 16


def test_own_limits() -> None:
    import resource

    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    assert proc.parse_limits(proc.read_text(os.getpid(), "limits"))[resource.RLIMIT_NOFILE] == (soft, hard)


def test_maps_line() -> None:
    vma = proc.parse_maps_line(
        "7f0000000000-7f0000003000 rw-s 00001000 fe:01 77    /tmp/a b\\012c (deleted)\n"
    )
    assert (vma.start, vma.end, vma.pgoff, vma.inode) == (0x7F0000000000, 0x7F0000003000, 0x1000, 77)
    assert (vma.shared, vma.prot, vma.name) == (True, 3, "/tmp/a b\nc (deleted)")
    assert vma.device == os.makedev(0xFE, 1)
    assert vma.link == "map_files/7f0000000000-7f0000003000"


def test_smaps_flags() -> None:
    text = (
        "1000-2000 r-xp 00000000 00:00 0 \nSize: 4 kB\nVmFlags: rd ex mr\n"
        "ffff1000-ffff2000 rw-p 00000000 00:00 0 [stack]\nVmFlags: rd wr gd \n"
    )
    assert proc.parse_smaps_flags(text) == {
        0x1000: frozenset({"rd", "ex", "mr"}),
        0xFFFF1000: frozenset({"rd", "wr", "gd"}),
    }


def test_fdinfo_with_locks() -> None:
    info = proc.parse_fdinfo(
        "pos:\t42\nflags:\t02100002\nmnt_id:\t15\nino:\t9\n"
        "lock:\t1: POSIX  ADVISORY  WRITE 11 fe:00:5 7 11\n"
        "lock:\t2: FLOCK  MANDATORY READ -1 fe:00:5 0 EOF\n"
    )
    assert (info.pos, info.flags, info.mnt_id) == (42, 0o2100002, 15)
    assert info.other == {"ino": "9"}
    first, second = info.locks
    assert (first.kind, first.access, first.pid, first.start, first.end) == ("POSIX", "WRITE", 11, 7, 11)
    assert (second.mandatory, second.end) == (True, None)


def test_timers() -> None:
    text = (
        "ID: 3\nsignal: 60/00007fff86e452a8\nnotify: signal/pid.2634\nClockID: 0\n"
        "ID: 4\nsignal: 14/0000000000000000\nnotify: thread/tid.2635\nClockID: 1\n"
        "ID: 5\nsignal: 0/0000000000000000\nnotify: none/pid.2634\nClockID: 7\n"
    )
    assert proc.parse_timers(text) == [
        proc.PosixTimer(3, 60, 0x7FFF86E452A8, 0, None, 0),
        proc.PosixTimer(4, 14, 0, 6, 2635, 1),
        proc.PosixTimer(5, 0, 0, 1, None, 7),
    ]
    assert proc.parse_timers("") == []


def test_auxiliary_vector_is_no_longer_than_criu_takes() -> None:
    words = range(1, AUXV_WORDS + 3)
    data = b"".join(word.to_bytes(8, "little") for word in words)
    cut = auxiliary_vector(data)
    assert len(cut) == AUXV_WORDS
    assert cut[-2:] == (0, 0)
    assert cut[:-2] == tuple(words)[: AUXV_WORDS - 2]
    assert auxiliary_vector(data[: 8 * AUXV_WORDS]) == tuple(words)[:AUXV_WORDS]


def vma(number: int, name: str = "", perms: str = "rw-p", inode: int = 0) -> Vma:
    return Vma(number << 20, (number << 20) + 4096, perms, 0x3000 if inode else 0, 0, inode, name)


KINDS = [
    (vma(1), set(), MAP_PRIVATE | MAP_ANONYMOUS, VMA_REGULAR | VMA_ANON_PRIVATE, 0),
    (vma(2, "[heap]"), set(), MAP_PRIVATE | MAP_ANONYMOUS, VMA_REGULAR | VMA_ANON_PRIVATE | VMA_HEAP, 0),
    (vma(3, "[anon:x]"), {"lo"}, MAP_PRIVATE | MAP_ANONYMOUS | MAP_LOCKED, VMA_REGULAR | VMA_ANON_PRIVATE, 0),
    (
        vma(4, "[stack]"),
        {"gd"},
        MAP_PRIVATE | MAP_ANONYMOUS | MAP_GROWSDOWN,
        VMA_REGULAR | VMA_ANON_PRIVATE,
        0,
    ),
    (vma(5, "/a", "r-xp", 5), {"dd", "dc"}, MAP_PRIVATE, VMA_REGULAR | VMA_FILE_PRIVATE, 1 << 16 | 1 << 10),
    (vma(6, "/a", "rw-s", 5), set(), MAP_SHARED, VMA_REGULAR | VMA_FILE_SHARED, 0),
    (
        vma(7, "/dev/zero (deleted)", "rw-s", 9),
        {"wf"},
        MAP_SHARED | MAP_ANONYMOUS,
        VMA_REGULAR | VMA_ANON_SHARED,
        1 << 18,
    ),
    (
        vma(8, "[vvar]", "r--p"),
        {"dd", "io", "pf"},
        MAP_PRIVATE | MAP_ANONYMOUS,
        VMA_REGULAR | VMA_ANON_PRIVATE | VMA_VVAR,
        1 << 16,
    ),
    (
        vma(9, "[vdso]", "r-xp"),
        set(),
        MAP_PRIVATE | MAP_ANONYMOUS,
        VMA_REGULAR | VMA_ANON_PRIVATE | VMA_VDSO,
        0,
    ),
    (vma(10, "[vsyscall]", "--xp"), set(), MAP_PRIVATE | MAP_ANONYMOUS, VMA_ANON_PRIVATE | VMA_VSYSCALL, 0),
]


def layout_of(pairs: list[tuple[Vma, set[str]]]) -> Layout:
    return Layout(
        "", tuple(one for one, _ in pairs), {one.start: frozenset(flags) for one, flags in pairs}, ""
    )


@pytest.mark.parametrize("case", KINDS, ids=lambda case: case[0].name or "anonymous")
def test_kinds_of_mappings(case: tuple[Vma, set[str], int, int, int]) -> None:
    one, vm_flags, flags, status, advice = case
    (mapping,) = describe(layout_of([(one, vm_flags)]), lambda *_: (33, os.O_RDWR))
    entry = mapping.entry
    assert (entry.flags, entry.status, entry.madv, entry.fd) == (flags, status, advice, -1)
    assert entry.shmid == (9 if status & VMA_ANON_SHARED else 33 if one.inode else 0)
    assert mapping.lazy == (status & ~VMA_HEAP == VMA_REGULAR | VMA_ANON_PRIVATE and "lo" not in vm_flags)
    assert mapping.private == (not one.shared and not status & (VMA_VVAR | VMA_VSYSCALL))


def test_the_two_parts_of_vvar_are_one() -> None:
    first = Vma(0x1000, 0x5000, "r--p", 0, 0, 0, "[vvar]")
    second = Vma(0x5000, 0x7000, "r--p", 0, 0, 0, "[vvar_vclock]")
    (mapping,) = describe(layout_of([(first, set()), (second, set())]), lambda *_: (0, 0))
    assert (mapping.entry.start, mapping.entry.end) == (0x1000, 0x7000)


def test_what_a_refusal_says() -> None:
    error = UnsupportedError([Refusal(5, "fd 3", "is a socket"), Refusal(6, "", "is odd")])
    assert str(error) == "can't be dumped: pid 5 fd 3: is a socket; pid 6: is odd"


def test_own_files() -> None:
    with open("/dev/null") as null:
        found = {file.fd: file for file in proc.open_files(os.getpid())}
        assert found[null.fileno()].link == "/dev/null"
        assert stat.S_ISCHR(found[null.fileno()].status.st_mode)
