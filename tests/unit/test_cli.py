"""The command lines, as far as no task is needed for it."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from lazypages import logs
from lazypages.cli.main import COMMANDS, cli
from lazypages.cli.options import LOOPS
from lazypages.cli.remote_options import PROTOCOLS
from lazypages.loop.run import LOOPS as RUN_LOOPS
from lazypages.net.wire import Layout


def run(*arguments: str) -> Result:
    return CliRunner().invoke(cli, arguments, prog_name="lazypages")


@pytest.mark.parametrize(
    ("given", "level"),
    [
        ([], 2),
        (["v"], 3),
        (["vv"], 4),
        (["v", "v"], 4),
        (["vvvvvv"], 4),
        (["0"], 0),
        (["1"], 1),
        (["4"], 4),
        (["9"], 4),
        (["1", "v"], 2),
    ],
)
def test_verbosity_adds_up_as_with_criu(given: Sequence[str], level: int) -> None:
    """Observed with CRIU 4.2.1, by the number of lines that it prints."""
    assert logs.verbosity(given) == level


@pytest.mark.parametrize("value", ["", "x", "vx", "4v", "-1"])
def test_what_is_no_verbosity(value: str) -> None:
    with pytest.raises(ValueError, match=f"^{value}$"):
        logs.verbosity([value])


@pytest.mark.parametrize(
    "arguments", [["--help"], ["-h"], *([name, "--help"] for name in COMMANDS)], ids=" ".join
)
def test_help(arguments: list[str]) -> None:
    result = run(*arguments)
    assert result.exit_code == 0
    assert "Usage: lazypages" in result.output


def test_help_of_serve_teaches_the_two_commands() -> None:
    text = " ".join(run("serve", "--help").output.split())
    for phrase in ("lazypages serve -D", "criu restore", "lazy-pages.socket", "Exit status", "Ctrl-C"):
        assert phrase in text


def test_version() -> None:
    result = run("-V")
    assert result.exit_code == 0
    assert "version" in result.output


@pytest.mark.parametrize(
    "arguments",
    [
        ["nonsense"],
        ["serve", "--nonsense"],
        ["serve", "extra"],
        ["serve", "-v5x"],
        ["serve", "--verbosity=much"],
        ["serve", "--status-fd", "x"],
        ["serve", "--port", "70000"],
        ["serve", "--loop", "gevent"],
        ["show"],
        ["demo", "--size", "0"],
    ],
    ids=" ".join,
)
def test_wrong_command_lines(arguments: list[str]) -> None:
    result = run(*arguments)
    assert result.exit_code == 2
    assert "Usage: lazypages" in result.output


@pytest.mark.parametrize("spelling", ["-D{}", "-D {}", "--images-dir={}", "--images-dir {}"])
def test_spellings_of_criu(spelling: str, tmp_path: Path) -> None:
    """All are understood: each gets as far as the directory that is not there."""
    nowhere = tmp_path / "nowhere"
    words = [word.format(nowhere) for word in spelling.split()]
    for verbose in (["-v4"], ["-vvvv"], ["-v"], ["--verbosity=4"], ["--verbosity"], ["-v", "-d"]):
        result = run("serve", *verbose, *words)
        assert result.exit_code == 1
        assert f"-D {nowhere} does not exist" in result.output


def test_directories_that_are_none(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    for arguments, text in (
        (["-D", str(tmp_path / "file")], "file is not a directory"),
        (["-D", str(tmp_path)], "is not a checkpoint: inventory.img not found"),
        (["-D", str(tmp_path), "-W", str(tmp_path / "nowhere")], "nowhere does not exist"),
    ):
        result = run("serve", *arguments)
        assert result.exit_code == 1
        assert text in result.output
        assert result.output.startswith("lazypages: ")
        assert result.output.count("\n") == 1


def test_show_of_what_is_no_checkpoint(tmp_path: Path) -> None:
    result = run("show", str(tmp_path))
    assert result.exit_code == 1
    assert result.output == f"lazypages: {tmp_path}/inventory.img: no such image\n"


def test_loops_are_those_that_are_run() -> None:
    assert set(LOOPS) == set(RUN_LOOPS)


def test_protocols_are_those_of_the_wire() -> None:
    assert set(PROTOCOLS) == {layout.value for layout in Layout}


def test_serve_starts_without_what_it_does_not_need() -> None:
    """A restore waits for it: no terminal library unless there is a terminal, and the event loop when it is ready."""
    unused = ["rich", "json", "ctypes", "ssl", "lazypages.sources.remote", "images_spec.messages"]
    unused += ["anyio", "asyncio", "trio", "uvloop"]
    script = f"import lazypages.cli.serve, sys; print([m for m in {unused} if m in sys.modules])"
    done = subprocess.run(
        [sys.executable, "-c", script],
        capture_output=True,
        text=True,
        check=True,
        timeout=60,
        env=os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
    )
    assert done.stdout.strip() == "[]"


def test_help_imports_no_command() -> None:
    script = (
        "import sys\n"
        "from lazypages.__main__ import main\n"
        "sys.argv = ['lazypages', '--help']\n"
        "try:\n    main()\nexcept SystemExit:\n    print('anyio' in sys.modules, 'rich' in sys.modules)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", script],
        capture_output=True,
        text=True,
        check=True,
        timeout=60,
        env=os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
    )
    assert done.stdout.splitlines()[-1] == "False False"
