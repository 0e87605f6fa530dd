/*
 * The serving thread and one task: reads, and answers all that can be answered.
 */
#ifndef LAZYPAGES_SERVE_TASK_H
#define LAZYPAGES_SERVE_TASK_H

#include "serving.h"

/* Before other tasks have their turn, a layout that is changing is waited for a little. */
void lp_serve(struct lp_task *t);

#endif
