"""The one error of this package."""

from os import PathLike, fspath


class ImageError(Exception):
    """An image is missing, malformed, or contradicts itself or its neighbours.

    ``path``: the file or directory; ``what``: what is wrong with it; ``offset``: the byte at which, where
    there is such a place.
    """

    def __init__(self, path: str | PathLike[str], what: str, *, offset: int | None = None) -> None:
        super().__init__(path, what)
        self.path = fspath(path)
        self.what = what
        self.offset = offset

    def __str__(self) -> str:
        place = "" if self.offset is None else f" (at byte {self.offset})"
        return f"{self.path}: {self.what}{place}"


class ImageMissingError(ImageError):
    """The file is not there."""
