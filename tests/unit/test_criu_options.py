"""Command lines of CRIU, and what becomes of them (lazypages/cli/criu_options.py)."""

from __future__ import annotations

from pathlib import Path

import pytest
from click.testing import CliRunner

from lazypages.bench import peers
from lazypages.bench.errors import BenchError
from lazypages.cli.criu_options import Option, parse, translate, with_configuration
from lazypages.cli.main import cli
from lazypages.cli.page_server import page_server_command
from lazypages.cli.serve import serve


@pytest.mark.parametrize(
    ("line", "command"),
    [
        ("lazy-pages -D dir", "lazy-pages"),
        ("-v4 lazy-pages", "lazy-pages"),
        ("-v lazy-pages", "lazy-pages"),
        ("-D lazy-pages dump -t 7", "dump"),
        ("-Dlazy-pages dump", "dump"),
        ("--images-dir lazy-pages restore", "restore"),
        ("--images-dir=x lazy-pages", "lazy-pages"),
        ("--images x lazy-pages", "lazy-pages"),
        ("--freeze-cgroup dump pre-dump", "pre-dump"),
        ("--no-default-config --lazy-pages dump", "dump"),
        ("-jlo dump lazy-pages", "lazy-pages"),
        ("--manage-cgroups dump", "dump"),
        ("-- dump", "dump"),
        ("--ms --deprecated --enable-external-sharing --enable-external-masters dump", "dump"),
        ("cpuinfo dump", "cpuinfo"),
        ("-D dump", None),
        ("", None),
    ],
)
def test_command(line: str, command: str | None) -> None:
    assert parse(line.split()).command == command


def test_options() -> None:
    line = "-jD dir -vvv lazy-pages -v4 --verbosity --verbosity=2 -W= --por 7 -Z --strange=1"
    call = parse(line.split())
    assert call.options == (
        Option("shell-job", None),
        Option("images-dir", "dir"),
        Option("verbosity", "vv"),
        Option("verbosity", "4"),
        Option("verbosity", None),
        Option("verbosity", "2"),
        Option("work-dir", "="),
        Option("port", "7"),
        Option("-Z", None),
        Option("--strange=1", None),
    )
    assert call.last("images-dir") == "dir"
    assert call.last("tree") is None
    assert call.asks("tree", "port")


@pytest.mark.parametrize(
    ("line", "arguments"),
    [
        ("lazy-pages", "serve"),
        ("-D a lazy-pages -D b", "serve --images-dir=b"),
        ("-d lazy-pages --no-daemon", "serve"),
        ("lazy-pages --restore-detached", "serve --daemon"),
        ("lazy-pages -j --display-stats --tcp-established --lazy-pages", "serve"),
        ("lazy-pages -vv -v3 -v", "serve -vv -v3 -v"),
        ("lazy-pages --source=unix:x -Z", "serve --source=unix:x -Z"),
        (
            "lazy-pages --page-server --address a --port 7 --tls --tls-cert c --tls-no-cn-verify",
            "serve --address=a --port=7 --tls-cert=c --page-server --tls --tls-no-cn-verify",
        ),
        (
            "page-server --port 7 --auto-dedup --prev-images-dir p --track-mem -D d",
            "page-server --images-dir=d --port=7 --prev-images-dir=p --auto-dedup",
        ),
        ("page-server --lazy-pages --ps-socket 3", "page-server --ps-socket=3 --lazy-pages"),
    ],
)
def test_translation(line: str, arguments: str) -> None:
    assert translate(parse(line.split())) == arguments.split()


def test_our_commands_have_all_that_is_translated() -> None:
    from lazypages.cli.criu_options import OURS

    for command, name in ((serve, "lazy-pages"), (page_server_command, "page-server")):
        known = {word for option in command.params for word in option.opts}
        assert {f"--{option}" for option in OURS[name]} <= known
        assert "-v" in known


