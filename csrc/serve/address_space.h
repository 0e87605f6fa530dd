/*
 * The address space of one restored task: what every page of it is still
 * waiting for.  Pure: no file descriptor, no system call.
 *
 * Two tables and three bitmaps:
 *
 *   dump_addr    immutable, shared by forked tasks: the lazy extents of the
 *            checkpoint, by address at dump time.  Page k of all extents laid
 *            end to end has the index index k; the bitmaps are indexed by it,
 *            so that their size follows the data and not the address range.
 *   regions  where the dumped ranges are now: [start, end) holds what was at
 *            [dump_addr, dump_addr + end - start) when the task was dumped.  mremap
 *            moves regions, munmap cuts them.  From LP_NO_DUMP_ADDR on, dump_addr
 *            addresses mean nothing: the range is the task's, but empty, as
 *            what mremap leaves until the kernel reports that it is unmapped.
 *   pending  the page has data that the task does not have yet
 *   claimed  a thread is bringing it at this moment (a copy under way, or a
 *            request to a remote source)
 *   lost     no source could give it; it is still pending
 *
 * A page outside of every region, without an extent, or no longer pending
 * is zero when the task faults on it: it was never touched, or the task has
 * thrown it away, or it is there already (then the kernel says EEXIST).
 *
 * Locking is the caller's: the functions marked (exclusive) change the layout
 * and must run alone; the others may run at the same time as each other.
 */
#ifndef LAZYPAGES_SPACE_H
#define LAZYPAGES_SPACE_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include "common/extent.h"
#include "common/page.h"

struct lp_range {
	uint64_t start, end;
};

#define LP_NO_DUMP_ADDR ((uint64_t)1 << 63)

struct lp_region {
	uint64_t start, end, dump_addr;
};

enum lp_change_kind {
	LP_FORKED,
	LP_REMOVED,  /* MADV_DONTNEED, MADV_FREE, MADV_REMOVE: the range stays and is zero */
	LP_UNMAPPED, /* munmap, or something else mapped in its place: the range is gone */
	LP_REMAPPED, /* mremap: what was in the range is at `to`; the range is empty, LP_UNMAPPED for it follows unless it stays */
	LP_QUESTION, /* not an event: something is in doubt (struct lp_doubt) */
};

/* A layout event, as the kernel reports it. */
struct lp_change {
	uint32_t kind;	      /* enum lp_change_kind */
	int32_t uffd;	      /* LP_FORKED: of the child */
	uint64_t start, len;  /* bytes */
	uint64_t to;	      /* LP_FORKED and LP_REMOVED: how many events were reported before */
	void *seen;	      /* LP_FORKED: the caller's */
	bool awaited;	      /* LP_REMAPPED: see csrc/serve/late.h */
};

static inline bool lp_overlap(uint64_t start, uint64_t len, uint64_t other, uint64_t other_len)
{
	return start < other + other_len && other < start + len;
}

/* The ranges that a change touches, for LP_REMAPPED also the one that it takes.  Returns their number. */
static inline size_t lp_places(const struct lp_change *change, struct lp_range places[2])
{
	places[0] = (struct lp_range){change->start, change->start + change->len};
	places[1] = (struct lp_range){change->to, change->to + change->len};
	return change->kind == LP_REMAPPED ? 2 : 1;
}

/*
 * Memory that may have been unmapped: an UNMAP event is reported for calls that fail, too (csrc/serve/doubt.h).  It is in no region,
 * and its pages stay pending, until that is answered.
 */
struct lp_doubt {
	uint64_t start, end, dump_addr; /* as a region's */
	uint64_t edge, top;	    /* the range that was reported: where it begins and ends; LP_NO_EDGE, 0: it has moved since */
	bool unsure;		    /* more than that has changed there */
	bool asked;		    /* some of its pages may be there since, as zeros */
	bool refilled;		    /* of a child: its parent has other memory there since */
};

#define LP_NO_EDGE UINT64_MAX

enum lp_kind {
	LP_ZERO,    /* known zero, or not our page any more */
	LP_DATA,    /* pending, in a level of the chain of images */
	LP_REMOTE,  /* pending, at a page server */
	LP_LOST,    /* pending, and no source has it */
	LP_CLAIMED, /* pending, on its way */
};

/* Pages that follow each other, and what is known of them. */
struct lp_run {
	uint32_t kind;     /* enum lp_kind */
	uint32_t source;   /* level, for LP_DATA */
	uint64_t addr;     /* where it is in the task now */
	uint64_t dump_addr;    /* its address at dump time */
	uint64_t offset;   /* in the level's pages file, for LP_DATA */
	uint64_t nr_pages; /* > 0 */
	uint64_t index;    /* index index, unless LP_ZERO */
};

