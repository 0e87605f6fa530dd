"""Reads a checkpoint before any of its tasks is restored."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from images_spec import images as image_files
from images_spec.checkpoint import Checkpoint, TaskImages, open_checkpoint
from images_spec.errors import ImageError
from images_spec.images import Kind
from lazypages.engine.memory import PreparedMemory, TaskMemory
from lazypages.sources.local import MappedPages
from lazypages.wording import count, printable

if TYPE_CHECKING:
    from lazypages.net.wire import Layout


log = logging.getLogger("lazypages")

#: Reads images; yields ranges of a task as (start, end), in bytes.
Seen = Callable[[], Iterator[tuple[int, int]]]


class Expected(NamedTuple):
    """A task that a restore of the checkpoint will hand over. ``memory`` is None for a zombie.

    ``sources``: names of the levels, as in summaries: ``local``, ``parent-1``, ``parent-2``, ..., then
    ``local:DIR`` for directories beside the checkpoint.

    ``seen``: ranges to bring first, because other processes read them. ``program``: its name, safe to print.
    """

    pid: int
    memory: PreparedMemory | None
    lazy_pages: int
    sources: tuple[str, ...]
    seen: Seen | None = None
    program: str = ""


def level_names(count: int) -> tuple[str, ...]:
    return tuple("local" if level == 0 else f"parent-{level}" for level in range(count))


def expect(images_dir: Path, *, remote: bool, others: Sequence[Path] = ()) -> dict[int, Expected]:
    """Reads and checks a whole checkpoint, and maps its pages. Returns its tasks by pid.

    ``remote``: whether a page server may have lazy pages. ``others``: image directories of the same dump, searched in
    this order for lazy pages that this one lacks.

    Raises ImageError, also if no source has a lazy page: a restore that needs it would fail later.
    """
    checkpoint = open_checkpoint(images_dir)
    _check_same_dump(images_dir, others)
    known = [open_checkpoint(directory) for directory in others]
    mapped = MappedPages()
    return {
        task.pid: _expect_task(checkpoint.load_task(task.pid, remote), checkpoint, known, mapped)
        for task in checkpoint.tasks
    }


def _check_same_dump(images_dir: Path, others: Sequence[Path]) -> None:
    """Raises ImageError if a directory is of another dump: its pages are memory of another moment."""
    if not others:
        return
    from images_spec.identity import identify  # noqa: PLC0415 - only needed beside other directories

    for directory in others:
        if identify(directory) != identify(images_dir):
            raise ImageError(directory, f"is not of the same dump as {images_dir}: not using its pages")


def written_by(images_dir: Path) -> Layout | None:
    """The protocol of the CRIU that wrote the images, by the field in which its pagemaps count pages. A hint at the
    protocol of its page server.

    None if the images do not show it. Raises ImageError.
    """
    # slow to import, and only needed with a page server
    from images_spec.pagemap_pb2 import PagemapEntry  # noqa: PLC0415
    from lazypages.net.wire import Layout  # noqa: PLC0415

    for task in open_checkpoint(images_dir).tasks:
        path = images_dir / Kind.PAGEMAP.file_name(task.pid)
        if not path.exists():
            continue  # a zombie
        for message in image_files.iter(path, Kind.PAGEMAP):
            if isinstance(message, PagemapEntry):
                if not message.HasField("nr_pages"):
                    return Layout.CRIU_4_1
                return None if message.compat_nr_pages else Layout.CRIU_4_2
    return None


def _expect_task(
    images: TaskImages, checkpoint: Checkpoint, others: Sequence[Checkpoint], mapped: MappedPages
) -> Expected:
    if images.is_dead:
        return Expected(images.pid, None, 0, ())
    extents, levels = images.extents, list(images.levels)
    names = list(level_names(len(levels)))
    for other in others:
        if all(task.pid != images.pid for task in other.tasks):
            continue
        more = other.load_task(images.pid, False)
        extents = extents.filled_from(more.extents)
        levels += more.levels
        names += [f"local:{level.directory}" for level in more.levels]
    counts = extents.counts()
    if counts.lost.lazy:
        path = checkpoint.directory / f"pagemap-{images.pid}.img"
        raise ImageError(path, _lost_text(images, counts.lost.lazy))
    memory = TaskMemory(
        extents=extents,
        vmas=images.vmas,
        wiped=images.wiped,
        levels=[mapped.map(level.pages, level.pages_size) for level in levels],
    )
    try:
        prepared = PreparedMemory(memory)
    except OSError as error:
        path = checkpoint.directory / f"pagemap-{images.pid}.img"
        raise ImageError(path, f"cannot prepare the memory of the task: {error.strerror}") from error
    return Expected(
        images.pid,
        prepared,
        sum(level.lazy for level in counts.levels) + counts.remote.lazy,
        tuple(names),
        partial(_seen, checkpoint, images),
        printable(images.comm),
    )


def _seen(checkpoint: Checkpoint, images: TaskImages) -> Iterator[tuple[int, int]]:
    yield from images.seen
    try:
        yield from checkpoint.thread_stacks(images.pid)
    except ImageError as error:  # these ranges only set the order of transfer
        log.warning("%s", error)


def _lost_text(images: TaskImages, lost: int) -> str:
    if len(images.levels) > 1:
        where = "neither in this image nor in its parents"
    else:
        where = "not in this image, which has no parent"
    missing = count(lost, "lazy page is", "lazy pages are")
    return (
        f"{missing} {where}; if they are still at the source (dump --lazy-pages), name its page "
        "server with --page-server --address --port"
    )
