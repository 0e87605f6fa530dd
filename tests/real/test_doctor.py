"""`lazypages doctor` says what is true: compared with CRIU's own checks, and with what is taken away from it."""

from __future__ import annotations

import errno
import json
import os
import re
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

import pytest

from tests.support.criu import Criu

CRIU = Criu("4.2")

#: Before it becomes another user: an installation may be root's alone.
ALL_IMPORTED = """
import ctypes, os, resource, sys
import lazypages.cli.doctor, lazypages.cli.main, images_spec.errors
import lazypages.control.descriptors, lazypages.engine.guard, lazypages.engine.tracers, lazypages.loop.exit_events
from lazypages.cli.main import cli
libc = ctypes.CDLL(None, use_errno=True)
"""
TRIES = "libc.syscall(323, 0); print(ctypes.get_errno(), file=sys.stderr)\n"
RUNS = "cli(['doctor', '--json'], prog_name='lazypages')\n"

STRANGER = (
    ALL_IMPORTED
    + "os.setgroups([]); os.setgid(65534); os.setuid(65534); libc.prctl(4, 1)\n"  # PR_SET_DUMPABLE
    + TRIES
    + RUNS
)

#: A filter under which userfaultfd(2) fails with sys.argv[1], as that of container runtimes does.
FILTERED = (
    ALL_IMPORTED
    + """
import struct
forbid, allow = 0x50000 | int(sys.argv[1]), 0x7fff0000
steps = struct.pack("=HBBIHBBIHBBIHBBI", 0x20, 0, 0, 0, 0x15, 0, 1, 323, 6, 0, 0, forbid, 6, 0, 0, allow)
program = ctypes.create_string_buffer(steps)
libc.prctl(38, 1, 0, 0, 0)
assert not libc.prctl(22, 2, ctypes.create_string_buffer(struct.pack("=H6xQ", 4, ctypes.addressof(program))), 0, 0)
"""
    + TRIES
    + RUNS
)

Findings = Mapping[str, Mapping[str, str]]


def examined(command: Sequence[str | Path], status: int = 0, **environment: str) -> tuple[Findings, str]:
    """What it finds, and its standard error."""
    done = subprocess.run(
        command,
        env={**os.environ, "LAZYPAGES_CRIU": str(CRIU.path), **environment},
        capture_output=True,
        text=True,
        timeout=110,
        check=False,
    )
    assert done.returncode == status, done.stdout + done.stderr
    document = json.loads(done.stdout)
    assert document["works"] is (status == 0)
    assert any(finding["state"] == "no" for finding in document["findings"]) is (status == 1)
    for finding in document["findings"]:
        assert finding["state"] == "ok" or finding["costs"], "what it costs is said"
    return {finding["name"]: finding for finding in document["findings"]}, done.stderr


def doctor(*arguments: str, prefix: Sequence[str] = ()) -> list[str]:
    return [*prefix, sys.executable, "-m", "lazypages", "doctor", "--json", *arguments]


def criu_has(feature: str) -> bool:
    return not subprocess.run(
        [CRIU.path, "check", "--feature", feature], capture_output=True, timeout=60, check=False
    ).returncode


@pytest.mark.every_kernel
def test_root_and_another_user() -> None:
    """What the kernel has is the same for both, what may be done is not."""
    found, _ = examined(doctor())
    check_kernel(found)
    theirs, said = examined([sys.executable, "-c", STRANGER], 1, LAZYPAGES_CRIU="", PATH="/nowhere")
    assert int(said) == errno.EPERM
    assert "needs CAP_SYS_PTRACE" in theirs["userfaultfd"]["costs"]
    assert theirs["CAP_SYS_ADMIN"]["state"] == "no"
    assert theirs["CAP_SYS_PTRACE"]["state"] == "less"
    for name in ("machine", "poison", "guard regions", "pre-dump"):
        assert theirs[name] == found[name]


def check_kernel(found: Findings) -> None:
    """For root."""
    assert found["userfaultfd"]["state"] == "ok"
    assert found["CRIU"]["state"] == "ok"
    assert found["CRIU"]["found"].startswith("4.2.1 (")
    assert (found["pre-dump"]["state"] == "ok") == criu_has("mem_dirty_track")
    scan = criu_has("pagemap_scan")
    assert ("write protection" in " ".join(found["pre-dump"].values())) == scan
    assert found["ends of tasks"]["state"] == "ok"
    assert found["tracers"]["state"] == "ok"
    version = re.match(r"(\d+)\.(\d+)", os.uname().release)
    assert version
    release = int(version[1]), int(version[2])
    assert found["poison"]["state"] == ("ok" if release >= (6, 6) else "less")
    guards = found["guard regions"]["found"]
    if release < (6, 13):
        assert guards.startswith("the kernel has none")
    elif release == (6, 18):
        assert guards == "replaced by copies"
    elif release >= (7, 2):
        assert guards == "kept by copies"