def test_configuration_files(tmp_path: Path) -> None:
    """In this order: default (not with --config), CRIU_CONFIG_FILE, --config, command line."""
    default, ours, named = tmp_path / ".criu/default.conf", tmp_path / "environment", tmp_path / "named"
    default.parent.mkdir()
    default.write_text("images-dir default\ntcp-established\n")
    ours.write_text('# a comment\n\n  work-dir "a b" # where\nport 7\nverbosity=4\n')
    named.write_text("port 8\nlazy-pages\npidfile 'unfinished\n")
    environ = {"HOME": str(tmp_path), "CRIU_CONFIG_FILE": str(ours)}

    def read(line: str) -> list[str]:
        return translate(with_configuration(parse(line.split()), environ))

    from_environment = ["--port=7", "--work-dir=a b"]
    remote = ["--page-server", "-v4"]
    assert read("lazy-pages --page-server") == ["serve", "--images-dir=default", *from_environment, *remote]
    assert read("lazy-pages --page-server -D d") == ["serve", "--images-dir=d", *from_environment, *remote]
    assert read("lazy-pages --page-server --no-default-config") == ["serve", *from_environment, *remote]
    assert read(f"lazy-pages --page-server --config {named}") == [
        "serve",
        "--pidfile='unfinished",
        "--port=8",
        "--work-dir=a b",
        *remote,
    ]
    assert read("lazy-pages --page-server --config=/nowhere") == ["serve", *from_environment, *remote]
    # Without --page-server CRIU ignores what belongs to it.
    assert read("lazy-pages --tls --address=a") == ["serve", "--images-dir=default", "--work-dir=a b", "-v4"]


class TestInstallation:
    def install(self, *arguments: str | Path) -> tuple[int, str]:
        result = CliRunner().invoke(cli, ["criu-shim", *map(str, arguments)], prog_name="lazypages")
        return result.exit_code, result.output

    def real(self, folder: Path) -> Path:
        folder.mkdir()
        path = folder / "criu"
        path.write_text("#!/bin/sh\n")
        path.chmod(0o755)
        return path

    def test_it_finds_the_real_one_behind_itself(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        real = self.real(tmp_path / "real")
        shims = tmp_path / "shims"
        shims.mkdir()
        monkeypatch.delenv("LAZYPAGES_CRIU", raising=False)
        monkeypatch.setenv("PATH", f"{shims}:{real.parent}")
        for _ in range(2):
            assert self.install("--install", shims) == (0, f"{shims}/criu: for {real}\n")
            assert f"real=${{LAZYPAGES_CRIU:-{real}}}" in (shims / "criu").read_text()

    def test_another_path(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        real = self.real(tmp_path / "real")
        monkeypatch.setenv("PATH", str(real.parent))
        status, output = self.install("--install", tmp_path, "--criu", real)
        assert status == 0
        assert f"`criu` is {real}: put {tmp_path} first in PATH" in output

    def test_refusals(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        real = self.real(tmp_path / "real")
        monkeypatch.setenv("PATH", str(tmp_path))
        monkeypatch.delenv("LAZYPAGES_CRIU", raising=False)
        assert "no CRIU in PATH" in self.install("--install", tmp_path)[1]
        assert self.install("--install", tmp_path, "--criu", real)[0] == 0
        status, output = self.install("--install", tmp_path, "--criu", tmp_path / "criu")
        assert status == 1
        assert "is not the real CRIU" in output
        status, output = self.install("--install", real.parent, "--criu", real)
        assert status == 1
        assert "exists and is no shim" in output
        assert real.read_text() == "#!/bin/sh\n"
        assert "cannot write" in self.install("--install", tmp_path / "none", "--criu", real)[1]

    def test_the_bench_does_not_take_it_for_criu(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """It would compare us with ourselves."""
        real = self.real(tmp_path / "real")
        assert self.install("--install", tmp_path, "--criu", real)[0] == 0
        monkeypatch.setattr(peers, "CRIU_DIR", tmp_path / "none")
        monkeypatch.setenv("PATH", str(tmp_path))
        monkeypatch.setenv("LAZYPAGES_CRIU", str(tmp_path / "criu"))
        with pytest.raises(BenchError, match="no CRIU found"):
            peers.find_criu(())
