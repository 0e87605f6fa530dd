"""Start times: `PYTHONPATH=. python bench/start_time.py [--criu CRIU] [--rounds N]`.

Measures `lazypages serve` and `criu lazy-pages` alternately, from their start to readiness, to the first page that they
can deliver, and to the first page of a task that a real `criu restore` restores; the resident memory when
ready, including files; a resident `lazypages daemon` from a client's connection to readiness; and other commands from
start to exit. Prints medians and ranges.
"""

from __future__ import annotations

import argparse
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

from lazypages.bench import checkpoints, real, runs
from lazypages.bench.daemons import UNCOMPILED, Daemon
from lazypages.bench.errors import BenchError
from lazypages.bench.peers import CriuDaemon, LazyPages, Peer
from lazypages.bench.programs import Programs
from lazypages.bench.results import Results
from lazypages.bench.workloads import MIB, PAGE_SIZE, Layout, Order, Workload
from lazypages.resident.client import Client

PYTHON = [sys.executable]
RUN_TO_EXIT = {
    "python -c pass": [*PYTHON, "-c", "pass"],
    "lazypages --help": [*PYTHON, "-m", "lazypages", "--help"],
    "lazypages restore --help": [*PYTHON, "-m", "lazypages", "restore", "--help"],
    "dumptool --help": [*PYTHON, "-m", "dumptool", "--help"],
}
#: Seconds between two checks whether the restored task has its first page.
POLL = 0.0005
WORKLOAD = Workload("one touch", Layout(64 * MIB // PAGE_SIZE), Order.RANDOM, touches=1)


def exit_time(command: list[str]) -> float:
    environment = {name: value for name, value in os.environ.items() if name != UNCOMPILED}
    started = time.monotonic()
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL, env=environment)
    return time.monotonic() - started


def resident(pid: int) -> float:
    """Resident memory in MiB."""
    status = Path(f"/proc/{pid}/status").read_text()
    return int(status.partition("VmRSS:")[2].split()[0]) / 1024


def real_restore(peer: Peer, dumped: real.Dumped, work: Path) -> tuple[float, float]:
    """Seconds from the daemon's start to the restored task's first page, and its resident memory when it was ready."""
    os.truncate(dumped.results, 0)
    started = time.monotonic()
    with Daemon(peer.command(dumped.checkpoint, work, None), work / "daemon.out") as daemon:
        daemon.wait_ready()
        memory = resident(daemon.pid)
        command = ["unshare", "--pid", "--fork", "--kill-child", "--mount-proc", str(dumped.criu), "restore"]
        command += ["--lazy-pages", "-D", str(dumped.checkpoint.images), "-W", str(work), "-o", "restore.log"]
        with subprocess.Popen(command, stdin=subprocess.DEVNULL) as restore:
            # Polled from outside: the task's own clocks are those of a time namespace.
            while not has_touched(dumped.results) and restore.poll() is None:
                time.sleep(POLL)
            first = time.monotonic() - started
        daemon.end(runs.END_TIMEOUT)
    if restore.returncode:
        sys.exit(f"the restored task ended with {restore.returncode}: see {work}")
    return first, memory


def has_touched(results: Path) -> bool:
    try:
        return Results.read(results, 1).faults > 0
    except BenchError:
        return False


@contextmanager
def resident_daemon(folder: Path) -> Iterator[Path]:
    """The socket of a `lazypages daemon`."""
    path = folder / "daemon.socket"
    command = [*PYTHON, "-m", "lazypages", "daemon", "--socket", path]
    with subprocess.Popen(command, stderr=subprocess.DEVNULL) as daemon:
        while not path.exists() and daemon.poll() is None:
            time.sleep(POLL)
        yield path
        daemon.terminate()


def through(daemon: Path, images: Path, work: Path) -> float:
    """Seconds from the connection of a client until a restore can be started."""
    started = time.monotonic()
    with Client(daemon) as client:
        answer = client.request("serve", images=str(images), work=str(work))
        ready = time.monotonic() - started
        client.request("stop", restore=answer["restore"])
        client.request("wait", restore=answer["restore"])
    return ready


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--criu", type=Path, default=shutil.which("criu"), help="path of criu; without: no CRIU"
    )
    parser.add_argument("--rounds", type=int, default=15)
    arguments = parser.parse_args()
    seen: dict[str, list[float]] = defaultdict(list)
    with (
        tempfile.TemporaryDirectory(prefix="lazypages-start-") as name,
        resident_daemon(Path(name)) as daemon,
    ):
        folder = Path(name)
        programs = Programs.compile(folder)
        checkpoint = checkpoints.write(WORKLOAD, folder / "written", programs)
        peers: dict[str, Peer] = {"lazypages serve": LazyPages("ours")}
        dumped = None
        if arguments.criu:
            peers["criu lazy-pages"] = CriuDaemon("criu", arguments.criu)
            dumped = real.dump(replace(WORKLOAD, real=True), folder / "dumped", programs, arguments.criu)

        def place() -> Path:
            return Path(tempfile.mkdtemp(dir=folder))

        def serve(title: str, peer: Peer) -> None:
            found = runs.run(WORKLOAD, checkpoint, peer, programs, place(), criu=None).metrics
            seen[f"{title}: ready"].append(found["ready"] * 1e3)
            seen[f"{title}: first page"].append(found["first"] * 1e3)
            if dumped:
                first, memory = real_restore(peer, dumped, place())
                seen[f"{title}: first page, after criu restore"].append(first * 1e3)
                seen[f"{title}: resident when ready, MiB"].append(memory)

        def to_exit(title: str, command: list[str]) -> None:
            seen[f"{title}: exit"].append(exit_time(command) * 1e3)

        def client() -> None:
            seen["lazypages daemon: ready"].append(through(daemon, checkpoint.images, place()) * 1e3)

        turns: list[Callable[[], None]] = [client]
        turns += [lambda title=title, peer=peer: serve(title, peer) for title, peer in peers.items()]  # type: ignore[misc]
        turns += [lambda title=title, args=args: to_exit(title, args) for title, args in RUN_TO_EXIT.items()]  # type: ignore[misc]
        for number in range(arguments.rounds + 1):
            for turn in turns[number % len(turns) :] + turns[: number % len(turns)]:
                turn()
            if not number:
                seen.clear()  # discard the first round, which reads and compiles the modules
    for title, values in sorted(seen.items()):
        print(f"{title:62}{statistics.median(values):8.1f} ({min(values):.1f}-{max(values):.1f})")
    if arguments.criu:
        for column in ("ready", "first page", "first page, after criu restore"):
            by_criu(seen, f"lazypages serve: {column}", f"criu lazy-pages: {column}")
        by_criu(seen, "lazypages daemon: ready", "criu lazy-pages: ready")


def by_criu(seen: Mapping[str, list[float]], ours: str, theirs: str) -> None:
    """Prints the ratios of two rows, round by round."""
    ratios = [a / b for a, b in zip(seen[ours], seen[theirs], strict=True)]
    print(f"{f'{ours}, by CRIU':62}{statistics.median(ratios):8.2f} ({min(ratios):.2f}-{max(ratios):.2f})")


if __name__ == "__main__":
    main()
