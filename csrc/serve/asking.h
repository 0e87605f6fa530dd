/*
 * What csrc/serve/doubt.h asks the kernel about the layout of a task, and what follows from the answer.
 */
#ifndef LAZYPAGES_ASKING_H
#define LAZYPAGES_ASKING_H

#include "doubt.h"
#include "serving.h"

/* (lock held alone while it is used) */
struct lp_ask lp_asking(struct lp_task *t);
/* All that waits in [start, end) is lost, for good: it is not known whether it is there.  (lock held alone) */
void lp_mark_range_lost(struct lp_task *t, uint64_t start, uint64_t end);

#endif
