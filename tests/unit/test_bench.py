"""The bench's arithmetic: statistics, layouts, checks and targets."""

from __future__ import annotations

import array
import io
import sys
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from images_spec.checkpoint import open_checkpoint
from lazypages.bench import checkpoints, checks, plot, report, suite, targets
from lazypages.bench.errors import BenchError
from lazypages.bench.metrics import Spread, quantile, ratios
from lazypages.bench.peers import BOTH, LIMIT, ONLY_REMOTE, OURS, TRACED, BareLoop, CriuDaemon, LazyPages
from lazypages.bench.programs import Programs
from lazypages.bench.results import Touches
from lazypages.bench.runs import Run
from lazypages.bench.suite import Row
from lazypages.bench.workloads import CHAIN_RUN, Layout, Order, Source, Workload, level_of, runs_of_level

CRIU = "criu 4.1.1"


@pytest.fixture(scope="module")
def programs(tmp_path_factory: pytest.TempPathFactory) -> Programs:
    return Programs.compile(tmp_path_factory.mktemp("programs"))


def test_quantile_is_the_least_value_that_covers_the_share() -> None:
    values = list(range(1, 101))
    assert [quantile(values, q) for q in (0.5, 0.9, 0.99, 0.999, 1.0)] == [50, 90, 99, 100, 100]
    assert quantile([7], 0.5) == 7


def test_ratios_are_taken_round_by_round() -> None:
    assert ratios([1.0, 4.0, 9.0], [2.0, 4.0, 3.0]) == Spread(1.0, 0.5, 3.0)
    assert ratios([1.0], []) is None
    assert ratios([1.0], [0.0]) is None


def test_orders_are_repeatable_and_touch_no_page_twice() -> None:
    for order in Order:
        workload = Workload("", Layout(500), order, 500)
        pages = workload.order_of_touches()
        assert pages == workload.order_of_touches()
        assert sorted(pages) == list(range(500))
    assert list(Workload("", Layout(50), Order.SEQUENTIAL, 50).order_of_touches()) == list(range(50))


def test_a_fragmented_layout_has_pages_without_entry_among_its_touches() -> None:
    pages = Workload("", Layout(1000, stride=2), Order.RANDOM, 100).order_of_touches()
    assert sum(page % 2 for page in pages) == 10
    assert len(set(pages)) == 100


def test_every_page_of_a_chain_has_one_level_with_its_valid_data() -> None:
    layout = Layout(10 * CHAIN_RUN + 3, depth=2)
    valid: dict[int, int] = {}
    for level in range(3):
        place = 0
        for at, first, count, owner in runs_of_level(layout, level):
            assert at == place
            place += count
            assert owner <= level
            if owner == level:
                valid |= dict.fromkeys(range(first, first + count), level)
    assert valid == {page: level_of(page, 2) for page in range(layout.pages)}


@pytest.mark.parametrize(
    "layout",
    [
        Layout(100),
        Layout(100, stride=2),
        Layout(100, depth=5),
        Layout(100, tasks=3),
        Layout(100, source=Source.REMOTE),
        Layout(100_000, stride=2, sparse=True),
    ],
    ids=["plain", "fragmented", "chain", "tasks", "remote", "sparse"],
)
def test_checkpoints_say_where_each_page_is(layout: Layout, programs: Programs, tmp_path: Path) -> None:
    workload = Workload("", layout, Order.RANDOM, 20)
    written = checkpoints.write(workload, tmp_path / "checkpoint", programs)
    checkpoint = open_checkpoint(written.images)
    remote = layout.source is Source.REMOTE
    assert len(checkpoint.tasks) == layout.tasks
    for task in checkpoint.tasks:
        counts = checkpoint.load_task(task.pid, remote).extents.counts()
        assert counts.lost.total == 0
        assert counts.remote.lazy == (layout.pages if remote else 0)
        if not remote:
            owners = [level_of(page, layout.depth) for page in range(layout.pages)]
            assert [level.lazy for level in counts.levels] == [
                owners.count(n) for n in range(layout.depth + 1)
            ]


def test_pages_files_differ_where_they_should(programs: Programs, tmp_path: Path) -> None:
    workload = Workload("", Layout(40, depth=1, tasks=2), Order.CHASE, 40)
    written = checkpoints.write(workload, tmp_path / "checkpoint", programs)
    pages: set[bytes] = set()
    for path in written.files():
        data = path.read_bytes()
        assert len(data) % 4096 == 0
        if path.parent.name != "flat":  # which has the valid ones again
            pages |= {data[at + 8 : at + 4096] for at in range(0, len(data), 4096)}
    # of each task: 40 in the parent, and the 24 that have changed since in the top
    assert len(pages) == 2 * (40 + 24)


