"""The man pages (packaging/man.py) are whole, and right for both formatters that systems have: groff and mandoc."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SECTIONS = ["NAME", "SYNOPSIS", "DESCRIPTION", "OPTIONS", "EXIT STATUS", "SEE ALSO"]


@pytest.fixture(scope="module")
def pages(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Name of each page -> how it looks. Neither formatter has anything to complain about."""
    folder = tmp_path_factory.mktemp("man")
    _output(sys.executable, ROOT / "packaging" / "man.py", "-o", folder)
    paths = sorted(folder.glob("*.1"))
    assert _output("mandoc", "-T", "lint", "-W", "warning", *paths) == ""
    shown = {}
    for path in paths:
        shown[path.stem] = _output("groff", "-man", "-ww", "-T", "utf8", "-P", "-cbou", path)
    return shown


def _output(*command: str | Path) -> str:
    done = subprocess.run(
        [str(word) for word in command],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 0, done.stdout
    return done.stdout


def test_each_page_is_whole(pages: dict[str, str]) -> None:
    assert {"lazypages", "lazypages-serve", "lazypages-ctl", "dumptool", "dumptool-dump"} <= pages.keys()
    for name, text in pages.items():
        assert "warning:" not in text, text
        headings = re.findall(r"^(?=\S)(.*)$", text, re.MULTILINE)
        assert [heading for heading in headings if heading in SECTIONS] == SECTIONS, name
        assert "-h, --help" in text
        for named in re.findall(r"\b((?:lazypages|dumptool)[a-z-]*)\(1\)", text):
            assert named in pages, f"{name} names {named}"


def test_what_serve_has(pages: dict[str, str]) -> None:
    """From its help, and from the tables of files and of variables."""
    text = re.sub(r"\s+", " ", pages["lazypages-serve"])
    for expected in (
        "--page-server-protocol [auto|criu-4.1|criu-4.2]",
        "EXIT STATUS 0 every task has all its memory",
        "ENVIRONMENT LAZYPAGES_LOOP The default of --loop.",
        "FILES lazy-pages.socket",
        "EXAMPLES Start the daemon first, then the restore: lazypages serve -D /var/ckpt/job1 criu restore",
    ):
        assert expected in text


def test_the_tables_are_not_stale(pages: dict[str, str]) -> None:
    """Each page, file and variable that they name is there."""
    script = (
        "import json, sys; sys.path.insert(0, 'packaging'); import man; "
        "print(json.dumps([man.FILES, man.ENVIRONMENT, man.EXAMPLES]))"
    )
    tables = json.loads(_output(sys.executable, "-c", f"import os; os.chdir({str(ROOT)!r}); {script}"))
    source = "".join(
        path.read_text()
        for package in ("lazypages", "dumptool", "images_spec", "csrc")
        for path in sorted((ROOT / package).rglob("*.[pch]*"))
        if path.suffix in {".py", ".c", ".h"}
    )
    for table in tables:
        assert table.keys() <= pages.keys()
    for rows in (*tables[0].values(), *tables[1].values()):
        for name in rows:
            parts = name.removeprefix("$HOME/.").removeprefix("/")
            assert parts in source or Path(parts).name in source, name
