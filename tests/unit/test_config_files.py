"""CRIU's configuration files, read as CRIU reads them."""

from __future__ import annotations

from pathlib import Path

import pytest

from lazypages.cli.config_files import parse
from lazypages.errors import LazyPagesError


@pytest.mark.parametrize(
    ("line", "setting"),
    [
        ("daemon", ("daemon", None)),
        ("log-file x.log", ("log-file", "x.log")),
        ("  log-file \t x.log \t", ("log-file", "x.log")),
        ("log-file=x.log", ("log-file", "x.log")),
        ('log-file "x y.log"', ("log-file", "x y.log")),
        ('log-file "x \\"y\\" z.log"', ("log-file", 'x "y" z.log')),
        ('log-file a"b".log', ("log-file", 'a"b".log')),
        ('log-file ""', ("log-file", "")),
        ("log-file x.log # of today", ("log-file", "x.log")),
        ("log-file x.log#today", ("log-file", "x.log")),
        ("# log-file x.log", None),
        ("   ", None),
        ("verbosity=4", ("verbosity", "4")),
    ],
)
def test_lines(line: str, setting: tuple[str, str | None] | None) -> None:
    """Each observed with CRIU 4.2.1."""
    assert [found[:2] for found in parse(f"{line}\n", Path("x"))] == ([setting] if setting else [])


@pytest.mark.parametrize("line", ["log-file x y.log", "log-file 'x y.log'", "log-file = x y", 'log-file "x'])
def test_what_is_no_line(line: str) -> None:
    with pytest.raises(LazyPagesError, match=r"^criu\.conf, line 2: expected an option"):
        parse(f"\n{line}\n", Path("criu.conf"))
