"""Serve the memory of restored processes on demand, over userfaultfd."""

__version__ = "0.1.0"
