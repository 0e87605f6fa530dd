"""The command ``lazypages``."""

from __future__ import annotations

import sys

import click

from images_spec.errors import ImageError
from lazypages.errors import LazyPagesError
from lazypages.serve_command import serve


class _Commands(click.Group):
    """Errors that we foresee are one line, never a traceback."""

    def invoke(self, ctx: click.Context) -> object:
        try:
            return super().invoke(ctx)
        except (LazyPagesError, ImageError) as error:
            click.echo(f"lazypages: {error}", err=True)
            ctx.exit(1)


@click.group(cls=_Commands, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(package_name="lazypages")
def cli() -> None:
    """Bring a checkpointed process back before its memory has arrived."""


cli.add_command(serve)


def main() -> None:
    """Entry point: exit status 0 for success, 1 for failure, 2 for a wrong command line."""
    sys.exit(cli())
