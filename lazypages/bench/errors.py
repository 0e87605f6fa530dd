"""What can go wrong in a bench."""

from lazypages.errors import LazyPagesError


class BenchError(LazyPagesError):
    """A run did not come to its end, or a task found a wrong byte."""
