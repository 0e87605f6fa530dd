"""``lazypages ctl``: speaks to the resident daemon, for people and scripts (docs/daemon.md)."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import click

from lazypages.cli.daemon_socket import socket_option
from lazypages.engine.memory import PAGE_SIZE
from lazypages.errors import LazyPagesError
from lazypages.logs import printable
from lazypages.resident.client import Client
from lazypages.wording import count, size

EPILOG = """\b
Exit status
  0  done; `wait`: as that of lazypages serve
  1  the daemon refused it, or there is no daemon
  2  wrong command line
"""


class _Ctl(NamedTuple):
    path: Path
    as_json: bool

    def request(self, do: str, **fields: Any) -> dict[str, Any]:
        """Raises ClientError, RefusedError."""
        with Client(self.path) as client:
            return client.request(do, **fields)

    def show(self, answer: Mapping[str, Any], text: str) -> None:
        if self.as_json:
            click.echo(
                json.dumps({name: value for name, value in answer.items() if name not in {"id", "ok"}})
            )
        elif text:
            click.echo(text)


_pass = click.make_pass_decorator(_Ctl)
_restore = click.argument("restore", metavar="RESTORE", type=click.IntRange(min=1))
_now = click.option("--now", is_flag=True, help="Kill tasks that miss memory instead of completing them.")


@click.group(epilog=EPILOG)
@socket_option("The daemon's socket.")
@click.option("--json", "as_json", is_flag=True, help="Print answers as JSON, each on one line.")
@click.pass_context
def ctl(ctx: click.Context, path: Path, *, as_json: bool) -> None:
    """Control a resident daemon (lazypages daemon).

    A restore has the number that `serve` and `status` print.
    """
    ctx.obj = _Ctl(path, as_json)


@ctl.command()
@click.option("-D", "--images-dir", metavar="DIR", type=click.Path(path_type=Path), default=Path())
@click.option("-W", "--work-dir", metavar="DIR", type=click.Path(path_type=Path))
@click.option("--no-background", is_flag=True, help="Copy pages only when they are touched.")
@_pass
def serve(ctl: _Ctl, images_dir: Path, work_dir: Path | None, *, no_background: bool) -> None:
    """Serve a checkpoint, and return when a restore can be started. Prints the number of the restore.

    `lazypages serve --via` has more options, and waits until the restore has ended.
    """
    answer = ctl.request(
        "serve",
        images=str(images_dir.absolute()),
        work=str((work_dir or images_dir).absolute()),
        background=not no_background,
    )
    ctl.show(answer, str(answer["restore"]))


@ctl.command()
@click.argument("restore", metavar="[RESTORE]", type=click.IntRange(min=1), required=False)
@_pass
def status(ctl: _Ctl, restore: int | None) -> None:
    """Show all restores, or one."""
    answer = ctl.request("status", restore=restore)
    if restore is not None:
        ctl.show(answer, _line(answer))
        return
    limits = answer["limits"]
    head = (
        f"lazypages {answer['version']}, pid {answer['pid']}: {limits['restores']['used']} of "
        f"{limits['restores']['max']} restores, {limits['descriptors']['used']} of {limits['descriptors']['max']} "
        f"file descriptors{', ending' if answer['closing'] else ''}"
    )
    ctl.show(answer, "\n".join([head, *map(_line, answer["restores"])]))


def _line(restore: Mapping[str, Any]) -> str:
    """One restore."""
    pending = restore["pages"]["pending"]
    state = restore["state"]
    if state == "ended":
        state += f" with {restore['exit']}"
    why = f": {restore['error']}" if restore["error"] else ""
    return printable(
        f"{restore['restore']}: {state}, {count(restore['tasks']['served'], 'task')}, "
        f"{size(pending * PAGE_SIZE)} to go, {restore['seconds']:.1f} s, {restore['images']}{why}"
    )


@ctl.command()
@_restore
@_pass
def complete(ctl: _Ctl, restore: int) -> None:
    """Copy all missing pages now, also after --no-background."""
    ctl.show(ctl.request("complete", restore=restore), "")


@ctl.command()
@_restore
@click.pass_context
def wait(ctx: click.Context, restore: int) -> None:
    """Wait until a restore has ended; exit with its status."""
    ctl: _Ctl = ctx.obj
    answer = ctl.request("wait", restore=restore)
    ctl.show(answer, _line(answer))
    ctx.exit(answer["exit"])


@ctl.command()
@_restore
@_now
@_pass
def stop(ctl: _Ctl, restore: int, *, now: bool) -> None:
    """End a restore: at once before a restorer has connected, else as soon as all tasks are complete."""
    ctl.show(ctl.request("stop", restore=restore, now=now), "")


@ctl.command()
@_restore
@click.option("--pid", metavar="PID", type=click.IntRange(min=1), required=True, help="As in the images.")
@click.argument("first", metavar="START-END")
@_pass
def first(ctl: _Ctl, restore: int, pid: int, first: str) -> None:
    """Copy the pages of a task in START-END before all others: hexadecimal addresses, as in /proc/PID/maps."""
    try:
        start, end = (int(part, 16) for part in first.split("-"))
    except ValueError:
        raise LazyPagesError(f"{first!r} is not START-END, as in /proc/PID/maps") from None
    ctl.show(ctl.request("first", restore=restore, pid=pid, start=start, end=end), "")


@ctl.command()
@_now
@_pass
def shutdown(ctl: _Ctl, *, now: bool) -> None:
    """End the daemon when all its restores are complete, and wait for that. It admits no other restore meanwhile."""
    with Client(ctl.path) as client:
        answer = client.request("shutdown", now=now)
        client.closed()
    ctl.show(answer, "")
