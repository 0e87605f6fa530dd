"""``lazypages doctor``: what works on this machine for this user, and what each missing thing costs."""

from __future__ import annotations

import errno
import json
import os
import platform
import re
import resource
import shutil
import subprocess
from collections.abc import Iterator, Sequence
from enum import StrEnum
from importlib.util import find_spec
from pathlib import Path
from typing import NamedTuple

import click

from lazypages import __version__
from lazypages.cli import probes
from lazypages.cli.probes import Capability, Guards

CRIU_TIME = 30  # seconds that a call of CRIU may take

#: Below this many tasks in one restore a limit of descriptors is worth a line.
MANY_TASKS = 1000

#: The kernel's default (Documentation/admin-guide/sysctl/vm.rst).
USUAL_MAPPINGS = 65530


class State(StrEnum):
    OK = "ok"
    LESS = "less"
    NO = "no"


class Finding(NamedTuple):
    """``costs``: what is lost without it, in one line; "" if nothing. NO: a lazy restore is impossible."""

    name: str
    state: State
    found: str
    costs: str = ""


@click.command()
@click.option("--json", "as_json", is_flag=True, help="Print the findings as one JSON object.")
@click.option(
    "--criu",
    metavar="FILE",
    type=click.Path(path_type=Path),
    envvar="LAZYPAGES_CRIU",
    help="The CRIU to ask.  [default: the first in PATH]",
)
@click.pass_context
def doctor(ctx: click.Context, as_json: bool, criu: Path | None) -> None:
    """Say what works on this machine with the rights of this process, and what each missing thing costs.

    Tries what the kernel can do, and does not go by its version. Changes nothing.

    \b
    ok    it works
    less  it works, but something is lost: the line says what
    no    it makes a lazy restore impossible

    Exit status: 0 if a lazy restore works here, 1 if it is impossible.
    """
    findings = list(examine(criu))
    lacking = [finding.name for finding in findings if finding.state is State.NO]
    if as_json:
        click.echo(json.dumps(document(findings), indent=2))
    else:
        width = max(len(finding.name) for finding in findings)
        for finding in findings:
            costs = f": {finding.costs}" if finding.costs else ""
            click.echo(f"{finding.state:4}  {finding.name:{width}}  {finding.found}{costs}")
        verdict = f"is impossible here: {', '.join(lacking)}" if lacking else "works here"
        click.echo(f"A lazy restore {verdict}.")
    ctx.exit(1 if lacking else 0)


def document(findings: Sequence[Finding]) -> dict[str, object]:
    """What --json prints."""
    return {
        "version": 1,
        "lazypages": __version__,
        "works": all(finding.state is not State.NO for finding in findings),
        "findings": [finding._asdict() for finding in findings],
    }


def examine(criu: Path | None) -> Iterator[Finding]:
    capabilities = probes.capabilities()
    uffd = probes.userfaultfd()
    yield _machine()
    if not Path("/proc/self").exists():
        yield Finding("/proc", State.NO, "not mounted", "tasks are looked at there")
    yield _userfaultfd(uffd.error, capabilities)
    yield _device()
    if uffd.features is not None:
        yield _poison(uffd.features)
    yield from _engine()
    yield _guards(probes.guards())
    yield _tracking(uffd.features)
    yield from _capabilities(capabilities)
    yield _confinement()
    yield _ptrace_scope()
    yield _descriptors()
    yield _mappings()
    yield _memory()
    yield from _modules()
    yield from _criu(criu)


def _machine() -> Finding:
    machine, page = platform.machine(), os.sysconf("SC_PAGE_SIZE")
    found = f"Linux {platform.release()}, {machine}, pages of {page // 1024} KiB"
    if machine == "x86_64" and page == probes.PAGE:
        return Finding("machine", State.OK, found)
    return Finding("machine", State.NO, found, "only x86_64 with pages of 4 KiB is supported")


