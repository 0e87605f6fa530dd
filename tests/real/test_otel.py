"""A span for each restore, received by a collector over OTLP/HTTP."""

from __future__ import annotations

import json
import os
import socket
import time
from pathlib import Path

import pytest

from lazypages import __version__
from tests.support.collector import collector
from tests.support.fake import PAGE, served_tasks
from tests.support.processes import wait_for
from tests.support.resident import connect, daemon, restored

PAGES = 200


def test_spans_of_a_daemon(restored_program: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One of a restore that is complete, one of a restore that lost pages."""
    with collector() as found:
        for name, value in found.environment.items():
            monkeypatch.setenv(name, value)
        monkeypatch.setenv("OTEL_RESOURCE_ATTRIBUTES", "host.name=here")
        with daemon(tmp_path, "--otel") as resident:
            with restored(tmp_path / "a", restored_program, 2, PAGES) as tasks:
                first = resident.serve(tmp_path / "a")
                connect(tasks, tmp_path / "a")
                tasks.say("check")
                summary = resident.request("wait", restore=first)["summary"]
            with restored(tmp_path / "b", restored_program, 1, PAGES) as tasks:
                second = resident.serve(tmp_path / "b", background=False)
                connect(tasks, tmp_path / "b")
                tasks.say("touch 5")
                os.truncate(tmp_path / "b" / "pages-1.img", 20 * PAGE)
                tasks.tell("check")
                lost = resident.request("wait", restore=second)
                assert lost["exit"] == 1
            resident.request("shutdown")
            assert resident.wait() == 0
        complete, failed = sorted(found.spans, key=lambda span: span.attributes["lazypages.restore"])
    assert complete.name == failed.name == "restore"
    assert complete.resource["service.name"] == "lazypages"
    assert complete.resource["service.version"] == __version__
    assert complete.resource["host.name"] == "here"
    assert complete.attributes == {
        "lazypages.restore": first,
        "lazypages.images": str(tmp_path / "a"),
        "lazypages.tasks": 2,
        "lazypages.faults": summary["faults"],
        "lazypages.copied_bytes": summary["bytes_copied"],
        "lazypages.poisoned_pages": 0,
    }
    assert complete.events.keys() == {"first page", "tasks run", "complete"}
    assert 0 <= complete.events["first page"] <= complete.events["complete"] <= complete.seconds
    assert not complete.failed
    assert failed.failed
    assert (
        failed.attributes["lazypages.poisoned_pages"] == lost["summary"]["tasks"][0]["pages"]["poisoned"] > 0
    )
    assert failed.events.keys() == {"first page", "tasks run", "poisoned"}


@pytest.mark.slow
def test_a_collector_that_does_not_answer(
    restored_program: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It delays the end by three seconds, no page, and changes no exit status."""
    with socket.socket() as silent:
        silent.bind(("127.0.0.1", 0))
        silent.listen()
        monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", f"http://127.0.0.1:{silent.getsockname()[1]}")
        with served_tasks(restored_program, tmp_path, 1, PAGES, "--otel") as (tasks, server):
            tasks.say("check")
            assert tasks.statuses() == [0]
            wait_for("the summary", lambda: "1 complete" in server.story())
            began = time.monotonic()
            assert server.wait() == 0
            assert time.monotonic() - began < 15
            assert "--otel: the last spans were not sent" in server.story()
    assert json.loads((tmp_path / "stats.json").read_text())["ok"]


@pytest.mark.slow
def test_no_collector(restored_program: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The log says so."""
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", "http://127.0.0.1:1")
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_TIMEOUT", "1")
    with served_tasks(restored_program, tmp_path, 1, PAGES, "--otel") as (tasks, server):
        tasks.say("check")
        assert tasks.statuses() == [0]
        assert server.wait() == 0
        assert "WARNING --otel: " in server.story()
        assert "Traceback" not in server.story()
