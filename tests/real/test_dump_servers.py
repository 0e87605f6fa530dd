"""Real servers under load: two pre-dumps, a dump by `--backend criu`, and CRIU restores them; clients check them.

Lazily: the memory comes from the source that CRIU keeps stopped, through `lazypages serve`, and from the pre-dumps.
"""

from __future__ import annotations

import subprocess
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, closing, contextmanager, nullcontext
from pathlib import Path

import pytest

from tests.real.test_criu_namespace import NAMESPACE
from tests.real.test_dump_backend import both, by_criu, pre_dumped
from tests.real.test_dump_lazy import lazy_dump, ours
from tests.real.test_dump_sent import bad_server, to
from tests.support import nginx, postgres
from tests.support.clients import Clients, Inside
from tests.support.criu import Criu
from tests.support.docs import ROOT
from tests.support.dumptool import check, reap_all, run, stats
from tests.support.hosts import Host, Link, successor, two_hosts
from tests.support.processes import nothing_left, start, tail, wait_for
from tests.support.redis import redis

ESTABLISHED = ["--tcp-established"]
NETWORK = ("--net", "sh", "-c", 'ip link set lo up && exec "$@"', "sh")
"""After NAMESPACE: also without the ports that are in use here."""
BUSY = 20
"""Requests that must have been answered before a dump."""


@contextmanager
def moved(
    criu: Criu,
    pid: int,
    folder: Path,
    options: Sequence[str] = (),
    *,
    where: Callable[[], AbstractContextManager[object]] = nullcontext,
    then: Sequence[str] = (),
) -> Iterator[None]:
    """The tree runs again, while most of its memory is elsewhere. At the end all has arrived, and the source is gone.

    ``options``: of dump and restore. ``where``: makes a block in which the restore is started, when the source is
    frozen; ``then``: precedes its command, after NAMESPACE.
    """
    images, work = folder / "images", folder / "work"
    work.mkdir()
    parents = pre_dumped(pid, folder)
    with lazy_dump(pid, images, *parents, *by_criu(criu), *options) as source:
        source.wait_ready()
        with ours(source.port).start(images, work) as daemon:
            daemon.wait_ready()
            log = work / "restore.log"
            command = [criu.path, "restore", "-D", images, "-W", work, "--lazy-pages", "-v4", "-o", log.name]
            with where():
                restorer = start([*NAMESPACE, *then, *command, *options], cwd="/")

            def runs() -> bool:
                assert restorer.poll() is None, tail(log)
                return log.exists() and "Tasks resumed" in log.read_text(errors="replace")

            wait_for("the restore", runs)
            yield
            assert daemon.wait() == 0
        assert source.wait() == 0


@pytest.mark.loop("criu-4.2")
@both
def test_redis(criu: Criu, tmp_path: Path) -> None:
    """Every acknowledged key is there, and it can fork at once to save them."""
    images = tmp_path / "images"
    tcp = criu.version >= (4, 2)  # 4.1.1 can't dump an inet socket of Linux 6.18 (docs/backend.md)
    options = ["--tcp-close"] if tcp else []
    with nothing_left(), redis(tmp_path, tcp=tcp) as server:
        server.fill(8000)
        if tcp:
            server.load()
        parents = pre_dumped(server.pid, tmp_path)
        said = check("dump", "-t", server.pid, "-D", images, *parents, *by_criu(criu), *options)
        server.stop()
        reap_all()
        assert f"CRIU {'.'.join(map(str, criu.version))}" in said
        assert server.written > 8000 or not tcp
        counted = stats(images)
        assert counted.pages_skipped_parent > counted.pages_written
        criu.restore(images, *options, work=tmp_path, lazy=False)
        server.check()


@pytest.mark.slow
def test_redis_lazily(tmp_path: Path) -> None:
    """It forks to save all while its memory is still arriving."""
    with nothing_left(), redis(tmp_path, tcp=True) as server:
        server.fill(8000)
        server.load()
        with moved(Criu("4.2"), server.pid, tmp_path, ["--tcp-close"], then=NETWORK):
            server.stop()
            server.check()


