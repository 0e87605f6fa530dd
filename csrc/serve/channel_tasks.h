/*
 * The operations on tasks that channels use (struct lp_channel_tasks, csrc/serve/channels.h).
 */
#ifndef LAZYPAGES_CHANNEL_TASKS_H
#define LAZYPAGES_CHANNEL_TASKS_H

#include "serving.h"

struct lp_channel_tasks lp_channel_tasks_of(struct lp_engine *e);

#endif
