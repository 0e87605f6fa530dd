"""Packed checkpoints as arguments: files, and objects in a store.

``lazypages serve -D PACK`` places the images of one, and makes its lazy pages a source.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from images_spec.errors import ImageError
from lazypages.net.names import is_url
from lazypages.wording import count

if TYPE_CHECKING:
    from images_spec.packed import PackReader
    from lazypages.sources.packed import PackedSource
    from lazypages.sources.stored import StoredSource


class Cache(NamedTuple):
    """Where frames from stores are kept, and how many bytes at most."""

    folder: Path
    limit: int


def place_of(value: str) -> Path | str:
    """The value of an option: a path (``Path``), or the address of an object in a store (``str``)."""
    return value if is_url(value) else Path(value)


@contextmanager
def opened(pack: Path | str) -> Iterator[PackReader]:
    """A packed checkpoint. Raises ImageError, LinkError."""
    from images_spec.packed import PackReader  # noqa: PLC0415 - keeps the start short
    from images_spec.packing import open_pack  # noqa: PLC0415

    if isinstance(pack, Path):
        with open_pack(pack) as reader:
            yield reader
    else:
        from lazypages.net.objects import StoredObject  # noqa: PLC0415 - slow to import

        stored = StoredObject(pack)
        yield PackReader(stored.read, stored.size, pack)


@contextmanager
def placed(
    pack: Path | str, directory: Path, cache: Cache | None, *, alone: bool
) -> Iterator[PackedSource | StoredSource]:
    """Places the images of ``pack`` in ``directory``; yields the source of their lazy pages.

    ``cache``: of frames from a store. ``alone``: no other source has lazy pages. Raises ImageError, LazyPagesError.
    """
    from images_spec.packed import PackReader  # noqa: PLC0415 - keeps the start short
    from images_spec.packing import open_pack  # noqa: PLC0415
    from images_spec.without_lazy import place  # noqa: PLC0415
    from lazypages.sources.packed import PackedPages, PackedSource  # noqa: PLC0415

    def pages(reader: PackReader) -> PackedPages:
        found = place(reader, directory)
        if found.elsewhere and alone:
            missing = count(found.elsewhere, "lazy page is", "lazy pages are")
            raise ImageError(
                pack,
                f"{missing} not in it; if they are still at the source (dump --lazy-pages), name its page server "
                "with --page-server --address --port",
            )
        return PackedPages(reader, found.tasks)

    if isinstance(pack, Path):
        with open_pack(pack) as reader:
            yield PackedSource(pages(reader))
    else:
        from lazypages.net.objects import StoredObject  # noqa: PLC0415 - slow to import
        from lazypages.sources.disk_cache import DiskCache  # noqa: PLC0415
        from lazypages.sources.stored import StoredSource  # noqa: PLC0415

        stored = StoredObject(pack)
        reader = PackReader(stored.read, stored.size, pack)
        with ExitStack() as stack:
            kept = None
            if cache is not None:
                kept = DiskCache(cache.folder, reader.identity, cache.limit)
                stack.callback(kept.close)
            yield StoredSource(pages(reader), stored, kept)
