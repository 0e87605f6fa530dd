"""What the kernel can do for this process, tried and not concluded from its version (for ``lazypages doctor``)."""

from __future__ import annotations

import ctypes
import errno
import fcntl
import mmap
import os
import struct
from collections.abc import Iterator
from contextlib import contextmanager
from enum import IntEnum
from pathlib import Path
from typing import NamedTuple

PAGE = 4096

SYS_USERFAULTFD = 323

#: A userfaultfd of this kind reports no faults inside the kernel. Every user may create one (userfaultfd(2)).
USER_MODE_ONLY = 1

#: linux/userfaultfd.h
UFFD_API = 0xAA
UFFDIO_API = 0xC018AA3F
UFFDIO_REGISTER = 0xC020AA00
UFFDIO_COPY = 0xC028AA03
REGISTER_MODE_MISSING = 1
FEATURE_POISON = 1 << 14
FEATURE_WP_ASYNC = 1 << 15

#: Events of fork, mremap, madvise and munmap, which a restore asks for (docs/criu.md).
RESTORE_FEATURES = 1 << 1 | 1 << 2 | 1 << 3 | 1 << 6

#: linux/fs.h: PAGEMAP_SCAN, and the size of its argument.
PAGEMAP_SCAN = 0xC0606610
SCAN_ARGUMENT = 96

MADV_GUARD_INSTALL = 102

#: Bit of an entry of /proc/PID/pagemap (Documentation/admin-guide/mm/pagemap.rst).
SOFT_DIRTY = 1 << 55


#: linux/capability.h: _LINUX_CAPABILITY_VERSION_3
CAPABILITY_VERSION = 0x20080522

#: A memory cgroup (v1) without a limit has one of nearly 2^63.
UNLIMITED = 1 << 60


class Capability(IntEnum):
    """linux/capability.h"""

    SYS_PTRACE = 19
    SYS_ADMIN = 21
    SYS_NICE = 23
    SYS_RESOURCE = 24
    CHECKPOINT_RESTORE = 40


class Uffd(NamedTuple):
    """``error``: errno, 0 if a restore can have its userfaultfds. ``features``: what the kernel has; None: unknown."""

    error: int
    features: int | None


class Guards(IntEnum):
    NONE = 0  # the kernel has no guard regions
    KEPT = 1  # UFFDIO_COPY leaves them
    OVERWRITTEN = 2  # UFFDIO_COPY replaces them
    UNKNOWN = 3


def userfaultfd() -> Uffd:
    """Tries to create one as a restore does, with its events."""
    try:
        with _userfaultfd(USER_MODE_ONLY) as (_fd, known):
            features: int | None = known
    except OSError:
        features = None
    try:
        with _userfaultfd(0, RESTORE_FEATURES):
            return Uffd(0, features)
    except OSError as error:
        return Uffd(error.errno or errno.EIO, features)


@contextmanager
def _userfaultfd(flags: int, features: int = 0) -> Iterator[tuple[int, int]]:
    """A userfaultfd, and the features that the kernel has. Raises OSError."""
    libc = ctypes.CDLL(None, use_errno=True)
    fd = libc.syscall(SYS_USERFAULTFD, os.O_CLOEXEC | os.O_NONBLOCK | flags)
    if fd < 0:
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
    try:
        answer = fcntl.ioctl(fd, UFFDIO_API, struct.pack("=QQQ", UFFD_API, features, 0))
        yield fd, struct.unpack("=QQQ", answer)[1]
    finally:
        os.close(fd)


def guards() -> Guards:
    """Whether there are guard regions, and what a copy does to one."""
    with mmap.mmap(-1, 2 * PAGE, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS) as memory:
        memory[PAGE:] = b"x" * PAGE
        address = address_of(memory)
        try:
            memory.madvise(MADV_GUARD_INSTALL, 0, PAGE)
        except OSError:
            return Guards.NONE
        try:
            with _userfaultfd(USER_MODE_ONLY) as (fd, _features):
                register = struct.pack("=QQQQ", address, PAGE, REGISTER_MODE_MISSING, 0)
                fcntl.ioctl(fd, UFFDIO_REGISTER, register)
                fcntl.ioctl(fd, UFFDIO_COPY, struct.pack("=QQQQq", address, address + PAGE, PAGE, 0, 0))
                return Guards.OVERWRITTEN
        except OSError as error:
            return Guards.KEPT if error.errno == errno.EEXIST else Guards.UNKNOWN


