"""``lazypages serve``: options as those of ``criu lazy-pages``, and what happens around the event loop."""

from __future__ import annotations

import json
import logging
import os
import sys
from pathlib import Path
from typing import Any

import anyio
import click

from lazypages.control import ControlSocket
from lazypages.errors import LazyPagesError
from lazypages.loop.server import ServeOptions, Server
from lazypages.metrics import Summary
from lazypages.restored import expect

LOOPS: dict[str, tuple[str, dict[str, Any]]] = {
    "uvloop": ("asyncio", {"use_uvloop": True}),
    "asyncio": ("asyncio", {"use_uvloop": False}),
    "trio": ("trio", {}),
}


@click.command()
@click.option("-D", "--images-dir", type=click.Path(path_type=Path), default=Path(), help="Image directory.")
@click.option("-W", "--work-dir", type=click.Path(path_type=Path), help="Directory of socket, log, pidfile.")
@click.option("-o", "--log-file", type=click.Path(path_type=Path), help="Log to this file.")
@click.option("-v", "--verbosity", is_flag=False, flag_value="1", multiple=True, help="Level 0 to 4.")
@click.option("--status-fd", type=int, help="Write one 0 byte to this fd when ready.")
@click.option("--no-background", is_flag=True, help="Leave pages until they are touched.")
@click.option("--stats-json", type=click.Path(path_type=Path), help="Write the summary to this file.")
@click.option(
    "--loop", type=click.Choice(list(LOOPS)), default="uvloop", envvar="LAZYPAGES_LOOP", hidden=True
)
@click.pass_context
def serve(
    ctx: click.Context,
    images_dir: Path,
    work_dir: Path | None,
    log_file: Path | None,
    verbosity: tuple[str, ...],
    status_fd: int | None,
    no_background: bool,
    stats_json: Path | None,
    loop: str,
) -> None:
    """Serve the memory of tasks restored with criu restore --lazy-pages."""
    work_dir = work_dir or images_dir
    logging.basicConfig(
        level=logging.DEBUG,
        stream=sys.stderr if log_file is None else (work_dir / log_file).open("a"),
        format="%(asctime)s %(levelname)s %(message)s",
    )
    expected = expect(images_dir, remote=False)
    with ControlSocket(work_dir) as control:
        server = Server(expected, control, ServeOptions(background=not no_background))
        if status_fd is not None:
            tell_ready(status_fd)
        backend, backend_options = LOOPS[loop]
        summary = anyio.run(server.run, backend=backend, backend_options=backend_options)
    if stats_json:
        write_stats(stats_json, summary)
    ctx.exit(0 if summary.ok else 1)


def tell_ready(status_fd: int) -> None:
    """One 0 byte, then the fd is closed, as ``criu lazy-pages`` does. Raises LazyPagesError."""
    try:
        os.write(status_fd, b"\0")
        os.close(status_fd)
    except OSError as error:
        raise LazyPagesError(f"--status-fd {status_fd}: {error.strerror}") from error


def write_stats(path: Path, summary: Summary) -> None:
    try:
        path.write_text(json.dumps(summary.as_dict(), indent=2) + "\n")
    except OSError as error:
        raise LazyPagesError(f"--stats-json {path}: {error.strerror}") from error
