"""Tests whether this process may use userfaultfd."""

from __future__ import annotations

import os

from lazypages.engine._uffd import ffi, lib

NO_USERFAULTFD = "this kernel has no userfaultfd: it must be built with CONFIG_USERFAULTFD"


def try_userfaultfd() -> int:
    """Creates and closes a userfaultfd that reports faults inside the kernel, too, as a restore needs it.

    Returns 0 or an errno. EPERM: the process has no CAP_SYS_PTRACE and vm.unprivileged_userfaultfd is 0
    (userfaultfd(2)), or a seccomp filter forbids the call, as the default of container runtimes does.
    """
    fd = int(lib.syscall(lib.SYS_userfaultfd, ffi.cast("int", os.O_CLOEXEC | os.O_NONBLOCK)))
    if fd < 0:
        return int(ffi.errno)
    os.close(fd)
    return 0
