"""`dumptool dump|pre-dump --page-server`: pages go to a page server, CRIU's or ours, and none to the disk."""

from __future__ import annotations

import os
import shutil
import signal
import socket
import struct
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from dumptool import send
from dumptool.dump import Settings, Watcher, dump
from dumptool.send import PageServer, SendError
from images_spec.flags import PAGE_SIZE, PE_LAZY, PE_PARENT, PE_PRESENT
from images_spec.pagemap import Pagemap
from lazypages.net.url import TcpServer
from tests.real.test_dump_lazy import running as victim_running
from tests.real.test_dump_precopy import PAGES, Writer, written_in
from tests.real.test_dump_precopy import running as _running
from tests.real.test_dump_precopy import writer as _writer
from tests.real.test_pageserver_criu import our_receiver
from tests.real.test_pageserver_criu import receiver as criu_receiver
from tests.support.certificates import Authority
from tests.support.criu import Criu
from tests.support.dumptool import COMMAND, check, is_unharmed, pages, reap_all, run, stats, task
from tests.support.processes import Server, descendants, reap, wait_for
from tests.support.restore import Program, our_daemon

running, writer = _running, _writer
RECEIVERS = ["ours", "criu-4.1", "criu-4.2"]
FIRST_ID = 65537
each_receiver = pytest.mark.parametrize("kind", RECEIVERS)


@pytest.fixture(scope="module")
def authority(tmp_path_factory: pytest.TempPathFactory) -> Authority:
    return Authority(tmp_path_factory.mktemp("pki"))


@contextmanager
def receiver(kind: str, directory: Path, *options: str) -> Iterator[tuple[Server, int]]:
    """A page server that writes into `directory`; its port. All must have come when the block ends."""
    directory.mkdir()
    work = directory.parent / f"{directory.name}-server"
    work.mkdir()
    if kind == "ours":
        with our_receiver(directory, work, *options) as server:
            server.wait_ready()
            yield server, server.port
    else:
        with criu_receiver(Criu(kind.removeprefix("criu-")), directory, work, *options) as (other, port):
            yield other, port


def to(port: int, *options: str) -> list[str]:
    return ["--page-server", "--address", "127.0.0.1", "--port", str(port), *options]


def same_pages(sent: Path, local: Path) -> None:
    """The server has what a dump to the disk has: every entry, and every byte of every pages image."""
    names = sorted(path.name for path in local.glob("pagemap-*.img"))
    assert names
    assert sorted(path.name for path in sent.glob("pagemap-*.img")) == names
    for name in names:
        theirs, ours = Pagemap.load(sent / name), Pagemap.load(local / name)
        assert merged(theirs) == merged(ours), name
        sent_pages, local_pages = (
            folder / f"pages-{pagemap.pages_id}.img" for folder, pagemap in ((sent, theirs), (local, ours))
        )
        assert theirs.pages_id >= FIRST_ID
        assert sent_pages.read_bytes() == local_pages.read_bytes(), name


def merged(pagemap: Pagemap) -> list[tuple[int, int, int]]:
    """(address, pages, flags), adjoining ones with the same flags as one."""
    entries: list[tuple[int, int, int]] = []
    for entry in pagemap:
        if entries and entries[-1][2] == entry.flags:
            start, count, flags = entries[-1]
            if start + count * PAGE_SIZE == entry.vaddr:
                entries[-1] = start, count + entry.nr_pages, flags
                continue
        entries.append((entry.vaddr, entry.nr_pages, entry.flags))
    return entries


def no_pages(directory: Path) -> None:
    """Nothing of the memory is in the directory."""
    assert not list(directory.glob("pages-*"))
    assert not list(directory.glob("pagemap-*"))
    assert sum(path.stat().st_size for path in directory.iterdir()) < 100_000


def stopped_tree(root: int) -> list[int]:
    """Stops all of it, on one CPU: the kernel writes its number into the threads' memory (rseq(2))."""
    members = [root, *(pid for pid, state in descendants(root).items() if state != "Z")]
    for pid in members:
        for thread in os.listdir(f"/proc/{pid}/task"):
            os.sched_setaffinity(int(thread), {min(os.sched_getaffinity(0))})
        os.kill(pid, signal.SIGSTOP)
    return members


