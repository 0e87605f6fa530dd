/*
 * A list of address ranges that grows.
 */
#ifndef LAZYPAGES_RANGES_H
#define LAZYPAGES_RANGES_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>
#include "address_space.h"

/* All zero: empty.  free(at) when done. */
struct lp_ranges {
	struct lp_range *at;
	size_t nr, cap;
};

/* False: no memory. */
bool lp_ranges_add(struct lp_ranges *r, uint64_t start, uint64_t end);
/* Adds the range unless one of them contains it.  Looks at each.  False: no memory. */
bool lp_ranges_include(struct lp_ranges *r, uint64_t start, uint64_t end);
/* Whether any of them has something in common with [start, end). */
bool lp_ranges_meet(const struct lp_ranges *r, uint64_t start, uint64_t end);

#endif
