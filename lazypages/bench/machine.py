"""Description of the machine, and the CPU time that other processes used."""

from __future__ import annotations

import os
import platform
import resource
import subprocess
import time
from pathlib import Path
from typing import Any

from lazypages import __version__

#: Share of the CPUs that other processes may use without a warning.
BUSY_SHARE = 0.05


def describe_machine(folder: Path, criu: list[str]) -> dict[str, Any]:
    """Everything that the results depend on. ``folder``: directory of the images; ``criu``: versions."""
    memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return {
        "date": time.strftime("%Y-%m-%d %H:%M:%S %z"),
        "kernel": " ".join((platform.system(), platform.release(), platform.machine())),
        "cpu": _cpu_model(),
        "cpus": len(os.sched_getaffinity(0)),
        "memory_gib": round(memory / (1 << 30), 1),
        "load": list(os.getloadavg()),
        "python": platform.python_version(),
        "lazypages": __version__,
        "commit": _commit(),
        "criu": criu,
        "thp": _chosen(Path("/sys/kernel/mm/transparent_hugepage/enabled")),
        "governor": _read(Path("/sys/devices/system/cpu/cpu0/cpufreq/scaling_governor")),
        "hypervisor": "hypervisor" in _read(Path("/proc/cpuinfo")),
        "images_on": _file_system(folder),
    }


class OthersWatch:
    """CPU time of other processes: that in /proc/stat, less our own and our children's."""

    def __init__(self) -> None:
        self._before = _sample()

    def share(self) -> float:
        """Their share of all CPUs since the last call or the start. Time stolen by a hypervisor is included."""
        now, before = _sample(), self._before
        self._before = now
        elapsed, busy, ours = (b - a for a, b in zip(before, now, strict=True))
        return max(0.0, busy - ours) / (elapsed * (os.cpu_count() or 1)) if elapsed else 0.0


def _sample() -> tuple[float, float, float]:
    with Path("/proc/stat").open() as stat:
        fields = [int(word) for word in stat.readline().split()[1:]]
    user, nice, system, _idle, _iowait, irq, softirq, steal = fields[:8]
    busy = (user + nice + system + irq + softirq + steal) / os.sysconf("SC_CLK_TCK")
    ours = 0.0
    for whose in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN):
        usage = resource.getrusage(whose)
        ours += usage.ru_utime + usage.ru_stime
    return time.monotonic(), busy, ours


def idle_share(seconds: float = 0.5) -> float:
    """The share of the CPUs that other processes use during some seconds."""
    watch = OthersWatch()
    time.sleep(seconds)
    return watch.share()


def _cpu_model() -> str:
    for line in _read(Path("/proc/cpuinfo")).splitlines():
        name, _, value = line.partition(":")
        if name.strip() in {"model name", "CPU part"}:
            return value.strip()
    return platform.processor()


def _read(path: Path) -> str:
    try:
        return path.read_text().strip()
    except OSError:
        return "unknown"


def _chosen(path: Path) -> str:
    text = _read(path)
    return text[text.find("[") + 1 : text.find("]")] if "[" in text else text


def _commit() -> str:
    here = Path(__file__).parent
    try:
        found = subprocess.run(
            ["git", "-C", str(here), "describe", "--always", "--dirty", "--exclude", "*"],
            capture_output=True,
            text=True,
            timeout=10,
            check=True,
        )
    except (OSError, subprocess.SubprocessError):
        return "unknown"
    return found.stdout.strip()


def _file_system(folder: Path) -> str:
    best, kind = "", "unknown"
    with Path("/proc/self/mounts").open() as mounts:
        for line in mounts:
            _device, where, type_, *_rest = line.split()
            if folder.is_relative_to(where) and len(where) >= len(best):
                best, kind = where, type_
    return kind
