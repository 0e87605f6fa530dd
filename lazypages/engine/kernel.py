"""Whether this kernel lets this process use userfaultfd."""

from __future__ import annotations

import os

from lazypages.engine._uffd import ffi, lib

NO_USERFAULTFD = "this kernel has no userfaultfd: it must be built with CONFIG_USERFAULTFD"


def try_userfaultfd() -> int:
    """Tries to make one that sees faults inside the kernel too, as a restore needs it: 0, or an errno.

    EPERM: neither root (CAP_SYS_PTRACE) nor vm.unprivileged_userfaultfd=1, or a seccomp filter forbids it, as
    container runtimes' default does (userfaultfd(2)).
    """
    fd = int(lib.syscall(lib.SYS_userfaultfd, ffi.cast("int", os.O_CLOEXEC | os.O_NONBLOCK)))
    if fd < 0:
        return int(ffi.errno)
    os.close(fd)
    return 0
