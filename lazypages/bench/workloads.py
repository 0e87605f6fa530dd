"""Workloads: what a task does, with how much memory, from which images."""

from __future__ import annotations

import array
import enum
import random
from collections.abc import Iterator
from dataclasses import dataclass

PAGE_SIZE = 4096
MIB = 1 << 20

#: Number of successive pages that come from the same level of a chain.
CHAIN_RUN = 16

#: Most pages of a pagemap entry, 1 GiB. CRIU 4.1.1's daemon fails on one of 4 GB (observed), and its dumps have none.
LONGEST_ENTRY = 1 << 18


class Order(enum.StrEnum):
    """The order in which a task touches its pages."""

    RANDOM = "random"
    SEQUENTIAL = "sequential"
    CHASE = "chase"
    """Random, with the number of the next page in each page."""


class Source(enum.StrEnum):
    LOCAL = "local"
    REMOTE = "remote"


@dataclass(frozen=True, slots=True)
class Layout:
    """The layout of a checkpoint.

    ``pages``: pages with data of each task. ``stride``: 2: every other page of the mapping was never touched.
    ``depth``: number of parents in the chain. ``sparse``: only pages that will be touched have their data, and the rest
    of the pages file is a hole; for checkpoints that are not transferred as a whole. ``round_trip``: round-trip time in
    ms that the link to a remote source adds to that of loopback. ``tls``: that link is encrypted.
    """

    pages: int
    tasks: int = 1
    stride: int = 1
    depth: int = 0
    source: Source = Source.LOCAL
    sparse: bool = False
    round_trip: int = 0
    tls: bool = False

    @property
    def span(self) -> int:
        """Number of pages of the mapping."""
        return self.pages * self.stride

    @property
    def entries(self) -> int:
        """Number of entries of each pagemap."""
        return -(-self.pages // self.entry_pages)

    @property
    def entry_pages(self) -> int:
        """Number of pages of an entry; the last entry may have fewer."""
        return 1 if self.stride > 1 else CHAIN_RUN if self.depth else LONGEST_ENTRY

    @property
    def bytes(self) -> int:
        """Size of the data of all tasks."""
        return self.pages * self.tasks * PAGE_SIZE


@dataclass(frozen=True, slots=True)
class Workload:
    """One row of the bench.

    ``touches``: number of first touches of each task, divided among its ``threads``. ``background``: the restore has
    finished before the first touch, so that daemons transfer in the background; otherwise they only answer faults.
    ``turns``: one thread of all tasks touches at a time. ``cold``: images are not in the page cache.
    ``passes``: after the touches the task reads all its memory once.
    """

    name: str
    layout: Layout
    order: Order
    touches: int
    threads: int = 1
    write: bool = False
    background: bool = False
    turns: bool = False
    cold: bool = False
    passes: bool = False
    real: bool = False

    def order_of_touches(self) -> array.array[int]:
        """The pages of the mapping in the order of their first touches. Deterministic."""
        touches = self.touches
        if self.order is Order.SEQUENTIAL:
            return array.array("I", range(0, touches * self.layout.stride, self.layout.stride))
        rng = random.Random(20_231_123)  # noqa: S311
        pages = rng.sample(range(self.layout.pages), touches)
        pages = [page * self.layout.stride for page in pages]
        if self.layout.stride > 1:
            # one in ten touches is of a page without an entry
            for at in range(0, touches, 10):
                pages[at] += 1
        return array.array("I", pages)


def level_of(page: int, depth: int) -> int:
    """The level of a chain that has the valid data of a page; level 0 is the top."""
    return page // CHAIN_RUN % (depth + 1)


def runs_of_level(layout: Layout, level: int) -> Iterator[tuple[int, int, int, int]]:
    """(offset, first page, pages, owner) of the runs in a level's pages file. `owner`: the level of the valid data.

    The oldest level has all pages, a newer one those that had changed since. So a page is stale in a level if a newer
    level has it, too.
    """
    place = 0
    for first in range(0, layout.pages, CHAIN_RUN):
        owner = level_of(first, layout.depth)
        count = min(CHAIN_RUN, layout.pages - first)
        if owner <= level:
            yield place, first, count, owner
            place += count
