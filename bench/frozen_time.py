"""Frozen time of a dump: `bench/frozen_time.py [--size MIB…] [--dirty MIB] [--criu CRIU] [--repeat N]`, and see --help.

A task fills SIZE of memory and then keeps writing to DIRTY of it. Compared: a full dump by dumptool and by CRIU, and
dumptool's dump after two pre-dumps, by its own code and with CRIU as its backend. Those of its own code are also
measured with the task ended, for which all files must be on the disk first, and the same with --no-sync. Times are the
tools' own (stats-dump): medians in milliseconds.
"""

from __future__ import annotations

import argparse
import mmap
import os
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from images_spec.images import Kind, read_one
from images_spec.messages import DumpStatsEntry

MIB = 1 << 20
PEERS = (
    "dumptool",
    "dumptool, ended",
    "dumptool, ended, --no-sync",
    "dumptool after pre-dumps",
    "dumptool after pre-dumps, ended",
    "dumptool after pre-dumps, ended, --no-sync",
    "dumptool by criu",
    "dumptool by criu after pre-dumps",
    "criu",
)


def victim(size: int, dirty: int, shared: int) -> None:
    """Fill memory, report that, and keep writing."""
    kind = mmap.MAP_SHARED if shared else mmap.MAP_PRIVATE
    memory = mmap.mmap(-1, size * MIB, flags=kind | mmap.MAP_ANONYMOUS)
    block = os.urandom(MIB)
    for at in range(size):
        memory[at * MIB : (at + 1) * MIB] = block[at % MIB :] + block[: at % MIB]
    Path("ready").touch()
    count = 0
    while True:
        count += 1
        for page in range(0, dirty * MIB, mmap.PAGESIZE):
            memory[page] = count & 0xFF
        time.sleep(0.05)


@contextmanager
def running(size: int, dirty: int, shared: bool, folder: Path) -> Iterator[int]:
    """Start the victim; return it when it is ready."""
    (folder / "ready").unlink(missing_ok=True)
    process = subprocess.Popen(
        [sys.executable, __file__, "--victim", *map(str, (size, dirty, int(shared)))],
        cwd=folder,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
        env=os.environ | {"PYTHONPATH": str(Path(__file__).parent.parent)},
    )
    try:
        while not (folder / "ready").exists():
            if process.poll() is not None:
                sys.exit("the victim has ended")
            time.sleep(0.02)
        yield process.pid
    finally:
        process.send_signal(signal.SIGKILL)
        process.wait()


def run(*command: str | Path) -> None:
    result = subprocess.run([str(word) for word in command], capture_output=True, text=True, check=False)
    if result.returncode:
        sys.exit(f"{' '.join(map(str, command))}: exit {result.returncode}\n{result.stderr}")


def dumptool(action: str, pid: int, images: Path, *options: str) -> DumpStatsEntry:
    run(sys.executable, "-m", "dumptool", action, "-t", str(pid), "-D", images, *options)
    return read_one(images / Kind.STATS.file_name("dump"), Kind.STATS).dump


def measure(peer: str, pid: int, folder: Path, criu: str) -> DumpStatsEntry:
    """One dump."""
    top = folder / "top"
    if peer == "criu":
        top.mkdir()
        run(criu, "dump", "-t", str(pid), "-D", top, "-R", "-o", "dump.log")
        return read_one(top / Kind.STATS.file_name("dump"), Kind.STATS).dump
    options = ["--no-sync"] if "--no-sync" in peer else []
    if "ended" not in peer:
        options.append("-R")
    if "by criu" in peer:
        options += ["--backend", "criu", "--criu", criu]
    if "pre-dumps" not in peer:
        return dumptool("dump", pid, top, *options)
    dumptool("pre-dump", pid, folder / "0")
    dumptool("pre-dump", pid, folder / "1", "--prev-images-dir", "../0")
    return dumptool("dump", pid, top, "--prev-images-dir", "../1", *options)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--size", type=int, nargs="+", default=[64, 1024, 4096], help="MiB of the task")
    parser.add_argument("--dirty", type=int, default=16, help="MiB that it keeps writing")
    parser.add_argument("--shared", action="store_true", help="the memory is shared (MAP_SHARED)")
    parser.add_argument("--criu", default=shutil.which("criu") or "", help="path of criu; empty: without")
    parser.add_argument("--repeat", type=int, default=3)
    parser.add_argument("--peer", nargs="+", default=PEERS, choices=PEERS, metavar="PEER", help="only these")
    parser.add_argument("--victim", type=int, nargs=3, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.victim:
        victim(*arguments.victim)
    print(f"Linux {os.uname().release}, {os.cpu_count()} CPUs; {arguments.dirty} MiB written all the time")
    print(f"{'task':>9}  {'':44}{'freezing':>10}{'frozen':>10}{'pages written':>15}")
    for size in arguments.size:
        for peer in arguments.peer:
            if "criu" in peer and not arguments.criu:
                continue
            found = []
            with tempfile.TemporaryDirectory(prefix="lazypages-frozen-") as name:
                place, left = Path(name), arguments.repeat
                while left:
                    with running(size, arguments.dirty, arguments.shared, place) as pid:
                        for _ in range(1 if "ended" in peer else left):
                            folder = place / str(left)
                            folder.mkdir()
                            found.append(measure(peer, pid, folder, arguments.criu))
                            shutil.rmtree(folder)
                            left -= 1
            freezing = statistics.median(one.freezing_time for one in found) / 1000
            frozen = statistics.median(one.frozen_time for one in found) / 1000
            pages = statistics.median(one.pages_written + one.shpages_written for one in found)
            print(f"{size:>5} MiB  {peer:44}{freezing:>10.1f}{frozen:>10.1f}{pages:>15.0f}", flush=True)


main()
