"""Options of a server. Separate from the server, which is slow to import."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from lazypages.engine.trace import Ring
    from lazypages.net.url import PageServerAddress
    from lazypages.sources.base import Source
    from lazypages.sources.page_server import RemoteOptions


class ServeOptions(NamedTuple):
    """``background``: also copy pages that no task has touched, once the restore has finished.

    ``page_servers``: sources of lazy pages that are not in the images; all have the same contents. ``remote``: options
    of their connections; None: the defaults. ``trace``: gets a record of every fault and transfer. ``others``: further
    sources of the same pages: packs.
    """

    background: bool = True
    page_servers: Sequence[PageServerAddress] = ()
    remote: RemoteOptions | None = None
    trace: Ring | None = None
    others: Sequence[Source] = ()

    @property
    def remote_sources(self) -> int:
        """Number of sources of pages that are not in the images."""
        return len(self.page_servers) + len(self.others)
