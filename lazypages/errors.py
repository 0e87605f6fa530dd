"""What can go wrong, said so that its reader knows what to do."""


class LazyPagesError(Exception):
    """Base of all errors that lazypages raises on purpose; its text is one line for the user."""
