"""The packed format: what is read is what was written, or an error."""

from __future__ import annotations

import base64
import struct
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from images_spec.errors import ImageError
from images_spec.flags import PAGE_SIZE
from images_spec.packed import FRAME_PAGES, HEADER, MAGIC, TRAILER, PackReader, PackWriter

PATH = Path("pack")


def page(number: int) -> bytes:
    return number.to_bytes(4, "little") * (PAGE_SIZE // 4)


def write(path: Path, areas: dict[str, list[int]], files: dict[str, bytes]) -> bytes:
    with PackWriter(path) as writer:
        for name, data in files.items():
            writer.add_file(name, 0o640, [data])
        for name, numbers in areas.items():
            writer.add_pages(name, [b"".join(map(page, numbers))])
    return path.read_bytes()


def read(data: bytes) -> tuple[dict[str, bytes], dict[str, bytes]]:
    """Everything, as an image directory would have it."""
    reader = PackReader(lambda at, size: data[at : at + size], len(data), PATH)
    areas = {
        area.name: b"".join(
            bytes(count * PAGE_SIZE) if part is None else part
            for count, part in reader.pages(area, 0, area.pages)
        )
        for area in reader.areas
    }
    return areas, {file.name: b"".join(reader.contents(file)) for file in reader.files}


@given(
    areas=st.lists(st.lists(st.integers(0, 40), max_size=90), max_size=3),
    files=st.lists(st.binary(max_size=300), max_size=3),
    where=st.tuples(st.integers(0, 90), st.integers(0, 90)),
)
def test_read_is_what_was_written(
    areas: list[list[int]],
    files: list[bytes],
    where: tuple[int, int],
    tmp_path_factory: pytest.TempPathFactory,
) -> None:
    path = tmp_path_factory.mktemp("pack") / "pack"
    named = {f"pages-{number}.img": numbers for number, numbers in enumerate(areas)}
    images = {f"file-{number}.img": data for number, data in enumerate(files)}
    data = write(path, named, images)
    pages, others = read(data)
    assert pages == {name: b"".join(map(page, numbers)) for name, numbers in named.items()}
    assert others == images
    reader = PackReader(lambda at, size: data[at : at + size], len(data), PATH)
    different = {number for numbers in areas for number in numbers if number}
    assert reader.stored_pages == len(different)
    for area in reader.areas:
        first, end = sorted(min(at, area.pages) for at in where)
        parts = list(reader.pages(area, first, end - first))
        assert sum(count for count, _ in parts) == end - first
        content = b"".join(bytes(count * PAGE_SIZE) if part is None else part for count, part in parts)
        assert content == pages[area.name][first * PAGE_SIZE : end * PAGE_SIZE]


def test_no_damage_is_read(tmp_path: Path) -> None:
    """Any byte changed, and the end cut off anywhere."""
    data = write(tmp_path / "pack", {"pages-1.img": [0, 1, 2, 1, 3, *range(30)]}, {"core-1.img": b"core" * 9})
    right = read(data)
    for at in range(len(data)):
        changed = data[:at] + bytes([data[at] ^ 0x10]) + data[at + 1 :]
        if 12 <= at < HEADER.size:  # not used
            assert read(changed) == right
            continue
        with pytest.raises(ImageError):
            read(changed)
        with pytest.raises(ImageError):
            read(data[:at])


def test_golden() -> None:
    """A pack of the first version, for ever: images_spec/packed.md has it, too."""
    text = (Path(__file__).parents[2] / "images_spec" / "packed.md").read_text()
    data = base64.b64decode(text.split("```base64\n")[1].split("```")[0])
    areas, files = read(data)
    assert areas == {"pages-1.img": b"".join(map(page, (7, 0, 0, 8, 7)))}
    assert files == {"inventory.img": b"an inventory"}


@pytest.mark.parametrize(
    ("data", "what"),
    [
        (b"", "too short"),
        (bytes(200), "is no packed checkpoint"),
        (HEADER.pack(MAGIC, 2) + bytes(200), "of version 2, this program knows 1"),
        (HEADER.pack(MAGIC, 1) + bytes(200), "its end is damaged"),
    ],
)
def test_what_is_no_pack(data: bytes, what: str) -> None:
    with pytest.raises(ImageError, match=what):
        read(data)


def test_names_stay_in_the_directory(tmp_path: Path) -> None:
    for name in ("../evil", "a/b", "", "..", "x" * 256):
        data = write(tmp_path / "pack", {}, {name: b"x"})
        with pytest.raises(ImageError, match="names of files"):
            read(data)


def test_a_failed_pack_is_empty(tmp_path: Path) -> None:
    path = tmp_path / "pack"
    with pytest.raises(ZeroDivisionError), PackWriter(path) as writer:
        writer.add_pages("pages-1.img", (page(1 // number) for number in (1, 0)))
    assert path.read_bytes() == b""


def test_a_frame_is_what_a_fault_costs(tmp_path: Path) -> None:
    """One page is read with one read of one frame."""
    data = write(tmp_path / "pack", {"pages-1.img": list(range(1, 200))}, {})
    reads: list[tuple[int, int]] = []

    def read_at(at: int, size: int) -> bytes:
        reads.append((at, size))
        return data[at : at + size]

    reader = PackReader(read_at, len(data), PATH)
    reads.clear()
    assert list(reader.pages(reader.areas[0], 100, 1)) == [(1, page(101))]
    ((_, size),) = reads
    assert size < FRAME_PAGES * PAGE_SIZE
    assert struct.unpack("<Q", data[-TRAILER.size :][:8])[0] > size
