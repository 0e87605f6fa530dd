"""`lazypages show` of the dump of a live process: what /proc said of it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

from tests.support.dumptool import check, task
from tests.support.processes import wait_for

#: Twenty threads: some forty mappings of stacks and arenas.
CODE = """
import threading, time
for _ in range(20): threading.Thread(target=time.sleep, args=[1000], daemon=True).start()
print("ready", flush=True)
time.sleep(1000)
"""


def show(*arguments: str | Path) -> str:
    command = [sys.executable, "-m", "lazypages", "show", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=60, check=True).stdout


def test_a_process_with_many_mappings(tmp_path: Path) -> None:
    output, images = tmp_path / "output", tmp_path / "images"
    with task(sys.executable, "-c", CODE, output=output) as pid:
        wait_for("the program", lambda: output.read_text() == "ready\n")
        threads = {int(tid) for tid in os.listdir(f"/proc/{pid}/task")}
        maps = [line.split() for line in Path(f"/proc/{pid}/maps").read_text().splitlines()]
        check("dump", "-t", pid, "-D", images, "--leave-running")
    for option in ("--mappings", "--json"):
        with open("/dev/full", "w") as full:
            command = [sys.executable, "-m", "lazypages", "show", option, images]
            done = subprocess.run(command, stdout=full, stderr=subprocess.PIPE, timeout=60, check=False)
        assert (done.returncode, done.stderr) == (
            1,
            b"lazypages: cannot write standard output: No space left on device\n",
        )
    (found,) = json.loads(show("--json", images))["tasks"]
    assert (found["pid"], found["ppid"], found["state"]) == (pid, 0, "alive")
    assert set(found["threads"]) == threads
    # The kernel's own: images have the two of vvar as one, and not vsyscall.
    assert [
        (int(one["start"], 16), int(one["end"], 16), one["access"])
        for one in found["mappings"]
        if not one["what"].startswith("[v")
    ] == [
        (*(int(address, 16) for address in line[0].split("-")), line[1])
        for line in maps
        if not line[-1].startswith("[v")
    ]
    stored = sum(one["stored"] for one in found["mappings"])
    assert stored == sum(found["pages"]["local"].values()) > 100
    short, long = show(images).splitlines(), show("--mappings", images).splitlines()
    assert len(short) < 25 < len(found["mappings"]) < len(long)
    title = f"{found['program']} ({pid})"
    assert f"{title}: mappings by kind" in [line.strip() for line in short]
    assert short[-1] == f"--mappings prints each of the {len(found['mappings'])} mappings."
    assert f"{title}: mappings" in [line.strip() for line in long]
