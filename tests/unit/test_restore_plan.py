"""Pure parts of the planner: registers, where things go, what the plan looks like."""

from __future__ import annotations

import os
import struct
import subprocess
from pathlib import Path
from typing import ClassVar

import pytest

from images_spec.errors import ImageError
from images_spec.messages import MmEntry, ThreadInfoX86, UserX86FpregsEntry, VmaEntry
from lazypages.cli.restore import RESTORER
from lazypages.restore import registers
from lazypages.restore.errors import RestoreError
from lazypages.restore.machine import Machine, Special
from lazypages.restore.memory import SCRATCH_LOW, find_scratch, special_places
from lazypages.restore.plan import Plan

PATH = Path("mm-1.img")
WORD = (1 << 64) - 1


class Kernel(Machine):
    special: ClassVar = [
        Special("[vvar]", 0x1000, 0x4000),
        Special("[vvar_vclock]", 0x5000, 0x2000),
        Special("[vdso]", 0x7000, 0x2000),
    ]
    cpu_flags: ClassVar = frozenset({"avx"})


def vma(start: int, end: int, status: int) -> VmaEntry:
    return VmaEntry(start=start, end=end, pgoff=0, shmid=0, prot=1, flags=0x22, status=status, fd=-1)


def space(*vmas: VmaEntry) -> MmEntry:
    return MmEntry(vmas=vmas)


def info(ax: int, orig_ax: int) -> ThreadInfoX86:
    result = ThreadInfoX86()
    result.gpregs.ax, result.gpregs.orig_ax, result.gpregs.ip, result.gpregs.r15 = (
        ax & WORD,
        orig_ax & WORD,
        100,
        7,
    )
    return result


@pytest.mark.parametrize(
    ("ax", "orig", "expected"),
    [
        (-4, 230, (230, -1, 98)),  # EINTR: what CRIU makes of waits for a time
        (-4, 0, (-4, 0, 100)),
        (5, -1, (5, -1, 100)),
        (-512, 0, (0, -1, 98)),  # to be called again
        (-514, 34, (34, -1, 98)),
        (-516, 230, (230, -1, 98)),
        (-512, -1, (-512, -1, 100)),  # no system call: a number like any other
    ],
)
def test_interrupted_system_calls(ax: int, orig: int, expected: tuple[int, int, int]) -> None:
    words = struct.unpack("<27Q", registers.general(info(ax, orig), signalled=False))
    assert words[0] == 7
    assert (words[10], words[15], words[16]) == tuple(value & WORD for value in expected)


def test_a_sleep_goes_on_with_the_time_that_was_left() -> None:
    before = info(-4, 35)
    before.gpregs.di, before.gpregs.si = 0x1000, 0x2000
    words = struct.unpack("<27Q", registers.general(before, signalled=False))
    assert (words[13], words[14]) == (0x2000, 0x2000)  # rsi, rdi
    words = struct.unpack("<27Q", registers.general(before, signalled=True))
    assert (words[10], words[13], words[14], words[16]) == (-4 & WORD, 0x2000, 0x1000, 100)


def test_vector_registers() -> None:
    fpregs = UserX86FpregsEntry(st_space=range(32), xmm_space=range(64), cwd=0x37F, mxcsr=0x1F80)
    legacy = registers.fxsave(fpregs, PATH)
    assert len(legacy) == 512
    assert struct.unpack_from("<96I", legacy, 32) == (*range(32), *range(64))
    assert registers.extended(fpregs, Kernel(), PATH) == (3, [])
    fpregs.xsave.xstate_bv = 7
    with pytest.raises(ImageError, match="ymmh_space has 0 values"):
        registers.extended(fpregs, Kernel(), PATH)
    fpregs.xsave.ymmh_space.extend(range(64))
    assert registers.extended(fpregs, Kernel(), PATH) == (7, [(2, struct.pack("<64I", *range(64)))])
    fpregs.xsave.xstate_bv = 7 | 1 << 5
    with pytest.raises(RestoreError, match="avx512f"):
        registers.extended(fpregs, Kernel(), PATH)
    fpregs.xsave.xstate_bv = 7 | 1 << 18
    with pytest.raises(RestoreError, match="component 18"):
        registers.extended(fpregs, Kernel(), PATH)
    del fpregs.st_space[0]
    with pytest.raises(ImageError, match="incomplete"):
        registers.fxsave(fpregs, PATH)


def test_vdso_and_vvar() -> None:
    """CRIU takes several vvar mappings for one; either way, each of this kernel's gets its place."""
    places = [(0x100000, 0x4000), (0x104000, 0x2000), (0x106000, 0x2000)]
    one = space(vma(0x100000, 0x106000, 0x1000), vma(0x106000, 0x108000, 8))
    two = space(vma(0x100000, 0x104000, 0x1000), vma(0x104000, 0x106000, 0x1000), vma(0x106000, 0x108000, 8))
    assert special_places(one, Kernel(), PATH) == places
    assert special_places(two, Kernel(), PATH) == places
    assert special_places(space(), Kernel(), PATH) == []
    older = space(vma(0x100000, 0x104000, 0x1000), vma(0x104000, 0x106000, 8))
    with pytest.raises(RestoreError, match="another kernel"):
        special_places(older, Kernel(), PATH)


def test_scratch_is_free_in_all_tasks() -> None:
    assert find_scratch([space()], Kernel()) == SCRATCH_LOW
    taken = [
        space(vma(SCRATCH_LOW - 4096, SCRATCH_LOW + 4096, 1)),
        space(vma(SCRATCH_LOW + 8192, SCRATCH_LOW + 12288, 1)),
    ]
    assert find_scratch(taken, Kernel()) == SCRATCH_LOW + 12288
    with pytest.raises(RestoreError, match=r"no .* bytes"):
        find_scratch([space(vma(0x1000, 0x7FFFFFFFF000, 1))], Kernel())


def test_layout() -> None:
    """As csrc/restore/restore_plan.h has it."""
    plan = Plan(1 << 40)
    slot = plan.open(b"/x", 5, 6, "label")
    data = plan.encode(parking=4096, link_fd=1023)
    assert struct.unpack_from("<QIIIIQQQIiiI", data) == (
        0x4E414C5052504C,
        1,
        1,
        0,
        1,
        len(data),
        1 << 40,
        4096,
        1023,
        -1,
        -1,
        0,
    )
    assert struct.unpack_from("<IIII8sIIQ3s", data, 64) == (
        1,
        0xFFFFFFFF,
        6,
        19,
        b"label\0\0\0",
        slot,
        5,
        6,
        b"/x\0",
    )
    assert len(data) % 8 == 0


CRASHES = sorted((Path(__file__).parents[1] / "fuzz/corpus/plan").glob("crash-*"))


@pytest.mark.parametrize("path", CRASHES, ids=[path.name for path in CRASHES])
def test_a_plan_that_fits_nowhere_is_refused(path: Path) -> None:
    """What fuzzing has found (tests/fuzz/plan.c): the restorer says so before it does anything."""
    plan = os.memfd_create("plan")
    try:
        os.write(plan, path.read_bytes())
        done = subprocess.run(
            [RESTORER, str(plan)], pass_fds=[plan], capture_output=True, text=True, timeout=60, check=False
        )
    finally:
        os.close(plan)
    assert done.returncode == 1
    assert done.stderr == "lazypages restore: restorer: reading the plan: Invalid argument\n"
