"""The kernel behaves in one of the ways that the code is made for: all situations of tests/kernels/probe.c."""

from __future__ import annotations

import subprocess
import tomllib
from pathlib import Path

import pytest

from tests.support.compiling import CSRC, compiled

KERNELS = Path(__file__).parents[1] / "kernels"
KNOWN: dict[str, dict[str, str]] = tomllib.loads((KERNELS / "known.toml").read_text())


@pytest.fixture(scope="module")
def probe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("probe") / "probe"
    subprocess.run(
        [
            "gcc",
            "-std=gnu11",
            "-O1",
            "-Wall",
            "-Wextra",
            "-Werror",
            "-pthread",
            "-o",
            path,
            KERNELS / "probe.c",
        ],
        check=True,
    )
    return path


@pytest.mark.every_kernel
@pytest.mark.parametrize("situation", KNOWN)
def test_situation(situation: str, probe: Path) -> None:
    """Reports of several threads come in any order. Tried again: a probe looks after some time, not for ever."""
    known = {kernels: sorted(words.split()) for kernels, words in KNOWN[situation].items()}
    for _ in range(3):
        done = subprocess.run([probe, situation], check=True, capture_output=True, text=True, timeout=60)
        name, _, words = done.stdout.strip().partition(":")
        assert name == situation
        if sorted(words.split()) in known.values():
            return
    pytest.fail(f"none of what is known of {', '.join(known)}: {words}")


@pytest.mark.every_kernel
def test_a_probe_unmaps_only_what_is_its_own() -> None:
    """It makes a hole in the daemon's memory, into which another thread maps at once."""
    source = Path(__file__).parents[1] / "support/probe_neighbour.c"
    program = compiled(source, f"-I{CSRC}", str(CSRC / "serve/uffd_ops.c"))
    subprocess.run([program], check=True, timeout=60)
