"""Metrics of real restores: what a scraper reads is what the summaries say, and a scraper can harm no restore."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import threading
import time
from collections import Counter
from collections.abc import Mapping
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

from lazypages import __version__
from tests.support import metrics, schemas
from tests.support.criu import Criu
from tests.support.fake import PAGE, served_tasks
from tests.support.guard_processes import guards
from tests.support.metrics import scrape
from tests.support.processes import nothing_left, wait_for
from tests.support.remote import free_port, leave_at_source, our_page_server
from tests.support.resident import LAZYPAGES, connect, daemon, restored
from tests.support.restore import Checkpoints, lazy_restore, our_daemon
from tests.support.restore import Restored as CriuRestored

PAGES = 300

DOCS = Path(__file__).parents[2] / "docs" / "metrics.md"

every_loop = pytest.mark.parametrize("loop", ["uvloop", "asyncio", "trio"])


def expected(*summaries: Mapping[str, Any]) -> dict[str, float]:
    """What the metrics must be after these restores have ended."""
    for summary in summaries:
        schemas.check("stats.json", summary)
    tasks = [task for summary in summaries for task in summary["tasks"]]
    copied, answered, ended = Counter[str](), Counter[str](), Counter[str]()
    for task in tasks:
        for source, pages in task["pages"]["copied_by_source"].items():
            copied["parent" if source.startswith("parent-") else source] += pages
        for source, faults in task["faults"]["data_by_source"].items():
            answered["parent" if source.startswith("parent-") else source] += faults
        copied["zero"] += task["pages"]["zero"]
        answered["zero"] += task["faults"]["zero"]
        ended[task["state"]] += 1
    found: dict[str, float] = {
        "lazypages_faults_total": sum(task["faults"]["total"] for task in tasks),
        "lazypages_faults_deferred_total": sum(task["faults"]["put_off"] for task in tasks),
        "lazypages_poisoned_pages_total": sum(task["pages"]["poisoned"] for task in tasks),
        "lazypages_lost_pages": 0,
        "lazypages_pending_pages": 0,
        "lazypages_tasks": 0,
    }
    for source in ("local", "parent", "remote", "zero"):
        result = "zero" if source == "zero" else "data"
        found[f'lazypages_faults_answered_total{{result="{result}",source="{source}"}}'] = answered[source]
        found[f'lazypages_copied_bytes_total{{source="{source}"}}'] = copied[source] * PAGE
    for state in ("complete", "gone", "died", "ended", "lost", "killed"):
        found[f'lazypages_tasks_ended_total{{state="{state}"}}'] = ended[state]
    return found


def check(found: Mapping[str, float], *summaries: Mapping[str, Any]) -> None:
    wanted = expected(*summaries)
    assert {name: found[name] for name in wanted} == wanted
    answered = sum(value for name, value in found.items() if name.startswith("lazypages_faults_answered"))
    # a fault whose page the background has brought meanwhile is answered, too, but by no source
    timed = found["lazypages_fault_seconds_count"]
    assert answered <= timed <= found["lazypages_faults_total"]
    assert found['lazypages_fault_seconds_bucket{le="+Inf"}'] == timed
    longest = max(summary["service_time"]["max_us"] or 0 for summary in summaries) / 1e6
    assert 0 < found["lazypages_fault_seconds_sum"] <= timed * longest * 1.07
    # each bound: no quantile of the summaries contradicts it
    for summary in summaries:
        for name, value in found.items():
            if name.startswith("lazypages_fault_seconds_bucket") and "+Inf" not in name:
                bound = float(name.split('"')[1])
                assert value == timed or bound < max(longest, summary["service_time"]["p99_us"] / 1e6), name


@pytest.mark.loop("uvloop")
@every_loop
def test_scraped_while_tasks_are_restored(
    loop: str, checkpoints: Checkpoints, restored_program: Path, tmp_path: Path
) -> None:
    """Two restores of one daemon, one of them by real CRIU, scraped all the time: counters never decrease."""
    address, prom = str(tmp_path / "metrics.socket"), tmp_path / "lazypages.prom"
    scraped: list[metrics.Values] = []
    over = threading.Event()

    def keep_scraping() -> None:
        while not over.is_set():
            scraped.append(scrape(address))

    options = ("--loop", loop, "--metrics", address, "--metrics-textfile", str(prom))
    with daemon(tmp_path, *options) as resident:
        assert Path(address).stat().st_mode & 0o777 == 0o600
        scraper = threading.Thread(target=keep_scraping)
        scraper.start()
        try:
            checkpoint = checkpoints.get(Criu("4.2"), "tree")
            work = tmp_path / "work"
            work.mkdir()
            first = resident.serve(checkpoint.images, work=str(work))
            real = CriuRestored(checkpoint, work)
            checkpoint.restore(work)
            real.go()
            assert real.wait_tasks() == 0
            real.check_verdict()
            with restored(tmp_path / "b", restored_program, 2, PAGES) as tasks:
                second = resident.serve(tmp_path / "b", background=False)
                wait_for(
                    "a look at it",
                    lambda: scraped[-1]['lazypages_restores_served{state="waiting"}'] == 1,
                )
                connect(tasks, tmp_path / "b")
                tasks.say("touch 100")

                def missed() -> int:
                    return int(resident.status()[second]["pages"]["pending"])

                wait_for("the pages", lambda: 0 < missed() <= 2 * (PAGES - 100))
                wait_for("a look at it", lambda: scraped[-1]["lazypages_pending_pages"] == missed())
                assert scraped[-1]["lazypages_tasks"] == 2
                assert scraped[-1]['lazypages_restores_served{state="serving"}'] == 1
                tasks.say("check")
                assert tasks.statuses() == [0, 0]
            summaries = [resident.request("wait", restore=number)["summary"] for number in (first, second)]
            wait_for("the last one", lambda: scrape(address)["lazypages_tasks"] == 0)
            last = scrape(address)
        finally:
            over.set()
            scraper.join()
        check(last, *summaries)
        assert last['lazypages_restores_total{result="complete"}'] == 2
        assert last['lazypages_restores_total{result="failed"}'] == 0
        assert last["lazypages_restore_last_page_seconds_count"] == 2
        taken = sum(summary["seconds"] for summary in summaries)
        assert last["lazypages_restore_last_page_seconds_sum"] == pytest.approx(taken, abs=1e-5)
        assert last["lazypages_restore_first_page_seconds_count"] == 2
        assert 0 < last["lazypages_restore_first_page_seconds_sum"] <= taken
        assert any(f'version="{__version__}"' in name for name in last if name.startswith("lazypages_build"))
        assert last["process_open_fds"] > 5
        for before, after in pairwise(scraped):
            for name, value in before.items():
                if "_total" in name or "_bucket" in name or name.endswith(("_sum", "_count")):
                    assert after[name] >= value, name
        resident.request("shutdown")
        assert resident.wait() == 0
        assert not Path(address).exists()
        check(metrics.textfile(prom), *summaries)
        assert [path for path in tmp_path.iterdir() if path.suffix not in {".log", ".out", ".prom"}] == [
            path for path in tmp_path.iterdir() if path.is_dir()
        ]


def test_serve_leaves_its_last_numbers_in_the_textfile(restored_program: Path, tmp_path: Path) -> None:
    """Scraped over TCP while it runs; at the end the file has what --stats-json has."""
    address = f"127.0.0.1:{free_port()}"
    options = ("--no-background", "--metrics", address, "--metrics-textfile", "x.prom")
    with served_tasks(restored_program, tmp_path, 2, PAGES, *options) as (tasks, server):
        tasks.say("touch 7")
        wait_for("pages", lambda: 0 < scrape(address)["lazypages_pending_pages"] <= 2 * (PAGES - 7))
        for guard in guards():
            os.kill(guard, 9)
        wait_for("another guard", lambda: scrape(address)["lazypages_guard_restarts_total"] == 1)
        tasks.say("check")
        assert tasks.statuses() == [0, 0]
        assert server.wait() == 0
    found = metrics.textfile(tmp_path / "x.prom")
    check(found, json.loads((tmp_path / "stats.json").read_text()))
    assert found['lazypages_restores_total{result="complete"}'] == 1
    assert (tmp_path / "x.prom").stat().st_mode & 0o444 == 0o444


@pytest.mark.slow
def test_pages_of_a_page_server(checkpoints: Checkpoints, tmp_path: Path) -> None:
    """Real CRIU; half of the pages are at the source."""
    checkpoint = checkpoints.get(Criu("4.2"), "single")
    images, address, prom = tmp_path / "images", str(tmp_path / "metrics.socket"), tmp_path / "x.prom"
    leave_at_source(checkpoint.images, images, share=0.5)
    with nothing_left(), our_page_server(checkpoint.images, tmp_path) as (port, server):
        options = ["--source", f"tcp://127.0.0.1:{port}", "--no-background"]
        options += ["--metrics", address, "--metrics-textfile", str(prom)]
        with lazy_restore(checkpoint, our_daemon(*options), tmp_path, images) as tasks:
            found = scrape(address)
            assert found["lazypages_page_servers"] == found["lazypages_page_servers_connected"] == 1
            tasks.check_all()
            found = metrics.textfile(prom)
            check(found, tasks.stats())
            assert found['lazypages_copied_bytes_total{source="remote"}'] > 0
            assert found['lazypages_faults_answered_total{result="data",source="remote"}'] > 0
        assert server.wait() == 0


@pytest.mark.slow
def test_lost_pages(restored_program: Path, tmp_path: Path) -> None:
    prom = tmp_path / "x.prom"
    with served_tasks(
        restored_program, tmp_path, 1, PAGES, "--no-background", "--metrics-textfile", str(prom)
    ) as (tasks, server):
        tasks.say("touch 10")
        os.truncate(tmp_path / "pages-1.img", 20 * PAGE)
        tasks.tell("check")
        assert server.wait() == 1
    found, stats = metrics.textfile(prom), json.loads((tmp_path / "stats.json").read_text())
    check(found, stats)
    assert found["lazypages_poisoned_pages_total"] > 0
    assert found['lazypages_restores_total{result="failed"}'] == 1
    assert found["lazypages_restore_last_page_seconds_count"] == 0


@pytest.mark.slow
def test_hostile_scrapers(restored_program: Path, tmp_path: Path) -> None:
    """Clients that say nothing, too much, or do not read: tasks get their pages, and others their answers."""
    address = str(tmp_path / "metrics.socket")

    def client(data: bytes = b"") -> socket.socket:
        sock = socket.socket(socket.AF_UNIX)
        sock.settimeout(20)
        sock.connect(address)
        sock.sendall(data)
        return sock

    with served_tasks(restored_program, tmp_path, 1, PAGES, "--no-background", "--metrics", address) as (
        tasks,
        server,
    ):
        silent = client()
        idle = [client() for _ in range(30)]
        slow = [client(b"GET /metrics HTTP/1.1\r\nHost: x\r\nX: ") for _ in range(10)]
        began = time.monotonic()
        tasks.say("touch 50")
        assert time.monotonic() - began < 4  # no client is given up before
        descriptors = len(os.listdir(f"/proc/{server.pid}/fd"))
        assert descriptors < 100
        for sock in (*idle, *slow):
            sock.close()
        for data, status in (
            (b"\x16\x03\x01\x02\x00" * 20 + b"\r\n\r\n", b"400"),
            (b"GET /metrics HTTP/1.1\r\nHost: x\r\nX: " + b"y" * 20_000, b"431"),
            (b"GET /metrics HTTP/9\r\n\r\n", b"400"),
            (b"POST /metrics HTTP/1.1\r\nHost: x\r\n\r\n", b"405"),
            (b"GET /other HTTP/1.0\r\n\r\n", b"404"),
        ):
            with client(data) as sock:
                assert sock.recv(4096).startswith(b"HTTP/1.1 " + status), data[:40]
        assert metrics.get(address, method="HEAD")[0] == 405
        unread = client(b"GET /metrics HTTP/1.1\r\nHost: x\r\n\r\n")
        assert 0 < scrape(address)["lazypages_faults_total"] <= 50
        unread.close()
        with silent:  # is closed when its time is over
            assert silent.recv(1) == b""
        status, kind, text = metrics.get(address, accept="application/openmetrics-text;version=1.0.0")
        assert status == 200
        assert kind.startswith("application/openmetrics-text")
        documented = DOCS.read_text()
        for name in metrics.names(text):
            assert name.startswith("process_") or f"`{name}" in documented, name
        tasks.say("check")
        assert tasks.statuses() == [0]
        assert server.wait() == 0
        assert "Traceback" not in server.story()


@pytest.mark.parametrize("command", ["serve", "daemon"])
def test_refused_at_the_start(command: str, restored_program: Path, tmp_path: Path) -> None:
    """In one line, and before a restore could connect. tests/unit/test_export_options.py has the other reasons."""
    with restored(tmp_path / "r", restored_program, 1, 1):
        base = {"serve": ["-D", str(tmp_path / "r")], "daemon": ["--socket", str(tmp_path / "d.socket")]}
        done = subprocess.run(
            [*LAZYPAGES, command, *base[command], "--metrics", "0.0.0.0:0"],
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
        )
        assert done.returncode == 1
        assert "other hosts could read it" in done.stderr
        assert len(done.stderr.splitlines()) == 1