def address_of(memory: mmap.mmap) -> int:
    return ctypes.addressof(ctypes.c_char.from_buffer(memory))


def pagemap_scan() -> bool:
    """Whether PAGEMAP_SCAN exists (Linux 6.7). Raises OSError if this can't be tried."""
    argument = struct.pack("=12Q", SCAN_ARGUMENT, *([0] * 11))
    with Path("/proc/self/pagemap").open("rb") as file:
        try:
            fcntl.ioctl(file, PAGEMAP_SCAN, argument)
        except OSError as error:
            if error.errno == errno.ENOTTY:
                return False
            raise
    return True


def soft_dirty() -> bool:
    """Whether the kernel marks a page that is written after the marks were cleared, and only that. Raises OSError."""
    with mmap.mmap(-1, PAGE, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS) as memory:
        memory[0] = 1
        try:
            Path("/proc/self/clear_refs").write_text("4")
        except FileNotFoundError:  # CONFIG_PROC_PAGE_MONITOR is not set
            return False
        before = _is_marked(memory)
        memory[0] = 2
        return _is_marked(memory) and not before


def _is_marked(memory: mmap.mmap) -> bool:
    with Path("/proc/self/pagemap").open("rb", buffering=0) as file:
        entry = os.pread(file.fileno(), 8, address_of(memory) // PAGE * 8)
    return bool(struct.unpack("=Q", entry)[0] & SOFT_DIRTY)


def capabilities() -> set[Capability]:
    """Those that this process has, of those that matter (capget(2): /proc may be missing)."""
    header = struct.pack("=Ii", CAPABILITY_VERSION, 0)
    data = ctypes.create_string_buffer(24)
    if ctypes.CDLL(None).capget(ctypes.create_string_buffer(header), data):
        return set()
    low, _permitted, _inheritable, high, *_ = struct.unpack("=6I", data.raw)
    effective = low | high << 32
    return {capability for capability in Capability if effective >> capability & 1}


def in_first_user_namespace() -> bool:
    """Rights in another one do not count for userfaultfd (user_namespaces(7))."""
    mapped = text_of("/proc/self/uid_map")
    return mapped is None or mapped.split() == ["0", "0", "4294967295"]


def status(field: str) -> str | None:
    """A field of /proc/self/status; None if the kernel has none of that name."""
    for line in (text_of("/proc/self/status") or "").splitlines():
        name, _, value = line.partition(":")
        if name == field:
            return value.strip()
    return None


def text_of(path: str) -> str | None:
    """The contents of a file of the kernel without white space around; None if it can't be read."""
    try:
        return Path(path).read_text(errors="replace").strip().strip("\0")
    except OSError:
        return None


def number_of(path: str) -> int | None:
    """The number in a file; None if it can't be read, or is a word such as "max"."""
    text = text_of(path)
    return int(text) if text and text.lstrip("-").isdecimal() else None


def memory_available() -> int | None:
    """Bytes that can be had without swapping, within the memory cgroup; None if unknown."""
    found = [
        int(line.split()[1]) << 10
        for line in (text_of("/proc/meminfo") or "").splitlines()
        if line.startswith("MemAvailable:")
    ]
    for directory, limit, usage, files in _cgroup_files():
        most, used = number_of(f"{directory}/{limit}"), number_of(f"{directory}/{usage}")
        if most is not None and most < UNLIMITED and used is not None:
            found.append(max(most - used + _cached(f"{directory}/memory.stat", files), 0))
    return min(found, default=None)


def _cached(stat: str, name: str) -> int:
    """Bytes of files in memory that the kernel gives up first, in a ``memory.stat``."""
    found = [line.split()[1] for line in (text_of(stat) or "").splitlines() if line.startswith(f"{name} ")]
    return int(found[0]) if found else 0


def _cgroup_files() -> Iterator[tuple[str, str, str, str]]:
    """Directories of our memory cgroup and those above it (cgroups(7)).

    With the names of their limit and usage, and of the count of files in ``memory.stat``.
    """
    for line in (text_of("/proc/self/cgroup") or "").splitlines():
        _number, controllers, path = line.split(":", 2)
        if not controllers:
            root, names = "/sys/fs/cgroup", ("memory.max", "memory.current", "inactive_file")
        elif "memory" in controllers.split(","):
            root = "/sys/fs/cgroup/memory"
            names = ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")
        else:
            continue
        place = Path(root + path)
        for directory in (place, *place.parents):
            if directory.is_relative_to(root):
                yield (str(directory), *names)
