#include "space_inner.h"

#include <errno.h>
#include <stdlib.h>
#include <string.h>

int lp_reserve_regions(struct lp_space *s, size_t more)
{
	if (s->nr_regions + more > s->cap_regions) {
		size_t cap = (s->nr_regions + more) * 2;
		struct lp_region *regions = realloc(s->regions, cap * sizeof(*regions));

		if (!regions)
			return -ENOMEM;
		s->regions = regions;
		s->cap_regions = cap;
	}
	return 0;
}

/* Replaces regions [at, at + nr) by the `with_nr` ones of `with`; there is room. */
static void splice(struct lp_space *s, size_t at, size_t nr, const struct lp_region *with, size_t with_nr)
{
	memmove(&s->regions[at + with_nr], &s->regions[at + nr], (s->nr_regions - at - nr) * sizeof(*with));
	if (with_nr)
		memcpy(&s->regions[at], with, with_nr * sizeof(*with));
	s->nr_regions += with_nr - nr;
	s->by_dump_addr_valid = false;
}

void lp_cut_regions(struct lp_space *s, uint64_t start, uint64_t end)
{
	size_t first = lp_region_at(s, start), last = first, nr = 0;
	struct lp_region rest[2];

	while (last < s->nr_regions && s->regions[last].start < end)
		last++;
	if (first == last)
		return;
	if (s->regions[first].start < start) {
		rest[nr] = s->regions[first];
		rest[nr++].end = start;
	}
	if (s->regions[last - 1].end > end) {
		rest[nr] = s->regions[last - 1];
		rest[nr].dump_addr += end - rest[nr].start;
		rest[nr++].start = end;
	}
	splice(s, first, last - first, rest, nr);
}

size_t lp_first_empty(const struct lp_space *s, uint64_t start, uint64_t end)
{
	for (size_t r = lp_region_at(s, start); start < end && r < s->nr_regions && s->regions[r].start < end; r++)
		if (s->regions[r].dump_addr >= LP_NO_DUMP_ADDR)
			return r;
	return s->nr_regions;
}

void lp_cut_empty(struct lp_space *s, uint64_t start, uint64_t end)
{
	size_t r;

	while ((r = lp_first_empty(s, start, end)) < s->nr_regions)
		lp_cut_regions(s, s->regions[r].start > start ? s->regions[r].start : start, lp_min(s->regions[r].end, end));
}

void lp_insert_regions(struct lp_space *s, const struct lp_region *regions, size_t nr)
{
	splice(s, lp_region_at(s, regions[0].start), 0, regions, nr);
}

void lp_forget_left(struct lp_space *s)
{
	size_t kept = 0;

	for (size_t i = 0; i < s->nr_left; i++)
		if (lp_first_empty(s, s->left[i].start, s->left[i].end) < s->nr_regions)
			s->left[kept++] = s->left[i];
	s->nr_left = kept;
}
