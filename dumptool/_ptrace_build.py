"""cffi builder of ``dumptool._ptrace``: stopping tasks, system calls inside them, and their pages."""

import re
from pathlib import Path

from cffi import FFI

CSRC = Path(__file__).parent.parent / "csrc"
HEADERS = (
    "common/extent.h",
    "common/inject.h",
    "dump/dump_session.h",
    "dump/dump_pages.h",
    "dump/dump_task.h",
)
SOURCES = ("common/inject.c", "dump/dump_session.c", "dump/dump_pages.c", "dump/dump_task.c")

FROM_SYSTEM_HEADERS = """
typedef int... pid_t;
struct user_regs_struct {
    unsigned long long r15, r14, r13, r12, rbp, rbx, r11, r10, r9, r8, rax, rcx, rdx, rsi, rdi, orig_rax, rip,
        cs, eflags, rsp, ss, fs_base, gs_base, ds, es, fs, gs;
    ...;
};
"""


def _declarations(header: str) -> str:
    """A header for cffi: numeric constants, no other preprocessor lines."""
    text = (CSRC / header).read_text()
    constants = re.findall(r"^#define (LP_\w+\s+(?:0x)?[0-9a-f]+)\b", text, re.MULTILINE)
    body = "\n".join(line for line in text.splitlines() if not line.startswith("#"))
    return "".join(f"#define {constant}\n" for constant in constants) + body


ffibuilder = FFI()
ffibuilder.cdef(FROM_SYSTEM_HEADERS)
for header in HEADERS:
    ffibuilder.cdef(_declarations(header))
ffibuilder.set_source(
    "dumptool._ptrace",
    "#include <sys/user.h>\n" + "".join(f'#include "{header}"\n' for header in HEADERS),
    sources=[f"csrc/{source}" for source in SOURCES],
    include_dirs=["csrc"],
    depends=[
        f"csrc/{header}"
        for header in (*HEADERS, "common/pages_file.h", "common/probe.h", "common/write_all.h")
    ],
    extra_compile_args=["-std=gnu11", "-O2", "-Wall", "-Wextra"],
)

if __name__ == "__main__":
    ffibuilder.compile(verbose=True)
