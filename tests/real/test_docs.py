"""README.md and pages of docs/: every command of theirs, taken from the text and executed.

A test changes in a command only what it must: directories of the system become the test's, "in another terminal"
becomes the background. `tests.support.docs.EXECUTED_BY` has the pages that other tests execute.
"""

from __future__ import annotations

import re
import subprocess
import sys
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.real.test_dump_precopy import SOURCE as WRITER
from tests.real.test_dump_precopy import Writer
from tests.real.test_migrate_page import CERTIFICATES, PROGRAM, ends_right, hosts
from tests.support.compiling import compiled
from tests.support.criu import Criu
from tests.support.docs import ROOT, Shell, blocks, with_changes
from tests.support.dumptool import reap_all, task
from tests.support.hosts import Link
from tests.support.processes import nothing_left, wait_for
from tests.support.remote import free_port

CRIU = Criu("4.2")


@pytest.fixture
def folder(tmp_path: Path) -> Iterator[Path]:
    """Where the commands run: a clone, as far as they need one."""
    (tmp_path / ".venv").symlink_to(sys.prefix)
    for name in ("bench", "packaging", "tests"):
        (tmp_path / name).symlink_to(ROOT / name)
    with nothing_left():
        yield tmp_path


@pytest.fixture
def running(tmp_path: Path) -> Iterator[Writer]:
    """A process that knows what has to be in its memory."""
    output = tmp_path / "writer.out"
    with task(compiled(WRITER), output=output) as pid:
        wait_for("the table", lambda: output.read_text().endswith("\n"))
        yield Writer(pid, output)


def dump(running: Writer, images: Path) -> None:
    """Checkpoints it, by CRIU, and ends it."""
    images.mkdir(parents=True)
    CRIU.dump(running.pid, images)
    reap_all()


def beside(images: Path | str, daemon: str, *then: str) -> str:
    """The daemon in one terminal; in another one, when a restore can be started, what comes then."""
    return "\n".join(
        (
            f"{daemon.partition('  #')[0]} &",
            "daemon=$!",
            f"until [ -S {images}/lazy-pages.socket ]; do sleep 0.02; done",
            *then,
            "wait $daemon",
        )
    )


@pytest.mark.slow  # test_demo.py stands for it
def test_readme_first_screen(folder: Path) -> None:
    """From nothing to a process that was restored lazily. `.ci/venv` comes first in CI, too."""
    assert re.search(r"^\.ci/venv", (ROOT / ".ci" / "test").read_text(), re.MULTILINE)
    demo, link = blocks("README.md", "lazypages")
    assert "Every byte is the same as at the checkpoint." in Shell(folder).run(
        with_changes(demo, {".ci/venv && ": ""})
    )
    (folder / "bin").mkdir()
    Shell(folder).run(with_changes(link, {"/usr/local/bin/": folder / "bin"}))
    for name in ("lazypages", "dumptool"):
        assert Shell(folder).run(f"{folder}/bin/{name} --version").startswith(f"{name}, version")


@pytest.mark.slow
def test_readme_completion_and_man_pages(folder: Path) -> None:
    """What the shells make of it: test_completion.py, test_man.py."""
    complete, man = blocks("README.md", "Completion and man pages")
    for text in (complete, man):
        Shell(folder).run(with_changes(text, {"/usr/local/share": folder / "share"}))
    for name in ("lazypages", "dumptool"):
        script = folder / "share" / "bash-completion" / "completions" / name
        assert f"complete -o nosort -F _{name}_completion {name}" in script.read_text()
    assert (folder / "share" / "man" / "man1" / "lazypages-serve.1").exists()


@pytest.mark.loop("lazypages")
@pytest.mark.parametrize("number", [pytest.param(0, id="criu"), pytest.param(1, id="lazypages")])
def test_readme_use_it(number: int, running: Writer, folder: Path) -> None:
    """CRIU's daemon, and ours in its place."""
    both = blocks("README.md", "Use it")
    assert len(both) == 2
    dump(running, folder / "DIR")
    daemon, restore = both[number].splitlines()
    Shell(folder).run(beside("DIR", daemon, restore))
    running.ends_right()


