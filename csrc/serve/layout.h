/*
 * Applies the layout changes that a task has reported to its address space, in their order (csrc/serve/address_space.h).
 */
#ifndef LAZYPAGES_LAYOUT_H
#define LAZYPAGES_LAYOUT_H

#include "serving.h"

/* Applies the changes whose order is certain, or all of them if the layout is quiescent.  (lock held for writing) */
void lp_make_changes(struct lp_task *t, bool quiescent);
/*
 * Reads the events, and applies the changes that they report (lock held for writing).  While a change has to wait, no fault may
 * be answered.  The kernel would refuse the answer with EAGAIN anyway: it counts the changes whose events have not been read, and
 * those whose threads have not run since.
 */
void lp_catch_up(struct lp_task *t);

#endif
