"""What is measured: each workload is what a task does, with how much memory, out of which images."""

from __future__ import annotations

import array
import enum
import random
from collections.abc import Iterator
from dataclasses import dataclass

PAGE_SIZE = 4096
MIB = 1 << 20

#: A run of pages of a chain that come from the same level.
CHAIN_RUN = 16

#: The longest entry of a pagemap, 1 GiB: CRIU 4.1.1's daemon dies of one of 4 GB (observed), and its dumps have none.
LONGEST_ENTRY = 1 << 18


class Order(enum.StrEnum):
    """In which order a task touches its pages."""

    RANDOM = "random"
    SEQUENTIAL = "sequential"
    CHASE = "chase"
    """Random, where each page tells which is the next."""


class Source(enum.StrEnum):
    LOCAL = "local"
    REMOTE = "remote"


@dataclass(frozen=True, slots=True)
class Layout:
    """What a checkpoint looks like.

    ``pages``: with data, of each task. ``stride``: 2 leaves a page that was never touched between any two.
    ``depth``: parents in the chain. ``sparse``: only the pages that will be touched have their data, the rest
    of the pages file is a hole; for checkpoints that are never transferred as a whole. ``round_trip``: of the link
    to a remote source, in ms, beside what loopback takes. ``tls``: that link is encrypted.
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
        """Pages of the mapping."""
        return self.pages * self.stride

    @property
    def entries(self) -> int:
        """Entries of each pagemap."""
        return -(-self.pages // self.entry_pages)

    @property
    def entry_pages(self) -> int:
        """Pages of an entry; the last one may have fewer."""
        return 1 if self.stride > 1 else CHAIN_RUN if self.depth else LONGEST_ENTRY

    @property
    def bytes(self) -> int:
        """Of all tasks' data."""
        return self.pages * self.tasks * PAGE_SIZE


@dataclass(frozen=True, slots=True)
class Workload:
    """One row of the bench.

    ``touches``: first touches of each task, spread over its ``threads``. ``background``: the restore is finished
    before the first touch, so that daemons transfer in the background; otherwise they only answer faults.
    ``turns``: one thread of all tasks touches at a time. ``cold``: images are not in the page cache.
    ``passes``: then the whole memory is read once.
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
        """The pages of the mapping in the order of their first touch; the same at every call."""
        touches = self.touches
        if self.order is Order.SEQUENTIAL:
            return array.array("I", range(0, touches * self.layout.stride, self.layout.stride))
        # repeatable, and nothing secret
        rng = random.Random(20_231_123)  # noqa: S311
        pages = rng.sample(range(self.layout.pages), touches)
        pages = [page * self.layout.stride for page in pages]
        if self.layout.stride > 1:
            # one in ten touches a page that has no entry
            for at in range(0, touches, 10):
                pages[at] += 1
        return array.array("I", pages)


def level_of(page: int, depth: int) -> int:
    """The level of a chain that has the valid data of a page; level 0 is the top."""
    return page // CHAIN_RUN % (depth + 1)


def runs_of_level(layout: Layout, level: int) -> Iterator[tuple[int, int, int, int]]:
    """(place, first page, pages, owner) for the runs in a level's pages file: `owner` is the level of the valid data.

    Older levels hold everything; a younger one what had changed since: so their pages are stale where a
    younger level has them too.
    """
    place = 0
    for first in range(0, layout.pages, CHAIN_RUN):
        owner = level_of(first, layout.depth)
        count = min(CHAIN_RUN, layout.pages - first)
        if owner <= level:
            yield place, first, count, owner
            place += count
