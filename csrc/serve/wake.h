/*
 * Waking the threads of a task that wait for pages.  Each wake-up goes through all threads that wait (fs/userfaultfd.c,
 * __wake_userfault), so while there are many the serving thread makes one for many pages.
 */
#ifndef LAZYPAGES_WAKE_H
#define LAZYPAGES_WAKE_H

#include "serving.h"

/* Threads that wait for these pages fault again, unless their page is there. (lock held) */
void lp_wake(struct lp_task *t, uint64_t addr, uint64_t nr_pages);
/* For pages that are there: now or, while t->batching, with the batch. (the serving thread, lock held) */
void lp_wake_batched(struct lp_task *t, uint64_t addr, uint64_t nr_pages);
/* The batch that has been collected. */
void lp_wake_flush(struct lp_task *t);

#endif
