"""The metrics as the library prometheus_client has them. docs/metrics.md describes them."""

from __future__ import annotations

import platform
from collections import Counter as Counts
from collections.abc import Iterator, Mapping

from prometheus_client import (
    CollectorRegistry,
    Counter,
    Histogram,
    Info,
    ProcessCollector,
    disable_created_metrics,
)
from prometheus_client.core import (
    CounterMetricFamily,
    GaugeMetricFamily,
    HistogramMetricFamily,
    Metric,
)
from prometheus_client.registry import Collector

from lazypages import __version__
from lazypages.export.totals import BOUNDS, SOURCES, Totals
from lazypages.observe.metrics import State

#: Of a restore that is served.
STATES = ("preparing", "waiting", "restoring", "serving")

#: How a restore has ended.
RESULTS = ("complete", "failed", "refused")

#: Bounds of buckets in seconds, for parts of restores.
SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 300, 1800)


class Metrics(Collector):
    """All metrics. ``totals``, ``states`` (of restores that are served), ``guard_restarts``: what they show."""

    def __init__(self) -> None:
        disable_created_metrics()  # type: ignore[no-untyped-call] # they double the number of series
        self.totals = Totals()
        self.states: Mapping[str, int] = Counts()
        self.guard_restarts = 0
        self.registry = CollectorRegistry()
        self.registry.register(self)
        ProcessCollector(registry=self.registry)
        Info("lazypages_build", "The version of lazypages and of Python.", registry=self.registry).info(
            {"version": __version__, "python": platform.python_version()}
        )
        self.restores = Counter(
            "lazypages_restores", "Restores that have ended, by result.", ["result"], registry=self.registry
        )
        for result in RESULTS:
            self.restores.labels(result)
        self.first_page = Histogram(
            "lazypages_restore_first_page_seconds",
            "From the restorer's connection to the first page that was copied.",
            buckets=SECONDS,
            registry=self.registry,
        )
        self.last_page = Histogram(
            "lazypages_restore_last_page_seconds",
            "From the restorer's connection until no task of a complete restore missed a page.",
            buckets=SECONDS,
            registry=self.registry,
        )

    def collect(self) -> Iterator[Metric]:
        totals = self.totals
        yield _counter("faults", "Page faults that were received.", totals.faults)
        answered = CounterMetricFamily(
            "lazypages_faults_answered", "Page faults that were answered.", labels=["source", "result"]
        )
        copied = CounterMetricFamily(
            "lazypages_copied_bytes", "Memory that was placed into tasks.", labels=["source"]
        )
        for source in SOURCES:
            result = "zero" if source == "zero" else "data"
            answered.add_metric([source, result], totals.answered[source])
            copied.add_metric([source], totals.copied_bytes(source))
        yield answered
        yield copied
        yield _counter(
            "faults_deferred", "Page faults that waited for a layout change of their task.", totals.deferred
        )
        latency = HistogramMetricFamily(
            "lazypages_fault_seconds", "From the read of a page fault to its answer."
        )
        latency.add_metric([], _buckets(totals), totals.latency_sum)
        yield latency
        yield _gauge("pending_pages", "Pages that tasks miss.", totals.pending)
        yield _gauge("lost_pages", "Pages that tasks miss and no source has.", totals.lost)
        yield _counter("poisoned_pages", "Pages whose touch raises SIGBUS.", totals.poisoned)
        yield _gauge("tasks", "Tasks that are served, forked ones included.", totals.serving)
        ended = CounterMetricFamily(
            "lazypages_tasks_ended", "Tasks that are not served any more.", labels=["state"]
        )
        for state in State:
            if state is not State.SERVING:
                ended.add_metric([state], totals.ended[state])
        yield ended
        restores = GaugeMetricFamily(
            "lazypages_restores_served", "Restores that are served.", labels=["state"]
        )
        for name in STATES:
            restores.add_metric([name], self.states.get(name, 0))
        yield restores
        yield _gauge("page_servers", "Page servers of restores that are served.", totals.page_servers)
        yield _gauge("page_servers_connected", "Those that are connected.", totals.page_servers_connected)
        yield _counter("guard_restarts", "Times that the guard was killed and replaced.", self.guard_restarts)


def _counter(name: str, text: str, value: float) -> CounterMetricFamily:
    return CounterMetricFamily(f"lazypages_{name}", text, value=value)


def _gauge(name: str, text: str, value: float) -> GaugeMetricFamily:
    return GaugeMetricFamily(f"lazypages_{name}", text, value=value)


def _buckets(totals: Totals) -> list[tuple[str, float]]:
    found: list[tuple[str, float]] = []
    below = 0
    names = [*(repr(bound / 1e9) for bound in BOUNDS), "+Inf"]
    for name, count in zip(names, totals.latency, strict=True):
        below += count
        found.append((name, below))
    return found