@pytest.mark.slow
def test_readme_move(tmp_path: Path) -> None:
    """Two hosts, and the certificates of docs/migrate.md."""
    leave, arrive = blocks("README.md", "Move a process: pre-copy, then post-copy")
    program = tmp_path / PROGRAM
    program.symlink_to(compiled(WRITER))
    with hosts(CRIU, program, tmp_path, Link()) as both:
        both.run(CERTIFICATES)
        changes = {"SOURCE": "$SOURCE", "--tls": "$TLS"}
        find, *pre_dumps, last = leave.replace("\\\n", "").splitlines()
        both.source.run(with_changes(find, {"$(pidof redis-server)": both.writer.pid}))
        for command in pre_dumps:
            both.source.run(command)
            both.writer.next_step()
        last = with_changes(last, changes)
        both.source.run(f"mkfifo ready; {last} --status-fd 3 3>ready & DUMP=$!; head -c 1 ready >/dev/null")
        both.source.run("scp -r ckpt root@$DESTINATION:")
        serve, restore = with_changes(arrive, changes).splitlines()
        both.destination.run(f"{serve} -d -o serve.log\n{restore}")
        both.source.run("wait $DUMP")
        (pid,) = both.restored(compiled(WRITER))
        ends_right(both.writer, pid)


@pytest.mark.slow
def test_criu_shim(running: Writer, folder: Path) -> None:
    (text,) = blocks("docs/criu-shim.md", "criu-shim: a `criu` whose lazy-pages is ours")
    (folder / "bin").mkdir()
    dump(running, folder / "ckpt")
    install, daemon, restore = with_changes(text, {"/usr/local/bin": folder / "bin"}).splitlines()
    Shell(folder).run(install)
    Shell(folder, path=[folder / "bin"]).run(beside("ckpt", daemon, restore))
    running.ends_right()


def test_daemon(running: Writer, folder: Path) -> None:
    use, top = blocks("docs/daemon.md", "Use it")
    images = folder / "ckpt" / "job1"
    dump(running, images)
    (folder / "log").mkdir()
    changes = {
        "/run/lazypages": folder / "lazypages",
        "/var/log": folder / "log",
        "/var/ckpt": folder / "ckpt",
        "lazypages ctl": f"lazypages ctl --socket {folder}/lazypages.socket",
        "lazypages daemon": f"lazypages daemon --socket {folder}/lazypages.socket",
    }
    start, serve, restore, status, shutdown = with_changes(use, changes).splitlines()
    look = with_changes(top, {"lazypages top": f"lazypages top --socket {folder}/lazypages.socket"})
    text = f"{start}\n{beside(images, serve, restore, status)}\n{look}\n{shutdown}"
    output = Shell(folder).run(text)
    assert "complete" in output
    assert '"rows"' in output
    running.ends_right()


@pytest.mark.slow
def test_daemon_examples(running: Writer, folder: Path) -> None:
    """Requests of a shell and of Python."""
    (shell,) = blocks("docs/daemon.md", "Examples")
    (python,) = blocks("docs/daemon.md", "Examples", "python")
    images = folder / "ckpt" / "job1"
    dump(running, images)
    (folder / "job1").mkdir()
    places = {"/run/lazypages.socket": folder / "lazypages.socket", "/var/ckpt": folder / "ckpt"}
    serve, wait = with_changes(shell, places).splitlines()
    daemon = f"lazypages daemon --socket {folder}/lazypages.socket -d -o {folder}/daemon.log"
    answers = Shell(folder).run(f"{daemon}\n{serve}\ncriu restore --lazy-pages -D {images} -d\n{wait}")
    assert len(re.findall('^{"id": null, "ok": true', answers, re.MULTILINE)) == 2
    assert '"exit": 0' in answers
    running.ends_right()
    example = with_changes(python, places | {"/run/job1": folder / "job1"})
    assert "'ok': True" in execute(example, folder)


def execute(text: str, folder: Path) -> str:
    """What a Python program prints."""
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", text],
        cwd=folder,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 0, f"{text}\n{done.stderr}"
    return done.stdout


