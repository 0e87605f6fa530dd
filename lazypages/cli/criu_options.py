"""Command lines and configuration files of ``criu``: which subcommand is called, and with which options.

The names are those of ``criu --help`` (4.1.1, 4.2.1). Without click: the shim reads a command line before each dump.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

from lazypages.cli import criu_files

#: Options that take a value, in the next word or after "=".
WITH_VALUE = frozenset(
    """
    action-script address cgroup-dump-controller cgroup-props cgroup-props-file cgroup-root cgroup-yard config
    empty-ns enable-fs external feature file-validation freeze-cgroup ghost-limit images-dir inherit-fd
    irmap-scan-path join-ns libdir log-file lsm-mount-context lsm-profile network-lock pidfile port pre-dump-mode
    prev-images-dir ps-socket root skip-mnt status-fd timeout tls-cacert tls-cacrl tls-cert tls-key tree work-dir
    close ext-mount-map veth-pair
    """.split()  # noqa: SIM905 - a table
)

#: Options whose value, if there is one, follows "=".
OPTIONAL_VALUE = frozenset({"cpu-cap", "ext-unix-sk", "manage-cgroups", "verbosity"})

#: Options without a value. "no-" before most of them negates them.
FLAGS = frozenset(
    """
    all allow-uprobes auto-dedup daemon deprecated display-stats
    enable-external-masters enable-external-sharing evasive-devices exec-cmd experimental extra file-locks
    force-irmap ghost-fiemap help lazy-pages leave-running leave-stopped link-remap log-pid
    mntns-compat-mode ms no-default-config page-server restore-detached restore-sibling shell-job skip-file-rwx-check
    skip-in-flight stream tcp-close tcp-established tls tls-no-cn-verify track-mem unprivileged version weak-sysctls
    """.split()  # noqa: SIM905 - a table
)

SHORT = {
    "d": "daemon",  # the same as restore-detached
    "D": "images-dir",
    "h": "help",
    "j": "shell-job",
    "J": "join-ns",
    "l": "file-locks",
    "L": "libdir",
    "M": "ext-mount-map",
    "o": "log-file",
    "r": "root",
    "R": "leave-running",
    "s": "leave-stopped",
    "S": "restore-sibling",
    "t": "tree",
    "v": "verbosity",
    "V": "version",
    "W": "work-dir",
    "x": "ext-unix-sk",
}

#: Options that `lazypages serve` or `lazypages page-server` has, too, with the same meaning.
_OF_BOTH = [
    "images-dir",
    "work-dir",
    "log-file",
    "pidfile",
    "status-fd",
    "address",
    "port",
    "ps-socket",
    "daemon",
    "tls",
    "tls-cacert",
    "tls-cacrl",
    "tls-cert",
    "tls-key",
    "tls-no-cn-verify",
]
OURS: Mapping[str, frozenset[str]] = {
    "lazy-pages": frozenset([*_OF_BOTH, "page-server"]),
    "page-server": frozenset([*_OF_BOTH, "lazy-pages", "prev-images-dir", "auto-dedup"]),
}

#: Of `lazy-pages`: CRIU ignores them without --page-server; a configuration file may have them for other commands.
_OF_PAGE_SERVER = {name for name, needed in criu_files.NEEDS.items() if needed == "page-server"}

#: What `lazypages` calls them.
COMMANDS = {"lazy-pages": "serve", "page-server": "page-server"}


class Option(NamedTuple):
    """``name`` without dashes, as CRIU spells it in full. An unknown one keeps its dashes, and its "=" and value."""

    name: str
    value: str | None


class Call(NamedTuple):
    """``command``: the subcommand; None if there is none."""

    command: str | None
    options: tuple[Option, ...]

    def asks(self, *names: str) -> bool:
        return any(option.name in names for option in self.options)

    def last(self, name: str) -> str | None:
        """The value that counts of an option that may be given several times."""
        return next((option.value for option in reversed(self.options) if option.name == name), None)


def parse(words: Sequence[str]) -> Call:
    """Read a command line as getopt_long(3) does: options before and after the subcommand; abbreviations."""
    operands: list[str] = []
    options: list[Option] = []
    rest = list(reversed(words))
    while rest:
        word = rest.pop()
        if word == "--":
            operands += reversed(rest)
            break
        if word.startswith("--"):
            options.append(_long(word, rest))
        elif word.startswith("-") and word != "-":
            options += _short(word[1:], rest)
        else:
            operands.append(word)
    return Call(operands[0] if operands else None, tuple(options))


def _long(word: str, rest: list[str]) -> Option:
    given, has_value, value = word[2:].partition("=")
    name = _in_full(given)
    if name is None:
        return Option(word, None)
    if not has_value and name in WITH_VALUE and rest:
        return Option(name, rest.pop())
    return Option(name, value if has_value else None)


def _in_full(given: str) -> str | None:
    """The name that `given` is, or the only one that it begins."""
    names = WITH_VALUE | OPTIONAL_VALUE | FLAGS
    names |= {f"no-{name}" for name in FLAGS if not name.startswith("no-")}
    if given in names:
        return given
    found = [name for name in names if name.startswith(given)]
    return found[0] if len(found) == 1 else None


def _short(letters: str, rest: list[str]) -> list[Option]:
    options = []
    while letters:
        letter, letters = letters[0], letters[1:]
        name = SHORT.get(letter)
        if name is None:
            options.append(Option(f"-{letter}", None))
        elif name in WITH_VALUE:
            options.append(Option(name, letters or (rest.pop() if rest else None)))
            letters = ""
        elif name in OPTIONAL_VALUE:
            options.append(Option(name, letters or None))
            letters = ""
        else:
            options.append(Option(name, None))
    return options


def with_configuration(call: Call, environ: Mapping[str, str] | None = None) -> Call:
    """`call` after the options of the configuration files that ``criu`` reads for it. Raises LazyPagesError."""
    default = not call.asks("no-default-config")
    settings = criu_files.read_files(call.last("config"), default=default, environ=environ)
    words = [f"--{name}" if value is None else f"--{name}={value}" for name, value, _ in settings]
    return call._replace(options=(*parse(words).options, *call.options))


def translate(call: Call) -> list[str]:
    """The arguments of ``lazypages`` for `call` of one of COMMANDS.

    CRIU ignores the options that a subcommand does not use, and so does this. An option that CRIU does not have is
    passed on, so that ``--source=URL`` works, and a wrong one is an error.
    """
    assert call.command is not None
    ours = OURS[call.command]
    if "page-server" in ours and not _is_set(call, "page-server"):
        ours -= _OF_PAGE_SERVER
    arguments = [COMMANDS[call.command]]
    values = {name: call.last(name) for name in sorted(ours - FLAGS)}
    arguments += [f"--{name}={value}" for name, value in values.items() if value is not None]
    arguments += [f"--{name}" for name in sorted(ours & FLAGS) if _is_set(call, name)]
    for name, value in call.options:
        if name == "verbosity":
            arguments.append(f"-v{value or ''}")
        elif name.startswith("-"):
            arguments.append(name)
    return arguments


def _is_set(call: Call, flag: str) -> bool:
    given = [option.name for option in call.options if option.name in _spellings(flag)]
    return bool(given) and not given[-1].startswith("no-")


def _spellings(flag: str) -> tuple[str, ...]:
    names = (flag, "restore-detached") if flag == "daemon" else (flag,)
    return (*names, *(f"no-{name}" for name in names))
