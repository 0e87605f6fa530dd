#include "space_inner.h"

#include <errno.h>
#include <stdlib.h>

/* Room for one more. */
static int reserve_ranges(struct lp_range **ranges, size_t nr, size_t *cap)
{
	if (nr == *cap) {
		size_t more = *cap ? *cap * 2 : 16;
		struct lp_range *grown = realloc(*ranges, more * sizeof(*grown));

		if (!grown)
			return -ENOMEM;
		*ranges = grown;
		*cap = more;
	}
	return 0;
}

/* [start, end) is left by a change. */
static int leave(struct lp_space *s, uint64_t start, uint64_t end)
{
	const struct lp_range range = {start, end};

	if (reserve_ranges(&s->gone, s->nr_gone, &s->cap_gone))
		return -ENOMEM;
	s->gone[s->nr_gone++] = range;
	for (size_t i = 0; i < s->nr_doubts; i++)
		s->doubts[i].unsure |= lp_unsettles(&range, &s->doubts[i]);
	return 0;
}

int lp_space_remove_from_child(struct lp_space *s, uint64_t start, uint64_t end, struct lp_counts *dropped)
{
	if (lp_split_doubts(s, start) || lp_split_doubts(s, end))
		return -ENOMEM;
	lp_drop_regions(s, start, end, dropped);
	for (size_t i = 0; i < s->nr_doubts; i++)
		if (s->doubts[i].start >= start && s->doubts[i].end <= end)
			s->doubts[i].edge = LP_NO_EDGE;
	return 0;
}

void lp_space_remove(struct lp_space *s, uint64_t start, uint64_t end, struct lp_counts *dropped)
{
	lp_drop_regions(s, start, end, dropped);
	for (size_t i = 0; i < s->nr_doubts; i++) {
		const struct lp_doubt *d = &s->doubts[i];
		uint64_t from = start > d->start ? start : d->start, to = lp_min(end, d->end);

		if (from < to)
			lp_drop_dumped(s, d->dump_addr + (from - d->start), d->dump_addr + (to - d->start), dropped);
	}
}

void lp_space_quiescent(struct lp_space *s)
{
	s->nr_left = 0;
	s->nr_gone = 0;
}

int lp_space_unmap(struct lp_space *s, uint64_t start, uint64_t end, struct lp_counts *dropped)
{
	if (lp_reserve_regions(s, 1))
		return -ENOMEM;
	if (lp_doubts_gone(s, start, end, dropped) || leave(s, start, end))
		return -ENOMEM;
	lp_drop_regions(s, start, end, dropped);
	lp_cut_regions(s, start, end);
	lp_forget_left(s);
	return 0;
}

bool lp_space_matters(const struct lp_space *s, uint64_t start, uint64_t end)
{
	for (size_t r = lp_region_at(s, start); r < s->nr_regions && s->regions[r].start < end; r++) {
		const struct lp_region *region = &s->regions[r];
		uint64_t from = start > region->start ? start : region->start, to = lp_min(end, region->end);

		if (lp_pending_of_dumped(s, region->dump_addr + (from - region->start), region->dump_addr + (to - region->start)))
			return true;
	}
	for (size_t i = 0; i < s->nr_doubts; i++)
		if (s->doubts[i].start < end && s->doubts[i].end > start)
			return true;
	return false;
}

int lp_space_question(struct lp_space *s, uint64_t start, uint64_t end)
{
	size_t first = lp_region_at(s, start), last = first;

	while (last < s->nr_regions && s->regions[last].start < end)
		last++;
	if (lp_split_doubts(s, start) || lp_split_doubts(s, end) || lp_reserve_doubts(s, last - first) || lp_reserve_regions(s, 1) ||
	    leave(s, start, end))
		return -ENOMEM;
	for (size_t i = 0; i < s->nr_doubts; i++) {
		struct lp_doubt *d = &s->doubts[i];

		if (d->start < start || d->end > end)
			continue;
		d->edge = d->edge == LP_NO_EDGE || d->edge < start ? start : d->edge;
		d->top = d->top && d->top < end ? d->top : end;
	}
	for (size_t r = first; r < last; r++) {
		const struct lp_region *region = &s->regions[r];
		struct lp_doubt d = {
			.start = start > region->start ? start : region->start,
			.end = lp_min(end, region->end),
			.edge = start,
			.top = end,
		};
		uint64_t from;

		if (region->dump_addr >= LP_NO_DUMP_ADDR)
			continue;
		d.dump_addr = region->dump_addr + (d.start - region->start);
		for (size_t i = 0; i + 1 < s->nr_gone; i++) /* but for this one */
			d.unsure |= lp_unsettles(&s->gone[i], &d);
		if (!lp_space_in_doubt(s, &d))
			continue;
		/* a thread that brings such a page meanwhile finds it wanted again, or gone */
		from = lp_page_from(s->extents, d.dump_addr);
		lp_clear_bits(s->claimed, from, lp_page_from(s->extents, d.dump_addr + (d.end - d.start)) - from);
		s->doubts[s->nr_doubts++] = d;
	}
	lp_cut_regions(s, start, end);
	lp_forget_left(s);
	return 0;
}

