"""The address space against a dictionary of pages: csrc/serve/address_space.h."""

from __future__ import annotations

import errno
import os
import random
import subprocess
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from lazypages.engine._uffd import ffi
from tests.support.examples import examples
from tests.support.space import LOST, PAGE, REMOTE, Answer, Change, Extent, Kind, Space

MAX = 1 << 50  # pages: no limit
TOP = 1 << 47  # the end of a task's addresses


@dataclass
class Model:
    """One task. Everything is counted in units, each of so many pages as the test says.

    ``image``: what is at each unit that is mapped: (its unit at dump time), or None where there is nothing of the dump.
    ``wiped``: units of the dump that a child finds zeroed.
    """

    image: dict[int, int | None]
    pending: set[int]
    claimed: set[int] = field(default_factory=set)
    lost: set[int] = field(default_factory=set)
    wiped: set[int] = field(default_factory=set)

    def drop(self, images: set[int | None]) -> None:
        self.pending -= images  # type: ignore[arg-type]
        self.claimed -= images  # type: ignore[arg-type]
        self.lost -= images  # type: ignore[arg-type]


@dataclass(frozen=True)
class Unit:
    """A unit of the image: what the extent table says."""

    source: int
    offset: int
    dense: int
    extent: int


CELLS = st.tuples(
    st.sampled_from(["hole", "zero", "eager", 0, 0, 0, 1, REMOTE, LOST]),
    st.booleans(),  # a new VMA begins
    st.booleans(),  # a new extent begins, if it need not
    st.booleans(),  # wiped in children, if a VMA begins
)
UNITS = st.integers(0, 40)
LENGTHS = st.integers(1, 16)


