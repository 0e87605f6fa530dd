"""Batches of pages as zstd frames, between our own client and server.

A frame has the length of its content and a checksum; both are checked. A frame contains pages of one task only, so its
size reveals nothing about the data of others.
"""

from __future__ import annotations

from typing import Final

from lazypages.errors import LazyPagesError

LEVEL: Final = 1
WORTH_IT: Final = 0.9  # largest ratio of the sizes at which a frame is sent


class CompressionError(LazyPagesError):
    """The peer sent an invalid frame."""


class Compressor:
    """A zstd compressor; for one thread at a time."""

    def __init__(self) -> None:
        import zstandard  # noqa: PLC0415 - slow to import, and rarely needed

        self._compressor = zstandard.ZstdCompressor(level=LEVEL, write_checksum=True)

    def compress(self, data: bytes) -> bytes | None:
        """A frame of `data`; None if it would be longer than WORTH_IT times `data`."""
        frame = self._compressor.compress(data)
        return frame if len(frame) <= WORTH_IT * len(data) else None


def decompress(frame: bytes | bytearray, size: int) -> bytes:
    """The content of one frame, which must be `size` bytes. Never allocates more than that. Raises CompressionError."""
    import zstandard  # noqa: PLC0415

    try:
        if zstandard.frame_content_size(frame) != size:
            raise CompressionError(f"compressed pages are not {size} bytes long")
        data = zstandard.ZstdDecompressor().decompress(frame, allow_extra_data=False)
    except zstandard.ZstdError as error:
        raise CompressionError(f"compressed pages are invalid: {error}") from None
    if len(data) != size:
        raise CompressionError(f"compressed pages are not {size} bytes long")
    return data
