"""What tests/kernels/test_systemd.py runs as root in a machine whose first process is systemd.

systemd_guest.py CRIU VICTIM LAZYPAGES: the programs. Imports few modules: each takes long on an emulated processor.
"""

from __future__ import annotations

import grp
import json
import os
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

UNITS = Path(__file__).parents[2] / "packaging" / "systemd"
INSTALLED = Path("/etc/systemd/system")
SOCKET = "/run/lazypages.socket"
SERVICE = "lazypages.service"
TIMEOUT = 500.0  # s: a loaded machine that is emulated

begun = time.monotonic()
criu, program, lazypages = sys.argv[1:]


def step(text: str) -> None:
    print(f"{time.monotonic() - begun:6.1f} s  {text}", flush=True)


def run(*command: str | Path, status: int | None = 0) -> str:
    """Its output. ``status``: what it must end with; None: anything."""
    done = subprocess.run(
        [str(word) for word in command],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=TIMEOUT,
        check=False,
    )
    if status is not None and done.returncode != status:
        raise AssertionError(f"{command}: exit {done.returncode}: {done.stdout}")
    return done.stdout


def wait_for(what: str, ready: Callable[[], Any]) -> Any:
    deadline = time.monotonic() + TIMEOUT
    while not (found := ready()):
        assert time.monotonic() < deadline, f"waited for {what}"
        time.sleep(0.5)  # some looks start a program, which takes the CPU from what is waited for
    return found


def properties(unit: str, *names: str) -> dict[str, str]:
    lines = run("systemctl", "show", unit, f"--property={','.join(names)}").splitlines()
    return dict(line.split("=", 1) for line in lines)


def ask(do: str, **fields: Any) -> dict[str, Any]:
    """A request to the daemon, which systemd starts if need be. Its answer."""
    with socket.socket(socket.AF_UNIX) as daemon:
        daemon.settimeout(TIMEOUT)
        daemon.connect(SOCKET)
        daemon.sendall(json.dumps({"do": do, **fields}).encode() + b"\n")
        with daemon.makefile() as lines:
            answer: dict[str, Any] = json.loads(lines.readline())
    assert answer["ok"], answer
    return answer


class Checkpoint:
    """A victim (tests/support/victims) that waits for its go, in images of CRIU's."""

    def __init__(self, folder: Path) -> None:
        self.images, self.results = folder / "images", folder / "results"
        for path in (folder, self.images, self.results):
            path.mkdir()
        victim = subprocess.Popen(
            [program, "plain", self.results, "1"],
            cwd="/",
            env={"PATH": os.environ["PATH"]},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        )
        self.pid = victim.pid
        wait_for("the victim", (self.results / "ready").exists)
        self._criu("dump", "-t", str(victim.pid))
        victim.wait(TIMEOUT)

    def _criu(self, action: str, *options: str) -> None:
        log = self.images / f"{action}.log"
        try:
            run(criu, action, "-D", self.images, "-v4", "-o", log.name, *options)
        except AssertionError:
            print(log.read_text(errors="replace")[-3000:])
            raise

    def restore(self) -> None:
        for path in self.results.iterdir():
            path.unlink()
        self._criu("restore", "-d", "--lazy-pages")
        assert self.runs()

    def runs(self) -> bool:
        return Path(f"/proc/{self.pid}").exists()

    def check(self) -> None:
        """It compares all its bytes, and ends."""
        (self.results / "going").write_text("random")
        (self.results / "going").rename(self.results / "go")
        wait_for("the victim's end", lambda: not self.runs())
        reports = [json.loads(line) for line in (self.results / "verdict").read_text().splitlines()]
        assert len(reports) == 1, reports
        assert reports[0]["data"] > 0, reports
        assert reports[0]["bad"] == 0, reports


def install() -> None:
    for unit in (*UNITS.glob("*.service"), *UNITS.glob("*.socket")):
        shutil.copy(unit, INSTALLED)
    os.symlink(lazypages, "/usr/local/bin/lazypages")
    run("systemd-tmpfiles", "--create", UNITS / "lazypages.tmpfiles.conf")
    assert Path("/run/lazypages").stat().st_mode & 0o777 == 0o700
    run("systemctl", "daemon-reload")