class SpaceAgainstPages(RuleBasedStateMachine):
    """Random operations on a family of spaces and their models."""

    @initialize(
        cells=st.lists(CELLS, min_size=1, max_size=30),
        pages=st.sampled_from([1, 1, 3, 64, 67, 1 << 19]),
        high=st.booleans(),
        seed=st.integers(0, 2**32),
    )
    def build(self, cells: list[tuple[Any, bool, bool, bool]], pages: int, high: bool, seed: int) -> None:
        self.pages = pages  # of a unit
        self.base = TOP - 64 * pages * PAGE if high else 16 * PAGE
        randomness = random.Random(seed)
        extents: list[Extent] = []
        vmas: list[list[int]] = []
        wiped: list[list[int]] = []
        self.units: dict[int, Unit] = {}
        wiped_units: set[int] = set()
        mapped: dict[int, int | None] = {}
        before: Any = "hole"
        dense = 0
        for unit, (kind, new_vma, new_extent, wipe) in enumerate(cells):
            start, end = self.addr(unit), self.addr(unit + 1)
            if kind == "hole":
                before = kind
                continue
            if new_vma or before == "hole":
                vmas.append([start, end])
                if wipe:
                    wiped.append(vmas[-1])
            else:
                vmas[-1][1] = end
            mapped[unit] = unit
            if wiped and wiped[-1] is vmas[-1]:
                wiped_units.add(unit)
            if kind != "zero":
                source = 0 if kind == "eager" else kind
                if kind != before or new_extent:
                    offset = randomness.randrange(1 << 40) * PAGE
                    extents.append(Extent(start, pages, offset, source, kind != "eager"))
                else:
                    extents[-1] = extents[-1]._replace(nr_pages=extents[-1].nr_pages + pages)
                if kind != "eager":
                    offset = extents[-1].offset + start - extents[-1].start
                    self.units[unit] = Unit(source, offset, dense, len(extents))
                    dense += pages
            before = kind
        self.order = sorted(self.units)
        lost = {unit for unit, what in self.units.items() if what.source == LOST}
        self.totals = self.by_source(set(self.units))
        self.space = Space(extents, [(a, b) for a, b in vmas], [(a, b) for a, b in wiped])
        self.committed: list[dict[int, int]] = []
        self.spaces = [self.space]
        self.models = [Model(mapped, set(self.units), set(), lost, wiped_units)]
        self.expected_dropped = [[0] * 4]

    def addr(self, unit: int) -> int:
        return self.base + unit * self.pages * PAGE

    def unit(self, addr: int) -> int:
        unit, rest = divmod(addr - self.base, self.pages * PAGE)
        assert not rest
        return unit

    def by_source(self, units: set[int]) -> list[int]:
        counts = [0] * 4
        for unit in units:
            source = self.units[unit].source
            counts[2 if source == REMOTE else 3 if source == LOST else source] += self.pages
        return counts

    def pick(self, which: int) -> tuple[Space, Model]:
        which %= len(self.spaces)
        self.which = which
        return self.spaces[which], self.models[which]

    def dropping(self, model: Model, images: set[int | None]) -> None:
        for source, count in enumerate(self.by_source({i for i in images if i in model.pending})):  # type: ignore[misc]
            self.expected_dropped[self.which][source] += count
        model.drop(images)

    def kind(self, model: Model, image: int | None) -> Kind:
        if image is None or image not in model.pending:
            return Kind.ZERO
        if image in model.lost:
            return Kind.LOST
        if image in model.claimed:
            return Kind.CLAIMED
        return Kind.REMOTE if self.units[image].source == REMOTE else Kind.DATA

    def check_run(self, model: Model, answer: Answer, unit: int, max_units: int) -> None:
        """That an answer is true for each unit of its run."""
        assert answer.addr == self.addr(unit)
        assert 0 < answer.nr_pages <= max_units * self.pages
        first = model.image.get(unit)
        for i in range(-(-answer.nr_pages // self.pages)):
            image = model.image.get(unit + i)
            kind = self.kind(model, image)
            if answer.kind is Kind.ZERO:
                assert kind is Kind.ZERO
                continue
            assert image is not None
            assert first is not None
            what = self.units[image]
            assert (kind, image, what.extent) == (answer.kind, first + i, self.units[first].extent)
            assert answer.image == self.addr(first)
            assert answer.dense + i * self.pages == what.dense
            assert answer.source == what.source
            assert answer.offset + i * self.pages * PAGE == what.offset

    # Questions.

    @rule(which=st.integers(0, 9), unit=UNITS, length=LENGTHS)
    def lookup(self, which: int, unit: int, length: int) -> None:
        space, model = self.pick(which)
        answer = space.lookup(self.addr(unit), length * self.pages)
        assert answer.kind is self.kind(model, model.image.get(unit))
        self.check_run(model, answer, unit, length)
        if answer.kind is Kind.ZERO:
            return
        # It goes on as far as it can: the next page differs in a way that a look at it and the regions shows.
        end = unit + answer.nr_pages // self.pages
        if end < unit + length:
            following = space.lookup(self.addr(end))
            region_ends = {region[1] for region in space.regions()}
            assert (
                following.kind is not answer.kind
                or following.dense != answer.dense + answer.nr_pages
                or self.units[self.unit(following.image)].extent != self.units[self.unit(answer.image)].extent
                or self.addr(end) in region_ends
            )

    @rule(which=st.integers(0, 9), unit=UNITS, length=LENGTHS)
    def lookback(self, which: int, unit: int, length: int) -> None:
        space, _model = self.pick(which)
        answer = space.lookup(self.addr(unit), self.pages)
        if answer.kind is Kind.ZERO:
            return
        pages = space.lookback(answer, length * self.pages)
        assert pages <= length * self.pages
        assert pages % self.pages == 0
        for i in range(1, pages // self.pages + 1):
            before = space.lookup(self.addr(unit - i), self.pages)
            assert (before.kind, before.source) == (answer.kind, answer.source)
            assert before.dense + i * self.pages == answer.dense
            assert before.offset + i * self.pages * PAGE == answer.offset

    @rule(which=st.integers(0, 9), unit=UNITS, length=LENGTHS, remote=st.booleans())
    def next(self, which: int, unit: int, length: int, remote: bool) -> None:
        space, model = self.pick(which)
        kind = Kind.REMOTE if remote else Kind.DATA
        waiting = [at for at, image in model.image.items() if at >= unit and self.kind(model, image) is kind]
        answer = space.next(self.addr(unit), length * self.pages, remote=remote)
        if not waiting:
            assert answer is None
            return
        assert answer is not None
        assert answer.kind is kind
        self.check_run(model, answer, min(waiting), length)

    @rule(which=st.integers(0, 9), indexed=st.booleans())
    def locate(self, which: int, indexed: bool) -> None:
        space, model = self.pick(which)
        if indexed:
            space.index()
        places = {image: unit for unit, image in model.image.items() if image is not None}
        for image in range(-1, 42):
            found = space.locate(self.addr(image) + PAGE * (self.pages - 1))
            expected = places.get(image)
            assert found == (None if expected is None else self.addr(expected) + PAGE * (self.pages - 1))

    # Claims.

    @rule(which=st.integers(0, 9), first=UNITS, length=LENGTHS)
    def claim(self, which: int, first: int, length: int) -> None:
        space, model = self.pick(which)
        if not self.order:
            return
        wanted = self.order[first % len(self.order) :][:length]
        got = space.claim(self.units[wanted[0]].dense, len(wanted) * self.pages)
        for unit in wanted:
            if self.kind(model, unit) not in {Kind.DATA, Kind.REMOTE}:
                break
            model.claimed.add(unit)
            got -= self.pages
        assert got == 0

    def claimed_run(self, model: Model, first: int, length: int) -> list[int]:
        """Claimed units that follow each other in the dense order."""
        claimed = [unit for unit in self.order if unit in model.claimed]
        if not claimed:
            return []
        start = self.order.index(claimed[first % len(claimed)])
        run = []
        for unit in self.order[start : start + length]:
            if unit not in model.claimed:
                break
            run.append(unit)
        return run

    @rule(which=st.integers(0, 9), first=UNITS, length=LENGTHS)
    def commit(self, which: int, first: int, length: int) -> None:
        space, model = self.pick(which)
        if run := self.claimed_run(model, first, length):
            assert space.commit(self.units[run[0]].dense, len(run) * self.pages) == len(run) * self.pages
            model.drop(set(run))
            for source, count in enumerate(self.by_source(set(run))):  # no more to account for
                self.expected_dropped[self.which][source] += count
                space.dropped[source] += count

    @rule(which=st.integers(0, 9), first=UNITS, length=LENGTHS)
    def release(self, which: int, first: int, length: int) -> None:
        space, model = self.pick(which)
        if run := self.claimed_run(model, first, length):
            space.release(self.units[run[0]].dense, len(run) * self.pages)
            model.claimed -= set(run)

    @rule(which=st.integers(0, 9), first=UNITS, length=LENGTHS)
    def lose(self, which: int, first: int, length: int) -> None:
        space, model = self.pick(which)
        if run := self.claimed_run(model, first, length):
            space.lose(self.units[run[0]].dense, len(run) * self.pages)
            model.claimed -= set(run)
            model.lost |= set(run)

    @rule(which=st.integers(0, 9))
    def regain(self, which: int) -> None:
        space, model = self.pick(which)
        regained = {unit for unit in model.lost if self.units[unit].source != LOST}
        assert space.regain() == len(regained) * self.pages
        model.lost -= regained

    @rule(which=st.integers(0, 9), first=UNITS, length=LENGTHS)
    def forget(self, which: int, first: int, length: int) -> None:
        space, model = self.pick(which)
        self.dropping(model, model.lost & set(range(first, first + length)))
        space.forget(self.addr(first), length * self.pages)

    @rule(which=st.integers(0, 9), unit=UNITS, length=LENGTHS)
    def guard(self, which: int, unit: int, length: int) -> None:
        """Guards are seen there, which no event has reported: what is missing is dropped, and zero from then on."""
        space, model = self.pick(which)
        for i in range(unit, unit + length):
            image = model.image.get(i)
            if image is None or self.kind(model, image) not in {Kind.DATA, Kind.REMOTE}:
                continue
            dense = self.units[image].dense
            assert space.claim(dense, self.pages) == self.pages
            assert space.commit(dense, self.pages) == self.pages
            model.drop({image})
            for source, count in enumerate(self.by_source({image})):
                self.expected_dropped[self.which][source] += count
                space.dropped[source] += count
            assert space.lookup(self.addr(i), self.pages).kind is Kind.ZERO

    # Layout.

    @rule(which=st.integers(0, 9), unit=UNITS, length=LENGTHS)
    def remove(self, which: int, unit: int, length: int) -> None:
        space, model = self.pick(which)
        space.remove(self.addr(unit), self.addr(unit + length))
        self.dropping(model, {model.image.get(i) for i in range(unit, unit + length)})

    @rule(which=st.integers(0, 9), unit=UNITS, length=LENGTHS)
    def unmap(self, which: int, unit: int, length: int) -> None:
        space, model = self.pick(which)
        space.unmap(self.addr(unit), self.addr(unit + length))
        self.dropping(model, {model.image.pop(i, None) for i in range(unit, unit + length)})

    @rule(which=st.integers(0, 9), unit=UNITS, to=UNITS, length=LENGTHS, source_goes=st.booleans())
    def remap(self, which: int, unit: int, to: int, length: int, source_goes: bool) -> None:
        """mremap, whose destination may hold other memory, but not its source (mremap(2): EINVAL)."""
        space, model = self.pick(which)
        if abs(unit - to) < length:
            return
        space.remap(self.addr(unit), self.addr(to), length * self.pages * PAGE)
        self.dropping(model, {model.image.get(i) for i in range(to, to + length)})
        for i in range(length):
            model.image[to + i] = model.image.get(unit + i)
            model.image[unit + i] = None
        if source_goes:
            space.unmap(self.addr(unit), self.addr(unit + length))
            for i in range(length):
                del model.image[unit + i]
        else:
            space.rest()

    @rule(
        which=st.integers(0, 9),
        units=st.sets(UNITS, max_size=6),
        length=st.integers(1, 4),
        others=st.sets(UNITS, max_size=6),
    )
    def wipe(self, which: int, units: set[int], length: int, others: set[int]) -> None:
        """What is neither in a wiped range nor in a kept one stays as it was."""
        space, model = self.pick(which)
        ranges, after = [], 0
        for unit in sorted(units):
            if unit >= after:
                after = unit + length
                ranges.append((unit, after))
        wiped = {unit for start, end in ranges for unit in range(start, end)}
        kept = others - wiped
        space.wipe(
            [(self.addr(start), self.addr(end)) for start, end in ranges],
            [(self.addr(unit), self.addr(unit + 1)) for unit in sorted(kept)],
        )
        model.wiped -= {image for unit in kept if (image := model.image.get(unit)) is not None}
        model.wiped |= {image for unit in wiped if (image := model.image.get(unit)) is not None}

    @rule(which=st.integers(0, 9))
    def fork(self, which: int) -> None:
        if len(self.spaces) == 4:
            return
        space, model = self.pick(which)
        child = space.clone()
        self.spaces.append(child)
        self.models.append(
            Model(dict(model.image), set(model.pending), set(), set(model.lost), set(model.wiped))
        )
        # the totals hold for the child as well: what its parent has done, it has done
        child.dropped = [a + b for a, b in zip(child.dropped, space.dropped, strict=True)]
        self.expected_dropped.append(list(self.expected_dropped[self.which]))
        self.which = len(self.spaces) - 1
        self.dropping(self.models[-1], set(model.wiped))

    # What always holds.

    @invariant()
    def counts_agree(self) -> None:
        for space, model, dropped in zip(
            getattr(self, "spaces", []),
            getattr(self, "models", []),
            getattr(self, "expected_dropped", []),
            strict=True,
        ):
            assert space.pending == len(model.pending) * self.pages
            assert space.lost == len(model.lost) * self.pages
            assert space.count() == self.by_source(model.pending)
            assert space.dropped == dropped
            assert [a + b for a, b in zip(space.count(), space.dropped, strict=True)] == self.totals

    @invariant()
    def regions_are_the_mapped_units(self) -> None:
        for space, model in zip(getattr(self, "spaces", []), getattr(self, "models", []), strict=True):
            mapped: dict[int, int | None] = {}
            before = 0
            for start, end, image in space.regions():
                assert before <= start < end
                before = end
                for i, unit in enumerate(range(self.unit(start), self.unit(end))):
                    mapped[unit] = None if image >= 1 << 63 else self.unit(image) + i
            assert mapped == model.image


TestSpaceAgainstPages = SpaceAgainstPages.TestCase
TestSpaceAgainstPages.settings = settings(max_examples=examples(120), stateful_step_count=50)


VMA = (0x10000, 0x20000)


@pytest.mark.parametrize(
    ("extents", "vmas", "wiped"),
    [
        pytest.param([Extent(0x10001, 1)], [VMA], [], id="extent not aligned"),
        pytest.param([Extent(0x10000, 0)], [VMA], [], id="extent empty"),
        pytest.param([Extent(0x12000, 1), Extent(0x11000, 1)], [VMA], [], id="extents unsorted"),
        pytest.param([Extent(0x11000, 2), Extent(0x12000, 1)], [VMA], [], id="extents overlap"),
        pytest.param(
            [Extent(0x11000, 2), Extent(0x12000, 1, lazy=0)], [VMA], [], id="an eager extent overlaps"
        ),
        pytest.param([Extent(0x10000, 1 << 52)], [VMA], [], id="extent longer than all addresses"),
        pytest.param([Extent((1 << 64) - PAGE, 1)], [VMA], [], id="extent that ends past the last address"),
        pytest.param([Extent(0x10000, (1 << 64) - 1)], [VMA], [], id="a number of pages that overflows"),
        pytest.param([Extent(0x0F000, 1)], [VMA], [], id="extent before the VMA"),
        pytest.param([Extent(0x20000, 1)], [VMA], [], id="extent behind the VMA"),
        pytest.param([Extent(0x1F000, 2)], [VMA], [], id="extent sticks out"),
        pytest.param([Extent(0x1F000, 3)], [VMA, (0x21000, 0x30000)], [], id="extent across a gap"),
        pytest.param([Extent(0x10000, 1)], [], [], id="no VMA"),
        pytest.param([], [(0x10000, 0x10000)], [], id="VMA empty"),
        pytest.param([], [(0x20000, 0x10000)], [], id="VMA backwards"),
        pytest.param([], [(0x10001, 0x20000)], [], id="VMA start not aligned"),
        pytest.param([], [(0x10000, 0x20001)], [], id="VMA end not aligned"),
        pytest.param([], [(0x30000, 0x40000), VMA], [], id="VMAs unsorted"),
        pytest.param([], [VMA, (0x1F000, 0x30000)], [], id="VMAs overlap"),
        pytest.param([], [(0x10000, 1 << 63 | PAGE)], [], id="VMA where no address is"),
        pytest.param([], [VMA], [(0x18000, 0x11000)], id="wiped backwards"),
        pytest.param([], [VMA], [(0x18001, 0x19000)], id="wiped not aligned"),
        pytest.param([], [VMA], [(0x11000, 0x13000), (0x12000, 0x14000)], id="wiped overlap"),
    ],
)
def test_refused(extents: list[Extent], vmas: list[tuple[int, int]], wiped: list[tuple[int, int]]) -> None:
    with pytest.raises(OSError) as error:
        Space(extents, vmas, wiped)
    assert error.value.errno == errno.EINVAL


def test_more_pages_than_memory_is_no_crash() -> None:
    with pytest.raises(OSError) as error:
        Space([Extent(0, 1 << 50)], [(0, 1 << 62)])
    assert error.value.errno == errno.ENOMEM


def test_nothing_at_all() -> None:
    space = Space([], [])
    assert (space.pending, space.lost, space.regions(), space.count()) == (0, 0, [], [0] * 4)
    assert space.lookup(0x10000, 7).kind is Kind.ZERO
    assert space.next(0, MAX, remote=True) is None
    assert space.locate(0x10000) is None
    assert space.clone().pending == 0


def test_an_extent_may_span_vmas_that_touch() -> None:
    space = Space([Extent(0x10000, 32)], [VMA, (0x20000, 0x30000)])
    assert space.lookup(0x10000, MAX).nr_pages == 16  # UFFDIO_COPY must stay within one VMA
    assert space.lookup(0x20000, MAX).offset == 0x10000


def test_looking_back_ends_where_memory_was_cut() -> None:
    """What was dumped before is pending still, but it is elsewhere."""
    space = Space([Extent(0x10000, 16)], [VMA])
    space.remap(0x14000, 0x40000, 0x4000)
    assert space.lookback(space.lookup(0x42000), 16) == 2
    assert space.lookback(space.lookup(0x40000), 16) == 0
    assert space.lookback(space.lookup(0x1A000), 16) == 2
    assert space.lookback(space.lookup(0x13000), 16) == 3


def test_lengths_beyond_32_bits() -> None:
    """5 TiB, the end of it moved by 3 TiB, more than 4 GiB of it unmapped."""
    tib = 1 << 40
    space = Space([Extent(0, 1 << 20), Extent(5 * tib - PAGE, 1, offset=1 << 45)], [(0, 5 * tib)])
    space.remap(4 * tib, 7 * tib, tib)
    assert space.locate(5 * tib - PAGE) == 8 * tib - PAGE
    assert space.lookup(8 * tib - PAGE, MAX).offset == 1 << 45
    space.unmap(PAGE, 4 * tib)
    assert space.pending == 2
    space.unmap(0, 8 * tib)
    assert (space.pending, space.regions()) == (0, [])


def test_what_has_no_source_stays_lost() -> None:
    space = Space([Extent(0x10000, 2, source=LOST), Extent(0x12000, 1)], [VMA])
    assert space.lost == 2
    assert space.claim(2, 1) == 1
    space.lose(2, 1)
    assert space.regain() == 1
    assert space.lookup(0x10000, 8).kind is Kind.LOST
    assert space.claim(0, 2) == 0


@pytest.mark.slow
def test_claims_of_many_threads(tmp_path: Path) -> None:
    """No page has two holders at a time, and each arrives once. In C: Python's threads hardly ever meet."""
    root = Path(__file__).parents[2]
    program = tmp_path / "space_threads"
    serve = root / "csrc/serve"
    sources = [root / "tests/support/space_threads.c", serve / "address_space.c", *serve.glob("space_*.c")]
    flags = ["-std=gnu11", "-O2", "-Wall", "-Wextra", "-Werror", "-pthread", f"-I{root / 'csrc'}"]
    if sanitizer := os.environ.get("LAZYPAGES_SANITIZER"):  # .ci/sanitize
        flags += [*sanitizer.split(), "-DPAGES=1000"]
    subprocess.run(["gcc", *flags, *sources, "-o", program], check=True)
    subprocess.run([program], check=True, timeout=60)


# A million extents, each in a mapping of its own. Walking over them at each question would take many minutes: the
# time-out of the test is what would tell.
N = 1_000_000


@pytest.fixture(scope="module")
def million() -> Space:
    extents = ffi.new("struct lp_extent[]", N)
    words = ffi.cast("uint64_t *", extents)
    step = ffi.sizeof("struct lp_extent") // 8
    for i in range(N):
        words[i * step] = 3 * i * PAGE
        words[i * step + 1] = 2
        words[i * step + 2] = 2 * i * PAGE
        words[i * step + 3] = 1 << 32
    return Space(extents, [(3 * i * PAGE, (3 * i + 2) * PAGE) for i in range(N)])


@pytest.mark.slow
@pytest.mark.timeout(60)
def test_questions_about_a_million(million: Space) -> None:
    million.index()
    randomness = random.Random(7)
    for _ in range(100_000):
        i = randomness.randrange(N)
        answer = million.lookup((3 * i + 1) * PAGE, 16)
        assert (answer.kind, answer.dense, answer.nr_pages) == (Kind.DATA, 2 * i + 1, 1)
        assert million.lookback(answer, 16) == 1
        assert million.locate((3 * i + 1) * PAGE) == (3 * i + 1) * PAGE
        following = million.next((3 * i + 2) * PAGE, 16, remote=False)
        assert (following.dense if following else None) == (2 * i + 2 if i + 1 < N else None)


@pytest.mark.timeout(60)
def test_changes_of_a_million(million: Space) -> None:
    """Each moves regions in memory, but some hundred of them should be no matter."""
    child = million.clone()
    for i in range(200):
        at = 3 * (N // 2 + i) * PAGE
        child.remap(at, TOP + at, 2 * PAGE)
        child.unmap(at, at + 2 * PAGE)
        child.remove(at + 3 * 1000 * PAGE, at + 3 * 1001 * PAGE)
    assert child.pending == 2 * N - 400
    assert million.pending == 2 * N


def test_a_child_has_not_what_is_told_later_to_be_unmapped() -> None:
    """Forked between the two events of an mremap."""
    space = Space([Extent(0x10000, 2)], [VMA])
    space.remap(0x10000, 0x40000, 0x10000)
    child = space.clone()
    assert [region[:2] for region in child.regions()] == [(0x40000, 0x50000)]
    space.unmap(*VMA)
    assert space.regions() == child.regions()


# The order of changes.

PLACE, ASIDE, OTHER, FAR = 0x100000, 0x200000, 0x300000, 0x400000
LENGTH = 4 * PAGE


def moved(start: int, to: int, length: int = LENGTH) -> Change:
    return Change("LP_REMAPPED", start, length, to)


def gone(start: int, length: int = LENGTH) -> Change:
    return Change("LP_UNMAPPED", start, length)


def removed(start: int, length: int = LENGTH) -> Change:
    return Change("LP_REMOVED", start, length)


def where(space: Space, image: int) -> int | None:
    """Where the first page is that is still waited for of those that were dumped at `image`."""
    for page in range(4):
        addr = space.locate(image + page * PAGE)
        if addr is not None and space.lookup(addr).kind is not Kind.ZERO:
            return addr
    return None


@pytest.mark.parametrize(
    ("changes", "place", "other"),
    [
        pytest.param([gone(PLACE), moved(OTHER, PLACE), gone(OTHER)], None, PLACE, id="in order"),
        pytest.param([moved(OTHER, PLACE), gone(PLACE), gone(OTHER)], None, PLACE, id="munmap told late"),
        pytest.param(
            [moved(PLACE, ASIDE), moved(OTHER, PLACE), gone(PLACE), gone(OTHER)],
            ASIDE,
            PLACE,
            id="mremap tells the end of its move late",
        ),
        pytest.param(
            [moved(OTHER, PLACE), moved(PLACE, ASIDE), gone(OTHER), gone(PLACE)],
            ASIDE,
            PLACE,
            id="mremap told late",
        ),
        pytest.param(
            [moved(OTHER, PLACE), gone(OTHER), moved(PLACE, FAR), gone(PLACE), gone(PLACE)],
            FAR,
            None,
            id="the second that left is told first: the first told is taken for the first",
        ),
        pytest.param(
            [
                moved(PLACE, ASIDE),
                moved(OTHER, PLACE),
                gone(OTHER),
                moved(PLACE, FAR),
                gone(PLACE),
                gone(PLACE),
            ],
            ASIDE,
            FAR,
            id="what arrived has left again, and only then the first tells the end of its move",
        ),
        pytest.param(
            [moved(PLACE, ASIDE), moved(OTHER, PLACE), gone(OTHER), gone(PLACE, PAGE), gone(PLACE)],
            ASIDE,
            PLACE + PAGE,
            id="a part of what arrived is gone, and only then the first tells the end of its move",
        ),
        pytest.param(
            [moved(OTHER, PLACE), removed(PLACE), gone(OTHER), gone(PLACE)],
            None,
            None,
            id="emptied after it arrived",
        ),
        pytest.param(
            [moved(OTHER, PLACE + 2 * PAGE), gone(PLACE), gone(OTHER)],
            None,
            PLACE + 2 * PAGE,
            id="a part of the place",
        ),
        pytest.param([moved(OTHER, PLACE), gone(OTHER), gone(PLACE, PAGE)], None, PLACE, id="in parts"),
        pytest.param([moved(OTHER, PLACE)], None, PLACE, id="nobody has left: nothing told of it"),
        pytest.param(
            [moved(PLACE, OTHER), moved(OTHER, PLACE)], PLACE, None, id="each waits for another: never told"
        ),
    ],
)
def test_order(changes: list[Change], place: int | None, other: int | None) -> None:
    space = Space([Extent(PLACE, 4), Extent(OTHER, 4)], [(PLACE, PLACE + LENGTH), (OTHER, OTHER + LENGTH)])
    told: list[Change] = []
    for change in changes:
        told.append(change)
        space.make(told, at_rest=False)
    space.make(told, at_rest=True)
    assert (where(space, PLACE), where(space, OTHER)) == (place, other)
