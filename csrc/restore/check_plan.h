/*
 * Whether a plan can be executed: all that it names is there, every size fits.  What the restorer reads of a plan is checked
 * here, before anything is done; so those who execute it need not look again.
 */
#ifndef LAZYPAGES_CHECK_PLAN_H
#define LAZYPAGES_CHECK_PLAN_H

#include <stddef.h>

/* The file with the plan, size bytes, aligned to 8: 0; -EINVAL; -ENOMEM. */
int lp_check_plan(const void *plan, size_t size);

#endif
