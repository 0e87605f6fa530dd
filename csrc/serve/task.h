/*
 * A task object: made, numbered, linked into the engine, started; closed and freed.
 */
#ifndef LAZYPAGES_TASK_H
#define LAZYPAGES_TASK_H

#include "serving.h"

/* It has no address space yet.  NULL: no memory; then the uffd stays open. */
struct lp_task *lp_task_alloc(struct lp_engine *e, int uffd, uint32_t nr_levels);
/* Once it has its tag, and what it waits for.  parent: the number of the memory that it was forked from, or 0. */
void lp_number_memory(struct lp_task *t, uint32_t parent);
/* From here on the engine owns it, and its owner may close it. */
void lp_task_link(struct lp_task *t);
/* From here on the engine serves it, unless it has been closed already.  0 or -errno. */
int lp_task_start(struct lp_task *t);
/*
 * Closing the uffd while pages are pending makes the kernel serve zeros, to the task and to any child whose fork event is still
 * unread.  Then it stays open, to the end of this process; after that the guard has it.  (Once nothing is pending, there is nothing to
 * be had by a fork that has not been read, either: from its beginning on the kernel has refused all copies.)  Returns whether it
 * stays open.  (lock held alone)
 */
bool lp_close_uffd(struct lp_task *t);
/* NULL does nothing. */
void lp_free_new_child(struct lp_new_child *child);
/* The structure is empty then. */
void lp_free_fork(struct lp_fork *fork);
void lp_task_free(struct lp_task *t);

#endif
