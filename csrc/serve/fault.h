/*
 * Answers one fault: makes the plan, and executes it.
 */
#ifndef LAZYPAGES_FAULT_H
#define LAZYPAGES_FAULT_H

#include "serving.h"

/* 0; -EAGAIN: not now; -ESRCH.  (the serving thread, lock held shared) */
int lp_answer_fault(struct lp_task *t, struct lp_fault fault);

#endif
