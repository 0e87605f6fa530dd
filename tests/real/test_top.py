"""`lazypages top`: the live view of a resident daemon, for terminals and scripts."""

from __future__ import annotations

import json
import os
import pty
import signal
import subprocess
import time
from pathlib import Path

from lazypages.cli.top import Rates, Row, plain
from tests.real.test_resident import check, started
from tests.support.processes import wait_for
from tests.support.resident import LAZYPAGES, daemon

TOP = (*LAZYPAGES, "top", "--interval", "0.2")


def test_rates() -> None:
    """Per second since the picture before; none for what is new, and none below 0."""
    rates = Rates()
    row = Row("1: 1 task", False, "serving", 10, 500, {"local": 100}, (None, None), "/a")
    assert rates.add([row], 5.0)[0].faults_rate == 0
    [later] = rates.add([row._replace(faults=30, sources={"local": 300})], 7.0)
    assert (later.faults_rate, later.bytes_rate) == (10, 100 * 4096)
    [other] = rates.add([row._replace(name="2: 1 task")], 8.0)
    assert (other.faults_rate, other.bytes_rate) == (0, 0)
    text = plain("title", [later])
    assert text.splitlines()[2].split() == (
        ["1:", "1", "task", "serving", "10", "400.0", "KiB/s", "2.0", "MiB", "30", "local", "300", "/a"]
    )


def test_top(restored_program: Path, tmp_path: Path) -> None:
    with daemon(tmp_path) as resident:
        # CI may run as a background job, in which a shell ignores SIGINT
        top = ["env", "--default-signal=INT", *TOP, "--socket", str(resident.socket)]
        with started(resident, tmp_path / "a", restored_program, 2, 600, background=False) as (number, tasks):
            tasks.say("touch 100")
            done = subprocess.run([*top, "--once", "--json"], capture_output=True, check=True, timeout=60)
            [line] = done.stdout.splitlines()
            picture = json.loads(line)
            assert picture["daemon"]["pid"] == resident.pid
            restore, *of_tasks = picture["rows"]
            assert (restore["name"], restore["state"]) == (f"{number}: 2 tasks", "serving")
            assert restore["pages_pending"] == sum(task["pages_pending"] for task in of_tasks)
            assert {task["state"] for task in of_tasks} == {"serving"}
            assert restore["faults"] > 0
            assert 0 < restore["wait_us"]["p50"] <= restore["wait_us"]["p99"]
            assert restore["pages_by_source"]["local"] >= 200

            once = subprocess.run([*top, "--once"], capture_output=True, text=True, check=True, timeout=60)
            assert once.stdout.count("\n") == 5
            assert once.stdout.splitlines()[2].split()[:4] == [f"{number}:", "2", "tasks", "serving"]

            plain_text = tmp_path / "plain"
            with plain_text.open("w") as output:
                running = subprocess.Popen(top, stdout=output, stderr=subprocess.STDOUT)
            wait_for("pictures", lambda: plain_text.read_text().count("file descriptors") > 2)
            running.send_signal(signal.SIGINT)
            assert running.wait(30) == 0
            assert "Traceback" not in plain_text.read_text()
            assert "\x1b" not in plain_text.read_text()
            check(tasks)
            assert resident.request("wait", restore=number)["exit"] == 0
        done = subprocess.run(
            [*top, "--once", "--all"], capture_output=True, text=True, check=True, timeout=60
        )
        assert "ended with 0" in done.stdout
        on_a_terminal(top)
        resident.request("shutdown")
        assert resident.wait() == 0
        gone = subprocess.run([*top, "--once"], capture_output=True, text=True, check=False, timeout=60)
        assert gone.returncode == 1
        assert gone.stderr.startswith("lazypages: no daemon at")


def on_a_terminal(top: list[str]) -> None:
    """Ctrl-C ends it, with the cursor where it was, and visible."""
    ours, theirs = pty.openpty()
    running = subprocess.Popen(
        top,
        stdin=theirs,
        stdout=theirs,
        stderr=theirs,
        start_new_session=True,
        env=os.environ | {"TERM": "xterm"},
    )
    os.close(theirs)
    said = b""
    while b"file descriptors" not in said:
        said += os.read(ours, 1 << 16)
    running.send_signal(signal.SIGINT)
    end = time.monotonic() + 30
    while time.monotonic() < end:
        try:
            said += os.read(ours, 1 << 16)
        except OSError:  # the other side is closed
            break
    assert running.wait(30) == 0
    assert said.rindex(b"\x1b[?25h") > said.rindex(b"\x1b[?25l")
    assert b"Traceback" not in said
    os.close(ours)
