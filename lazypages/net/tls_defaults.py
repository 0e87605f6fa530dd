"""Default paths of certificates: those of CRIU (criu(8), `--tls-cacert` and the options after it).

Separate from `lazypages.net.tls`, which is slow to import, for commands that only print them in their help.
"""

from pathlib import Path

DEFAULT_CACERT = Path("/etc/pki/CA/cacert.pem")
DEFAULT_CACRL = Path("/etc/pki/CA/cacrl.pem")
DEFAULT_CERT = Path("/etc/pki/criu/cert.pem")
DEFAULT_KEY = Path("/etc/pki/criu/private/key.pem")
