"""What is published is whole, and what is installed from it restores tasks: sdist, wheel, Debian package.

All are tried where there is no compiler: in a virtual environment of this Python, and in a clean root of Debian trixie
(.ci/fetch-trixie) with another Python.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
import sysconfig
import venv
import zipfile
from collections.abc import Iterator
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest

ROOT = Path(__file__).parents[2]
WHEELS = Path(os.environ.get("LAZYPAGES_TRIXIE_DIR", "/var/cache/lazypages/trixie"), "wheels")
TRIXIE_PYTHON = "3.13"

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1200)]  # builds take long on a busy machine


def run(*command: str | Path, cwd: Path = Path("/"), fails: bool = False, **variables: str) -> str:
    """What it prints; a failure shows that."""
    done = subprocess.run(
        [str(word) for word in command],
        cwd=cwd,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=1100,
        check=False,
        env={key: value for key, value in os.environ.items() if key != "PYTHONPATH"} | variables,
    )
    if bool(done.returncode) != fails:
        pytest.fail(f"{command}: {done.returncode}\n{done.stdout[-6000:]}", pytrace=False)
    return done.stdout


@pytest.fixture(scope="module")
def built() -> Iterator[Path]:
    """The folder with all three."""
    with TemporaryDirectory(prefix="lazypages-packages-") as name:
        run(ROOT / "packaging" / "build", name)
        yield Path(name)


@pytest.fixture(scope="module")
def sdist(built: Path) -> Path:
    return next(built.glob("*.tar.gz"))


@pytest.fixture(scope="module")
def wheel(built: Path) -> Path:
    return next(built.glob("*.whl"))


@pytest.fixture(scope="module")
def deb(built: Path) -> Path:
    return next(built.glob("*.deb"))


def test_the_sdist_has_the_files_of_the_repository(sdist: Path) -> None:
    """All of them (Debian's package and the wheel are built from it), and no others but what setuptools writes."""
    packed = {line.partition("/")[2] for line in run("tar", "-tf", sdist).splitlines() if line[-1] != "/"}
    tracked = set(
        run("git", "-C", ROOT, "ls-files", "--cached", "--others", "--exclude-standard").splitlines()
    )
    tracked = {path for path in tracked if (ROOT / path).exists()}
    extra = {path for path in packed - tracked if not path.startswith("lazypages.egg-info/")}
    assert extra == {"PKG-INFO", "setup.cfg"}
    assert tracked - packed == {".gitignore"}


def test_the_wheel_says_what_it_needs(wheel: Path) -> None:
    """Its tag names the newest glibc that a module of it wants, and no more."""
    tag = re.fullmatch(r"lazypages-[\d.]+-cp311-abi3-manylinux_2_(\d+)_x86_64", wheel.stem)
    assert tag, wheel.name
    with zipfile.ZipFile(wheel) as file:
        modules = [file.read(name) for name in file.namelist() if name.endswith(".so")]
    assert len(modules) == 4
    wanted = {int(minor) for module in modules for minor in re.findall(rb"\0GLIBC_2\.(\d+)(?=[\0.])", module)}
    assert max(wanted) == int(tag[1])


@pytest.fixture(scope="module")
def installed(wheel: Path) -> Iterator[Path]:
    """A virtual environment with the wheel in it; what it depends on comes from the one of the tests."""
    with TemporaryDirectory(prefix="lazypages-package-") as name:
        folder = Path(name)
        venv.create(folder / "venv", with_pip=False)
        python = folder / "venv" / "bin" / "python"
        run(sys.executable, "-m", "pip", "--python", python, "install", "--no-deps", "--no-index", wheel)
        site = run(python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))").strip()
        Path(site, "dependencies.pth").write_text(sysconfig.get_path("purelib"))
        yield folder / "venv" / "bin"


def test_the_wheel_s_own_code_runs(installed: Path) -> None:
    """And not that of this tree."""
    for module in (
        "lazypages.engine._uffd",
        "lazypages.net._pageserver",
        "images_spec._pagemap",
        "dumptool._ptrace",
    ):
        text = run(installed / "python", "-c", f"import {module} as module; print(module.__file__)")
        assert text.startswith(str(installed.parent))


@pytest.mark.parametrize("criu", [True, False], ids=["with CRIU", "without"])
def test_the_demo_from_the_wheel(installed: Path, criu: bool) -> None:
    places = {} if criu else {"LAZYPAGES_CRIU_DIR": "/nowhere", "LAZYPAGES_CRIU": "", "PATH": "/nowhere"}
    text = run(installed / "lazypages", "demo", "--size", "16", **places)
    assert ("Trying CRIU" in text) == criu
    assert "Every byte is the same as at the checkpoint." in text


