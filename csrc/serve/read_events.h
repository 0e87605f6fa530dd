/*
 * Reads a uffd: faults go to task->faults, layout events to task->changes.
 */
#ifndef LAZYPAGES_READ_EVENTS_H
#define LAZYPAGES_READ_EVENTS_H

#include "serving.h"

/* Reads all that there is.  False: there is more, which can't be read now.  (lock held alone) */
bool lp_read_events(struct lp_task *t);
/* (lock held alone) */
void lp_append_change(struct lp_task *t, struct lp_change change);
/* Whether epoll names the task when its uffd is readable. */
void lp_watch(struct lp_task *t, bool watched);

#endif
