"""Numbers of the kernel that Python writes into plans and injects into tasks are those of its headers."""

from __future__ import annotations

import subprocess
from pathlib import Path

from dumptool import core, registers, survey, tracking
from images_spec import interrupted
from lazypages.cli import probes, served
from lazypages.restore import syscalls

HEADERS = (
    *("sys/syscall.h", "sys/ioctl.h", "linux/prctl.h", "linux/capability.h", "linux/sched.h", "linux/mman.h"),
    *("linux/memfd.h", "linux/userfaultfd.h", "linux/ptrace.h"),
)


def python_numbers() -> dict[str, int]:
    """By the names that the headers have for them."""
    numbers = {f"__NR_{number.name.lower()}": int(number) for number in syscalls.Nr}
    numbers |= {f"PR_{number.name}": int(number) for number in syscalls.Prctl}
    for module in (core, tracking, registers, interrupted):
        for name, number in vars(module).items():
            if name.startswith("NR_"):
                numbers[f"__NR_{name.removeprefix('NR_').lower()}"] = number
    assert int(survey.NR_RESTART_SYSCALL) == registers.NR_RESTART_SYSCALL
    for name in ("UFFD_API", "UFFDIO_API", "UFFDIO_REGISTER", "UFFDIO_REGISTER_MODE_WP"):
        numbers[name] = getattr(tracking, name)
    numbers["__NR_userfaultfd"] = probes.SYS_USERFAULTFD
    assert probes.UFFD_API == tracking.UFFD_API
    assert probes.UFFDIO_API == tracking.UFFDIO_API
    assert probes.UFFDIO_REGISTER == tracking.UFFDIO_REGISTER
    numbers["UFFDIO_COPY"] = probes.UFFDIO_COPY
    numbers["UFFDIO_REGISTER_MODE_MISSING"] = probes.REGISTER_MODE_MISSING
    numbers["_LINUX_CAPABILITY_VERSION_3"] = probes.CAPABILITY_VERSION
    numbers |= {f"CAP_{capability.name}": int(capability) for capability in probes.Capability}
    numbers |= {name: number for name, number in vars(served).items() if name.startswith("PTRACE_")}
    for name, number in vars(syscalls).items():
        if name.startswith(("CLONE_", "TIOC")):
            numbers[name] = number
    return numbers


#: Later than the headers of Debian 12.
NEWER = {"PR_TIMER_CREATE_RESTORE_IDS"}


def test_numbers(tmp_path: Path) -> None:
    numbers = {name: number for name, number in python_numbers().items() if name not in NEWER}
    assert len(numbers) > 50
    source = tmp_path / "numbers.c"
    source.write_text(
        "#include <stdio.h>\n"
        + "".join(f"#include <{header}>\n" for header in HEADERS)
        + "int main(void)\n{\n"
        + "".join(f'\tprintf("{name} %lld\\n", (long long)({name}));\n' for name in numbers)
        + "}\n"
    )
    subprocess.run(["gcc", source, "-o", tmp_path / "numbers"], check=True)
    output = subprocess.run([tmp_path / "numbers"], check=True, capture_output=True, text=True).stdout
    assert dict(line.split() for line in output.splitlines()) == {
        name: str(number) for name, number in numbers.items()
    }
