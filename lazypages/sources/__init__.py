"""Where pages come from."""

#: How sources are named.
FORMS = "local:DIR, tcp://HOST:PORT, tls://HOST:PORT, unix:PATH or fd:N"
