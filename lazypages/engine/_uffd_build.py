"""Builds ``lazypages.engine._uffd``: the address space, the readahead plan and the engine of csrc/ (cffi, API mode).

cffi releases the GIL around every call. What is declared here is what Python uses; the compiler checks it against
the headers.
"""

from pathlib import Path

from cffi import FFI

ffibuilder = FFI()

ffibuilder.cdef("""
struct lp_extent { uint64_t start, nr_pages, offset; uint32_t source, lazy; };
struct lp_range { uint64_t start, end; };
struct lp_region { uint64_t start, end, image; };
struct lp_answer { uint32_t kind, source; uint64_t addr, image, offset, nr_pages, dense; };
struct lp_counts { uint64_t *by_source; uint32_t nr_levels; };
enum lp_change_kind { LP_FORKED, LP_REMOVED, LP_UNMAPPED, LP_REMAPPED, LP_QUESTION };
struct lp_change { uint32_t kind; int32_t uffd; uint64_t start, len, to; void *seen; };
struct lp_space;
#define LP_SOURCE_REMOTE ...
#define LP_SOURCE_LOST ...

struct lp_space *lp_space_new(const struct lp_extent *extents, size_t nr_extents, const struct lp_range *vmas,
                              size_t nr_vmas, const struct lp_range *wiped, size_t nr_wiped);
int lp_space_wipe(struct lp_space *space, const struct lp_range *wiped, size_t nr_wiped, const struct lp_range *kept,
                  size_t nr_kept);
struct lp_space *lp_space_clone(struct lp_space *space, struct lp_counts *dropped);
void lp_space_free(struct lp_space *space);
uint64_t lp_space_pending(const struct lp_space *space);
uint64_t lp_space_lost(const struct lp_space *space);
size_t lp_space_nr_regions(const struct lp_space *space);
const struct lp_region *lp_space_regions(const struct lp_space *space);
struct lp_answer lp_space_lookup(const struct lp_space *space, uint64_t addr, uint64_t max_pages);
uint64_t lp_space_lookback(const struct lp_space *space, const struct lp_answer *at, uint64_t max_pages);
bool lp_space_next(const struct lp_space *space, uint64_t cursor, uint64_t max_pages, bool remote,
                   struct lp_answer *answer);
bool lp_space_locate(const struct lp_space *space, uint64_t image, uint64_t *addr);
void lp_space_index(struct lp_space *space);
uint64_t lp_space_claim(struct lp_space *space, uint64_t dense, uint64_t nr);
uint64_t lp_space_commit(struct lp_space *space, uint64_t dense, uint64_t nr);
void lp_space_release(struct lp_space *space, uint64_t dense, uint64_t nr);
void lp_space_lose(struct lp_space *space, uint64_t dense, uint64_t nr);
uint64_t lp_space_regain(struct lp_space *space);
void lp_space_forget(struct lp_space *space, uint64_t image, uint64_t nr_pages, struct lp_counts *dropped);
size_t lp_space_next_change(const struct lp_space *space, const struct lp_change *changes, size_t nr, bool at_rest);
void lp_space_rest(struct lp_space *space);
void lp_space_remove(struct lp_space *space, uint64_t start, uint64_t end, struct lp_counts *dropped);
int lp_space_unmap(struct lp_space *space, uint64_t start, uint64_t end, struct lp_counts *dropped);
int lp_space_remap(struct lp_space *space, uint64_t from, uint64_t to, uint64_t len, struct lp_counts *dropped);
bool lp_space_matters(const struct lp_space *space, uint64_t start, uint64_t end);
int lp_space_question(struct lp_space *space, uint64_t start, uint64_t end);
size_t lp_space_nr_doubts(const struct lp_space *space);
void lp_true_lengths(struct lp_change *changes, size_t nr);
void lp_space_count(const struct lp_space *space, struct lp_counts *counts);

struct lp_doubt { uint64_t start, end, image, edge, top; bool unsure, asked, refilled; };
#define LP_NO_EDGE ...
struct lp_evidence { bool here, present, attached, below, alike, grows; };
enum lp_verdict { LP_IS_GONE, LP_STAYS, LP_UNKNOWN };
enum lp_verdict lp_verdict(const struct lp_doubt *doubt, const struct lp_evidence *evidence);
struct lp_ask {
    void *arg;
    int (*within)(void *arg, uint64_t start, uint64_t end);
    int (*zero)(void *arg, uint64_t addr);
    bool (*alike)(void *arg, uint64_t edge, uint64_t start, uint64_t end);
    bool (*grows)(void *arg, uint64_t addr);
    void (*stays)(void *arg, uint64_t start, uint64_t end, bool known);
};
int lp_settle(struct lp_space *space, const struct lp_ask *ask, struct lp_counts *dropped);
int lp_replay(struct lp_space *child, const struct lp_change *changes, size_t nr, uint64_t told,
              bool again, const struct lp_ask *ask, const struct lp_ask *ask_parent, struct lp_counts *dropped,
              bool *tangled);
bool lp_tells_old_length(void);

struct lp_window { uint64_t first, nr; };
struct lp_readahead { uint64_t max_window; ...; };
void lp_readahead_init(struct lp_readahead *plan, uint64_t max_window);
struct lp_window lp_readahead_fault(struct lp_readahead *plan, uint64_t page);

struct lp_fault { uint64_t addr, since; uint32_t times; };
struct lp_faults { size_t nr; ...; };
void lp_faults_free(struct lp_faults *faults);
bool lp_faults_reserve(struct lp_faults *faults, size_t nr);
bool lp_faults_push(struct lp_faults *faults, struct lp_fault fault);
void lp_faults_sort(struct lp_faults *faults, uint64_t from);
struct lp_fault *lp_faults_at(const struct lp_faults *faults, size_t n);
struct lp_fault lp_faults_pop(struct lp_faults *faults);

struct lp_trace;
struct lp_trace_record {
    uint64_t time, addr, pages, detail;
    uint32_t task, memory;
    uint16_t kind, source;
    uint32_t unused;
};
struct lp_trace *lp_trace_new(size_t records);
void lp_trace_free(struct lp_trace *trace);
bool lp_trace_put(struct lp_trace *trace, const struct lp_trace_record *record);
int64_t lp_trace_drain(struct lp_trace *trace, int fd);
int lp_trace_run(struct lp_trace *trace, int fd);
void lp_trace_stop(struct lp_trace *trace);
uint64_t lp_trace_written(const struct lp_trace *trace);
uint64_t lp_trace_dropped(const struct lp_trace *trace);

struct lp_tracers;
struct lp_attach { int32_t pid, tracer, owner, error; };
struct lp_tracers *lp_tracers_new(void);
void lp_tracers_free(struct lp_tracers *tracers);
bool lp_tracers_told(const struct lp_tracers *tracers);
void lp_tracers_watch(struct lp_tracers *tracers, int32_t pid, bool watched);
void lp_tracers_report(struct lp_tracers *tracers, int32_t pid, int32_t tracer, int32_t owner);
void lp_tracers_release(struct lp_tracers *tracers, int32_t tracer);
int lp_tracers_event_fd(const struct lp_tracers *tracers);
size_t lp_tracers_take(struct lp_tracers *tracers, struct lp_attach *attaches, size_t max);
int lp_tracers_run(struct lp_tracers *tracers);
void lp_tracers_stop(struct lp_tracers *tracers);

struct lp_engine;
struct lp_task;
struct lp_notice {
    uint32_t kind;
    int32_t error;
    struct lp_task *task;
    uint64_t image, addr, nr_pages, since;
};
struct lp_level { const void *base; uint64_t size; int fd; };
#define LP_HISTOGRAM_BUCKETS ...
struct lp_stats {
    uint64_t faults, faults_zero, faults_served, retried, zero_pages, present, copies, reads, wakes, poisoned;
    uint64_t forks, remaps, removes, unmaps, service_max;
};
int lp_guarded_scan(int fd, uint64_t category, uint64_t start, uint64_t end, struct lp_range *found);

struct lp_guard;
struct lp_guard *lp_guard_start(int log_fd);
void lp_guard_end(struct lp_guard *guard);
int lp_guard_restart(struct lp_guard *guard);
int lp_guard_pid(const struct lp_guard *guard);
int lp_guard_pidfd(const struct lp_guard *guard);

int lp_exit_status(int pidfd);
bool lp_exit_status_works(void);
#define LP_GUARD_FDS ...

struct lp_engine *lp_engine_new(struct lp_guard *guard);
void lp_engine_free(struct lp_engine *engine);
int lp_engine_notice_fd(const struct lp_engine *engine);
size_t lp_engine_notices(struct lp_engine *engine, struct lp_notice *notices, size_t max);
bool lp_engine_has_tasks(struct lp_engine *engine);
int lp_engine_run(struct lp_engine *engine);
void lp_engine_stop(struct lp_engine *engine);
void lp_engine_trace(struct lp_engine *engine, struct lp_trace *trace);
struct lp_memory *lp_memory_new(const struct lp_extent *extents, size_t nr_extents, const struct lp_range *vmas,
                                size_t nr_vmas, const struct lp_range *wiped, size_t nr_wiped,
                                const struct lp_level *levels, uint32_t nr_levels);
void lp_memory_free(struct lp_memory *memory);
struct lp_task *lp_task_new(struct lp_engine *engine, int uffd, struct lp_memory *memory, uint64_t max_readahead,
                            int pid, int pidfd, uint64_t tag);
bool lp_task_close(struct lp_task *task);
int64_t lp_task_transfer(struct lp_task *task, uint64_t max_bytes);
int lp_task_bring(struct lp_task *task, uint64_t start, uint64_t end);
uint64_t lp_task_claim_remote(struct lp_task *task, uint64_t cursor, uint64_t max_pages, uint64_t *image,
                              uint64_t *next_cursor);
int64_t lp_task_deliver(struct lp_task *task, uint64_t image, uint64_t nr_pages, const void *buffer);
void lp_task_fail_remote(struct lp_task *task, uint64_t image, uint64_t nr_pages, bool lost);
void lp_task_regain(struct lp_task *task);
int64_t lp_task_poison(struct lp_task *task, bool all);
void lp_task_forget(struct lp_task *task, uint64_t image, uint64_t nr_pages);
int lp_task_probe(struct lp_task *task);
uint64_t lp_task_tag(const struct lp_task *task);
uint32_t lp_task_nr_levels(const struct lp_task *task);
uint64_t lp_task_total(const struct lp_task *task);
uint64_t lp_task_pending(const struct lp_task *task);
uint64_t lp_task_lost(const struct lp_task *task);
void lp_task_stats(const struct lp_task *task, struct lp_stats *stats);
void lp_task_sources(const struct lp_task *task, uint64_t *copied, uint64_t *dropped, uint64_t *faults);
void lp_task_remaining(struct lp_task *task, uint64_t *by_source);
void lp_task_histogram(const struct lp_task *task, uint64_t *buckets);
uint64_t lp_histogram_bound(uint32_t bucket);
const struct lp_space *lp_task_space(const struct lp_task *task);

#define PROT_READ ...
#define MAP_SHARED ...
void *mmap(void *address, size_t size, int prot, int flags, int fd, long offset);
int munmap(void *address, size_t size);

#define SYS_userfaultfd ...
long syscall(long number, ...);

struct lp_pace { uint64_t limit, delivered, smoothed; ...; };
#define LP_PACE_MIN ...
#define LP_PACE_MAX ...
#define LP_PACE_SHORTEST ...
void lp_pace_init(struct lp_pace *pace);
void lp_pace_answered(struct lp_pace *pace, uint64_t sent, uint64_t delivered, uint64_t now, uint64_t bytes);

struct lp_channel;
struct lp_channels;
struct lp_channel_options { uint32_t header_size, max_pages; uint64_t floor; bool zeros, background, compress; };
struct lp_request { uint64_t tag, image, nr_pages, since, sent, delivered; bool urgent, told; };
enum lp_channel_event_kind {
    LP_CHANNEL_ARRIVED, LP_CHANNEL_REFUSED, LP_CHANNEL_HEARD, LP_CHANNEL_QUIET, LP_CHANNEL_TURN_OVER, LP_CHANNEL_CLOSED,
    LP_CHANNEL_ENDED, ...
};
struct lp_channel_event {
    uint32_t kind;
    int32_t status;
    bool at_boundary, told;
    uint64_t tag, image, nr_pages, since;
};
struct lp_channel_state {
    uint64_t outstanding, urgent, background, limit, heard, oldest, requests, pages, bytes, round_trip;
};
struct lp_channels *lp_engine_channels(struct lp_engine *engine);
struct lp_channel *lp_channel_new(struct lp_channels *channels, int fd, const struct lp_channel_options *options);
void lp_channel_close(struct lp_channel *channel);
int lp_channel_event_fd(const struct lp_channel *channel);
size_t lp_channel_events(struct lp_channel *channel, struct lp_channel_event *events, size_t max);
void lp_channel_ask(struct lp_channel *channel, uint64_t tag, uint64_t image, uint64_t nr_pages, bool urgent);
void lp_channel_hold(struct lp_channel *channel, bool held);
void lp_channel_turn(struct lp_channel *channel, struct lp_task *task, uint64_t max_bytes);
void lp_channel_finish(struct lp_channel *channel, bool force, uint32_t flags);
size_t lp_channel_outstanding(struct lp_channel *channel, struct lp_request *requests, size_t max);
void lp_channel_state(struct lp_channel *channel, struct lp_channel_state *state);
""")

CSRC = Path("csrc")  # builds run at the project's root

ffibuilder.set_source(
    "lazypages.engine._uffd",
    "#include <sys/mman.h>\n#include <sys/syscall.h>\n#include <unistd.h>\n"
    '#include "serve/doubt.h"\n#include "serve/engine.h"\n#include "serve/exits.h"\n#include "serve/faults.h"\n'
    '#include "serve/guarded.h"\n#include "serve/channel.h"\n#include "serve/old_length.h"\n#include "serve/pace.h"\n'
    '#include "serve/readahead.h"\n'
    '#include "serve/address_space.h"\n#include "serve/trace.h"\n#include "serve/tracers.h"\n',
    sources=[str(path) for path in sorted((CSRC / "serve").glob("*.c"))],
    depends=[str(path) for folder in ("serve", "common") for path in sorted((CSRC / folder).glob("*.h"))],
    include_dirs=[str(CSRC)],
    extra_compile_args=["-std=gnu11", "-O2", "-Wall", "-Wextra", "-Wno-unused-parameter"],
)