@pytest.mark.slow
@pytest.mark.parametrize("protocol", ["auto", "told"])
@pytest.mark.parametrize("scenario", ["tree", "protection"])
@each_receiver
def test_the_same_images(kind: str, scenario: str, protocol: str, program: Program, tmp_path: Path) -> None:
    """As a dump of the same stopped tasks to the disk; which then can be restored from what has been sent."""
    criu = Criu("4.2" if kind == "criu-4.2" else "4.1")
    here, there, local = tmp_path / "here", tmp_path / "there", tmp_path / "local"
    with victim_running(criu, scenario, program, tmp_path) as victim:
        told = (
            []
            if protocol == "auto"
            else ["--page-server-protocol", "criu-4.2" if kind == "criu-4.2" else "criu-4.1"]
        )
        with receiver(kind, there) as (server, port):
            members = stopped_tree(victim.pid)
            check("dump", "-t", victim.pid, "-D", here, "-R", *to(port, *told))
            assert server.wait() == 0
        check("dump", "-t", victim.pid, "-D", local, "-R")
        for pid in members:
            os.kill(pid, signal.SIGCONT)
        no_pages(here)
        same_pages(there, local)
        is_unharmed(victim.pid)
        victim.goes_on_here(tmp_path)


def chain(kind: str, running: Writer, folder: Path, *options: str) -> Path:
    """Three pre-dumps with a step after each, and the dump, each to a server of its own: the last one's images.

    What is left here of each level goes there in the end.
    """
    parent: list[str] = []
    for number in range(4):
        with receiver(kind, folder / f"there-{number}", *parent) as (server, port):
            local = ["--prev-images-dir", f"../here-{number - 1}"] if parent else []
            action = "dump" if number == 3 else "pre-dump"
            check(action, "-t", running.pid, "-D", folder / f"here-{number}", *local, *options, *to(port))
            assert server.wait() == 0, server.story()
        if number < 3:
            running.next_step()
        parent = ["--prev-images-dir", f"../there-{number}"]
    reap_all()
    for number in range(4):
        no_pages(folder / f"here-{number}")
        for path in (folder / f"here-{number}").iterdir():
            if path.name != "parent":
                shutil.copy(path, folder / f"there-{number}")
    return folder / "there-3"


@pytest.mark.loop("ours-lazy")
@pytest.mark.parametrize("parents", ["lazy", "eager"])
@each_receiver
def test_chain(kind: str, parents: str, running: Writer, tmp_path: Path) -> None:
    """Each level has what was written since the one before, and PARENT for the rest; and it is restored."""
    top = chain(kind, running, tmp_path, "--parent-pages", parents)
    unchanged = PE_PARENT | (PE_LAZY if parents == "lazy" else 0)
    for level in range(4):
        expected = {
            page: PE_PRESENT | PE_LAZY if page in written_in(level) else unchanged for page in range(PAGES)
        }
        assert running.table_flags(tmp_path / f"there-{level}") == expected, f"level {level}"
    assert stats(top).pages_written < 1000 + len(written_in(3))
    criu = Criu("4.2" if kind == "criu-4.2" else "4.1")
    if parents == "eager":
        criu.restore(top, work=tmp_path, lazy=False)
        running.ends_right()
    else:
        with our_daemon().start(top, tmp_path) as daemon:
            daemon.wait_ready()
            criu.restore(top, work=tmp_path)
            running.ends_right()
            assert daemon.wait() == 0


@pytest.mark.slow
@each_receiver
def test_a_parent_that_only_one_side_has(kind: str, running: Writer, tmp_path: Path) -> None:
    """The server has none: all is sent. A level on the disk, of which the server has a copy: only what changed."""
    check("pre-dump", "-t", running.pid, "-D", tmp_path / "here-0")
    running.next_step()
    with receiver(kind, tmp_path / "there") as (server, port):
        options = ["-t", running.pid, "-D", tmp_path / "here-1", "--prev-images-dir", "../here-0"]
        check("dump", *options, "-R", "--track-mem", *to(port))
        assert server.wait() == 0
    assert set(running.table_flags(tmp_path / "there").values()) == {PE_PRESENT | PE_LAZY}
    check("pre-dump", "-t", running.pid, "-D", tmp_path / "here-2")
    shutil.copytree(tmp_path / "here-2", tmp_path / "copy")
    running.next_step()
    with receiver(kind, tmp_path / "there-3", "--prev-images-dir", "../copy") as (server, port):
        check(
            "dump",
            "-t",
            running.pid,
            "-D",
            tmp_path / "here-3",
            "--prev-images-dir",
            "../here-2",
            "-R",
            *to(port),
        )
        assert server.wait() == 0
    flags = running.table_flags(tmp_path / "there-3")
    assert {page for page, flag in flags.items() if flag & PE_PRESENT} == written_in(2)
    running.ends_right()