def _userfaultfd(error: int, capabilities: set[Capability]) -> Finding:
    if not error:
        return Finding("userfaultfd", State.OK, "with the events that a restore needs")
    sysctl = probes.text_of("/proc/sys/vm/unprivileged_userfaultfd")
    if error == errno.ENOSYS:
        why = "the kernel must be built with CONFIG_USERFAULTFD, and no seccomp filter hide it"
    elif error == errno.EPERM and Capability.SYS_PTRACE not in capabilities:
        why = f"needs CAP_SYS_PTRACE (vm.unprivileged_userfaultfd = {sysctl} does not help: the event of fork needs it)"
    elif error == errno.EPERM and not probes.in_first_user_namespace():
        why = "needs CAP_SYS_PTRACE in the first user namespace"
    elif error == errno.EPERM:
        why = "a seccomp filter or security module forbids it, as the default of container runtimes does"
    elif error == errno.EINVAL:
        why = "this kernel lacks the events of fork, mremap, madvise or munmap"
    else:
        why = "a restore needs it for each task"
    return Finding("userfaultfd", State.NO, os.strerror(error), why)


def _device() -> Finding:
    path = Path("/dev/userfaultfd")
    if not path.exists():
        found = "not there"
    elif os.access(path, os.R_OK | os.W_OK):
        found = "usable"
    else:
        found = "no permission"
    return Finding(
        "/dev/userfaultfd", State.OK, f"{found}; not needed, CRIU and lazypages use the system call"
    )


def _poison(features: int) -> Finding:
    if features & probes.FEATURE_POISON:
        return Finding("poison", State.OK, "a lost page is SIGBUS when it is touched")
    return Finding(
        "poison",
        State.LESS,
        "no UFFDIO_POISON (Linux 6.6)",
        "a task is killed as soon as a page of it is lost",
    )


def _engine() -> Iterator[Finding]:
    try:
        from lazypages.engine.tracers import Tracers  # noqa: PLC0415 - the compiled part may be missing
        from lazypages.loop import exit_events  # noqa: PLC0415
    except ImportError as error:
        yield Finding("engine", State.NO, str(error), "install lazypages again, for this Python")
        return
    if not exit_events.needed():
        yield Finding("ends of tasks", State.OK, "how a task ended is known (pidfd)")
    elif events := exit_events.ExitEvents.open():
        with events:
            yield Finding("ends of tasks", State.OK, "how a task ended is known (process connector)")
    else:
        yield Finding(
            "ends of tasks",
            State.LESS,
            "before Linux 6.15 known to root in the first PID and user namespaces only",
            "a task that ends while it misses memory counts as failed",
        )
    with Tracers() as tracers:
        told = tracers.told
    if told:
        yield Finding("tracers", State.OK, "the kernel reports who begins to trace a task")
    else:
        yield Finding(
            "tracers",
            State.LESS,
            "not reported here: only in the first user, PID and network namespaces, on older kernels only to root",
            "a dump or debugger of a task that misses memory is noticed late (docs/criu.md)",
        )


def _guards(guards: Guards) -> Finding:
    match guards:
        case Guards.NONE:
            return Finding(
                "guard regions", State.OK, "the kernel has none (Linux 6.13), and no task can use them"
            )
        case Guards.KEPT:
            return Finding("guard regions", State.OK, "kept by copies")
        case Guards.OVERWRITTEN:
            costs = "each copy looks for them first; one that is made meanwhile may be lost"
            return Finding("guard regions", State.LESS, "replaced by copies", costs)
        case Guards.UNKNOWN:
            return Finding(
                "guard regions", State.OK, "the kernel has them; what copies do to them can't be tried"
            )


