"""Which dump a page server has the pages of: no page of another one is ever taken."""

from __future__ import annotations

import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from images_spec.identity import identify
from lazypages.bench.pipes import raised_pipe_limit
from lazypages.net.url import TcpServer
from tests.real.test_dump_lazy import Victim, lazy_dump, ours, running
from tests.real.test_one_destination import destination
from tests.real.test_remote_criu import lazy_pages, read_memory
from tests.real.test_serve_remote import page_server_at
from tests.support.criu import Criu
from tests.support.dumptool import check
from tests.support.pages import fetch
from tests.support.processes import nothing_left, start, wait_for
from tests.support.proxy import Fault, Proxy
from tests.support.remote import free_port, leave_at_source
from tests.support.restore import SCENARIOS, Checkpoint, Checkpoints, Program

OLD = Criu("4.1")


def given_up(victim: Victim, port: int) -> None:
    """A dump at that port, which its user thinks better of; the program goes on."""
    with lazy_dump(victim.pid, victim.checkpoint.images, "--port", str(port)) as source:
        source.wait_ready()
        shutil.copytree(victim.checkpoint.images, victim.checkpoint.images.parent / "first")
        source.signal(signal.SIGTERM)
        assert source.wait() == 1


def of_first(victim: Victim) -> Victim:
    """The images of the dump that was given up."""
    checkpoint = victim.checkpoint
    images = checkpoint.images.parent / "first"
    return Victim(
        Checkpoint(checkpoint.criu, checkpoint.scenario, checkpoint.pid, images, checkpoint.results)
    )


@pytest.mark.slow
@pytest.mark.parametrize("protocol", ["auto", "criu-4.2"])
def test_a_second_dump_at_the_same_address(protocol: str, program: Program, tmp_path: Path) -> None:
    """A destination of the first still waits there: it gets no page of the second, which goes on to its own."""
    port = free_port()
    with running(OLD, "small_stacks", program, tmp_path) as victim:
        given_up(victim, port)
        with (
            destination(
                of_first(victim),
                ours(port, "--page-server-protocol", protocol),
                program,
                tmp_path / "old",
                wait=False,
            ) as old,
            lazy_dump(victim.pid, victim.checkpoint.images, "--port", str(port)) as source,
        ):
            source.wait_ready()
            wait_for("the refusal there", lambda: "has the pages of another dump" in old.server.story())
            source.wait_said("requests pages of another checkpoint")
            assert victim.is_frozen(source.pid)
            with destination(victim, ours(port), program, tmp_path / "new") as new:
                assert new.server.wait() == 0
                assert source.wait() == 0
                assert victim.has_ended()
                old.give_up()
                assert old.stats()["page_servers"][0]["pages"] == 0
                assert old.stats()["pages_copied"] == 0
                new.check_memory()


@pytest.mark.slow
@pytest.mark.parametrize("release", ["4.1", "4.2"])
def test_a_dump_of_criu_at_the_address_of_one_of_ours(release: str, program: Program, tmp_path: Path) -> None:
    """What dumptool has left at the source no server of CRIU's can have."""
    port = free_port()
    second = tmp_path / "second"
    second.mkdir()
    criu = Criu(release)
    with running(criu, "small_stacks", program, tmp_path) as victim, raised_pipe_limit():
        given_up(victim, port)
        options = ["--address", "127.0.0.1", "--port", str(port)]
        with (
            destination(of_first(victim), ours(port), program, tmp_path / "old", wait=False) as old,
            criu.lazy_dump(victim.pid, second, *options) as source,
        ):
            source.wait_ready()
            wait_for("the refusal", lambda: "does not identify its dump" in old.server.story())
            old.give_up()
            assert old.stats()["page_servers"][0]["pages"] == 0
            assert old.stats()["pages_copied"] == 0


