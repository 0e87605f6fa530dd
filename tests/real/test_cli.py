"""What `lazypages serve` is for whoever starts it: terminal, log, background, files, signals.

The tasks need no CRIU (tests/support/fake.py); the options are those of `criu lazy-pages`.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import stat
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from lazypages import __version__
from lazypages.cli.imports import COMPILED
from tests.support.criu import Criu, all_criu
from tests.support.fake import Restored, restored_tasks, serve_command, write_images
from tests.support.processes import Server, reap
from tests.support.terminal import OnTerminal

PAGES = 300
SOCKET = "lazy-pages.socket"


@contextmanager
def restored(program: Path, images: Path, tasks: int = 1) -> Iterator[Restored]:
    """Tasks that can connect to the daemon of that directory."""
    with restored_tasks(program, tasks, PAGES) as run:
        write_images(images, run.pids, PAGES)
        yield run


def connect(tasks: Restored, work: Path) -> None:
    """The whole hand-over, until the tasks go on."""
    tasks.say(f"connect {work / SOCKET}")
    tasks.say("finish")


def check(tasks: Restored) -> None:
    """Every byte is right."""
    tasks.say("check")
    assert set(tasks.statuses()) == {0}


def command(images: Path, *options: str) -> list[str]:
    return [sys.executable, "-m", "lazypages", "serve", "-D", str(images), *options]


@contextmanager
def ready(words: Sequence[str], **options: Any) -> Iterator[subprocess.Popen[Any]]:
    """A daemon with streams of its own that listens: that its socket has a name is not enough. Killed at the end."""
    reading, writing = os.pipe()
    words = [*words, "--status-fd", str(writing)]
    with subprocess.Popen(words, pass_fds=[writing], **options) as server, open(reading, "rb") as status:
        os.close(writing)
        try:
            assert status.read(1) == b"\0"
            yield server
        finally:
            server.kill()


# On a terminal.


@pytest.mark.slow
def test_live_progress_and_summary(restored_program: Path, tmp_path: Path) -> None:
    with (
        restored(restored_program, tmp_path, 3) as tasks,
        OnTerminal(command(tmp_path, "--no-background")) as terminal,
    ):
        terminal.wait_for(f"waiting for: criu restore --lazy-pages -D {tmp_path}")
        connect(tasks, tmp_path)
        tasks.say("touch 1")
        for text in ("3 tasks", "to go", f"task {tasks.pids[2]} (restored)", "local 3"):
            terminal.wait_for(text)
        check(tasks)
        assert terminal.wait() == 0
    *_, summary = terminal.text().partition("3 tasks in ")
    rows = [line.split() for line in summary.splitlines()]
    assert any(row[:4] == ["local", "900", "3.5", "MiB"] for row in rows)
    assert "fault latency: p50 " in summary


def test_a_log_file_beside_the_terminal(restored_program: Path, tmp_path: Path) -> None:
    """The terminal shows what matters, the file has all."""
    options = ("--no-background", "-v4", "-o", "serve.log")
    with restored(restored_program, tmp_path) as tasks, OnTerminal(command(tmp_path, *options)) as terminal:
        terminal.wait_for("waiting for")
        connect(tasks, tmp_path)
        check(tasks)
        assert terminal.wait() == 0
    log = (tmp_path / "serve.log").read_text()
    assert "restore finished" in log
    assert "restore finished" not in terminal.text()
    assert "1 task in " in log
    assert "1 task in " in terminal.text()
    assert "\x1b" not in log


def test_ctrl_c_completes_the_tasks(restored_program: Path, tmp_path: Path) -> None:
    with (
        restored(restored_program, tmp_path, 2) as tasks,
        OnTerminal(command(tmp_path, "--no-background")) as terminal,
    ):
        terminal.wait_for("waiting for")
        connect(tasks, tmp_path)
        tasks.say("touch 1")
        terminal.wait_for("local 2")
        terminal.press(b"\x03")
        assert terminal.wait() == 0
        terminal.wait_for("2 tasks still miss 598 pages (2.3 MiB)")
        check(tasks)


def test_ctrl_c_before_anybody_came(restored_program: Path, tmp_path: Path) -> None:
    with restored(restored_program, tmp_path), OnTerminal(command(tmp_path)) as terminal:
        terminal.wait_for("waiting for")
        terminal.press(b"\x03")
        assert terminal.wait() == 1
        terminal.wait_for("ended before a restore connected")
    assert "Traceback" not in terminal.text()
    assert not (tmp_path / SOCKET).exists()


def test_a_terminal_that_goes_away_harms_nobody(restored_program: Path, tmp_path: Path) -> None:
    """SIGHUP, then no terminal to write to: the tasks still get all their memory."""
    command = serve_command(tmp_path, "--no-background")
    with restored(restored_program, tmp_path, 2) as tasks, OnTerminal(command) as terminal:
        terminal.wait_for("waiting for")
        connect(tasks, tmp_path)
        tasks.say("touch 1")
        terminal.wait_for("local 2")
        terminal.hang_up()
        check(tasks)
        assert terminal.wait() == 0
    assert json.loads((tmp_path / "stats.json").read_text())["pages_copied"] == 2 * PAGES


# In a log.


def test_without_a_terminal_there_are_lines(restored_program: Path, tmp_path: Path) -> None:
    with (
        restored(restored_program, tmp_path) as tasks,
        Server(command(tmp_path), output=tmp_path / "out") as server,
    ):
        server.wait_ready()
        connect(tasks, tmp_path)
        check(tasks)
        assert server.wait() == 0
    said = (tmp_path / "out").read_text()
    assert "waiting for: criu restore --lazy-pages" in said
    assert "1 task in " in said
    assert f"from local: {PAGES} pages (1.2 MiB), " in said
    assert "\x1b" not in said


def test_silence(restored_program: Path, tmp_path: Path) -> None:
    with (
        restored(restored_program, tmp_path) as tasks,
        Server(command(tmp_path, "-v0"), output=tmp_path / "out") as server,
    ):
        server.wait_ready()
        connect(tasks, tmp_path)
        check(tasks)
        assert server.wait() == 0
    assert (tmp_path / "out").read_text() == ""


def test_files_lie_in_the_work_directory(restored_program: Path, tmp_path: Path) -> None:
    """As with criu, that is where socket and relative names are; the log is its owner's and starts afresh."""
    images, work = tmp_path / "images", tmp_path / "work"
    images.mkdir()
    work.mkdir()
    (work / "serve.log").write_text("of yesterday")
    options = ["-W", str(work), "-o", "serve.log", "--stats-json", "stats.json", "-v"]
    with (
        restored(restored_program, images) as tasks,
        Server(command(images, *options), output=tmp_path / "out") as server,
    ):
        server.wait_ready()
        assert (work / SOCKET).is_socket()
        assert f"-D {images} -W {work}" in (work / "serve.log").read_text()
        connect(tasks, work)
        check(tasks)
        assert server.wait() == 0
    assert sorted(path.name for path in work.iterdir()) == ["serve.log", "stats.json"]
    assert "of yesterday" not in (work / "serve.log").read_text()
    assert json.loads((work / "stats.json").read_text())["ok"]


