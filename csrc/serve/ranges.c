#include "ranges.h"

#include <stdlib.h>

bool lp_ranges_add(struct lp_ranges *r, uint64_t start, uint64_t end)
{
	if (r->nr == r->cap) {
		size_t cap = r->cap ? r->cap * 2 : 16;
		struct lp_range *at = realloc(r->at, cap * sizeof(*at));

		if (!at)
			return false;
		r->at = at;
		r->cap = cap;
	}
	r->at[r->nr++] = (struct lp_range){start, end};
	return true;
}

bool lp_ranges_include(struct lp_ranges *r, uint64_t start, uint64_t end)
{
	for (size_t i = 0; i < r->nr; i++)
		if (r->at[i].start <= start && end <= r->at[i].end)
			return true;
	return lp_ranges_add(r, start, end);
}

bool lp_ranges_meet(const struct lp_ranges *r, uint64_t start, uint64_t end)
{
	for (size_t i = 0; i < r->nr; i++)
		if (r->at[i].start < end && start < r->at[i].end)
			return true;
	return false;
}
