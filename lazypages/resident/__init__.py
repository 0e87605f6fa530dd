"""``lazypages daemon``: one process that serves many restores (docs/daemon.md)."""