def test_a_chase_visits_all_pages(programs: Programs, tmp_path: Path) -> None:
    workload = Workload("", Layout(64), Order.CHASE, 64)
    written = checkpoints.write(workload, tmp_path / "checkpoint", programs)
    data = written.files()[0].read_bytes()
    order = workload.order_of_touches()
    page = order[0]
    for following in [*order[1:], order[0]]:
        page = int.from_bytes(data[page * 4096 : page * 4096 + 8], "little")
        assert page == following


def test_peers_say_what_they_cannot(programs: Programs) -> None:
    criu = CriuDaemon(CRIU, Path("/criu"))
    loop, bulk = BareLoop(LIMIT, programs, shared_cpu=True), BareLoop("bulk", programs, threads=1)
    chain = Workload("", Layout(10, depth=1), Order.RANDOM, 1)
    background = Workload("", Layout(10), Order.RANDOM, 1, background=True)
    real = Workload("", Layout(10), Order.RANDOM, 1, background=True, real=True)
    assert criu.cannot(chain)
    assert not criu.cannot(background)
    assert loop.cannot(background)
    assert bulk.cannot(chain)
    assert bulk.cannot(real)
    assert not bulk.cannot(background)
    assert not any(LazyPages(OURS).cannot(workload) for workload in (chain, background, real))
    both = LazyPages(BOTH, both=True)
    assert both.cannot(background) == ONLY_REMOTE
    assert both.cannot(Workload("", Layout(10, source=Source.REMOTE), Order.RANDOM, 1)) is None


def test_in_turns_everybody_is_first_and_comes_after_different_ones() -> None:
    peers = [LazyPages(name) for name in "abc"]
    orders = ["".join(peer.name for peer in suite.turns(peers, turn)) for turn in range(6)]
    assert orders == ["abc", "cba", "bca", "acb", "cab", "bac"]


def test_a_page_server_is_of_the_same_kind_as_its_peer() -> None:
    images, work = Path("/images"), Path("/work")
    for peer, program in (
        (LazyPages(OURS), "/criu"),
        (LazyPages(BOTH, both=True), sys.executable),
        (CriuDaemon(CRIU, Path("/other")), "/other"),
    ):
        command = peer.server(Path("/criu"), images, work)(77)
        assert command[0] == program
        assert "page-server" in command
        assert command[-1] == "77"
    with pytest.raises(BenchError, match="this needs a page server of CRIU's"):
        LazyPages(OURS).server(None, images, work)


def run_with(stats: dict[str, Any] | None = None, **metrics: float) -> Run:
    touches = Touches(array.array("Q", [0, 1000]), array.array("I", [1, 0]), array.array("I", [5000, 70]))
    return Run(metrics, touches, stats)


def our_stats(**changes: Any) -> dict[str, Any]:
    task = {"pages": {"copied": 100}, "calls": {"copy": 100, "read": 100, "wake": 0}}
    return {"ok": True, "faults": 100, "tasks": [task], "copied_by_source": {"local": 100}} | changes


def test_checks_accept_one_copy_and_one_read_a_fault() -> None:
    row = Row(
        Workload("", Layout(1000), Order.RANDOM, 100), {OURS: [run_with(our_stats(), faults=100, waits=100)]}
    )
    assert list(checks.failures(row)) == []


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"ok": False}, "not ok"),
        ({"faults": 50}, "50 faults"),
        ({"tasks": [{"pages": {"copied": 100}, "calls": {"copy": 200, "read": 100, "wake": 0}}]}, "copies"),
        (
            {"tasks": [{"pages": {"copied": 100}, "calls": {"copy": 100, "read": 300, "wake": 0}}]},
            "uffd reads",
        ),
        (
            {"tasks": [{"pages": {"copied": 100}, "calls": {"copy": 100, "read": 100, "wake": 90}}]},
            "wake-ups",
        ),
        (
            {"tasks": [{"pages": {"copied": 9999}, "calls": {"copy": 100, "read": 100, "wake": 0}}]},
            "pages copied",
        ),
    ],
)
def test_checks_name_what_is_too_much(changes: dict[str, Any], said: str) -> None:
    run = run_with(our_stats(**changes), faults=100, waits=100)
    lines = list(checks.failures(Row(Workload("", Layout(1000), Order.RANDOM, 100), {OURS: [run]})))
    assert len(lines) == 1
    assert said in lines[0]


def test_checks_count_how_often_the_daemon_waits() -> None:
    run = run_with(our_stats(), faults=100, waits=2000)
    lines = list(checks.failures(Row(Workload("", Layout(1000), Order.RANDOM, 100), {TRACED: [run]})))
    assert lines == [f"{TRACED}: waits of the daemon: 2000, but at most 1216 are needed"]


