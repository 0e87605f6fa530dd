"""The plan that the restorer executes: csrc/restore/restore_plan.h has the format, this is its writer."""

from __future__ import annotations

import struct
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from enum import IntEnum
from typing import Final

from images_spec.placement import Span

MAGIC: Final = 0x4E414C5052504C
VERSION: Final = 1
NONE: Final = 0xFFFFFFFF
"""The restorer itself, where an op names a thread; no file, where one names a slot."""

SCRATCH_CODE: Final = 4096
SCRATCH_DATA: Final = 65536

_HEADER = struct.Struct("<QIIIIQQQIiiI")
_OP = struct.Struct("<IIII")
_CALL = struct.Struct("<Q6QQQ")
_WORD = struct.Struct("<I4x")
_WORDS = struct.Struct("<II")
_PLACE = struct.Struct("<QQ")
_RANGE = struct.Struct("<QQQ")


class Kind(IntEnum):
    """What an op does."""

    OPEN = 1
    PIPE = 2
    REOPEN = 3
    SHARED = 4
    CLOSE = 5
    WRITE = 6
    SPAWN = 7
    CALL = 8
    GIVE = 9
    SWITCH = 10
    FILL = 11
    EXIT = 12
    REAP = 13
    DRAIN = 14
    REGS = 15
    UFFD = 16
    ANNOUNCE = 17
    FINISH = 18
    GO = 19
    WAIT = 20


TAKE_EAGER: Final = 1
TAKE_LAZY: Final = 2


@dataclass(frozen=True, slots=True)
class FillRange:
    """Addresses ``[start, end)``; ``take``: ``TAKE_*`` bits of the extents that are read there."""

    start: int
    end: int
    take: int


