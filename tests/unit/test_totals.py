"""Sums of the numbers of tasks, as metrics have them."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from lazypages.engine.stats import HISTOGRAM_BUCKETS, histogram_bound
from lazypages.export.totals import BOUNDS, Totals
from lazypages.observe.metrics import ServiceTimes, State
from tests.unit.reports import pages, report, summary


def test_parents_are_one_source() -> None:
    sources = ("local", "parent-1", "parent-2", "local:/other")
    task = report(
        sources=sources,
        copied=pages((1, 2, 4, 8), remote=16),
        faults=pages((1, 1, 1, 1), remote=3),
        zero_faults=5,
        zero_pages=32,
    )
    totals = Totals()
    totals.add(summary(task))
    assert totals.copied == {"local": 9, "parent": 6, "remote": 16, "zero": 32}
    assert totals.answered == {"local": 2, "parent": 2, "remote": 3, "zero": 5}


def test_pages_are_missed_only_by_tasks_that_are_served() -> None:
    running, dead = report(state=State.SERVING, pending=3), report(state=State.DIED, pending=100)
    totals = Totals()
    totals.add(summary(running, dead))
    assert (totals.serving, totals.pending, totals.ended) == (1, 3, {State.DIED: 1})
    after = Totals()
    after.add(summary(running, dead), ended=True)
    assert (after.serving, after.pending, after.ended) == (0, 0, {State.DIED: 1})


@given(st.dictionaries(st.integers(0, HISTOGRAM_BUCKETS - 1), st.integers(1, 1000), max_size=20))
def test_latencies_are_in_the_bucket_of_their_bound(buckets: dict[int, int]) -> None:
    counts = [buckets.get(bucket, 0) for bucket in range(HISTOGRAM_BUCKETS)]
    totals = Totals()
    totals.add(summary(report(times=ServiceTimes(counts, 0))))
    assert sum(totals.latency) == sum(counts)
    below = 0
    for bound, count in zip(BOUNDS, totals.latency, strict=False):
        below += count
        assert below == sum(n for bucket, n in buckets.items() if histogram_bound(bucket) <= bound)
    longest = sum(histogram_bound(bucket) * n for bucket, n in buckets.items()) / 1e9
    assert longest / 1.14 - 1e-6 <= totals.latency_sum <= longest + 1e-9


def test_a_copy_is_another_one() -> None:
    totals = Totals()
    totals.add(summary(report(copied=pages((1,)))))
    copy = totals.copy()
    copy.add(summary(report(copied=pages((1,)))))
    assert (totals.copied["local"], copy.copied["local"]) == (1, 2)
