"""--log-format json: every line is an object, in whatever case."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.support import schemas
from tests.support.fake import served_tasks, write_images
from tests.support.guard_processes import KILLED, wait_for_their_end
from tests.support.processes import Server, nothing_left
from tests.support.resident import LAZYPAGES, connect, daemon, restored


def lines(path: Path) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = [json.loads(line) for line in path.read_text().splitlines()]
    for line in found:
        schemas.check("log.json", line)
    return found


def test_of_a_daemon_that_is_killed(restored_program: Path, tmp_path: Path) -> None:
    """The guard's lines are objects, too."""
    with daemon(tmp_path, "--log-format", "json", "-v4") as resident:
        with restored(tmp_path / "a", restored_program, 1, 50) as tasks:
            first = resident.serve(tmp_path / "a")
            connect(tasks, tmp_path / "a")
            assert resident.request("wait", restore=first)["exit"] == 0
        with restored(tmp_path / "b", restored_program, 1, 50) as tasks:
            resident.serve(tmp_path / "b", background=False)
            connect(tasks, tmp_path / "b")
            tasks.say("touch 3")
            resident.signal(signal.SIGKILL)
            assert tasks.statuses() == [KILLED]
            wait_for_their_end()
        found = lines(tmp_path / "daemon.log")
    assert found[0]["message"].startswith("waiting for clients at")
    assert "restore" not in found[0]
    complete = [line for line in found if line["message"].endswith("complete, 50 of 50 pages copied")]
    assert [(line["level"], line["restore"]) for line in complete] == [("info", 1)]
    assert all(line["message"].startswith(f"task {line['pid']}") for line in complete)
    assert "was killed; task" in found[-1]["message"]
    assert found[-1]["level"] == "error"


@pytest.mark.slow
def test_of_serve(restored_program: Path, tmp_path: Path) -> None:
    with served_tasks(restored_program, tmp_path, 1, 50, "--log-format", "json", "-v4") as (tasks, server):
        assert server.wait() == 0
        tasks.say("check")
        assert tasks.statuses() == [0]
        pids = tasks.pids
    found = lines(tmp_path / "serve.out")
    assert {line["pid"] for line in found if "pid" in line} == set(pids)
    assert any(
        line["message"].startswith("fault latency") or "1 complete" in line["message"] for line in found
    )


@pytest.mark.slow
def test_of_a_page_server(tmp_path: Path) -> None:
    write_images(tmp_path, [100], 1)
    command = [*LAZYPAGES, "page-server", "--lazy-pages", "-D", str(tmp_path), "--log-format", "json", "-v4"]
    with nothing_left(), Server(command, output=tmp_path / "out") as server:
        server.wait_ready()
        server.signal(signal.SIGTERM)
        assert server.wait() == 1
    assert [line["level"] for line in lines(tmp_path / "out")] == ["message", "error"]


@pytest.mark.slow
def test_an_error_at_the_start(tmp_path: Path) -> None:
    """The log has it as an object, and standard error as a line for people."""
    write_images(tmp_path, [100], 1)
    (tmp_path / "pstree.img").write_bytes(b"x")
    done = subprocess.run(
        [
            sys.executable,
            "-m",
            "lazypages",
            "serve",
            "-D",
            str(tmp_path),
            "--log-format",
            "json",
            "-o",
            "log",
        ],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 1
    assert done.stderr.startswith("lazypages: ")
    assert [line["level"] for line in lines(tmp_path / "log")] == ["error"]
