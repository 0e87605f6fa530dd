"""The options for metrics and traces of ``serve`` and ``daemon`` (docs/metrics.md), and what they need at the start."""

from __future__ import annotations

import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path

import click

from lazypages.errors import LazyPagesError
from lazypages.export.options import ExportOptions
from lazypages.extras import MissingError
from lazypages.outputs import check_output

UNIX_PREFIX = "unix:"

#: Modules and Python packages of the options.
METRICS = {"prometheus_client": "prometheus-client", "h11": "h11"}
OTEL = {
    "opentelemetry.sdk": "opentelemetry-sdk",
    "opentelemetry.exporter.otlp.proto.http": "opentelemetry-exporter-otlp-proto-http",
}

#: Variables that choose the protocol of spans, the first that is set, and the only one that is sent.
PROTOCOL_VARIABLES = ("OTEL_EXPORTER_OTLP_TRACES_PROTOCOL", "OTEL_EXPORTER_OTLP_PROTOCOL")
PROTOCOL = "http/protobuf"

EXPORT_OPTIONS = [
    click.option(
        "--metrics",
        metavar="ADDRESS",
        help="Give metrics to Prometheus over HTTP at this unix socket, or HOST:PORT of this host.",
    ),
    click.option(
        "--metrics-textfile",
        metavar="FILE",
        type=click.Path(path_type=Path),
        help="Write metrics to FILE (NAME.prom, for node_exporter) every 10 s and at the end.",
    ),
    click.option(
        "--otel",
        is_flag=True,
        help="Send an OpenTelemetry span for each restore, where OTEL_EXPORTER_OTLP_ENDPOINT says.",
    ),
]


@contextmanager
def exporting(metrics: str | None, textfile: Path | None, *, otel: bool) -> Iterator[ExportOptions | None]:
    """Everything that can be checked at the start, and the listening socket of `metrics`. None: nothing is exported.

    A unix socket is removed on exit, if it is still ours. Raises LazyPagesError.
    """
    if metrics is None and textfile is None and not otel:
        yield None
        return
    if metrics is not None:
        _check_installed("--metrics", METRICS)
    if textfile is not None:
        _check_installed("--metrics-textfile", METRICS)
        _check_textfile(textfile)
    if otel:
        _check_otel()
    if metrics is None:
        yield ExportOptions(None, textfile, otel)
        return
    with _listening(metrics) as listener:
        yield ExportOptions(listener, textfile, otel)


def _check_installed(option: str, modules: dict[str, str]) -> None:
    for module, package in modules.items():
        if not _is_installed(module):
            raise MissingError(option, package)


def _is_installed(module: str) -> bool:
    try:
        return find_spec(module) is not None
    except ModuleNotFoundError:  # a package that it is in
        return False


def _check_textfile(path: Path) -> None:
    option = "--metrics-textfile"
    if path.suffix != ".prom":
        raise LazyPagesError(
            f"{option} {path}: the name must end in .prom, node_exporter reads no other file"
        )
    check_output(option, path)
    # it is replaced by another file, which is made beside it
    check_output(option, path.with_name(f"{path.name}.{os.getpid()}"))


def _check_otel() -> None:
    _check_installed("--otel", OTEL)
    for name in PROTOCOL_VARIABLES:
        if value := os.environ.get(name):
            if value != PROTOCOL:
                raise LazyPagesError(f"--otel: {name} is {value}: set it to {PROTOCOL}, no other can be sent")
            return


@contextmanager
def _listening(address: str) -> Iterator[socket.socket]:
    if address.startswith(UNIX_PREFIX) or "/" in address:
        path = Path(address.removeprefix(UNIX_PREFIX)).absolute()
        from lazypages.net.listen import removed_afterwards  # noqa: PLC0415 - slow to import

        with _listen_unix(path) as listener, removed_afterwards(path):
            yield listener
    else:
        with _listen_tcp(address) as listener:
            yield listener


def _listen_unix(path: Path) -> socket.socket:
    from lazypages.net.listen import ListenError, listen  # noqa: PLC0415 - slow to import

    try:
        return listen(f"{UNIX_PREFIX}{path}", 0, insecure=False, tls=False)[0]
    except ListenError as error:
        raise LazyPagesError(f"--metrics: {error}") from None


def _listen_tcp(address: str) -> socket.socket:
    import ipaddress  # noqa: PLC0415 - keeps the start short

    host, _, port = address.rpartition(":")
    if not host or not port.isdecimal() or int(port) > 65535:
        raise LazyPagesError(f"--metrics {address}: name a unix socket (with a /), or HOST:PORT")
    try:
        found = socket.getaddrinfo(host.strip("[]"), int(port), type=socket.SOCK_STREAM)
    except (OSError, UnicodeError) as error:
        raise LazyPagesError(f"--metrics {address}: {getattr(error, 'strerror', None) or error}") from None
    family, _, _, _, where = found[0]
    if not ipaddress.ip_address(str(where[0]).partition("%")[0]).is_loopback:
        raise LazyPagesError(
            f"--metrics {address}: other hosts could read it, and nothing asks who they are: use 127.0.0.1, and for "
            "other hosts a proxy with TLS"
        )
    from lazypages.net.listen import listen_tcp  # noqa: PLC0415 - slow to import

    try:
        return listen_tcp(family, where)
    except OSError as error:
        raise LazyPagesError(f"--metrics {address}: cannot listen there: {error.strerror}") from None