struct lp_space;

/* Pages by source: one counter a level, then one for remote, one for lost. */
struct lp_counts {
	uint64_t *by_source;
	uint32_t nr_levels;
};

/*
 * Extents sorted and disjoint; those that are not lazy are left out.  vmas are
 * the lazy-capable VMAs, sorted and disjoint, every lazy extent within them;
 * wiped are ranges that a child finds zeroed (MADV_WIPEONFORK), and its children.  NULL
 * with errno set: EINVAL when they are not as they should be, ENOMEM.
 */
struct lp_space *lp_space_new(const struct lp_extent *extents, size_t nr_extents, const struct lp_range *vmas,
			      size_t nr_vmas, const struct lp_range *wiped, size_t nr_wiped);
/*
 * In ranges `wiped` a child finds zeros from now on, in `kept` it does not; elsewhere it is as before.  Each sorted and
 * disjoint.  0 or -ENOMEM. (exclusive)
 */
int lp_space_wipe(struct lp_space *space, const struct lp_range *wiped, size_t nr_wiped, const struct lp_range *kept,
		  size_t nr_kept);
/* In children of `space` those pages are wiped that are wiped in children of `as`.  0 or -ENOMEM. (exclusive) */
int lp_space_wipe_as(struct lp_space *space, const struct lp_space *as);
/* The same again, but none claimed. */
struct lp_space *lp_space_copy(const struct lp_space *space);
/* What fork(2) makes of it: the same pages pending but for the wiped ones, none claimed. (exclusive) */
struct lp_space *lp_space_clone(struct lp_space *space, struct lp_counts *dropped);
void lp_space_free(struct lp_space *space);

uint64_t lp_space_pending(const struct lp_space *space); /* pages, the lost ones among them */
uint64_t lp_space_lost(const struct lp_space *space);    /* pages */
size_t lp_space_nr_regions(const struct lp_space *space);
const struct lp_region *lp_space_regions(const struct lp_space *space);

/* At most max_pages from the page at addr (page aligned), all of one kind and source, contiguous in task and dump. */
struct lp_run lp_space_lookup(const struct lp_space *space, uint64_t addr, uint64_t max_pages);
/* How many of the max_pages pages before the run continue it. */
uint64_t lp_space_lookback(const struct lp_space *space, const struct lp_run *at, uint64_t max_pages);
/*
 * The next run that waits to be brought (LP_DATA; LP_REMOTE instead when asked for), at or after cursor.
 * False when there is none up to the end of the address space.
 */
bool lp_space_next(const struct lp_space *space, uint64_t cursor, uint64_t max_pages, bool remote,
		   struct lp_run *answer);
/*
 * Where the page dumped at `dump_addr` is now; false when it is gone.  Logarithmic
 * once lp_space_index (exclusive) has run after the last layout event, linear
 * in regions before.
 */
bool lp_space_locate(const struct lp_space *space, uint64_t dump_addr, uint64_t *addr);
void lp_space_index(struct lp_space *space);

/* Claims pages [index, index + nr) up to the first that can't be claimed; returns how many. */
uint64_t lp_space_claim(struct lp_space *space, uint64_t index, uint64_t nr);
/* Claimed pages that have arrived. Returns how many were still pending. */
uint64_t lp_space_commit(struct lp_space *space, uint64_t index, uint64_t nr);
/* Claimed pages that have not arrived; the caller wakes threads that may wait for them. */
void lp_space_release(struct lp_space *space, uint64_t index, uint64_t nr);
/* Claimed pages that no source can give; what has arrived all the same, from another one, is not lost. */
void lp_space_mark_lost(struct lp_space *space, uint64_t index, uint64_t nr);
/* Claimed or not, where they are in the task is not known, and will not be. */
void lp_space_mark_lost_for_good(struct lp_space *space, uint64_t index, uint64_t nr);
/*
 * A source has come back: makes lost pages pending as before, but for those that never had a source or are lost for good.  Returns
 * how many.
 */
uint64_t lp_space_retry_lost(struct lp_space *space);
/* Those of the pages dumped at [dump_addr, +nr_pages) that are lost are not waited for any more. (exclusive) */
void lp_space_forget(struct lp_space *space, uint64_t dump_addr, uint64_t nr_pages, struct lp_counts *dropped);

