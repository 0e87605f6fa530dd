"""Errors of a dump."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass

from lazypages.errors import LazyPagesError


class DumpError(LazyPagesError):
    """The dump failed; the tasks go on as before."""


class TaskGoneError(DumpError):
    """A process or thread has exited in the meantime."""


@dataclass(frozen=True, slots=True, order=True)
class Refusal:
    """A property of a process that images can't hold.

    ``where``: for instance "fd 3" or "mapping 7f00-7f10"; "" for the process itself.
    """

    pid: int
    where: str
    what: str

    def __str__(self) -> str:
        place = f" {self.where}" if self.where else ""
        return f"pid {self.pid}{place}: {self.what}"


class UnsupportedError(DumpError):
    """The tasks have properties that can't be saved. ``refusals`` is not empty."""

    def __init__(self, refusals: Sequence[Refusal]) -> None:
        self.refusals = tuple(refusals)
        super().__init__("can't be dumped: " + "; ".join(map(str, self.refusals)))


def system_error(number: int, what: str) -> DumpError:
    """The exception for a positive errno. ``what``: the operation that failed."""
    kind = TaskGoneError if number == 3 else DumpError  # ESRCH
    return kind(f"{what}: {os.strerror(number)}")
