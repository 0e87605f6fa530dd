/*
 * Faults that can't be answered now.
 *
 * Deferred: another thread has claimed the page and brings it; its copy wakes the thread that waits.  If it releases its claim instead
 * (lp_claims_released), the serving thread answers the fault after all.
 *
 * To be retried: the layout of the task is changing.
 */
#ifndef LAZYPAGES_DEFERRED_H
#define LAZYPAGES_DEFERRED_H

#include "common/clock.h"
#include "serving.h"

/*
 * Until a task is tried again whose layout is changing.  The thread that changes it needs a CPU first, which takes some us; or it is
 * stopped, and then this takes as long as that.
 */
#define LP_RETRY_FIRST_NS 20000
#define LP_RETRY_MOST_NS 1000000
#define LP_READ_RETRY_NS (10 * LP_NS / 1000) /* until a uffd that could not be read is read again */

/*
 * Any thread: it has released claims, so the serving thread looks at deferred faults again.  (Waking the threads that wait would do
 * as well, but all of them would fault again.)
 */
void lp_claims_released(struct lp_task *t);
/* The serving thread: tasks for which that was called are to be retried. */
void lp_collect_released(struct lp_engine *e);
/* The serving thread tries this task again soon. */
void lp_retry_later(struct lp_task *t);
/* 0, or -EAGAIN: not now.  (the serving thread, lock held shared) */
int lp_defer_fault(struct lp_task *t, struct lp_fault fault);
/*
 * Faults whose claims were released are to be answered; those whose page has come are done: the copy woke their threads, and
 * the layout event did if the page went away again.  (the serving thread, lock held)
 */
void lp_review_deferred(struct lp_task *t);

#endif
