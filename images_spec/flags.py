"""Bits of images, and the rule for which mappings can be lazy.

Numbers: docs/criu.md, "Pagemap" and "Image files" (observed with CRIU 4.1.1 and 4.2.1); ``MAP_*``: mmap(2),
x86_64 and aarch64.
"""

from typing import Final

PAGE_SIZE: Final = 4096

# PagemapEntry.flags
PE_PARENT: Final = 1
"""The data is in the next level of the chain."""
PE_LAZY: Final = 2
"""``criu restore --lazy-pages`` may leave the page to the daemon."""
PE_PRESENT: Final = 4
"""The data is in this level's pages file."""

# VmaEntry.status
VMA_REGULAR: Final = 0x1
VMA_STACK: Final = 0x2
VMA_VSYSCALL: Final = 0x4
VMA_VDSO: Final = 0x8
VMA_HEAP: Final = 0x20
VMA_FILE_PRIVATE: Final = 0x40
VMA_FILE_SHARED: Final = 0x80
VMA_ANON_SHARED: Final = 0x100
VMA_ANON_PRIVATE: Final = 0x200
VMA_SYSVIPC: Final = 0x400
VMA_SOCKET: Final = 0x800
VMA_VVAR: Final = 0x1000
VMA_AIORING: Final = 0x2000
VMA_MEMFD: Final = 0x4000
VMA_SHSTK: Final = 0x8000
VMA_GUARD: Final = 0x10000
VMA_UPROBES: Final = 0x20000
VMA_EXT_PLUGIN: Final = 1 << 27
"""A file that a CRIU plugin handles."""
VMA_KNOWN: Final = 0x3FFFF & ~0x10 | VMA_EXT_PLUGIN
"""All of these. Higher bits are never in an image (docs/criu.md, "Image files")."""

# VmaEntry.flags
MAP_SHARED: Final = 0x1
MAP_PRIVATE: Final = 0x2
MAP_ANONYMOUS: Final = 0x20
MAP_GROWSDOWN: Final = 0x100
MAP_LOCKED: Final = 0x2000
MAP_HUGETLB: Final = 0x40000

# VmaEntry.madv: bit n is MADV_n of madvise(2)
MADV_WIPEONFORK: Final = 18


def is_guard(status: int) -> bool:
    """Whether a ``VmaEntry`` is not a mapping, but a guard region in other mappings (images_spec/mm.md)."""
    return bool(status & VMA_GUARD)


def lazy_capable(vma_flags: int, status: int) -> bool:
    """Whether the restorer registers a mapping with userfaultfd.

    ``vma_flags``, ``status``: of its ``VmaEntry``. CRIU's dump and restore both compute this; it
    is not stored (docs/criu.md, "Userfaultfds and lazy mappings").
    """
    wanted = MAP_ANONYMOUS | MAP_PRIVATE
    return (
        vma_flags & wanted == wanted
        and not vma_flags & (MAP_LOCKED | MAP_HUGETLB)
        and not status & (VMA_VDSO | VMA_VVAR | VMA_VSYSCALL)
    )
