"""The harness itself, against CRIU's own daemon: what fails here is not ours."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.support.chain import split
from tests.support.criu import Criu, all_criu
from tests.support.restore import Checkpoints, criu_daemon, eager_restore, lazy_restore


@pytest.mark.loop("single-criu-4.2")
@pytest.mark.parametrize("criu", all_criu())
@pytest.mark.parametrize("scenario", ["single", "tree", "interpreter"])
def test_criu_serves_itself(criu: Criu, scenario: str, checkpoints: Checkpoints, tmp_path: Path) -> None:
    with lazy_restore(checkpoints.get(criu, scenario), criu_daemon(criu), tmp_path) as restored:
        restored.check_all()


@pytest.mark.loop("1-criu-4.2")
@pytest.mark.parametrize("criu", all_criu())
@pytest.mark.parametrize("depth", [1, 5])
def test_split_chains_are_whole(criu: Criu, depth: int, checkpoints: Checkpoints, tmp_path: Path) -> None:
    """CRIU restores them at once, without a daemon, and finds every page where the chain says."""
    checkpoint = checkpoints.get(criu, "tree")
    chain = split(checkpoint.images, tmp_path / "chain", depth)
    with eager_restore(checkpoint, tmp_path, chain.top) as restored:
        restored.go()
        assert restored.wait_tasks() == 0
        restored.check_verdict()
