"""A Python face of the address space (csrc/serve/address_space.h), for tests. All in bytes."""

from __future__ import annotations

import errno
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from enum import IntEnum
from functools import partial
from typing import Any, NamedTuple, Protocol

from lazypages.engine._uffd import ffi, lib

PAGE = 4096
REMOTE, LOST = int(lib.LP_SOURCE_REMOTE), int(lib.LP_SOURCE_LOST)


class Kind(IntEnum):
    """``enum lp_kind``."""

    ZERO = 0
    DATA = 1
    REMOTE = 2
    LOST = 3
    CLAIMED = 4


class Extent(NamedTuple):
    """``struct lp_extent``."""

    start: int
    nr_pages: int
    offset: int = 0
    source: int = 0
    lazy: int = 1


class Change(NamedTuple):
    """``struct lp_change``; ``kind``: LP_FORKED, LP_REMOVED, LP_UNMAPPED or LP_REMAPPED. ``uffd``: which child."""

    kind: str
    start: int = 0
    length: int = 0
    to: int = 0
    uffd: int = 0
    awaited: bool = False

    def row(self) -> tuple[int, int, int, int, int, Any, bool]:
        return (
            getattr(lib, self.kind),
            self.uffd,
            self.start,
            self.length,
            self.to,
            ffi.NULL,
            self.awaited,
        )

    @classmethod
    def of(cls, raw: Any) -> Change:
        kinds = {getattr(lib, kind): kind for kind in KINDS}
        return cls(kinds[raw.kind], raw.start, raw.len, raw.to, raw.uffd, raw.awaited)


KINDS = ("LP_FORKED", "LP_REMOVED", "LP_UNMAPPED", "LP_REMAPPED")


class Memory(Protocol):
    """What a kernel has, to be asked as by ``struct lp_ask``."""

    def within(self, start: int, end: int) -> bool:
        """Whether all of it is in one registered mapping. Raises OSError when that can't be asked."""

    def zero(self, addr: int) -> bool:
        """Puts a page of zeros, unless a page is there already: then False."""


@dataclass(frozen=True)
class Silent:
    """It can't be asked: EAGAIN, its layout is changing; ESRCH, it has ended."""

    error: int

    def within(self, start: int, end: int) -> bool:
        raise OSError(self.error, "")

    def zero(self, addr: int) -> bool:
        raise AssertionError


class Nothing:
    """What has been unmapped is unmapped."""

    def within(self, start: int, end: int) -> bool:
        return False

    def zero(self, addr: int) -> bool:
        raise AssertionError


def _rows(changes: Sequence[Change]) -> Any:
    return ffi.new("struct lp_change[]", [change.row() for change in changes])


@dataclass(frozen=True)
class Answer:
    """``struct lp_run``; ``raw`` is that, for :meth:`Space.lookback`."""

    kind: Kind
    source: int
    addr: int
    image: int
    offset: int
    nr_pages: int
    dense: int
    raw: Any

    @classmethod
    def of(cls, raw: Any) -> Answer:
        return cls(
            Kind(raw.kind), raw.source, raw.addr, raw.dump_addr, raw.offset, raw.nr_pages, raw.index, raw
        )