def test_images_from_python(running: Writer, folder: Path) -> None:
    dump(running, folder / "ckpt")
    printed = {}
    for section in ("A checkpoint", "Where the pages are", "A single image", "Errors"):
        (text,) = blocks("docs/images_spec.md", section, "python")
        printed[section] = execute(text, folder)
    assert printed["A checkpoint"].splitlines() == [f"{running.pid} 0 1", str(folder / "ckpt")]
    assert "lost: 0" in printed["Where the pages are"]
    assert "True" in printed["Errors"]
    assert (folder / "copy.img").read_bytes() == (folder / "ckpt" / f"core-{running.pid}.img").read_bytes()


@pytest.mark.slow
def test_sizing(running: Writer, folder: Path) -> None:
    """The numbers of the first row are still about right."""
    measure, look = blocks("docs/sizing.md", "What a restore needs")
    text = (ROOT / "docs" / "sizing.md").read_text()
    row = Shell(folder).run(measure).splitlines()[-1].split()
    written = re.findall(r"^\| 1 \| 1 \| 1 \| (\d+) \| (\d+) \| ([\d.]+) \|$", text, re.M)
    (descriptors, threads, mib) = map(float, written[0])
    assert abs(int(row[3]) - descriptors) <= 10
    assert abs(int(row[4]) - threads) <= 2
    assert 0.5 < float(row[5]) / mib < 1.5
    dump(running, folder / "ckpt")
    found = Shell(folder).run(look).splitlines()
    assert [line.split()[0] for line in found[-3:-1]] == ["RssAnon:", "Threads:"]
    assert 0 < int(found[-1]) <= descriptors  # no restore has connected


@pytest.mark.slow
def test_troubleshooting(folder: Path) -> None:
    """docs/troubleshooting.md; its messages are in tests/unit/test_troubleshooting.py."""
    (text,) = blocks("docs/troubleshooting.md", "First: what works on this machine")
    assert "userfaultfd" in Shell(folder).run(text)


@pytest.mark.slow
def test_metrics(running: Writer, folder: Path) -> None:
    """What the numbers are: test_metrics.py, test_otel.py."""
    images = folder / "ckpt" / "job1"
    dump(running, images)
    port = free_port()
    daemon, textfile = blocks("docs/metrics.md", "Prometheus")
    (spans,) = blocks("docs/metrics.md", "OpenTelemetry")
    here = {"lazypages daemon": f"lazypages daemon -d -o {folder}/daemon.log --socket {folder}/daemon.socket"}
    shell = Shell(folder)
    shell.run(with_changes(daemon, here | {"127.0.0.1:9876": f"127.0.0.1:{port}"}))
    with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=10) as answer:
        assert b"lazypages_restores" in answer.read()
    end = f"lazypages ctl --socket {folder}/daemon.socket shutdown\n"
    shell.run(end)
    shell.run(f"{with_changes(spans, here | {'4318': free_port()})}\n{end}")
    places = {"/var/ckpt": folder / "ckpt", "/var/lib/prometheus/node-exporter": folder}
    serve = with_changes(textfile, places).strip()
    shell.run(beside(images, serve, f"criu restore --lazy-pages -D {images} -d"))
    assert "lazypages_restores_total" in (folder / "job1.prom").read_text()
    running.ends_right()


@pytest.mark.slow
def test_backend(running: Writer, folder: Path) -> None:
    (options,) = blocks("docs/backend.md", "Options")
    shell = Shell(folder)
    shell.run(
        f"dumptool pre-dump -t {running.pid} -D ckpt/1\n"
        f"dumptool pre-dump -t {running.pid} -D ckpt/2 --prev-images-dir ../1\n"
    )
    assert "CRIU" in shell.run(with_changes(options, {"-t PID": f"-t {running.pid}"}))
    reap_all()
    images = folder / "ckpt" / "3"
    serve = f"lazypages serve -D {images}"
    shell.run(beside(images, serve, f"criu restore --lazy-pages --tcp-close -D {images} -d"))
    running.ends_right()