@pytest.mark.slow
@pytest.mark.parametrize("protocol", ["auto", "criu-4.1"])
def test_two_dumps_of_criu(protocol: str, program: Program, tmp_path: Path) -> None:
    """The connection to the first is lost; at the same address there is a second, for somebody else."""
    first, second, results = (tmp_path / name for name in ("first", "second", "results"))
    for directory in (first, second, results, tmp_path / "again"):
        directory.mkdir()
    port = free_port()
    options = ["--address", "127.0.0.1", "--port", str(port)]

    def cut(number: int) -> Fault | None:
        return None if number else Fault(1 << 20)

    with nothing_left(), raised_pipe_limit(), Proxy(("127.0.0.1", port), cut) as proxy:
        victim = start(program.command("single", results), cwd="/")
        wait_for("the victim to fill its memory", (results / "ready").exists)
        with OLD.lazy_dump(victim.pid, first, *options) as source:
            source.wait_ready()
            checkpoint = Victim(Checkpoint(OLD, SCENARIOS["single"], victim.pid, first, results))
            daemon = ours(proxy.port, "--page-server-protocol", protocol)
            with destination(checkpoint, daemon, program, tmp_path / "old") as old:
                assert source.wait() == 1  # CRIU's takes one connection, and that was cut; its task goes on
                victim.kill()
                victim.wait(30)
                wait_for("its end there", lambda: "not connecting again" in old.server.story())
                another = start(program.command("single", tmp_path / "again"), cwd="/")
                wait_for("another victim", (tmp_path / "again" / "ready").exists)
                with OLD.lazy_dump(another.pid, second, *options) as other:
                    other.wait_ready()
                    expected = read_memory(another.pid, list(lazy_pages(second)))
                    old.go()  # what it needs now it does not get there
                    fetch([TcpServer("127.0.0.1", port)], list(expected)).check(expected)
                    assert other.wait() == 0
                assert proxy.connections == 1
                assert old.reports() == []
                old.give_up()


def left_away(checkpoint: Checkpoint, images: Path) -> Victim:
    leave_at_source(checkpoint.images, images)
    return Victim(
        Checkpoint(checkpoint.criu, checkpoint.scenario, checkpoint.pid, images, checkpoint.results)
    )


@pytest.mark.slow
def test_a_page_server_of_the_wrong_images(
    checkpoints: Checkpoints, program: Program, tmp_path: Path
) -> None:
    """Refused, by name; the right ones at the same address are taken. (At the start: test_first_contact.py)"""
    checkpoint, wrong = checkpoints.get(OLD, "single"), checkpoints.get(OLD, "plain")
    victim, port = left_away(checkpoint, tmp_path / "images"), free_port()
    at = ("127.0.0.1", "--port", str(port), "--keep-serving")
    with (
        nothing_left(),
        destination(victim, ours(port), program, tmp_path / "work", wait=False) as restored,
        page_server_at(*at, images=wrong.images, work=tmp_path / "wrong") as server,
    ):
        theirs, mine = (identify(which).digest.hex() for which in (wrong.images, tmp_path / "images"))
        wait_for("the refusal", lambda: f"({theirs}; the images: {mine})" in restored.server.story())
        wait_for("theirs", lambda: f"another checkpoint ({mine})" in server.story())
        server.process.terminate()
        assert server.wait() == 0
        with page_server_at(*at, images=checkpoint.images, work=tmp_path / "right"):
            restored.wait_restored(program)
            restored.check_memory()


@pytest.mark.slow
def test_a_page_server_without_an_inventory(
    checkpoints: Checkpoints, program: Program, tmp_path: Path
) -> None:
    """It can't say what it has, and says so at its start; no page is taken before it can."""
    checkpoint = checkpoints.get(OLD, "single")
    victim, bare, port = left_away(checkpoint, tmp_path / "images"), tmp_path / "bare", free_port()
    shutil.copytree(checkpoint.images, bare)
    (bare / "inventory.img").unlink()
    at = ("127.0.0.1", "--port", str(port), "--keep-serving")
    with (
        nothing_left(),
        destination(victim, ours(port), program, tmp_path / "work", wait=False) as restored,
        page_server_at(*at, images=bare, work=tmp_path / "server") as server,
    ):
        assert "without it the server can't identify this dump" in server.story()
        wait_for("the refusal", lambda: "does not identify its dump" in restored.server.story())
        server.process.terminate()
        assert server.wait() == 0
        shutil.copy(checkpoint.images / "inventory.img", bare)
        with page_server_at(*at, images=bare, work=tmp_path / "again"):
            restored.wait_restored(program)
            restored.check_memory()


@pytest.mark.slow
def test_a_directory_of_another_dump(program: Program, tmp_path: Path) -> None:
    """--source local:DIR with the same processes at another moment: refused before a restore can connect."""
    with running(OLD, "single", program, tmp_path) as victim:
        images, other = tmp_path / "images", tmp_path / "other"
        for directory in (images, other):
            check("dump", "-t", victim.pid, "-D", directory, "-R")
        leave_at_source(images, tmp_path / "left")
        command = [sys.executable, "-m", "lazypages", "serve", "-D", tmp_path / "left", "--source"]
        done = subprocess.run(
            [*command, f"local:{other}"], capture_output=True, timeout=60, check=False, text=True
        )
        assert done.returncode == 1
        assert f"{other}: is not of the same dump as {tmp_path / 'left'}" in done.stderr
