"""What is published is whole: sdist from the tree, wheel from the sdist, and the demo from the wheel."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import sysconfig
import venv
from collections.abc import Iterator
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest

ROOT = Path(__file__).parents[2]
LEFT_OUT = shutil.ignore_patterns(
    ".git",
    ".venv",
    ".*cache",
    ".hypothesis",
    ".benchmarks",
    "build",
    "dist",
    "*.egg-info",
    "__pycache__",
    "*.so",
    "*.o",
)


def run(*command: str | Path, cwd: Path = Path("/")) -> str:
    """What it prints; a failure shows that."""
    done = subprocess.run(
        [str(word) for word in command],
        cwd=cwd,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=280,
        check=False,
        env={key: value for key, value in os.environ.items() if key != "PYTHONPATH"},
    )
    if done.returncode:
        pytest.fail(f"{command}: {done.returncode}\n{done.stdout[-6000:]}", pytrace=False)
    return done.stdout


@pytest.fixture(scope="module")
def installed() -> Iterator[Path]:
    """A virtual environment with the wheel in it; what it depends on comes from the one of the tests."""
    with TemporaryDirectory(prefix="lazypages-package-") as name:
        folder = Path(name)
        tree = folder / "tree"
        shutil.copytree(ROOT, tree, ignore=LEFT_OUT)
        (tree / "lazypages" / "restore" / "uffd_restorer").unlink(missing_ok=True)
        (tree / "dumptool" / "tracker_holder").unlink(missing_ok=True)
        run(sys.executable, "-m", "build", "--no-isolation", "--outdir", folder, tree)
        (wheel,) = folder.glob("*.whl")
        venv.create(folder / "venv", with_pip=False)
        python = folder / "venv" / "bin" / "python"
        run(sys.executable, "-m", "pip", "--python", python, "install", "--no-deps", "--no-index", wheel)
        site = run(python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))").strip()
        Path(site, "dependencies.pth").write_text(sysconfig.get_path("purelib"))
        shutil.rmtree(tree)
        yield folder / "venv" / "bin"


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_the_wheel_s_own_code_runs(installed: Path) -> None:
    """And not that of the tree, which is gone."""
    for module in (
        "lazypages.engine._uffd",
        "lazypages.net._pageserver",
        "images_spec._pagemap",
        "dumptool._ptrace",
    ):
        text = run(installed / "python", "-c", f"import {module} as module; print(module.__file__)")
        assert text.startswith(str(installed.parent))


@pytest.mark.slow
@pytest.mark.timeout(300)
@pytest.mark.parametrize("criu", [True, False], ids=["with CRIU", "without"])
def test_the_demo_from_the_wheel(installed: Path, criu: bool) -> None:
    places = [] if criu else ["env", "LAZYPAGES_CRIU_DIR=/nowhere", "LAZYPAGES_CRIU=", "PATH=/usr/bin:/bin"]
    text = run(*places, installed / "lazypages", "demo", "--size", "16")
    assert ("Trying CRIU" in text) == criu
    assert "Every byte is the same as at the checkpoint." in text


@pytest.mark.slow
@pytest.mark.timeout(300)
@pytest.mark.parametrize("command", ["lazypages", "dumptool"])
def test_commands(installed: Path, command: str) -> None:
    assert f"Usage: {command}" in run(installed / command, "--help")
