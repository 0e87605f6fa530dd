"""Batches of pages as zstd frames, between our own client and server.

A frame says how long its content is, and carries a checksum; both are checked. How much is compressed, and what
becomes of it, depends on the other side's memory alone: nothing is mixed with data of somebody else's.
"""

from __future__ import annotations

from typing import Final

from lazypages.errors import LazyPagesError

LEVEL: Final = 1
WORTH_IT: Final = 0.9  # of the original size, at most


class CompressionError(LazyPagesError):
    """What the peer calls compressed pages is not."""


class Compressor:
    """For one thread at a time."""

    def __init__(self) -> None:
        import zstandard  # noqa: PLC0415 - takes its time, and few need it

        self._compressor = zstandard.ZstdCompressor(level=LEVEL, write_checksum=True)

    def compress(self, data: bytes) -> bytes | None:
        """A frame; None when it would hardly be shorter than `data`."""
        frame = self._compressor.compress(data)
        return frame if len(frame) <= WORTH_IT * len(data) else None


def decompress(frame: bytes | bytearray, size: int) -> bytes:
    """The content of one frame, which is `size` bytes long. Raises CompressionError; needs no more memory than that."""
    import zstandard  # noqa: PLC0415

    try:
        if zstandard.frame_content_size(frame) != size:
            raise CompressionError(f"compressed pages are not {size} bytes long")
        data = zstandard.ZstdDecompressor().decompress(frame, allow_extra_data=False)
    except zstandard.ZstdError as error:
        raise CompressionError(f"compressed pages can't be read: {error}") from None
    if len(data) != size:
        raise CompressionError(f"compressed pages are not {size} bytes long")
    return data
