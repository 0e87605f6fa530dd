"""The bench itself: real faults, and it notices wrong memory and daemons that fail."""

from __future__ import annotations

import json
import socket
import threading
import time
from dataclasses import dataclass
from pathlib import Path

import pytest
from click.testing import CliRunner

from lazypages.bench import checkpoints, checks, runs
from lazypages.bench.checkpoints import Checkpoint
from lazypages.bench.checks import OF_OURS
from lazypages.bench.daemons import Daemon
from lazypages.bench.errors import BenchError
from lazypages.bench.peers import BOTH, LIMIT, OURS, BareLoop, LazyPages, Peer, all_peers
from lazypages.bench.programs import Programs
from lazypages.bench.suite import Suite
from lazypages.bench.workloads import Layout, Order, Source, Workload
from lazypages.cli.bench import bench_command
from tests.support.criu import RELEASES, Criu

PAGES = 2048


@pytest.fixture(scope="module")
def programs(tmp_path_factory: pytest.TempPathFactory) -> Programs:
    return Programs.compile(tmp_path_factory.mktemp("programs"))


WORKLOADS = (
    Workload("random", Layout(PAGES), Order.RANDOM, 200),
    Workload("sequential", Layout(PAGES), Order.SEQUENTIAL, PAGES),
    Workload("chase", Layout(PAGES), Order.CHASE, 200),
    Workload("writes", Layout(PAGES), Order.RANDOM, 200, write=True),
    Workload("threads", Layout(PAGES), Order.RANDOM, 200, threads=4),
    Workload("tasks", Layout(64, tasks=10), Order.RANDOM, 20, turns=True),
    Workload("fragmented", Layout(PAGES, stride=2, sparse=True), Order.RANDOM, 200),
    Workload("chain", Layout(PAGES, depth=5), Order.RANDOM, 200),
    Workload("background", Layout(PAGES), Order.RANDOM, 200, background=True, passes=True),
    Workload("fragmented background", Layout(PAGES, stride=2), Order.RANDOM, 200, background=True),
    Workload("cold", Layout(PAGES), Order.RANDOM, 1, background=True, cold=True),
    Workload("remote", Layout(PAGES, source=Source.REMOTE), Order.RANDOM, 200),
    Workload("remote, TLS", Layout(PAGES, source=Source.REMOTE, tls=True), Order.RANDOM, 200),
    Workload(
        "remote background, TLS",
        Layout(PAGES, source=Source.REMOTE, tls=True),
        Order.RANDOM,
        200,
        background=True,
    ),
    Workload("far", Layout(PAGES, source=Source.REMOTE, round_trip=20), Order.RANDOM, 10),
    Workload(
        "far background", Layout(PAGES, source=Source.REMOTE, round_trip=1), Order.RANDOM, 1, background=True
    ),
    Workload("restored by criu", Layout(PAGES), Order.RANDOM, 200, background=True, passes=True, real=True),
)


@pytest.mark.slow
@pytest.mark.parametrize("workload", WORKLOADS, ids=[workload.name for workload in WORKLOADS])
def test_every_peer_gives_the_right_memory(workload: Workload, programs: Programs, tmp_path: Path) -> None:
    criu = [(f"criu {release}", Criu(release).path) for release in RELEASES]
    everybody = all_peers(programs, criu[:1] if workload.real else criu, traced=True)
    (row,) = Suite(programs, everybody, tmp_path, 1, lambda _: None).run([workload])
    assert list(checks.failures(row)) == []
    for peer in everybody:
        assert (peer.name in row.rounds) == (peer.cannot(workload) is None), row.absent
    for name, (run,) in row.rounds.items():
        assert len(run.touches.ns) == workload.touches * workload.layout.tasks, name
        assert run.metrics["faults"] > 0, name
    for name in OF_OURS:
        for ours in row.rounds.get(name, []):
            assert ours.stats
            assert ours.stats["ok"]


def test_a_link_has_its_delay_and_loses_nothing(programs: Programs, tmp_path: Path) -> None:
    """What is sent comes back by way of an echo, each byte, and not before its time."""
    data = bytes(range(256)) * (1 << 14)
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port = probe.getsockname()[1]
    with socket.create_server(("127.0.0.1", 0)) as echo:
        link = [str(programs.delay), "--listen", str(port), "--to", str(echo.getsockname()[1])]
        with Daemon([*link, "--ns", str(50_000_000)], tmp_path / "out") as daemon:
            daemon.wait_ready()
            with socket.create_connection(("127.0.0.1", port)) as client, echo.accept()[0] as server:
                thread = threading.Thread(target=_echo, args=(server,))
                thread.start()
                start = time.monotonic()
                client.sendall(data[:1])
                assert client.recv(1) == data[:1]
                assert time.monotonic() - start >= 0.1
                sender = threading.Thread(target=client.sendall, args=(data,))
                sender.start()
                found = bytearray()
                while len(found) < len(data):
                    found += client.recv(1 << 20)
                assert found == data
                sender.join()
                client.shutdown(socket.SHUT_WR)
                assert client.recv(1) == b""  # the end comes through, too
                thread.join()


