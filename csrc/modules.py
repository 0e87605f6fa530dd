"""The four cffi modules (API mode) that are made of the C code, for setup.py.

A module's declarations are read from its headers, so nothing is written twice, and the compiler checks them against
the headers once more. cffi releases the GIL around every call.
"""

import re
from collections.abc import Sequence
from pathlib import Path

from cffi import FFI

CSRC = Path("csrc")  # setuptools builds in the project's root
#: Hidden: files call each other without the detour over the dynamic linker's table.
FLAGS = ["-std=gnu11", "-O2", "-fvisibility=hidden", "-Wall", "-Wextra", "-Wno-unused-parameter"]

_COMMENT = re.compile(r"/\*.*?\*/|//[^\n]*", re.DOTALL)
_NOT_FOR_CFFI = re.compile(r"^#ifndef LP_CFFI\n.*?^#endif\n", re.DOTALL | re.MULTILINE)
_CONSTANT = re.compile(r"^#define (LP_\w+) (.+)$")
_LITERAL = re.compile(r"(0x[0-9a-fA-F]+|[0-9]+)[uU]?")
_INLINE_BODY = re.compile(r"^static inline (.*?)\n\{\n.*?^\}", re.DOTALL | re.MULTILINE)


def declarations(header: str) -> str:
    """What a header of csrc/ declares, in cffi's dialect of C.

    Macros that are integers stay, as do the prototypes of inline functions. What Python has no use for and cffi can't
    parse (mutexes, for one) stands between ``#ifndef LP_CFFI`` and ``#endif`` in the header.
    """
    text = _COMMENT.sub("", (CSRC / header).read_text())
    text = _INLINE_BODY.sub(r"\1;", _NOT_FOR_CFFI.sub("", text)).replace("\\\n", " ")
    lines = []
    for line in text.splitlines():
        if constant := _CONSTANT.match(line.rstrip()):
            literal = _LITERAL.fullmatch(constant[2].strip())
            lines.append(f"#define {constant[1]} {literal[1] if literal else '...'}")
        elif not line.startswith("#"):
            lines.append(line)
    return "\n".join(lines)


def module(
    name: str, headers: Sequence[str], sources: Sequence[str], *, system: str = "", extra: str = ""
) -> FFI:
    """The builder of the extension module `name`.

    `system`: lines that include headers of the system; `extra`: what is declared beside `headers`, which are in an
    order in which each finds what it needs before it.
    """
    builder = FFI()
    builder.cdef(extra)
    for header in headers:
        builder.cdef(declarations(header))
    builder.set_source(
        name,
        system + "".join(f'#include "{header}"\n' for header in headers),
        sources=[str(CSRC / source) for source in sources],
        depends=sorted(map(str, CSRC.rglob("*.h"))),
        include_dirs=[str(CSRC)],
        extra_compile_args=FLAGS,
    )
    return builder


def _all_of(folder: str) -> list[str]:
    return sorted(str(path.relative_to(CSRC)) for path in (CSRC / folder).glob("*.c"))


pagemap = module(
    "images_spec._pagemap",
    ["images/pagemap.h", "common/extent.h", "images/placement.h"],
    _all_of("images"),
)

engine = module(
    "lazypages.engine._uffd",
    [
        "common/extent.h",
        *(
            f"serve/{name}.h"
            for name in (
                *(
                    "address_space",
                    "doubt",
                    "late",
                    "calls",
                    "old_length",
                    "readahead",
                    "ranges",
                    "fault_plan",
                    "faults",
                ),
                *(
                    "guarded",
                    "guard",
                    "exits",
                    "trace",
                    "pace",
                    "cold",
                    "channel",
                    "tracers",
                    "level",
                    "engine",
                ),
            )
        ),
    ],
    _all_of("serve"),
    system="#include <sys/mman.h>\n#include <sys/syscall.h>\n#include <unistd.h>\n",
    extra="""
typedef int... pid_t;
#define PROT_READ ...
#define MAP_SHARED ...
void *mmap(void *address, size_t size, int prot, int flags, int fd, long offset);
int munmap(void *address, size_t size);
#define SYS_userfaultfd ...
long syscall(long number, ...);
""",
)

pageserver = module(
    "lazypages.net._pageserver",
    ["common/extent.h", "common/pages_file.h", "pageserver/pageserver.h"],
    _all_of("pageserver"),
)

ptrace = module(
    "dumptool._ptrace",
    [
        *("common/extent.h", "common/inject.h", "dump/dump_session.h", "dump/dump_pages.h"),
        *("dump/dump_compare.h", "dump/dump_task.h"),
    ],
    ["common/inject.c", *_all_of("dump")],
    system="#include <sys/user.h>\n",
    extra="""
typedef int... pid_t;
struct user_regs_struct {
    unsigned long long r15, r14, r13, r12, rbp, rbx, r11, r10, r9, r8, rax, rcx, rdx, rsi, rdi, orig_rax, rip,
        cs, eflags, rsp, ss, fs_base, gs_base, ds, es, fs, gs;
    ...;
};
""",
)
