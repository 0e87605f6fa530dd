"""Progress of the restored tasks: bars on a terminal, or a line in the log from time to time.

Both run beside a server (the `watch` of :meth:`lazypages.loop.server.Server.run`) and read its summary.
"""

from __future__ import annotations

import logging
import time
from collections import deque
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, NamedTuple, Protocol

import anyio

from lazypages.engine.memory import PAGE_SIZE
from lazypages.logs import MESSAGE
from lazypages.observe.metrics import State, Summary, TaskReport
from lazypages.wording import count, size

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

log = logging.getLogger("lazypages")

#: Seconds between two updates, on a terminal and in a log.
FRAME = 0.2
LINE = 5.0

#: Longest time in seconds between two lines in a log while nothing changes.
QUIET_LINE = 60.0

#: Seconds over which speed is measured.
WINDOW = 1.5

#: Lines of the terminal that are not for tasks: head, total, "and more", and blank lines.
OTHER_LINES = 5

_BAR_WIDTH = 24


class Watched(Protocol):
    """What the watchers need of a server."""

    def summary(self) -> Summary: ...


class Line(NamedTuple):
    """A task, or all tasks. ``total``, ``remaining``: pages; ``speed``: bytes/s; ``sources``: pages by name.

    ``left``: seconds until nothing is missing, at that speed; None if that is unknown.
    """

    name: str
    state: State
    total: int
    remaining: int
    faults: int
    speed: float
    sources: dict[str, int]
    left: float | None = None

    @property
    def done(self) -> float:
        """Share of the lazy pages that are not missing any more, 0 to 1."""
        return 1.0 if not self.total else max(0.0, 1 - self.remaining / self.total)


class Speedometer:
    """Bytes per second over the last `window` seconds, by name."""

    def __init__(self, window: float = WINDOW) -> None:
        self._window = window
        self._seen: dict[str, deque[tuple[float, int]]] = {}

    def speed(self, name: str, now: float, pages: int, age: float = 0.0) -> float:
        """Record that `pages` had arrived at the time `now` (seconds); return the speed in bytes per second.

        ``age``: seconds since there was no page, for the speed when `name` is seen for the first time.
        """
        seen = self._seen.setdefault(name, deque([(now - age, 0)] if age else []))
        seen.append((now, pages))
        while len(seen) > 2 and now - seen[1][0] >= self._window:
            seen.popleft()
        before, base = seen[0]
        return max(0, pages - base) * PAGE_SIZE / (now - before) if now > before else 0.0


def total(summary: Summary, speedometer: Speedometer, now: float, *, background: bool = True) -> Line:
    """The sum over all tasks. ``background``: pages that no task touches are brought, too."""
    tasks = summary.tasks
    remaining = sum(task.pending for task in tasks)
    speed = speedometer.speed("", now, sum(task.copied.total for task in tasks), summary.seconds)
    steady = background and summary.finished and remaining and speed
    return Line(
        count(len(tasks), "task") if len(tasks) != 1 else tasks[0].title,
        State.SERVING,
        sum(task.total for task in tasks),
        remaining,
        sum(task.stats.faults for task in tasks),
        speed,
        summary.copied_by_source(),
        remaining * PAGE_SIZE / speed if steady else None,
    )


def shown(tasks: Sequence[TaskReport], room: int) -> Sequence[TaskReport]:
    """The tasks that get one of `room` lines: those with the most missing pages, in the order of `tasks`."""
    if len(tasks) <= room:
        return tasks
    missing = sorted(range(len(tasks)), key=lambda index: (-tasks[index].pending, index))
    return [tasks[index] for index in sorted(missing[: max(0, room)])]


def task_line(task: TaskReport, speedometer: Speedometer, now: float) -> Line:
    return Line(
        task.title,
        task.state,
        task.total,
        task.pending,
        task.stats.faults,
        speedometer.speed(task.name, now, task.copied.total, task.seconds),
        task.by_source(task.copied),
    )


