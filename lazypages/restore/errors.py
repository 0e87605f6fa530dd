"""Errors of a restore."""

from lazypages.errors import LazyPagesError


class RestoreError(LazyPagesError):
    """The checkpoint can't be restored on this machine. Nothing has been created."""
