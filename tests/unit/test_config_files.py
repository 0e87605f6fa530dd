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


@pytest.mark.parametrize(
    ("command", "lines", "said"),
    [
        ("serve", "page-server\nport 27x", "line 2: port: '27x' is not a valid integer"),
        ("serve", "\nverbosity many", "line 2: verbosity: many is not a level (0 to 4)"),
        ("serve", "page-server-protocol criu-3", "line 1: page-server-protocol: 'criu-3' is not one of"),
        ("serve", "verbosity\nsource", "line 2: source needs a value"),
        ("serve", "page-server", "line 1: --page-server needs --port"),
        ("serve", "stats-json no/where", "line 1: --stats-json "),
        ("serve", "images-dir nowhere", "line 1: -D nowhere does not exist"),
        ("page-server", "port 100000", "line 1: port: 100000 is not in the range"),
        ("page-server", "images-dir nowhere", "line 1: -D nowhere is not a directory"),
    ],
)
def test_a_bad_value_names_its_place(command: str, lines: str, said: str, tmp_path: Path) -> None:
    (tmp_path / "inventory.img").touch()
    config = tmp_path / "criu.conf"
    config.write_text(lines + "\n")
    here = [] if "images-dir" in lines else ["-D", str(tmp_path)]
    result = CliRunner().invoke(cli, [command, *here, "--config", str(config)], prog_name="lazypages")
    assert result.exit_code == 1
    assert f"lazypages: {config}, {said}" in result.output


def test_what_the_command_line_says_is_not_blamed_on_a_file(tmp_path: Path) -> None:
    """It takes precedence, also over a value in a file that is wrong."""
    config = tmp_path / "criu.conf"
    config.write_text("images-dir nowhere\nverbosity 3\npage-server\nport x\n")
    options = ["serve", "--config", str(config), "-D", "neither", "--port", "27000"]
    result = CliRunner().invoke(cli, options, prog_name="lazypages")
    assert result.exit_code == 1
    assert result.output.startswith("lazypages: -D neither does not exist")


@pytest.mark.parametrize("option", ["--help", "-h", "-V"])
@pytest.mark.parametrize("command", ["serve", "page-server"])
def test_a_wrong_file_does_not_keep_from_the_help(command: str, option: str, tmp_path: Path) -> None:
    (tmp_path / "criu.conf").write_text('log-file "x\n')
    given = [command, "--config", str(tmp_path / "criu.conf")]
    assert CliRunner().invoke(cli, [*given, option], prog_name="lazypages").exit_code == 0
    assert CliRunner().invoke(cli, given, prog_name="lazypages").exit_code == 1