int lp_space_remap(struct lp_space *s, uint64_t from, uint64_t to, uint64_t len, struct lp_counts *dropped)
{
	const struct lp_region empty = {from, from + len, LP_NO_DUMP_ADDR};
	size_t first = lp_region_at(s, from), last = first, nr = 0;
	uint64_t at = from;
	struct lp_region *moved;

	if (!len)
		return 0;
	if (reserve_ranges(&s->left, s->nr_left, &s->cap_left))
		return -ENOMEM;
	if (lp_doubts_gone(s, to, to + len, dropped) || lp_move_doubts(s, from, to, len, dropped))
		return -ENOMEM;
	/* what is registered above may have grown with what has moved here */
	for (size_t i = 0; i < s->nr_doubts; i++)
		if (s->doubts[i].edge <= to + len && s->doubts[i].start >= to + len && s->doubts[i].top >= to + len)
			s->doubts[i].edge = to + len;
	if (leave(s, from, from + len))
		return -ENOMEM;
	while (last < s->nr_regions && s->regions[last].start < from + len)
		last++;
	/* the regions, and the gaps between them: memory that has grown since the dump */
	moved = malloc((2 * (last - first) + 1) * sizeof(*moved));
	/* every cut can add one; what moves, and what is left, come on top */
	if (!moved || lp_reserve_regions(s, 2 * (last - first) + 4)) {
		free(moved);
		return -ENOMEM;
	}
	for (size_t r = first; r < last; r++) {
		const struct lp_region *region = &s->regions[r];
		uint64_t start = from > region->start ? from : region->start;
		uint64_t end = lp_min(region->end, from + len);

		if (at < start)
			moved[nr++] = (struct lp_region){at - from + to, start - from + to, LP_NO_DUMP_ADDR};
		moved[nr++] = (struct lp_region){start - from + to, end - from + to,
						 region->dump_addr + (start - region->start)};
		at = end;
	}
	if (at < from + len)
		moved[nr++] = (struct lp_region){at - from + to, to + len, LP_NO_DUMP_ADDR};
	lp_cut_regions(s, from, from + len);
	lp_insert_regions(s, &empty, 1);
	lp_drop_regions(s, to, to + len, dropped);
	lp_cut_regions(s, to, to + len);
	lp_insert_regions(s, moved, nr);
	free(moved);
	lp_forget_left(s);
	s->left[s->nr_left++] = (struct lp_range){from, from + len};
	return 0;
}

int lp_space_answer_doubt(struct lp_space *s, size_t i, bool gone, struct lp_counts *dropped)
{
	struct lp_doubt d = s->doubts[i];
	const struct lp_region stays = {d.start, d.end, d.dump_addr};

	if (gone) {
		lp_drop_doubt(s, i, dropped);
		return 0;
	}
	if (lp_reserve_regions(s, 3))
		return -ENOMEM;
	s->doubts[i] = s->doubts[--s->nr_doubts];
	lp_cut_regions(s, d.start, d.end); /* nothing is there, but what mremap had left */
	lp_insert_regions(s, &stays, 1);
	return 0;
}

bool lp_space_knows(const struct lp_space *s, uint64_t start, uint64_t end)
{
	size_t r = lp_region_at(s, start);

	for (size_t i = 0; i < s->nr_doubts; i++)
		if (s->doubts[i].start < end && s->doubts[i].end > start)
			return true;
	return r < s->nr_regions && s->regions[r].start < end;
}