# -- TLS, addresses ------------------------------------------------------------------------------------------


@pytest.mark.slow
@each_receiver
def test_tls(kind: str, authority: Authority, running: Writer, tmp_path: Path) -> None:
    """Certificates that name the address, on both sides."""
    theirs, ours = authority.issue(f"server-{kind}"), authority.issue(f"client-{kind}")
    options = (
        ["--address", "127.0.0.1", *authority.options(theirs)]
        if kind == "ours"
        else authority.options(theirs)
    )
    with receiver(kind, tmp_path / "there", *options) as (server, port):
        told = ["--page-server-protocol", "criu-4.2"] if kind == "criu-4.2" else []
        check(
            "dump",
            "-t",
            running.pid,
            "-D",
            tmp_path / "here",
            "-R",
            *to(port, *authority.options(ours), *told),
        )
        assert server.wait() == 0
    check("dump", "-t", running.pid, "-D", tmp_path / "local", "-R")
    assert len(pages(tmp_path / "there", running.pid)) > PAGES
    assert running.table_flags(tmp_path / "there") == running.table_flags(tmp_path / "local")
    running.ends_right()


def test_tls_and_a_protocol_that_nobody_has_named(
    authority: Authority, running: Writer, tmp_path: Path
) -> None:
    """CRIU 4.2's server can't be asked which it is: who has not said it is told to, and nothing is stopped."""
    ours, theirs = authority.issue("client-unnamed"), authority.issue("server-unnamed")
    with receiver("criu-4.2", tmp_path / "there", *authority.options(theirs)) as (server, port):
        to_it = to(port, *authority.options(ours))
        result = run("dump", "-t", running.pid, "-D", tmp_path / "here", "-R", *to_it)
        assert server.wait() == 1
    assert result.returncode == 1
    assert result.stderr.endswith("and criu-4.1 was a guess: name it with --page-server-protocol\n")
    assert len(result.stderr.splitlines()) == 1
    running.ends_right()


@pytest.mark.slow
def test_a_server_that_is_not_trusted(authority: Authority, running: Writer, tmp_path: Path) -> None:
    """By its certificate, or by somebody else's authority: refused before anything is stopped or written."""
    ours, theirs = authority.issue("client"), authority.issue("elsewhere", "DNS:elsewhere")
    stranger = Authority(tmp_path / "stranger")
    for number, options in enumerate((authority.options(theirs), stranger.options(stranger.issue("server")))):
        with receiver("ours", tmp_path / f"there-{number}", "--address", "127.0.0.1", *options) as (
            server,
            port,
        ):
            to_it = to(port, *authority.options(ours))
            result = run("dump", "-t", running.pid, "-D", tmp_path / "here", *to_it)
            assert result.returncode == 1
            assert "certificate" in result.stderr
            assert len(result.stderr.splitlines()) == 1
            if number:  # the handshake failed at this end, too: that is no client, and it waits for one
                wait_for("its word of that", lambda: "UNKNOWN_CA" in server.story())
                server.signal(signal.SIGTERM)
            assert server.wait() == 1
    running.ends_right()


