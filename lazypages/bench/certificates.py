"""A certificate for both ends of a connection with TLS, made with the openssl command."""

from __future__ import annotations

import subprocess
from pathlib import Path

from lazypages.bench.errors import BenchError

_CERT, _KEY = "tls.pem", "tls.key"


def write(folder: Path) -> None:
    """Makes one that is its own authority. Raises BenchError."""
    command = ["openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256", "-nodes"]
    command += ["-days", "30", "-subj", "/CN=lazypages bench", "-addext", "subjectAltName=IP:127.0.0.1"]
    command += ["-keyout", str(folder / _KEY), "-out", str(folder / _CERT)]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    except OSError as error:
        raise BenchError(f"the rows with TLS need the openssl command: {error.strerror}") from None
    if done.returncode:
        raise BenchError(f"openssl: {done.stderr}")


def options(folder: Path) -> list[str]:
    """What uses that in `folder`, on either side, ours or CRIU's; nothing if there is none."""
    cert, key = folder / _CERT, folder / _KEY
    if not cert.exists():
        return []
    files = ["--tls-cacert", str(cert), "--tls-cert", str(cert), "--tls-key", str(key)]
    return ["--tls", *files, "--tls-no-cn-verify"]
