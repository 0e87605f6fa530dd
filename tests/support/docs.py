"""The documents, as tests execute them: their blocks, which test executes those of a page, and shells to do it in.

A new page: write a test that takes its commands with `commands`, and add a line to EXECUTED_BY.
tests/unit/test_docs.py finds what is missing.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from tests.support.criu import CRIU_DIR
from tests.support.hosts import Host
from tests.support.processes import wait_for

ROOT = Path(__file__).parents[2]

#: Which test executes the blocks of a page. It contains the title of each section that has some: "Use it".
EXECUTED_BY = {
    "README.md": "tests/real/test_docs.py",
    "docs/backend.md": "tests/real/test_docs.py",
    "docs/containers.md": "tests/real/test_containers.py",
    "docs/criu-shim.md": "tests/real/test_docs.py",
    "docs/crun.md": "tests/real/test_containers.py",
    "docs/daemon.md": "tests/real/test_docs.py",
    "docs/images_spec.md": "tests/real/test_docs.py",
    "docs/metrics.md": "tests/real/test_docs.py",
    "docs/migrate.md": "tests/real/test_migrate_page.py",
    "docs/podman.md": "tests/real/test_containers.py",
    "docs/runc.md": "tests/real/test_containers.py",
    "docs/packed.md": "tests/real/test_packed_page.py",
    "docs/sizing.md": "tests/real/test_docs.py",
    "docs/troubleshooting.md": "tests/real/test_docs.py",
}

PACKAGES = "tests/real/test_package.py builds, installs and removes these in a root of its own"
SYSTEMD = "it changes the system: tests/kernels/systemd_guest.py does this in a virtual machine"

#: Blocks that no test executes, by the page and the block's first line: why not.
NOT_EXECUTED = {
    (
        "README.md",
        "python3 -m venv /opt/lazypages && /opt/lazypages/bin/pip install '.[terminal,compression]'",
    ): ("fetches packages; tests/real/test_package.py installs the wheel that this builds"),
    ("README.md", ".ci/test"): "it runs the tests",
    ("docs/daemon.md", 'conn, err := net.Dial("unix", "/run/lazypages.socket")'): "the tests have no Go",
    (
        "docs/backend.md",
        "LAZYPAGES_KILLS=200 LAZYPAGES_SEED=1796027678 .venv/bin/pytest -s tests/real/test_dump_backend_kills.py",
    ): "CI runs it with fewer kills",
    ("docs/metrics.md", "scrape_configs:"): "tests/real/test_dashboard.py runs a Prometheus with such a file",
    ("docs/metrics.md", "groups:"): "tests/real/test_dashboard.py checks these rules",
    (
        "docs/metrics.md",
        '{"time": "2026-11-30T08:00:00.000000+00:00", "level": "error", "message": "task 7: killed by SIGKILL ...", '
        '"restore": 3, "pid": 7}',
    ): "output; tests/real/test_log_json.py has real lines",
    ("docs/packages.md", ".ci/venv dev && packaging/build"): PACKAGES,
    ("docs/packages.md", "apt install ./lazypages_0.1.0_amd64.deb"): PACKAGES,
    ("docs/packages.md", "python3 -m venv /opt/lazypages"): PACKAGES,
    (
        "docs/packages.md",
        "/opt/lazypages/bin/pip install './lazypages-0.1.0-cp311-abi3-manylinux_2_34_x86_64.whl[terminal,compression]'",
    ): PACKAGES,
    (
        "docs/systemd.md",
        "cp packaging/systemd/lazypages.service packaging/systemd/lazypages.socket \\",
    ): SYSTEMD,
    ("docs/systemd.md", "lazypages serve --via /run/lazypages.socket -D /var/ckpt/job1"): SYSTEMD,
    (
        "docs/systemd.md",
        "unit=$(systemd-escape --path --template=lazypages-serve@.service /var/ckpt/job1)",
    ): SYSTEMD,
    ("docs/systemd.md", "lazypages ctl shutdown --now"): SYSTEMD,
    ("docs/kernel.md", ".ci/fetch-kernels"): "CI does this beside the tests (.ci/test), for many minutes",
}


class Block(NamedTuple):
    """A fenced block of a page that names its language. `line`: of its fence, counted from 1."""

    page: str
    line: int
    section: str
    language: str
    text: str

    @property
    def first(self) -> str:
        """Its first line, without a comment behind it."""
        return re.sub(r"\s+# .*", "", self.text.split("\n", 1)[0])

    def __str__(self) -> str:
        return f"{self.page}:{self.line} ({self.first!r} in {self.section!r})"


def pages() -> list[str]:
    """README.md and all of docs/."""
    return ["README.md", *sorted(f"docs/{path.name}" for path in (ROOT / "docs").glob("*.md"))]


def all_blocks(page: str) -> list[Block]:
    """Those of a page, in their order; the section of one is the last title before it."""
    found, section, inside = [], "", None
    for number, line in enumerate((ROOT / page).read_text().splitlines(), start=1):
        fence = re.fullmatch(r"( *)```(\w*)", line)
        if inside is None and fence:
            inside = number, fence[1], fence[2], []
        elif inside is not None and fence and not fence[2]:
            start, _, language, lines = inside
            if language:
                found.append(Block(page, start, section, language, "".join(lines)))
            inside = None
        elif inside is not None:
            inside[3].append(line.removeprefix(inside[1]) + "\n")
        elif line.startswith("#"):
            section = line.lstrip("#").strip()
    assert inside is None, f"{page}:{inside[0]}: a block without an end"
    return found


def blocks(page: str, section: str, language: str = "sh") -> list[str]:
    """What a test has to execute of a section: the texts of its blocks in that language. There are some."""
    found = [
        block.text
        for block in all_blocks(page)
        if (block.section, block.language) == (section, language) and (page, block.first) not in NOT_EXECUTED
    ]
    assert found, f"{page}: no block in {language} in {section!r}"
    return found


def with_changes(text: str, changes: Mapping[str, object]) -> str:
    """The text with what is other in a test; all of that must be in it."""
    for written, real in changes.items():
        assert written in text, f"{written!r} is not in\n{text}"
        text = text.replace(written, str(real))
    return text


class Shell:
    """A host's shell, in the directory of a test. `criu`: the release of the `criu` in its PATH."""

    def __init__(
        self, folder: Path, host: Host | None = None, *, path: Sequence[Path] = (), criu: str = "4.2"
    ) -> None:
        self._folder = folder
        self._host = host or Host()
        self.output = folder / f"output-{self._host.address}"
        places = [*path, CRIU_DIR / criu, Path(sys.executable).parent, os.environ["PATH"]]
        self._environment = {**os.environ, "PATH": ":".join(map(str, places))}

    def start(self, text: str, *before: str, **variables: str) -> subprocess.Popen[bytes]:
        """Commands, each of which must succeed. `before`: of the shell, as words."""
        with self.output.open("wb") as output:
            return subprocess.Popen(
                self._host.command(*before, "bash", "-eu", "-o", "pipefail", "-c", text),
                cwd=self._folder,
                env={**self._environment, **variables},
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
            )

    def run(self, text: str, *before: str, **variables: str) -> str:
        """What the commands print; they must succeed."""
        return self.finish(self.start(text, *before, **variables), text)

    def finish(self, process: subprocess.Popen[bytes], text: str) -> str:
        """Waits for what was started."""
        try:
            status = process.wait(60)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
            status = -1
        output = self.output.read_text()
        logs = "".join(
            f"--- {path}\n{path.read_text(errors='replace')[-3000:]}"
            for path in (*self._folder.glob("*/*.log"), *self._folder.glob("*.log"))
        )
        assert status == 0, f"{text}\n--- {status}\n{output}\n{logs}"
        return output

    def check_refusal(self, text: str) -> None:
        """A command, and the messages with which it fails."""
        command, *output = text.splitlines()
        done = subprocess.run(
            command.removeprefix("$ ").split(),
            env=self._environment,
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
        )
        assert done.returncode
        assert (done.stdout + done.stderr).splitlines() == output


def served(work: Path, log: str = "serve.log") -> str:
    """The daemon's log, when it is done with one task."""
    path = work / log
    wait_for("the daemon to be done", lambda: "1 complete" in path.read_text())
    return path.read_text()
