"""Names of sources and of page server protocols for options. Separate from modules that are slow to import."""

#: The forms of a source's name.
FORMS = "local:DIR, tcp://HOST:PORT, tls://HOST:PORT, unix:PATH or fd:N"
AUTO = "auto"
#: Values of wire.Layout.
PROTOCOLS = ("criu-4.1", "criu-4.2")
