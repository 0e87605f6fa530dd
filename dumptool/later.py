"""Pages that are copied to memory while the tree stands still, and written once it runs again."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field

from dumptool.errors import DumpError
from dumptool.memory import Image, Runs, Sink
from dumptool.send import STEP_PAGES
from images_spec.flags import PAGE_SIZE, PE_PRESENT
from lazypages.cli.probes import memory_available

SHARE = 4
"""At most this part of the available memory is filled."""


def room() -> int:
    """Pages that may be copied to memory: a quarter of what is available now, also in our memory cgroup."""
    return (memory_available() or 0) // SHARE // PAGE_SIZE


@dataclass(frozen=True, slots=True)
class _InMemory:
    """An image in memory; see ``dumptool.memory.Image``."""

    pages_fd: int
    steps: list[Runs]
    step_pages: int = STEP_PAGES
    durable: bool = False

    def add(self, runs: Runs) -> None:
        copy = Runs(runs.count)
        copy.extend(runs)
        self.steps.append(copy)


@dataclass(slots=True)
class Later:
    """A ``Sink`` whose image goes to ``target`` when ``write_out`` is called. ``resources`` frees the memory."""

    target: Sink
    resources: ExitStack
    _fd: int = -1
    _steps: list[Runs] = field(default_factory=list)

    @contextmanager
    def open(self) -> Iterator[Image]:
        """Raises ``DumpError``."""
        try:
            self._fd = os.memfd_create("dumptool-pages", os.MFD_CLOEXEC)
        except OSError as error:
            raise DumpError(f"no memory for a copy of the pages: {error.strerror}") from None
        self.resources.callback(os.close, self._fd)
        yield _InMemory(self._fd, self._steps)

    def write_out(self) -> None:
        """Raises as the target does, and ``DumpError``."""
        offset = 0
        with self.target.open() as image:
            for runs in self._steps:
                size = runs.pages(PE_PRESENT) * PAGE_SIZE
                _copy(self._fd, offset, image.pages_fd, size)
                offset += size
                image.add(runs)

    def remove(self) -> None:
        self.target.remove()


def _copy(source: int, offset: int, target: int, size: int) -> None:
    end = offset + size
    try:
        while offset < end:
            offset += os.sendfile(target, source, offset, end - offset)
    except OSError as error:
        raise DumpError(
            f"{os.readlink(f'/proc/self/fd/{target}')}: can't be written: {error.strerror}"
        ) from None


def put_off(sinks: Iterable[tuple[Sink, int]], pages: int, resources: ExitStack) -> list[Sink]:
    """The sinks, given with their numbers of pages; those that fit in memory, ``pages`` in all, as ``Later``."""
    made: list[Sink] = []
    for sink, size in sinks:
        if size <= pages:
            pages -= size
            made.append(Later(sink, resources))
        else:
            made.append(sink)
    return made
