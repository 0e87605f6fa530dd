"""The summary of a restore as text: how each task ended, pages and faults by source, fault latency."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, NamedTuple

from lazypages.engine.memory import PAGE_SIZE
from lazypages.observe.metrics import State, Summary, TaskReport, signal_name
from lazypages.wording import count, duration, size

if TYPE_CHECKING:
    from rich.console import RenderableType

#: Number of incomplete tasks that get a line each; of the others only the number is printed.
MAX_NAMED = 20

_WORDS = {
    State.SERVING: "not complete",
    State.COMPLETE: "complete",
    State.GONE: "exited before completion",
    State.DIED: "killed by a signal",
    State.ENDED: "ended before completion, cause unknown",
    State.LOST: "lost pages",
    State.KILLED: "killed",
}


class Row(NamedTuple):
    """Pages and faults from one source. The source ``zero`` is memory that no task had touched before the dump."""

    source: str
    pages: int
    faults: int


def rows(summary: Summary) -> list[Row]:
    """A row for each source that was used, in the order in which sources are tried."""
    pages, faults = summary.copied_by_source(), summary.faults_by_source()
    pages["zero"] = sum(task.stats.zero_pages for task in summary.tasks)
    names = [*dict.fromkeys([*pages, *faults])]
    names.sort(key=lambda name: name == "zero")
    made = [Row(name, pages.get(name, 0), faults.get(name, 0)) for name in names]
    return [row for row in made if row.pages or row.faults]


def verdict(summary: Summary) -> str:
    """One line: how the tasks ended, and the duration."""
    states = [task.state for task in summary.tasks]
    ends = [f"{states.count(state):,} {word}" for state, word in _WORDS.items() if state in states]
    if summary.zombies:
        ends.append(count(summary.zombies, "zombie"))
    head = count(len(states), "task")
    forks = sum(task.forked for task in summary.tasks)
    if forks:
        head += f" ({forks:,} forked after the restore)"
    tail = "" if summary.finished else "; the restore did not finish"
    return f"{head} in {duration(summary.seconds * 1e9)}: {', '.join(ends)}{tail}"


def speed(summary: Summary) -> str:
    """One line: the fault latency."""
    times = summary.times
    p50, p99 = times.quantile(0.5), times.quantile(0.99)
    if p50 is None or p99 is None:
        return "no faults"
    return f"fault latency: p50 {duration(p50)}, p99 {duration(p99)}, max {duration(times.max)}"


def leftovers(summary: Summary) -> list[str]:
    """A line for each task that did not end well (State.good)."""
    bad = [task for task in summary.tasks if not task.state.good]
    lines = [_leftover(task) for task in bad[:MAX_NAMED]]
    if len(bad) > MAX_NAMED:
        lines.append(f"and {count(len(bad) - MAX_NAMED, 'more task')}")
    return lines


def _leftover(task: TaskReport) -> str:
    missing = f"{count(task.pending, 'page')} missing" if task.pending else "no page missing"
    poisoned = f", {count(task.stats.poisoned, 'page')} poisoned" if task.stats.poisoned else ""
    how = f"killed by {signal_name(task.signal)}" if task.signal else _WORDS[task.state]
    return f"{task.title}: {how}, {missing}{poisoned}"


def dropped(summary: Summary) -> str | None:
    """One line about missing pages that the tasks have unmapped or discarded; None if there are none."""
    pages = sum(task.dropped.total for task in summary.tasks)
    return f"{count(pages, 'page')} unmapped or discarded by the tasks before they arrived" if pages else None


def compressed(summary: Summary) -> list[str]:
    """A line for each page server that sent compressed pages."""
    return [
        f"page server {server.address}: {count(server.compressed_pages, 'page')} arrived compressed, "
        f"{size(server.compressed_pages * PAGE_SIZE)} as {size(server.compressed_bytes)}"
        for server in summary.page_servers
        if server.compressed_pages
    ]


def lines(summary: Summary) -> list[str]:
    """The whole summary as plain text."""
    text = [verdict(summary), *leftovers(summary)]
    text += [
        f"from {row.source}: {count(row.pages, 'page')} ({size(row.pages * PAGE_SIZE)}), "
        f"{count(row.faults, 'fault')}"
        for row in rows(summary)
    ]
    text += [line for line in (*compressed(summary), dropped(summary), speed(summary)) if line]
    return text


def table(summary: Summary) -> RenderableType:
    """The whole summary for a terminal."""
    from rich import box  # noqa: PLC0415 - slow to import, and only needed on terminals
    from rich.console import Group  # noqa: PLC0415
    from rich.table import Table  # noqa: PLC0415
    from rich.text import Text  # noqa: PLC0415

    head = Text(verdict(summary), style="bold green" if summary.ok else "bold red")
    bad = [Text(line, style="red") for line in leftovers(summary)]
    grid = Table(box=box.SIMPLE_HEAD, show_footer=True, pad_edge=False)
    given = rows(summary)
    columns: list[tuple[str, Sequence[str], str]] = [
        ("source", [row.source for row in given], "all"),
        ("pages", *_column(row.pages for row in given)),
        ("size", [size(row.pages * PAGE_SIZE) for row in given], size(_total(given) * PAGE_SIZE)),
        ("faults", *_column(row.faults for row in given)),
    ]
    for index, (name, _, footer) in enumerate(columns):
        grid.add_column(name, footer=footer, justify="right" if index else "left")
    for cells in zip(*(column[1] for column in columns), strict=True):
        grid.add_row(*cells)
    tail = [Text(line) for line in (*compressed(summary), dropped(summary), speed(summary)) if line]
    return Group(head, *bad, grid, *tail)


def _column(numbers: Iterable[int]) -> tuple[list[str], str]:
    values = list(numbers)
    return [f"{value:,}" for value in values], f"{sum(values):,}"


def _total(given: Sequence[Row]) -> int:
    return sum(row.pages for row in given)
