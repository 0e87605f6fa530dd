"""Names of sources, page server protocols and stores for options. Separate from modules that are slow to import."""

#: The forms of a source's name.
FORMS = "local:DIR, tcp://HOST:PORT, tls://HOST:PORT, unix:PATH or fd:N"
AUTO = "auto"
#: Values of wire.Layout.
PROTOCOLS = ("criu-4.1", "criu-4.2")
#: Stores of packed checkpoints.
STORES = ("s3", "gs", "az", "http", "https")


def is_url(text: str) -> bool:
    """Whether it names an object in a store, and not a file."""
    scheme, separator, _ = text.partition("://")
    return bool(separator) and scheme in STORES
