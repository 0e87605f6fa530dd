"""What a server is told. Apart from the server, which takes long to import."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from lazypages.engine.trace import Ring
    from lazypages.net.url import PageServerAddress
    from lazypages.sources.page_server import RemoteOptions


class ServeOptions(NamedTuple):
    """``background``: bring pages that nobody touches, too, once the restore is finished.

    ``page_servers``: for pages that are lazy and not in the images; all have the same content. ``remote``: how they
    are asked; None: in the usual way. ``trace``: gets a record of every fault and transfer.
    """

    background: bool = True
    page_servers: Sequence[PageServerAddress] = ()
    remote: RemoteOptions | None = None
    trace: Ring | None = None
