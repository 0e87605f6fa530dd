"""The engine's channels (csrc/serve/channels.h) without tasks: whoever asks for pages gets them in Python."""

from __future__ import annotations

import atexit
import importlib.util
import shutil
import tempfile
import threading
from collections.abc import Callable
from functools import cache
from pathlib import Path
from types import TracebackType
from typing import Any, Self, Unpack

from cffi import FFI

from lazypages.engine.channel import Channel, ChannelOptions
from tests.support.compiling import CHANNEL_SOURCES, csrc_modules

ROOT = Path(__file__).parents[2]

_DECLARATIONS = """
typedef int (*lp_sink_place)(void *arg, uint64_t tag, uint64_t dump_addr, uint64_t nr_pages, const void *bytes);
struct lp_sink;
struct lp_sink *lp_sink_new(lp_sink_place place, void *arg);
struct lp_channels *lp_sink_channels(struct lp_sink *sink);
void lp_sink_run(struct lp_sink *sink);
void lp_sink_stop(struct lp_sink *sink);
void lp_sink_free(struct lp_sink *sink);
"""


_one_at_a_time = threading.Lock()


def _library() -> Any:
    with _one_at_a_time:  # tests start sinks in several threads
        return _compiled()


@cache
def _compiled() -> Any:
    folder = tempfile.mkdtemp(prefix="lazypages-sink-")
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    builder = FFI()
    builder.cdef(csrc_modules()["declarations"]("serve/channel.h") + _DECLARATIONS)
    builder.set_source(
        "lazypages_sink",
        '#include "sink.h"',
        sources=[str(ROOT / "tests/support/sink.c"), *CHANNEL_SOURCES],
        include_dirs=[str(ROOT / "csrc"), str(ROOT / "tests/support")],
        extra_compile_args=["-std=gnu11", "-O2"],
    )
    path = builder.compile(tmpdir=folder)
    spec = importlib.util.spec_from_file_location("lazypages_sink", path)
    assert spec
    assert spec.loader
    library = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(library)
    return library


class _SinkChannel(Channel):
    def __init__(self, channels: Any, fd: int, **options: Unpack[ChannelOptions]) -> None:
        self._ffi, self._lib = _library().ffi, _library().lib
        super().__init__(channels, fd, **options)


class Sink:
    """Makes channels, as the engine does.

    `on_pages(pid, address, data)` is called for pages as they come, in a thread.
    """

    def __init__(self, on_pages: Callable[[int, int, bytes], None]) -> None:
        self._ffi, self._lib = _library().ffi, _library().lib

        def place(_: Any, tag: int, image: int, nr_pages: int, data: Any) -> int:
            on_pages(tag, image, bytes(self._ffi.buffer(data, nr_pages * 4096)))
            return 0

        self._place = self._ffi.callback("lp_sink_place", place)
        self._handle = self._lib.lp_sink_new(self._place, self._ffi.NULL)
        self._thread = threading.Thread(target=self._lib.lp_sink_run, args=(self._handle,), daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._lib.lp_sink_stop(self._handle)
        self._thread.join(60)
        assert not self._thread.is_alive()
        self._lib.lp_sink_free(self._handle)

    def channel(self, fd: int, **options: Unpack[ChannelOptions]) -> Channel:
        """As Engine.channel."""
        return _SinkChannel(self._lib.lp_sink_channels(self._handle), fd, **options)