@pytest.mark.loop("no TLS here")
@pytest.mark.parametrize(
    ("kind", "there", "here", "said"),
    [
        ("ours", "server", None, "the page server uses TLS: connect with --tls"),
        ("ours", None, "client", "the server does not use TLS: it needs --tls, too"),
        (
            "criu-4.2",
            "server",
            "desk",
            "a page server of CRIU's accepts only a certificate that names its --address",
        ),
    ],
    ids=["no TLS here", "no TLS there", "the client's name at CRIU's"],
)
def test_why_it_is_refused(  # noqa: PLR0917 - a table
    kind: str,
    there: str | None,
    here: str | None,
    said: str,
    authority: Authority,
    running: Writer,
    tmp_path: Path,
) -> None:
    """In one line, before anything is stopped."""

    def options(name: str | None) -> list[str]:
        names = {"desk": "DNS:desk"}.get(name or "", "IP:127.0.0.1")
        return authority.options(authority.issue(f"why-{name}", names)) if name else []

    with receiver(kind, tmp_path / "there", "--address", "127.0.0.1", *options(there)) as (server, port):
        result = run("dump", "-t", running.pid, "-D", tmp_path / "here", "-R", *to(port, *options(here)))
        if server.process.poll() is None:
            server.signal(signal.SIGTERM)
        assert server.wait() == 1
    assert result.returncode == 1
    assert said in result.stderr
    assert len(result.stderr.splitlines()) == 1
    running.ends_right()


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "named"), [("criu-4.2", "criu-4.1"), ("criu-4.1", "criu-4.2")])
def test_the_wrong_protocol_is_named(kind: str, named: str, running: Writer, tmp_path: Path) -> None:
    """The old one is checked while the process still runs, and corrected; the new one makes the server close."""
    with receiver(kind, tmp_path / "there") as (server, port):
        told = ["--page-server-protocol", named]
        result = run("dump", "-t", running.pid, "-D", tmp_path / "here", "-R", *to(port, *told))
        assert server.wait() == (0 if named == "criu-4.1" else 1)
    if named == "criu-4.1":
        assert result.returncode == 0
        assert f"speaks criu-4.2, not {named} as --page-server-protocol says" in result.stderr
        assert len(pages(tmp_path / "there", running.pid)) > PAGES
    else:
        assert result.returncode == 1
        assert "not speak criu-4.2 (--page-server-protocol)" in result.stderr
    running.ends_right()


@pytest.mark.slow
@pytest.mark.parametrize("how", ["::1", "localhost", "unix", "ps-socket"])
def test_addresses(how: str, running: Writer, tmp_path: Path) -> None:
    there, output = tmp_path / "there", tmp_path / "server.out"
    there.mkdir()
    command = [sys.executable, "-m", "lazypages", "page-server", "-D", str(there), "-v3"]
    ours, theirs = socket.socketpair()
    where: list[str | int]
    with ours, theirs:
        if how == "ps-socket":
            command += ["--ps-socket", str(theirs.fileno())]
        else:
            address = f"unix:{tmp_path / 'socket'}" if how == "unix" else how
            command += ["--address", address]
        with (
            output.open("wb") as stream,
            subprocess.Popen(command, pass_fds=[theirs.fileno()], stderr=stream) as server,
        ):
            if how == "ps-socket":
                where = ["--ps-socket", ours.fileno()]
            else:
                wait_for("the server", lambda: "page server at" in output.read_text())
                port = output.read_text().split("page server at ")[1].split()[0].rpartition(":")[2]
                where = ["--address", address, *(() if how == "unix" else ("--port", port))]
            dumped = subprocess.run(
                [
                    *COMMAND,
                    "dump",
                    "-t",
                    str(running.pid),
                    "-D",
                    tmp_path / "here",
                    "-R",
                    "--page-server",
                    *map(str, where),
                ],
                pass_fds=[ours.fileno()],
                timeout=60,
                check=False,
            )
            assert dumped.returncode == 0
            assert server.wait(30) == 0  # though we hold an end of the socket, too
    assert set(running.table_flags(there).values()) == {PE_PRESENT | PE_LAZY}
    running.ends_right()


# -- failures ------------------------------------------------------------------------------------------------


@contextmanager
def bad_server(how: str, takes: int) -> Iterator[int]:
    """Speaks the old layout, says that it has no parent, and takes so many bytes of the first image; its port."""
    over = threading.Event()

    def serve() -> None:
        client, _ = listener.accept()
        with client:
            client.settimeout(30)
            assert len(client.recv(24, socket.MSG_WAITALL)) == 24  # the probe
            client.sendall(bytes(4))
            assert len(client.recv(24, socket.MSG_WAITALL)) == 24  # OPEN2
            client.sendall(bytes(1))
            taken = 0
            while taken < takes and (data := client.recv(min(65536, takes - taken))):
                taken += len(data)
            if how == "stall":
                over.wait(30)
            elif how == "reset":
                client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            elif how == "fails":
                while len(tail := client.recv(1 << 16)) and tail[-24:-20] != b"\x23\x10\0\0":
                    pass
                client.sendall(struct.pack("=i", -5))

    with socket.create_server(("127.0.0.1", 0)) as listener:
        thread = threading.Thread(target=serve)
        thread.start()
        try:
            yield listener.getsockname()[1]
        finally:
            over.set()
            thread.join(30)
            assert not thread.is_alive()


