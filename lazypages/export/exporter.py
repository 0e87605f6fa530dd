"""Collects the numbers of all restores, and gives them to scrapers, to a file, and to OpenTelemetry.

It runs in the event loop: only there the engine's tasks may be looked at, because they are closed there. The engine
answers faults in a thread of its own, which never waits for the loop, and its counters are read without a lock.
"""

from __future__ import annotations

import logging
import time
from collections import Counter
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

import anyio
import anyio.lowlevel
from anyio import to_thread

from lazypages.engine.guard import Guard
from lazypages.export.options import ExportOptions
from lazypages.export.totals import Totals
from lazypages.observe.metrics import Milestones, Summary

if TYPE_CHECKING:
    from opentelemetry.trace import Span

    from lazypages.export.http import Answer
    from lazypages.export.spans import Spans

log = logging.getLogger("lazypages")

#: Seconds between two versions of the text file.
TEXTFILE_INTERVAL = 10.0

#: Numbers are kept for so many times as long as it took to collect them: with thousands of tasks that takes a while.
COLLECTING_SHARE = 20

#: A restore is looked at for milestones after this share of its time, with pauses within these limits, in seconds.
MILESTONE_SHARE = 0.05
SHORTEST_PAUSE, LONGEST_PAUSE = 0.001, 1.0


class Served(Protocol):
    """What is asked of a server."""

    async def wait_connected(self) -> None: ...

    def milestones(self) -> Milestones: ...


class Restore:
    """One restore, from the time when somebody asks for it to its end."""

    def __init__(
        self,
        exporter: Exporter,
        images: str,
        *,
        state: Callable[[], str],
        summary: Callable[[], Summary | None],
        number: int | None,
    ) -> None:
        self._exporter = exporter
        self._summary = summary
        self._attributes: dict[str, str | int] = {"lazypages.images": images}
        if number is not None:
            self._attributes["lazypages.restore"] = number
        self.state = state
        self.seen: Summary | None = None
        self._begun = 0.0  # time of the connection
        self._first_page = False
        self._finished = False
        self._poisoned = False
        self._span: Span | None = None

    def look(self) -> Summary | None:
        """The current numbers, or the last ones that there were."""
        self.seen = self._summary() or self.seen
        return self.seen

    async def watch(self, server: Served) -> None:
        """Record when what happens. Returns when nothing is left to see, and raises nothing."""
        try:
            await self._watch(server)
        except Exception:
            log.exception("the milestones of a restore are not exported")

    async def _watch(self, server: Served) -> None:
        await server.wait_connected()
        self._begun = time.monotonic()
        spans = self._exporter.spans
        self._span = spans.start(self._attributes) if spans else None
        while not self._first_page or self._span:
            looked = time.monotonic()
            self._reached(server.milestones())
            pause = max(
                SHORTEST_PAUSE,
                MILESTONE_SHARE * (looked - self._begun),
                COLLECTING_SHARE * (time.monotonic() - looked),
            )
            await anyio.sleep(min(pause, LONGEST_PAUSE))

    def _reached(self, now: Milestones) -> None:
        if now.copied and not self._first_page:
            self._first_page = True
            self._exporter.first_page(time.monotonic() - self._begun)
            self._event("first page")
        if now.finished and not self._finished:
            self._finished = True
            self._event("tasks run")
        if now.poisoned and not self._poisoned:
            self._poisoned = True
            self._event("poisoned", {"lazypages.pages": now.poisoned})

    def _event(self, name: str, attributes: Mapping[str, int] | None = None) -> None:
        if self._span:
            self._span.add_event(name, attributes)

    def end(self, summary: Summary | None, result: str) -> None:
        """Nothing of it is served any more. ``summary``: None after an error of the daemon. ``result``: of RESULTS.

        Raises nothing.
        """
        try:
            self._end(summary or self.seen, result)
        except Exception:
            log.exception("the end of a restore is not exported")

    def _end(self, summary: Summary | None, result: str) -> None:
        if summary and self._begun:
            self._reached(summary.milestones())  # it may have ended before the next look
        self._exporter.ended(self, summary, result)
        if self._span:
            from lazypages.export.spans import end_span  # noqa: PLC0415 - an extra

            if result == "complete":
                self._event("complete")
            end_span(self._span, _attributes(summary), ok=result == "complete")


def _attributes(summary: Summary | None) -> dict[str, int]:
    totals = Totals()
    if summary:
        totals.add(summary, ended=True)
    return {
        "lazypages.tasks": len(summary.tasks) if summary else 0,
        "lazypages.faults": totals.faults,
        "lazypages.copied_bytes": sum(totals.copied_bytes(source) for source in totals.copied),
        "lazypages.poisoned_pages": totals.poisoned,
    }