@pytest.mark.parametrize("error", [errno.EPERM, errno.ENOSYS])
def test_seccomp(error: int) -> None:
    found, said = examined([sys.executable, "-c", FILTERED, str(error)], 1)
    assert int(said) == error
    assert found["userfaultfd"]["found"] == os.strerror(error)
    assert "seccomp filter" in found["userfaultfd"]["costs"]
    assert found["confinement"] == {
        "name": "confinement",
        "state": "less",
        "found": "a seccomp filter",
        "costs": "may forbid userfaultfd, ptrace or files to the daemon or the restore",
    }
    assert "poison" not in found  # it can't be known
    assert "can't be tried" in found["pre-dump"]["found"]


def test_limits_and_namespaces() -> None:
    found, _ = examined(doctor(prefix=["prlimit", "--nofile=300", "unshare", "--net"]))
    assert found["descriptors"]["state"] == "less"
    assert "RLIMIT_NOFILE 300" in found["descriptors"]["found"]
    assert found["tracers"]["state"] == "less"


def test_a_user_namespace() -> None:
    found, _ = examined(doctor(prefix=["unshare", "--user", "--map-root-user"]), 1)
    assert found["userfaultfd"]["costs"] == "needs CAP_SYS_PTRACE in the first user namespace"
    assert found["capabilities"]["state"] == "less"
    assert found["capabilities"]["found"] == "in this user namespace only"


def test_without_proc() -> None:
    """What could not be looked at is not said to be good."""
    covered = 'mount -t tmpfs none /proc && exec "$@"'
    found, _ = examined(doctor(prefix=["unshare", "--mount", "sh", "-c", covered, "sh"]), 1)
    assert found["/proc"]["state"] == "no"
    before, _ = examined(doctor())
    for name in ("CAP_SYS_ADMIN", "CAP_SYS_PTRACE", "CAP_SYS_RESOURCE", "capabilities"):
        assert found.get(name) == before.get(name)
    assert found["confinement"]["found"] == "can't be read"
    assert found["ptrace"]["found"] == "kernel.yama.ptrace_scope can't be read"
    assert found["mappings"]["found"] == "vm.max_map_count can't be read"
    assert found["memory"]["found"].startswith("unknown")
    assert "can't be known" in found["descriptors"]["found"]


def test_without_mem_available(tmp_path: Path) -> None:
    """As before Linux 3.14, or in some sandboxes. That a cgroup has no limit is no memory."""
    meminfo = tmp_path / "meminfo"
    meminfo.write_text("MemTotal: 1024 kB\n")
    without = f'mount --bind {meminfo} /proc/meminfo && exec "$@"'
    found, _ = examined(doctor(prefix=["unshare", "--mount", "sh", "-c", without, "sh"]))
    known = re.match(r"([\d.]+) GiB", found["memory"]["found"])
    assert float(known[1]) < 1 << 20 if known else found["memory"]["found"].startswith("unknown")


NO_ENGINE = """
import sys
sys.modules["lazypages.engine._uffd"] = None
from lazypages.cli.main import cli
"""


def test_without_the_engine() -> None:
    found, _ = examined([sys.executable, "-c", NO_ENGINE + RUNS], 1)
    assert found["engine"]["state"] == "no"
    assert "can't be known" in found["descriptors"]["found"]


def test_criu_that_is_not_there(tmp_path: Path) -> None:
    found, _ = examined(doctor(), LAZYPAGES_CRIU="", PATH="/nowhere")
    assert found["CRIU"]["found"] == "not in PATH"
    criu = tmp_path / "criu"
    criu.write_text("#!/bin/sh\necho 'Version: 3.0'\necho 'Error: nothing here'\n[ $1 = --version ]\n")
    criu.chmod(0o755)
    found, _ = examined(doctor("--criu", str(criu)))
    assert found["CRIU"]["found"].startswith("3.0 (")
    assert "uffd: Error: nothing here" in found["CRIU"]["found"]
    criu.write_text("#!/bin/sh\nexit 3\n")
    assert "does not run (3)" in examined(doctor("--criu", str(criu)))[0]["CRIU"]["found"]


def test_what_a_person_reads() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "lazypages", "doctor"], capture_output=True, text=True, timeout=60, check=False
    )
    assert done.returncode == 0
    *lines, verdict = done.stdout.splitlines()
    assert verdict == "A lazy restore works here."
    assert all(re.match(r"(ok  |less|no  )  \S", line) for line in lines)
