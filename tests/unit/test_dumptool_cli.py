"""The command line: spellings of criu's, what it teaches, what it says."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result

from dumptool import backend, cli
from dumptool.dump import Report, Settings
from dumptool.errors import DumpError, Refusal, UnsupportedError
from dumptool.memory import Counts
from dumptool.saveable import Options
from dumptool.send import PageServer
from dumptool.tracking import Method
from lazypages.net.tls import TlsFiles
from lazypages.net.url import ConnectedSocket, TcpServer, UnixServer
from lazypages.net.wire import Layout


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[Settings]:
    """The settings of dumps and pre-dumps, which are not made."""
    found: list[Settings] = []

    def make(settings: Settings, *_rest: object) -> Report:
        found.append(settings)
        return Report(1, 2, 0.001, 0.02, counts=Counts(10, 256, 512, 0), tracked="uffd-wp")

    monkeypatch.setattr(backend, "dump", make)
    monkeypatch.setattr(cli, "pre_dump", make)
    return found


def run(*arguments: str) -> Result:
    return CliRunner().invoke(cli.cli, arguments, prog_name="dumptool")


@pytest.mark.parametrize(
    "arguments",
    [
        ["dump", "-t", "7", "-D", "/d", "-R", "-j", "-l", "-v4"],
        ["dump", "-t7", "-D/d", "-R", "--shell-job", "--file-locks", "-v", "-v"],
        ["dump", "--tree", "7", "--images-dir", "/d", "--leave-running", "-j", "-l", "--verbosity=4"],
        ["dump", "--tree=7", "--images-dir=/d", "-Rjl"],
    ],
)
def test_spellings(arguments: list[str], calls: list[Settings]) -> None:
    assert run(*arguments).exit_code == 0
    allow = Options(shell_job=True, file_locks=True)
    assert calls == [Settings(7, Path("/d"), leave_running=True, allow=allow)]


def test_levels(calls: list[Settings]) -> None:
    options = ["--prev-images-dir", "../1", "--track-mem", "--parent-pages", "eager"]
    assert run("pre-dump", "-t", "7", "-D", "/d", "--dirty-tracking", "compare", *options).exit_code == 0
    (settings,) = calls
    assert (settings.parent, settings.method, settings.lazy_parents) == ("../1", Method.COMPARE, False)
    assert settings.track


def test_says_how_long_it_stood_still(calls: list[Settings]) -> None:
    result = run("dump", "-t", "7", "-D", "/d")
    assert "2.0 MiB written, 1.0 MiB unchanged since the parent" in result.output
    assert "stopped in 1.00 ms, for 20.0 ms" in result.output
    assert run("dump", "-t", "7", "-D", "/d", "-v0").output == ""


@pytest.mark.parametrize(
    ("arguments", "what"),
    [
        (["dump"], "Missing option '-t'"),
        (["dump", "-t", "0"], "-t"),
        (["dump", "-t", "x"], "-t"),
        (["pre-dump", "-t", "7", "--lazy-pages"], "No such option '--lazy-pages'"),
        (["dump", "-t", "7", "-v9x"], "not a level"),
    ],
)
def test_wrong_command_lines(arguments: list[str], what: str, calls: list[Settings]) -> None:
    result = run(*arguments)
    assert result.exit_code == 2
    assert what in result.output
    assert not calls


@pytest.mark.parametrize("command", ["dump", "pre-dump"])
def test_help_teaches(command: str) -> None:
    text = run(command, "--help").output
    assert "Examples" in text
    assert f"dumptool {command} " in text
    assert "--prev-images-dir" in text


@pytest.mark.parametrize(
    ("error", "lines"),
    [
        (DumpError("pid 7: no such process"), ["dumptool: pid 7: no such process"]),
        (
            UnsupportedError([Refusal(7, "fd 3", "is a socket"), Refusal(8, "", "is odd")]),
            [
                "dumptool: can't be dumped: pid 7 fd 3: is a socket",
                "dumptool: can't be dumped: pid 8: is odd",
            ],
        ),
        (
            UnsupportedError([Refusal(7, "", f"thread {tid} is odd") for tid in (7, 8, 9)]),
            ["dumptool: can't be dumped: pid 7: thread 7 is odd (2 more of this kind)"],
        ),
    ],
)
def test_errors_are_lines(error: DumpError, lines: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_arguments: Any) -> Report:
        raise error

    monkeypatch.setattr(backend, "dump", fail)
    result = run("dump", "-t", "7", "-D", "/d")
    assert result.exit_code == 1
    assert result.stderr.splitlines() == lines


def test_a_bar_only_for_long_dumps() -> None:
    class Bars:
        def __init__(self) -> None:
            self.totals: list[int] = []
            self.advanced = 0

        def add_task(self, _text: str, *, total: int) -> int:
            self.totals.append(total)
            return 1

        def advance(self, _bar: int, amount: int) -> None:
            self.advanced += amount

    for pages, totals in ((100, []), (100_000, [100_000 * 4096])):
        bars = Bars()
        watcher = cli._Bar(bars)  # type: ignore[arg-type]
        watcher.total(pages)
        watcher.copied(7)
        assert bars.totals == totals
        assert bars.advanced == (7 * 4096 if totals else 0)


@pytest.mark.parametrize("command", ["dump", "pre-dump"])
@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["--port", "7"], PageServer(TcpServer("127.0.0.1", 7))),
        (["--address", "::1", "--port=7"], PageServer(TcpServer("::1", 7))),
        (["--address", "unix:/run/ps"], PageServer(UnixServer(Path("/run/ps")))),
        (["--ps-socket", "5"], PageServer(ConnectedSocket(5))),
        (
            ["--port", "7", "--page-server-protocol", "criu-4.1"],
            PageServer(TcpServer("127.0.0.1", 7), layout=Layout.CRIU_4_1),
        ),
        (
            ["--port", "7", "--tls", "--tls-cacert", "/ca", "--tls-no-cn-verify"],
            PageServer(TcpServer("127.0.0.1", 7, tls=True), TlsFiles(Path("/ca"), check_name=False)),
        ),
    ],
)
def test_page_server(command: str, arguments: list[str], expected: PageServer, calls: list[Settings]) -> None:
    result = run(command, "-t", "7", "-D", "/d", "--page-server", *arguments)
    assert result.exit_code == 0, result.output
    assert [settings.page_server for settings in calls] == [expected]


@pytest.mark.parametrize(
    "arguments",
    [
        ["--page-server"],
        ["--page-server", "--port", "0"],
        ["--page-server", "--lazy-pages", "--port", "7"],
        ["--page-server", "--port", "7", "--status-fd", "1"],
        ["--page-server", "--ps-socket", "5", "--tls"],
        ["--page-server", "--address", "unix:/run/ps", "--tls"],
        ["--port", "7"],
        ["--tls"],
        ["--ps-socket", "5"],
        ["--lazy-pages", "--ps-socket", "5"],
    ],
)
def test_what_does_not_go_together(arguments: list[str], calls: list[Settings]) -> None:
    result = run("dump", "-t", "7", "-D", "/d", *arguments)
    assert result.exit_code == 2
    assert "Error: " in result.output
    assert calls == []
