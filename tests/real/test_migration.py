"""Pre-copy and post-copy together: two pre-dumps, then `dump --lazy-pages`; the program goes on elsewhere.

The destination has its own copies of all image directories. What has not changed since the last pre-dump comes
from them, only the rest crosses the network. Source and destination are this machine, with a PID namespace for
what is restored; and then two network namespaces as well, with a link between them that has a delay, loses
packets and has a limit.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from images_spec.flags import PAGE_SIZE, PE_LAZY, PE_PARENT
from tests.real.test_criu_namespace import NAMESPACE
from tests.real.test_dump_precopy import PAGES, Writer, written_in
from tests.real.test_dump_precopy import writer as _writer
from tests.support.certificates import Authority
from tests.support.criu import Criu
from tests.support.dumptool import COMMAND, task
from tests.support.hosts import Host, Link, two_hosts
from tests.support.processes import Server, descendants, nothing_left, reap, tail, wait_for
from tests.support.remote import free_port

writer = _writer
OURS = (sys.executable, "-m", "lazypages")
DELAY = 0.002  # s, each way
FEW = 200  # lazy pages beside the table, at most: stack, heap, data of the C library


def migrate(
    source: Host,
    destination: Host,
    restore: list[str],
    program: Path,
    folder: Path,
    *,
    diskless: bool = False,
    pki: Authority | None = None,
) -> dict[str, Any]:
    """From start to end: the daemon's statistics. The program finds all its memory right at the destination.

    `diskless`: the pre-dumps go straight to a page server at the destination. "crossed" in the result: bytes that the
    source has sent from when it served until the restored program had all, where there is a link.
    """
    here, there, work, output = (folder / name for name in ("here", "there", "work", "output"))
    for directory in (there, work):  # the first pre-dump creates `here`
        directory.mkdir()
    port = free_port()
    tls_there = tls_here = ["--insecure"]
    if pki is not None:
        tls_here, tls_there = (
            pki.options(pki.issue(name, f"IP:{source.address},IP:{destination.address}"))
            for name in ("source", "destination")
        )
    tls_client = [] if pki is None else tls_there
    with task(*source.command(program), output=output) as pid:
        wait_for("the table", lambda: output.exists() and output.read_text().endswith("\n"))
        running = Writer(pid, output)
        for level, parent in (("0", []), ("1", ["--prev-images-dir", "../0"])):
            command = [*COMMAND, "pre-dump", "-t", pid, "-D", here / level, *parent]
            if diskless:
                with receiving(destination, there / level, port, [*parent, *tls_there]) as server:
                    to = ["--page-server", "--address", destination.address, "--port", port]
                    source.run(*command, *to, *([] if pki is None else tls_here))
                    assert server.wait() == 0
                assert not [*(here / level).glob("pages-*"), *(here / level).glob("pagemap-*")]
            else:
                source.run(*command)
            running.next_step()
        command = source.command(*COMMAND, "dump", "-t", pid, "-D", here / "2", "--prev-images-dir", "../1")
        command += ["--lazy-pages", "--address", source.address, "--port", str(port), *tls_here, "-v3"]
        with Server(command, output=folder / "dump.out") as dump:
            dump.wait_ready()
            # what the page server has not got: all images, or the small ones
            shutil.copytree(here, there, symlinks=True, dirs_exist_ok=True, ignore=links_of(there))
            shutil.rmtree(here)  # nothing here is looked at any more
            check_levels(running, there)
            before = source.sent() if source.namespace else 0
            where = ["-D", str(there / "2"), "-W", str(work)]
            serve = ["serve", *where, "--page-server", "--address", source.address, "--port", str(port)]
            serve += ["--stats-json", str(work / "stats.json"), "-v4", *tls_client]
            with Server(destination.command(*OURS, *serve), output=work / "serve.out") as daemon:
                daemon.wait_ready()
                command = destination.command(*NAMESPACE, *restore, *where, "--lazy-pages", "-v4")
                with end_at_exit([*command, "-o", "restore.log"], work) as restorer:
                    assert daemon.wait() == 0
                    assert dump.wait() == 0
                    assert reap(pid) == signal.SIGKILL  # the source; the program is there by now
                    os.kill(restored(restorer.pid, program), signal.SIGUSR2)
                    assert restorer.wait(60) == 0, tail(work / "restore.log")
        assert running.lines()[-1] == "right right"
    check_standstill((folder / "dump.out").read_text())
    stats: dict[str, Any] = json.loads((work / "stats.json").read_text())
    stats["crossed"] = source.sent() - before if source.namespace else None
    return stats


def check_standstill(said: str) -> None:
    """The source says when its pages were served and first requested, apart from how long it kept the tasks."""
    last = said.splitlines()[-1]
    time = r"([\d.]+) (us|ms|s)"
    found = re.search(
        rf"dumped: 1 process, 1 thread; .*; stopped in {time}, images complete after {time}; "
        rf"first page requested after {time}; kept stopped here for {time}$",
        last,
    )
    assert found, said
    times = [float(found[i]) * {"us": 1e-6, "ms": 1e-3, "s": 1}[found[i + 1]] for i in (3, 5, 7)]
    assert times == sorted(times), last


@contextmanager
def receiving(host: Host, directory: Path, port: int, options: list[str]) -> Iterator[Server]:
    """Our page server, which writes what is sent to it into the directory."""
    directory.mkdir()
    command = host.command(*OURS, "page-server", "-D", directory, "--address", host.address, "--port", port)
    with Server([*command, *options], output=directory.parent / f"receive-{directory.name}.out") as server:
        server.wait_ready()
        yield server


def links_of(there: Path) -> Callable[[str, list[str]], list[str]]:
    """For copytree: the links to parents are made by the page servers as well."""

    def ignored(folder: str, names: list[str]) -> list[str]:
        return [
            name for name in names if name == "parent" and (there / Path(folder).name / name).is_symlink()
        ]

    return ignored


def restored(root: int, program: Path) -> int:
    """The pid, seen from here, of the program that runs under `root`."""
    (pid,) = [pid for pid in descendants(root) if os.readlink(f"/proc/{pid}/exe") == str(program)]
    return pid


@contextmanager
def end_at_exit(command: list[str], work: Path) -> Iterator[subprocess.Popen[bytes]]:
    """A restore that waits for what it has restored."""
    with (work / "restore.out").open("wb") as stream, nothing_left():
        process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=stream, stderr=stream)
        try:
            yield process
        except BaseException as error:
            error.add_note(tail(work / "restore.log") + tail(work / "restore.out"))
            raise
        finally:
            process.kill()
            process.wait(30)


def check_levels(running: Writer, there: Path) -> None:
    """In the last level, the table is lazy: at the page server what the last step wrote, in the parents the rest."""
    assert running.table_flags(there / "2") == {
        page: PE_LAZY if page in written_in(2) else PE_LAZY | PE_PARENT for page in range(PAGES)
    }


def check_counts(stats: dict[str, Any]) -> None:
    """Each page of the table has come from the last level that has it."""
    (one,) = stats["tasks"]
    copied = one["pages"]["copied_by_source"]
    table = {
        "remote": written_in(2),
        "parent-1": written_in(1) - written_in(2),
        "parent-2": set(range(PAGES)) - written_in(1) - written_in(2),
    }
    assert copied.keys() <= {*table, "local"}
    for name, expected in table.items():
        assert len(expected) <= copied[name] <= len(expected) + FEW, copied
    (server,) = stats["page_servers"]
    # a fault may ask once more for a page that is on its way behind others
    assert copied["remote"] <= server["pages"] <= copied["remote"] + stats["faults"]
    assert server["pages"] < PAGES / 4


def check_crossed(stats: dict[str, Any]) -> None:
    """What the source has sent in the end is little more than what changed last: headers, and what was lost."""
    assert stats["crossed"] < 1.2 * PAGE_SIZE * (len(written_in(2)) + 2 * FEW)
    assert stats["crossed"] < PAGE_SIZE * PAGES / 4


RESTORERS = {
    "criu-4.1": lambda: [str(Criu("4.1").path), "restore"],
    "criu-4.2": lambda: [str(Criu("4.2").path), "restore"],
    "lazypages": lambda: [*OURS, "restore"],
}


@pytest.mark.slow
@pytest.mark.parametrize("restorer", RESTORERS)
def test_only_what_has_changed_crosses(restorer: str, writer: Path, tmp_path: Path) -> None:
    check_counts(migrate(Host(), Host(), RESTORERS[restorer](), writer, tmp_path))


@pytest.mark.slow
@pytest.mark.parametrize("restorer", RESTORERS)
def test_between_hosts_with_a_delay(restorer: str, writer: Path, tmp_path: Path) -> None:
    with two_hosts(Link(delay=DELAY)) as (source, destination):
        stats = migrate(source, destination, RESTORERS[restorer](), writer, tmp_path)
        check_counts(stats)
        check_crossed(stats)
        assert stats["page_servers"][0]["round_trip"] >= 2 * DELAY


@pytest.mark.slow
@pytest.mark.parametrize("tls", [False, True], ids=["plain", "tls"])
@pytest.mark.parametrize("restorer", RESTORERS)
def test_diskless_over_a_bad_link(restorer: str, tls: bool, writer: Path, tmp_path: Path) -> None:
    """All pages go from memory to the other host: by two pre-dumps, and on demand. One packet in a hundred is lost."""
    pki = Authority(tmp_path / "pki") if tls else None
    with two_hosts(Link(delay=DELAY, loss=0.01, rate=30e6)) as (source, destination):
        stats = migrate(source, destination, RESTORERS[restorer](), writer, tmp_path, diskless=True, pki=pki)
        check_counts(stats)
        check_crossed(stats)


def test_diskless_over_a_good_link(writer: Path, tmp_path: Path) -> None:
    with two_hosts(Link()) as (source, destination):
        stats = migrate(source, destination, RESTORERS["lazypages"](), writer, tmp_path, diskless=True)
        check_counts(stats)
        check_crossed(stats)