def examples() -> None:
    """Those for users other than root."""
    setting = Path("/proc/sys/vm/unprivileged_userfaultfd")
    setting.write_text("0")
    run("/lib/systemd/systemd-sysctl", UNITS / "lazypages.sysctl.conf")
    assert setting.read_text() == "1\n"

    device, group = Path("/dev/userfaultfd"), "daemon"  # of /etc/group, which is not ours to change
    assert device.stat().st_mode & 0o777 == 0o600
    rules = Path("/run/udev/rules.d")
    rules.mkdir(parents=True)
    example = (UNITS / "60-lazypages-userfaultfd.rules").read_text()
    (rules / "60-lazypages-userfaultfd.rules").write_text(
        example.replace('"userfaultfd", MODE', f'"{group}", MODE')
    )
    udevd = subprocess.Popen(["/lib/systemd/systemd-udevd"], stdin=subprocess.DEVNULL)
    wait_for("udev", Path("/run/udev/control").exists)
    run("udevadm", "trigger", "--settle", f"--name-match={device}")
    found = device.stat()
    assert (found.st_mode & 0o777, found.st_gid) == (0o660, grp.getgrnam(group).gr_gid), found
    udevd.terminate()
    udevd.wait(TIMEOUT)


def activate(checkpoint: Checkpoint) -> None:
    """The first client starts the daemon, through which a checkpoint is restored."""
    ask("serve", images=str(checkpoint.images), background=False)
    checkpoint.restore()


def wait_for_status(unit: str, part: str) -> None:
    """systemctl status shows it."""

    def shown() -> bool:
        text = run("systemctl", "status", "--no-pager", "--lines=0", unit, status=None)
        return any("Status:" in line and part in line for line in text.splitlines())

    wait_for(f"the status {part} of {unit}", shown)


def main() -> None:
    install()
    step("installed")
    examples()
    step("userfaultfd for other users: the examples of sysctl.d and udev")
    checkpoint = Checkpoint(Path("/tmp/a check-point of $HOME"))
    step("a checkpoint")
    run("systemctl", "start", "lazypages.socket")
    assert properties(SERVICE, "ActiveState")["ActiveState"] == "inactive"
    activate(checkpoint)
    wait_for_status(SERVICE, "1 restore, 1 task: ")
    before = properties(SERVICE, "ActiveState", "SubState", "MainPID", "NRestarts")
    assert before["ActiveState"] == "active", before
    assert before["NRestarts"] == "0", before
    step("the socket has started the daemon, and the status says what is missing")

    run("systemctl", "kill", "--signal=KILL", "--kill-whom=main", SERVICE)
    wait_for("the guard to kill the task", lambda: not checkpoint.runs())
    pid = str(ask("status")["pid"])  # waits in the socket until another daemon is there
    assert pid != before["MainPID"]
    restarted = {"NRestarts": "1", "ActiveState": "active", "MainPID": pid}
    wait_for("it to be ready", lambda: properties(SERVICE, *restarted) == restarted)
    step("killed: its guard has killed the task, and systemd has started another daemon")

    activate(checkpoint)
    pending = ask("status")["restores"][-1]["pages"]["pending"]
    assert pending > 1000, pending
    run("systemctl", "stop", SERVICE)
    ended = properties(SERVICE, "ActiveState", "Result", "ExecMainStatus")
    assert ended == {"ActiveState": "inactive", "Result": "success", "ExecMainStatus": "0"}, ended
    assert properties("lazypages.socket", "ActiveState", "SubState")["SubState"] == "listening"
    assert Path(SOCKET).is_socket()
    step(f"stopped: the {pending} missing pages have been copied before")
    checkpoint.check()
    step("all bytes are right")

    unit = run("systemd-escape", "--path", "--template=lazypages-serve@.service", checkpoint.images).strip()
    run("systemctl", "start", unit)
    wait_for_status(unit, "waiting for the restore")
    checkpoint.restore()
    checkpoint.check()
    wait_for("its end", lambda: properties(unit, "ActiveState")["ActiveState"] == "inactive")
    served = properties(unit, "Result", "ExecMainStatus")
    assert served == {"Result": "success", "ExecMainStatus": "0"}, served
    step("the template unit has served it")


try:
    main()
except BaseException:
    print(run("journalctl", "--no-pager", "-o", "short-monotonic", "-n", "80", status=None))
    raise
print("passed", flush=True)
