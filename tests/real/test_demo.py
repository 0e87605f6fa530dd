"""`lazypages demo`, as the README has it."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
from contextlib import suppress
from pathlib import Path

import pytest

from lazypages.cli.demo_task import PAGE_SIZE, contents
from tests.support.criu import Criu, all_criu
from tests.support.processes import descendants, wait_for
from tests.support.terminal import OnTerminal

NO_CRIU = {"LAZYPAGES_CRIU_DIR": "/nowhere", "PATH": "/usr/bin:/bin", "LAZYPAGES_CRIU": ""}
COMMAND = [sys.executable, "-m", "lazypages", "demo", "--size", "32"]
GOOD = "Every byte is the same as at the checkpoint."


def run(*options: str, folder: Path, env: dict[str, str] | None = None) -> subprocess.CompletedProcess[str]:
    """The demo, with its temporary files in `folder`; it must leave neither files nor processes."""
    folder.mkdir(exist_ok=True)
    before = descendants()
    done = subprocess.run(
        [*COMMAND, *options],
        capture_output=True,
        text=True,
        timeout=110,
        check=False,
        env=os.environ | {"TMPDIR": str(folder)} | (env or {}),
    )
    assert list(folder.iterdir()) == []
    assert descendants().keys() <= before.keys()
    assert "Traceback" not in done.stdout + done.stderr
    return done


@pytest.mark.slow
@pytest.mark.parametrize("criu", all_criu())
def test_with_criu(criu: Criu, tmp_path: Path) -> None:
    done = run("--criu", str(criu.path), folder=tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    assert f"Trying CRIU {'.'.join(map(str, criu.version))} ({criu.path}) ... works" in done.stdout
    assert GOOD in done.stdout
    assert "1 task in " in done.stderr
    assert "from local: " in done.stderr


def test_without_criu(tmp_path: Path) -> None:
    """Nothing is needed but what is installed with lazypages."""
    done = run(folder=tmp_path, env=NO_CRIU)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "Trying our own dumptool and restorer ... works" in done.stdout
    assert "lazypages restore -D" in done.stdout
    assert GOOD in done.stdout


@pytest.mark.slow
def test_a_criu_that_does_not_work_is_passed_over(tmp_path: Path) -> None:
    """Debian bookworm's 3.17.1 is one, on kernels of today: it says why, and the demo goes on."""
    criu = tmp_path / "criu"
    criu.write_text(
        "#!/bin/sh\necho Version: 3.17.1\n[ $1 = --version ] || { echo Error: no way; exit 1; }\n"
    )
    criu.chmod(0o755)
    done = run(folder=tmp_path / "work", env=NO_CRIU | {"LAZYPAGES_CRIU": str(criu)})
    assert done.returncode == 0, done.stdout + done.stderr
    assert f"Trying CRIU 3.17.1 ({criu}) ... does not work here" in done.stdout
    assert "cannot dump: Error: no way" in done.stdout
    assert GOOD in done.stdout


def test_a_criu_that_was_asked_for_is_not(tmp_path: Path) -> None:
    done = run("--criu", "/nowhere/criu", folder=tmp_path)
    assert done.returncode == 1
    assert "/nowhere/criu" in done.stderr


def test_another_user_is_told(tmp_path: Path) -> None:
    script = (
        "import os, sys; os.setgroups([]); os.setgid(65534); os.setuid(65534); "
        "from lazypages.cli.main import cli; cli(['demo'], prog_name='lazypages')"
    )
    # Everything is imported before the privileges go: an installation may be root's alone.
    script = "import lazypages.cli.demo, images_spec.errors; " + script
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, timeout=60, check=False
    )
    assert done.returncode == 1
    assert (
        done.stderr == "lazypages: checkpoint and restore need root: run it as root, for example with sudo\n"
    )


def runs(words: str) -> bool:
    """Whether that is in a command below us; if it is Python, it has got so far that SIGINT makes a traceback."""
    for pid in descendants():
        with suppress(FileNotFoundError, ProcessLookupError):
            command = Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode()
            if words in command:
                (caught,) = re.findall(r"SigCgt:\s(\w+)", Path(f"/proc/{pid}/status").read_text())
                return "-m lazypages" not in command or bool(int(caught, 16) & 1 << (signal.SIGINT - 1))
    return False


@pytest.mark.loop("lazypages serve")
@pytest.mark.parametrize("during", ["dump -t", "lazypages serve", "restore -D"])
def test_ctrl_c_leaves_nothing(during: str, tmp_path: Path) -> None:
    """Whatever runs at that moment. The server may have only just been started: an interrupt is not for it."""
    before = descendants()
    size = "512" if during == "dump -t" else "64"
    with OnTerminal(["env", f"TMPDIR={tmp_path}", *COMMAND[:-1], size]) as terminal:
        terminal.wait_for("2. ")
        wait_for(during, lambda: runs(during))
        if (
            during == "lazypages serve"
        ):  # and has to get ready undisturbed before the demo looks what it was given
            os.kill(terminal.process.pid, signal.SIGSTOP)
            terminal.press(b"\x03")
            terminal.wait_for("waiting for: criu restore", 30)
            os.kill(terminal.process.pid, signal.SIGCONT)
        terminal.press(b"\x03")
        assert terminal.wait() == 1
    assert "Traceback" not in terminal.text()
    wait_for("the processes to go", lambda: descendants().keys() <= before.keys())
    assert list(tmp_path.iterdir()) == []


def test_on_a_terminal(tmp_path: Path) -> None:
    """Summary as a table, and what the task says after it."""
    with OnTerminal(["env", f"TMPDIR={tmp_path}", *COMMAND]) as terminal:
        assert terminal.wait() == 0
    text = terminal.text()
    assert text.index("source") < text.index("The task ran again") < text.index(GOOD)


def place_of(page: bytes, pid: int) -> int:
    """Address of the one page of the process with that content."""
    with Path(f"/proc/{pid}/mem").open("rb", buffering=0) as memory:
        for line in Path(f"/proc/{pid}/maps").read_text().splitlines():
            span, permissions, _offset, _device, inode, *_name = line.split()
            start, end = (int(part, 16) for part in span.split("-"))
            if permissions == "rw-p" and inode == "0":
                memory.seek(start)
                found = memory.read(end - start).find(page)
                if found >= 0 and found % PAGE_SIZE == 0:
                    return start + found
    pytest.fail("the process has no such page")


def test_a_wrong_byte_is_seen(tmp_path: Path) -> None:
    """The task that checks itself does check: a byte changed from outside is found."""
    folder = tmp_path / "task"
    folder.mkdir()
    script = Path(__file__).parents[2] / "lazypages" / "cli" / "demo_task.py"
    task = subprocess.Popen([sys.executable, "-I", "-S", str(script), str(folder), str(64 * PAGE_SIZE)])
    try:
        wait_for("the task", (folder / "ready").exists)
        *_, page = contents(41)
        with Path(f"/proc/{task.pid}/mem").open("r+b", buffering=0) as memory:
            memory.seek(place_of(page, task.pid) + 4000)
            memory.write(bytes([page[4000] ^ 1]))
        (folder / "go").touch()
        assert task.wait(60) == 0
        assert '"wrong": [40]' in (folder / "verdict").read_text()
    finally:
        task.kill()
        task.wait()
