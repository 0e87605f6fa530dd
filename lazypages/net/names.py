"""Names of sources and of CRIU's page server protocols, for options; apart from what is slow to import."""

#: How sources are named.
FORMS = "local:DIR, tcp://HOST:PORT, tls://HOST:PORT, unix:PATH or fd:N"
AUTO = "auto"
#: Values of wire.Layout.
PROTOCOLS = ("criu-4.1", "criu-4.2")