@pytest.mark.parametrize("command", ["lazypages", "dumptool"])
def test_commands(installed: Path, command: str) -> None:
    assert f"Usage: {command}" in run(installed / command, "--help")


#: A restore with CRIU, on a terminal, and one of a dump of dumptool: both compare all bytes. Then commands that need
#: what is not installed.
TRY = """
if command -v cc gcc clang; then exit 1; fi
lazypages --version
dumptool --version
script -qec 'lazypages demo --size 32 --criu /usr/sbin/criu' /dev/null
mv /usr/sbin/criu /root
lazypages demo --size 32
mv /root/criu /usr/sbin
cd /tmp
for command in 'show /tmp' 'bench --quick' 'plot none -o out.png'; do
    if lazypages $command; then exit 1; fi
done
"""


def in_trixie(script: str, shared: Path, root: str = "clean") -> str:
    """What a script prints in a root of trixie, where `shared` is /shared."""
    return run(ROOT / ".ci" / "in-trixie", root, "sh", "-euc", script, SHARED=str(shared))


def check_tried(text: str, needs: str) -> None:
    """Checks what TRY has printed. `needs`: how a missing package is installed, with {} for its name."""
    assert text.count("Every byte is the same as at the checkpoint.") == 2
    assert text.count("Trying CRIU") == text.count("Trying our own dumptool") == 1
    expected = [
        f"lazypages: {what} needs {package}: {needs.format(package)}"
        for what, package in (("`show`", "rich"), ("`bench`", "rich"), ("--output", "matplotlib"))
    ]
    assert [line for line in text.splitlines() if " needs " in line] == expected


@pytest.fixture(scope="module")
def with_dependencies(wheel: Path) -> Path:
    """The folder WHEELS with the wheel, and for trixie's Python pip and all that the wheel needs."""
    WHEELS.mkdir(parents=True, exist_ok=True)
    for old in WHEELS.glob("lazypages-*.whl"):
        old.unlink()
    download = [sys.executable, "-m", "pip", "download", "--quiet", "--dest", WHEELS, "--find-links", WHEELS]
    options = ["--only-binary", ":all:", "--python-version", TRIXIE_PYTHON]
    try:
        subprocess.run(
            [*download, *options, "--no-index", "pip", wheel],
            timeout=120,
            check=True,
            stderr=subprocess.DEVNULL,
        )
    except subprocess.CalledProcessError:
        run(*download, *options, "pip", wheel)
    return WHEELS


def test_the_wheel_with_another_python(with_dependencies: Path) -> None:
    """With nothing but what pip installs along with it."""
    install = """
python3 -m venv --without-pip /opt/lazypages
export PATH=/opt/lazypages/bin:$PATH
export PYTHONPATH=$(echo /shared/pip-*.whl)
python -m pip install --quiet --no-index --find-links /shared lazypages
python -m pip check
unset PYTHONPATH
"""
    text = in_trixie(install + TRY, with_dependencies)
    check_tried(text, "/opt/lazypages/bin/python -m pip install {}")


def test_the_debian_package(deb: Path) -> None:
    """Installed, tried and purged; then every file and folder is as before."""
    script = f"""
files() {{
    find / -xdev -printf '%p %m %l\\n' | grep -vE '^/var/(lib/dpkg|log|cache)/' | sort
}}
files >/tmp/before
dpkg -i /shared/*.deb >/tmp/log 2>&1 || {{ cat /tmp/log; exit 1; }}
dpkg -L lazypages
lazypages doctor
{"man -P cat lazypages-serve" if (ROOT / "packaging" / "man.py").exists() else ""}
{TRY}
dpkg --purge lazypages >/tmp/log 2>&1 || {{ cat /tmp/log; exit 1; }}
files >/tmp/after
diff /tmp/before /tmp/after
"""
    text = in_trixie(script, deb.parent)
    check_tried(text, "apt install python3-{}, or that package of your distribution")
    installed = {Path(line).name for line in text.splitlines() if line.startswith("/usr/")}
    units = {path.name for path in (ROOT / "packaging" / "systemd").glob("*.s*")}
    assert units | {"lazypages", "dumptool", "_lazypages", "lazypages.fish"} <= installed
