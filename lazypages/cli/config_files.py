"""Options of CRIU's configuration files (lazypages.cli.criu_files), and those that every command of ``criu`` takes."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

import click

from lazypages import __version__
from lazypages.cli.criu_files import NEEDS, Setting, read_files
from lazypages.cli.options import Decorator
from lazypages.errors import LazyPagesError

log = logging.getLogger("lazypages")

_ABOUT_FILES = {"config", "no-default-config"}

#: The key in the context's `meta` of the places in files, by spelling of the option.
_PLACES = f"{__name__}.places"

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


class Given(NamedTuple):
    """What a configuration file says of an option: an argument of the command line, and its setting."""

    text: str
    setting: Setting


def arguments(settings: Iterable[Setting], options: Mapping[str, click.Option]) -> dict[str, list[Given]]:
    """Settings as command-line arguments, by long name of the option; without those that `options` does not have.

    Raises LazyPagesError if a value is missing.
    """
    found: dict[str, list[Given]] = {}
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
        elif not (option.is_flag or isinstance(option.flag_value, str)):  # as a bare -v
            raise LazyPagesError(f"{setting.place}: {setting.name} needs a value")
        before = found.get(setting.name, []) if option.multiple else []
        found[setting.name] = [*before, Given(text, setting)]
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
        counting = {
            name: texts
            for name, texts in found.items()
            if options[name].multiple or options[name].name not in given  # the command line takes precedence
        }
        _check_values(ctx, counting, options)
        ctx.meta[_PLACES] = {
            spelling: texts[-1].setting.place
            for name, texts in counting.items()
            for spelling in options[name].opts
        }
        ctx.meta[__name__] = from_files = [one.text for texts in found.values() for one in texts]
        return super().parse_args(ctx, [*from_files, *args])

    def invoke(self, ctx: click.Context) -> object:
        """An error that begins with an option which comes from a file names the file, too."""
        try:
            return super().invoke(ctx)
        except LazyPagesError as error:
            spelling = str(error).partition(" ")[0].rstrip(":")
            place = ctx.meta.get(_PLACES, {}).get(spelling)
            if place is None:
                raise
            raise LazyPagesError(f"{place}: {error}") from error


def _check_values(
    ctx: click.Context, found: Mapping[str, Sequence[Given]], options: Mapping[str, click.Option]
) -> None:
    """Raises LazyPagesError for a value that click would refuse without a word about the file."""
    for name, texts in found.items():
        option = options[name]
        if option.is_flag:
            continue
        for one in texts:
            value = option.flag_value if one.setting.value is None else one.setting.value
            try:
                option.process_value(ctx, [value] if option.multiple else value)
            except click.BadParameter as error:
                raise LazyPagesError(f"{one.setting.place}: {name}: {error.message}") from None


def log_settings(ctx: click.Context) -> None:
    """Log which options come from files."""
    if texts := ctx.meta.get(__name__):
        log.info("from configuration files: %s", " ".join(texts))
