"""A packed checkpoint in an object store as a source: as packed.py, with many reads under way at once.

The thread has an event loop of its own, because obstore needs asyncio's, whatever loop the server runs on.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Mapping
from typing import Final, NamedTuple

import anyio
from anyio.streams.memory import MemoryObjectReceiveStream, MemoryObjectSendStream

from images_spec.packed import HEADER, Reading
from lazypages.errors import LazyPagesError
from lazypages.net import wire
from lazypages.net.link import LinkError
from lazypages.net.objects import StoredObject
from lazypages.net.wire import Command, Header
from lazypages.sources.base import Connected
from lazypages.sources.disk_cache import DiskCache
from lazypages.sources.packed import Answerer, PackedPages, answered_by

READY: Final = b"\0"


class _Slot(NamedTuple):
    """The answer to a request, in the order of requests: complete when ``done`` is set."""

    done: anyio.Event
    buffers: list[bytes]


class StoreAnswerer(Answerer):
    """Answers in the order of requests; reads in any order. A read that fails for good ends the connection."""

    def __init__(self, pages: PackedPages, stored: StoredObject, cache: DiskCache | None) -> None:
        self._stored, self._cache = stored, cache
        self._coming: dict[int, anyio.Event] = {}  # frames that are being read
        super().__init__(pages)

    def pump(self) -> None:
        """Answers requests until the engine closes its end. Raises LazyPagesError, OSError."""
        anyio.run(self._serve, backend="asyncio", backend_options={"use_uvloop": False})

    async def _serve(self) -> None:
        self.inner.setblocking(False)
        failures: list[Exception] = []
        put, take = anyio.create_memory_object_stream[_Slot](math.inf)
        async with anyio.create_task_group() as group, put, take:

            async def ending(function: Callable[..., object], *args: object) -> None:
                """The first failure ends everything."""
                try:
                    await function(*args)  # type: ignore[misc]
                except (LazyPagesError, OSError) as error:
                    failures.append(error)
                    group.cancel_scope.cancel()

            group.start_soon(ending, self._begin)
            group.start_soon(ending, self._send_all, take)
            await ending(self._receive_all, put, lambda *args: group.start_soon(ending, *args))
            group.cancel_scope.cancel()
        if failures:
            raise failures[0]

    async def _begin(self) -> None:
        """Sends a byte as soon as the object has been read from: nothing is requested before."""
        await self._stored.read_async(0, HEADER.size)
        self.inner.send(READY)

    async def _receive_all(self, put: MemoryObjectSendStream[_Slot], start: Callable[..., None]) -> None:
        while True:
            await anyio.wait_readable(self.inner)
            try:
                self.codec.received(self.inner.recv_into(self.codec.writable()))
            except BlockingIOError:
                continue
            while (event := self.codec.next_event()) is not None:
                match event:
                    case Header(command=Command.GET):
                        slot = _Slot(anyio.Event(), [])
                        start(self._fill, event, slot)
                    case Header():  # the last one: CLOSE
                        slot = _Slot(anyio.Event(), [wire.answer_close()])
                        slot.done.set()
                    case _:
                        return
                put.send_nowait(slot)

    async def _send_all(self, take: MemoryObjectReceiveStream[_Slot]) -> None:
        async for slot in take:
            await slot.done.wait()
            rest = memoryview(b"".join(slot.buffers))
            while rest:
                try:
                    rest = rest[self.inner.send(rest) :]
                except BlockingIOError:
                    await anyio.wait_writable(self.inner)

    async def _fill(self, asked: Header, slot: _Slot) -> None:
        wanted = self.pages.find(asked.dst_id, asked.vaddr, asked.nr_pages)
        frames = await self._frames(wanted.frames)
        slot.buffers.extend(self.answer(asked, wanted, frames))
        slot.done.set()

    async def _frames(self, numbers: list[int]) -> Mapping[int, bytes]:
        """These frames, without those that are damaged. Each is read once, also for several requests at once."""
        frames = self.pages.kept(numbers)
        missing = [number for number in numbers if number not in frames]
        others = {number: self._coming[number] for number in missing if number in self._coming}
        await self._read([number for number in missing if number not in others], frames)
        for event in others.values():
            await event.wait()
        if others:
            frames |= self.pages.kept(list(others))
            await self._read([number for number in others if number not in frames], frames)
        return frames

    async def _read(self, numbers: list[int], frames: dict[int, bytes]) -> None:
        numbers = [number for number in numbers if not self._read_cached(number, frames)]
        event = anyio.Event()
        self._coming |= dict.fromkeys(numbers, event)
        try:
            async with anyio.create_task_group() as group:
                for reading in self.pages.reader.readings(numbers):
                    group.start_soon(self._read_one, reading, frames)
        except* LazyPagesError as errors:
            raise _first(errors) from None
        finally:
            for number in numbers:
                if self._coming.get(number) is event:
                    del self._coming[number]
            event.set()

    def _read_cached(self, number: int, frames: dict[int, bytes]) -> bool:
        """Whether the cache has the frame; it does not wait for the network, so it need not be asynchronous."""
        reader = self.pages.reader
        if self._cache is None or not reader.is_intact(
            number, data := self._cache.read(*reader.place(number))
        ):
            return False
        contents = self.pages.decode(number, data)
        if contents is not None:
            frames[number] = contents
        return True

    async def _read_one(self, reading: Reading, frames: dict[int, bytes]) -> None:
        data = await self._stored.read_async(reading.offset, reading.size)
        for number, part in self.pages.reader.split(reading, data):
            contents = self.pages.decode(number, part)
            if contents is not None:
                frames[number] = contents
                if self._cache is not None:
                    self._cache.write(self.pages.reader.place(number)[0], part)


def _first(errors: BaseExceptionGroup[LazyPagesError]) -> LazyPagesError:
    """One of a group of errors, which may contain groups."""
    error: BaseException = errors
    while isinstance(error, BaseExceptionGroup):
        error = error.exceptions[0]
    assert isinstance(error, LazyPagesError)
    return error


class StoredSource:
    """A packed checkpoint in an object store. While the object can't be had, connections fail, and tasks wait."""

    kind = "pack"
    once = False

    def __init__(self, pages: PackedPages, stored: StoredObject, cache: DiskCache | None) -> None:
        self.name = stored.url
        self._pages, self._stored, self._cache = pages, stored, cache

    async def connect(
        self,
        *,
        spare: bool,  # noqa: ARG002 - each connection is as good as the other
        urgent_only: bool,  # noqa: ARG002
        reached: Callable[[], None],
    ) -> Connected:
        """Raises LinkError."""
        found = await answered_by(
            lambda: StoreAnswerer(self._pages, self._stored, self._cache), self, reached
        )
        carrier, began = found.carrier, b""
        try:
            await anyio.wait_readable(carrier.fileno())
            began = os.read(carrier.fileno(), 1)
        finally:
            if began != READY:
                with anyio.CancelScope(shield=True):
                    await carrier.aclose()
        if began != READY:
            raise carrier.failure or LinkError("the thread that reads has ended")
        return found
