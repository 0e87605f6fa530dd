/*
 * Makes the task of a forked child.  What was reported together with the fork may have happened before it or since, so the child is asked
 * what it has (csrc/serve/doubt.h); that may have to wait until its layout is quiescent.
 */
#ifndef LAZYPAGES_FORKS_H
#define LAZYPAGES_FORKS_H

#include "serving.h"

/* False: the child has to be asked again.  Other tasks are served meanwhile.  (the parent's lock held alone) */
bool lp_make_fork(struct lp_task *t, struct lp_change *fork);

#endif
