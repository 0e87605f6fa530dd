"""docs/packed.md: its commands, from a file and from a real store."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.real.test_docs import CRIU, WRITER, Writer, beside
from tests.support.compiling import compiled
from tests.support.docs import Shell, blocks, with_changes
from tests.support.dumptool import reap_all, task
from tests.support.processes import nothing_left, wait_for
from tests.support.stores import BUCKET, KEYS, seaweed

PAGE = "docs/packed.md"


@pytest.fixture
def running(tmp_path: Path) -> Iterator[Writer]:
    """A process that knows what has to be in its memory; dumped."""
    output = tmp_path / "writer.out"
    with nothing_left(), task(compiled(WRITER), output=output) as pid:
        wait_for("the table", lambda: output.read_text().endswith("\n"))
        (images := tmp_path / "ckpt" / "job1").mkdir(parents=True)
        CRIU.dump(pid, images)
        reap_all()
        yield Writer(pid, output)


def execute(text: str, folder: Path) -> None:
    """The images that were packed are gone before the pack is served."""
    *before, serve, restore = text.splitlines()
    Shell(folder).run("\n".join(before))
    shutil.rmtree(folder / "ckpt" / "job1")
    exports = [line for line in before if line.startswith("export ")]
    Shell(folder).run("\n".join([*exports, beside(folder / "job1", serve, restore)]))


@pytest.mark.slow
def test_from_a_file(running: Writer, tmp_path: Path) -> None:
    (text,) = blocks(PAGE, "From a file")
    execute(with_changes(text, {"/var/ckpt": tmp_path / "ckpt", "/run": tmp_path}), tmp_path)
    running.ends_right()


@pytest.mark.slow
def test_a_dump_of_dumptool(tmp_path: Path) -> None:
    """Two levels of dumptool's, packed, served in the background (-d), and restored by `lazypages restore`."""
    output = tmp_path / "writer.out"
    (work := tmp_path / "work").mkdir()
    with nothing_left(), task(compiled(WRITER), output=output) as pid:
        wait_for("the table", lambda: output.read_text().endswith("\n"))
        writer = Writer(pid, output)
        shell = Shell(tmp_path)
        shell.run(f"dumptool pre-dump -t {pid} -D 1")
        writer.next_step()
        shell.run(f"dumptool dump -t {pid} -D 2 --prev-images-dir ../1\nlazypages pack 2 -o pack\nrm -r 1 2")
        reap_all()
        shell.run(
            f"lazypages serve -D pack -W {work} -d -o serve.log --pidfile pid\n"
            f"lazypages restore --lazy-pages -D {work} -d\n"
            f"while [ -e /proc/$(cat {work}/pid)/exe ]; do sleep 0.02; done"
        )
        writer.ends_right()
    assert "1 task in " in (work / "serve.log").read_text()
    assert "1 complete" in (work / "serve.log").read_text()


@pytest.mark.slow
def test_from_a_store(running: Writer, tmp_path: Path) -> None:
    (text,) = blocks(PAGE, "From a store")
    (data := tmp_path / "seaweed").mkdir()
    with seaweed(data) as store:
        changes = {
            "/var/ckpt": tmp_path / "ckpt",
            "/run": tmp_path,
            "s3://checkpoints/": f"s3://{BUCKET}/",
            "AWS_ACCESS_KEY_ID=...": f"AWS_ACCESS_KEY_ID={KEYS['accessKey']}",
            "AWS_SECRET_ACCESS_KEY=...": f"AWS_SECRET_ACCESS_KEY='{KEYS['secretKey']}'",
            "AWS_REGION=eu-central-1": f"AWS_REGION=us-east-1 AWS_ALLOW_HTTP=true AWS_ENDPOINT_URL=http://127.0.0.1:{store.port}",
        }
        execute(with_changes(text, changes), tmp_path)
    running.ends_right()
