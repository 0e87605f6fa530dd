"""Names the cause of a failed TLS connection in plain words, from what OpenSSL reports about it."""

from __future__ import annotations

import ssl
from typing import Final, Literal

Peer = Literal["client", "server"]

#: Alerts of the peer about our certificate (RFC 8446, 6.2), by the end of OpenSSL's reason: what they mean.
ALERTS: Final = {
    "UNKNOWN_CA": "its --tls-cacert does not have the authority that signed it",
    "CERTIFICATE_REVOKED": "it is revoked",
    "CERTIFICATE_EXPIRED": "it has expired",
    "CERTIFICATE_REQUIRED": "none was sent (--tls-cert)",
    "BAD_CERTIFICATE": "it is not valid, or does not name the right host",
    "UNSUPPORTED_CERTIFICATE": "its extendedKeyUsage lacks {purpose}",
    "CERTIFICATE_UNKNOWN": "it cannot be verified",
    "ACCESS_DENIED": "it gives no access",
}
#: What extendedKeyUsage must have in a certificate of the client, and of the server (RFC 5280, 4.2.1.12).
PURPOSES: Final[dict[Peer, str]] = {"client": "clientAuth", "server": "serverAuth"}
#: OpenSSL's code when it has something else (x509_vfy.h: X509_V_ERR_INVALID_PURPOSE).
INVALID_PURPOSE: Final = 26
#: OpenSSL's reasons when the first bytes of the peer are not TLS.
NO_TLS: Final = {
    "WRONG_VERSION_NUMBER",
    "HTTP_REQUEST",
    "HTTPS_PROXY_REQUEST",
    "UNKNOWN_PROTOCOL",
    "BAD_RECORD_TYPE",
    "RECORD_LAYER_FAILURE",
    "PACKET_LENGTH_TOO_LONG",
    "SSLV3_ALERT_UNEXPECTED_MESSAGE",  # NO_TLS_ALERT, the answer of our servers without TLS
}
#: Answer to a client that does not use TLS: a fatal alert, "unexpected_message" (RFC 8446, 6).
NO_TLS_ALERT: Final = b"\x15\x03\x03\x00\x02\x02\x0a"


def explain_handshake(error: OSError, peer: Peer) -> str:
    """Why the handshake with `peer` failed."""
    if isinstance(error, ssl.SSLCertVerificationError):
        if error.verify_code == INVALID_PURPOSE:
            hint = f": its extendedKeyUsage lacks {PURPOSES[peer]}: issue one with it, or without extendedKeyUsage"
        else:
            hint = ": --tls-cacert must have the authority that signed it" if _is_unknown(error) else ""
        return f"TLS: the {peer}'s certificate is not valid here ({error.verify_message}){hint}"
    if isinstance(error, ConnectionError | ssl.SSLEOFError):
        causes = "it may not use TLS, or refuse our certificate" if peer == "server" else "see its log"
        return f"TLS: the {peer} closed the connection in the handshake: {causes}"
    reason = reason_of(error)
    if reason in NO_TLS:
        return f"TLS: the {peer} does not use TLS: it needs --tls, too ({reason})"
    if reason == "PEER_DID_NOT_RETURN_A_CERTIFICATE":
        return f"TLS: the {peer} has sent no certificate: it needs --tls-cert ({reason})"
    return explain(error, peer)


def explain(error: OSError, peer: Peer) -> str:
    """Why a connection failed, at any time: with TLS 1.3 a client is refused after its handshake."""
    reason = reason_of(error)
    if meaning := ALERTS.get(_alert(reason)):
        ours = PURPOSES["client" if peer == "server" else "server"]
        return f"TLS: the {peer} refuses our certificate: {meaning.format(purpose=ours)} ({reason})"
    if isinstance(error, ssl.SSLEOFError):
        return f"closed by the {peer}"
    if isinstance(error, ssl.SSLError):
        return f"TLS: {reason or error}"
    return error.strerror or str(error)


def is_refusal(error: OSError) -> bool:
    """Whether the peer has refused our certificate."""
    return _alert(reason_of(error)) in ALERTS


def is_final(error: OSError) -> bool:
    """Whether the same handshake would fail again: a certificate is refused, or the peer does not use TLS."""
    return isinstance(error, ssl.SSLCertVerificationError) or is_refusal(error) or reason_of(error) in NO_TLS


def reason_of(error: OSError) -> str:
    """OpenSSL's reason; empty if there is none."""
    return (isinstance(error, ssl.SSLError) and error.reason) or ""


def _alert(reason: str) -> str:
    return reason.rpartition("ALERT_")[2]


def _is_unknown(error: ssl.SSLCertVerificationError) -> bool:
    return "issuer" in error.verify_message or "self-signed" in error.verify_message
