/*
 * Serving faults: what runs once per fault and once per chunk.  docs/architecture.md draws the files that do it.
 *
 * An engine watches the uffds of many tasks.  One thread drives it (lp_engine_run).  Other threads may at the same time transfer
 * pages of any task in the background (lp_task_transfer), deliver pages that came from elsewhere (lp_task_deliver), and so on.  The
 * engine decides what must be decided for each fault; all else it reports to its owner as an event.
 *
 * Why a lock around reading the uffd: a layout event (REMOVE, UNMAP, REMAP, FORK) blocks its thread until the event is read.  From
 * then on the task goes on and may, for example, find the range that it gave away zeroed.  A copy that began before and lands after
 * would put old bytes there.  So events are read with the task's lock held alone, and copies are made with it shared.
 *
 * The kernel delivers faults before events that were queued earlier (fs/userfaultfd.c, userfaultfd_ctx_read), so all that can be
 * read is read, and the events are applied, before any fault is answered.  The events of several threads are reported out of
 * order (lp_space_next_change), an mremap has up to four, and UNMAP is reported before it is known whether it succeeds
 * (csrc/serve/doubt.h).  So no fault is answered until all that has begun has been reported; the kernel would refuse it with EAGAIN
 * anyway.
 *
 * No fault is lost: the serving thread defers those on pages that the background has claimed, and answers them when the claim is
 * released.  Any other thread that claims a page and does not bring it wakes its range: a thread that waits there faults again, and
 * that fault is read anew.
 */
#ifndef LAZYPAGES_ENGINE_H
#define LAZYPAGES_ENGINE_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>
#include <sys/types.h>

#include "address_space.h"
#include "guard.h"
#include "level.h"

struct lp_channels;
struct lp_engine;
struct lp_memory;
struct lp_task;
struct lp_trace;

enum lp_event_kind {
	LP_EVENT_FORKED = 1, /* task is new, the child of one with the same tag, and served already */
	LP_EVENT_NEED,	     /* pages [dump_addr, +nr_pages) must come from a remote source; a thread waits for one */
	LP_EVENT_ESCALATE,   /* a thread waits for a page that is on its way */
	/*
	 * Pages [dump_addr, +nr_pages), now at addr, can't be brought: error says why.  ESTALE: they may have come as zeros;
	 * EADDRNOTAVAIL: it is not known whether they have been unmapped.
	 */
	LP_EVENT_LOST,
	LP_EVENT_COMPLETE, /* nothing is pending any more */
	LP_EVENT_GONE,	   /* the task's memory does not exist any more */
	LP_EVENT_FAILED,   /* an operation on the uffd failed in a way that should not be: error */
	LP_EVENT_BROKEN,   /* what the task misses is not known any more: error says why.  It and its descendants must be killed */
	LP_EVENT_UNSEEN,   /* guards that the task installs can't be seen, and may be copied over: error says why */
};

struct lp_event {
	uint32_t kind;
	int32_t error; /* errno, 0 if there is none */
	struct lp_task *task;
	uint64_t dump_addr, addr, nr_pages;
	uint64_t since; /* CLOCK_MONOTONIC ns when the fault was read, 0 if no thread waits */
};

#define LP_HISTOGRAM_BUCKETS 280 /* 8 a power of two, from 1 ns */

struct lp_stats {
	uint64_t faults;	/* page fault messages read */
	uint64_t faults_zero;	/* answered with a zero page */
	uint64_t faults_served; /* answered with data, by us at once or when it came */
	uint64_t retried;	/* faults that could not be answered at once because a layout event was under way, once each */
	uint64_t zero_pages;	/* UFFDIO_ZEROPAGE that placed one */
	uint64_t present;	/* pages that were there already (EEXIST) */
	uint64_t copies;	/* UFFDIO_COPY calls */
	uint64_t reads;		/* read(2) of the uffd */
	uint64_t wakes;		/* UFFDIO_WAKE calls */
	uint64_t poisoned;	/* pages */
	uint64_t forks, remaps, removes, unmaps;
	uint64_t service_max;	/* ns */
};

/* guard: is informed of the uffds; may be NULL.  NULL with errno set. */
struct lp_engine *lp_engine_new(struct lp_guard *guard);
/* Closes the tasks that there still are, as lp_task_end_service and lp_task_close do. */
void lp_engine_free(struct lp_engine *engine);
/* Readable when there are events. */
int lp_engine_event_fd(const struct lp_engine *engine);
size_t lp_engine_events(struct lp_engine *engine, struct lp_event *events, size_t max);
/* Whether any task is not closed, those that have not been reported yet among them. */
bool lp_engine_has_tasks(struct lp_engine *engine);
/* Serves until lp_engine_stop. 0 or -errno. */
int lp_engine_run(struct lp_engine *engine);
void lp_engine_stop(struct lp_engine *engine);
/* How many rounds lp_engine_run has made.  Wakes it: if it is not stuck, it makes another one now. */
uint64_t lp_engine_rounds(struct lp_engine *engine);
/* Its channels to page servers (csrc/serve/channels.h). */
struct lp_channels *lp_engine_channels(struct lp_engine *engine);
/* To be called before it has tasks: what happens to them is recorded there.  The trace must outlive the engine. */
void lp_engine_trace(struct lp_engine *engine, struct lp_trace *trace);