def test_checks_want_the_background_to_copy_many_pages_at_once() -> None:
    workload = Workload("", Layout(16000), Order.RANDOM, 1, background=True)

    def failures(copies: int) -> list[str]:
        task = {"pages": {"copied": 16000}, "calls": {"copy": copies, "read": 1, "wake": 0}}
        run = run_with(our_stats(faults=1, tasks=[task]), faults=1, waits=1)
        return list(checks.failures(Row(workload, {OURS: [run]})))

    most = 2 + 16000 // checks.CHUNK + 16
    assert failures(most) == []
    assert failures(most + 1) == [f"{OURS}: copies: {most + 1}, but at most {most} are needed"]


def test_checks_count_the_pages_of_each_level() -> None:
    workload = Workload("", Layout(1000, depth=1), Order.RANDOM, 100)
    counts = {"local": 0, "parent-1": 0}
    for page in workload.order_of_touches():
        counts["parent-1" if level_of(page, 1) else "local"] += 1
    right = Row(workload, {OURS: [run_with(our_stats(copied_by_source=counts), faults=100, waits=100)]})
    assert list(checks.failures(right)) == []
    stale = Row(
        workload, {OURS: [run_with(our_stats(copied_by_source={"parent-1": 100}), faults=100, waits=100)]}
    )
    assert any("pages from local" in line for line in checks.failures(stale))


def test_checks_want_every_page_of_a_drained_task_once() -> None:
    workload = Workload("", Layout(1000), Order.RANDOM, 1, background=True)
    row = Row(workload, {OURS: [run_with(our_stats(), faults=1, waits=1)]})
    assert list(checks.failures(row)) == [f"{OURS}: 100 pages copied, but the checkpoint has 1000"]


def test_checks_fail_for_wrong_memory_and_not_for_what_a_peer_cannot() -> None:
    workload = Workload("", Layout(1000), Order.RANDOM, 1)
    assert list(checks.failures(Row(workload, {}, {CRIU: "no lazy pages from parents"}))) == []
    assert list(checks.failures(Row(workload, {}, {CRIU: "WRONG MEMORY: 1 times"}))) == [
        f"{CRIU}: WRONG MEMORY: 1 times"
    ]


def full_rows(ours: float) -> dict[str, Row]:
    """Rows for all targets, where everybody has 1 in everything and we have `ours`."""
    keys = ("p50", "p99", "present", "both", "cpu", "ready", "anon")
    values = dict.fromkeys(keys, 1.0)
    rows = {}
    for workload in suite.TARGETS:
        others = {name: [run_with(**values)] for name in (CRIU, LIMIT, "bulk loop x 1", "bulk loop x 2")}
        mine = {name: [run_with(**dict.fromkeys(keys, ours))] for name in (OURS, BOTH)}
        rows[workload.name] = Row(workload, mine | others)
    return rows


def test_targets_are_met_or_missed_and_not_measured_is_neither() -> None:
    console = Console(record=True, width=200, file=io.StringIO())
    assert targets.print_targets(console, full_rows(0.2), CRIU)
    text = console.export_text()
    assert text.count(" ok") == len(targets.TARGETS)
    assert not targets.print_targets(console, full_rows(2.0), CRIU)
    assert "missed" in console.export_text()
    assert not targets.print_targets(console, {}, CRIU)
    assert console.export_text().count("not measured") == len(targets.TARGETS)


def test_json_has_rounds_medians_and_ratios(programs: Programs) -> None:
    row = Row(
        suite.RANDOM,
        {OURS: [run_with(p50=2.0), run_with(p50=4.0)], LIMIT: [run_with(p50=1.0), run_with(p50=4.0)]},
    )
    row.absent[CRIU] = "is not there"
    peers = [LazyPages(OURS), CriuDaemon(CRIU, Path("/criu")), BareLoop(LIMIT, programs)]
    document = report.as_json({"kernel": "x"}, [row], 2, peers)
    ours, criu, limit = document["rows"][0]["peers"]
    assert ours["medians"] == {"p50": 3.0}
    assert criu == {"name": CRIU, "absent": "is not there"}
    assert limit["ours_by_it"]["p50"] == {"median": 1.5, "low": 1.0, "high": 2.0}


@pytest.mark.loop(".png")
@pytest.mark.parametrize("suffix", [".png", ".html"])
def test_plots_are_drawn(suffix: str, tmp_path: Path) -> None:
    row = Row(suite.RANDOM, {OURS: [run_with()], LIMIT: [run_with()]})
    other = Row(suite.IDLE, {OURS: [run_with()]})
    path = tmp_path / f"picture{suffix}"
    plot.plot(path, [row, other, Row(suite.REMOTE)], "title")
    assert path.read_bytes().startswith(b"\x89PNG" if suffix == ".png" else b"<!doctype html>")