@pytest.mark.loop("dump-close-5024")
@pytest.mark.parametrize("takes", [0, 10, 24 + 5000, 3_000_000])
@pytest.mark.parametrize("how", ["close", "reset"])
@pytest.mark.parametrize("action", ["dump", "pre-dump"])
def test_a_server_that_is_lost(action: str, how: str, takes: int, running: Writer, tmp_path: Path) -> None:
    """In the middle: one line, exit status 1, no dump, and the task goes on."""
    images = tmp_path / "here"
    with bad_server(how, takes) as port:
        result = run(action, "-t", running.pid, "-D", images, *to(port))
    assert result.returncode == 1
    assert result.stderr.startswith(f"dumptool: page server tcp://127.0.0.1:{port}: ")
    assert len(result.stderr.splitlines()) == 1
    assert not (images / "inventory.img").exists()
    is_unharmed(running.pid)
    # Nothing vouches for what that level should have had.
    check("dump", "-t", running.pid, "-D", tmp_path / "after", "-R")
    running.next_step()
    running.ends_right()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("how", "says"), [("stall", "no progress for 1 s"), ("fails", "it has failed (status -5)")]
)
def test_a_server_that_falls_silent_or_fails(
    how: str, says: str, running: Writer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(send, "PATIENCE", 1.0)
    with bad_server(how, 100_000) as port:
        server = PageServer(TcpServer("127.0.0.1", port), layout=None)
        with pytest.raises(SendError) as raised:
            dump(Settings(running.pid, tmp_path / "here", page_server=server), Watcher())
    assert says in str(raised.value)
    assert not (tmp_path / "here" / "inventory.img").exists()
    is_unharmed(running.pid)
    running.ends_right()


@pytest.mark.loop("ours")
@each_receiver
def test_a_real_server_is_killed(kind: str, running: Writer, tmp_path: Path) -> None:
    """While the dump is under way: stopped first, so that it can't have taken all."""
    with receiver(kind, tmp_path / "there") as (server, port):
        command = [*COMMAND, "dump", "-t", str(running.pid), "-D", str(tmp_path / "here"), *to(port)]
        if kind != "ours":
            command += ["--page-server-protocol", kind]
        pid_file = tmp_path / "there" / f"pagemap-{running.pid}.img"
        with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as dumping:
            wait_for("the first image", lambda: pid_file.exists() or dumping.poll() is not None)
            server.signal(signal.SIGKILL)
            server.process.wait(30)
            assert dumping.stderr is not None
            said = dumping.stderr.read()
            code = dumping.wait(30)
    if code:  # else it had all, and only lacks its end
        assert "page server" in said
        is_unharmed(running.pid)
        running.ends_right()
    else:
        assert reap(running.pid) == signal.SIGKILL


def test_no_server(running: Writer, tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    result = run("dump", "-t", running.pid, "-D", tmp_path / "here", *to(port))
    assert (result.returncode, result.stderr) == (
        1,
        f"dumptool: page server tcp://127.0.0.1:{port}: Connection refused\n",
    )
    running.ends_right()


def resident_at_most(pid: int) -> int:
    """The most memory that a process has had so far, KiB (proc_pid_status(5)); 0 when it has none any more."""
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    return next((int(line.split()[1]) for line in lines if line.startswith("VmHWM:")), 0)


@pytest.mark.slow
def test_memory_is_bounded(tmp_path: Path) -> None:
    """A task of 192 MiB: what is on its way is a few MiB."""
    output, there = tmp_path / "output", tmp_path / "there"
    code = "import os, time; data = os.urandom(192 << 20); print('ready', flush=True); time.sleep(600)"
    with task(sys.executable, "-c", code, output=output) as pid, receiver("ours", there) as (server, port):
        wait_for("the memory", lambda: output.read_text() == "ready\n")
        command = [*COMMAND, "pre-dump", "-t", str(pid), "-D", str(tmp_path / "here"), *to(port)]
        with subprocess.Popen(command, stdin=subprocess.DEVNULL) as dumping:
            most = 0
            while dumping.poll() is None:
                most = max(most, resident_at_most(dumping.pid))
        assert dumping.returncode == 0
        assert 0 < most < 100 << 10
        assert server.wait() == 0
        assert (there / f"pages-{FIRST_ID}.img").stat().st_size > 192 << 20
