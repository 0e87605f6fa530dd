/*
 * Copies pages into a task: claimed runs, from a level or from a buffer; and zero pages.  Here a run is split where mappings, guard
 * regions or the end of a file split it, and each of its pages is settled: there, dropped or lost.
 *
 * All return 0, -EAGAIN when a layout event is under way or memory is short, or -ESRCH when the task is gone.  The caller holds the
 * task's lock shared.
 */
#ifndef LAZYPAGES_COPY_H
#define LAZYPAGES_COPY_H

#include "serving.h"

#define LP_NO_PAGE (~(uint64_t)0) /* an address that no page has */

/* What becomes of the claims on pages that can't be copied now. */
enum lp_claims {
	LP_KEEP_CLAIMS,	    /* the caller tries again */
	LP_RELEASE,	    /* the caller is the serving thread: no fault has been deferred to it meanwhile */
	LP_RELEASE_SHARED,  /* the serving thread may have deferred faults to the caller */
	LP_RELEASE_QUIETLY, /* likewise; and the caller wakes threads that wait for what is copied */
};

/* From src. */
int lp_copy_buffer(struct lp_task *t, const struct lp_run *run, const void *src, enum lp_claims claims);
/*
 * From the level that has the run.  What the level does not hold any more is lost.  If it became shorter while it was read, the
 * page that it ends in may have come with zeros: that can't be undone, so it is reported (ESTALE).  `touched`: a page on which a
 * thread has just faulted, or LP_NO_PAGE.  look: the calling thread's, or NULL: what it copies next is elsewhere.
 */
int lp_copy_level(struct lp_task *t, const struct lp_run *run, enum lp_claims claims, uint64_t touched,
		  struct lp_look *look);
int lp_zero_page(struct lp_task *t, uint64_t addr);

/* The run without its first pages. */
struct lp_run lp_run_after(const struct lp_run *run, uint64_t skip);
struct lp_guarded_task lp_guarded_task_of(const struct lp_task *t);

#endif
