"""The dashboard's expressions, asked of a real Prometheus that has scraped a real daemon during restores."""

from __future__ import annotations

import json
import math
import os
import signal
import subprocess
import urllib.parse
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from prometheus_client import generate_latest

from lazypages.export.families import Metrics
from tests.support.fake import PAGE
from tests.support.guard_processes import guards
from tests.support.processes import start, wait_for
from tests.support.remote import free_port
from tests.support.resident import connect, daemon, restored

ROOT = Path(__file__).parents[2]
DASHBOARD = ROOT / "packaging" / "grafana" / "lazypages.json"
DOCS = ROOT / "docs" / "metrics.md"

PAGES = 300
INTERVAL = "250ms"

#: Grafana's, as it fills them in for this Prometheus.
VARIABLES = {"$__rate_interval": "1m", "$job": "lazypages", "$instance": ".*"}


class Prometheus:
    def __init__(self, port: int) -> None:
        self._base = f"http://127.0.0.1:{port}"

    def get(self, path: str, **query: str) -> Any:
        url = f"{self._base}{path}?{urllib.parse.urlencode(query)}"
        with urllib.request.urlopen(url, timeout=20) as answer:
            return json.loads(answer.read())

    def is_ready(self) -> bool:
        try:
            with urllib.request.urlopen(f"{self._base}/-/ready", timeout=5):
                return True
        except OSError:
            return False

    def query(self, expression: str) -> list[float]:
        """The current values of an expression."""
        answer = self.get("/api/v1/query", query=expression)
        assert answer["status"] == "success", answer
        return [float(series["value"][1]) for series in answer["data"]["result"]]

    def names(self) -> set[str]:
        return set(self.get("/api/v1/label/__name__/values")["data"])


@contextmanager
def prometheus(folder: Path, target: str) -> Iterator[Prometheus]:
    """It ends with the block of `nothing_left` that this is in."""
    port = free_port()
    config = folder / "prometheus.yml"
    config.write_text(
        f"global: {{scrape_interval: {INTERVAL}, scrape_timeout: {INTERVAL}}}\n"
        f"scrape_configs: [{{job_name: lazypages, static_configs: [{{targets: ['{target}']}}]}}]\n"
    )
    process = start(
        [
            "prometheus",
            f"--config.file={config}",
            f"--storage.tsdb.path={folder}/tsdb",
            f"--web.listen-address=127.0.0.1:{port}",
        ],
        output=folder / "prometheus.log",
    )
    server = Prometheus(port)
    wait_for("Prometheus", lambda: process.poll() is not None or server.is_ready())
    assert process.poll() is None, (folder / "prometheus.log").read_text()
    yield server
    process.send_signal(signal.SIGTERM)
    process.wait(30)


def expressions() -> dict[str, str]:
    """By the titles of their panels."""
    found = {}
    for panel in json.loads(DASHBOARD.read_text())["panels"]:
        for target in panel.get("targets", ()):
            text = target["expr"]
            for variable, value in VARIABLES.items():
                text = text.replace(variable, value)
            assert "$" not in text
            found[f"{panel['title']} {target['refId']}"] = text
    return found


def test_panels_have_their_places() -> None:
    panels = json.loads(DASHBOARD.read_text())["panels"]
    assert len({panel["id"] for panel in panels}) == len(panels)
    taken: set[tuple[int, int]] = set()
    for panel in panels:
        at = panel["gridPos"]
        assert at["x"] + at["w"] <= 24
        cells = {(x, y) for x in range(at["x"], at["x"] + at["w"]) for y in range(at["y"], at["y"] + at["h"])}
        assert not cells & taken, panel["title"]
        taken |= cells


@pytest.mark.slow
def test_every_expression_has_data(restored_program: Path, tmp_path: Path) -> None:
    address = f"127.0.0.1:{free_port()}"
    with daemon(tmp_path, "--metrics", address) as resident, prometheus(tmp_path, address) as server:
        wait_for("a first scrape", lambda: server.query("lazypages_faults_total") == [0])
        with restored(tmp_path / "a", restored_program, 2, PAGES) as tasks:
            number = resident.serve(tmp_path / "a", background=False)
            connect(tasks, tmp_path / "a")
            tasks.say("touch 100")
            wait_for("a scrape", lambda: server.query("lazypages_pending_pages > 0"))
            for guard in guards():
                os.kill(guard, signal.SIGKILL)
            tasks.say("check")
            summary = resident.request("wait", restore=number)["summary"]
        with restored(tmp_path / "b", restored_program, 1, PAGES) as tasks:
            number = resident.serve(tmp_path / "b", background=False)
            connect(tasks, tmp_path / "b")
            tasks.say("touch 5")
            os.truncate(tmp_path / "b" / "pages-1.img", 20 * PAGE)
            tasks.tell("check")
            lost = resident.request("wait", restore=number)["summary"]
        ended = "sum(lazypages_restores_total)"
        wait_for("the last scrape", lambda: server.query(ended) == [2])
        faults = summary["faults"] + lost["faults"]
        assert server.query("lazypages_faults_total") == [faults]
        copied = summary["bytes_copied"] + lost["bytes_copied"]
        assert server.query('lazypages_copied_bytes_total{source="local"}') == [copied]
        poisoned = lost["tasks"][0]["pages"]["poisoned"]
        assert server.query("lazypages_poisoned_pages_total") == [poisoned]
        assert server.query("lazypages_guard_restarts_total") == [1]
        for title, expression in expressions().items():
            values = server.query(expression)
            assert values, f"{title}: {expression}"
            assert not all(math.isnan(value) for value in values), f"{title}: {expression}"
        used = " ".join(expressions().values())
        for name in server.names():
            base = name.removesuffix("_bucket").removesuffix("_sum").removesuffix("_count")
            assert not name.startswith("lazypages") or base in used or name in NOT_SHOWN, name


#: Metrics of which the dashboard has no panel.
NOT_SHOWN = {"lazypages_faults_total", "lazypages_faults_deferred_total"}


def test_the_alerts_of_the_docs_are_rules(tmp_path: Path) -> None:
    text = DOCS.read_text()
    rules = next(block for block in text.split("```") if block.startswith("yaml\ngroups:"))
    (tmp_path / "rules.yml").write_text(rules.removeprefix("yaml\n"))
    done = subprocess.run(
        ["promtool", "check", "rules", tmp_path / "rules.yml"],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert "SUCCESS: 4 rules found" in done.stdout


def test_the_linter_of_prometheus_finds_nothing() -> None:
    metrics = Metrics()
    done = subprocess.run(
        ["promtool", "check", "metrics"],
        input=generate_latest(metrics.registry).decode(),
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert (done.returncode, done.stderr) == (0, "")
