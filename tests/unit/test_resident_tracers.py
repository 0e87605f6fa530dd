"""The watch for tracers that all restores share, without the kernel's."""

from __future__ import annotations

import pytest

from lazypages.resident.tracers import SharedTracers


class Watched:
    """As Tracers: which pids are watched."""

    told = True

    def __init__(self) -> None:
        self.pids: set[int] = set()

    def watch(self, pid: int, *, watched: bool) -> None:
        if watched:
            self.pids.add(pid)
        else:
            self.pids.discard(pid)


@pytest.mark.parametrize("closes", [False, True])
def test_a_pid_that_is_used_again(*, closes: bool) -> None:
    """A task has ended, and one of its children is served still; a task of another restore has its pid by now. When the
    first restore does not watch it any more, the second one still does."""
    shared, watched = SharedTracers(), Watched()
    shared._tracers = watched  # type: ignore[assignment]
    first, second = shared.open(), shared.open()
    with second:
        with first:
            first.watch(7, watched=True)
            second.watch(7, watched=True)
            if not closes:
                first.watch(7, watched=False)
                assert watched.pids == {7}
        assert watched.pids == {7}
        second.watch(7, watched=False)
        assert not watched.pids
