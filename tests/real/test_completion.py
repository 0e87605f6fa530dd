"""Completion of commands and options, by real shells on a terminal; README, "Completion and man pages"."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.terminal import OnTerminal

#: How each shell is started, and what makes it ready: no configuration of the user.
SHELLS = {
    "bash": (["bash", "--norc", "--noprofile"], ""),
    "zsh": (["zsh", "-f"], "autoload -Uz compinit; compinit -u -D\n"),
    "fish": (["fish", "--no-config"], ""),
}
HERE = Path(sys.executable).parent


def script(shell: str, program: str) -> str:
    """What a shell has to read for the completion of that program."""
    return subprocess.run(
        [HERE / program],
        env=os.environ | {f"_{program.upper()}_COMPLETE": f"{shell}_source"},
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
    ).stdout


@pytest.mark.loop("bash")
@pytest.mark.parametrize("shell", SHELLS)
def test_a_shell_completes(shell: str, tmp_path: Path) -> None:
    """Commands and options, in bash of both programs: what is completed is executed."""
    command, before = SHELLS[shell]
    for program in ("lazypages", "dumptool") if shell == "bash" else ("lazypages",):
        (tmp_path / program).write_text(script(shell, program))
        before += f"source {tmp_path / program}\n"
    environment = [f"PATH={HERE}:{os.environ['PATH']}", f"HOME={tmp_path}", f"XDG_RUNTIME_DIR={tmp_path}"]
    with OnTerminal(["env", *environment, *command]) as terminal:
        terminal.press(f"{before}echo rea''dy\n".encode())
        terminal.wait_for("ready")
        terminal.press(b"lazypages se\t--help\n")
        terminal.wait_for("Usage: lazypages serve")
        terminal.wait_for("Configuration files")
        if shell == "bash":
            terminal.press(b"lazypages ctl shut\t--he\t\n")
            terminal.wait_for("Usage: lazypages ctl shutdown")
            terminal.press(b"dumptool pre\t--he\t\n")
            terminal.wait_for("Usage: dumptool pre-dump")


def modules(program: str, **variables: str) -> set[str]:
    """Those that the program has imported when it ends."""
    code = (
        f"import atexit, sys; sys.argv = [{program!r}]; "
        "atexit.register(lambda: print(*sys.modules, file=sys.stderr)); "
        f"from {program}.__main__ import main; main()"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        env=os.environ | variables,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    return set(done.stderr.split())


def test_it_costs_no_start_anything() -> None:
    """Names of commands are completed without an import of them; and what completes is not imported otherwise."""
    words = {"COMP_WORDS": "lazypages ", "COMP_CWORD": "1", "_LAZYPAGES_COMPLETE": "bash_complete"}
    completing = modules("lazypages", **words)
    assert "click.shell_completion" in completing
    assert not {"lazypages.cli.serve", "lazypages.cli.bench", "lazypages.cli.ctl"} & completing
    assert "click.shell_completion" not in modules("lazypages")
