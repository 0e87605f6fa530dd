"""Options of `criu dump` that dumptool passes on to it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeVar

import click

from dumptool.backend import Backend, Choice

F = TypeVar("F", bound=Callable[..., Any])

FLAGS = {
    "tcp-established": "Save established TCP connections.",
    "tcp-close": "Save established TCP connections as closed ones.",
    "ext-unix-sk": "Allow connected Unix sockets whose other end is outside of the tree.",
    "link-remap": "Allow deleted files that have another name: make a temporary link.",
    "evasive-devices": "Use any path to a device file if the original one is gone.",
    "force-irmap": "Find the paths of inotify watches.",
    "skip-in-flight": "Leave out connections that are being made.",
}
VALUES = {
    "external": ("RESOURCE", "Do not save this; it is there at the restore. May be repeated."),
    "manage-cgroups": ("MODE", "How to save cgroups; `ignore`: not at all."),
    "freeze-cgroup": ("PATH", "Stop the tree by this cgroup."),
    "root": ("DIR", "Root directory of the tree, if it has a mount namespace of its own."),
    "ghost-limit": ("SIZE", "Largest deleted file that is saved."),
    "network-lock": ("METHOD", "How to lock connections: iptables, nftables or skip."),
}

OURS_SHORT = ("-t", "-D", "-o", "-R", "-s", "-W")
OURS = (
    *(
        "--tree",
        "--images-dir",
        "--log-file",
        "--leave-running",
        "--leave-stopped",
        "--lazy-pages",
        "--page-server",
    ),
    *(
        "--ps-socket",
        "--status-fd",
        "--prev-images-dir",
        "--track-mem",
        "--auto-dedup",
        "--work-dir",
        "--address",
    ),
    *("--port", "--timeout", "--stream", "--pidfile", "--daemon"),
)
"""Options that have to be given to dumptool itself, or can't be combined with what it makes of CRIU."""


def criu_options(command: F) -> F:
    """Adds --backend, --criu, and the options above to a command."""
    added = [
        click.option(
            "--backend",
            type=click.Choice([backend.value for backend in Backend]),
            default=Backend.AUTO.value,
            show_default=True,
            help="What saves all but the memory: dumptool's own code, or CRIU. auto: CRIU where our own can't, or if "
            "options of CRIU are given.",
        ),
        click.option(
            "--criu",
            metavar="PATH",
            type=click.Path(path_type=Path),
            help="CRIU.  [default: the first `criu` in PATH]",
        ),
        *(click.option(f"--{name}", is_flag=True, help=f"CRIU: {text}") for name, text in FLAGS.items()),
        *(
            click.option(f"--{name}", metavar=metavar, multiple=True, help=f"CRIU: {text}")
            for name, (metavar, text) in VALUES.items()
        ),
        click.argument("rest", metavar="[-- OPTIONS OF CRIU]", nargs=-1, type=click.UNPROCESSED),
    ]
    for option in reversed(added):
        command = option(command)
    return command


def choice(options: dict[str, Any]) -> Choice:
    """What the options say. Raises ``click.UsageError``."""
    rest: Sequence[str] = options["rest"]
    if rest and not rest[0].startswith("-"):
        raise click.UsageError(f"unexpected argument {rest[0]!r}: options for CRIU come after --")
    for word in rest:
        name = word.partition("=")[0]
        if name in OURS or name[:2] in OURS_SHORT:
            raise click.UsageError(
                f"{name} can't be passed on to CRIU: dumptool sets it from its own options"
            )
    arguments = [f"--{name}" for name in FLAGS if options[name.replace("-", "_")]]
    for name in VALUES:
        for value in options[name.replace("-", "_")]:
            arguments += [f"--{name}", value]
    backend = Backend(options["backend"])
    if backend is Backend.OWN and (arguments or rest):
        raise click.UsageError(f"{(arguments or rest)[0]} is an option of CRIU: it goes with --backend criu")
    return Choice(backend, options["criu"], (*arguments, *rest))
