"""cffi builder of ``images_spec._pagemap``: pagemap images as arrays, and the placement rule."""

from pathlib import Path

from cffi import FFI

CSRC = Path(__file__).parent.parent / "csrc"


def _declarations(header: str) -> str:
    """A header without its preprocessor lines: those here hold only guards, includes and constants."""
    lines = (CSRC / header).read_text().splitlines()
    return "\n".join(line for line in lines if not line.startswith("#"))


ffibuilder = FFI()
ffibuilder.cdef("#define LP_SOURCE_REMOTE ...\n#define LP_SOURCE_LOST ...\n")
for name in ("images/pagemap.h", "common/extent.h", "images/placement.h"):
    ffibuilder.cdef(_declarations(name))
ffibuilder.set_source(
    "images_spec._pagemap",
    '#include "images/placement.h"\n',
    sources=["csrc/images/pagemap.c", "csrc/images/placement.c"],
    include_dirs=["csrc"],
    depends=["csrc/images/pagemap.h", "csrc/images/placement.h", "csrc/common/extent.h"],
    extra_compile_args=["-std=gnu11", "-O2", "-Wall", "-Wextra"],
)

if __name__ == "__main__":
    ffibuilder.compile(verbose=True)
