"""What happens without packages that are extras: a line that says what to do, or less of what is optional."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from lazypages import extras, logs
from lazypages.cli.main import COMMANDS
from lazypages.net import wire
from lazypages.net.wire import Features, Layout, Probed, ServerCodec


def test_a_virtual_environment_has_a_pip(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "prefix", "/opt/lazypages")
    assert extras.how_to_install("rich") == f"{sys.executable} -m pip install rich"


@pytest.mark.parametrize("managed", [True, False])
def test_the_python_of_a_distribution(managed: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It refuses pip, if the distribution says so."""
    monkeypatch.setattr(sys, "prefix", sys.base_prefix)
    monkeypatch.setattr("sysconfig.get_path", lambda _name: str(tmp_path))
    if managed:
        (tmp_path / "EXTERNALLY-MANAGED").touch()
    assert ("apt install python3-rich" in extras.how_to_install("rich")) is managed


def test_other_modules_are_faults() -> None:
    error = ModuleNotFoundError("No module named 'lazypages.gone'", name="lazypages.gone")
    with pytest.raises(ModuleNotFoundError, match="gone"):
        extras.missing("`show`", error)


def test_help_needs_no_extra() -> None:
    """Man pages are made from it, too."""
    program = f"""
import sys
sys.modules.update(dict.fromkeys({list(extras.EXTRAS)}))
from lazypages.cli.main import COMMANDS, cli
for command in COMMANDS:
    cli([command, "--help"], prog_name="lazypages", standalone_mode=False)
"""
    text = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, timeout=60, check=True
    ).stdout
    assert all(f"Usage: lazypages {command}" in text for command in COMMANDS)


@pytest.mark.parametrize("installed", [True, False])
def test_compression_is_neither_asked_for_nor_granted_without_zstandard(
    installed: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A server that granted it would end the connection at the first large request."""
    if not installed:
        monkeypatch.setitem(sys.modules, "zstandard", None)
    assert bool(wire.own_features() & Features.COMPRESSED) is installed
    codec = ServerCodec()
    codec.receive(wire.probe_first(wire.ALL_FEATURES) + wire.PROBE_REST)
    event = codec.next_event()
    assert isinstance(event, Probed)
    assert bool(event.features & Features.COMPRESSED) is installed
    assert codec.layout is Layout.CRIU_4_2


def test_a_terminal_without_rich_gets_plain_lines(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.stderr.isatty", lambda: True, raising=False)
    assert logs.on_terminal() is not None
    monkeypatch.setitem(sys.modules, "rich", None)
    assert logs.on_terminal() is None
