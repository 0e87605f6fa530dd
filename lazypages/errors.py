"""Base classes of the errors. A message is one line: what happened, and what to do."""


class LazyPagesError(Exception):
    """Base of all expected errors. The text is one line for the user; the commands print it without a traceback."""


class UnreadableError(LazyPagesError):
    """A page is stored here but can't be read. It is lost, and must never be answered with other contents."""
