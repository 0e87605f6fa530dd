"""What is done for a restore before a restorer may connect: everything that can be checked is checked here.

No event loop: a restore waits for this.
"""

from __future__ import annotations

import errno
import logging
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from images_spec.errors import ImageError
from lazypages.control import descriptors
from lazypages.engine import kernel
from lazypages.engine.memory import PAGE_SIZE
from lazypages.errors import LazyPagesError
from lazypages.loop.options import ServeOptions
from lazypages.sources.checkpoint import Expected, expect, written_by
from lazypages.wording import count, size

if TYPE_CHECKING:
    from lazypages.observe.tracing import Tracer

log = logging.getLogger("lazypages")


def read_checkpoint(
    images_dir: Path, options: ServeOptions, directories: Sequence[Path]
) -> dict[int, Expected]:
    """The tasks of a checkpoint, by pid. ``directories``: other images of the same dump.

    Raises ImageError, LazyPagesError.
    """
    try:
        return expect(images_dir, remote=bool(options.remote_sources), others=directories)
    except ImageError:
        if descriptors.exhausted():
            raise descriptors.too_few_for_images() from None
        raise


def with_memory(expected: Mapping[int, Expected]) -> dict[int, Expected]:
    """The tasks that are not zombies, by pid."""
    return {pid: task for pid, task in expected.items() if task.memory is not None}


def identified(options: ServeOptions, images_dir: Path) -> ServeOptions:
    """With what page servers must know of the checkpoint. Raises ImageError."""
    if not options.remote:
        return options
    from dataclasses import replace  # noqa: PLC0415 - slow to import

    from images_spec.identity import identify  # noqa: PLC0415 - only needed with a page server

    remote = replace(options.remote, checkpoint=identify(images_dir), written_by=written_by(images_dir))
    return options._replace(remote=remote)


def invitation(images_dir: Path, work_dir: Path, expected: Mapping[int, Expected]) -> str:
    """The message when a restore can be started: how much will be served, and the command to start it."""
    alive = with_memory(expected)
    pages = sum(task.lazy_pages for task in alive.values())
    where = f"-D {images_dir}"
    if work_dir != images_dir:
        where += f" -W {work_dir}"
    return (
        f"serving {size(pages * PAGE_SIZE)} for {count(len(alive), 'task')}; "
        f"waiting for: criu restore --lazy-pages {where}"
    )


def open_tracer(path: Path, images_dir: Path, expected: Mapping[int, Expected]) -> Tracer:
    """Create the trace's file; its thread starts later, in the daemon. Raises TraceError."""
    from lazypages.observe.tracing import Tracer  # noqa: PLC0415 - keeps the start short

    alive = with_memory(expected)
    levels = {pid: task.sources for pid, task in alive.items()}
    return Tracer(path, images_dir, levels, {pid: task.program for pid, task in alive.items()})


def check_userfaultfd() -> None:
    """The restore creates the uffds; if this process can't create one, the restore probably can't either.

    Raises LazyPagesError.
    """
    match kernel.try_userfaultfd():
        case errno.ENOSYS:
            raise LazyPagesError(kernel.NO_USERFAULTFD)
        case 0:
            pass
        case error:
            log.warning(
                "this process cannot create a userfaultfd (%s); the restore must be able to",
                os.strerror(error),
            )


def check_certificates(options: ServeOptions) -> None:
    """Raises TlsError."""
    if options.page_servers:
        from lazypages.sources.remote import check_certificates as check  # noqa: PLC0415 - slow to import

        check(options.page_servers, options.remote)