class Plan:
    """Ops in their order. ``scratch``: the address of the scratch area in every task.

    A *thread* and a *slot* (a file that the restorer has open) are small numbers, given out by ``new_thread``
    and ``new_slot``. A ``label`` says to the user what was being done when it failed.
    """

    def __init__(self, scratch: int) -> None:
        self.scratch = scratch
        self.data = scratch + SCRATCH_CODE
        """Where the data of a ``call`` lies when it runs."""
        self._ops = bytearray()
        self._nr_ops = 0
        self._nr_threads = 0
        self._nr_slots = 0

    def new_thread(self) -> int:
        self._nr_threads += 1
        return self._nr_threads - 1

    def new_slot(self) -> int:
        self._nr_slots += 1
        return self._nr_slots - 1

    def _op(self, kind: Kind, thread: int, label: str, *body: bytes) -> None:
        text = label.encode(errors="replace") + b"\0"
        size = sum(map(len, body))
        self._ops += _OP.pack(kind, thread, len(text), size)
        self._ops += text + bytes(-len(text) % 8)
        for part in body:
            self._ops += part
        self._ops += bytes(-size % 8)
        self._nr_ops += 1

    def open(self, path: bytes, flags: int, position: int, label: str) -> int:
        """A slot for a file; position 0: as it is after the open."""
        slot = self.new_slot()
        self._op(Kind.OPEN, NONE, label, struct.pack("<IIQ", slot, flags, position), path + b"\0")
        return slot

    def pipe(self, capacity: int, contents: bytes, label: str) -> tuple[int, int]:
        """Slots for both ends of a pipe, of ``capacity`` bytes unless that is 0."""
        reader, writer = self.new_slot(), self.new_slot()
        self._op(Kind.PIPE, NONE, label, struct.pack("<IIQ", reader, writer, capacity), contents)
        return reader, writer

    def reopen(self, slot: int, flags: int, label: str) -> int:
        """Another description of what a slot has open."""
        again = self.new_slot()
        self._op(Kind.REOPEN, NONE, label, struct.pack("<IIIxxxx", again, slot, flags))
        return again

    def shared(self, size: int, label: str) -> int:
        """A slot for shared anonymous memory of ``size`` bytes."""
        slot = self.new_slot()
        self._op(Kind.SHARED, NONE, label, struct.pack("<I4xQ", slot, size))
        return slot

    def close(self, slot: int) -> None:
        self._op(Kind.CLOSE, NONE, "close a file", _WORD.pack(slot))

    def write(self, path: str, flags: int, text: str, label: str) -> None:
        """The restorer opens a file and writes to it."""
        name = path.encode(errors="surrogateescape") + b"\0"
        self._op(Kind.WRITE, NONE, label, _WORDS.pack(flags, len(name)), name, text.encode())

    def spawn(self, parent: int, tid: int, flags: int, label: str) -> int:
        """A thread or process ``tid``, made by thread ``parent`` with ``CLONE_*`` flags."""
        thread = self.new_thread()
        self._op(Kind.SPAWN, thread, label, struct.pack("<IiQ", parent, tid, flags))
        return thread

    def call(
        self, thread: int, label: str, nr: int, *args: int, data: bytes = b"", exact: int | None = None
    ) -> None:
        """A system call of a thread, which must not fail; ``exact``: and have this result.

        ``data`` is at ``self.data`` while it runs.
        """
        if len(data) > SCRATCH_DATA:
            raise ValueError(f"{label}: {len(data)} bytes of data")
        words = [argument & (1 << 64) - 1 for argument in args] + [0] * (6 - len(args))
        expected = (0, 0) if exact is None else (1, exact)
        self._op(Kind.CALL, thread, label, _CALL.pack(nr, *words, *expected), data)

    def give(self, thread: int, slot: int, fd: int, cloexec: bool, label: str) -> None:
        """The process gets descriptor ``fd`` for what a slot has open."""
        self._op(Kind.GIVE, thread, label, struct.pack("<IIIxxxx", slot, fd, cloexec))

    def switch(self, thread: int, places: Iterable[tuple[int, int]]) -> None:
        """The restorer's memory goes away; vvar and vdso move to ``places`` (start, size), or go too."""
        self._op(
            Kind.SWITCH,
            thread,
            "give up the restorer's memory, move vvar and vdso to their places",
            *(_PLACE.pack(*place) for place in places),
        )

    def fill(
        self,
        thread: int,
        levels: Sequence[int],
        ranges: Sequence[FillRange],
        *,
        extents: bytes,
        label: str,
        shared: int = NONE,
    ) -> None:
        """Contents of memory: ``extents`` (array of struct lp_extent) from the slots of their levels.

        ``shared``: the slot of the shared memory, with ``thread`` NONE.
        """
        slots = b"".join(slot.to_bytes(4, "little") for slot in levels)
        self._op(
            Kind.FILL,
            thread,
            label,
            struct.pack("<IIQQ", shared, len(levels), len(ranges), len(extents) // 32),
            slots + bytes(-len(slots) % 8),
            b"".join(_RANGE.pack(part.start, part.end, part.take) for part in ranges),
            extents,
        )

    def exit(self, thread: int, status: int) -> None:
        """The process becomes a zombie with a wait status."""
        self._op(Kind.EXIT, thread, f"end as a zombie with status {status:#x}", _WORD.pack(status))

    def reap(self, thread: int, helper: int) -> None:
        self._op(Kind.REAP, thread, "end a helper process", _WORD.pack(helper))

    def drain(self, thread: int) -> None:
        self._op(Kind.DRAIN, thread, "drop signals of the restoration")

    def regs(
        self,
        thread: int,
        gp: bytes,
        *,
        blocked: int,
        stop: bool,
        xstate_bv: int,
        fxsave: bytes,
        components: Iterable[tuple[int, bytes]],
    ) -> None:
        """Registers and signal mask; ``components``: bit number in ``xstate_bv`` and contents."""
        parts = [
            _WORDS.pack(number, len(contents)) + contents + bytes(-len(contents) % 8)
            for number, contents in components
        ]
        head = gp + struct.pack("<QQQ", blocked, stop, xstate_bv) + fxsave
        self._op(Kind.REGS, thread, "set the registers", head, *parts)

    def uffd(self, thread: int, pid: int, ranges: Sequence[Span]) -> None:
        """A userfaultfd for the process's ``ranges``, handed to the daemon."""
        self._op(
            Kind.UFFD,
            thread,
            "put the memory under userfaultfd, hand it to the daemon",
            struct.pack("<iI", pid, len(ranges)),
            *(_PLACE.pack(span.start, span.end - span.start) for span in ranges),
        )

    def announce(self, pid: int) -> None:
        self._op(Kind.ANNOUNCE, NONE, f"tell the daemon that task {pid} is dead", struct.pack("<i4x", pid))

    def finish(self) -> None:
        self._op(Kind.FINISH, NONE, "tell the daemon that all is restored (is it gone?)")

    def go(self) -> None:
        self._op(Kind.GO, NONE, "let the tasks run")

    def wait(self, thread: int) -> None:
        self._op(Kind.WAIT, thread, "wait for the task")

    def encode(
        self, *, parking: int, link_fd: int, control_fd: int = -1, log_fd: int = -1, verbose: bool = False
    ) -> bytes:
        """The whole plan. ``parking``: bytes for vvar and vdso in the scratch area.

        ``link_fd``: a descriptor that no task uses. ``control_fd``, ``log_fd``: inherited by the restorer.
        """
        header = _HEADER.pack(
            MAGIC,
            VERSION,
            self._nr_ops,
            self._nr_threads,
            self._nr_slots,
            _HEADER.size + len(self._ops),
            self.scratch,
            parking,
            link_fd,
            control_fd,
            log_fd,
            verbose,
        )
        return header + bytes(self._ops)
