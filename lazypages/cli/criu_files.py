"""CRIU's configuration files. Without click: the criu-shim reads them before each dump.

CRIU (observed with 4.1.1 and 4.2.1) reads /etc/criu/default.conf and $HOME/.criu/default.conf, unless
``--no-default-config`` or ``--config`` is given, then the file that $CRIU_CONFIG_FILE names, then that of ``--config``;
a file that is missing is ignored. What comes later counts, the command line last. A file has one long option on each
line, without dashes: ``name``, ``name value``, ``name=value`` or ``name "value"``, with ``\\"`` for a quote in a quoted
value. ``#`` begins a comment, also in quotes. ``no-name`` takes back a flag. The files are shared by all commands of
``criu``, so each takes what it knows.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

from lazypages.errors import LazyPagesError

SYSTEM_FILE = Path("/etc/criu/default.conf")
USER_FILE = Path(".criu/default.conf")  # in $HOME
VARIABLE = "CRIU_CONFIG_FILE"

_LINE = re.compile(r"""([^\s="]+)(?:\s*=\s*|\s+|$)(?:"((?:[^"\\]|\\.)*)"|([^\s"]\S*))?\s*""")

#: Options that mean nothing without another one. A file may have them for other commands of criu.
NEEDS = {
    "address": "page-server",
    "port": "page-server",
    "ps-socket": "page-server",
    "tls": "page-server",
    "pidfile": "daemon",
}


class Setting(NamedTuple):
    """A line of a configuration file. ``value``: None if it has none."""

    name: str
    value: str | None
    place: str


def parse(text: str, path: Path) -> list[Setting]:
    """The settings in the text of a configuration file. Raises LazyPagesError."""
    settings = []
    for number, line in enumerate(text.splitlines(), 1):
        bare = line.partition("#")[0].strip()
        if not bare:
            continue
        found = _LINE.fullmatch(bare)
        if not found:
            raise LazyPagesError(
                f"{path}, line {number}: expected an option, or an option and its value (in quotes if it has spaces)"
            )
        name, quoted, plain = found.groups()
        value = plain if quoted is None else quoted.replace('\\"', '"')
        settings.append(Setting(name, value, f"{path}, line {number}"))
    return settings


def read_files(
    config: str | None, *, default: bool, environ: Mapping[str, str] | None = None
) -> list[Setting]:
    """The settings of all files. ``default``: also of those in /etc and $HOME. Raises LazyPagesError."""
    environ = os.environ if environ is None else environ
    files: list[Path] = []
    if default and not config:
        files.append(SYSTEM_FILE)
        if home := environ.get("HOME"):
            files.append(Path(home) / USER_FILE)
    files += [Path(name) for name in (environ.get(VARIABLE), config) if name]
    settings: list[Setting] = []
    for path in files:
        try:
            text = path.read_text(errors="surrogateescape")
        except (FileNotFoundError, NotADirectoryError):
            continue
        except OSError as error:
            raise LazyPagesError(f"cannot read {path}: {error.strerror}") from error
        settings += parse(text, path)
    return settings
