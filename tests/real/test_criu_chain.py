"""Parent chains under real `criu restore --lazy-pages`: PARENT|LAZY pages come from the level that has it."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.support.chain import split
from tests.support.criu import Criu, all_criu
from tests.support.restore import Checkpoints, lazy_restore, our_daemon

both = pytest.mark.parametrize("criu", all_criu())


@pytest.mark.loop("5-criu-4.2")
@both
@pytest.mark.parametrize("depth", [1, 2, 3, 4, 5])
def test_every_page_from_its_level(criu: Criu, depth: int, checkpoints: Checkpoints, tmp_path: Path) -> None:
    """Each level gives exactly the pages that are its own, stale ones stay where they are."""
    checkpoint = checkpoints.get(criu, "tree")
    chain = split(checkpoint.images, tmp_path / "chain", depth)
    with lazy_restore(checkpoint, our_daemon(), tmp_path, chain.top) as restored:
        assert restored.server.wait() == 0
        stats = restored.stats()
        assert stats["copied_by_source"] == chain.source_pages()
        by_pid = {task["pid"]: task["pages"]["copied_by_source"] for task in stats["tasks"]}
        assert by_pid == {pid: chain.source_pages(pid) for pid in chain.lazy_pages if chain.source_pages(pid)}
        restored.go()
        assert restored.wait_tasks() == 0
        restored.check_verdict()


@pytest.mark.loop("moves-20-criu-4.2")
@both
@pytest.mark.parametrize(
    ("scenario", "longest_run"),
    [("single", 200), ("fragments", 1), ("moves", 20), ("unmaps", 20), ("family", 200), ("tree", 1)],
)
def test_faults_through_the_chain(
    criu: Criu, scenario: str, longest_run: int, checkpoints: Checkpoints, tmp_path: Path
) -> None:
    """The same by faults alone, from page by page another owner to long runs."""
    checkpoint = checkpoints.get(criu, scenario)
    chain = split(checkpoint.images, tmp_path / "chain", 3, longest_run=longest_run)
    with lazy_restore(checkpoint, our_daemon("--no-background"), tmp_path, chain.top) as restored:
        restored.check_all()
        for task in restored.stats()["tasks"]:
            owned = chain.source_pages(task["pid"])
            for source, pages in task["pages"]["copied_by_source"].items():
                assert pages <= owned[source], task
