"""Which of the two saves what is not memory: dumptool itself, or CRIU (``--backend``)."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from enum import Enum
from pathlib import Path

from dumptool.criu import find_criu
from dumptool.criu_dump import ByCriu, dump_by_criu
from dumptool.dump import dump
from dumptool.errors import DumpError, UnsupportedError
from dumptool.settings import Report, Serve, Settings, Watcher
from lazypages.logs import MESSAGE

log = logging.getLogger("lazypages")


class Backend(Enum):
    """``--backend``."""

    AUTO = "auto"
    OWN = "own"
    CRIU = "criu"


@dataclass(frozen=True, slots=True)
class Choice:
    """The command line. ``criu``: its path, None: from PATH. ``arguments``: options for it."""

    backend: Backend = Backend.AUTO
    criu: Path | None = None
    arguments: Sequence[str] = ()


def dump_by(choice: Choice, settings: Settings, watcher: Watcher, serve: Serve | None = None) -> Report:
    """Dumps the tree with the backend that was chosen, and says which that is. Raises as both of them."""
    why = "as --backend says"
    if choice.backend is not Backend.CRIU:
        if not choice.arguments:
            try:
                return dump(settings, watcher, serve)
            except UnsupportedError as error:
                if choice.backend is Backend.OWN or find_criu(choice.criu) is None:
                    raise
                others = len(error.refusals) - 1
                why = f"{error.refusals[0]}" + (f" (and {others} more)" if others else "")
        else:
            why = f"{choice.arguments[0]} is an option of CRIU"
    criu = find_criu(choice.criu)
    if criu is None:
        raise DumpError(f"there is no `criu` in PATH ({why}): install CRIU, or name it with --criu")
    log.log(MESSAGE, "CRIU %s (%s) saves everything but memory: %s", criu.version, criu.path, why)
    return dump_by_criu(settings, ByCriu(criu, tuple(choice.arguments)), watcher, serve)
