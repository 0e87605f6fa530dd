"""Runs the tests marked every_kernel under Debian's kernels, each in a virtual machine.

Every third test runs under one of the three kernels (share.py), all tests under all with LAZYPAGES_ALL_KERNELS=1.

`.ci/fetch-kernels` puts the kernels into LAZYPAGES_KERNELS_DIR (default /var/cache/lazypages/kernels). QEMU emulates
the processor, so the tests take five to ten times as long. Two machines run at a time.
"""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import pytest

from tests.kernels.share import KERNELS

ROOT = Path(__file__).parents[2]
RUN_IN = Path(__file__).with_name("run-in")
KERNELS_DIR = Path(os.environ.get("LAZYPAGES_KERNELS_DIR", "/var/cache/lazypages/kernels"))

#: Seconds for all tests of one kernel. A quiet machine needs a third of this.
TIME = 2100

#: Number of attempts, because about one emulated machine in thirty panics. None was seen to panic twice in a row.
TRIES = 2

MARK = "every_kernel"


def files() -> list[str]:
    """The files with marked tests. Collecting all tests takes half a minute on an emulated processor."""
    found = [path for path in sorted((ROOT / "tests" / "real").glob("test_*.py")) if MARK in path.read_text()]
    assert found
    return [str(path.relative_to(ROOT)) for path in found]


class Done(NamedTuple):
    status: int
    output: str


class Machines:
    """The machines that run now."""

    def __init__(self) -> None:
        self._running: set[subprocess.Popen[str]] = set()

    def run(self, command: Sequence[str | Path]) -> Done:
        """Run one machine to its end."""
        with subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace"
        ) as process:
            self._running.add(process)
            output, _ = process.communicate()
            self._running.discard(process)
        return Done(process.returncode, output)

    def end(self) -> None:
        for process in tuple(self._running):
            process.terminate()


def run(machines: Machines, kernel: str) -> Done:
    """Run the tests in a machine with this kernel. Status 125: it did not boot, or exceeded its time."""
    folder = KERNELS_DIR / kernel
    if not (folder / "release").exists():
        pytest.fail(f"no kernel at {folder}: fetch it with `.ci/fetch-kernels {KERNELS_DIR}`", pytrace=False)
    hold_perf = str(Path(__file__).with_name("hold_perf.py"))
    pytest_command = [
        sys.executable,
        hold_perf,
        sys.executable,
        "-m",
        "pytest",
        "-p",
        "tests.support.no_skips",
        "-m",
        MARK,
    ]
    if not os.environ.get("LAZYPAGES_ALL_KERNELS"):
        pytest_command += ["-p", "tests.kernels.share"]
    pytest_command += [
        "-p",
        "no:cacheprovider",
        "-p",
        "no:benchmark",
        "--timeout=600",
        "--tb=short",
        "-v",
        "--durations=25",
    ]
    environment = {
        "HYPOTHESIS_STORAGE_DIRECTORY": "/tmp/hypothesis",
        "LAZYPAGES_EMULATED": "1",
        "LAZYPAGES_KERNEL": kernel,
        "LAZYPAGES_CRIU_DIR": os.environ.get("LAZYPAGES_CRIU_DIR", "/var/cache/lazypages/criu"),
    }
    variables = shlex.join(f"{name}={value}" for name, value in environment.items())
    command = f"cd {shlex.quote(str(ROOT))} && uname -r && env {variables} {shlex.join([*pytest_command, *files()])}"
    keep = ["-k", str(ROOT)] if str(ROOT).startswith(("/tmp/", "/run/")) else []
    for _ in range(TRIES):
        done = machines.run([RUN_IN, "-m", "4096", "-t", str(TIME), *keep, folder, command])
        if done.status != 125:
            break
    return done


@pytest.fixture(scope="module")
def runs(request: pytest.FixtureRequest) -> Iterator[dict[str, Future[Done]]]:
    """The runs of all selected kernels, started at once. Ends machines that no test waits for any more."""
    names = [item.name for item in request.session.items]
    machines = Machines()
    with ThreadPoolExecutor(2) as pool:
        try:
            yield {
                kernel: pool.submit(run, machines, kernel)
                for kernel in KERNELS
                if f"test_kernel[{kernel}]" in names
            }
        finally:
            pool.shutdown(wait=False, cancel_futures=True)
            machines.end()


@pytest.mark.timeout(TIME * TRIES * 2)
@pytest.mark.parametrize("kernel", KERNELS)
def test_kernel(kernel: str, runs: dict[str, Future[Done]]) -> None:
    done = runs[kernel].result()
    passed = re.search(r"(\d+) passed", done.output)
    print("\n".join(line for line in done.output.splitlines() if " PASSED " not in line))
    assert done.status == 0
    assert passed
    assert int(passed[1]) >= 10
