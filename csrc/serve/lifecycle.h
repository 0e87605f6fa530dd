/*
 * Tasks and engines: made, closed, freed.  (csrc/serve/engine.h has what the owner calls.)
 */
#ifndef LAZYPAGES_LIFECYCLE_H
#define LAZYPAGES_LIFECYCLE_H

#include "serving.h"

/*
 * Frees the tasks that their owner has closed: the serving thread, before each epoll_wait, so that no task is freed that the last one
 * has named.
 */
void lp_reap(struct lp_engine *e);

#endif
