"""Packed checkpoints: real ones of CRIU, packed, unpacked and restored, every byte compared."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterable
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from images_spec import pagemap as pagemaps
from images_spec.checkpoint import open_checkpoint
from images_spec.flags import PAGE_SIZE, PE_LAZY, PE_PRESENT
from images_spec.pagemap import Pagemap
from lazypages.cli.main import cli
from tests.support.chain import split
from tests.support.criu import RELEASES, Criu
from tests.support.restore import Checkpoints, eager_restore, lazy_restore, our_daemon

NEWEST = Criu(RELEASES[-1])


def run(*arguments: str | Path) -> Result:
    return CliRunner().invoke(cli, [str(argument) for argument in arguments])


def check(*arguments: str | Path) -> str:
    result = run(*arguments)
    assert result.exit_code == 0, result.output
    return result.output


def flags(entries: Iterable[tuple[int, int, int]]) -> dict[int, int]:
    """The flags of each page, by address."""
    return {start + at * PAGE_SIZE: bits for start, count, bits in entries for at in range(count)}


def memory(directory: Path) -> dict[int, dict[int, bytes]]:
    """The bytes of each page of each task, by address."""
    found: dict[int, dict[int, bytes]] = {}
    checkpoint = open_checkpoint(directory)
    for task in checkpoint.tasks:
        images = checkpoint.load_task(task.pid, remote=False)
        pages = found[task.pid] = {}
        for extent in images.extents:
            path = images.levels[extent.source].pages
            assert path is not None
            with path.open("rb") as file:
                data = os.pread(file.fileno(), extent.nr_pages * PAGE_SIZE, extent.offset)
            for at in range(extent.nr_pages):
                pages[extent.start + at * PAGE_SIZE] = data[at * PAGE_SIZE : (at + 1) * PAGE_SIZE]
    return found


@pytest.mark.loop("tree-criu-4.2")
@pytest.mark.parametrize(
    ("scenario", "criu"),
    [
        *(pytest.param("tree", Criu(release), id=f"tree-criu-{release}") for release in RELEASES),
        pytest.param("fragments", NEWEST, id="fragments", marks=pytest.mark.slow),
    ],
)
def test_a_chain(criu: Criu, scenario: str, checkpoints: Checkpoints, tmp_path: Path) -> None:
    """A chain becomes one level with the same memory; real CRIU restores it, lazily and not."""
    checkpoint = checkpoints.get(criu, scenario)
    chain = split(checkpoint.images, tmp_path / "chain", 3, longest_run=20)
    said = check("pack", chain.top, "-o", tmp_path / "pack")
    assert f"{tmp_path}/pack: " in said
    shown = check("show", tmp_path / "pack")
    assert str(tmp_path / "pack") in shown
    images = tmp_path / "images"
    check("unpack", tmp_path / "pack", "-D", images)
    assert not os.path.lexists(images / "parent")
    assert memory(images) == memory(chain.top)
    for name in os.listdir(chain.top):
        if not name.startswith(("pages-", "pagemap-", "parent")) and (chain.top / name).is_file():
            assert (images / name).read_bytes() == (chain.top / name).read_bytes()
    (tmp_path / "lazy").mkdir()
    with lazy_restore(checkpoint, our_daemon("--no-background"), tmp_path / "lazy", images) as restored:
        restored.check_all()
    checkpoint.forget_results()
    (tmp_path / "eager").mkdir()
    with eager_restore(checkpoint, tmp_path / "eager", images) as at_once:
        at_once.go()
        assert at_once.wait_tasks() == 0
        at_once.check_verdict()


def test_pages_at_a_page_server_stay_there(checkpoints: Checkpoints, tmp_path: Path) -> None:
    checkpoint = checkpoints.get(NEWEST, "plain")
    images = Path(shutil.copytree(checkpoint.images, tmp_path / "changed"))
    (path, *_) = images.glob("pagemap-[0-9]*.img")
    loaded = Pagemap.load(path)
    first = next(entry for entry in loaded if entry.flags & (PE_LAZY | PE_PRESENT) == PE_LAZY | PE_PRESENT)
    at_server = [
        (entry.vaddr, entry.nr_pages, PE_LAZY if entry == first else entry.flags) for entry in loaded
    ]
    before = sum(entry.nr_pages for entry in loaded if entry.vaddr < first.vaddr and entry.flags & PE_PRESENT)
    # the pages of the others move down in the pages image
    pages = images / f"pages-{loaded.pages_id}.img"
    data = pages.read_bytes()
    pages.write_bytes(data[: before * PAGE_SIZE] + data[(before + first.nr_pages) * PAGE_SIZE :])
    pagemaps.write(path, loaded.pages_id, at_server)
    check("pack", images, "-o", tmp_path / "pack")
    check("unpack", tmp_path / "pack", "-D", tmp_path / "images")
    again = Pagemap.load(tmp_path / "images" / path.name)
    assert flags(again) == flags(at_server)


def test_errors(checkpoints: Checkpoints, tmp_path: Path) -> None:
    checkpoint = checkpoints.get(NEWEST, "plain")
    images = split(checkpoint.images, tmp_path / "chain", 1).top
    packed = tmp_path / "pack"
    check("pack", images, "-o", packed)
    for arguments, what in (
        (["pack", images, "-o", packed], "exists already"),
        (["pack", tmp_path / "nowhere", "-o", tmp_path / "other"], "no such image"),
        (["pack", images, "-o", tmp_path / "nowhere" / "pack"], "does not exist: create it first"),
        (["unpack", packed, "-D", images], "is not empty"),
        (["unpack", tmp_path / "nowhere", "-D", tmp_path / "new"], "can't be opened"),
        (["unpack", images / "inventory.img", "-D", tmp_path / "new"], "is no packed checkpoint"),
    ):
        result = run(*arguments)
        assert result.exit_code == 1
        assert what in result.output
        assert result.output.count("\n") == 1
    assert not (tmp_path / "other").exists()
    data = bytearray(packed.read_bytes())
    data[100] ^= 1
    packed.write_bytes(data)
    result = run("unpack", packed, "-D", tmp_path / "damaged")
    assert result.exit_code == 1
    assert "damaged" in result.output
    assert not (tmp_path / "damaged" / "inventory.img").exists()
