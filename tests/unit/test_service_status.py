"""The status line for the service manager, and whether all engines make progress."""

from __future__ import annotations

from lazypages.observe.metrics import State
from lazypages.observe.service_status import Progress, restore_status, restores_status
from tests.unit.reports import report, summary


def test_one_restore() -> None:
    nothing = summary(finished=False)
    assert restore_status(nothing, connected=False, ending=False) == "waiting for the restore"
    some = summary(report(total=300, pending=256), report(total=5, pending=0))
    assert restore_status(some, connected=True, ending=False) == "serving 2 tasks: 256 pages (1.0 MiB) to go"
    assert restore_status(some, connected=True, ending=True) == "ending 2 tasks: 256 pages (1.0 MiB) to go"
    early = some._replace(finished=False)
    assert restore_status(early, connected=True, ending=False).startswith("restoring 2 tasks: ")
    done = summary(report(total=300, pending=0, state=State.COMPLETE))
    assert restore_status(done, connected=True, ending=False) == "serving 1 task: no page is missing"


def test_many_restores() -> None:
    assert restores_status([], [], ending=False) == "no restore"
    assert restores_status([], [], ending=True) == "ending; no restore"
    some = [summary(report(total=300, pending=256)), summary(report(total=9, pending=1))]
    assert (
        restores_status(["preparing", "waiting", "serving", "restoring"], some, ending=False)
        == "4 restores (2 not begun), 2 tasks: 257 pages (1.0 MiB) to go"
    )
    assert (
        restores_status(["serving"], some[1:], ending=True)
        == "ending; 1 restore, 1 task: 1 page (4.0 KiB) to go"
    )
    assert restores_status(["serving"], [], ending=False) == "1 restore, 0 tasks: no page is missing"


def test_progress() -> None:
    progress = Progress()
    assert progress.made({})
    assert progress.made({1: 0, 2: 5})
    assert progress.made({1: 1, 2: 6})
    assert not progress.made({1: 2, 2: 6})  # the second is stuck
    assert not progress.made({1: 3, 2: 6})
    assert progress.made({1: 4})  # it has ended
    assert progress.made({1: 5, 3: 0})