def open_exporter(options: ExportOptions | None, guard: Guard | None) -> Exporter | None:
    """None: nothing is to be exported, or it can't be. By now a restore may wait for us, so that is no error."""
    try:
        return Exporter(options, guard) if options else None
    except Exception:
        log.exception("no metrics and spans are exported")
        return None


class Exporter:
    """Exports the numbers of restores. Close it when all have ended."""

    def __init__(self, options: ExportOptions, guard: Guard | None) -> None:
        self._options = options
        self._guard = guard
        self._ended = Totals()
        self._running: dict[Restore, None] = {}
        self._fresh_until = 0.0
        self._complained = False
        self._collecting = anyio.Lock()
        self._metrics = None
        if options.listener or options.textfile:
            from lazypages.export.families import Metrics  # noqa: PLC0415 - an extra

            self._metrics = Metrics()
        self.spans: Spans | None = None
        if options.spans:
            from lazypages.export.spans import Spans  # noqa: PLC0415 - an extra

            self.spans = Spans()

    # The restores.

    def begin(
        self,
        images: str,
        *,
        state: Callable[[], str],
        summary: Callable[[], Summary | None],
        number: int | None = None,
    ) -> Restore:
        """A restore is asked for. ``state``: one of STATES, while it is served."""
        restore = Restore(self, images, state=state, summary=summary, number=number)
        self._running[restore] = None
        return restore

    def first_page(self, seconds: float) -> None:
        if self._metrics:
            self._metrics.first_page.observe(seconds)

    def ended(self, restore: Restore, summary: Summary | None, result: str) -> None:
        """Called by Restore.end."""
        del self._running[restore]
        if summary:
            self._ended.add(summary, ended=True)
        if self._metrics:
            self._metrics.restores.labels(result).inc()
            if summary and result == "complete":
                self._metrics.last_page.observe(summary.seconds)

    # What is exported.

    async def run(self) -> None:
        """Answer scrapers, and write the text file from time to time, until it is cancelled. Raises nothing."""
        try:
            await self._run()
        except Exception:
            log.exception("metrics are not exported any more")

    async def _run(self) -> None:
        async with anyio.create_task_group() as group:
            if self._options.listener:
                from lazypages.export.http import answer_http  # noqa: PLC0415 - an extra

                group.start_soon(answer_http, self._options.listener, self._answer)
            if self._options.textfile:
                group.start_soon(self._keep_writing, self._options.textfile)

    def close(self) -> None:
        """Write the last numbers, and send the last spans. Raises nothing."""
        try:
            self._close()
        except Exception:
            log.exception("the last metrics and spans are not exported")

    def _close(self) -> None:
        if self._options.textfile:
            self._show(self._ended, Counter())
            self._write(self._options.textfile)
        if self.spans:
            self.spans.close()

    async def _answer(self, accepted: str) -> Answer:
        from prometheus_client.exposition import choose_encoder  # noqa: PLC0415 - an extra

        from lazypages.export.http import Answer  # noqa: PLC0415

        assert self._metrics
        await self._collect()
        encode, content_type = choose_encoder(accepted)
        return Answer(200, content_type, encode(self._metrics.registry))

    async def _keep_writing(self, path: Path) -> None:
        while True:
            await self._collect()
            # in a thread, because a file system may hang
            await to_thread.run_sync(self._write, path, limiter=anyio.CapacityLimiter(1))
            await anyio.sleep(TEXTFILE_INTERVAL)

    def _write(self, path: Path) -> None:
        """A failure is reported once, and is not one of the restores."""
        from prometheus_client import write_to_textfile  # noqa: PLC0415 - an extra

        assert self._metrics
        try:
            write_to_textfile(str(path), self._metrics.registry)
        except OSError as error:
            if not self._complained:
                log.error("--metrics-textfile %s: %s; this concerns the metrics only", path, error.strerror)
            self._complained = True
        else:
            self._complained = False

    async def _collect(self) -> None:
        async with self._collecting:
            if time.monotonic() >= self._fresh_until:
                await self._collect_now()

    async def _collect_now(self) -> None:
        began = time.monotonic()
        totals = self._ended.copy()
        states: Counter[str] = Counter()
        for restore in tuple(self._running):
            states[restore.state()] += 1
            if summary := restore.look():
                totals.add(summary)
            await anyio.lowlevel.checkpoint()
        self._show(totals, states)
        now = time.monotonic()
        self._fresh_until = now + COLLECTING_SHARE * (now - began)

    def _show(self, totals: Totals, states: Counter[str]) -> None:
        assert self._metrics
        self._metrics.totals = totals
        self._metrics.states = states
        self._metrics.guard_restarts = self._guard.restarts if self._guard else 0
