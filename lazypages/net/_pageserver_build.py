"""Builds ``lazypages.net._pageserver``: answers to GETs, from csrc/pageserver/pageserver.c (cffi, API mode).

cffi releases the GIL around every call. What is declared here is what Python uses; the compiler checks it against
the header.
"""

from pathlib import Path

from cffi import FFI

ffibuilder = FFI()

ffibuilder.cdef("""
struct lp_extent;
struct lp_pages_file { uint64_t size; int32_t fd; uint32_t number, damaged; };
struct lp_task_pages {
    uint64_t pid;
    const struct lp_extent *extents;
    uint64_t nr_extents;
    struct lp_pages_file *const *levels;
    uint32_t nr_levels;
};
struct lp_served { const struct lp_task_pages *tasks; uint64_t nr_tasks; };
struct lp_piece { struct lp_pages_file *file; uint64_t offset, size; };
#define LP_REQUESTS_SIZE ...
#define LP_FEATURE_ZERO ...
struct lp_client {
    int32_t fd;
    uint32_t header_size, features, max_pages;
    uint64_t pages, poll_ns, patience_ns;
    uint32_t start, end;
    uint8_t requests[...];
    ...;
};
enum lp_client_state { LP_CLIENT_EOF, LP_CLIENT_OTHER };
size_t lp_find_pages(const struct lp_served *served, uint64_t pid, uint64_t vaddr, uint64_t nr_pages,
                     struct lp_piece *pieces, size_t max);
int lp_answer_gets(struct lp_client *client, const struct lp_served *served);
int64_t lp_pages_read(int fd, void *buffer, uint64_t offset, uint64_t nr_pages);
""")

CSRC = Path("csrc")  # builds run at the project's root

ffibuilder.set_source(
    "lazypages.net._pageserver",
    '#include "common/pages_file.h"\n#include "pageserver/pageserver.h"\n',
    sources=[str(CSRC / "pageserver/pageserver.c")],
    depends=[
        str(CSRC / name)
        for name in (
            "common/extent.h",
            "common/page_protocol.h",
            "common/pages_file.h",
            "pageserver/pageserver.h",
        )
    ],
    include_dirs=[str(CSRC)],
    extra_compile_args=["-std=gnu11", "-O2", "-Wall", "-Wextra", "-Wno-unused-parameter"],
)