/*
 * What a task's memory is made of.  It is made before the task comes, since with a million extents that takes time.  NULL
 * with errno: EINVAL when an extent reaches past its level, or as for lp_space_new.
 */
struct lp_memory *lp_memory_new(const struct lp_extent *extents, size_t nr_extents, const struct lp_range *vmas,
				size_t nr_vmas, const struct lp_range *wiped, size_t nr_wiped,
				const struct lp_level *levels, uint32_t nr_levels);
void lp_memory_free(struct lp_memory *memory);
/*
 * A task, served from now on if lp_engine_run runs.  Owns uffd and memory from here, also when it fails (NULL, errno): then the
 * uffd stays open to the end if pages are pending, because closing it makes the kernel serve zeros.  The levels must stay until
 * the engine is freed.  pid, pidfd: the process here, 0 and -1 if it is not known; pidfd stays the caller's, and open
 * as long as the task is.  tag: the owner's, for this task and all that it forks.
 */
struct lp_task *lp_task_new(struct lp_engine *engine, int uffd, struct lp_memory *memory, uint64_t max_readahead, pid_t pid,
			    int pidfd, uint64_t tag);
/*
 * Closes the uffd if nothing is missing, or if the task is gone.  Else it stays open, because closing it makes the kernel serve
 * zeros: a thread that faults waits for ever.  From here on the task's counters stay as they are.  True if the uffd stays open.
 */
bool lp_task_end_service(struct lp_task *task);
/*
 * After lp_task_end_service.  No event is about the task any more, and the pointer is no longer valid.  True if an event that was not
 * taken yet said that a page may have come as zeros (LP_EVENT_LOST with ESTALE): the task must not go on.
 */
bool lp_task_close(struct lp_task *task);

/*
 * Brings pages that wait, from the lowest address on, round again at the end; gives way to faults.  At most max_bytes, rounded up
 * to pages.  Returns bytes brought; 0 when there is nothing to bring at the moment; -EAGAIN when a layout event is in the way; -ESRCH.
 */
int64_t lp_task_transfer(struct lp_task *task, uint64_t max_bytes);
/*
 * Brings what waits in [start, end) now.  What a remote source must give is reported as for a fault (LP_EVENT_NEED).
 * 0, or -EAGAIN when a layout event is in the way, or -ESRCH.
 */
int lp_task_bring(struct lp_task *task, uint64_t start, uint64_t end);
/*
 * For a channel: claims the next run of pages that a remote source must give in the background, up to max_pages, round again at the
 * end.  0 when nothing is left; -EAGAIN when a layout event is in the way.
 */
int64_t lp_claim_background(struct lp_task *task, uint64_t max_pages, uint64_t *dump_addr);
/*
 * Pages that came from a remote source: dumped at dump_addr, nr_pages from buffer.  Those that the task does not wait for are
 * skipped.  Returns pages placed, or -EAGAIN (call again with the same), -ESRCH.
 */
int64_t lp_task_deliver(struct lp_task *task, uint64_t dump_addr, uint64_t nr_pages, const void *buffer);
/* The claimed pages won't come: ask again (lost false) or say that no source has them. */
void lp_task_fail_remote(struct lp_task *task, uint64_t dump_addr, uint64_t nr_pages, bool lost);
/* Poisons what is pending (all) or lost: a touch raises SIGBUS. Returns pages, or -errno (EINVAL: this kernel can't). */
int64_t lp_task_poison(struct lp_task *task, bool all);
/*
 * Forgets those of the pages dumped at [dump_addr, +nr_pages) that are lost: the owner knows that they are not in the task any
 * more. (By address at dump time: what is at their address may be something else by now.)
 */
void lp_task_forget(struct lp_task *task, uint64_t dump_addr, uint64_t nr_pages);
/* 0 while the task has its memory, -ESRCH when it is gone, -EAGAIN when that is not known now. */
int lp_task_probe(struct lp_task *task);

uint64_t lp_task_tag(const struct lp_task *task);
uint32_t lp_task_nr_levels(const struct lp_task *task);
uint64_t lp_task_total(const struct lp_task *task); /* pages pending at the start */
uint64_t lp_task_pending(const struct lp_task *task);
uint64_t lp_task_lost(const struct lp_task *task);
/* Whether nothing is pending, and no page is left whose content is unclear: the uffd may be closed. */
bool lp_task_complete(const struct lp_task *task);
void lp_task_stats(const struct lp_task *task, struct lp_stats *stats);
/* nr_levels + 2 counters each: pages copied, pages dropped, faults answered; by source. */
void lp_task_sources(const struct lp_task *task, uint64_t *copied, uint64_t *dropped, uint64_t *faults);
void lp_task_remaining(struct lp_task *task, uint64_t *by_source);
void lp_task_histogram(const struct lp_task *task, uint64_t buckets[LP_HISTOGRAM_BUCKETS]);
/* Upper end of a histogram bucket, ns. */
uint64_t lp_histogram_bound(uint32_t bucket);
const struct lp_space *lp_task_space(const struct lp_task *task);

#endif