def test_log_to_standard_output(restored_program: Path, tmp_path: Path) -> None:
    with restored(restored_program, tmp_path) as tasks:
        words = command(tmp_path, "-o", "-")
        with ready(words, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as server:
            connect(tasks, tmp_path)
            check(tasks)
            output, errors = server.communicate(timeout=60)
    assert "1 task in " in output
    assert errors == ""


# In the background.


def test_daemon(restored_program: Path, tmp_path: Path) -> None:
    options = ["-d", "--pidfile", "pid", "-o", "serve.log", "--stats-json", "stats.json"]
    with restored(restored_program, tmp_path) as tasks:
        with Server(command(tmp_path, *options), output=tmp_path / "out") as starter:
            assert starter.wait() == 0
            assert starter.ready_bytes() == b"\0"
        assert (tmp_path / "out").read_text() == ""
        pidfile = tmp_path / "pid"
        assert stat.S_IMODE(pidfile.stat().st_mode) == 0o600
        text = pidfile.read_text()
        assert text.isdecimal()  # and no newline
        pid = int(text)
        assert os.getsid(pid) == pid
        for fd in (0, 1, 2):
            assert os.readlink(f"/proc/{pid}/fd/{fd}") == "/dev/null"
        connect(tasks, tmp_path)
        check(tasks)
        assert os.waitstatus_to_exitcode(reap(pid)) == 0  # an orphan of its starter, so our child
    assert not (tmp_path / SOCKET).exists()
    assert "1 task in " in (tmp_path / "serve.log").read_text()
    assert json.loads((tmp_path / "stats.json").read_text())["ok"]
    assert pidfile.exists()  # as criu leaves it


def test_daemon_tells_its_starter_what_is_wrong(restored_program: Path, tmp_path: Path) -> None:
    """All is checked before it goes into the background."""

    def start(*options: str) -> str:
        done = subprocess.run(
            command(tmp_path, "-d", *options), capture_output=True, text=True, timeout=60, check=False
        )
        assert done.returncode == 1
        assert not (tmp_path / SOCKET).exists()
        assert done.stdout == ""
        return done.stderr

    with restored(restored_program, tmp_path):
        (tmp_path / "pid").write_text("somebody's")
        text = start("--pidfile", "pid")
        assert text.startswith(f"lazypages: --pidfile {tmp_path / 'pid'} exists")
        assert (tmp_path / "pid").read_text() == "somebody's"
        pages = next(tmp_path.glob("pages-*.img"))
        os.truncate(pages, pages.stat().st_size // 2)
        assert pages.name in start("--pidfile", "other")
        assert not (tmp_path / "other").exists()


def test_pidfile_needs_the_background(restored_program: Path, tmp_path: Path) -> None:
    """criu writes none either; but we say so."""
    words = command(tmp_path, "--pidfile", "pid")
    with restored(restored_program, tmp_path) as tasks, Server(words, output=tmp_path / "out") as server:
        server.wait_ready()
        connect(tasks, tmp_path)
        check(tasks)
        assert server.wait() == 0
    assert not (tmp_path / "pid").exists()
    assert "--pidfile has no effect without -d" in (tmp_path / "out").read_text()


# Options and files of criu.


@pytest.mark.slow
@pytest.mark.parametrize("criu", all_criu())
def test_configuration_files_are_those_of_criu(criu: Criu, tmp_path: Path) -> None:
    """The same file decides for all where the log is. (The checkpoint is damaged, so they end there.)"""
    images, home = tmp_path / "images", tmp_path / "home"
    (home / ".criu").mkdir(parents=True)
    (home / ".criu" / "default.conf").write_text('# of this user\ntcp-established\nlog-file "home 1.log"\n')
    for name in ("env", "conf"):
        (tmp_path / name).write_text(
            f"log-file={name}.log  # comment\nghost-limit 1M\nshell-job\nport 27000\n"
        )
    at_home = {"HOME": str(home)}
    variable = {"CRIU_CONFIG_FILE": str(tmp_path / "env")}
    config = ["--config", str(tmp_path / "conf")]
    for options, variables, expected in (
        ([], {}, []),
        ([], at_home, ["home 1.log"]),
        (["--no-default-config"], at_home, []),
        ([], at_home | variable, ["env.log"]),
        (["--no-default-config"], at_home | variable, ["env.log"]),
        (config, at_home | variable, ["conf.log"]),
        (["-j", "--display-stats", "-o", "given.log", *config], at_home, ["given.log"]),
        (["--config", str(tmp_path / "missing")], at_home, []),
        (["--config", str(tmp_path / "missing")], at_home | variable, ["env.log"]),
    ):
        environment = {name: value for name, value in os.environ.items() if name != "HOME"} | variables
        for program in (
            [str(criu.path), "lazy-pages"],
            [sys.executable, "-m", "lazypages", "serve"],
            [sys.executable, "-m", "lazypages.cli.shim", "lazy-pages", "", "0", str(criu.path), "lazy-pages"],
        ):
            images.mkdir()
            (images / "inventory.img").touch()
            done = subprocess.run(
                [*program, "-D", str(images), *options],
                env=environment,
                cwd=tmp_path,
                capture_output=True,
                text=True,
                timeout=60,
                check=False,
            )
            assert done.returncode == 1, done.stderr
            logs = sorted(path.name for path in images.iterdir() if path.name != "inventory.img")
            assert logs == expected, (program, options, done.stderr)
            shutil.rmtree(images)


def test_all_of_serve_can_be_configured(restored_program: Path, tmp_path: Path) -> None:
    """What concerns other commands of criu is ignored, as is what has no meaning here without another option."""
    config = tmp_path / "criu.conf"
    config.write_text(
        "daemon\npidfile pid\nlog-file serve.log\nverbosity 3\nport 27000\ntls\ntcp-established\npage-server\n"
        "no-page-server\npre-dump-mode read\n"
    )
    with restored(restored_program, tmp_path) as tasks:
        with Server(command(tmp_path, "--config", str(config), "-j"), output=tmp_path / "out") as starter:
            assert starter.wait() == 0
        connect(tasks, tmp_path)
        check(tasks)
        assert os.waitstatus_to_exitcode(reap(int((tmp_path / "pid").read_text()))) == 0
    log = (tmp_path / "serve.log").read_text()
    options = "--daemon --pidfile=pid --log-file=serve.log --verbosity=3"
    assert f"from configuration files: {options}\n" in log
    assert "1 task in " in log


def test_version(tmp_path: Path) -> None:
    done = subprocess.run(command(tmp_path, "-V"), capture_output=True, text=True, timeout=60, check=False)
    assert (done.returncode, done.stdout) == (0, f"lazypages, version {__version__}\n")


# Around it.


def test_open_files_are_raised_to_the_hard_limit(restored_program: Path, tmp_path: Path) -> None:
    with restored(restored_program, tmp_path):
        limited = ["prlimit", "--nofile=64:512", *command(tmp_path)]
        with Server(limited, output=tmp_path / "out") as server:
            server.wait_ready()
            limits = Path(f"/proc/{server.pid}/limits").read_text()
            server.signal(signal.SIGTERM)
            assert server.wait() == 1
    (line,) = [line for line in limits.splitlines() if line.startswith("Max open files")]
    assert line.split()[3:5] == ["512", "512"]


@pytest.mark.parametrize(
    ("options", "text"),
    [
        (["--status-fd", "77"], "lazypages: --status-fd 77: Bad file descriptor\n"),
        (["--page-server"], "--page-server needs --port"),
    ],
)
def test_what_can_t_be_had(restored_program: Path, tmp_path: Path, options: list[str], text: str) -> None:
    with restored(restored_program, tmp_path):
        done = subprocess.run(
            command(tmp_path, "-v1", *options), capture_output=True, text=True, timeout=60, check=False
        )
    assert done.returncode == 1
    assert text in done.stderr
    assert "Traceback" not in done.stderr
    assert not (tmp_path / SOCKET).exists()


@pytest.mark.parametrize("log", [[], ["-o", "serve.log"]], ids=["stderr", "log"])
def test_stats_that_can_t_be_written(log: list[str], restored_program: Path, tmp_path: Path) -> None:
    """An error of reporting is said wherever the log goes, and is not an error of the restore."""
    with restored(restored_program, tmp_path) as tasks:
        options = ["--stats-json", "/dev/full", *log]
        with Server(command(tmp_path, *options), output=tmp_path / "out") as server:
            server.wait_ready()
            connect(tasks, tmp_path)
            check(tasks)
            assert server.wait() == 0
    text = "--stats-json /dev/full: No space left on device; this concerns the statistics only"
    assert (tmp_path / "out").read_text().count(text) == 1
    if log:
        assert (tmp_path / "serve.log").read_text().count(text) == 1


def test_stats_on_standard_output(restored_program: Path, tmp_path: Path) -> None:
    with restored(restored_program, tmp_path) as tasks:
        words = command(tmp_path, "--stats-json", "-")
        with ready(words, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL) as server:
            connect(tasks, tmp_path)
            check(tasks)
            output, _ = server.communicate(timeout=60)
        assert json.loads(output)["ok"]
        assert not (tmp_path / "-").exists()
        done = subprocess.run([*words, "-d"], capture_output=True, text=True, timeout=60, check=False)
    assert (done.returncode, done.stderr.count("which -d closes: name a file")) == (1, 1)


#: A command that needs it.
NEEDS = {
    "dumptool._ptrace": ("dumptool", "dump"),
    "images_spec._pagemap": ("lazypages", "serve"),
    "lazypages.engine._uffd": ("lazypages", "serve"),
    "lazypages.net._pageserver": ("lazypages", "page-server"),
}


@pytest.mark.parametrize("module", sorted(COMPILED))
def test_a_module_that_was_not_built_is_one_line(module: str) -> None:
    """In a clone without its compiled parts."""
    program, command = NEEDS[module]
    code = (
        f"import sys; sys.modules[{module!r}] = None; sys.argv = [{program!r}, {command!r}, '--help']; "
        f"from {program}.__main__ import main; main()"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=False
    )
    expected = f"{module} is not built: run `.ci/venv` in the clone, or install lazypages again\n"
    assert (done.returncode, done.stdout, done.stderr) == (1, "", expected)
