"""The command ``lazypages``."""

from __future__ import annotations

import errno
import importlib
from typing import TYPE_CHECKING

import click

from images_spec.errors import ImageError
from lazypages import __version__, extras
from lazypages.cli.imports import importing_command
from lazypages.errors import LazyPagesError

if TYPE_CHECKING:
    from click.shell_completion import CompletionItem

#: Subcommands: where each is defined, and its line in the help. A command is imported only when it is called, to keep
#: the start of ``lazypages serve`` short, which a restore waits for.
COMMANDS = {
    "serve": ("lazypages.cli.serve:serve", "Serve the memory of restored tasks on demand."),
    "daemon": ("lazypages.cli.daemon:daemon_command", "Serve many restores in one process."),
    "ctl": ("lazypages.cli.ctl:ctl", "Control a daemon: status, stop, wait."),
    "top": ("lazypages.cli.top:top", "Watch a daemon: faults, speed, missing pages."),
    "restore": ("lazypages.cli.restore:restore_command", "Restore tasks, as criu restore does."),
    "page-server": (
        "lazypages.cli.page_server:page_server_command",
        "Serve pages to restores on other hosts, or receive images.",
    ),
    "criu-shim": (
        "lazypages.cli.criu_shim:criu_shim",
        "Let tools that call criu use lazypages serve.",
    ),
    "doctor": ("lazypages.cli.doctor:doctor", "Say what works on this machine, and what does not."),
    "show": ("lazypages.cli.main:show", "Show the contents of an image directory."),
    "pack": ("lazypages.cli.pack:pack_command", "Pack a checkpoint into one compressed file."),
    "unpack": ("lazypages.cli.pack:unpack_command", "Unpack a packed checkpoint."),
    "plot": ("lazypages.cli.plot:plot_command", "Draw a trace that serve --trace has recorded."),
    "demo": ("lazypages.cli.demo:demo", "See it work: checkpoint a live task, restore it lazily."),
    "bench": ("lazypages.cli.bench:bench_command", "Compare with criu lazy-pages on this machine."),
}


class _Commands(click.Group):
    """Prints expected errors as one line, without a traceback."""

    def list_commands(self, ctx: click.Context) -> list[str]:  # noqa: ARG002
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:  # noqa: ARG002
        if cmd_name not in COMMANDS:
            return None
        module, name = COMMANDS[cmd_name][0].split(":")
        with importing_command():
            command = getattr(importlib.import_module(module), name)
        assert isinstance(command, click.Command)
        return command

    def shell_complete(self, ctx: click.Context, incomplete: str) -> list[CompletionItem]:
        """As click's, but by the names alone: click imports each command that may be meant."""
        from click.shell_completion import CompletionItem  # noqa: PLC0415 - only needed here

        return [
            *(
                CompletionItem(name, help=text)
                for name, (_, text) in COMMANDS.items()
                if name.startswith(incomplete)
            ),
            *click.Command.shell_complete(self, ctx, incomplete),
        ]

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:  # noqa: ARG002
        with formatter.section("Commands"):
            formatter.write_dl([(name, text) for name, (_, text) in COMMANDS.items()])

    def invoke(self, ctx: click.Context) -> object:
        try:
            return super().invoke(ctx)
        except (LazyPagesError, ImageError, ModuleNotFoundError) as error:
            if isinstance(error, ModuleNotFoundError):
                error = extras.missing(f"`{ctx.invoked_subcommand}`", error)
            click.echo(f"lazypages: {error}", err=True)
            ctx.exit(1)


@click.group(cls=_Commands, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, "-V", "--version")
def cli() -> None:
    """Restore a checkpointed process before its memory has arrived.

    \b
    Instead of                         run
      criu lazy-pages -D DIR             lazypages serve -D DIR
    beside
      criu restore --lazy-pages -D DIR   (the same, or lazypages restore)

    `lazypages demo` shows it with a task of its own. `lazypages COMMAND --help` explains each command.
    `criu dump` or `dumptool` takes the checkpoint.
    """


@click.command()
@click.argument("directory", metavar="DIR", type=click.Path())
@click.option(
    "--mappings", "each", is_flag=True, help="Print the pages of each task, and each of its mappings."
)
@click.option("--json", "as_json", is_flag=True, help="Print everything as JSON (docs/show.md).")
def show(directory: str, each: bool, as_json: bool) -> None:
    """Show the contents of the image directory or packed checkpoint DIR: tasks, mappings, and where their pages are."""
    from lazypages.cli import show as contents  # noqa: PLC0415 - slow to import
    from lazypages.cli.packs import place_of  # noqa: PLC0415

    shown = contents.load(place_of(directory))
    try:
        if as_json:
            import json  # noqa: PLC0415 - only needed here

            click.echo(json.dumps(contents.as_dict(shown)))
            return
        from rich.console import Console  # noqa: PLC0415 - only needed here, and slow to import

        contents.show(shown, Console(highlight=False), each=each)
    except OSError as error:
        if error.errno == errno.EPIPE:  # click ends quietly
            raise
        raise LazyPagesError(f"cannot write standard output: {error.strerror}") from None
