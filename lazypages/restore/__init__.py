"""Restoring tasks without CRIU: turns images into a plan for the program ``uffd_restorer``."""
