"""How many random examples a test takes that asks for more than hypothesis' own number."""

from __future__ import annotations

from hypothesis import settings

USUAL = 100
"""hypothesis' own number (`max_examples`), with which CI runs."""


def examples(most: int) -> int:
    """`most` in CI, and the same share less in the loop or more in a long run (tests/conftest.py has the profiles)."""
    profile = settings().max_examples
    return most * profile // USUAL if profile < USUAL else max(most, profile)
