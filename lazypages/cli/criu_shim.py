"""``lazypages criu-shim``: installs a ``criu`` whose `lazy-pages` is `lazypages serve` (docs/criu-shim.md)."""

from __future__ import annotations

import os
import shlex
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path

import click

from lazypages.bench.peers import SHIM_MARK, is_shim
from lazypages.cli.criu_options import COMMANDS
from lazypages.cli.shim import DUMPS
from lazypages.errors import LazyPagesError

#: A shell, because most calls of `criu` are none of ours: dash takes 1 ms, and Python 15.
SCRIPT = """\
#!/bin/sh
{mark}: made by `lazypages criu-shim`, for {real}. Remove this file to undo it.
lazypages_real=${{LAZYPAGES_CRIU:-{real}}}
case $lazypages_real in
*/*) ;;
*)
    echo "criu-shim: LAZYPAGES_CRIU is $lazypages_real: let it be a path with a slash" >&2
    exit 1
    ;;
esac
if [ "$lazypages_real" -ef "$0" ]; then
    echo "criu-shim: LAZYPAGES_CRIU is this shim: let it be the real CRIU" >&2
    exit 1
fi
for lazypages_word; do
    case $lazypages_word in
    {words})
        # Else Python changes LC_CTYPE (PEP 538). The shim gives the variable its value back.
        lazypages_coerce=${{PYTHONCOERCECLOCALE+=$PYTHONCOERCECLOCALE}}
        export PYTHONCOERCECLOCALE=0
        # Python ignores SIGPIPE and SIGXFSZ. The shim gives CRIU what the caller has ignored.
        lazypages_ignored=0
        while read -r lazypages_name lazypages_value; do
            case $lazypages_name in
            SigIgn:) lazypages_ignored=$lazypages_value ;;
            esac
        done </proc/$$/status
        exec {python} -P -m lazypages.cli.shim {ours} "$lazypages_coerce" "$lazypages_ignored" "$lazypages_real" "$@"
        ;;
    esac
done
exec "$lazypages_real" "$@"
"""


@click.command()
@click.option(
    "--install",
    "directory",
    metavar="DIR",
    required=True,
    type=click.Path(path_type=Path, file_okay=False),
    help="Write DIR/criu. DIR must come before the real CRIU in PATH.",
)
@click.option(
    "--criu",
    metavar="FILE",
    type=click.Path(path_type=Path),
    envvar="LAZYPAGES_CRIU",
    help="The real CRIU.  [default: the first in PATH that is no shim]",
)
@click.option("--page-server", is_flag=True, help="Also replace `criu page-server`.")
def criu_shim(directory: Path, criu: Path | None, page_server: bool) -> None:
    """Install a `criu` for tools that call it, as runc, crun and podman do.

    `criu lazy-pages` is `lazypages serve` then. `criu dump` and `criu pre-dump` wait until the tasks have all their
    memory. Everything else is done by the real CRIU, as if it were called itself.
    """
    target = directory / "criu"
    real = _real(criu, target)
    if any(ord(letter) < ord(" ") or letter == "\x7f" for letter in f"{real}{sys.executable}"):
        raise LazyPagesError(f"a path has control characters: rename {str(real)!r} or {sys.executable!r}")
    ours = [name for name in COMMANDS if page_server or name != "page-server"]
    text = SCRIPT.format(
        mark=SHIM_MARK,
        real=shlex.quote(str(real)),
        python=shlex.quote(sys.executable),
        ours=",".join(ours),
        words=" | ".join([*ours, *DUMPS]),
    )
    if os.path.lexists(target) and not is_shim(target):
        raise LazyPagesError(f"{target} exists and is no shim: install it in another directory")
    draft = directory / f".criu.{os.getpid()}"
    try:
        draft.write_bytes(os.fsencode(text))
        draft.chmod(0o755)
        draft.replace(target)
    except OSError as error:
        raise LazyPagesError(f"cannot write {target}: {error.strerror}") from None
    click.echo(f"{click.format_filename(target)}: for {click.format_filename(real)}")
    found = shutil.which("criu")
    if found is None or not target.samefile(found):
        click.echo(f"`criu` is {found or 'not in PATH'}: put {directory.absolute()} first in PATH", err=True)


def _real(given: Path | None, target: Path) -> Path:
    """Raises LazyPagesError."""
    for path in [given] if given is not None else _in_path():
        if os.access(path, os.X_OK) and path.is_file() and not is_shim(path):
            return path.absolute()
    if given is not None:
        raise LazyPagesError(f"--criu {given} is not the real CRIU: it can't be executed, or is a shim")
    raise LazyPagesError(f"no CRIU in PATH for {target}: install it, or name it with --criu")


def _in_path() -> Iterator[Path]:
    for directory in os.get_exec_path():
        yield Path(directory) / "criu"
