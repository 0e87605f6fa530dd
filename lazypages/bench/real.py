"""Rows with a task that real CRIU dumps and restores.

The task is restored in a PID namespace of its own, so that its pid is free.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import time
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

from images_spec import flags, pagemap
from images_spec.images import Kind
from images_spec.pagemap import Pagemap, pages_name
from lazypages.bench.checkpoints import BASE, Checkpoint
from lazypages.bench.daemons import Daemon
from lazypages.bench.errors import BenchError
from lazypages.bench.peers import Peer
from lazypages.bench.programs import Programs
from lazypages.bench.remote import page_server
from lazypages.bench.results import Results
from lazypages.bench.runs import END_TIMEOUT, LOOK_INTERVAL, RUN_TIMEOUT, Run, read_stats
from lazypages.bench.workloads import Source, Workload

FILL_TIMEOUT = 120.0


@dataclass(frozen=True, slots=True)
class Dumped:
    """A checkpoint of `criu`. ``results``: file that the task writes after each restore."""

    workload: Workload
    checkpoint: Checkpoint
    criu: Path
    results: Path


def dump(workload: Workload, folder: Path, programs: Programs, criu: Path) -> Dumped:
    """Start the task, let it fill its memory, and dump it with CRIU into the new directory `folder`.

    Raises BenchError.
    """
    folder.mkdir(parents=True)
    full = folder / "images"
    full.mkdir()
    order, results, go = folder / "order", folder / "results", folder / "go"
    order.write_bytes(workload.order_of_touches().tobytes())
    command = [str(programs.task), "--results", str(results), "--order", str(order), "--go", str(go)]
    command += ["--base", str(BASE), "--pages", str(workload.layout.pages)]
    command += ["--pass", "victim"] if workload.passes else ["victim"]
    null = subprocess.DEVNULL
    with subprocess.Popen(
        command, stdin=null, stdout=null, stderr=null, cwd="/", start_new_session=True, env={}
    ) as task:
        try:
            _wait_for(results.exists, task)
            _criu(criu, "dump", folder, "-t", str(task.pid), "-D", str(full))
        finally:
            task.kill()
    go.touch()
    images = full
    if workload.layout.source is Source.REMOTE:
        images = folder / "remote"
        _leave_lazy_pages(full, images)
    return Dumped(workload, Checkpoint(workload.layout, images, full, "", order), criu, results)


def run(dumped: Dumped, peer: Peer, programs: Programs, work: Path) -> Run:
    """Restore the task with `peer` as the daemon, in the empty directory `work`. Raises BenchError as runs.run does."""
    workload, checkpoint = dumped.workload, dumped.checkpoint
    os.truncate(dumped.results, 0)
    with ExitStack() as stack:
        port = None
        if workload.layout.source is Source.REMOTE:
            server = peer.server(dumped.criu, checkpoint.served, work)
            port = stack.enter_context(page_server(server, work, programs, workload.layout.round_trip))
        daemon = stack.enter_context(Daemon(peer.command(checkpoint, work, port), work / "daemon.out"))
        daemon.wait_ready()
        # Without --detach CRIU waits for the task. The namespace ends with CRIU.
        command = ["unshare", "--pid", "--fork", "--kill-child", "--mount-proc", str(dumped.criu), "restore"]
        command += ["--lazy-pages", "-D", str(checkpoint.images), "-W", str(work), "-o", "restore.log", "-v1"]
        with subprocess.Popen(command, stdin=subprocess.DEVNULL) as restore:
            try:
                daemon.watch(lambda: restore.poll() is not None, LOOK_INTERVAL, RUN_TIMEOUT)
                found = Results.read(dumped.results, workload.layout.tasks * workload.threads)
            except BenchError as error:
                raise BenchError(
                    f"{error}\n{_log(work / 'restore.log')}\n{peer.name}: {daemon.story()}"
                ) from None
            finally:
                restore.kill()
        daemon.end(END_TIMEOUT)
    return Run(found.metrics() | daemon.metrics(), found.touches, read_stats(work))


def _criu(criu: Path, action: str, work: Path, *arguments: str) -> None:
    log = f"{action}.log"
    try:
        subprocess.run(
            [criu, action, "-W", work, "-o", log, "-v1", *arguments],
            check=True,
            capture_output=True,
            stdin=subprocess.DEVNULL,
            timeout=RUN_TIMEOUT,
        )
    except subprocess.SubprocessError as error:
        raise BenchError(f"{error}\n{_log(work / log)}") from None


def _log(path: Path) -> str:
    try:
        return path.read_text(errors="replace")[-2000:]
    except OSError:
        return ""


def _wait_for(done: Callable[[], bool], task: subprocess.Popen[bytes]) -> None:
    deadline = time.monotonic() + FILL_TIMEOUT
    while not done():
        if task.poll() is not None or time.monotonic() > deadline:
            raise BenchError("the task did not fill its memory")
        time.sleep(0.01)


def _leave_lazy_pages(full: Path, images: Path) -> None:
    """Copy a checkpoint without the data of its lazy pages, as `criu dump --lazy-pages` writes it."""
    shutil.copytree(full, images, ignore=shutil.ignore_patterns("pages-*", "pagemap-*"))
    for path in full.glob(Kind.PAGEMAP.file_name("*")):
        whole = Pagemap.load(path)
        name = pages_name(whole.pages_id)
        offset = 0
        entries = []
        with (full / name).open("rb") as source, (images / name).open("wb") as target:
            for vaddr, nr_pages, bits in whole:
                size = nr_pages * flags.PAGE_SIZE if bits & flags.PE_PRESENT else 0
                lazy = bits & flags.PE_LAZY
                if not lazy:
                    source.seek(offset)
                    target.write(source.read(size))
                offset += size
                entries.append((vaddr, nr_pages, lazy or bits))
        pagemap.write(images / path.name, whole.pages_id, entries)
