/*
 * Whether what an UNMAP event reports has happened.  The kernel reports the range of the call before it knows whether the call
 * succeeds (mm/vma.c, vms_gather_munmap_vmas; mm/mmap.c before 6.12): a munmap of memory that is sealed in part, or an mmap in
 * the place of other memory that exceeds a limit, leaves everything as it was.  Each call unmaps all of its range or nothing.
 *
 * The question can be asked when the layout is quiescent, and the thread that made the call may run on before it is asked.  It can
 * report no change without an event, but memory that grows in place (mremap, a stack) is registered and not reported.  So what
 * is mapped there may be new, and zero.  The rule, lp_verdict, knows these facts (kernel sources and versions: docs/kernel.md):
 *
 *   - Nothing registered there: it is gone.
 *   - A page is there that was not missing before: only we place pages, so nothing has been unmapped.
 *   - The call splits mappings where its range begins, and a failing one leaves them split.  Memory that has grown over the
 *     range is one mapping with what lies below.
 *   - Memory that has grown and been split from what is below it since (mprotect, madvise) differs from that.
 *
 * What none of them answers is lost: neither zeros nor old bytes.
 */
#ifndef LAZYPAGES_DOUBT_H
#define LAZYPAGES_DOUBT_H

#include <stdbool.h>
#include <stdint.h>

#include "address_space.h"

struct lp_evidence {
	bool here;	/* registered */
	bool present;	/* some page that is not pending is there */
	bool attached;	/* one mapping with the page before the range */
	bool below;	/* the page before the range is registered */
	bool alike;	/* as the mapping before the range, but split from it; or sealed */
	bool grows;	/* one mapping with what is above the range, and that may be a stack */
};

enum lp_verdict {
	LP_IS_GONE,
	LP_STAYS,
	LP_UNKNOWN,
};

enum lp_verdict lp_verdict(const struct lp_doubt *doubt, const struct lp_evidence *evidence);

/* How to ask. Answers are 0 or -errno; -EAGAIN: the layout is not quiescent. */
struct lp_ask {
	void *arg;
	/* 0: all of [start, end) is in one registered mapping; -ENOENT: not */
	int (*within)(void *arg, uint64_t start, uint64_t end);
	/* puts a page of zeros; -EEXIST: a page is there; -ENOENT: nothing is registered there */
	int (*zero)(void *arg, uint64_t addr);
	/* whether the mappings of the pages before and at `edge` are alike, or one in [start, end) is sealed; false: not known */
	bool (*alike)(void *arg, uint64_t edge, uint64_t start, uint64_t end);
	/* whether the mapping of a page may grow downwards; true: not known */
	bool (*grows)(void *arg, uint64_t addr);
	/* whether the task has itself moved memory to a page by a change that is not made yet */
	bool (*arrived)(void *arg, uint64_t addr);
	/* whether there is a mapping of a page, registered or not; true: not known */
	bool (*mapped)(void *arg, uint64_t addr);
	/* whether [start, end) stays; if not known, what is pending there is lost */
	void (*stays)(void *arg, uint64_t start, uint64_t end, bool known);
};

/* Answers the doubts of a space whose changes have all been made: 0; -EAGAIN: some are left; -ENOMEM.  (exclusive) */
int lp_settle(struct lp_space *space, const struct lp_ask *ask, struct lp_counts *dropped);

/* Whether a change among these says that the place was left from which this one has moved memory; not after MREMAP_DONTUNMAP. */
bool lp_leaves_source(const struct lp_change *changes, size_t nr, const struct lp_change *move);

/*
 * Makes the changes, of which each may or may not have been made before a fork, in the space of the child: a FORK event may be
 * reported after changes that another thread has made since, or before some that had been made already (kernel/fork.c, dup_mmap,
 * queues it with the mmap lock dropped).  What the child has registered decides.  Only a REMOVE event comes before what it reports
 * (mm/madvise.c, madvise_dontneed_free): if it was reported after the fork, which was event number `reported`, the child has the
 * pages.  Sometimes what is registered does not say enough (*tangled: a place that a move has taken or left is taken or left again).
 * Then what is pending in the places that the changes have touched is lost, and what the space does not know there must not be
 * taken for zero.  again: it has been tried before.  0; -EAGAIN: the child is changing already, and the space is spoilt; -ENOMEM.
 */
int lp_replay(struct lp_space *child, const struct lp_change *changes, size_t nr, uint64_t reported, bool again,
	      const struct lp_ask *ask, const struct lp_ask *ask_parent, struct lp_counts *dropped, bool *tangled);

#endif
