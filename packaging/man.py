"""Man pages of `lazypages` and `dumptool`, one for each command: python packaging/man.py -o DIR

They are made from the commands themselves, so nothing of them is in the repository. What the help of a command does not
have (files, environment, the pages to see) is in the tables below.
"""

from __future__ import annotations

import argparse
import os
import re
import textwrap
import time
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import click

from dumptool.cli import cli as dumptool
from lazypages import __version__
from lazypages.cli.main import cli as lazypages

#: For commands whose help has no "Exit status".
EXIT_STATUS = """
  0  success
  1  failure: one line on standard error says why
  2  wrong command line
"""

CONFIGURATION = {
    "/etc/criu/default.conf": "Options for all users; CRIU's file.",
    "$HOME/.criu/default.conf": "Options of this user; CRIU's file.",
}
CERTIFICATES = {
    "/etc/pki/CA/cacert.pem": "Certificates of trusted authorities, without --tls-cacert.",
    "/etc/pki/criu/cert.pem": "The own certificate, without --tls-cert.",
    "/etc/pki/criu/private/key.pem": "Its private key, without --tls-key.",
}
SOCKET = {"lazy-pages.socket": "In the work directory: where the restore connects."}
RESIDENT = {"/run/lazypages.socket": "The socket of the resident daemon, without --socket."}
IMAGES = {"inventory.img": "In the images directory: it is a checkpoint."}

#: By the name of the page. A command that is not here has no such section.
FILES = {
    "lazypages-serve": SOCKET | IMAGES | CONFIGURATION | CERTIFICATES,
    "lazypages-restore": SOCKET | IMAGES,
    "lazypages-page-server": IMAGES | CONFIGURATION | CERTIFICATES,
    "lazypages-daemon": RESIDENT,
    "lazypages-ctl": RESIDENT,
    "dumptool-dump": IMAGES | CERTIFICATES,
    "dumptool-pre-dump": CERTIFICATES,
}

CONFIG_FILE = {"CRIU_CONFIG_FILE": "Another configuration file, read after those of FILES."}
STORES = {
    "AWS_ALLOW_HTTP": "true: a store without TLS is accepted. The package obstore reads the other variables of stores: "
    "credentials (AWS_..., GOOGLE_..., AZURE_...) and addresses.",
}
ENVIRONMENT = {
    "lazypages-serve": CONFIG_FILE | STORES,
    "lazypages-pack": STORES,
    "lazypages-unpack": STORES,
    "lazypages-show": STORES,
    "lazypages-page-server": CONFIG_FILE,
    "lazypages-demo": {
        "LAZYPAGES_CRIU": "The CRIU to use, before that in PATH.",
        "LAZYPAGES_CRIU_DIR": "Where .ci/fetch-criu has put CRIU.",
    },
    "lazypages-criu-shim": {
        "LAZYPAGES_CRIU": "Read by the installed criu: the real CRIU, by a path with a slash.",
        "CRIU_CONFIG_FILE": "Read by the installed criu, as CRIU does.",
    },
}

#: For commands whose help has no "Examples".
EXAMPLES = {
    "lazypages": """
  See it work:
    lazypages demo
  Serve a checkpoint, and restore it:
    lazypages serve -D /var/ckpt/job1 -d
    criu restore -D /var/ckpt/job1 --lazy-pages -d
""",
    "lazypages-ctl": """
    lazypages ctl status
    lazypages ctl wait 1
    lazypages ctl shutdown
""",
    "lazypages-criu-shim": """
    lazypages criu-shim --install /usr/local/bin
""",
    "lazypages-doctor": """
    lazypages doctor
    lazypages doctor --json
""",
    "lazypages-show": """
    lazypages show /var/ckpt/job1
    lazypages show --mappings /var/ckpt/job1
""",
    "lazypages-plot": """
    lazypages serve -D /var/ckpt/job1 --trace trace
    lazypages plot /var/ckpt/job1/trace -o trace.html
""",
    "lazypages-demo": """
    lazypages demo --size 64
""",
    "lazypages-bench": """
    lazypages bench --quick
""",
    "dumptool": """
  Checkpoint a process, and restore it lazily:
    dumptool dump -t 4711 -D /var/ckpt/job1
    lazypages serve -D /var/ckpt/job1 -d
    lazypages restore -D /var/ckpt/job1 --lazy-pages -d
""",
}

