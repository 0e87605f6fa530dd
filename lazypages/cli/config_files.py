"""CRIU's configuration files, and options that ``criu`` takes with every command.

CRIU (observed with 4.1.1 and 4.2.1) reads /etc/criu/default.conf and $HOME/.criu/default.conf, unless
``--no-default-config`` or ``--config`` is given, then the file that $CRIU_CONFIG_FILE names, then that of ``--config``;
a file that is missing is ignored. What comes later counts, the command line last. A file has one long option on each
line, without dashes: ``name``, ``name value``, ``name=value`` or ``name "value"``, with ``\\"`` for a quote in a quoted
value. ``#`` begins a comment, also in quotes. ``no-name`` takes back a flag. The files are shared by all commands of
``criu``, so each takes what it knows.
"""

from __future__ import annotations

import logging
import os
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import click

from lazypages import __version__
from lazypages.cli.options import Decorator
from lazypages.errors import LazyPagesError

log = logging.getLogger("lazypages")

SYSTEM_FILE = Path("/etc/criu/default.conf")
USER_FILE = Path(".criu/default.conf")  # in $HOME
VARIABLE = "CRIU_CONFIG_FILE"

_LINE = re.compile(r"""([^\s="]+)(?:\s*=\s*|\s+|$)(?:"((?:[^"\\]|\\.)*)"|([^\s"]\S*))?\s*""")
_ABOUT_FILES = {"config", "no-default-config"}
#: Options that mean nothing without another one. A file may have them for other commands of criu.
_NEEDS = {
    "address": "page-server",
    "port": "page-server",
    "ps-socket": "page-server",
    "tls": "page-server",
    "pidfile": "daemon",
}

EPILOG = """
\b
Configuration files
  Those of CRIU are read: /etc/criu/default.conf and $HOME/.criu/default.conf, or
  instead of them --config; and the file that $CRIU_CONFIG_FILE names. They have
  one long option on each line, without dashes; those that this command does not
  have are ignored, and the command line takes precedence. -j (--shell-job) and
  --display-stats are accepted, because criu accepts them, and have no effect.
"""

#: For `add_options`. None of them has a value that the command gets.
CRIU_OPTIONS: Sequence[Decorator] = [
    click.option(
        "--config",
        metavar="FILE",
        expose_value=False,
        help="Read options from FILE, one a line, and not from CRIU's configuration files in /etc and $HOME.",
    ),
    click.option(
        "--no-default-config",
        is_flag=True,
        expose_value=False,
        help="Do not read CRIU's configuration files in /etc and $HOME.",
    ),
    click.option("--display-stats", is_flag=True, expose_value=False, hidden=True),
    click.option("-j", "--shell-job", is_flag=True, expose_value=False, hidden=True),
    click.version_option(__version__, "-V", "--version", message="lazypages, version %(version)s"),
]


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


def read_files(config: str | None, *, default: bool) -> list[Setting]:
    """The settings of all files. ``default``: also of those in /etc and $HOME. Raises LazyPagesError."""
    files: list[Path] = []
    if default and not config:
        files.append(SYSTEM_FILE)
        if home := os.environ.get("HOME"):
            files.append(Path(home) / USER_FILE)
    files += [Path(name) for name in (os.environ.get(VARIABLE), config) if name]
    settings: list[Setting] = []
    for path in files:
        try:
            text = path.read_text(errors="surrogateescape")
        except (FileNotFoundError, NotADirectoryError):
            if config and path == Path(config):
                log.warning("--config %s not found: going on without it, as criu does", path)
        except OSError as error:
            raise LazyPagesError(f"cannot read {path}: {error.strerror}") from error
        else:
            settings += parse(text, path)
    return settings


def arguments(settings: Iterable[Setting], options: Mapping[str, click.Option]) -> dict[str, list[str]]:
    """Settings as command-line arguments, by long name of the option; without those that `options` does not have.

    Raises LazyPagesError if a value is missing.
    """
    found: dict[str, list[str]] = {}
    for setting in settings:
        option = options.get(setting.name)
        if setting.name in _ABOUT_FILES:
            continue
        if option is None:
            negated = options.get(setting.name.removeprefix("no-"))
            if negated is not None and negated.is_flag:
                found.pop(setting.name.removeprefix("no-"), None)
            continue
        text = f"--{setting.name}"
        if not option.is_flag and setting.value is not None:
            text += f"={setting.value}"
        elif not (option.is_flag or option.multiple):
            raise LazyPagesError(f"{setting.place}: {setting.name} needs a value")
        found[setting.name] = [*(found.get(setting.name, []) if option.multiple else []), text]
    return found


class Configured(click.Command):
    """A command that replaces one of ``criu``'s, and reads its configuration files."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        given, _, _ = self.make_parser(ctx).parse_args(list(args))
        if given.get("help") or ctx.resilient_parsing:
            return super().parse_args(ctx, args)
        options = {
            name.removeprefix("--"): option
            for option in self.params
            if isinstance(option, click.Option)
            for name in option.opts
            if name.startswith("--")
        }
        files = read_files(given.get("config"), default=not given.get("no_default_config"))
        found = arguments(files, options)
        for name, needs in _NEEDS.items():
            if needs in options and needs not in found and not given.get(needs.replace("-", "_")):
                found.pop(name, None)
        ctx.meta[__name__] = from_files = [text for texts in found.values() for text in texts]
        return super().parse_args(ctx, [*from_files, *args])


def log_settings(ctx: click.Context) -> None:
    """Log which options come from files."""
    if texts := ctx.meta.get(__name__):
        log.info("from configuration files: %s", " ".join(texts))
