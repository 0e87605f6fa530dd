"""Start times: `PYTHONPATH=. python bench/start_time.py [--criu CRIU] [--rounds N]`.

Measures `lazypages serve` and `criu lazy-pages` alternately, from their start to readiness, to the first page that they
can deliver, and to the first page of a task that a real `criu restore` restores; the resident memory when
ready, including files; and other commands from start to exit. Prints medians and ranges.
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
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from lazypages.bench import checkpoints, real, runs
from lazypages.bench.daemons import UNCOMPILED, Daemon
from lazypages.bench.errors import BenchError
from lazypages.bench.peers import CriuDaemon, LazyPages, Peer
from lazypages.bench.programs import Programs
from lazypages.bench.results import Results
from lazypages.bench.workloads import MIB, PAGE_SIZE, Layout, Order, Workload

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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--criu", type=Path, default=shutil.which("criu"), help="path of criu; without: no CRIU"
    )
    parser.add_argument("--rounds", type=int, default=15)
    arguments = parser.parse_args()
    seen: dict[str, list[float]] = defaultdict(list)
    with tempfile.TemporaryDirectory(prefix="lazypages-start-") as name:
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

        turns: list[Callable[[], None]] = []
        turns += [lambda title=title, peer=peer: serve(title, peer) for title, peer in peers.items()]  # type: ignore[misc]
        turns += [lambda title=title, args=args: to_exit(title, args) for title, args in RUN_TO_EXIT.items()]  # type: ignore[misc]
        for number in range(arguments.rounds + 1):
            for turn in turns[number % len(turns) :] + turns[: number % len(turns)]:
                turn()
            if not number:
                seen.clear()  # discard the first round, which reads and compiles the modules
    for title, values in sorted(seen.items()):
        print(f"{title:62}{statistics.median(values):8.1f} ({min(values):.1f}-{max(values):.1f})")
    for column in ("ready", "first page", "first page, after criu restore"):
        if arguments.criu:
            ours, theirs = (seen[f"{peer}: {column}"] for peer in peers)
            ratios = [a / b for a, b in zip(ours, theirs, strict=True)]
            median, low, high = statistics.median(ratios), min(ratios), max(ratios)
            print(f"{'ours by CRIU: ' + column:62}{median:8.2f} ({low:.2f}-{high:.2f})")


if __name__ == "__main__":
    main()