class Space:
    """``struct lp_space``. Raises OSError with the errno of lp_space_new."""

    def __init__(
        self,
        extents: Sequence[tuple[int, ...]] | Any,
        vmas: Iterable[tuple[int, int]],
        wiped: Iterable[tuple[int, int]] = (),
        *,
        levels: int = 2,
    ) -> None:
        vmas, wiped = list(vmas), list(wiped)
        array = extents if isinstance(extents, ffi.CData) else ffi.new("struct lp_extent[]", list(extents))
        handle = lib.lp_space_new(
            array,
            len(array),
            ffi.new("struct lp_range[]", vmas),
            len(vmas),
            ffi.new("struct lp_range[]", wiped),
            len(wiped),
        )
        if handle == ffi.NULL:
            raise OSError(ffi.errno, errno.errorcode[ffi.errno])
        self._adopt(handle, levels)

    def _adopt(self, handle: Any, levels: int) -> None:
        self._space = ffi.gc(handle, lib.lp_space_free)
        self.levels = levels
        #: Pages dropped so far, by source: levels, remote, lost.
        self.dropped = [0] * (levels + 2)
        #: Where the engine refuses to place zeros, as of this moment.
        self.unsure: list[tuple[int, int]] = []
        #: How often it was unclear what left first.
        self.times_unclear = 0

    def _counts(self) -> Any:
        by_source = ffi.new("uint64_t[]", self.levels + 2)
        return ffi.new("struct lp_counts *", (by_source, self.levels)), by_source

    def _add_dropped(self, by_source: Any) -> None:
        self.dropped = [a + b for a, b in zip(self.dropped, by_source, strict=True)]

    @property
    def pending(self) -> int:
        return int(lib.lp_space_pending(self._space))

    @property
    def lost(self) -> int:
        return int(lib.lp_space_lost(self._space))

    def regions(self) -> list[tuple[int, int, int]]:
        regions = lib.lp_space_regions(self._space)
        return [(r.start, r.end, r.dump_addr) for r in regions[0 : lib.lp_space_nr_regions(self._space)]]

    def count(self) -> list[int]:
        counts, by_source = self._counts()
        lib.lp_space_count(self._space, counts)
        return list(by_source)

    def lookup(self, addr: int, max_pages: int = 1) -> Answer:
        return Answer.of(lib.lp_space_lookup(self._space, addr, max_pages))

    def lookback(self, at: Answer, max_pages: int) -> int:
        return int(lib.lp_space_lookback(self._space, ffi.addressof(at.raw), max_pages))

    def next(self, cursor: int, max_pages: int, *, remote: bool) -> Answer | None:
        raw = ffi.new("struct lp_run *")
        found = lib.lp_space_next(self._space, cursor, max_pages, remote, raw)
        return Answer.of(raw[0]) if found else None

    def locate(self, image: int) -> int | None:
        addr = ffi.new("uint64_t *")
        return int(addr[0]) if lib.lp_space_locate(self._space, image, addr) else None

    def index(self) -> None:
        lib.lp_space_index(self._space)

    def claim(self, dense: int, nr: int) -> int:
        return int(lib.lp_space_claim(self._space, dense, nr))

    def commit(self, dense: int, nr: int) -> int:
        return int(lib.lp_space_commit(self._space, dense, nr))

    def release(self, dense: int, nr: int) -> None:
        lib.lp_space_release(self._space, dense, nr)

    def lose(self, dense: int, nr: int) -> None:
        lib.lp_space_mark_lost(self._space, dense, nr)

    def regain(self) -> int:
        return int(lib.lp_space_retry_lost(self._space))

    def forget(self, image: int, nr_pages: int) -> None:
        counts, by_source = self._counts()
        lib.lp_space_forget(self._space, image, nr_pages, counts)
        self._add_dropped(by_source)

    def remove(self, start: int, end: int) -> None:
        counts, by_source = self._counts()
        lib.lp_space_remove(self._space, start, end, counts)
        self._add_dropped(by_source)

    def unmap(self, start: int, end: int) -> None:
        counts, by_source = self._counts()
        assert lib.lp_space_unmap(self._space, start, end, counts) == 0
        self._add_dropped(by_source)

    def remap(self, start: int, to: int, length: int) -> None:
        counts, by_source = self._counts()
        assert lib.lp_space_remap(self._space, start, to, length, counts) == 0
        self._add_dropped(by_source)

    def wipe(self, wiped: list[tuple[int, int]], kept: list[tuple[int, int]]) -> None:
        new = partial(ffi.new, "struct lp_range[]")
        assert lib.lp_space_wipe(self._space, new(wiped), len(wiped), new(kept), len(kept)) == 0

    def clone(self) -> Space:
        child = Space.__new__(Space)
        counts, by_source = self._counts()
        child._adopt(lib.lp_space_clone(self._space, counts), self.levels)
        child._add_dropped(by_source)
        return child

    def rest(self) -> None:
        lib.lp_space_quiescent(self._space)

    def question(self, start: int, end: int) -> None:
        assert lib.lp_space_question(self._space, start, end) == 0

    def _ask(self, memory: Memory) -> tuple[Any, list[Any]]:
        """``struct lp_ask``, and what must stay as long as it. Mappings are alike and no stacks."""

        def stays(_: Any, start: int, end: int, known: bool) -> None:
            if not known:
                self._lose(start, end)

        def within(_: Any, start: int, end: int) -> int:
            try:
                return 0 if memory.within(start, end) else -errno.ENOENT
            except OSError as error:
                return -(error.errno or 0)

        callbacks = [
            ffi.callback("int(void *, uint64_t, uint64_t)", within),
            ffi.callback("int(void *, uint64_t)", lambda _, addr: 0 if memory.zero(addr) else -errno.EEXIST),
            ffi.callback("bool(void *, uint64_t, uint64_t, uint64_t)", lambda *_: True),
            ffi.callback("bool(void *, uint64_t)", lambda *_: False),
            ffi.callback("bool(void *, uint64_t)", lambda *_: False),
            ffi.callback("bool(void *, uint64_t)", lambda *_: True),
            ffi.callback("void(void *, uint64_t, uint64_t, bool)", stays),
        ]
        return ffi.new("struct lp_ask *", [ffi.NULL, *callbacks]), callbacks

    def settle(self, memory: Memory) -> None:
        counts, by_source = self._counts()
        ask, _callbacks = self._ask(memory)
        assert lib.lp_settle(self._space, ask, counts) == 0
        self._add_dropped(by_source)

    def replay(self, made: Sequence[Change], told: int, memory: Memory, parents: Memory) -> None:
        """This space is a child's, as it was before the changes; its fork was event ``told``."""
        counts, by_source = self._counts()
        (ask, _callbacks), (ask_parent, _others) = self._ask(memory), self._ask(parents)
        tangled = ffi.new("bool *")
        rc = lib.lp_replay(self._space, _rows(made), len(made), told, False, ask, ask_parent, counts, tangled)
        assert rc == 0
        self._add_dropped(by_source)
        if tangled[0]:
            self.unsure += [(change.start, change.start + change.length) for change in made]
            moves = [change for change in made if change.kind == "LP_REMAPPED"]
            self.unsure += [(move.to, move.to + move.length) for move in moves]

    def _lose(self, start: int, end: int) -> None:
        while start < end:
            answer = self.lookup(start, (end - start) // PAGE)
            if answer.kind is not Kind.ZERO:
                lib.lp_space_mark_lost_for_good(self._space, answer.dense, answer.nr_pages)
            start += answer.nr_pages * PAGE

    def _lose_unclear(self, changes: Sequence[Change]) -> None:
        unclear = ffi.new("bool[]", len(changes) + 1)
        if lib.lp_unclear(self._space, _rows(changes), len(changes), unclear):
            self.times_unclear += 1
        places = [
            (place, place + change.length)
            for change, is_unclear in zip(changes, unclear, strict=False)
            if is_unclear
            for place in {change.start, change.to if change.kind == "LP_REMAPPED" else change.start}
        ]
        if not any(lib.lp_space_matters(self._space, start, end) for start, end in places):
            return
        for start, end in places:
            self._lose(start, end)
            lib.lp_space_mark_doubts_lost(self._space, start, end)
            self.unsure.append((start, end))

    def make(
        self,
        changes: list[Change],
        *,
        at_rest: bool,
        memory: Memory | None = None,
        children: Sequence[Memory] = (),
        old_length: bool = False,
    ) -> list[tuple[int, Space]]:
        """Makes and removes those changes that can be made, as the engine does; the children of which it was told.

        ``children``: their memory, by the ``uffd`` of LP_FORKED. ``old_length``: as kernels before 6.15 tell.
        """
        memory = memory or Nothing()
        made: list[Change] = []
        born = []
        if at_rest and old_length:
            rows = _rows(changes)
            lib.lp_true_lengths(rows, len(changes))
            changes[:] = map(Change.of, rows)
        if at_rest:
            self._lose_unclear(changes)
        before = self.clone() if at_rest and any(change.kind == "LP_FORKED" for change in changes) else None
        while changes:
            following = lib.lp_space_next_change(self._space, _rows(changes), len(changes), at_rest)
            if following == len(changes):
                break
            change = changes.pop(following)
            if change.kind == "LP_FORKED":
                child = (before or self).clone()
                child.unsure = [*self.unsure]
                if before:
                    child.replay(made, change.to, children[change.uffd], memory)
                born.append((change.uffd, child))
            elif change.kind == "LP_REMOVED":
                self.remove(change.start, change.start + change.length)
            elif change.kind == "LP_REMAPPED":
                self.remap(change.start, change.to, change.length)
                if any(a < change.start + change.length and change.start < b for a, b in self.unsure):
                    self.unsure.append((change.to, change.to + change.length))
            elif lib.lp_space_matters(self._space, change.start, change.start + change.length):
                self.question(change.start, change.start + change.length)
            else:
                self.unmap(change.start, change.start + change.length)
            made.append(change)
        if at_rest:
            assert not changes
            self.rest()
            self.settle(memory)
        return born
