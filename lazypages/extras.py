"""Packages that not every command needs: the extras of pyproject.toml, and what to do where one is missing."""

from __future__ import annotations

import sys
from importlib.util import find_spec
from pathlib import Path

from lazypages.errors import LazyPagesError

#: Names of packages by the names of their modules.
EXTRAS = {name: name for name in ("rich", "zstandard", "matplotlib", "plotly", "obstore")}


class MissingError(LazyPagesError):
    """A package is not installed in this Python environment."""

    def __init__(self, what: str, package: str) -> None:
        super().__init__(f"{what} needs {package}: {how_to_install(package)}")


def have(module: str) -> bool:
    """Whether a module of EXTRAS is installed. Does not import it."""
    return find_spec(module) is not None


def how_to_install(package: str) -> str:
    """The command that puts a package of EXTRAS where this lazypages finds it: pip's, or that of the system's packages.

    The Python of a distribution refuses pip (the file EXTERNALLY-MANAGED beside its library).
    """
    import sysconfig  # noqa: PLC0415 - keeps the start short

    marker = Path(sysconfig.get_path("stdlib"), "EXTERNALLY-MANAGED")
    if sys.prefix == sys.base_prefix and marker.exists():
        return f"apt install python3-{package}, or that package of your distribution"
    return f"{sys.executable} -m pip install {package}"


def missing(what: str, error: ModuleNotFoundError) -> MissingError:
    """The error for a failed import in `what`, a command. Raises `error` if it is not a package of EXTRAS."""
    package = EXTRAS.get((error.name or "").split(".")[0])
    if package is None:
        raise error
    return MissingError(what, package)
