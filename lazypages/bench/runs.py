"""One run: a daemon, a task whose memory it serves, and the metrics of both."""

from __future__ import annotations

import json
import os
import select
import subprocess
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lazypages.bench import certificates
from lazypages.bench.checkpoints import BASE, Checkpoint
from lazypages.bench.daemons import Daemon
from lazypages.bench.errors import BenchError
from lazypages.bench.peers import Peer, stats_path
from lazypages.bench.programs import Programs
from lazypages.bench.remote import page_server
from lazypages.bench.results import Results, Touches
from lazypages.bench.workloads import Order, Source, Workload

#: Most seconds of a run; a run that hangs fails.
RUN_TIMEOUT = 300.0
#: Seconds between two samples of a daemon's memory, after latencies were measured.
LOOK_INTERVAL = 0.02
#: Seconds for a daemon to exit after its tasks have.
END_TIMEOUT = 10.0


@dataclass(frozen=True, slots=True)
class Run:
    """The results of a run. ``metrics``: by key of METRICS. ``stats``: --stats-json of our daemon, None for others."""

    metrics: dict[str, float]
    touches: Touches
    stats: dict[str, Any] | None


def run(
    workload: Workload,
    checkpoint: Checkpoint,
    peer: Peer,
    programs: Programs,
    work: Path,
    *,
    criu: Path | None,
) -> Run:
    """Serve `checkpoint` with `peer` while the task runs `workload`. All files are in the empty directory `work`.

    ``criu``: for the page server of a remote source. Raises BenchError if a byte was wrong, if a process fails, or
    after RUN_TIMEOUT.
    """
    if workload.cold:
        _drop_from_cache(checkpoint)
    results = work / "results"
    results.touch()
    with ExitStack() as stack:
        port = None
        if peer.takes_remote and workload.layout.source is Source.REMOTE:
            if workload.layout.tls:
                certificates.write(work)
            server = peer.server(criu, checkpoint.served, work)
            port = stack.enter_context(page_server(server, work, programs, workload.layout.round_trip))
        daemon = stack.enter_context(Daemon(peer.command(checkpoint, work, port), work / "daemon.out"))
        daemon.wait_ready()
        daemon.wait_settled()
        loop_before = daemon.main_thread_cpu()
        with _task(_task_command(workload, checkpoint, peer, programs, work), work / "task.out") as task:
            try:
                _wait_touched(task, daemon)
                loop = daemon.main_thread_cpu() - loop_before
                daemon.look()
                _let_continue(task)
                daemon.watch(lambda: task.poll() is not None, LOOK_INTERVAL, RUN_TIMEOUT)
                found = Results.read(results, workload.layout.tasks * workload.threads)
                _check_exit(task)
            except BenchError as error:
                output = (work / "task.out").read_text(errors="replace")
                raise BenchError(f"{error}\ntask: {output}\n{peer.name}: {daemon.story()}") from None
        daemon.end(END_TIMEOUT)
    metrics = found.metrics() | daemon.metrics()
    if peer.is_ours and len(found.touches.ns) > 1:
        metrics["loop"] = loop / max(1, found.faults) * 1e6
    metrics["first"] = daemon.settled + found.first_touch_after_connect()
    return Run(metrics, found.touches, read_stats(work))


def read_stats(work: Path) -> dict[str, Any] | None:
    """The statistics of our daemon; None if there are none."""
    try:
        stats: dict[str, Any] = json.loads(stats_path(work).read_text())
    except OSError:
        return None
    return stats


def _drop_from_cache(checkpoint: Checkpoint) -> None:
    """Drop the pages files from the page cache: POSIX_FADV_DONTNEED drops clean pages that no process maps."""
    for path in checkpoint.files():
        fd = os.open(path, os.O_RDONLY)
        try:
            os.fsync(fd)
            os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
        finally:
            os.close(fd)


def _task_command(
    workload: Workload, checkpoint: Checkpoint, peer: Peer, programs: Programs, work: Path
) -> list[str]:
    layout = workload.layout
    options: dict[str, object] = {
        "work": work,
        "results": work / "results",
        "order": checkpoint.order,
        "base": BASE,
        "pages": layout.span,
        "stride": layout.stride,
        "tasks": layout.tasks,
        "threads": workload.threads,
    }
    if peer.cpu is not None:
        options["cpu"] = peer.cpu
    switches = {
        "write": workload.write,
        "chase": workload.order is Order.CHASE,
        "turns": workload.turns,
        "background": workload.background,
        "pass": workload.passes,
    }
    command = [str(programs.task)]
    for name, value in options.items():
        command += [f"--{name}", str(value)]
    return [*command, *(f"--{name}" for name, on in switches.items() if on), "restored"]


@contextmanager
def _task(command: list[str], errors: Path) -> Iterator[subprocess.Popen[bytes]]:
    with (
        errors.open("wb") as stream,
        subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=stream) as task,
    ):
        try:
            yield task
        finally:
            task.kill()


def _wait_touched(task: subprocess.Popen[bytes], daemon: Daemon) -> None:
    assert task.stdout is not None
    deadline = time.monotonic() + RUN_TIMEOUT
    while not select.select([task.stdout], [], [], END_TIMEOUT)[0]:
        if time.monotonic() > deadline:
            raise BenchError(f"the task has not made all touches after {RUN_TIMEOUT:g} s")
        if daemon.has_ended():
            raise BenchError("the daemon has ended before the task made all touches")
    if task.stdout.readline() != b"touched\n":
        raise BenchError("the task did not make all touches")


def _check_exit(task: subprocess.Popen[bytes]) -> None:
    if task.returncode:
        raise BenchError(f"the task ended with {task.returncode}")


def _let_continue(task: subprocess.Popen[bytes]) -> None:
    assert task.stdin is not None
    task.stdin.write(b"\n")
    task.stdin.flush()
