"""What is shown while it goes on."""

from __future__ import annotations

import io
import logging
from collections.abc import Callable, Iterator

import anyio
import pytest
from rich.console import Console

from lazypages.logs import MESSAGE
from lazypages.observe import progress
from lazypages.observe.metrics import State, Summary
from lazypages.observe.progress import (
    Speedometer,
    TerminalWatch,
    describe,
    shown,
    time_left,
    total,
    watch_in_log,
)
from tests.unit.reports import pages, report, summary

MIB = 1 << 20


def terminal(height: int, width: int = 140) -> tuple[Console, Callable[[], str]]:
    """One of that size, and what is on it."""
    file = io.StringIO()
    return Console(
        file=file, width=width, height=height, force_terminal=True, color_system=None
    ), file.getvalue


def picture(what: Summary, height: int = 40) -> list[str]:
    """The lines of a picture on a terminal of that height."""
    console, text = terminal(height)
    console.print(TerminalWatch(console).render(what, 0.0))
    return [line for line in text().splitlines() if line.strip()]


def test_speed_is_that_of_the_last_moments() -> None:
    meter = Speedometer(window=1.0)
    assert meter.speed("a", 0.0, 0) == 0
    assert meter.speed("a", 0.5, 256) == 2 * MIB
    assert meter.speed("a", 1.0, 512) == 2 * MIB
    for tick in range(20):
        stalled = meter.speed("a", 2.0 + tick / 10, 512)
    assert stalled == 0


def test_the_first_speed_is_that_since_there_was_no_page() -> None:
    meter = Speedometer(window=1.0)
    assert meter.speed("a", 10.0, 512, 2.0) == MIB
    assert meter.speed("a", 10.5, 768, 2.5) == 768 * 4096 / 2.5
    assert meter.speed("a", 11.0, 1024, 3.0) == 2 * MIB  # of the last second


def test_a_task_that_comes_into_view_late_has_no_sudden_speed() -> None:
    meter = Speedometer(window=1.0)
    assert meter.speed("late", 100.0, 10_000_000) == 0
    assert meter.speed("late", 100.5, 10_000_128) == MIB


def test_one_task_has_one_line() -> None:
    header, line = picture(
        summary(report("task 7", state=State.SERVING, total=200, pending=50, copied=pages((150,))))
    )
    assert "to go" in header
    assert "task 7" in line
    assert "75%" in line
    assert "200.0 KiB" in line
    assert "local 150" in line


def test_several_tasks_have_a_line_for_all_of_them() -> None:
    tasks = [report(f"task {pid}", state=State.SERVING, total=4, pending=2) for pid in (1, 2, 3)]
    lines = picture(summary(*tasks))
    assert [line.split("  ")[0] for line in lines[1:]] == ["task 1", "task 2", "task 3", "3 tasks"]
    assert "50%" in lines[-1]


def test_a_thousand_tasks_fit_the_terminal() -> None:
    tasks = [report(f"task {pid}", state=State.SERVING, total=4000, pending=pid) for pid in range(1000)]
    lines = picture(summary(*tasks), height=20)
    assert len(lines) < 20
    assert lines[1].startswith("task 985")
    assert lines[-3].startswith("task 999")
    assert lines[-2].startswith("and 985 more")
    assert lines[-1].startswith("1,000 tasks")


def test_a_tiny_terminal_shows_the_total() -> None:
    tasks = [report(f"task {pid}", state=State.SERVING, total=4, pending=2) for pid in range(5)]
    assert picture(summary(*tasks), height=3)[-1].startswith("5 tasks")
    assert shown(tasks, -2) == []


def test_a_task_that_has_ended_says_how() -> None:
    line = picture(summary(report(state=State.GONE, total=10, pending=0)))[1]
    assert "gone" in line
    assert "100%" in line


def test_no_lazy_page_is_all_done() -> None:
    assert total(summary(report(total=0)), Speedometer(), 0.0).done == 1


def test_a_line_of_the_log() -> None:
    line = total(
        summary(report(total=300, pending=100, copied=pages((200,)), faults=pages((3,)), program="java")),
        Speedometer(),
        0.0,
    )
    assert describe(line) == (
        "task 7 (java): 66%, 100 pages (400.0 KiB) to go, 533.3 KiB/s, about 1 s left, 3 faults, 200 from local"
    )


@pytest.mark.parametrize(
    ("background", "finished", "pending"), [(False, True, 9), (True, False, 9), (True, True, 0)]
)
def test_no_estimate_without_a_steady_transfer(background: bool, finished: bool, pending: int) -> None:
    """Only the background goes on by itself, and it begins when the restore has finished."""
    what = summary(report(total=300, pending=pending, copied=pages((200,))), finished=finished)
    assert total(what, Speedometer(), 0.0, background=background).left is None


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0.01, "1 s"), (12.4, "12 s"), (99.4, "99 s"), (100, "2 min"), (3600, "60 min"), (9000, "2.5 h")],
)
def test_time_left(seconds: float, text: str) -> None:
    assert time_left(seconds) == text


class Stage:
    """A server that shows one summary after another, the last one for ever."""

    def __init__(self, *summaries: Summary) -> None:
        self._summaries: Iterator[Summary] = iter(summaries)
        self._last = summary()

    def summary(self) -> Summary:
        self._last = next(self._summaries, self._last)
        return self._last


def watch(watcher: Callable[[Stage], object], stage: Stage, seconds: float) -> None:
    async def run() -> None:
        with anyio.move_on_after(seconds):
            await watcher(stage)  # type: ignore[misc]

    anyio.run(run)


class Lines(logging.Handler):
    """What is logged, as text."""

    def __init__(self) -> None:
        super().__init__()
        self.lines: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.lines.append(record.getMessage())


def test_the_log_gets_a_line_when_something_has_changed(monkeypatch: pytest.MonkeyPatch) -> None:
    log = Lines()
    monkeypatch.setattr(progress, "LINE", 0.001)
    monkeypatch.setattr(progress.log, "handlers", [log])
    monkeypatch.setattr(progress.log, "level", MESSAGE)
    half = summary(report(total=4, pending=2, state=State.SERVING))
    whole = summary(report(total=4, pending=0))
    watch(watch_in_log, Stage(summary(), half, half, half, whole), 0.5)
    assert [line.split(",")[0] for line in log.lines] == ["task 7: 50%", "task 7: 100%"]


def test_the_terminal_is_clean_afterwards() -> None:
    """What was live is wiped out: the summary takes its place."""
    console, text = terminal(20)
    watch(
        TerminalWatch(console), Stage(summary(report("task 7", state=State.SERVING, total=4, pending=2))), 0.5
    )
    assert "task 7" in text()
    assert text().endswith("\x1b[2K")  # erase the line
    assert "\x1b[?25h" in text()  # the cursor is back


def test_nothing_is_shown_before_a_task_has_come() -> None:
    console, text = terminal(20)
    watch(TerminalWatch(console), Stage(summary()), 0.3)
    assert "%" not in text()
