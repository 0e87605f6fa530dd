"""CRIU's configuration files, read as CRIU reads them."""

from __future__ import annotations

from pathlib import Path

import pytest
from click.testing import CliRunner

from lazypages.cli.criu_files import parse
from lazypages.cli.main import cli
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


@pytest.mark.parametrize("option", ["--help", "-h", "-V"])
@pytest.mark.parametrize("command", ["serve", "page-server"])
def test_a_wrong_file_does_not_keep_from_the_help(command: str, option: str, tmp_path: Path) -> None:
    (tmp_path / "criu.conf").write_text('log-file "x\n')
    given = [command, "--config", str(tmp_path / "criu.conf")]
    assert CliRunner().invoke(cli, [*given, option], prog_name="lazypages").exit_code == 0
    assert CliRunner().invoke(cli, given, prog_name="lazypages").exit_code == 1
