"""``lazypages serve -D PACK``: places the images of a packed checkpoint, and makes its lazy pages a source."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from images_spec.errors import ImageError
from images_spec.packing import open_pack
from images_spec.without_lazy import place
from lazypages.wording import count

if TYPE_CHECKING:
    from lazypages.sources.packed import PackedSource


@contextmanager
def placed(pack: Path, directory: Path, *, alone: bool) -> Iterator[PackedSource]:
    """Places the images of ``pack`` in ``directory``; yields the source of their lazy pages.

    ``alone``: no other source has lazy pages. Raises ImageError.
    """
    from lazypages.sources.packed import PackedPages, PackedSource  # noqa: PLC0415 - keeps the start short

    with open_pack(pack) as reader:
        found = place(reader, directory)
        if found.elsewhere and alone:
            missing = count(found.elsewhere, "lazy page is", "lazy pages are")
            raise ImageError(
                pack,
                f"{missing} not in it; if they are still at the source (dump --lazy-pages), name its page server "
                "with --page-server --address --port",
            )
        yield PackedSource(PackedPages(reader, found.tasks))
