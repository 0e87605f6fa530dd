#include "space_inner.h"

#include <errno.h>
#include <stdlib.h>

int lp_reserve_doubts(struct lp_space *s, size_t more)
{
	if (s->nr_doubts + more > s->cap_doubts) {
		size_t cap = (s->nr_doubts + more) * 2;
		struct lp_doubt *doubts = realloc(s->doubts, cap * sizeof(*doubts));

		if (!doubts)
			return -ENOMEM;
		s->doubts = doubts;
		s->cap_doubts = cap;
	}
	return 0;
}

int lp_split_doubts(struct lp_space *s, uint64_t at)
{
	if (lp_reserve_doubts(s, s->nr_doubts))
		return -ENOMEM;
	for (size_t i = s->nr_doubts; i--;) {
		struct lp_doubt *d = &s->doubts[i], *rest;

		if (at <= d->start || at >= d->end)
			continue;
		rest = &s->doubts[s->nr_doubts++];
		*rest = *d;
		rest->dump_addr += at - d->start;
		rest->start = at;
		d->end = at;
	}
	return 0;
}

void lp_drop_doubt(struct lp_space *s, size_t i, struct lp_counts *dropped)
{
	struct lp_doubt d = s->doubts[i];

	lp_drop_dumped(s, d.dump_addr, d.dump_addr + (d.end - d.start), dropped);
	s->doubts[i] = s->doubts[--s->nr_doubts];
}

int lp_doubts_gone(struct lp_space *s, uint64_t start, uint64_t end, struct lp_counts *dropped)
{
	if (lp_split_doubts(s, start) || lp_split_doubts(s, end))
		return -ENOMEM;
	for (size_t i = s->nr_doubts; i--;)
		if (s->doubts[i].start >= start && s->doubts[i].end <= end)
			lp_drop_doubt(s, i, dropped);
	return 0;
}

int lp_move_doubts(struct lp_space *s, uint64_t from, uint64_t to, uint64_t len, struct lp_counts *dropped)
{
	if (lp_split_doubts(s, from) || lp_split_doubts(s, from + len))
		return -ENOMEM;
	for (size_t i = s->nr_doubts; i--;) {
		struct lp_doubt *d = &s->doubts[i];

		if (d->start < from || d->end > from + len)
			continue;
		if (from < d->edge && d->edge <= d->start) {
			lp_drop_doubt(s, i, dropped);
			continue;
		}
		d->start += to - from;
		d->end += to - from;
		d->edge = LP_NO_EDGE;
		d->top = 0;
		d->unsure = true;
	}
	return 0;
}

size_t lp_space_nr_doubts(const struct lp_space *s)
{
	return s->nr_doubts;
}

struct lp_doubt lp_space_doubt(const struct lp_space *s, size_t i)
{
	return s->doubts[i];
}

void lp_space_asked(struct lp_space *s, size_t i)
{
	s->doubts[i].asked = true;
}

bool lp_space_in_doubt(const struct lp_space *s, const struct lp_doubt *d)
{
	return lp_pending_of_dumped(s, d->dump_addr, d->dump_addr + (d->end - d->start));
}

void lp_space_mark_doubts_lost(struct lp_space *s, uint64_t start, uint64_t end)
{
	for (size_t i = 0; i < s->nr_doubts; i++) {
		const struct lp_doubt *d = &s->doubts[i];
		uint64_t from = lp_page_from(s->extents, d->dump_addr);

		if (d->start < end && d->end > start)
			lp_space_mark_lost_for_good(s, from, lp_page_from(s->extents, d->dump_addr + (d->end - d->start)) - from);
	}
}

size_t lp_space_not_pending(const struct lp_space *s, const struct lp_doubt *d, uint64_t *addrs, size_t max)
{
	size_t nr = 0;

	for (uint64_t at = d->start; at < d->end && nr < max; at += LP_PAGE_SIZE) {
		uint64_t dump_addr = d->dump_addr + (at - d->start), next = lp_page_from(s->extents, dump_addr);

		if (lp_page_from(s->extents, dump_addr + LP_PAGE_SIZE) == next || !lp_test_bit(s->pending, next))
			addrs[nr++] = at;
	}
	return nr;
}

void lp_space_refill(struct lp_space *s, uint64_t start, uint64_t end)
{
	for (size_t i = 0; i < s->nr_doubts; i++)
		if (s->doubts[i].start <= end && s->doubts[i].end > start)
			s->doubts[i].refilled = true;
}

void lp_space_obscure(struct lp_space *s, uint64_t start, uint64_t end)
{
	for (size_t i = 0; i < s->nr_doubts; i++) {
		struct lp_doubt *d = &s->doubts[i];

		if ((d->start < end && d->end > start) || (d->edge <= end && d->start >= end && d->top >= end))
			d->edge = LP_NO_EDGE;
	}
}

bool lp_unsettles(const struct lp_range *range, const struct lp_doubt *doubt)
{
	return range->start < doubt->top && range->end >= doubt->edge;
}
