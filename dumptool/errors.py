"""Errors of a dump."""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from dataclasses import dataclass

from lazypages.errors import LazyPagesError

MOST_PLACES = 8
"""Places that the line of one kind of refusals names."""


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


def one_line_each(refusals: Sequence[Refusal]) -> list[str]:
    """A line for each kind: all refusals whose texts differ only in numbers are one line, which names the places."""
    kinds: dict[tuple[str, str], list[Refusal]] = {}
    for refusal in refusals:
        kind = refusal.where.partition(" ")[0], re.sub(r"\d+", "0", refusal.what)
        kinds.setdefault(kind, []).append(refusal)
    return [_line(*of_kind) for of_kind in kinds.values()]


def _line(first: Refusal, *others: Refusal) -> str:
    if not others:
        return str(first)
    places: list[str] = []
    pid = first.pid
    for refusal in others:
        place = [f"pid {refusal.pid}"] if refusal.pid != pid else []
        pid = refusal.pid
        if text := " ".join([*place, *([refusal.where] if refusal.where else [])]):
            places.append(text)
    named = ", ".join(places[:MOST_PLACES]) + (", ..." if len(places) > MOST_PLACES else "")
    return f"{first} ({len(others)} more of this kind{': ' if named else ''}{named})"


class UnsupportedError(DumpError):
    """The tasks have properties that can't be saved. ``refusals`` is not empty."""

    def __init__(self, refusals: Sequence[Refusal]) -> None:
        self.refusals = tuple(refusals)
        super().__init__("can't be dumped: " + "; ".join(map(str, self.refusals)))


def system_error(number: int, what: str) -> DumpError:
    """The exception for a positive errno. ``what``: the operation that failed."""
    kind = TaskGoneError if number == 3 else DumpError  # ESRCH
    return kind(f"{what}: {os.strerror(number)}")
