"""The exceptions of this package."""

from os import PathLike, fspath


class ImageError(Exception):
    """An image is missing or malformed, or contradicts itself or other images.

    ``path``: the file or directory. ``what``: the error. ``offset``: of the error in the file, in bytes, or None.
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
    """The file does not exist."""
