"""The units of packaging/systemd under a real systemd, in a virtual machine with Debian's kernel (docs/systemd.md).

systemd_guest.py has what happens there.
"""

from __future__ import annotations

import compileall
import shlex
import sys
from pathlib import Path

import pytest

from tests.kernels.test_kernels import KERNELS_DIR, ROOT, RUN_IN, TRIES, Machines
from tests.support.criu import Criu
from tests.support.restore import Program

HERE = Path(__file__).parent

#: Seconds. A quiet machine needs a tenth of this.
TIME = 1200


@pytest.mark.timeout(TIME * TRIES + 60)
def test_units(program: Program) -> None:
    for package in ("lazypages", "images_spec"):  # the guest can't, and would compile each time
        compileall.compile_dir(ROOT / package, quiet=1)
    lazypages = Path(sys.executable).with_name("lazypages")
    command = [
        sys.executable,
        HERE / "hold_perf.py",
        sys.executable,
        HERE / "systemd_guest.py",
        Criu("4.2").path,
        "/tmp/victim",
        lazypages,
    ]
    victim = program.path.parent
    text = f"cp {victim}/victim /tmp/victim && {shlex.join(map(str, command))}"
    keep = [word for folder in (ROOT, victim) if folder.is_relative_to("/tmp") for word in ("-k", folder)]
    machines = Machines()
    try:
        for _ in range(TRIES):
            done = machines.run([RUN_IN, "-s", "-t", str(TIME), *keep, KERNELS_DIR / "6.12", text])
            if done.status != 125:
                break
    finally:
        machines.end()
    print(done.output)
    assert done.status == 0
    assert done.output.endswith("passed\n")
