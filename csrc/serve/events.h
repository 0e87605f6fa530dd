/*
 * What the engine reports to its owner: a queue, and what is set about a task when something is reported.
 */
#ifndef LAZYPAGES_EVENTS_H
#define LAZYPAGES_EVENTS_H

#include "serving.h"

/* Not about a task that is closed.  False: there was no memory, and it has to be tried again. */
bool lp_post(struct lp_engine *e, struct lp_event event);
void lp_post_about(struct lp_task *t, uint32_t kind, int error);
/* Pages [skip, skip + nr) of the run are lost. */
void lp_post_lost(struct lp_task *t, const struct lp_run *run, uint64_t skip, uint64_t nr, int error);
/* The same, and they are marked so in the address space.  They are claimed. */
void lp_mark_lost(struct lp_task *t, const struct lp_run *run, uint64_t skip, uint64_t nr, int error);
/* The task's memory does not exist any more. */
void lp_mark_gone(struct lp_task *t);
/*
 * What the task misses is not known any more: from here on no fault is answered, and the owner kills it.  Its uffd, and those of
 * children that it has forked and that are not served, stay open: closed, the kernel would fill them with zeros.
 */
void lp_mark_broken(struct lp_task *t, int error);
/* Reports it once nothing is pending.  (lock held: otherwise the uffd could be closed, and its number be reused) */
void lp_check_complete(struct lp_task *t);
/* What has been posted about the task and not been taken.  True: a page of it may have come with zeros.  (engine->lock held) */
bool lp_forget_posted(struct lp_task *t);

#endif
