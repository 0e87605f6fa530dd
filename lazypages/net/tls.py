"""TLS with certificates on both sides, as in CRIU (`--tls*`; docs/criu.md, "Page server protocol").

Both sides send a certificate and verify the peer's chain, and its revocation if there is a list. The client also checks
that the server's certificate names the address that it has connected to. CRIU's server checks the same name in the
client's certificate; ours does so only with the system's authorities (docs/page-server.md, "Certificates").
"""

from __future__ import annotations

import ipaddress
import os
import ssl
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

from lazypages.errors import LazyPagesError
from lazypages.net.tls_defaults import DEFAULT_CACERT, DEFAULT_CACRL, DEFAULT_CERT, DEFAULT_KEY


class TlsError(LazyPagesError):
    """Our certificates can't be used, or the peer's verification failed."""


class TlsFiles(NamedTuple):
    """The options: files (PEM), and whether a certificate must name the address (``check_name``).

    Without ``cacert``, DEFAULT_CACERT is used if it is readable, else the system's certificates; without ``cacrl``,
    DEFAULT_CACRL if it is readable.
    """

    cacert: Path | None = None
    cert: Path = DEFAULT_CERT
    key: Path = DEFAULT_KEY
    cacrl: Path | None = None
    check_name: bool = True

    def client_context(self) -> ssl.SSLContext:
        """The context of the side that connects. Raises TlsError."""
        return self._context(ssl.PROTOCOL_TLS_CLIENT)

    def server_context(self) -> ssl.SSLContext:
        """The context of the side that accepts. Raises TlsError."""
        context = self._context(ssl.PROTOCOL_TLS_SERVER)
        # No client of ours resumes sessions. CRIU's dump fails on a ticket: GnuTLS finds no data in it and returns
        # EAGAIN (observed with CRIU 4.1.1 and 4.2.1).
        context.num_tickets = 0
        return context

    def _context(self, protocol: int) -> ssl.SSLContext:
        context = ssl.SSLContext(protocol)
        context.minimum_version = ssl.TLSVersion.TLSv1_2
        context.check_hostname = False  # verify_peer checks it, the same way on both sides
        context.verify_mode = ssl.CERT_REQUIRED
        cacert = self._own_authorities()
        cacrl = self.cacrl or (DEFAULT_CACRL if os.access(DEFAULT_CACRL, os.R_OK) else None)
        if cacert:
            _load("--tls-cacert", cacert, lambda: context.load_verify_locations(cacert))
        else:
            context.load_default_certs(
                ssl.Purpose.SERVER_AUTH if protocol == ssl.PROTOCOL_TLS_CLIENT else ssl.Purpose.CLIENT_AUTH
            )
        if cacrl:
            _load("--tls-cacrl", cacrl, lambda: context.load_verify_locations(cacrl))
            context.verify_flags |= ssl.VERIFY_CRL_CHECK_LEAF
        _load("--tls-cert", self.cert, self.cert.read_bytes)
        _load("--tls-key", self.key, self.key.read_bytes)
        _load("--tls-cert and --tls-key", self.cert, lambda: context.load_cert_chain(self.cert, self.key))
        return context

    def verify_server(self, certificate: dict[str, Any] | None, address: str) -> None:
        """Raises TlsError unless the server's certificate (SSLSocket.getpeercert()) names `address`.

        Does nothing with --tls-no-cn-verify.
        """
        if self.check_name and not names_address(certificate or {}, address):
            raise TlsError(
                f"the server's certificate is for {describe_names(certificate or {})}, not for {address}: "
                f"connect to one of these names, give the server a certificate for {address}, "
                "or use --tls-no-cn-verify"
            )

    def verify_client(self, certificate: dict[str, Any] | None, address: str | None) -> None:
        """Raises TlsError if one of the system's authorities has signed the client's certificate, and it does not name
        `address`: anybody could have a certificate of theirs. One of our own authorities needs no name.

        `address`: the server's --address; None: not given. Does nothing without it, or with --tls-no-cn-verify.
        """
        if not self.check_name or address is None or self._own_authorities():
            return
        if not names_address(certificate or {}, address):
            raise TlsError(
                f"the client's certificate is for {describe_names(certificate or {})}, not for {address}, "
                "and an authority of the system has signed it: name an authority of your own with --tls-cacert, "
                "or use --tls-no-cn-verify"
            )

    def own_certificate(self) -> dict[str, Any] | None:
        """Our certificate, in the form of SSLSocket.getpeercert(); None if it can't be decoded, as when it has expired.

        By a handshake with ourselves in memory: Python decodes only the certificate of a verified peer. Its
        extendedKeyUsage may allow only one role, so both are tried.
        """
        contexts = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT), ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        contexts[0].check_hostname = False
        try:
            for context in contexts:
                context.verify_flags |= ssl.VERIFY_X509_PARTIAL_CHAIN  # trust the certificate itself
                context.load_verify_locations(self.cert)
                context.load_cert_chain(self.cert, self.key)
        except (OSError, ValueError):
            return None
        for verifying in contexts:
            for context in contexts:
                context.verify_mode = ssl.CERT_REQUIRED if context is verifying else ssl.CERT_NONE
            with suppress(OSError):
                return _received_by(contexts.index(verifying), *contexts)
        return None

    def _own_authorities(self) -> Path | None:
        """The file of trusted authorities; None: those of the system."""
        return self.cacert or (DEFAULT_CACERT if os.access(DEFAULT_CACERT, os.R_OK) else None)


