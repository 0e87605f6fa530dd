"""The harness itself, against CRIU's own daemon: what fails here is not ours."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.support.criu import Criu, all_criu
from tests.support.restore import Checkpoints, criu_daemon, lazy_restore


@pytest.mark.parametrize("criu", all_criu())
@pytest.mark.parametrize("scenario", ["single", "tree", "interpreter"])
def test_criu_serves_itself(criu: Criu, scenario: str, checkpoints: Checkpoints, tmp_path: Path) -> None:
    with lazy_restore(checkpoints.get(criu, scenario), criu_daemon(criu), tmp_path) as restored:
        restored.check_all()
