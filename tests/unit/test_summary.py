"""What is said at the end, to a person."""

from __future__ import annotations

import io

import pytest
from rich.console import Console

from lazypages.engine.stats import histogram_bound
from lazypages.observe.metrics import State
from lazypages.observe.summary import MAX_NAMED, lines, table
from lazypages.sources.remote import ServerStats
from lazypages.wording import count, duration, size
from tests.unit.reports import pages, report, summary, times


@pytest.mark.parametrize(
    ("nr_bytes", "text"),
    [
        (0, "0 B"),
        (1023, "1023 B"),
        (1024, "1.0 KiB"),
        (4096 * 66_668, "260.4 MiB"),
        ((1 << 20) - 1, "1.0 MiB"),
        (1 << 40, "1.0 TiB"),
        (5000 << 40, "5000.0 TiB"),
    ],
)
def test_sizes(nr_bytes: int, text: str) -> None:
    assert size(nr_bytes) == text


@pytest.mark.parametrize(
    ("nanoseconds", "text"),
    [
        (0, "0 ns"),
        (999, "999 ns"),
        (1000, "1.00 us"),
        (9_700, "9.70 us"),
        (99_940, "99.9 us"),
        (120_000, "120 us"),
        (999_400, "999 us"),
        (999_600, "1.00 ms"),
        (2_500_000_000, "2.50 s"),
        (5_400_000_000_000, "5,400 s"),
    ],
)
def test_durations(nanoseconds: float, text: str) -> None:
    assert duration(nanoseconds) == text


def test_counts() -> None:
    assert [count(number, "page") for number in (0, 1, 2000)] == ["0 pages", "1 page", "2,000 pages"]


def test_a_good_restore() -> None:
    whole = summary(
        report(
            sources=("local", "parent-1"),
            copied=pages((1000, 24)),
            faults=pages((10, 0)),
            zero_faults=3,
            zero_pages=5,
            dropped=pages((7, 0)),
            times=times({8: 99, 30: 1}),
        ),
        report(state=State.GONE, forked=True),
        zombies=1,
    )
    assert lines(whole) == [
        "2 tasks (1 forked after the restore) in 1.50 s: 1 complete, 1 exited before completion, 1 zombie",
        "from local: 1,000 pages (3.9 MiB), 10 faults",
        "from parent-1: 24 pages (96.0 KiB), 0 faults",
        "from zero: 5 pages (20.0 KiB), 3 faults",
        "7 pages unmapped or discarded by the tasks before they arrived",
        f"fault latency: p50 {duration(histogram_bound(8))}, p99 {duration(histogram_bound(8))}, "
        f"max {duration(histogram_bound(30))}",
    ]


def test_compression_is_told() -> None:
    """Of each page server that has compressed anything."""
    servers = (
        ServerStats("tcp://a:1", pages=2000, compressed_pages=1024, compressed_bytes=1 << 20),
        ServerStats("tcp://b:1", pages=2000),
    )
    said = lines(summary(report())._replace(page_servers=servers))
    assert [line for line in said if "page server" in line] == [
        "page server tcp://a:1: 1,024 pages arrived compressed, 4.0 MiB as 1.0 MiB"
    ]


def test_a_bad_restore_names_the_tasks() -> None:
    bad = summary(
        report("task 1"),
        report("task 2", state=State.LOST, pending=4, poisoned=4),
        report("task 3", state=State.KILLED, pending=1),
        finished=False,
    )
    assert lines(bad)[:3] == [
        "3 tasks in 1.50 s: 1 complete, 1 lost pages, 1 killed; the restore did not finish",
        "task 2: lost pages, 4 pages missing, 4 pages poisoned",
        "task 3: killed, 1 page missing",
    ]


def test_a_thousand_bad_tasks_do_not_fill_the_screen() -> None:
    found = lines(summary(*(report(f"task {pid}", state=State.KILLED, pending=1) for pid in range(1000))))
    assert found[MAX_NAMED + 1] == "and 980 more tasks"
    assert len(found) < MAX_NAMED + 5


def test_nobody_waited() -> None:
    assert lines(summary(report()))[-1] == "no faults"


def test_the_table_says_the_same() -> None:
    whole = summary(
        report(copied=pages((1000,)), faults=pages((10,)), zero_pages=5, zero_faults=3, times=times({8: 99})),
        report("task [red]8", state=State.KILLED, pending=2),
    )
    terminal = Console(file=io.StringIO(), width=100, force_terminal=True, color_system=None)
    terminal.print(table(whole))
    shown = terminal.file.getvalue()  # type: ignore[attr-defined]
    rows = [line.split() for line in shown.splitlines()]
    assert ["local", "1,000", "3.9", "MiB", "10"] in rows
    assert ["zero", "5", "20.0", "KiB", "3"] in rows
    assert ["all", "1,005", "3.9", "MiB", "13"] in rows
    assert "task [red]8: killed, 2 pages missing" in shown
    assert lines(whole)[0] in shown
    assert lines(whole)[-1] in shown
