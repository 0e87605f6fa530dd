"""Where certificates are looked for when no option names them: CRIU's places (criu(8), `--tls-cacert` and after).

Apart from `lazypages.net.tls`, for commands that say so in their help and then mostly need no TLS.
"""

from pathlib import Path

DEFAULT_CACERT = Path("/etc/pki/CA/cacert.pem")
DEFAULT_CACRL = Path("/etc/pki/CA/cacrl.pem")
DEFAULT_CERT = Path("/etc/pki/criu/cert.pem")
DEFAULT_KEY = Path("/etc/pki/criu/private/key.pem")
