"""Possible causes when the other side closes a connection before its first message: it refuses us without a word."""

from __future__ import annotations

from lazypages.net import wire
from lazypages.net.tls import TlsFiles, describe_names, names_address
from lazypages.net.url import PageServerAddress, TcpServer
from lazypages.net.wire import Layout


def why_closed(
    address: PageServerAddress,
    tls: TlsFiles | None,
    layout: Layout,
    *,
    guessed: bool = False,
    named: bool = False,
) -> str:
    """What may be wrong, and which option changes it.

    `layout`: of our first message; it was `guessed`, or `named` by the user, or is that which every server understands.

    With TLS 1.3 a client has completed the handshake when the server checks its certificate, and CRIU's server sends no
    reason.
    """
    if not (isinstance(address, TcpServer) and address.tls):
        protocol = f"not speak {layout.value} (--page-server-protocol), " if named else ""
        return f"it may need --tls, {protocol}or refuse this client; see its log"
    certificate = (tls or TlsFiles()).own_certificate()
    if certificate and not names_address(certificate, address.host):
        reason = (
            f"a page server of CRIU's accepts only a certificate that names its --address ({address.host}), and ours "
            f"is for {describe_names(certificate)}: issue one with both names, or start the server with "
            "--tls-no-cn-verify"
        )
        return (
            f"{reason}. Or its protocol is not {layout.value}: --page-server-protocol" if guessed else reason
        )
    if guessed:
        return wire.GUESSED.format(layout=layout)
    return (
        f"it may refuse our certificate, not speak {layout.value} (--page-server-protocol), or have ended just now; "
        "see its log"
    )


def why_left(tls: TlsFiles) -> str:
    """What may be wrong when a client leaves right after the handshake, in which it has received our certificate."""
    certificate = tls.own_certificate()
    names = f", which is for {describe_names(certificate)}" if certificate else ""
    return f"the client left right after the TLS handshake: it may refuse our certificate{names}; see its log"