/*
 * Which of the changes that the kernel has reported is to be made next; `changes` is in the order in which it reported them.
 * nr: none before the layout is quiescent, that is, before all that has begun has been reported.  Only then it can be asked whether
 * what was to be unmapped is unmapped, and only then all events of an mremap are there, and all that another thread has done while
 * one forked.  Forks come last: their children have been asked by then what they have (csrc/serve/doubt.h).
 *
 * Changes are not always reported in the order in which they happened: an event is queued when the change has been made and the
 * mmap lock been dropped, and mremap reports where memory went before it reports that the old place is unmapped.  Meanwhile
 * another thread can move other memory to the place that is free now, and its event may come first.  (fs/userfaultfd.c and
 * mm/mremap.c; seen with Linux 6.18: tests/real/test_engine_order.py.)  But memory can only move to where nothing is. So
 * a move to a place that is still taken waits until a departure from there is reported, and the changes reported later wait too.
 *
 * Known ambiguity: if memory that has just moved to X leaves X before the earlier departure from X is reported, the two reports
 * can't be told apart here; csrc/serve/late.h finds such changes before any of them is made.  For that to happen, a thread must be
 * preempted between dropping the mmap lock and queueing its event, while another thread's mremap gets the very place, is reported,
 * wakes up, leaves, and is reported again.
 */
size_t lp_space_next_change(const struct lp_space *space, const struct lp_change *changes, size_t nr, bool quiescent);
/*
 * For kernels before about 6.15, while the layout is quiescent: their REMAP events of a move that shrinks have the length from before
 * (mm/mremap.c, mremap_userfaultfd_complete with old_len).  The true one is what the same call reports as unmapped, from `from` on.
 */
void lp_true_lengths(struct lp_change *changes, size_t nr);
/* The layout is quiescent, all changes are made: what mremap has left and no event reports as unmapped stays. (exclusive) */
void lp_space_quiescent(struct lp_space *space);

/* Changes. (exclusive) 0 or -ENOMEM. */
void lp_space_remove(struct lp_space *space, uint64_t start, uint64_t end, struct lp_counts *dropped);
/* Whether anything is known to be, or in doubt, in [start, end). */
bool lp_space_knows(const struct lp_space *space, uint64_t start, uint64_t end);
/* For csrc/serve/doubt.c: whether something has moved there before the fork or after it is not known. */
void lp_space_obscure(struct lp_space *space, uint64_t start, uint64_t end);
/* For csrc/serve/doubt.c: after the fork, other memory of the parent has moved there. */
void lp_space_refill(struct lp_space *space, uint64_t start, uint64_t end);
/* For csrc/serve/doubt.c: what is in doubt there may have been unmapped after the fork, and then this is about other memory. */
int lp_space_remove_from_child(struct lp_space *space, uint64_t start, uint64_t end, struct lp_counts *dropped);
int lp_space_unmap(struct lp_space *space, uint64_t start, uint64_t end, struct lp_counts *dropped);
/* Whatever was at `to` is gone. */
int lp_space_remap(struct lp_space *space, uint64_t from, uint64_t to, uint64_t len, struct lp_counts *dropped);

/* Whether something pending, or in doubt, is in [start, end). */
bool lp_space_matters(const struct lp_space *space, uint64_t start, uint64_t end);
/* As lp_space_unmap, if it has happened: what is pending there is in doubt from now on. (exclusive) */
int lp_space_question(struct lp_space *space, uint64_t start, uint64_t end);
size_t lp_space_nr_doubts(const struct lp_space *space);
struct lp_doubt lp_space_doubt(const struct lp_space *space, size_t i);
/* Whether something of it is pending. */
bool lp_space_in_doubt(const struct lp_space *space, const struct lp_doubt *doubt);
/* All that is in doubt in [start, end) is lost for good; of a doubt that lies there in part, all of it. */
void lp_space_mark_doubts_lost(struct lp_space *space, uint64_t start, uint64_t end);
/* Some of its pages that are not pending, by address: returns how many, at most max. */
size_t lp_space_not_pending(const struct lp_space *space, const struct lp_doubt *doubt, uint64_t *addrs, size_t max);
void lp_space_asked(struct lp_space *space, size_t i);
/* Doubt i is gone as unmapped, or a region again; others change their place. (exclusive) */
int lp_space_answer_doubt(struct lp_space *space, size_t i, bool gone, struct lp_counts *dropped);

/* Adds the pages pending to the counters: a walk over all extents. */
void lp_space_count(const struct lp_space *space, struct lp_counts *counts);

#endif
