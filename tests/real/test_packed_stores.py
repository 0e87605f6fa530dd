"""Real `criu restore --lazy-pages` whose pages come from a packed checkpoint in a store, every byte compared."""

from __future__ import annotations

import random
import re
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from lazypages.cli.main import cli
from tests.support.blocked import wait_for_faults
from tests.support.criu import Criu
from tests.support.packs import BY_FAULTS, NEWEST, packed, work_in
from tests.support.restore import Checkpoints, lazy_restore, our_daemon
from tests.support.stores import ILLS, BadStore, Store, nginx, seaweed


@pytest.fixture(scope="module")
def s3(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Store]:
    with seaweed(tmp_path_factory.mktemp("seaweed")) as store:
        yield store


@pytest.fixture(autouse=True)
def _environment(s3: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    """Credentials, as everybody who uses S3 gives them."""
    for name, value in s3.environment().items():
        monkeypatch.setenv(name, value)


@contextmanager
def bad_store(s3: Store, plan: Callable[[], str], monkeypatch: pytest.MonkeyPatch) -> Iterator[BadStore]:
    """What everybody who uses S3 finds in its place."""
    with BadStore(s3.port, plan) as proxy:
        monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{proxy.port}")
        yield proxy


@pytest.mark.loop("tree-4.2")
@pytest.mark.parametrize(
    ("scenario", "release"),
    [
        pytest.param("tree", "4.2", id="tree-4.2"),
        pytest.param("forks_under_load", "4.1", id="forks_under_load-4.1"),
    ],
)
def test_from_s3(scenario: str, release: str, s3: Store, checkpoints: Checkpoints, tmp_path: Path) -> None:
    """By faults alone."""
    checkpoint = checkpoints.get(Criu(release), scenario)
    url = s3.put(f"{scenario}-{release}.pack", packed(checkpoint, tmp_path).read_bytes())
    with lazy_restore(checkpoint, BY_FAULTS, work_in(tmp_path), pack=url) as restored:
        restored.check_all()
    (source,) = restored.stats()["page_servers"]
    assert source["address"] == url
    assert source["pages"] > 0


@pytest.mark.slow
@pytest.mark.parametrize("loop", ["asyncio", "trio"])
def test_in_the_background(loop: str, s3: Store, checkpoints: Checkpoints, tmp_path: Path) -> None:
    """All comes before the tasks ask, on each event loop."""
    checkpoint = checkpoints.get(NEWEST, "plain")
    url = s3.put(f"{loop}.pack", packed(checkpoint, tmp_path).read_bytes())
    with lazy_restore(checkpoint, our_daemon("--loop", loop), work_in(tmp_path), pack=url) as restored:
        assert restored.server.wait() == 0
        restored.go()
        assert restored.wait_tasks() == 0
        restored.check_verdict()


@pytest.mark.slow
def test_over_http(checkpoints: Checkpoints, tmp_path: Path) -> None:
    """Any server of files that knows ranges: nginx. A space in the name; the file is replaced: another ETag."""
    checkpoint = checkpoints.get(NEWEST, "plain")
    (root := tmp_path / "root").mkdir()
    (server := tmp_path / "nginx").mkdir()
    kept = packed(checkpoint, tmp_path).rename(root / "a pack")
    with (
        nginx(root, server) as address,
        lazy_restore(checkpoint, BY_FAULTS, work_in(tmp_path), pack=f"{address}/a%20pack") as restored,
    ):
        restored.check_all()
        assert kept.exists()


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_the_cache_of_a_host(
    s3: Store, checkpoints: Checkpoints, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A second restore asks the store for no page. What is wrong in the cache is read again, and mended."""
    checkpoint = checkpoints.get(NEWEST, "plain")
    url = s3.put("cached.pack", packed(checkpoint, tmp_path).read_bytes())
    cache = tmp_path / "cache"
    with bad_store(s3, lambda: "", monkeypatch) as proxy:

        def reads(name: str) -> int:
            """Of the store, for a whole restore."""
            checkpoint.forget_results()
            (work := tmp_path / name).mkdir()
            before = proxy.seen[""]
            daemon = our_daemon("--pack-cache", str(cache))
            with lazy_restore(checkpoint, daemon, work, pack=url) as restored:
                restored.check_all()
            return proxy.seen[""] - before

        proxy.armed.set()
        first = reads("first")
        (file,) = cache.iterdir()
        assert file.stat().st_mode & 0o777 == 0o600
        second = reads("second")
        assert second < first / 2
        file.write_bytes(random.Random(1).randbytes(file.stat().st_size))
        assert reads("third") > second


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_a_bad_store(
    s3: Store, checkpoints: Checkpoints, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each fault of a store, again and again: all pages come, none of them wrong."""
    checkpoint = checkpoints.get(NEWEST, "plain")
    url = s3.put("bad.pack", packed(checkpoint, tmp_path).read_bytes())
    chance = random.Random(5)
    left = dict.fromkeys(ILLS, 3) | {"stall": 1, "drip": 1}

    def plan() -> str:
        ill = chance.choice(ILLS) if chance.random() < 0.4 else ""
        if left.get(ill, 0) == 0:
            return ""
        left[ill] -= 1
        return ill

    with (
        bad_store(s3, plan, monkeypatch) as proxy,
        lazy_restore(checkpoint, BY_FAULTS, work := work_in(tmp_path), pack=url) as restored,
    ):
        proxy.armed.set()
        restored.go()
        assert restored.wait_tasks(180) == 0
        restored.check_verdict()
        assert restored.server.wait() == 0
    assert set(ILLS) <= proxy.seen.keys()
    assert "Traceback" not in (work / "serve.log").read_text()


@pytest.mark.slow
def test_a_key_that_vanishes_and_comes_back(s3: Store, checkpoints: Checkpoints, tmp_path: Path) -> None:
    """The tasks wait for it."""
    checkpoint = checkpoints.get(NEWEST, "plain")
    data = packed(checkpoint, tmp_path).read_bytes()
    url = s3.put("away.pack", data)
    with lazy_restore(checkpoint, BY_FAULTS, work := work_in(tmp_path), pack=url) as restored:
        s3.delete("away.pack")
        restored.go()
        wait_for_faults(checkpoint.pid)
        assert restored.reports() == []
        s3.put("away.pack", data)
        restored.server.signal(signal.SIGINT)  # completes them, without a fault for each page
        restored.check_end()
    assert f"pack {url}: {url}: no such object" in (work / "serve.log").read_text()


@pytest.mark.slow
def test_a_key_that_is_overwritten(s3: Store, checkpoints: Checkpoints, tmp_path: Path) -> None:
    """By the pack of another task. None of its pages get through; with a deadline the task gets SIGBUS."""
    other = packed(checkpoints.get(NEWEST, "single"), tmp_path).rename(tmp_path / "other")
    checkpoint = checkpoints.get(NEWEST, "plain")
    url = s3.put("changed.pack", packed(checkpoint, tmp_path).read_bytes())
    daemon = our_daemon("--no-background", "--source-deadline", "1")
    with lazy_restore(checkpoint, daemon, work := work_in(tmp_path), pack=url) as restored:
        s3.put("changed.pack", other.read_bytes())
        restored.go()
        assert restored.wait_tasks() == -signal.SIGBUS
        assert restored.server.wait() == 1
    assert not [report for report in restored.reports() if report.bad]
    log = (work / "serve.log").read_text()
    assert f"{url}: has another object now than at the start" in log
    assert "Traceback" not in log


def test_to_a_store_and_back(s3: Store, checkpoints: Checkpoints, tmp_path: Path) -> None:
    """`pack -o`, `show` and `unpack` of an object: what is unpacked is what a file would have given."""
    checkpoint = checkpoints.get(NEWEST, "plain")

    def run(*arguments: str | Path) -> Result:
        return CliRunner().invoke(cli, [str(argument) for argument in arguments])

    url = "s3://checkpoints/a/b/packed"
    for target in (url, tmp_path / "pack"):
        assert run("pack", checkpoint.images, "-o", target).exit_code == 0
    again = run("pack", checkpoint.images, "-o", url)
    assert (again.exit_code, again.output) == (1, f"lazypages: {url}: exists already\n")
    assert url in run("show", url).output
    for place, target in ((url, tmp_path / "one"), (tmp_path / "pack", tmp_path / "other")):
        assert run("unpack", place, "-D", target).exit_code == 0
    names = {path.name for path in (tmp_path / "one").iterdir()}
    assert names == {path.name for path in (tmp_path / "other").iterdir()}
    assert all(
        (tmp_path / "one" / name).read_bytes() == (tmp_path / "other" / name).read_bytes() for name in names
    )


def test_errors(s3: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One line that says what can't be had."""
    s3.put("no.pack", bytes(300))
    work = work_in(tmp_path)

    def refused(url: str, *options: str) -> str:
        command = [sys.executable, "-m", "lazypages", "serve", "-D", url, "-W", str(work), *options]
        done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
        assert done.returncode == 1
        assert done.stderr.count("lazypages: ") == 1
        assert re.search(rf"^lazypages: {url}: ", done.stderr, re.M)
        return done.stderr

    assert "no such object" in refused("s3://checkpoints/nowhere")
    assert "is no packed checkpoint" in refused("s3://checkpoints/no.pack")
    assert "is no packed checkpoint" in refused("s3://checkpoints/no.pack", "-d")
    assert "is not the address of an object" in refused("s3://checkpoints")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "wrong")
    assert "403" in refused("s3://checkpoints/no.pack")
    assert not any(work.iterdir())
