"""Checks of our daemon's counts: pages, faults, calls. No times, because a busy machine changes them."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from lazypages.bench.peers import BOTH, OURS, TRACED
from lazypages.bench.runs import Run
from lazypages.bench.suite import Row
from lazypages.bench.workloads import Order, Source, Workload, level_of

#: Calls for each task that a daemon may make beside those for faults.
_SPARE = 16
#: Number of times that a daemon may sleep beside waiting for faults: at its start, in its loop, in its threads.
_SPARE_WAITS = 1000
#: Least pages of a copy of the background where they are adjacent (CHUNK_SINGLE of csrc/serve/transfer.c).
CHUNK = 2


OF_OURS = (OURS, BOTH, TRACED)


def failures(row: Row) -> Iterator[str]:
    """The failures of a row, one line each. A peer that is absent for another reason than Peer.cannot is a failure."""
    for name, why in row.absent.items():
        if "\n" in why or "WRONG" in why:
            yield f"{name}: {why}"
    for name in OF_OURS:
        for run in row.rounds.get(name, []):
            yield from (f"{name}: {line}" for line in _check(row.workload, run))


def _check(workload: Workload, run: Run) -> Iterator[str]:
    stats, faults_inside = run.stats, int(run.metrics["faults"])
    assert stats is not None
    layout = workload.layout
    tasks = stats["tasks"]
    faults = stats["faults"]
    copied = sum(task["pages"]["copied"] for task in tasks)
    calls = {name: sum(task["calls"][name] for task in tasks) for name in ("copy", "read", "wake")}
    order = workload.order_of_touches()
    spare = _SPARE * layout.tasks

    def bound(what: str, value: int, most: int) -> Iterator[str]:
        if value > most:
            yield f"{what}: {value}, but at most {most} are needed"

    if not stats["ok"]:
        yield "the summary is not ok"
    yield from bound("uffd reads", calls["read"], 2 * faults + spare)
    yield from bound("wake-ups", calls["wake"], faults // 10 + spare)
    if layout.source is Source.LOCAL:
        # Faults are answered without Python and its event loop, so the daemon sleeps only between faults.
        yield from bound("waits of the daemon", int(run.metrics["waits"]), 2 * faults + _SPARE_WAITS + spare)
    if workload.background:
        if not workload.real:
            pages = layout.pages * layout.tasks
            if copied != pages:
                yield f"{copied} pages copied, but the checkpoint has {pages}"
            together = min(layout.entry_pages, CHUNK)
            if layout.source is Source.LOCAL:
                # each fault may split a range that the background would have copied at once
                yield from bound("copies", calls["copy"], 2 * faults + pages // together + spare)
        return
    zero = sum(1 for page in order if page % layout.stride) * layout.tasks
    data = len(order) * layout.tasks - zero
    if workload.order is Order.SEQUENTIAL:
        yield from bound("faults of a scan", faults, len(order) // 16 + spare)
        yield from bound("copies of a scan", calls["copy"], faults + spare)
    elif workload.threads == 1:
        # A few pages are read ahead: neighbours that happen to be touched one after the other look like a scan.
        if not data + zero - spare <= faults <= faults_inside:
            yield f"{faults} faults for {data + zero} first touches"
        yield from bound("copies", calls["copy"], data + spare)
        yield from bound("pages copied", copied, data + 64 * spare)
    yield from _check_levels(workload, stats)


def _check_levels(workload: Workload, stats: dict[str, Any]) -> Iterator[str]:
    layout = workload.layout
    if layout.source is Source.REMOTE or not layout.depth:
        return
    wanted: dict[str, int] = {}
    for page in workload.order_of_touches():
        level = level_of(page, layout.depth)
        name = f"parent-{level}" if level else "local"
        wanted[name] = wanted.get(name, 0) + 1
    found = stats["copied_by_source"]
    for name, count in wanted.items():
        if not count <= found.get(name, 0) <= count + _SPARE:
            yield f"{found.get(name, 0)} pages from {name}, but {count} were touched"
