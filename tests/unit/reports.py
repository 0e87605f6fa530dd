"""Reports of tasks that never were, for tests of what is made of them."""

from __future__ import annotations

from lazypages.engine.stats import SourcePages, Stats, histogram_bound
from lazypages.observe.metrics import ServiceTimes, State, Summary, TaskReport


def pages(levels: tuple[int, ...], *, remote: int = 0, lost: int = 0) -> SourcePages:
    return SourcePages(levels, remote, lost)


def times(buckets: dict[int, int]) -> ServiceTimes:
    """Answers by bucket; the longest took all of its bucket's time."""
    counts = [buckets.get(bucket, 0) for bucket in range(64)]
    return ServiceTimes(counts, histogram_bound(max(buckets)))


def report(
    name: str = "task 7",
    *,
    state: State = State.COMPLETE,
    forked: bool = False,
    total: int = 0,
    pending: int = 0,
    sources: tuple[str, ...] = ("local",),
    copied: SourcePages | None = None,
    dropped: SourcePages | None = None,
    faults: SourcePages | None = None,
    zero_faults: int = 0,
    zero_pages: int = 0,
    poisoned: int = 0,
    times: ServiceTimes | None = None,
    program: str = "",
) -> TaskReport:
    """A task with these numbers, the others 0."""
    none = pages((0,) * len(sources))
    answered = faults or none
    return TaskReport(
        name,
        7,
        forked,
        state,
        total,
        pending,
        0,
        1.5,
        sources,
        copied or none,
        dropped or none,
        answered,
        Stats(
            faults=answered.total + zero_faults,
            faults_zero=zero_faults,
            zero_pages=zero_pages,
            poisoned=poisoned,
        ),
        times or ServiceTimes([], 0),
        program=program,
    )


def summary(*tasks: TaskReport, finished: bool = True, zombies: int = 0, seconds: float = 1.5) -> Summary:
    return Summary(tasks, zombies, finished, seconds)
