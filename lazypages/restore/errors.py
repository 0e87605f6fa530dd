"""Why a checkpoint is not restored."""

from lazypages.errors import LazyPagesError


class RestoreError(LazyPagesError):
    """Something that can't be brought back here and now. Nothing has been created."""
