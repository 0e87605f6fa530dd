/*
 * Reads a uffd: faults go to task->faults, layout events to task->changes.
 */
#ifndef LAZYPAGES_READ_EVENTS_H
#define LAZYPAGES_READ_EVENTS_H

#include "serving.h"

/* Reads all messages.  False: some remain, and are read later.  (lock held for writing) */
bool lp_read_events(struct lp_task *t);
/* Appends a change.  False: no memory.  (lock held for writing) */
bool lp_try_append_change(struct lp_task *t, struct lp_change change);
/* The same; marks the task broken if there is no memory.  (lock held for writing) */
void lp_append_change(struct lp_task *t, struct lp_change change);
/* Sets whether epoll reports a readable uffd of the task. */
void lp_watch(struct lp_task *t, bool watched);

#endif