OTHERS = ("criu(8)", "userfaultfd(2)")


class Page(NamedTuple):
    """A command and the name of its page: "lazypages-serve"."""

    name: str
    command: click.Command
    context: click.Context
    summary: str


def pages() -> Iterator[Page]:
    """All of them."""
    for cli, name in ((lazypages, "lazypages"), (dumptool, "dumptool")):
        context = click.Context(cli, info_name=name, **cli.context_settings)
        lines = [line for line in (cli.help or "").splitlines() if line]
        yield Page(name, cli, context, lines[0].rstrip("."))
        for sub, command, summary in _commands(context):
            yield Page(
                f"{name}-{sub}", command, click.Context(command, parent=context, info_name=sub), summary
            )


def _commands(context: click.Context) -> Iterator[tuple[str, click.Command, str]]:
    """Of a group: name, command and a line about it."""
    assert isinstance(context.command, click.Group)
    for name in context.command.list_commands(context):
        command = context.command.get_command(context, name)
        assert command is not None
        if not command.hidden:
            yield name, command, command.get_short_help_str(limit=1000).rstrip(".")


def page(one: Page, names: list[str]) -> str:
    """The page as roff (groff_man(7)). `names`: of all pages."""
    sections = _sections(one.command.epilog or "")
    date = time.strftime("%Y-%m-%d", time.gmtime(int(os.environ.get("SOURCE_DATE_EPOCH", time.time()))))
    parts = [
        f'.TH {one.name.upper()} 1 "{date}" "lazypages {__version__}" "User Commands"',
        ".nh",
        ".ad l",
        ".SH NAME",
        f"{_text(one.name)} \\- {_text(one.summary)}",
        ".SH SYNOPSIS",
        f"\\fB{_text(one.context.command_path)}\\fR {_text(' '.join(one.command.collect_usage_pieces(one.context)))}",
        ".SH DESCRIPTION",
        *_help(one.command.help or ""),
        *_options(one.context),
    ]
    if isinstance(one.command, click.Group):
        parts.append(".SH COMMANDS")
        for name, command, summary in _commands(one.context):
            below = click.Context(command, parent=one.context, info_name=name)
            if f"{one.name}-{name}" in names:
                parts += [
                    ".TP",
                    f"\\fB{_text(name)}\\fR",
                    f"{_text(summary)}: see \\fB{_text(one.name)}\\-{_text(name)}\\fR(1).",
                ]
            else:
                usage = " ".join(command.collect_usage_pieces(below))
                parts += [
                    f".SS {_text(name)} {_text(usage)}",
                    *_help(command.help or ""),
                    *_options(below, head=""),
                ]
    exit_status = sections.pop("Exit status", EXIT_STATUS)
    examples = sections.pop("Examples", EXAMPLES.get(one.name, ""))
    for heading, body in sections.items():
        parts += [f".SH {_text(heading if heading.startswith('-') else heading.upper())}", *_body(body)]
    parts += [".SH EXIT STATUS", *_body(exit_status)]
    parts += _table("ENVIRONMENT", _environment(one) | ENVIRONMENT.get(one.name, {}))
    parts += _table("FILES", FILES.get(one.name, {}))
    if examples:
        parts += [".SH EXAMPLES", *_body(examples)]
    see = [f"{name}(1)" for name in names if name != one.name and _related(name, one.name)]
    parts += [".SH SEE ALSO", ",\n".join(_reference(name) for name in (*see, *OTHERS))]
    return "\n".join(parts) + "\n"


def _related(name: str, to: str) -> bool:
    """Whether a page names the other one: a program names its commands, they name it and those beside them."""
    return name.split("-", maxsplit=1)[0] == to.split("-", maxsplit=1)[0] or "-" not in name


def _reference(name: str) -> str:
    title, section = name.rstrip(")").split("(")
    return f"\\fB{_text(title)}\\fR({section})"


