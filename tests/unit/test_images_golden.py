"""Golden vectors (images_spec/golden): bytes mean what is written beside them, and that gives the bytes."""

from __future__ import annotations

import tomllib
from pathlib import Path
from typing import Any

import pytest
from google.protobuf import text_format
from google.protobuf.message import Message
from google.protobuf.unknown_fields import UnknownFieldSet

import images_spec
from images_spec import images, pagemap
from images_spec.images import Kind
from images_spec.pagemap import Pagemap

GOLDEN = Path(images_spec.__file__).parent / "golden"
VECTORS = {path.stem: tomllib.loads(path.read_text()) for path in sorted(GOLDEN.glob("*.toml"))}
PATH = Path("golden.img")


def unknown_fields(message: Message) -> list[int]:
    """Numbers of all fields, at any depth, that our .proto files do not describe."""
    found = [field.field_number for field in UnknownFieldSet(message)]  # type: ignore[attr-defined]
    for descriptor, value in message.ListFields():
        if descriptor.message_type:
            for part in value if descriptor.is_repeated else [value]:
                found += unknown_fields(part)
    return found


def image(vector: dict[str, Any], magics: str) -> bytes:
    parts = [vector[magics], *(item["hex"] + item.get("data", "") for item in vector["message"])]
    return bytes.fromhex("".join(parts))


def meaning(vector: dict[str, Any], kind: Kind[Any]) -> list[tuple[Message, bytes]]:
    items = []
    for index, item in enumerate(vector["message"]):
        message = (kind.message if index else kind.head)()
        text_format.Parse(item["text"], message)
        items.append((message, bytes.fromhex(item.get("data", ""))))
    return items


def test_there_are_vectors_of_every_kind() -> None:
    kinds = {name for name, kind in vars(Kind).items() if isinstance(kind, Kind)}
    assert kinds == {vector["kind"] for vector in VECTORS.values()}


@pytest.mark.parametrize("name", VECTORS)
def test_both_ways(name: str) -> None:
    vector = VECTORS[name]
    kind: Kind[Any] = getattr(Kind, vector["kind"])
    items = meaning(vector, kind)
    assert list(images.decode(image(vector, "magics"), kind, PATH)) == items
    written = image(vector, "written_magics" if "written_magics" in vector else "magics")
    assert b"".join(images.encode(kind, items, PATH)) == written
    for message, _ in items:
        assert unknown_fields(message) == []


@pytest.mark.parametrize("name", [name for name, vector in VECTORS.items() if "entries" in vector])
def test_entries_of_pagemaps(name: str) -> None:
    vector = VECTORS[name]
    parsed = Pagemap(image(vector, "magics"), PATH)
    assert [list(entry) for entry in parsed] == vector["entries"]
    head, _ = meaning(vector, Kind.PAGEMAP)[0]
    assert parsed.pages_id == head.pages_id  # type: ignore[attr-defined]


@pytest.mark.parametrize("name", ["pagemap-both-counts", "pagemap-all-flags", "pagemap-empty"])
def test_pagemaps_are_written_so(name: str, tmp_path: Path) -> None:
    vector = VECTORS[name]
    head, _ = meaning(vector, Kind.PAGEMAP)[0]
    path = tmp_path / "pagemap-1.img"
    pagemap.write(path, head.pages_id, [tuple(entry) for entry in vector["entries"]])  # type: ignore[attr-defined]
    assert path.read_bytes() == image(vector, "magics")
