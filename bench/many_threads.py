"""Tasks with very many threads that fault at once: `PYTHONPATH=. python bench/many_threads.py [--criu CRIU]`.

`lazypages serve` and `criu lazy-pages` alternately serve a task that a real `criu restore` restores. All its
threads touch missing memory as soon as they run, while the background brings the rest
(tests/support/programs/threads.c):

* 1,000 and 5,000 threads that read 16 pages each,
* 1,000 threads that read the used part of their stacks and end, each with a change of the layout.

The task checks every byte. Prints medians and ranges over rounds; ratios are computed round by round.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from lazypages.bench.daemons import Daemon
from lazypages.bench.errors import BenchError

SOURCE = Path(__file__).parents[1] / "tests/support/programs/threads.c"
#: Most seconds of one restore and the run of its task; and of the daemon's exit after that.
TIMEOUT = 180.0
END_TIMEOUT = 30.0
POLL = 0.005


class Case(NamedTuple):
    title: str
    kind: str
    threads: int
    pages: int
    #: Pages of other memory, which the background brings first; without them it is done before all threads run.
    ballast: int


CASES = (
    Case("1,000 threads fault at once", "heap", 1000, 16, 1 << 18),
    Case("5,000 threads fault at once", "heap", 5000, 16, 1 << 19),
    Case("1,000 threads touch their stacks and end", "stacks", 1000, 4, 1 << 18),
)


class Seen(NamedTuple):
    """Seconds: from the start until the last thread is done; median and longest wait of a thread for a page."""

    took: float
    median: float
    longest: float
    stats: dict[str, int]


def wait_for(what: str, done: Callable[[], bool], timeout: float = TIMEOUT) -> None:
    deadline = time.monotonic() + timeout
    while not done():
        if time.monotonic() > deadline:
            raise BenchError(f"{what}: not after {timeout:g} s")
        time.sleep(POLL)


def dump(case: Case, program: Path, criu: Path, folder: Path) -> Path:
    """Make a checkpoint of the case in folder/images. Its threads continue as soon as they are restored."""
    images = folder / "images"
    images.mkdir(parents=True)
    ready, go = folder / "ready", folder / "go"
    command = [
        program,
        case.kind,
        str(case.threads),
        str(case.pages),
        str(case.ballast),
        ready,
        go,
        folder / "results",
    ]
    null = subprocess.DEVNULL
    with subprocess.Popen(
        command, stdin=null, stdout=null, stderr=null, cwd="/", start_new_session=True, env={}
    ) as task:
        try:
            wait_for("the threads stand", ready.exists)
            subprocess.run(
                [criu, "dump", "-t", str(task.pid), "-D", images, "-o", "dump.log", "-v1"],
                check=True,
                stdin=null,
                timeout=TIMEOUT,
            )
        finally:
            task.kill()
    go.touch()
    return images


def restore(command: list[str], criu: Path, images: Path, work: Path) -> Seen:
    """Restore and run the task once. Raises BenchError unless it ends in order with all bytes right."""
    results = images.parent / "results"
    results.unlink(missing_ok=True)
    command = [*command, "-D", str(images), "-W", str(work)]
    with Daemon(command, work / "daemon.out") as daemon:
        daemon.wait_ready()
        restorer = ["unshare", "--pid", "--fork", "--kill-child", "--mount-proc", str(criu), "restore"]
        restorer += ["--lazy-pages", "-D", str(images), "-W", str(work), "-o", "restore.log", "-v1"]
        with subprocess.Popen(restorer, stdin=subprocess.DEVNULL) as restored:
            try:
                wait_for("the end of the task", lambda: restored.poll() is not None)
            except BenchError as error:
                raise BenchError(f"{error}\n{daemon.story()}") from None
            finally:
                restored.kill()
        code = daemon.end(END_TIMEOUT)
        if not results.exists() or restored.returncode:
            raise BenchError(
                f"the task ended with {restored.returncode}, the daemon with {code}\n{daemon.story()}"
            )
    took, median, longest, wrong = map(int, results.read_text().split())
    if wrong:
        raise BenchError(f"WRONG MEMORY: {wrong} pages")
    stats = work / "stats.json"
    counts = json.loads(stats.read_text())["tasks"][0] if stats.exists() else {}
    return Seen(took / 1e9, median / 1e9, longest / 1e9, counts)


def spread(values: list[float], digits: int) -> str:
    return f"{statistics.median(values):.{digits}f} ({min(values):.{digits}f}-{max(values):.{digits}f})"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--criu",
        type=Path,
        default=os.environ.get("LAZYPAGES_CRIU") or shutil.which("criu"),
        help="path of criu",
    )
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--only", default="", help="only cases whose title contains this")
    parser.add_argument("--alone", action="store_true", help="without CRIU's daemon")
    parser.add_argument("--counts", action="store_true", help="also print the counters of our daemon")
    arguments = parser.parse_args()
    if not arguments.criu:
        sys.exit("name a CRIU: --criu PATH")
    with tempfile.TemporaryDirectory(prefix="lazypages-threads-") as name:
        program = Path(name) / "threads"
        subprocess.run(["cc", "-O2", "-pthread", "-o", program, SOURCE], check=True)
        peers = {"lazypages serve": [sys.executable, "-m", "lazypages", "serve"]}
        if not arguments.alone:
            peers["criu lazy-pages"] = [str(arguments.criu), "lazy-pages", "-v1"]
        for number, case in enumerate(case for case in CASES if arguments.only in case.title):
            images = dump(case, program, arguments.criu, Path(name) / str(number))
            seen: dict[str, list[Seen]] = {peer: [] for peer in peers}
            failed = dict.fromkeys(peers, 0)
            for turn in range(arguments.rounds):
                for peer, command in sorted(peers.items(), reverse=bool(turn % 2)):
                    work = Path(tempfile.mkdtemp(dir=name))
                    ours = ["--stats-json", str(work / "stats.json")] if peer == "lazypages serve" else []
                    try:
                        seen[peer].append(restore([*command, *ours], arguments.criu, images, work))
                    except BenchError as error:
                        failed[peer] += 1
                        print(f"{case.title}: {peer}: {error}", file=sys.stderr)
            print(f"\n{case.title} ({case.pages} pages each), {arguments.rounds} rounds")
            for peer, runs in seen.items():
                if runs:
                    print(
                        f"  {peer:18} {spread([run.took for run in runs], 3)} s; wait of a thread: "
                        f"median {spread([run.median * 1e3 for run in runs], 2)} ms, "
                        f"longest {spread([run.longest * 1e3 for run in runs], 0)} ms; failed: {failed[peer]}"
                    )
                if arguments.counts and runs and runs[-1].stats:
                    print(f"    {runs[-1].stats}")
            if not arguments.alone and all(len(runs) == arguments.rounds for runs in seen.values()):
                ours_, theirs = seen.values()
                ratios = [a.took / b.took for a, b in zip(ours_, theirs, strict=True)]
                print(f"  ours by CRIU's     {spread(ratios, 2)}")


if __name__ == "__main__":
    main()
