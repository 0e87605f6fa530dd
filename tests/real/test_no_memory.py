"""malloc fails in the engine: that costs at most the one task, and never a byte (tests/support/failing_memory.py)."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from tests.support import failing_memory


@pytest.fixture(scope="module")
def engine(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("failing")
    failing_memory.build(folder)
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("scenario", ["layout", "remote"])
def test_each_allocation_may_fail(engine: Path, scenario: str) -> None:
    command = [sys.executable, "-m", "tests.support.failing_memory", str(engine), scenario]
    root = Path(__file__).parents[2]
    done = subprocess.run(command, cwd=root, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
