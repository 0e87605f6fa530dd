#include "space_inner.h"

#include <errno.h>
#include <stdlib.h>
#include <string.h>

int lp_space_wipe_as(struct lp_space *s, const struct lp_space *as)
{
	struct lp_range *wiped = malloc((as->nr_wiped + 1) * sizeof(*wiped));

	if (!wiped)
		return -ENOMEM;
	if (as->nr_wiped)
		memcpy(wiped, as->wiped, as->nr_wiped * sizeof(*wiped));
	free(s->wiped);
	s->wiped = wiped;
	s->nr_wiped = as->nr_wiped;
	return 0;
}

/* A list of ranges of addresses at dump time that has room. */
struct pieces {
	struct lp_range *at;
	size_t nr;
};

static void add_piece(struct pieces *pieces, uint64_t start, uint64_t end)
{
	if (start < end)
		pieces->at[pieces->nr++] = (struct lp_range){start, end};
}

static void cut_pieces(struct pieces *pieces, uint64_t start, uint64_t end)
{
	for (size_t i = pieces->nr; i--;) {
		struct lp_range was = pieces->at[i];

		if (was.end <= start || was.start >= end)
			continue;
		pieces->at[i] = pieces->at[--pieces->nr];
		add_piece(pieces, was.start, start);
		add_piece(pieces, end, was.end);
	}
}

/* What of the ranges was dumped: added to the pieces, or cut out of them. */
static void dump_addrs_of(const struct lp_space *s, const struct lp_range *ranges, size_t nr, struct pieces *pieces,
		      void (*change)(struct pieces *pieces, uint64_t start, uint64_t end))
{
	for (size_t i = 0; i < nr; i++)
		for (size_t r = lp_region_at(s, ranges[i].start); r < s->nr_regions && s->regions[r].start < ranges[i].end; r++) {
			const struct lp_region *region = &s->regions[r];
			uint64_t start = ranges[i].start > region->start ? ranges[i].start : region->start;

			if (region->dump_addr < LP_NO_DUMP_ADDR)
				change(pieces, region->dump_addr + (start - region->start),
				       region->dump_addr + (lp_min(ranges[i].end, region->end) - region->start));
		}
}

int lp_space_wipe(struct lp_space *s, const struct lp_range *wiped, size_t nr_wiped, const struct lp_range *kept,
		  size_t nr_kept)
{
	/* nr ranges meet regions nr + nr_regions times at most; each time is a piece added, or a cut that makes one more */
	size_t most = s->nr_wiped + 2 * nr_wiped + nr_kept + 3 * s->nr_regions + 1;
	struct pieces pieces = {malloc(most * sizeof(*pieces.at)), s->nr_wiped};

	if (!pieces.at)
		return -ENOMEM;
	if (s->nr_wiped) {
		memcpy(pieces.at, s->wiped, s->nr_wiped * sizeof(*pieces.at));
		dump_addrs_of(s, kept, nr_kept, &pieces, cut_pieces);
		dump_addrs_of(s, wiped, nr_wiped, &pieces, cut_pieces);
	}
	dump_addrs_of(s, wiped, nr_wiped, &pieces, add_piece);
	free(s->wiped);
	s->wiped = pieces.at;
	s->nr_wiped = pieces.nr;
	return 0;
}
