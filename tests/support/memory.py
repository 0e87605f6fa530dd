"""The memory that a chain of levels has of a process, compared with what the process has."""

from __future__ import annotations

import os
from pathlib import Path

from dumptool import proc
from dumptool.chain import PARENT_LINK
from images_spec.flags import PE_PARENT, PE_PRESENT
from images_spec.images import Kind
from images_spec.pagemap import Pagemap

PAGE = 4096
KERNEL_S = ("[vvar]", "[vvar_vclock]", "[vsyscall]")


def bytes_of(images: Path, pid: int) -> dict[int, bytes]:
    """Address -> contents of each page; read as the formats are described, not by the code that is tested."""
    found: dict[int, bytes] = {}
    pagemap = Pagemap.load(images / Kind.PAGEMAP.file_name(pid))
    parents = bytes_of(images / PARENT_LINK, pid) if any(e.flags & PE_PARENT for e in pagemap) else {}
    with (images / f"pages-{pagemap.pages_id}.img").open("rb") as pages:
        for entry in pagemap:
            for address in range(entry.vaddr, entry.vaddr + entry.nr_pages * PAGE, PAGE):
                found[address] = pages.read(PAGE) if entry.flags & PE_PRESENT else parents[address]
    return found


def check_memory(images: Path, image_pid: int, pid: int) -> int:
    """Fails unless the images have, byte for byte, the private memory of a stopped process. Returns how many pages."""
    has = bytes_of(images, image_pid)
    checked = 0
    with open(f"/proc/{pid}/mem", "rb", buffering=0) as memory:
        for vma in proc.layout(pid).vmas:
            if vma.shared or vma.name in KERNEL_S:
                continue
            for address in range(vma.start, vma.end, PAGE):
                expected = has.get(address)
                if expected is None and vma.inode:
                    continue  # as in the file
                try:
                    found = os.pread(memory.fileno(), PAGE, address)
                except OSError:
                    continue  # not readable at all
                assert (expected or bytes(PAGE)) == found, f"{address:#x} of {vma.name or 'anonymous memory'}"
                checked += expected is not None
    assert checked == len(has)
    return checked
