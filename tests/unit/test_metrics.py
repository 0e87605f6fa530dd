"""Numbers of tasks and of whole restores."""

from __future__ import annotations

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lazypages.engine.stats import histogram_bound
from lazypages.observe.metrics import ServiceTimes, State
from tests.unit.reports import pages, report, summary, times

BUCKETS = 64


def test_quantiles_of_nothing() -> None:
    assert ServiceTimes([], 0).quantile(0.5) is None
    assert ServiceTimes([0] * BUCKETS, 0).as_dict() == {"p50_us": None, "p99_us": None, "max_us": None}


@given(st.lists(st.integers(0, BUCKETS - 1), min_size=1, max_size=200), st.floats(0.001, 1))
def test_a_quantile_bounds_that_share(buckets: list[int], q: float) -> None:
    """At least a share q of the answers took no longer; in the bucket below it would be fewer."""
    counts = [buckets.count(bucket) for bucket in range(BUCKETS)]
    found = ServiceTimes(counts, histogram_bound(max(buckets))).quantile(q)
    assert found is not None
    within = [bucket for bucket in buckets if histogram_bound(bucket) <= found]
    assert len(within) >= q * len(buckets)
    below = [bucket for bucket in buckets if histogram_bound(bucket) < found]
    assert len(below) < q * len(buckets) or not below


def test_no_quantile_exceeds_the_maximum() -> None:
    """A bucket's bound may, but what was measured counts."""
    longest = histogram_bound(20) - 3
    times = ServiceTimes([0] * 20 + [5] + [0] * 10, longest)
    assert times.quantile(0.5) == times.quantile(1) == longest
    assert times.as_dict()["p99_us"] == longest / 1000


def test_times_of_tasks_add_up() -> None:
    merged = ServiceTimes.merged([times({3: 1, 10: 9}), times({3: 90})])
    assert sum(merged.counts) == 100
    assert merged.quantile(0.91) == histogram_bound(3)
    assert merged.quantile(0.92) == histogram_bound(10)
    assert merged.max == histogram_bound(10)


def test_pages_go_by_the_names_of_their_sources() -> None:
    task = report(sources=("local", "parent-1"), copied=pages((5, 0), remote=2))
    assert task.by_source(task.copied) == {"local": 5, "remote": 2}


def test_a_restore_is_good_when_it_finished_and_every_task_is() -> None:
    good = report(state=State.COMPLETE), report(state=State.GONE)
    assert summary(*good).ok
    assert summary().ok  # nothing but zombies
    assert not summary(*good, finished=False).ok
    for state in (State.SERVING, State.LOST, State.KILLED):
        assert not summary(*good, report(state=state)).ok


def test_a_restore_adds_up_its_tasks() -> None:
    both = summary(
        report(sources=("local",), copied=pages((5,)), faults=pages((2,)), zero_faults=1),
        report(sources=("local", "parent-1"), copied=pages((1, 7)), faults=pages((0, 3)), zero_faults=2),
    )
    assert both.copied_by_source() == {"local": 6, "parent-1": 7}
    assert both.faults_by_source() == {"local": 2, "parent-1": 3, "zero": 3}


def test_what_is_written_is_json_with_all_counts() -> None:
    task = report(sources=("local",), total=9, copied=pages((5,)), dropped=pages((4,)), times=times({4: 2}))
    found = json.loads(json.dumps(summary(task, zombies=2).as_dict()))
    assert found["ok"]
    assert (found["pages_copied"], found["bytes_copied"], found["zombies"]) == (5, 5 * 4096, 2)
    (only,) = found["tasks"]
    assert only["pages"]["copied_by_source"] == {"local": 5}
    assert only["pages"]["dropped_by_source"] == {"local": 4}
    assert only["pages"]["total"] == 9
    assert only["service_time"]["p50_us"] == pytest.approx(histogram_bound(4) / 1000)
