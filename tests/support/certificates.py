"""An authority, certificates of its, and a list of the revoked, made with the openssl command."""

from __future__ import annotations

import subprocess
from dataclasses import dataclass
from pathlib import Path

from lazypages.net.tls import TlsFiles


@dataclass(frozen=True)
class Certificate:
    cert: Path
    key: Path


class Authority:
    """Makes certificates in `folder`."""

    def __init__(self, folder: Path, name: str = "authority") -> None:
        folder.mkdir(exist_ok=True)
        self.folder = folder
        self.cert, self._key = folder / f"{name}.pem", folder / f"{name}.key"
        self.crl = folder / f"{name}.crl"
        self._database, self._config = folder / f"{name}.index", folder / f"{name}.cnf"
        self._database.touch()
        self._config.write_text(
            f"[ca]\ndefault_ca=own\n[own]\ndatabase={self._database}\ndefault_md=sha256\n"
            f"default_crl_days=30\ncertificate={self.cert}\nprivate_key={self._key}\n"
        )
        _openssl(
            *(
                "req",
                "-x509",
                "-newkey",
                "ec",
                "-pkeyopt",
                "ec_paramgen_curve:P-256",
                "-nodes",
                "-days",
                "30",
            ),
            *("-subj", f"/CN={name}", "-addext", "keyUsage=critical,keyCertSign,cRLSign"),
            *("-keyout", self._key, "-out", self.cert),
        )
        self.write_crl()

    def issue(self, name: str, alternative: str = "IP:127.0.0.1,DNS:localhost") -> Certificate:
        made = Certificate(self.folder / f"{name}.pem", self.folder / f"{name}.key")
        request, extensions = self.folder / f"{name}.csr", self.folder / f"{name}.ext"
        extensions.write_text(f"subjectAltName={alternative}\n")
        _openssl(
            *(
                "req",
                "-newkey",
                "ec",
                "-pkeyopt",
                "ec_paramgen_curve:P-256",
                "-nodes",
                "-subj",
                f"/CN={name}",
            ),
            *("-keyout", made.key, "-out", request),
        )
        _openssl(
            *("x509", "-req", "-in", request, "-CA", self.cert, "-CAkey", self._key, "-CAcreateserial"),
            *("-days", "30", "-extfile", extensions, "-out", made.cert),
        )
        return made

    def revoke(self, certificate: Certificate) -> None:
        _openssl("ca", "-config", self._config, "-revoke", certificate.cert)
        self.write_crl()

    def write_crl(self) -> None:
        _openssl("ca", "-config", self._config, "-gencrl", "-out", self.crl)

    def files(self, certificate: Certificate, *, check_name: bool = True, crl: bool = False) -> TlsFiles:
        return TlsFiles(
            self.cert, certificate.cert, certificate.key, self.crl if crl else None, check_name=check_name
        )

    def options(self, certificate: Certificate, *more: str) -> list[str]:
        """For a command line, CRIU's or ours."""
        return [
            *("--tls", "--tls-cacert", str(self.cert)),
            *("--tls-cert", str(certificate.cert), "--tls-key", str(certificate.key), *more),
        ]


def _openssl(*arguments: str | Path) -> None:
    done = subprocess.run(
        ["openssl", *map(str, arguments)], capture_output=True, text=True, timeout=60, check=False
    )
    assert done.returncode == 0, done.stderr
