"""Command-line options for sources of pages other than the images. Options that CRIU has are spelled as there."""

from __future__ import annotations

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
    help="Wire protocol of the page server: criu-4.1 (CRIU up to 4.1.1) or criu-4.2 (CRIU from 4.2). auto detects it "
    "(0.2 to 0.7 s with a server of CRIU's). Over TLS detection is impossible: auto then takes it from the images, "
    "else assumes criu-4.1; name criu-4.2 there. Extensions of lazypages page-server are used with auto only.",
)

TLS_FILE_OPTIONS = [
    click.option(
        "--tls-cacert",
        metavar="FILE",
        type=_PATH,
        help=f"Certificates of trusted authorities.  [default: {DEFAULT_CACERT}]",
    ),
    click.option("--tls-cacrl", metavar="FILE", type=_PATH, help="List of revoked certificates."),
    click.option(
        "--tls-cert",
        metavar="FILE",
        type=_PATH,
        default=DEFAULT_CERT,
        help='Our certificate. docs/page-server.md, "Certificates", has the names that it needs.',
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
    click.option("--tls", is_flag=True, help="With --page-server: use TLS, with certificates on both sides."),
    *TLS_FILE_OPTIONS,
    click.option(
        "--tls-no-cn-verify", is_flag=True, help="Accept a server certificate that does not name its address."
    ),
]

SOURCE_OPTIONS = [
    click.option(
        "--page-server", is_flag=True, help="Fetch pages that are not in the images from a page server."
    ),
    click.option(
        "--address", metavar="ADDRESS", help=f"Address of the page server.  [default: {DEFAULT_ADDRESS}]"
    ),
    click.option("--port", metavar="PORT", type=click.IntRange(1, 65535), help="Port of the page server."),
    click.option(
        "--ps-socket",
        metavar="FD",
        type=click.IntRange(min=0),
        help="File descriptor of a socket connected to the page server.",
    ),
    click.option(
        "--source",
        "sources",
        metavar="URL",
        multiple=True,
        help=f"Another source of pages: {FORMS}. May be repeated. Directories are searched first; page servers share "
        "the requests and replace each other.",
    ),
    PROTOCOL_OPTION,
    click.option(
        "--source-deadline",
        metavar="SECONDS",
        type=click.FloatRange(min=0, min_open=True),
        help="Give up a page after this time; the task gets SIGBUS when it touches it.  [default: wait for ever]",
    ),
    *TLS_OPTIONS,
]


class Sources(NamedTuple):
    """The values of the options. ``directories``: images that may hold pages which those of the restore lack.

    ``remote``: None without page servers and without a packed checkpoint.
    """

    directories: tuple[Path, ...]
    page_servers: tuple[PageServerAddress, ...]
    remote: RemoteOptions | None = None


def tls_files(options: dict[str, Any]) -> TlsFiles:
    """TlsFiles from the values of TLS_OPTIONS."""
    from lazypages.net.tls import TlsFiles  # noqa: PLC0415 - slow to import, and only needed with a page server

    return TlsFiles(
        cacert=options["tls_cacert"],
        cert=options["tls_cert"],
        key=options["tls_key"],
        cacrl=options["tls_cacrl"],
        check_name=not options["tls_no_cn_verify"],
    )


def sources_of(options: dict[str, Any], *, packed: bool = False) -> Sources:
    """Sources from the values of SOURCE_OPTIONS. ``packed``: there is a packed checkpoint beside them.

    Raises LazyPagesError for options that exclude each other.
    """
    if not options["page_server"]:
        if any(options[name] is not None for name in ("address", "port", "ps_socket")) or options["tls"]:
            raise LazyPagesError("--address, --port, --ps-socket and --tls need --page-server")
        if not options["sources"] and not packed:
            return Sources((), ())
    # These modules are slow to import, and needed only for other sources.
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
    if not servers and not packed:
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
            "--page-server needs --port (and --address, if it is on another host), or --ps-socket"
        )
    return TcpServer(options["address"] or DEFAULT_ADDRESS, options["port"], options["tls"])
