"""`lazypages serve --trace`: what is in the file is what happened to real tasks."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections import Counter
from pathlib import Path

from lazypages.engine._uffd import lib
from lazypages.engine.events import TaskEventKind
from lazypages.engine.trace import Ring
from lazypages.observe.tracing import REMOTE, ZERO, Kind, Record, Trace, read_trace
from lazypages.wording import duration
from tests.support.criu import Criu
from tests.support.fake import BASE, PAGE, restored_tasks, serve, served_tasks, write_images
from tests.support.processes import wait_for
from tests.support.remote_task import claim, deliver
from tests.support.restore import Checkpoints, lazy_restore, our_daemon
from tests.support.uffd import BASE as OTHER_BASE
from tests.support.uffd import RANDOM, PagesFile, Service

PAGES = 600
REMOTE_SOURCE = 0xFFFFFFFE  # csrc/common/extent.h


def faults_and_answers(records: list[Record]) -> tuple[Counter[tuple[int, int]], Counter[tuple[int, int]]]:
    """(memory, time of the fault) of both: an answer says how long ago the fault was read."""
    faults = Counter((r.memory, r.time) for r in records if r.kind == Kind.FAULT)
    answers = Counter((r.memory, r.time - r.detail) for r in records if r.kind == Kind.ANSWERED)
    return faults, answers


def test_every_fault_of_every_task_is_in_the_trace(restored_program: Path, tmp_path: Path) -> None:
    with served_tasks(restored_program, tmp_path, 3, PAGES, "--no-background", "--trace", "trace") as (
        tasks,
        server,
    ):
        tasks.say("check")
        assert tasks.statuses() == [0, 0, 0]
        assert server.wait() == 0
    trace = read_trace(tmp_path / "trace")
    stats = json.loads((tmp_path / "stats.json").read_text())
    assert trace.complete
    assert trace.dropped == 0
    assert {known["pid"]: known["levels"] for known in trace.header["tasks"]} == {
        pid: ["local"] for pid in tasks.pids
    }
    records = list(trace)
    times = [record.time for record in records if record.kind in {Kind.FAULT, Kind.ANSWERED}]
    assert times == sorted(times)  # one thread's
    faults, answers = faults_and_answers(records)
    assert faults == answers
    assert faults.total() == stats["faults"]
    for task in stats["tasks"]:
        own = [record for record in records if record.task == task["pid"]]
        served = [record for record in own if record.kind == Kind.ANSWERED]
        assert len(served) == task["faults"]["total"]
        assert {trace.source_name(record.task, record.source) for record in served} == {"local"}
        # each page once, and with its fault among them
        brought = [page for r in served for page in range(r.addr // PAGE, r.addr // PAGE + r.pages)]
        assert sorted(brought) == list(range(BASE // PAGE, BASE // PAGE + PAGES))
        fault_at = {record.time: record.addr for record in own if record.kind == Kind.FAULT}
        for record in served:
            assert record.addr <= fault_at[record.time - record.detail] < record.addr + record.pages * PAGE
        assert [r.pages for r in own if r.kind == Kind.MEMORY] == [PAGES]
        assert sum(r.kind == Kind.COMPLETE for r in own) == 1


def test_a_page_of_the_trace_has_the_numbers_of_the_summary(restored_program: Path, tmp_path: Path) -> None:
    with served_tasks(restored_program, tmp_path, 2, PAGES, "--no-background", "--trace", "trace") as (
        tasks,
        server,
    ):
        tasks.say("check")
        assert tasks.statuses() == [0, 0]
        assert server.wait() == 0
    stats = json.loads((tmp_path / "stats.json").read_text())
    picture = tmp_path / "trace.html"
    command = [sys.executable, "-m", "lazypages", "plot", str(tmp_path / "trace"), "-o", str(picture)]
    subprocess.run(command, check=True, timeout=60)
    page = picture.read_text()
    for times, faults in [
        (stats["service_time"], stats["faults"]),
        *((task["service_time"], task["faults"]["total"]) for task in stats["tasks"]),
    ]:
        p50, p99, longest = (duration(times[name] * 1000) for name in ("p50_us", "p99_us", "max_us"))
        assert f"<h3>faults: {faults:,}, p50 {p50}, p99 {p99}, max {longest}</h3>" in page
    assert '"name":"restore finished"' in page
    assert f"task {tasks.pids[0]} (restored), memory" in page


def test_background_transfer_is_in_the_trace(restored_program: Path, tmp_path: Path) -> None:
    with served_tasks(restored_program, tmp_path, 2, PAGES, "--trace", str(tmp_path / "elsewhere")) as (
        tasks,
        server,
    ):
        assert server.wait() == 0
        tasks.say("check")
        assert tasks.statuses() == [0, 0]
    records = [record for record in read_trace(tmp_path / "elsewhere") if record.kind == Kind.BROUGHT]
    assert sum(record.pages for record in records) == 2 * PAGES
    assert {record.source for record in records} == {0}
    assert all(0 < record.detail < 60e9 for record in records)


def test_real_criu_restore(checkpoints: Checkpoints, tmp_path: Path) -> None:
    """Forks and layout events of a task that changes its memory in every way."""
    checkpoint = checkpoints.get(Criu("4.1"), "family")
    with lazy_restore(checkpoint, our_daemon("--no-background", "--trace", "trace"), tmp_path) as restored:
        restored.check_all()
        stats = restored.stats()
    records = list(read_trace(restored.work / "trace"))
    kinds = Counter(record.kind for record in records)
    for name, kind in (
        ("fork", Kind.FORKED),
        ("remap", Kind.REMAPPED),
        ("remove", Kind.REMOVED),
        ("unmap", Kind.UNMAPPED),
    ):
        assert kinds[kind] == sum(task["events"][name] for task in stats["tasks"]), name
    assert kinds[Kind.FAULT] == stats["faults"]
    assert kinds[Kind.MEMORY] == len(stats["tasks"])
    parents = {record.memory: record.detail for record in records if record.kind == Kind.MEMORY}
    assert all(parent == 0 or parent in parents for parent in parents.values())
    assert sum(parent != 0 for parent in parents.values()) == kinds[Kind.FORKED]


def test_what_was_written_before_a_kill_is_readable(restored_program: Path, tmp_path: Path) -> None:
    path = tmp_path / "trace"
    with served_tasks(restored_program, tmp_path, 1, PAGES, "--no-background", "--trace", "trace") as (
        tasks,
        server,
    ):
        tasks.say("touch 5")
        wait_for("an answer in the file", lambda: any(r.kind == Kind.ANSWERED for r in read_trace(path)))
        os.kill(tasks.pids[0], signal.SIGKILL)  # it would read zeros
        os.kill(server.pid, signal.SIGKILL)
        tasks.statuses()
    trace = read_trace(path)
    assert not trace.complete
    assert any(record.kind == Kind.FAULT for record in trace)


def drained(ring: Ring, path: Path) -> list[Record]:
    with path.open("wb") as out:
        assert lib.lp_trace_drain(ring.handle, out.fileno()) >= 0
    return list(Trace(path, {}, memoryview(path.read_bytes())))


def test_pages_from_elsewhere_zeros_and_poison(tmp_path: Path) -> None:
    ring, file = Ring(1 << 10), PagesFile(8)
    extents = [(OTHER_BASE, 2, 0, 0), (OTHER_BASE + 2 * PAGE, 4, 0, REMOTE_SOURCE)]
    with Service(ring) as service:
        task = service.task()
        uffd = task.open_uffd()
        task.map((OTHER_BASE, 8))
        served = service.serve(uffd, extents, [(OTHER_BASE, 8)], file, max_readahead=1)
        task.check(OTHER_BASE + 6 * PAGE, 1, 0)
        task.tell_check(OTHER_BASE + 2 * PAGE, 1, file.first_id + 2)
        need = service.wait(TaskEventKind.NEED, served)
        assert deliver(served, need.dump_addr, file.page_bytes(2)) == 1
        task.reply()
        assert claim(served, 1)[1] == 1
        served.fail_remote(OTHER_BASE + 3 * PAGE, 1, lost=True)
        assert served.poison(everything=True) == 5
    records = drained(ring, tmp_path / "out")
    found = [
        (record.kind, record.source, (record.addr - OTHER_BASE) // PAGE, record.pages)
        for record in records
        if record.kind not in {Kind.MEMORY, Kind.COMPLETE, Kind.GONE, Kind.FAULT}
    ]
    assert found[:6] == [
        (Kind.ANSWERED, ZERO, 6, 1),
        (Kind.WANTED, REMOTE, 2, 1),
        (Kind.ARRIVED, REMOTE, 2, 1),
        (Kind.ANSWERED, REMOTE, 2, 1),
        (Kind.FETCHED, REMOTE, 3, 1),
        (Kind.LOST, REMOTE, 3, 1),
    ]
    poisoned = [(source, first, pages) for kind, source, first, pages in found[6:] if kind == Kind.POISONED]
    assert poisoned == [(0, 0, 2), (REMOTE, 3, 1), (REMOTE, 4, 2)]
    faults, answers = faults_and_answers(records)
    assert faults == answers


def test_a_ring_that_is_too_small_costs_records_and_no_pages(tmp_path: Path) -> None:
    ring, file, pages = Ring(16), PagesFile(512), 512
    with Service(ring) as service:
        task = service.task()
        uffd = task.open_uffd()
        task.map((OTHER_BASE, pages))
        served = service.serve(
            uffd, [(OTHER_BASE, pages, 0, 0)], [(OTHER_BASE, pages)], file, max_readahead=1
        )
        task.check(OTHER_BASE, pages, file.first_id, order=RANDOM)
        service.wait(TaskEventKind.COMPLETE, served)
        faults = served.stats().faults
    records = drained(ring, tmp_path / "out")
    assert len(records) == 17  # what fitted, and how many did not
    assert records[-1].kind == Kind.DROPPED
    # also a start, a completion and perhaps an end
    assert 2 * faults <= ring.written + ring.dropped <= 2 * faults + 3
    assert records[-1].pages == ring.dropped


def test_a_trace_that_can_not_be_made_is_told_before_anybody_waits(
    restored_program: Path, tmp_path: Path
) -> None:
    with restored_tasks(restored_program, 1, PAGES) as tasks:
        write_images(tmp_path, tasks.pids, PAGES)
        with serve(tmp_path, "--trace", "no/such/place") as server:
            assert server.wait() == 1
            assert "--trace" in server.story()
            assert "/no/such does not exist: create it first" in server.story()


def test_a_daemon_that_is_refused_empties_no_trace(restored_program: Path, tmp_path: Path) -> None:
    """Perhaps that of the daemon which has the socket."""
    with restored_tasks(restored_program, 1, PAGES) as tasks:
        write_images(tmp_path, tasks.pids, PAGES)
        (tmp_path / "trace").write_text("precious")
        with serve(tmp_path) as other:
            other.wait_ready()
            with serve(tmp_path, "--trace", "trace") as server:
                assert server.wait() == 1
            os.kill(other.pid, signal.SIGTERM)
            other.wait()
        with serve(tmp_path, "--trace", "trace", "--page-server", "--tls", "--tls-cacert", "none") as server:
            assert server.wait() == 1
        assert (tmp_path / "trace").read_text() == "precious"