def _tracking(features: int | None) -> Finding:
    """How pre-dumps find what was written since the last one."""
    try:
        marks, scan = probes.soft_dirty(), probes.pagemap_scan()
    except OSError as error:
        return Finding("pre-dump", State.OK, f"can't be tried by this process ({error.strerror})")
    if scan and features is None:
        return Finding("pre-dump", State.OK, "can't be tried by this process (no userfaultfd)")
    protection = scan and bool((features or 0) & probes.FEATURE_WP_ASYNC)
    ways = [name for name, works in (("write protection", protection), ("soft-dirty bits", marks)) if works]
    if not ways:
        costs = "each level of dumptool compares all memory, and criu pre-dump fails"
        return Finding("pre-dump", State.LESS, "neither PAGEMAP_SCAN (Linux 6.7) nor soft-dirty bits", costs)
    if not marks:
        costs = "dumptool uses write protection; criu pre-dump fails"
        return Finding("pre-dump", State.LESS, "no soft-dirty bits", costs)
    return Finding("pre-dump", State.OK, " and ".join(ways))


COSTS = {
    Capability.SYS_ADMIN: "only CAP_CHECKPOINT_RESTORE gives restored tasks their pids; CRIU restores less with it",
    Capability.SYS_PTRACE: "the daemon can't look into tasks of other users, nor make their tracers wait",
    Capability.SYS_RESOURCE: "the OOM killer may end the daemon's guard; limits can't be raised",
    Capability.SYS_NICE: "on a busy machine faults are answered later",
}


def _capabilities(capabilities: set[Capability]) -> Iterator[Finding]:
    missing = [capability for capability in COSTS if capability not in capabilities]
    if not probes.in_first_user_namespace():
        costs = "those that the kernel checks in the first one do not count, as for userfaultfd"
        yield Finding("capabilities", State.LESS, "in this user namespace only", costs)
    elif not missing:
        yield Finding("capabilities", State.OK, "all that are used")
    for capability in missing:
        if capability == Capability.SYS_ADMIN and Capability.CHECKPOINT_RESTORE not in capabilities:
            costs = "tasks can't get their pids, by CRIU or by lazypages restore"
            found = "missing, and so is CAP_CHECKPOINT_RESTORE"
            yield Finding(f"CAP_{capability.name}", State.NO, found, costs)
        else:
            yield Finding(f"CAP_{capability.name}", State.LESS, "missing", COSTS[capability])


def _confinement() -> Finding:
    if probes.status("Pid") is None:
        return Finding("confinement", State.OK, "can't be read")
    found = []
    confined = False
    if probes.status("Seccomp") == "2":
        found.append("a seccomp filter")
        confined = True
    if (enforcing := probes.text_of("/sys/fs/selinux/enforce")) is not None:
        found.append(f"SELinux {'enforcing' if enforcing == '1' else 'permissive'}")
        confined = confined or enforcing == "1"
    profile = probes.text_of("/proc/self/attr/apparmor/current") or ""
    if profile and enforcing is None:
        found.append(f"AppArmor {profile}")
        confined = confined or profile.endswith("(enforce)")
    if not confined:
        return Finding("confinement", State.OK, ", ".join(found) or "none")
    costs = "may forbid userfaultfd, ptrace or files to the daemon or the restore"
    return Finding("confinement", State.LESS, ", ".join(found), costs)


def _ptrace_scope() -> Finding:
    scope = probes.number_of("/proc/sys/kernel/yama/ptrace_scope")
    if scope == 3:
        return Finding("ptrace", State.LESS, "kernel.yama.ptrace_scope = 3", "no task can be dumped")
    if scope is not None:
        return Finding("ptrace", State.OK, f"kernel.yama.ptrace_scope = {scope}")
    there = Path("/proc/sys/kernel")
    no_yama = there.is_dir() and not (there / "yama").exists()
    return Finding("ptrace", State.OK, "no Yama" if no_yama else "kernel.yama.ptrace_scope can't be read")


