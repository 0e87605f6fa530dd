/*
 * Makes the layout changes that a task has reported in its address space, in their order (csrc/serve/address_space.h).
 */
#ifndef LAZYPAGES_LAYOUT_H
#define LAZYPAGES_LAYOUT_H

#include "serving.h"

/* Those that can be made already, or all of them when the layout is quiescent.  (lock held alone) */
void lp_make_changes(struct lp_task *t, bool quiescent);
/*
 * Reads, and makes the changes that have been reported (lock held alone).  As long as one of them has to wait no fault may be
 * answered, which the kernel would refuse with EAGAIN anyway: it counts the changes that have begun and have not been read, and
 * those whose threads have not run since.
 */
void lp_catch_up(struct lp_task *t);

#endif
