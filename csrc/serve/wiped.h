/*
 * What a forked child finds zeroed.  The dump_addr says what the task had asked for when it was dumped; what it has asked for since
 * (MADV_WIPEONFORK, MADV_KEEPONFORK) no event reports, and only smaps shows.
 *
 * smaps says nothing about memory that is not mapped any more, or not yet since its event has still to be read: that stays as it was.
 *
 * Known gaps.  The event has been read, so the thread that forks goes on already: what a thread asks for until smaps is read (it walks
 * page tables: some milliseconds for much memory) counts as asked before the fork.  And the process of a forked child is not known:
 * what it asks for itself, about pages that it has never touched, has no effect on its own children: they find what was there, and not
 * zeros.
 */
#ifndef LAZYPAGES_WIPED_H
#define LAZYPAGES_WIPED_H

#include "serving.h"

struct lp_wiped;

/* As soon as a fork has been read.  NULL: there is nothing to know, or the task is broken.  (lock held alone) */
struct lp_wiped *lp_look_at_wiped(struct lp_task *t);
/* Used when the child is made, when all has changed that smaps has shown; frees it.  NULL does nothing.  (lock held alone) */
void lp_learn_wiped(struct lp_task *t, struct lp_wiped *seen);
void lp_free_wiped(struct lp_wiped *seen);

#endif
