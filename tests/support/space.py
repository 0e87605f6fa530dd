"""A Python face of the address space (csrc/space.h), for tests. Addresses, lengths and offsets in bytes."""

from __future__ import annotations

import errno
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from enum import IntEnum
from functools import partial
from typing import Any, NamedTuple

from lazypages._uffd import ffi, lib

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
    """``struct lp_change``; ``kind``: LP_REMOVED, LP_UNMAPPED or LP_REMAPPED."""

    kind: str
    start: int
    length: int
    to: int = 0

    def row(self) -> tuple[int, int, int, int, int]:
        return getattr(lib, self.kind), 0, self.start, self.length, self.to


@dataclass(frozen=True)
class Answer:
    """``struct lp_answer``; ``raw`` is that, for :meth:`Space.lookback`."""

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
        return cls(Kind(raw.kind), raw.source, raw.addr, raw.image, raw.offset, raw.nr_pages, raw.dense, raw)


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
        return [(r.start, r.end, r.image) for r in regions[0 : lib.lp_space_nr_regions(self._space)]]

    def count(self) -> list[int]:
        counts, by_source = self._counts()
        lib.lp_space_count(self._space, counts)
        return list(by_source)

    def lookup(self, addr: int, max_pages: int = 1) -> Answer:
        return Answer.of(lib.lp_space_lookup(self._space, addr, max_pages))

    def lookback(self, at: Answer, max_pages: int) -> int:
        return int(lib.lp_space_lookback(self._space, ffi.addressof(at.raw), max_pages))

    def next(self, cursor: int, max_pages: int, *, remote: bool) -> Answer | None:
        raw = ffi.new("struct lp_answer *")
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
        lib.lp_space_lose(self._space, dense, nr)

    def regain(self) -> int:
        return int(lib.lp_space_regain(self._space))

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
        lib.lp_space_rest(self._space)

    def make(self, changes: list[Change], *, at_rest: bool) -> None:
        """Makes and removes those changes (no forks) that can be made, as the engine does."""
        while changes:
            rows = ffi.new("struct lp_change[]", [change.row() for change in changes])
            following = lib.lp_space_next_change(self._space, rows, len(changes), at_rest)
            if following == len(changes):
                break
            change = changes.pop(following)
            if change.kind == "LP_REMOVED":
                self.remove(change.start, change.start + change.length)
            elif change.kind == "LP_UNMAPPED":
                self.unmap(change.start, change.start + change.length)
            else:
                self.remap(change.start, change.to, change.length)
        if at_rest:
            assert not changes
            self.rest()
