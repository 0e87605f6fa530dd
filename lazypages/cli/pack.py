"""``lazypages pack`` and ``lazypages unpack``."""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import click

from images_spec import packing
from images_spec.flags import PAGE_SIZE
from images_spec.packing import Progress
from lazypages.cli.packs import opened, place_of
from lazypages.outputs import check_output


@click.command(name="pack")
@click.argument("directory", metavar="DIR", type=click.Path(path_type=Path))
@click.option(
    "-o",
    "--output",
    "target",
    metavar="FILE",
    required=True,
    type=click.Path(),
    help="The packed checkpoint, which must not exist: a file, or an object in a store (s3://BUCKET/KEY, gs://, az://, "
    "http://, https://).",
)
def pack_command(directory: Path, target: str) -> None:
    """Pack the checkpoint in DIR, with its parents, into one file.

    Pages are compressed (zstd). Pages that are equal are stored once, zero pages not at all. What is unpacked again has
    no parents. Whatever is read from a pack is checked: a damaged one is an error, never other memory.
    """
    place = place_of(target)
    with _file(place) as file:
        total = packing.bytes_of_pages(directory)
        with _progress(total, "packing") as progress:
            done = packing.pack(directory, file, progress)
        if isinstance(place, str):
            from lazypages.net.objects import upload  # noqa: PLC0415 - slow to import

            upload(file, place)
    pages = f"{done.pages:,} pages, {done.zero_pages:,} of them zero, {done.stored_pages:,} stored"
    click.echo(f"{target}: {_mib(done.size)} of {_mib(total)} ({pages})")


@click.command(name="unpack")
@click.argument("packed", metavar="FILE", type=click.Path())
@click.option(
    "-D",
    "--images-dir",
    "directory",
    metavar="DIR",
    required=True,
    type=click.Path(path_type=Path),
    help="Where the images go; created, or an empty directory.",
)
def unpack_command(packed: str, directory: Path) -> None:
    """Unpack a checkpoint that `lazypages pack` has made, for criu restore or lazypages serve.

    FILE may also be an object in a store: s3://BUCKET/KEY, gs://, az://, http://, https://.
    """
    with opened(place_of(packed)) as reader:
        total = sum(area.pages for area in reader.areas) * PAGE_SIZE
        with _progress(total, "unpacking") as progress:
            packing.unpack(reader, directory, progress)


@contextmanager
def _file(place: Path | str) -> Iterator[Path]:
    """Where the pack is written: for a store, a temporary file, since its size must be known first.

    Raises LazyPagesError.
    """
    if isinstance(place, Path):
        check_output("-o", place)
        yield place
        return
    from lazypages.net.objects import check_free  # noqa: PLC0415 - slow to import

    check_free(place)
    with tempfile.TemporaryDirectory(prefix="lazypages-pack-") as folder:
        yield Path(folder, "pack")


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
