"""What images say that we do not know: refused where it could change what bytes mean (images_spec/unknown.md)."""

from __future__ import annotations

from pathlib import Path

import pytest
from google.protobuf.message import Message

from dumptool.chain import Chain
from images_spec import images
from images_spec.errors import ImageError
from images_spec.flags import VMA_EXT_PLUGIN, VMA_GUARD
from images_spec.images import Kind
from images_spec.unknown import NEWER
from lazypages.cli.show import load
from lazypages.net.wire import PAGE_SIZE, Command, Header, Layout, PageFlags, RemoteProtocolError, ServerCodec
from lazypages.pageserver.images import ServedImages
from lazypages.sources.checkpoint import expect
from tests.unit.test_images_checkpoint import ANON, Draft, chained

FIELD_99 = b"\x9a\x06\x03abc"


@pytest.fixture
def draft(tmp_path: Path) -> Draft:
    draft = Draft(tmp_path / "top")
    draft.write()
    return draft


def change(draft: Draft, kind: Kind[Message], ident: int | None, index: int, *, part: str = "") -> Path:
    """Adds field 99 to a message of an image, or to the first of its parts of that name."""
    path = draft.directory / kind.file_name(ident)
    messages = images.read(path, kind)
    message = messages[index]
    (getattr(message, part)[0] if part else message).MergeFromString(FIELD_99)
    images.write(path, kind, messages)
    return path


def refusals(directory: Path) -> set[str]:
    """What `serve` and `show` say; they must say the same."""
    said = set()
    for reader in (
        lambda: expect(directory, remote=False),
        lambda: load(directory),
    ):
        with pytest.raises(ImageError) as caught:
            reader()
        said.add(caught.value.what)
    return said


@pytest.mark.parametrize(
    ("kind", "ident", "index", "part", "what"),
    [
        (Kind.PAGEMAP, 10, 0, "", f"the head has field 99, {NEWER}"),
        (Kind.PAGEMAP, 10, 2, "", f"entry 2 has field 99, {NEWER}"),
        (Kind.INVENTORY, None, 0, "", f"InventoryEntry has field 99, {NEWER}"),
        (Kind.MM, 10, 0, "vmas", f"VmaEntry has field 99, {NEWER}"),
    ],
)
def test_fields(  # noqa: PLR0917
    draft: Draft, kind: Kind[Message], ident: int | None, index: int, part: str, what: str
) -> None:
    change(draft, kind, ident, index, part=part)
    assert refusals(draft.directory) == {what}


@pytest.mark.parametrize(("kind", "ident"), [(Kind.MM, 10), (Kind.CORE, 10), (Kind.PSTREE, None)])
def test_fields_that_say_nothing_of_pages(draft: Draft, kind: Kind[Message], ident: int | None) -> None:
    change(draft, kind, ident, 0)
    assert expect(draft.directory, remote=False)[10].lazy_pages == 2
    load(draft.directory)


def test_in_a_parent(draft: Draft) -> None:
    _, parent = chained(draft, "parent-level")
    parent.write()
    change(parent, Kind.PAGEMAP, 10, 1)
    assert refusals(draft.directory) == {f"entry 1 has field 99, {NEWER}"}


def test_in_the_inventory_of_a_parent(draft: Draft) -> None:
    _, parent = chained(draft, "parent-level")
    parent.write()
    change(parent, Kind.INVENTORY, None, 0)
    what = f"InventoryEntry has field 99, {NEWER}"
    assert refusals(draft.directory) == {what}
    with pytest.raises(ImageError, match="InventoryEntry has field 99"):
        ServedImages(draft.directory)
    with pytest.raises(ImageError, match="InventoryEntry has field 99"):
        Chain(draft.directory)


def test_a_page_server_refuses_too(draft: Draft) -> None:
    change(draft, Kind.PAGEMAP, 10, 1)
    with pytest.raises(ImageError, match="entry 1 has field 99, which this lazypages does not know"):
        ServedImages(draft.directory)


def test_status_of_a_mapping(draft: Draft) -> None:
    path = draft.directory / Kind.MM.file_name(10)
    draft.mm(10, [(0x10, 0x20, ANON)])
    mm = images.read_one(path, Kind.MM)
    mm.vmas[0].status |= VMA_EXT_PLUGIN
    guard = mm.vmas.add()
    guard.CopyFrom(mm.vmas[0])
    guard.status = VMA_GUARD
    images.write(path, Kind.MM, [mm])
    expect(draft.directory, remote=False)
    mm.vmas[0].status |= 1 << 18
    images.write(path, Kind.MM, [mm])
    assert refusals(draft.directory) == {f"mapping 0x10000-0x20000 has status 0x40000, {NEWER}"}


@pytest.mark.parametrize("layout", Layout)
@pytest.mark.parametrize(("command", "flags"), [(Command.ADD_F, PageFlags.PRESENT), (Command.GET, 0)])
def test_flags_on_the_wire(layout: Layout, command: Command, flags: int) -> None:
    codec = ServerCodec(layout)
    codec.receive(layout.pack(Header(command, 1, PAGE_SIZE, 7, flags | 0x10)))
    with pytest.raises(
        RemoteProtocolError, match=f"client's {command.name} has flags 0x10, which .* a newer CRIU"
    ):
        codec.next_event()
