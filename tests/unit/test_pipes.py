"""The size of pipes is a limit of the whole machine: users of it at the same time do not lower it for each other."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import pytest

from lazypages.bench import pipes
from lazypages.bench.errors import BenchError

USER = """
import sys
from pathlib import Path
from lazypages.bench import pipes
pipes.LIMIT, pipes.USERS = map(Path, sys.argv[1:])
with pipes.raised_pipe_limit(4000):
    print("raised", flush=True)
    sys.stdin.read()
"""


@contextmanager
def user(folder: Path) -> Iterator[subprocess.Popen[str]]:
    """Another process that uses it."""
    command = [sys.executable, "-c", USER, str(folder / "limit"), str(folder / "users")]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout is not None
            assert process.stdout.readline() == "raised\n"
            yield process
        finally:
            process.communicate(timeout=60)


@pytest.fixture
def limit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """One of 1,000 bytes."""
    monkeypatch.setattr(pipes, "LIMIT", tmp_path / "limit")
    monkeypatch.setattr(pipes, "USERS", tmp_path / "users")
    (tmp_path / "limit").write_text("1000\n")
    return tmp_path / "limit"


def test_the_last_one_restores_it(limit: Path) -> None:
    with ExitStack() as first:
        first.enter_context(pipes.raised_pipe_limit(2000))
        assert limit.read_text() == "2000"
        with user(limit.parent):
            assert limit.read_text() == "4000"
            with pipes.raised_pipe_limit(3000):  # here as well
                first.close()
                assert limit.read_text() == "4000"
            assert limit.read_text() == "4000"
        assert limit.read_text() == "1000\n"


def test_one_is_killed(limit: Path) -> None:
    with user(limit.parent) as killed:
        with pipes.raised_pipe_limit(2000):
            killed.kill()
            killed.wait()
            assert limit.read_text() == "4000"
        assert limit.read_text() == "1000\n"


def test_errors(limit: Path) -> None:
    """Those of raising it; those of the block are its own."""
    with pytest.raises(PermissionError), pipes.raised_pipe_limit(2000):
        raise PermissionError
    assert limit.read_text() == "1000\n"
    limit.unlink()
    with pytest.raises(BenchError, match="cannot raise"), pipes.raised_pipe_limit(2000):
        pass
