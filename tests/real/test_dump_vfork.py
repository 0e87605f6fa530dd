"""A parent in vfork stops only when its child has called execve or exited: the child must not be held meanwhile."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

from tests.support.dumptool import check, is_unharmed
from tests.support.processes import nothing_left, start, wait_for

# The child of vfork shares its parent's memory, and sleeps a little before it ends.
SOURCE = r"""
#include <stdio.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

int main(void)
{
    const struct timespec pause = {.tv_nsec = 30000000};

    for (;;) {
        pid_t pid = vfork();

        if (!pid) {
            nanosleep(&pause, NULL);
            _exit(7);
        }
        waitpid(pid, NULL, 0);
        if (write(1, "x", 1) != 1)
            return 1;
    }
}
"""


@pytest.mark.slow
@pytest.mark.timeout(60)
def test_dumped_between_two(tmp_path: Path) -> None:
    source, program, output = tmp_path / "vforks.c", tmp_path / "vforks", tmp_path / "output"
    source.write_text(SOURCE)
    subprocess.run(["gcc", "-O1", "-static", "-o", program, source], check=True, timeout=60)
    with nothing_left():
        process = start([program], output=output)
        wait_for("output", output.read_bytes)
        for number in range(3):
            check("pre-dump", "-t", process.pid, "-D", tmp_path / f"level{number}")
            is_unharmed(process.pid)
        before = len(output.read_bytes())
        wait_for("it to go on", lambda: len(output.read_bytes()) > before)
