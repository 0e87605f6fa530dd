"""The tests marked every_kernel, under Debian's kernels as well as under this machine's: each in a virtual machine.

`.ci/fetch-kernels` puts the kernels into LAZYPAGES_KERNELS_DIR (default /var/cache/lazypages/kernels). QEMU emulates
the processor, so everything takes five to ten times as long; two machines run at a time.
"""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
RUN_IN = Path(__file__).with_name("run-in")
KERNELS_DIR = Path(os.environ.get("LAZYPAGES_KERNELS_DIR", "/var/cache/lazypages/kernels"))
KERNELS = ("6.1", "6.12", "newest")

#: Seconds for all tests of one kernel. A quiet machine needs a quarter of it.
TIME = 1500

#: No machine of so many was seen to panic twice in a row: about one in thirty does.
TRIES = 2

MARK = "every_kernel"


def files() -> list[str]:
    """Those with marked tests: to collect all tests takes an emulated processor half a minute."""
    found = [path for path in sorted((ROOT / "tests" / "real").glob("test_*.py")) if MARK in path.read_text()]
    assert found
    return [str(path.relative_to(ROOT)) for path in found]


def run(kernel: str) -> subprocess.CompletedProcess[str]:
    """One machine from start to end. Exit status 125: it did not come up, or was ended."""
    folder = KERNELS_DIR / kernel
    if not (folder / "release").exists():
        pytest.fail(f"no kernel at {folder}: fetch it with `.ci/fetch-kernels {KERNELS_DIR}`", pytrace=False)
    pytest_command = [sys.executable, "-m", "pytest", "-p", "tests.support.no_skips", "-m", MARK]
    pytest_command += ["-p", "no:cacheprovider", "-p", "no:benchmark", "--timeout=600", "--tb=short", "-v"]
    command = (
        f"cd {shlex.quote(str(ROOT))} && uname -r && HYPOTHESIS_STORAGE_DIRECTORY=/tmp/hypothesis "
        f"LAZYPAGES_CRIU_DIR={shlex.quote(os.environ.get('LAZYPAGES_CRIU_DIR', '/var/cache/lazypages/criu'))} "
        + shlex.join([*pytest_command, *files()])
    )
    keep = ["-k", str(ROOT)] if str(ROOT).startswith(("/tmp/", "/run/")) else []
    for _ in range(TRIES):
        done = subprocess.run(
            [RUN_IN, "-m", "4096", "-t", str(TIME), *keep, str(folder), command],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
            check=False,
        )
        if done.returncode != 125:
            break
    return done


@pytest.fixture(scope="module")
def runs(request: pytest.FixtureRequest) -> Iterator[dict[str, Future[subprocess.CompletedProcess[str]]]]:
    """Of the kernels whose tests are selected."""
    names = [item.name for item in request.session.items]
    with ThreadPoolExecutor(2) as pool:
        yield {kernel: pool.submit(run, kernel) for kernel in KERNELS if f"test_kernel[{kernel}]" in names}


@pytest.mark.timeout(TIME * TRIES * 2)
@pytest.mark.parametrize("kernel", KERNELS)
def test_kernel(kernel: str, runs: dict[str, Future[subprocess.CompletedProcess[str]]]) -> None:
    done = runs[kernel].result()
    passed = re.search(r"(\d+) passed", done.stdout)
    print("\n".join(line for line in done.stdout.splitlines() if " PASSED " not in line))
    assert done.returncode == 0
    assert passed
    assert int(passed[1]) >= 50
