"""Benchmarks of single parts between images and answers: `pytest bench`.

Each uses a realistic amount: a million pagemap entries, a chain of parents, one call per fault.
"""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest
from pytest_benchmark.fixture import BenchmarkFixture

from images_spec import flags, pagemap, placement
from images_spec.pagemap import Pagemap
from lazypages.engine._uffd import ffi, lib
from lazypages.net import wire

MILLION = 1_000_000
BASE = 0x1000_0000_0000
PAGE_SIZE = flags.PAGE_SIZE
LAZY_DATA = flags.PE_PRESENT | flags.PE_LAZY
LOOKUPS = 1000


def every_second_page(bits: int) -> list[tuple[int, int, int]]:
    """A million entries of one page each."""
    return [(BASE + 2 * PAGE_SIZE * i, 1, bits) for i in range(MILLION)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A chain of two levels with a million entries each; level 1 has all data."""
    folder = tmp_path_factory.mktemp("pagemaps")
    in_parent = flags.PE_PARENT | flags.PE_LAZY
    pagemap.write(folder / "top.img", 1, every_second_page(in_parent))
    pagemap.write(folder / "parent.img", 1, every_second_page(LAZY_DATA))
    pagemap.write(folder / "one.img", 1, [(BASE, 2 * MILLION, LAZY_DATA)])
    return folder


def test_pagemap_load_million(benchmark: BenchmarkFixture, folder: Path) -> None:
    loaded = benchmark(Pagemap.load, folder / "parent.img")
    assert len(loaded) == MILLION


def test_placement_chain_of_two_million(benchmark: BenchmarkFixture, folder: Path) -> None:
    levels = [Pagemap.load(folder / name) for name in ("top.img", "parent.img")]
    extents = benchmark(placement.resolve, levels, remote=False)
    assert extents.counts().levels[1].lazy == MILLION


class Space:
    """An address space with the pagemap of that name."""

    def __init__(self, path: Path) -> None:
        self.extents = placement.resolve([Pagemap.load(path)], remote=False)
        self.vmas = ffi.new("struct lp_range[]", [(BASE, BASE + 2 * MILLION * PAGE_SIZE)])
        self.handle: Any = self.build()

    def build(self) -> Any:
        array = ffi.cast("struct lp_extent *", self.extents.address)
        space = lib.lp_space_new(array, len(self.extents), self.vmas, 1, self.vmas, 0)
        assert space != ffi.NULL
        return ffi.gc(space, lib.lp_space_free)


@pytest.fixture(scope="module", params=["one.img", "parent.img"], ids=["1-extent", "1000000-extents"])
def space(request: pytest.FixtureRequest, folder: Path) -> Space:
    return Space(folder / request.param)


def test_space_build(benchmark: BenchmarkFixture, space: Space) -> None:
    built = benchmark(space.build)
    assert lib.lp_space_pending(built) >= MILLION


def test_space_lookup(benchmark: BenchmarkFixture, space: Space) -> None:
    """Look up a thousand random pages, as faults do."""
    rng = random.Random(1)
    addresses = [BASE + 2 * PAGE_SIZE * rng.randrange(MILLION) for _ in range(LOOKUPS)]
    handle, lookup = space.handle, lib.lp_space_lookup

    def look_up() -> int:
        return sum(lookup(handle, address, 1).nr_pages for address in addresses)

    assert benchmark(look_up) == LOOKUPS


def test_space_next_and_claim(benchmark: BenchmarkFixture, space: Space) -> None:
    """A thousand steps of the background: find the next run, claim it, give it back."""
    handle, answer = space.handle, ffi.new("struct lp_answer *")

    def go_on() -> int:
        cursor, claimed = BASE, 0
        for _ in range(LOOKUPS):
            assert lib.lp_space_next(handle, cursor, 64, False, answer)
            found = lib.lp_space_claim(handle, answer.dense, answer.nr_pages)
            lib.lp_space_release(handle, answer.dense, found)
            cursor = answer.addr + answer.nr_pages * PAGE_SIZE
            claimed += found
        return int(claimed)

    assert benchmark(go_on) >= LOOKUPS


@pytest.mark.parametrize("nr_pages", [1, 256])
def test_wire_get_and_answer(benchmark: BenchmarkFixture, nr_pages: int) -> None:
    """Python's part of a remote page: build the request and parse the answer."""
    layout = wire.Layout.CRIU_4_1
    header = wire.Header(wire.Command.ADD_F, nr_pages, BASE, 2, wire.PageFlags.PRESENT)
    answer = layout.pack(header) + bytes(nr_pages * PAGE_SIZE)
    codec = wire.ClientCodec(layout)

    def ask_and_receive() -> int:
        codec.get(2, BASE, nr_pages)
        received = 0
        view = memoryview(answer)
        while view:
            taken = codec.receive(view)
            view = view[taken:]
            while (event := codec.next_event()) is not None:
                if isinstance(event, wire.Pages):
                    received += len(event.data)
        return received

    assert benchmark(ask_and_receive) == nr_pages * PAGE_SIZE