def _descriptors() -> Finding:
    hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    try:
        from lazypages.control import descriptors  # noqa: PLC0415 - imports the engine

        used = len(os.listdir("/proc/self/fd"))
    except (ImportError, OSError):  # a finding of its own
        return Finding("descriptors", State.OK, f"RLIMIT_NOFILE {hard:,}; for how many tasks can't be known")
    most = descriptors.highest_limit()
    tasks = max(most - descriptors.DAEMON - descriptors.needed(0, 0) - used, 0) // descriptors.PER_TASK
    found = f"RLIMIT_NOFILE {most:,}: some {tasks:,} tasks in one restore"
    if tasks >= MANY_TASKS:
        return Finding("descriptors", State.OK, found)
    return Finding("descriptors", State.LESS, found, "more tasks are refused: `ulimit -Hn`, LimitNOFILE=")


def _mappings() -> Finding:
    most = probes.number_of("/proc/sys/vm/max_map_count")
    if most is None:
        return Finding("mappings", State.OK, "vm.max_map_count can't be read")
    if most >= USUAL_MAPPINGS:
        return Finding("mappings", State.OK, f"vm.max_map_count = {most}")
    costs = "a task that had more on another host can't be restored"
    return Finding("mappings", State.LESS, f"vm.max_map_count = {most}", costs)


def _memory() -> Finding:
    available = probes.memory_available()
    if available is None:
        return Finding("memory", State.OK, "unknown: neither MemAvailable nor a limit can be read")
    return Finding("memory", State.OK, f"{available / (1 << 30):.1f} GiB available for restored tasks")


MODULES = {
    "uvloop": (State.LESS, "`serve` needs --loop asyncio"),
    "rich": (State.LESS, "no progress on a terminal, no `show`, no `bench`"),
    "zstandard": (State.LESS, "pages cross the network uncompressed, and no packed checkpoints"),
    "obstore": (State.LESS, "no packed checkpoints in stores"),
    "matplotlib": (State.LESS, "no `plot`"),
    "plotly": (State.LESS, "no `plot` as a page"),
}


def _modules() -> Iterator[Finding]:
    missing = [name for name in MODULES if find_spec(name) is None]
    if not missing:
        yield Finding("Python modules", State.OK, ", ".join(MODULES))
    for name in missing:
        state, costs = MODULES[name]
        yield Finding(f"module {name}", state, "not installed", costs)


def _criu(given: Path | None) -> Iterator[Finding]:
    path = given or shutil.which("criu")
    instead = "only dumps of dumptool, and only with `lazypages restore`"
    if path is None:
        yield Finding("CRIU", State.LESS, "not in PATH", instead)
        return
    status, output = _call(path, "--version")
    version = re.search(r"^Version: (\S+)", output, re.MULTILINE)
    if not version:
        yield Finding("CRIU", State.LESS, f"{path} does not run ({_reason(output) or status})", instead)
        return
    name = f"{version[1]} ({path})"
    lacking = []
    for feature in ("uffd", "uffd-noncoop"):
        status, output = _call(path, "check", "--feature", feature)
        if status:
            lacking.append(f"{feature}: {_reason(output) or f'exit status {status}'}")
    if lacking:
        costs = "criu restore --lazy-pages fails with these rights"
        yield Finding("CRIU", State.LESS, f"{name}: {'; '.join(lacking)}", costs)
    else:
        yield Finding("CRIU", State.OK, f"{name}, with lazy pages")


def _call(*command: str | Path) -> tuple[int, str]:
    try:
        done = subprocess.run(
            command,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
            timeout=CRIU_TIME,
            check=False,
        )
    except (OSError, subprocess.SubprocessError) as error:
        return 127, str(error)
    return done.returncode, done.stdout


def _reason(output: str) -> str:
    """The line that says why: the first error, else the first line."""
    lines = [line.strip().rstrip(": ") for line in output.splitlines() if line.strip()]
    return next((line for line in lines if "Error" in line), lines[0] if lines else "")
