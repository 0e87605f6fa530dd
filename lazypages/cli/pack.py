"""``lazypages pack`` and ``lazypages unpack``."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import click

from images_spec import packing
from images_spec.flags import PAGE_SIZE
from images_spec.packing import Progress
from lazypages.outputs import check_output


@click.command(name="pack")
@click.argument("directory", metavar="DIR", type=click.Path(path_type=Path))
@click.option(
    "-o",
    "--output",
    "target",
    metavar="FILE",
    required=True,
    type=click.Path(path_type=Path),
    help="The packed checkpoint; must not exist.",
)
def pack_command(directory: Path, target: Path) -> None:
    """Pack the checkpoint in DIR, with its parents, into one file.

    Pages are compressed (zstd). Pages that are equal are stored once, zero pages not at all. What is unpacked again has
    no parents. Whatever is read from a pack is checked: a damaged one is an error, never other memory.
    """
    check_output("-o", target)
    total = packing.bytes_of_pages(directory)
    with _progress(total, "packing") as progress:
        done = packing.pack(directory, target, progress)
    pages = f"{done.pages:,} pages, {done.zero_pages:,} of them zero, {done.stored_pages:,} stored"
    click.echo(f"{target}: {_mib(done.size)} of {_mib(total)} ({pages})")


@click.command(name="unpack")
@click.argument("packed", metavar="FILE", type=click.Path(path_type=Path))
@click.option(
    "-D",
    "--images-dir",
    "directory",
    metavar="DIR",
    required=True,
    type=click.Path(path_type=Path),
    help="Where the images go; created, or an empty directory.",
)
def unpack_command(packed: Path, directory: Path) -> None:
    """Unpack a checkpoint that `lazypages pack` has made, for criu restore or lazypages serve."""
    with packing.open_pack(packed) as reader:
        total = sum(area.pages for area in reader.areas) * PAGE_SIZE
        with _progress(total, "unpacking") as progress:
            packing.unpack(reader, directory, progress)


@contextmanager
def _progress(total: int, label: str) -> Iterator[Progress]:
    """A bar on a terminal."""
    if not sys.stderr.isatty():
        yield lambda _: None
        return
    with click.progressbar(length=total, label=label, file=sys.stderr) as bar:
        yield bar.update


def _mib(size: int) -> str:
    return f"{size / (1 << 20):,.1f} MiB"
