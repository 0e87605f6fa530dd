"""Options of CRIU's configuration files (lazypages.cli.criu_files), and those that every command of ``criu`` takes."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterable, Mapping, Sequence

import click

from lazypages import __version__
from lazypages.cli.criu_files import NEEDS, Setting, read_files
from lazypages.cli.options import Decorator
from lazypages.errors import LazyPagesError

log = logging.getLogger("lazypages")

_ABOUT_FILES = {"config", "no-default-config"}

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
        help_option = self.get_help_option(ctx)
        asked = {help_option.name if help_option else None, "version"}
        if asked & given.keys() or ctx.resilient_parsing:  # a file that is wrong must not keep it from that
            return super().parse_args(ctx, args)
        options = {
            name.removeprefix("--"): option
            for option in self.params
            if isinstance(option, click.Option)
            for name in option.opts
            if name.startswith("--")
        }
        config = given.get("config")
        if config and not os.path.lexists(config):
            log.warning("--config %s not found: going on without it, as criu does", config)
        files = read_files(config, default=not given.get("no_default_config"))
        found = arguments(files, options)
        for name, needs in NEEDS.items():
            if needs in options and needs not in found and not given.get(needs.replace("-", "_")):
                found.pop(name, None)
        ctx.meta[__name__] = from_files = [text for texts in found.values() for text in texts]
        return super().parse_args(ctx, [*from_files, *args])


def log_settings(ctx: click.Context) -> None:
    """Log which options come from files."""
    if texts := ctx.meta.get(__name__):
        log.info("from configuration files: %s", " ".join(texts))
