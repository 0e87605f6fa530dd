/*
 * What the memory of a task is made of, before the task comes (csrc/serve/engine.h).
 */
#ifndef LAZYPAGES_MEMORY_H
#define LAZYPAGES_MEMORY_H

#include "engine.h"

struct lp_memory {
	struct lp_space *space;
	struct lp_level *levels;
	uint32_t nr_levels;
	bool remote;
};

#endif