async def watch_in_log(server: Watched, *, background: bool = True) -> None:
    """Log a line every LINE seconds once a task has arrived, less often while nothing changes. Never returns."""
    speedometer = Speedometer(LINE)
    before = None
    pause = LINE
    while True:
        await anyio.sleep(pause)
        summary = server.summary()
        if not summary.tasks:
            continue
        line = total(summary, speedometer, time.monotonic(), background=background)
        state = (line.name, line.remaining, line.faults)
        if state == before:
            # With a thousand tasks a look takes a while: the longer nothing happens, the rarer it is.
            pause = min(2 * pause, QUIET_LINE)
        else:
            before, pause = state, LINE
            log.log(MESSAGE, "%s", describe(line))


def describe(line: Line) -> str:
    """As a line of text."""
    sources = "".join(f", {pages:,} from {name}" for name, pages in line.sources.items())
    left = "" if line.left is None else f", about {time_left(line.left)} left"
    return (
        f"{line.name}: {percent(line)}, {count(line.remaining, 'page')} ({size(line.remaining * PAGE_SIZE)}) "
        f"to go, {size(line.speed)}/s{left}, {count(line.faults, 'fault')}{sources}"
    )


def percent(line: Line) -> str:
    """Rounded down: 100% means that no page is missing."""
    return f"{int(line.done * 100)}%"


def time_left(seconds: float) -> str:
    """12 s, 3 min, 2.5 h: an estimate."""
    if seconds < 99.5:
        return f"{max(1, round(seconds))} s"
    return f"{round(seconds / 60)} min" if seconds < 5970 else f"{seconds / 3600:.1f} h"


class TerminalWatch:
    """Bars on a terminal: one for each task, as far as there is room, and one for all. They are removed at the end."""

    def __init__(self, terminal: Console, *, background: bool = True) -> None:
        self._terminal = terminal
        self._background = background
        self._speedometer = Speedometer()

    async def __call__(self, server: Watched) -> None:
        """Never returns."""
        from rich.live import Live  # noqa: PLC0415 - slow to import, and only needed on terminals

        with Live(console=self._terminal, auto_refresh=False, transient=True) as live:
            while True:
                started = time.monotonic()
                summary = server.summary()
                if summary.tasks:
                    live.update(self.render(summary, started), refresh=True)
                # An update takes long with a thousand tasks: limit it to a tenth of the time.
                await anyio.sleep(max(FRAME, 9 * (time.monotonic() - started)))

    def render(self, summary: Summary, now: float) -> Table:
        """The current state as a table."""
        from rich.progress_bar import ProgressBar  # noqa: PLC0415
        from rich.table import Table  # noqa: PLC0415

        everything = total(summary, self._speedometer, now, background=self._background)
        tasks = shown(summary.tasks, self._terminal.size.height - OTHER_LINES)
        picture = [task_line(task, self._speedometer, now) for task in tasks]
        grid = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="dim")
        for name in ("", "", "%", "to go", "speed", "left", "faults", "pages by source"):
            grid.add_column(
                name, justify="left" if name in {"", "pages by source"} else "right", no_wrap=True
            )
        if len(picture) == 1:
            picture[0] = picture[0]._replace(left=everything.left)
        hidden = len(summary.tasks) - len(tasks)
        for line in [*picture, *([everything] if len(summary.tasks) > 1 else [])]:
            if line is everything and hidden:
                grid.add_row(f"and {hidden:,} more", style="dim")
            grid.add_row(
                line.name,
                ProgressBar(total=1.0, completed=line.done, width=_BAR_WIDTH),
                percent(line),
                size(line.remaining * PAGE_SIZE) if line.state is State.SERVING else str(line.state),
                f"{size(line.speed)}/s",
                "" if line.left is None else time_left(line.left),
                f"{line.faults:,}",
                _sources(line.sources.items()),
                style="bold" if line is everything else "",
            )
        return grid


def _sources(sources: Iterable[tuple[str, int]]) -> str:
    return ", ".join(f"{name} {pages:,}" for name, pages in sources)