@contextmanager
def busy_inside(
    module: str, folder: Path, command: Sequence[str | Path], prefix: Sequence[str] = ()
) -> Iterator[tuple[int, Clients]]:
    """A tree of a server and its clients, by its first process: a Unix connection can be dumped with both ends only."""
    clients = Inside(folder / "control", module, str(folder), command)
    with nothing_left():
        root = start([*prefix, *clients.command], output=folder / "output", cwd=ROOT)
        clients.open()
        clients.load()
        wait_for("answers", lambda: clients.answered() > BUSY)
        yield root.pid, clients


@contextmanager
def busy(
    clients: Clients, command: Sequence[str | Path], folder: Path, hosts: tuple[Host, Host]
) -> Iterator[int]:
    """A server on the first host, by its pid, and clients on the second. This thread is on the first one."""
    with closing(clients), nothing_left(), hosts[0].inside():
        root = start(command, output=folder / "output", cwd="/")
        with hosts[1].inside():
            clients.open()
            clients.load()
        wait_for("answers", lambda: clients.answered() > BUSY)
        yield root.pid


IPC = ["unshare", "--ipc"]
"""CRIU dumps shared memory of System V only in an IPC namespace of its own."""


@pytest.mark.slow
def test_postgres(tmp_path: Path) -> None:
    """Connections that write, and a transaction that is committed after the restore."""
    criu, images = Criu("4.1"), tmp_path / "images"
    with busy_inside(postgres.__name__, tmp_path, postgres.server(tmp_path), IPC) as (pid, clients):
        parents = pre_dumped(pid, tmp_path)
        check("dump", "-t", pid, "-D", images, *parents, *by_criu(criu))
        reap_all()
        criu.restore(images, work=tmp_path, lazy=False)
        clients.check()


@pytest.mark.slow
def test_postgres_moves(tmp_path: Path) -> None:
    """The same, lazily, to another host; the connections are by TCP, from a third one, and live on."""
    clients = postgres.Clients("10.77.0.1")
    with two_hosts(Link()) as hosts, successor(hosts[0]) as destination:
        command = [*IPC, *postgres.server(tmp_path, hosts[0].address)]

        @contextmanager
        def where() -> Iterator[None]:
            destination.take_over(hosts[0])
            with destination.inside():
                yield

        with (
            busy(clients, command, tmp_path, hosts) as pid,
            moved(Criu("4.2"), pid, tmp_path, [*ESTABLISHED, "--skip-in-flight"], where=where),
            hosts[1].inside(),
        ):
            clients.check()


@pytest.mark.slow
def test_nginx(tmp_path: Path) -> None:
    """Connections by TCP live on: when a dump fails, when the server runs on, and when it is restored.

    While it stands still or is not there, its host drops their packets.
    """
    criu, images = Criu("4.2"), tmp_path / "images"
    with two_hosts(Link()) as hosts:
        clients = nginx.Clients(hosts[0].address)
        with busy(clients, nginx.server(tmp_path, hosts[0].address), tmp_path, hosts) as pid:
            dump = ("dump", "-t", pid, *by_criu(criu), *ESTABLISHED)
            with bad_server("reset", 100) as port:
                assert run(*dump, "-D", tmp_path / "failed", *to(port)).returncode == 1
            clients.go_on()
            assert not dropped()
            check(*dump, "-D", tmp_path / "running", "-R")
            clients.go_on()
            assert not dropped()
            parents = pre_dumped(pid, tmp_path)
            check(*dump, "-D", images, *parents)
            reap_all()
            assert dropped()
            criu.restore(images, *ESTABLISHED, work=tmp_path, lazy=False)
            assert not dropped()
            clients.check()


def dropped() -> list[str]:
    """Rules of the firewall of this thread's host that drop packets."""
    rules = subprocess.run(["iptables-save"], check=True, capture_output=True, text=True, timeout=60).stdout
    return [line for line in rules.splitlines() if "DROP" in line]


@pytest.mark.slow
def test_nginx_lazily(tmp_path: Path) -> None:
    """With clients in the tree."""
    with (
        busy_inside(nginx.__name__, tmp_path, nginx.server(tmp_path)) as (pid, clients),
        moved(Criu("4.1"), pid, tmp_path),
    ):
        clients.check()
