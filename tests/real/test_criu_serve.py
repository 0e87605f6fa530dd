"""`lazypages serve` beside real `criu restore --lazy-pages`: every byte right, whatever the tasks do."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.support.criu import Criu, all_criu
from tests.support.restore import Checkpoints, Daemon, LazyRestore, all_cases, lazy_restore, our_daemon

#: What differs between kernels is what they report of a changing layout.
KERNEL_SCENARIOS = {
    "moves",
    "moves_over",
    "resizes",
    "leaves_behind",
    "unmaps",
    "discards",
    "races",
    "family",
    "refused",
    "shrinks",
}

every = pytest.mark.parametrize(("criu", "scenario"), all_cases())
both = pytest.mark.parametrize("criu", all_criu())
older = pytest.mark.parametrize("criu", all_criu()[:1])


def check_counts(restored: LazyRestore) -> dict[str, Any]:
    """Every lazy page of the images has exactly one fate, and the daemon had no trouble; the statistics."""
    stats = restored.stats()
    assert stats["ok"]
    assert stats["restore_finished"]
    for task in stats["tasks"]:
        pages = task["pages"]
        assert task["state"] in ("complete", "gone"), task
        assert pages["copied"] + pages["dropped"] + pages["pending"] == pages["total"], task
        assert pages["lost"] == pages["poisoned"] == 0, task
    return stats


def serve(daemon: Daemon, checkpoints: Checkpoints, criu: Criu, scenario: str, work: Path) -> None:
    with lazy_restore(checkpoints.get(criu, scenario), daemon, work) as restored:
        restored.check_all()
        check_counts(restored)


@pytest.mark.loop("single-4.1", "threads-4.2")
@every
def test_with_background(criu: Criu, scenario: str, checkpoints: Checkpoints, tmp_path: Path) -> None:
    """Tasks and background transfer race from the first moment."""
    checkpoint = checkpoints.get(criu, scenario)
    checkpoint.go()
    with lazy_restore(checkpoint, our_daemon(), tmp_path) as restored:
        restored.check_end()
        check_counts(restored)


@pytest.mark.loop("family-4.2")
@pytest.mark.parametrize(("criu", "scenario"), all_cases(every_kernel=KERNEL_SCENARIOS))
def test_without_background(criu: Criu, scenario: str, checkpoints: Checkpoints, tmp_path: Path) -> None:
    """Every page is missing until it is touched."""
    serve(our_daemon("--no-background"), checkpoints, criu, scenario, tmp_path)


@pytest.mark.loop("trio-single-criu-4.1")
@older
@pytest.mark.parametrize("scenario", ["single", "tree", "moves", "races", "family", "forks_under_load"])
@pytest.mark.parametrize("loop", ["asyncio", "trio", "uvloop"])
def test_loops(loop: str, criu: Criu, scenario: str, checkpoints: Checkpoints, tmp_path: Path) -> None:
    serve(our_daemon("--no-background", "--loop", loop), checkpoints, criu, scenario, tmp_path)


@pytest.mark.slow
@older
@pytest.mark.parametrize("order", ["forward", "reverse"])
@pytest.mark.parametrize("scenario", ["single", "threads", "fragments", "moves", "family"])
def test_orders(order: str, criu: Criu, scenario: str, checkpoints: Checkpoints, tmp_path: Path) -> None:
    """Runs of faults that a readahead follows, upwards and downwards."""
    checkpoint = checkpoints.get(criu, scenario)
    with lazy_restore(checkpoint, our_daemon("--no-background"), tmp_path) as restored:
        restored.check_all(order)
        check_counts(restored)


@pytest.mark.slow
@both
@pytest.mark.parametrize("scenario", ["single", "tree", "moves", "family", "interpreter"])
def test_after_background(criu: Criu, scenario: str, checkpoints: Checkpoints, tmp_path: Path) -> None:
    """The daemon gives everything and ends; then the tasks find it all without anybody's help."""
    with lazy_restore(checkpoints.get(criu, scenario), our_daemon(), tmp_path) as restored:
        assert restored.server.wait() == 0
        for task in check_counts(restored)["tasks"]:
            assert task["state"] == "complete"
            assert task["pages"]["pending"] == 0
        restored.go()
        assert restored.wait_tasks() == 0
        restored.check_verdict()
