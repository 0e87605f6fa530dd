"""A packed checkpoint as a source: a thread answers the engine's requests from it, on a socket pair (base.py).

Each frame is checked against its digest before a byte of it is answered. A page whose frame is damaged, or can't be
read, is answered as missing: what becomes of it is decided as for a page server (pool.py).
"""

from __future__ import annotations

import logging
import threading
from collections import OrderedDict
from collections.abc import Callable, Mapping
from typing import Final, NamedTuple

from images_spec.errors import ImageError
from images_spec.packed import ZERO, PackReader, Run
from images_spec.without_lazy import LazyPages
from lazypages.net import wire
from lazypages.net.translator import Translator
from lazypages.net.wire import PAGE_SIZE, Command, Features, Header, Layout, ServerCodec
from lazypages.sources.base import Connected, Source
from lazypages.sources.shortage import made

log = logging.getLogger("lazypages")

FEATURES: Final = Features.MISSING | Features.CONNECTIONS | Features.ZERO
CACHE: Final = 16 << 20  # bytes of frames that are kept: a fault's neighbours are in its frame
LONG_ZEROS: Final = 16  # pages of zeros that end an answer; fewer are sent as bytes
REQUESTS: Final = 64 << 10  # bytes of the buffer for requests


class Wanted(NamedTuple):
    """What answers a request: ``runs`` in the pack, and the frames that they need, in the order of the pack.

    ``zeros``: pages of zeros, if the answer is only that.
    """

    runs: list[Run]
    frames: list[int]
    zeros: int = 0


class PackedPages:
    """The lazy pages of a packed checkpoint. Several threads may use it at once. ``tasks``: by pid."""

    def __init__(self, reader: PackReader, tasks: Mapping[int, LazyPages]) -> None:
        self.reader = reader
        self._tasks = tasks
        self._lock = threading.Lock()
        self._kept: OrderedDict[int, bytes] = OrderedDict()
        self._kept_bytes = 0
        self._complained: set[int] = set()

    def find(self, pid: int, address: int, nr_pages: int) -> Wanted:
        """Where the first of these pages are. ``address``: at dump time. Nothing, if the pack lacks the first one."""
        task = self._tasks.get(pid)
        if task is None:
            return Wanted([], [])
        extent = task.extents.find(address)
        if extent is None or extent.source:
            return Wanted([], [])
        first = (extent.offset + address - extent.start) // PAGE_SIZE
        count = min(nr_pages, (extent.end - address) // PAGE_SIZE)
        runs: list[Run] = []
        frames: set[int] = set()
        per_frame = self.reader.frame_pages
        for run in self.reader.runs(task.area, first, count):
            if run.first != ZERO:
                frames.update(range(run.first // per_frame, -(-(run.first + run.length) // per_frame)))
            elif not runs:
                return Wanted([], [], zeros=run.length)
            elif run.length >= LONG_ZEROS:
                break
            runs.append(run)
        return Wanted(runs, sorted(frames))

    def kept(self, frames: list[int]) -> dict[int, bytes]:
        """Those of these frames that are in memory."""
        found = {}
        with self._lock:
            for frame in frames:
                if (contents := self._kept.get(frame)) is not None:
                    self._kept.move_to_end(frame)
                    found[frame] = contents
        return found

    def decode(self, frame: int, data: bytes) -> bytes | None:
        """The contents of a frame from its bytes in the pack; None if they are wrong, which is logged once."""
        try:
            contents = self.reader.decode(frame, data)
        except ImageError as error:
            self.complain(frame, error)
            return None
        with self._lock:
            if frame not in self._kept:
                self._kept[frame] = contents
                self._kept_bytes += len(contents)
                while self._kept_bytes > CACHE:
                    self._kept_bytes -= len(self._kept.popitem(last=False)[1])
        return contents

    def complain(self, frame: int, error: ImageError) -> None:
        """Logs once why this frame can't be had."""
        with self._lock:
            known = frame in self._complained
            self._complained.add(frame)
        if not known:
            log.error("%s: its pages are not used", error)

    def pages(self, wanted: Wanted, frames: Mapping[int, bytes]) -> list[bytes]:
        """The bytes of the pages, up to the first whose frame is not in ``frames``."""
        parts: list[bytes] = []
        per_frame = self.reader.frame_pages
        for first, length in wanted.runs:
            if first == ZERO:
                parts.append(bytes(length * PAGE_SIZE))
                continue
            number, left = first, length
            while left:
                frame, within = divmod(number, per_frame)
                take = min(per_frame - within, left)
                contents = frames.get(frame)
                if contents is None:
                    return parts
                parts.append(self.reader.cut(frame, contents, within, take))
                number, left = number + take, left - take
        return parts


class Answerer(Translator):
    """Answers requests for pages. Raises OSError: it can't start."""

    def __init__(self, pages: PackedPages) -> None:
        self.pages = pages
        self.codec = ServerCodec(Layout.CRIU_4_2, size=REQUESTS)
        self.codec.features = FEATURES
        super().__init__("pack")

    def pump(self) -> None:
        """Answers one request after the other, until the engine closes its end. Raises LazyPagesError, OSError."""
        while True:
            count = self.inner.recv_into(self.codec.writable())
            self.codec.received(count)
            while (event := self.codec.next_event()) is not None:
                match event:
                    case Header(command=Command.GET):
                        self.forward(self._answer(event))
                    case Header():  # the last one: CLOSE
                        self.forward([wire.answer_close()])
                    case _:
                        return

    def _answer(self, asked: Header) -> list[bytes]:
        wanted = self.pages.find(asked.dst_id, asked.vaddr, asked.nr_pages)
        frames = self.pages.kept(wanted.frames)
        reader = self.pages.reader
        for reading in reader.readings(frame for frame in wanted.frames if frame not in frames):
            try:
                data = reader.read(reading)
            except ImageError as error:
                self.pages.complain(reading.blocks[0], error)
                continue
            for frame, part in reader.split(reading, data):
                contents = self.pages.decode(frame, part)
                if contents is not None:
                    frames[frame] = contents
        return self.answer(asked, wanted, frames)

    def answer(self, asked: Header, wanted: Wanted, frames: Mapping[int, bytes]) -> list[bytes]:
        """An answer, in parts: its header, and as many pages as the frames have."""
        if wanted.zeros:
            return [self.codec.answer_get(asked, wanted.zeros, zero=True)]
        parts = self.pages.pages(wanted, frames)
        return [self.codec.answer_get(asked, sum(map(len, parts)) // PAGE_SIZE), *parts]


async def answered_by(make: Callable[[], Answerer], source: Source, reached: Callable[[], None]) -> Connected:
    """Raises LinkError: the thread can't be started."""
    carrier = await made(make, "a thread", f"{source.kind} {source.name}", reached)
    return Connected(carrier, features=FEATURES, answered=True)


class PackedSource:
    """A packed checkpoint in a file that is open: what is at its path meanwhile is of no interest."""

    kind = "pack"
    once = False

    def __init__(self, pages: PackedPages) -> None:
        self.name = str(pages.reader.name)
        self._pages = pages

    async def connect(
        self,
        *,
        spare: bool,  # noqa: ARG002 - each connection is as good as the other
        urgent_only: bool,  # noqa: ARG002
        reached: Callable[[], None],
    ) -> Connected:
        """Raises LinkError: the thread can't be started."""
        return await answered_by(lambda: Answerer(self._pages), self, reached)
