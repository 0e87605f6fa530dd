"""Latency of a page server's answers to GETs on loopback: `bench/get_latency.py --criu CRIU [--rounds N]`.

One client sends one request at a time, for one page (as for a fault) and for 16, alternately to `lazypages page-server
--lazy-pages` and `criu page-server --lazy-pages`; with a pause of 20 us in which the client works, as a task does
between faults, and without. Every page is checked. Prints medians over rounds in microseconds, and ratios by round.
"""

from __future__ import annotations

import argparse
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from lazypages.bench import checkpoints
from lazypages.bench.daemons import Daemon
from lazypages.bench.pipes import raised_pipe_limit
from lazypages.bench.programs import FLAGS, Programs
from lazypages.bench.remote import page_server
from lazypages.bench.workloads import PAGE_SIZE, Layout, Order, Workload

COUNT = 3000


def compile_client(folder: Path) -> Path:
    client = folder / "get_latency"
    source = Path(__file__).with_suffix(".c")
    subprocess.run([os.environ.get("CC", "cc"), *FLAGS, "-o", client, source], check=True)
    return client


@contextmanager
def serving(peer: str, criu: str, images: Path, work: Path) -> Iterator[tuple[int, int]]:
    """Run a page server; yields (port, size of its headers in bytes)."""
    if peer == "criu":
        release = subprocess.run([criu, "--version"], capture_output=True, text=True, check=True).stdout
        header = 24 if tuple(map(int, release.split()[1].split(".")[:2])) < (4, 2) else 32
        with page_server(Path(criu), images, work) as port:
            yield port, header
        return
    output = work / "ours.out"
    command = [sys.executable, "-m", "lazypages", "page-server", "--lazy-pages", "-D", str(images)]
    with Daemon(command, output) as server:
        server.wait_ready()
        yield int(output.read_text().partition("127.0.0.1:")[2].split()[0]), 24


def measure(client: Path, *arguments: int) -> list[float]:
    """Latencies in microseconds, sorted. The arguments are those of get_latency.c."""
    command = [str(client), *map(str, arguments)]
    said = subprocess.run(command, capture_output=True, text=True, check=False)
    if said.returncode:
        sys.exit(f"{command}: {said.stderr}")
    return sorted(int(line) / 1000 for line in said.stdout.split())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--criu", default=shutil.which("criu") or "", help="path of criu")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--size", type=int, default=64, help="MiB")
    arguments = parser.parse_args()
    pages = (arguments.size << 20) // PAGE_SIZE
    print(f"Linux {os.uname().release}, {os.cpu_count()} CPUs, load {os.getloadavg()[0]:.1f}")
    print(
        f"{'pages':>5} {'pause':>6}   {'ours p50':>9} {'p99':>7}   {'criu p50':>9} {'p99':>7}   ratio of p50 (range)"
    )
    with tempfile.TemporaryDirectory(prefix="lazypages-get-") as name, raised_pipe_limit():
        folder = Path(name)
        client = compile_client(folder)
        workload = Workload("get", Layout(pages), Order.RANDOM, 1)
        images = checkpoints.write(workload, folder / "images", Programs.compile(folder)).images
        for batch, think in ((1, 0), (1, 20_000), (16, 20_000)):
            found: dict[str, list[list[float]]] = {"ours": [], "criu": []}
            for turn in range(arguments.rounds):
                for peer in sorted(found, reverse=bool(turn % 2)):
                    with serving(peer, arguments.criu, images, folder) as (port, header):
                        where = (checkpoints.FIRST_PID, checkpoints.BASE, pages, 1)
                        found[peer].append(measure(client, port, header, *where, COUNT, batch, think))
            cells = []
            for runs in found.values():
                p50, p99 = (statistics.median(run[len(run) * q // 100] for run in runs) for q in (50, 99))
                cells.append(f"{p50:>9.1f} {p99:>7.1f}")
            ratios = [
                ours[COUNT // 2] / theirs[COUNT // 2]
                for ours, theirs in zip(found["ours"], found["criu"], strict=True)
            ]
            spread = f"{statistics.median(ratios):.2f} ({min(ratios):.2f}-{max(ratios):.2f})"
            print(f"{batch:>5} {think / 1000:>3.0f} us   {cells[0]}   {cells[1]}   {spread}", flush=True)


main()