def _environment(one: Page) -> dict[str, str]:
    return {
        option.envvar: f"The default of {option.opts[-1]}."
        for option in one.command.params
        if isinstance(option, click.Option) and isinstance(option.envvar, str)
    }


def _options(context: click.Context, head: str = ".SH OPTIONS") -> list[str]:
    options = [param for param in context.command.get_params(context) if isinstance(param, click.Option)]
    lines = [head] if head else []
    for option in options:
        record = option.get_help_record(context)
        if record is not None:
            lines += [".TP", f"\\fB{_text(record[0])}\\fR", _text(record[1]) or "\\&"]
    return lines


def _table(heading: str, rows: dict[str, str]) -> list[str]:
    if not rows:
        return []
    return [
        f".SH {heading}",
        *(line for name, text in rows.items() for line in (".TP", f"\\fB{_text(name)}\\fR", _text(text))),
    ]


def _sections(epilog: str) -> dict[str, str]:
    """The sections of an epilog: a heading that is not indented, and lines below it that are."""
    found: dict[str, str] = {}
    heading = ""
    for line in epilog.replace("\b", "").splitlines():
        if line and not line.startswith(" "):
            heading = line
            found[heading] = ""
        elif heading:
            found[heading] += line + "\n"
    return found


def _help(text: str) -> list[str]:
    """A docstring: paragraphs; one after "\\b" keeps its lines."""
    lines: list[str] = []
    for number, paragraph in enumerate(text.split("\f", maxsplit=1)[0].strip().split("\n\n")):
        kept = paragraph.lstrip("\n").startswith("\b")
        body = paragraph.replace("\b", "").strip("\n")
        lines += [".PP"] if number else []
        lines += _verbatim(body.splitlines()) if kept else [_text(" ".join(body.split()))]
    return lines


#: "0  every task has all its memory"
TERM = re.compile(r"(\S+) {2,}(\S.*)")
COMMAND = re.compile(r"(lazypages|dumptool|criu) ")


def _body(text: str) -> list[str]:
    """Below a heading: text; commands, which are indented more or are nothing but commands; terms with explanations."""
    lines: list[str] = []
    inside = ""
    for line in textwrap.dedent(text).strip("\n").splitlines():
        bare = line.strip()
        term = TERM.fullmatch(line)
        command = bool(COMMAND.match(bare)) or (line.startswith(" ") and inside != "term")
        if term and not command:
            lines += [*_end(inside), ".TP", f"\\fB{_text(term[1])}\\fR", _text(term[2])]
            inside = "term"
        elif command and inside == "command":
            lines.append(_text(line))
        elif command:
            lines += [".PP", ".RS 4", ".nf", _text(line)]
            inside = "command"
        elif inside == "term" and line.startswith(" "):
            lines.append(_text(bare))
        else:
            lines += [*_end(inside), *([".PP"] if inside in {"command", "term"} and bare else [])]
            lines += [_text(bare)] if bare else []
            inside = "text"
    return [*(lines[1:] if lines[:1] == [".PP"] else lines), *_end(inside)]


def _end(inside: str) -> list[str]:
    return [".fi", ".RE"] if inside == "command" else []


def _verbatim(lines: list[str]) -> list[str]:
    return [".nf", *map(_text, lines), ".fi"]


def _text(text: str) -> str:
    """As roff shows it: `this` is bold."""
    text = text.replace("\\", "\\e").replace("-", "\\-")
    text = re.sub("[^\x00-\x7f]", lambda found: f"\\[u{ord(found[0]):04X}]", text)
    text = re.sub(r"`([^`]+)`", r"\\fB\1\\fR", text)
    return f"\\&{text}" if text.startswith((".", "'")) else text


def main() -> None:
    """Writes all pages."""
    parser = argparse.ArgumentParser(description="Write the man pages of lazypages and dumptool.")
    parser.add_argument("-o", "--output", type=Path, required=True, metavar="DIR", help="where to; created")
    folder = parser.parse_args().output
    folder.mkdir(parents=True, exist_ok=True)
    found = [*pages()]
    for one in found:
        (folder / f"{one.name}.1").write_text(page(one, [each.name for each in found]))


if __name__ == "__main__":
    main()
