"""Writes the plan that the restorer executes; csrc/restore/restore_plan.h defines the format."""

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
"""As a thread: the restorer itself. As a slot: no file."""

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
    """The kind of an op."""

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
    """Addresses ``[start, end)``; ``take``: ``TAKE_*`` bits of the extents to read in this range."""

    start: int
    end: int
    take: int


class Plan:
    """A sequence of ops. ``scratch``: the address of the scratch area in every task.

    A *thread* and a *slot* (a file that the restorer has open) are small numbers, allocated by ``new_thread``
    and ``new_slot``. A ``label`` describes the op in error messages.
    """

    def __init__(self, scratch: int) -> None:
        self.scratch = scratch
        self.data = scratch + SCRATCH_CODE
        """Address of the data of a ``call`` while it runs."""
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
        """A slot for a file. ``position`` 0: do not seek."""
        slot = self.new_slot()
        self._op(Kind.OPEN, NONE, label, struct.pack("<IIQ", slot, flags, position), path + b"\0")
        return slot

    def pipe(self, capacity: int, contents: bytes, label: str) -> tuple[int, int]:
        """Slots for the read and write end of a pipe of ``capacity`` bytes (0: the default)."""
        reader, writer = self.new_slot(), self.new_slot()
        self._op(Kind.PIPE, NONE, label, struct.pack("<IIQ", reader, writer, capacity), contents)
        return reader, writer

    def reopen(self, slot: int, flags: int, label: str) -> int:
        """A slot for a new open file description of the file in another slot."""
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
        """The restorer opens a file and writes ``text`` to it."""
        name = path.encode(errors="surrogateescape") + b"\0"
        self._op(Kind.WRITE, NONE, label, _WORDS.pack(flags, len(name)), name, text.encode())

    def spawn(self, parent: int, tid: int, flags: int, label: str) -> int:
        """Creates a thread or process ``tid`` by a clone3 of thread ``parent`` with ``CLONE_*`` flags."""
        thread = self.new_thread()
        self._op(Kind.SPAWN, thread, label, struct.pack("<IiQ", parent, tid, flags))
        return thread

    def call(
        self, thread: int, label: str, nr: int, *args: int, data: bytes = b"", exact: int | None = None
    ) -> None:
        """Runs a system call in a thread. It must not fail; with ``exact`` it must return this result.

        ``data`` is at ``self.data`` while it runs.
        """
        if len(data) > SCRATCH_DATA:
            raise ValueError(f"{label}: {len(data)} bytes of data")
        words = [argument & (1 << 64) - 1 for argument in args] + [0] * (6 - len(args))
        expected = (0, 0) if exact is None else (1, exact)
        self._op(Kind.CALL, thread, label, _CALL.pack(nr, *words, *expected), data)

    def give(self, thread: int, slot: int, fd: int, cloexec: bool, label: str) -> None:
        """Gives a process the file in a slot, as descriptor ``fd``."""
        self._op(Kind.GIVE, thread, label, struct.pack("<IIIxxxx", slot, fd, cloexec))

    def switch(self, thread: int, places: Iterable[tuple[int, int]]) -> None:
        """Unmaps the restorer's memory; moves vvar and vdso to ``places`` (start, size), or unmaps them, too."""
        self._op(
            Kind.SWITCH,
            thread,
            "unmap the restorer's memory, move vvar and vdso to their places",
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
        """Reads memory contents: ``extents`` (array of struct lp_extent), from the slots of their levels.

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
        """Ends the process with a wait status (wait(2)): it becomes a zombie."""
        self._op(Kind.EXIT, thread, f"end as a zombie with status {status:#x}", _WORD.pack(status))

    def reap(self, thread: int, helper: int) -> None:
        self._op(Kind.REAP, thread, "end a helper process", _WORD.pack(helper))

    def drain(self, thread: int) -> None:
        self._op(Kind.DRAIN, thread, "discard signals of the restore")

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
        """Sets registers and signal mask. ``components``: (bit number in ``xstate_bv``, contents)."""
        parts = [
            _WORDS.pack(number, len(contents)) + contents + bytes(-len(contents) % 8)
            for number, contents in components
        ]
        head = gp + struct.pack("<QQQ", blocked, stop, xstate_bv) + fxsave
        self._op(Kind.REGS, thread, "set the registers", head, *parts)

    def uffd(self, thread: int, pid: int, ranges: Sequence[Span]) -> None:
        """Creates a userfaultfd for the process's ``ranges`` and sends it to the daemon."""
        self._op(
            Kind.UFFD,
            thread,
            "register the memory with userfaultfd, send it to the daemon",
            struct.pack("<iI", pid, len(ranges)),
            *(_PLACE.pack(span.start, span.end - span.start) for span in ranges),
        )

    def announce(self, pid: int) -> None:
        self._op(
            Kind.ANNOUNCE, NONE, f"report to the daemon that task {pid} is dead", struct.pack("<i4x", pid)
        )

    def finish(self) -> None:
        self._op(Kind.FINISH, NONE, "report to the daemon that all is restored (has it exited?)")

    def go(self) -> None:
        self._op(Kind.GO, NONE, "let the tasks run")

    def wait(self, thread: int) -> None:
        self._op(Kind.WAIT, thread, "wait for the task")

    def encode(
        self, *, parking: int, link_fd: int, control_fd: int = -1, log_fd: int = -1, verbose: bool = False
    ) -> bytes:
        """The whole plan. ``parking``: bytes for vvar and vdso in the scratch area.

        ``link_fd``: a descriptor number that no task uses. ``control_fd``, ``log_fd``: inherited by the restorer.
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
