"""The resident daemon: many restores in one process, each as if it had a daemon of its own."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.support.resident import connect, daemon, restored


@pytest.mark.parametrize("loop", ["uvloop", "asyncio", "trio"])
def test_two_restores(loop: str, restored_program: Path, tmp_path: Path) -> None:
    """At once, on each event loop; each is complete and byte for byte right."""
    with (
        daemon(tmp_path, "--loop", loop) as resident,
        restored(tmp_path / "a", restored_program, 2, 300) as one,
        restored(tmp_path / "b", restored_program, 3, 200) as other,
    ):
        numbers = [resident.serve(tmp_path / name) for name in "ab"]
        connect(one, tmp_path / "a")
        connect(other, tmp_path / "b")
        one.say("check")
        other.say("check")
        assert one.statuses() == [0, 0]
        assert other.statuses() == [0, 0, 0]
        for number in numbers:
            result = resident.request("wait", restore=number)
            assert result["exit"] == 0
            assert result["summary"]["ok"]
        resident.request("shutdown")
        assert resident.wait() == 0
        assert not resident.socket.exists()
