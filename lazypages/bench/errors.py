"""The error of the bench."""

from lazypages.errors import LazyPagesError


class BenchError(LazyPagesError):
    """A run failed, or a task found a wrong byte."""
