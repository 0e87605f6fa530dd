"""Command-line options that say where pages come from beside the images, spelled as CRIU's where CRIU has them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import click

from lazypages.errors import LazyPagesError
from lazypages.net.names import AUTO, FORMS, PROTOCOLS
from lazypages.net.tls_defaults import DEFAULT_CACERT, DEFAULT_CERT, DEFAULT_KEY

if TYPE_CHECKING:
    from lazypages.net.tls import TlsFiles
    from lazypages.net.url import PageServerAddress
    from lazypages.sources.page_server import RemoteOptions

DEFAULT_ADDRESS = "127.0.0.1"

_PATH = click.Path(path_type=Path)

PROTOCOL_OPTION = click.option(
    "--page-server-protocol",
    type=click.Choice([AUTO, *PROTOCOLS]),
    default=AUTO,
    show_default=True,
    help="Which CRIU's protocol the page server speaks: up to 4.1.1, or from 4.2. Found out, which with a server of "
    "CRIU's takes 0.2 to 0.7 s once, but not with TLS: then the images may tell, else it is taken for criu-4.1; name "
    "it if it is CRIU's from 4.2 on. A lazypages page-server is used as one with auto only.",
)

TLS_FILE_OPTIONS = [
    click.option(
        "--tls-cacert", metavar="FILE", type=_PATH, help=f"Who is trusted.  [default: {DEFAULT_CACERT}]"
    ),
    click.option("--tls-cacrl", metavar="FILE", type=_PATH, help="Which certificates are revoked."),
    click.option(
        "--tls-cert",
        metavar="FILE",
        type=_PATH,
        default=DEFAULT_CERT,
        help="Our certificate.",
        show_default=True,
    ),
    click.option(
        "--tls-key",
        metavar="FILE",
        type=_PATH,
        default=DEFAULT_KEY,
        help="Its private key.",
        show_default=True,
    ),
]

TLS_OPTIONS = [
    click.option(
        "--tls", is_flag=True, help="With --page-server: certificates on both sides, and encryption."
    ),
    *TLS_FILE_OPTIONS,
    click.option(
        "--tls-no-cn-verify", is_flag=True, help="The server's certificate need not name its address."
    ),
]

SOURCE_OPTIONS = [
    click.option("--page-server", is_flag=True, help="Take what is not in the images from a page server."),
    click.option(
        "--address", metavar="ADDRESS", help=f"Address of the page server.  [default: {DEFAULT_ADDRESS}]"
    ),
    click.option("--port", metavar="PORT", type=click.IntRange(1, 65535), help="Port of the page server."),
    click.option(
        "--ps-socket",
        metavar="FD",
        type=click.IntRange(min=0),
        help="File descriptor of a socket that is connected to the page server.",
    ),
    click.option(
        "--source",
        "sources",
        metavar="URL",
        multiple=True,
        help=f"Where else pages may be: {FORMS}. May be given several times; page servers share the work and "
        "stand in for each other, directories come first.",
    ),
    PROTOCOL_OPTION,
    click.option(
        "--source-deadline",
        metavar="SECONDS",
        type=click.FloatRange(min=0, min_open=True),
        help="How long a page may be awaited before it is given up: its task gets SIGBUS when it touches it.  "
        "[default: for ever]",
    ),
    *TLS_OPTIONS,
]

Decorator = Callable[[Callable[..., Any]], Callable[..., Any]]


def add_options(options: Sequence[Decorator]) -> Decorator:
    """Adds all of them to a command, in this order in its help."""

    def decorate(command: Callable[..., Any]) -> Callable[..., Any]:
        for option in reversed(options):
            command = option(command)
        return command

    return decorate


class Sources(NamedTuple):
    """What the options say. ``directories``: images that may hold what those of the restore do not.

    ``remote``: None without page servers.
    """

    directories: tuple[Path, ...]
    page_servers: tuple[PageServerAddress, ...]
    remote: RemoteOptions | None = None


def tls_files(options: dict[str, Any]) -> TlsFiles:
    """Of the values of TLS_OPTIONS."""
    from lazypages.net.tls import TlsFiles  # noqa: PLC0415 - slow to import, and only needed with a page server

    return TlsFiles(
        cacert=options["tls_cacert"],
        cert=options["tls_cert"],
        key=options["tls_key"],
        cacrl=options["tls_cacrl"],
        check_name=not options["tls_no_cn_verify"],
    )


def sources_of(options: dict[str, Any]) -> Sources:
    """Of the values of SOURCE_OPTIONS. Raises LazyPagesError for what does not go together."""
    if not options["page_server"]:
        if any(options[name] is not None for name in ("address", "port", "ps_socket")) or options["tls"]:
            raise LazyPagesError("--address, --port, --ps-socket and --tls go with --page-server")
        if not options["sources"]:
            return Sources((), ())
    # All that follows is slow to import, and not needed beside a checkpoint that is whole.
    from lazypages.net.url import LocalSource, parse_source  # noqa: PLC0415
    from lazypages.net.wire import Layout  # noqa: PLC0415
    from lazypages.sources.page_server import RemoteOptions  # noqa: PLC0415

    directories: list[Path] = []
    servers: list[PageServerAddress] = []
    if options["page_server"]:
        servers.append(_page_server(options))
    for text in options["sources"]:
        source = parse_source(text)
        if isinstance(source, LocalSource):
            directories.append(source.directory)
        else:
            servers.append(source)
    if not servers:
        return Sources(tuple(directories), ())
    protocol = options["page_server_protocol"]
    remote = RemoteOptions(
        layout=None if protocol == AUTO else Layout(protocol),
        deadline=options["source_deadline"],
        tls=tls_files(options),
    )
    return Sources(tuple(directories), tuple(servers), remote)


def _page_server(options: dict[str, Any]) -> PageServerAddress:
    from lazypages.net.url import ConnectedSocket, TcpServer  # noqa: PLC0415 - as above

    if options["ps_socket"] is not None:
        return ConnectedSocket(options["ps_socket"])
    if options["port"] is None:
        raise LazyPagesError(
            "--page-server needs --port (and --address, if it is on another machine), or --ps-socket"
        )
    return TcpServer(options["address"] or DEFAULT_ADDRESS, options["port"], options["tls"])
