"""Whether this kernel lets this process use userfaultfd."""

from __future__ import annotations

import ctypes
import os
import platform

#: Number of the system call userfaultfd(2) (asm/unistd_64.h; asm-generic/unistd.h).
SYS_USERFAULTFD = {"x86_64": 323, "aarch64": 282}

NO_USERFAULTFD = "this kernel has no userfaultfd: it must be built with CONFIG_USERFAULTFD"


def try_userfaultfd() -> int:
    """Tries to make one that sees faults inside the kernel too, as a restore needs it: 0, or an errno.

    EPERM: neither root (CAP_SYS_PTRACE) nor vm.unprivileged_userfaultfd=1, or a seccomp filter forbids it, as
    container runtimes' default does (userfaultfd(2)).
    """
    libc = ctypes.CDLL(None, use_errno=True)
    fd = libc.syscall(SYS_USERFAULTFD[platform.machine()], os.O_CLOEXEC | os.O_NONBLOCK)
    if fd < 0:
        return ctypes.get_errno()
    os.close(fd)
    return 0