def _echo(server: socket.socket) -> None:
    while data := server.recv(1 << 20):
        server.sendall(data)
    server.shutdown(socket.SHUT_WR)


@dataclass(frozen=True, slots=True)
class Broken(Peer):
    """A daemon that ends instead of serving."""

    def cannot(self, workload: Workload) -> str | None:
        return None

    def command(self, checkpoint: Checkpoint, work: Path, port: int | None) -> list[str]:
        return ["sh", "-c", "echo no, I will not >&2; exit 3"]


def test_wrong_memory_is_noticed(programs: Programs, tmp_path: Path) -> None:
    workload = Workload("", Layout(PAGES), Order.RANDOM, 200)
    right = checkpoints.write(workload, tmp_path / "right", programs)
    # the data of the task after it: not zero, and not the right page
    Path(right.flat % 1).unlink()
    programs.fill_pages(Path(right.flat % 1), [(0, 2, 0, PAGES, 1)], None)
    work = tmp_path / "work"
    work.mkdir()
    with pytest.raises(BenchError, match="WRONG MEMORY"):
        runs.run(workload, right, BareLoop(LIMIT, programs), programs, work, criu=None)


def test_zeros_are_noticed(programs: Programs, tmp_path: Path) -> None:
    workload = Workload("", Layout(PAGES), Order.RANDOM, 200)
    checkpoint = checkpoints.write(workload, tmp_path / "checkpoint", programs)
    pages = Path(checkpoint.flat % 1)
    pages.write_bytes(bytes(pages.stat().st_size))
    work = tmp_path / "work"
    work.mkdir()
    with pytest.raises(BenchError, match="WRONG MEMORY"):
        runs.run(workload, checkpoint, LazyPages(OURS), programs, work, criu=None)


def test_a_daemon_that_does_not_serve_is_absent_from_its_row(programs: Programs, tmp_path: Path) -> None:
    workload = Workload("", Layout(PAGES), Order.RANDOM, 200)
    peers = [Broken("broken"), BareLoop(LIMIT, programs)]
    (row,) = Suite(programs, peers, tmp_path, 2, lambda _: None).run([workload])
    assert "no, I will not" in row.absent["broken"]
    assert len(row.rounds[LIMIT]) == 2
    assert list(checks.failures(row))


@pytest.mark.slow
def test_the_command_writes_tables_json_and_a_picture(tmp_path: Path) -> None:
    json_path, picture = tmp_path / "bench.json", tmp_path / "bench.png"
    arguments = [
        "--quick",
        "--only",
        "writes, 16 MiB",
        "--only",
        "remote: random",
        "--only",
        "20 tasks",
        "--no-criu",
        "--dir",
        str(tmp_path),
    ]
    arguments += ["--json", str(json_path), "--plot", str(picture)]
    result = CliRunner().invoke(bench_command, arguments, catch_exceptions=False)
    assert result.exit_code == 0, result.output
    assert "p99.9 us" in result.output
    document = json.loads(json_path.read_text())
    assert [row["workload"]["name"] for row in document["rows"]] == [
        "writes, 16 MiB",
        "20 tasks",
        "remote: random, 16 MiB",
    ]
    remote = {peer["name"]: peer for peer in document["rows"][2]["peers"]}
    assert "name a CRIU" in remote[OURS]["absent"]  # for its page server
    assert remote[BOTH]["medians"]["p50"] > 0
    ours = document["rows"][0]["peers"][0]
    assert ours["name"] == OURS
    assert ours["medians"]["p50"] > 0
    assert document["machine"]["kernel"]
    assert picture.stat().st_size > 1000
    assert not list(tmp_path.glob("lazypages-bench-*"))


def test_nothing_left_to_measure_is_an_error() -> None:
    result = CliRunner().invoke(bench_command, ["--only", "no such workload", "--no-criu"])
    assert isinstance(result.exception, BenchError)


def test_a_criu_that_does_not_run_is_named() -> None:
    result = CliRunner().invoke(bench_command, ["--criu", "/no/such/criu"])
    assert isinstance(result.exception, BenchError)
    assert "/no/such/criu" in str(result.exception)