def _received_by(side: int, client: ssl.SSLContext, server: ssl.SSLContext) -> dict[str, Any] | None:
    """The certificate that the client (0) or the server (1) receives in a handshake of the two. Raises OSError."""
    to_server, to_client = ssl.MemoryBIO(), ssl.MemoryBIO()
    ends = client.wrap_bio(to_client, to_server), server.wrap_bio(to_server, to_client, server_side=True)
    for _ in range(2):
        for end in ends:
            with suppress(ssl.SSLWantReadError):
                end.do_handshake()
    return ends[side].getpeercert()


def names_address(certificate: dict[str, Any], address: str) -> bool:
    """Whether the certificate names this host or IP address."""
    return any(_matches(kind, name, address) for kind, name in certificate_names(certificate))


def describe_names(certificate: dict[str, Any]) -> str:
    """The names in a certificate, for messages."""
    return ", ".join(name for _, name in certificate_names(certificate)) or "no name"


def certificate_names(certificate: dict[str, Any]) -> list[tuple[str, str]]:
    """The names in a certificate, as ("DNS" or "IP Address", name); the common name if it has no subjectAltName."""
    names = [
        (kind, name) for kind, name in certificate.get("subjectAltName", ()) if kind in {"DNS", "IP Address"}
    ]
    if names:
        return names
    return [
        ("DNS", value)
        for part in certificate.get("subject", ())
        for key, value in part
        if key == "commonName"
    ]


def _matches(kind: str, name: str, address: str) -> bool:
    try:
        wanted = ipaddress.ip_address(address)
    except ValueError:
        if kind != "DNS":
            return False
        name, address = name.rstrip(".").lower(), address.rstrip(".").lower()
        first, _, parent = address.partition(".")
        # RFC 6125: a wildcard stands for exactly one label, the first, of a name with at least two more
        return name == address or (bool(first) and name == f"*.{parent}" and "." in parent)
    try:
        return ipaddress.ip_address(name) == wanted
    except ValueError:
        return False


class TlsFileError(TlsError):
    """A file with a certificate, a key or a list can't be read, or not now: it may just be replaced."""


def _load(option: str, path: Path, load: Any) -> None:
    try:
        load()
    except ssl.SSLError as error:
        raise TlsFileError(f"{option} {path}: cannot be used: {error.reason or error}") from None
    except OSError as error:
        raise TlsFileError(f"{option} {path}: {error.strerror}") from None
