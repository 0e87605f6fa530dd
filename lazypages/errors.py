"""What can go wrong, said so that its reader knows what to do."""


class LazyPagesError(Exception):
    """Base of all errors that lazypages raises on purpose; its text is one line for the user."""


class UnreadableError(LazyPagesError):
    """A page that is here and can't be read: it is lost, and never answered with anything else."""
