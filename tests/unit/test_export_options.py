"""The options for metrics: what can't work is refused at the start, in a line that says what to do."""

from __future__ import annotations

import socket
import sys
from pathlib import Path

import pytest

from lazypages.cli.export_options import exporting
from lazypages.errors import LazyPagesError


def refusal(metrics: str | None = None, textfile: Path | None = None, *, otel: bool = False) -> str:
    with pytest.raises(LazyPagesError) as refused, exporting(metrics, textfile, otel=otel):
        pass
    assert "\n" not in str(refused.value)
    return str(refused.value)


@pytest.mark.parametrize("address", ["0.0.0.0:0", "[::]:9100", "192.0.2.1:9100"])
def test_addresses_of_other_hosts(address: str) -> None:
    assert "other hosts could read it" in refusal(address)


def test_addresses_that_are_none(tmp_path: Path) -> None:
    assert "name a unix socket" in refusal("9100")
    assert "name a unix socket" in refusal("127.0.0.1:99999")
    assert "No such file" in refusal(f"{tmp_path}/nowhere/x")
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        assert f"127.0.0.1:{port}: cannot listen there: Address already in use" in refusal(
            f"127.0.0.1:{port}"
        )


def test_textfiles_that_cannot_be_written(tmp_path: Path) -> None:
    assert "must end in .prom" in refusal(textfile=tmp_path / "x.txt")
    assert "does not exist: create it first" in refusal(textfile=tmp_path / "nowhere" / "x.prom")


@pytest.mark.parametrize("address", ["{}/s", "unix:{}/s"])
def test_the_socket_is_removed_if_it_is_still_ours(address: str, tmp_path: Path) -> None:
    path = tmp_path / "s"
    with exporting(address.format(tmp_path), tmp_path / "x.prom", otel=False) as options:
        assert options is not None
        assert options.listener is not None
        assert path.is_socket()
    assert list(tmp_path.iterdir()) == []
    with exporting(address.format(tmp_path), None, otel=False):
        path.unlink()
        path.write_text("another's")
    assert path.exists()


@pytest.mark.parametrize("address", ["127.0.0.1:0", "localhost:0", "[::1]:0"])
def test_addresses_of_this_host(address: str) -> None:
    with exporting(address, None, otel=False) as options:
        assert options is not None
        assert options.listener is not None


def test_nothing_is_exported_unless_it_is_asked_for() -> None:
    with exporting(None, None, otel=False) as options:
        assert options is None


def test_protocols_that_are_not_sent(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_PROTOCOL", "grpc")
    assert "set it to http/protobuf" in refusal(otel=True)
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_TRACES_PROTOCOL", "http/protobuf")
    with exporting(None, None, otel=True) as options:
        assert options is not None


def test_extras_that_are_not_installed(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("lazypages.cli.export_options.find_spec", lambda name: None)
    assert refusal("127.0.0.1:0") == (
        f"--metrics needs prometheus-client: {sys.executable} -m pip install prometheus-client"
    )
    assert "--metrics-textfile needs prometheus-client" in refusal(textfile=tmp_path / "x.prom")
    assert "--otel needs opentelemetry-sdk" in refusal(otel=True)

    def absent(name: str) -> None:
        raise ModuleNotFoundError(name)

    monkeypatch.setattr("lazypages.cli.export_options.find_spec", absent)
    assert "--otel needs opentelemetry-sdk" in refusal(otel=True)
