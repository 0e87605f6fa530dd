"""What the installed ``criu`` of `lazypages criu-shim` runs for the commands that may be ours (docs/criu-shim.md).

``python -m lazypages.cli.shim OURS COERCE IGNORED REAL ARGUMENTS``: OURS are commands, separated by commas; COERCE is
"=" and the caller's PYTHONCOERCECLOCALE, or "" if there was none; IGNORED are the signals that the caller ignores
(SigIgn in proc_pid_status(5)); REAL is CRIU.
"""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Sequence
from contextlib import suppress

from lazypages.cli.criu_options import Call, parse, translate, with_configuration
from lazypages.errors import LazyPagesError

#: Commands that read the memory of a task. CRIU takes a page that has not arrived for one that was never touched.
DUMPS = ("dump", "pre-dump")


def main(arguments: Sequence[str]) -> int:
    """Does not return if CRIU takes over."""
    ours, coerce, ignored, real, *words = arguments
    if coerce:
        os.environ["PYTHONCOERCECLOCALE"] = coerce[1:]
    else:
        os.environ.pop("PYTHONCOERCECLOCALE", None)
    call = parse(words)
    if not call.asks("help", "version"):
        if call.command in ours.split(","):
            try:
                return _run(with_configuration(call))
            except LazyPagesError as error:
                _say(str(error))
                return 1
        if call.command in DUMPS:
            with suppress(LazyPagesError):  # of a configuration file: CRIU says it
                call = with_configuration(call)
            _wait(call)
    for number in (signal.SIGPIPE, signal.SIGXFSZ):  # Python ignores them, and CRIU would
        if not int(ignored, 16) >> (number - 1) & 1:
            signal.signal(number, signal.SIG_DFL)
    try:
        os.execv(real, [real, *words])  # noqa: S606 - the shim's purpose
    except OSError as error:
        _say(f"cannot run {real}: {error.strerror}: set LAZYPAGES_CRIU, or install the shim again")
        return 1


def _run(call: Call) -> int:
    from lazypages.cli.imports import importing  # noqa: PLC0415 - not for a dump

    with importing():
        from lazypages.cli.main import cli  # noqa: PLC0415 - see `importing`

    # The options of configuration files are in `call` already, and the command line may have taken some back.
    os.environ.pop("CRIU_CONFIG_FILE", None)
    # The service that CRIU's caller belongs to is not ready because a restore can be started.
    os.environ.pop("NOTIFY_SOCKET", None)
    via = _resident() if call.command == "lazy-pages" else None
    cli(
        [*translate(call), "--no-default-config", *(["--via", via] if via else [])],
        prog_name="lazypages",
    )
    raise AssertionError("cli() exits")


def _resident() -> str | None:
    """The socket of the resident daemon that is to serve the restore: the one in LAZYPAGES_VIA ("": none), else the
    default one if a daemon listens there."""
    import socket  # noqa: PLC0415 - not for a dump

    from lazypages.resident.protocol import SOCKET  # noqa: PLC0415

    named = os.environ.get("LAZYPAGES_VIA")
    if named is not None:
        return named or None
    with socket.socket(socket.AF_UNIX) as peer:
        return None if peer.connect_ex(SOCKET) else SOCKET


def _wait(call: Call) -> None:
    tree = call.last("tree")
    if tree is None or not tree.isdecimal():
        return  # CRIU says what is wrong
    from lazypages.cli.served import wait_until_complete  # noqa: PLC0415 - only for a dump

    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C ends the wait without a traceback
    wait_until_complete(int(tree), _say)


def _say(text: str) -> None:
    print(f"criu-shim: {text}", file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
