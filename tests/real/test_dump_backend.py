"""`dumptool dump --backend criu`: CRIU saves everything but memory, dumptool the memory; real programs live on."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.real.test_criu_namespace import restore
from tests.real.test_dump_lazy import lazy_dump, ours, running
from tests.support.criu import Criu, all_criu
from tests.support.dumptool import check, reap_all, stats
from tests.support.processes import nothing_left
from tests.support.redis import redis
from tests.support.restore import Program, eager_restore

both = pytest.mark.parametrize("criu", all_criu())


def by_criu(criu: Criu) -> list[str]:
    """Options of dumptool."""
    return ["--backend", "criu", "--criu", str(criu.path)]


@both
def test_redis(criu: Criu, tmp_path: Path) -> None:
    """Dumped under load, after two pre-dumps. Every acknowledged key is there afterwards, and it can fork to save them."""
    images = tmp_path / "images"
    tcp = criu.version >= (4, 2)  # 4.1.1 can't dump an inet socket of Linux 6.16 or later (docs/backend.md)
    options = ["--tcp-close"] if tcp else []
    with nothing_left(), redis(tmp_path, tcp=tcp) as server:
        server.fill(8000)
        if tcp:
            server.load()
        check("pre-dump", "-t", server.pid, "-D", tmp_path / "1")
        check("pre-dump", "-t", server.pid, "-D", tmp_path / "2", "--prev-images-dir", "../1")
        said = check(
            *("dump", "-t", server.pid, "-D", images, "--prev-images-dir", "../2", *by_criu(criu), *options)
        )
        server.stop()
        reap_all()
        assert f"CRIU {'.'.join(map(str, criu.version))}" in said
        assert server.written > 8000 or not tcp
        counted = stats(images)
        assert counted.pages_skipped_parent > counted.pages_written
        criu.restore(images, *options, work=tmp_path, lazy=False)
        server.check()


@pytest.mark.slow
@both
@pytest.mark.parametrize("scenario", ["tree", "interpreter"])
def test_every_byte_after_a_plain_restore(
    criu: Criu, scenario: str, program: Program, tmp_path: Path
) -> None:
    """Without any daemon of ours: the images are complete ones of CRIU's."""
    with running(criu, scenario, program, tmp_path) as victim:
        check("dump", "-t", victim.pid, "-D", victim.checkpoint.images, *by_criu(criu))
        assert victim.has_ended()
        reap_all()
        with eager_restore(victim.checkpoint, tmp_path, victim.checkpoint.images) as restored:
            restored.go()
            assert restored.wait_tasks() == 0
            restored.check_verdict()


@pytest.mark.slow
@both
@pytest.mark.parametrize("scenario", ["tree", "threads"])
def test_lazily_from_the_stopped_tree(criu: Criu, scenario: str, program: Program, tmp_path: Path) -> None:
    """dumptool serves the memory of the tree that CRIU keeps stopped, and the tree ends when all has arrived."""
    work = tmp_path / "work"
    work.mkdir()
    with (
        running(criu, scenario, program, tmp_path) as victim,
        lazy_dump(victim.pid, victim.checkpoint.images, *by_criu(criu)) as source,
    ):
        source.wait_ready()
        with restore(victim.checkpoint, ours(source.port), work) as (restored, restorer):
            restored.go()
            assert restorer.wait(60) == 0
            restored.check_verdict()
            assert restored.server.wait() == 0
        assert source.wait() == 0
        assert victim.has_ended()
