#include "late.h"

#include <errno.h>
#include <stdlib.h>
#include <string.h>

/* The index of the region that contains addr, or of the next one above; nr_regions if there is none. */
static size_t region_from(const struct lp_space *s, uint64_t addr)
{
	const struct lp_region *regions = lp_space_regions(s);
	size_t lo = 0, hi = lp_space_nr_regions(s);

	while (lo < hi) {
		size_t mid = lo + (hi - lo) / 2;

		if (regions[mid].end <= addr)
			lo = mid + 1;
		else
			hi = mid;
	}
	return lo;
}

static bool is_taken(const struct lp_space *s, uint64_t addr)
{
	size_t r = region_from(s, addr);

	return r < lp_space_nr_regions(s) && lp_space_regions(s)[r].start <= addr;
}

static bool holds(uint64_t start, uint64_t len, uint64_t addr)
{
	return start <= addr && addr - start < len;
}

static bool departs(const struct lp_change *change, uint64_t addr)
{
	return (change->kind == LP_UNMAPPED || change->kind == LP_REMAPPED) && holds(change->start, change->len, addr);
}

static bool arrives(const struct lp_change *change, uint64_t addr)
{
	return change->kind == LP_REMAPPED && holds(change->to, change->len, addr);
}

/* mates[i]: the index of the UNMAP event that the mremap i has sent for its source range, and vice versa; nr: none. */
static void find_mates(const struct lp_change *changes, size_t nr, size_t *mates)
{
	for (size_t i = 0; i < nr; i++)
		mates[i] = nr;
	for (size_t k = 0; k < nr; k++)
		for (size_t i = 0; i < k && changes[k].kind == LP_UNMAPPED && mates[k] == nr; i++)
			if (changes[i].kind == LP_REMAPPED && mates[i] == nr && changes[i].start == changes[k].start &&
			    changes[i].len == changes[k].len) {
				mates[i] = k;
				mates[k] = i;
			}
}

/* The contents of one address, according to the reports. */
struct place {
	int here;	/* number of memories there; more than 1: the report of a departure is late */
	bool unknown;	/* after an arrival, more has departed than was known to be there */
	bool arrived;
};

static void follow(struct place *p, const struct lp_change *changes, const size_t *mates, size_t nr, size_t i, uint64_t addr)
{
	if (arrives(&changes[i], addr)) {
		p->here++;
		p->arrived = true;
	} else if (departs(&changes[i], addr) && (changes[i].kind == LP_REMAPPED) == (mates[i] < nr)) {
		/* An mremap without its UNMAP event has kept the source range (MREMAP_DONTUNMAP). */
		p->unknown |= !p->here && p->arrived;
		p->here -= p->here > 0;
	}
}

bool lp_departure_is_late(const struct lp_space *s, const struct lp_change *changes, size_t nr, size_t move,
			struct lp_range *late)
{
	uint64_t start = changes[move].to, end = start + changes[move].len;
	int here = is_taken(s, start);

	/* An mremap reports its departure twice, so this may miss a late one: then the order may stay unclear, but not wrong. */
	for (size_t i = 0; i < nr; i++)
		if (arrives(&changes[i], start))
			here += i < move;
		else if (here && departs(&changes[i], start))
			here--;
	*late = (struct lp_range){start, start + LP_PAGE_SIZE};
	for (size_t r = region_from(s, start); r < lp_space_nr_regions(s) && lp_space_regions(s)[r].start < end; r++)
		late->end = lp_space_regions(s)[r].end < end ? lp_space_regions(s)[r].end : end;
	return here > 0;
}

/* Whether the order of the departures from addr is unclear, after change `move` has arrived there. */
static bool is_unclear(const struct lp_space *s, const struct lp_change *changes, const size_t *mates, size_t nr,
		       size_t move, uint64_t addr)
{
	struct place p = {.here = is_taken(s, addr)};
	size_t returns = mates[move] < nr ? mates[move] : move;
	size_t departures = 0, early = 0, last = nr;
	bool differ = false; /* the departures differ in more than their time */
	int before = 0;

	for (size_t i = 0; i < nr; i++) {
		if (i == move)
			before = p.here;
		follow(&p, changes, mates, nr, i, addr);
		if (i <= move || !departs(&changes[i], addr) || (changes[i].kind == LP_UNMAPPED && mates[i] < nr))
			continue;
		differ |= changes[i].kind == LP_REMAPPED ||
			  (last < nr && (changes[i].start != changes[last].start || changes[i].len != changes[last].len));
		last = i;
		departures++;
		early += i < returns;
	}
	if (!differ)
		return false;
	if (p.unknown)
		return true;
	/* An mremap without an UNMAP event (MREMAP_DONTUNMAP) had returned when the waiting threads were checked. */
	if (changes[move].awaited && mates[move] < nr)
		return false;
	return before && (before > 1 || (departures > 1 && early != 1));
}

static bool is_unclear_somewhere(const struct lp_space *s, const struct lp_change *changes, const size_t *mates, size_t nr,
				 size_t move)
{
	uint64_t start = changes[move].to, end = start + changes[move].len;

	if (start >= end)
		return false;
	if (is_unclear(s, changes, mates, nr, move, start))
		return true;
	for (size_t r = region_from(s, start); r < lp_space_nr_regions(s) && lp_space_regions(s)[r].start < end; r++) {
		const struct lp_region *region = &lp_space_regions(s)[r];

		if (region->start > start && is_unclear(s, changes, mates, nr, move, region->start))
			return true;
		if (region->end < end && is_unclear(s, changes, mates, nr, move, region->end))
			return true;
	}
	for (size_t i = 0; i < nr; i++) {
		const struct lp_change *c = &changes[i];
		const uint64_t edges[] = {c->start, c->start + c->len, c->to, c->to + c->len};

		if (c->kind != LP_UNMAPPED && c->kind != LP_REMAPPED)
			continue;
		for (size_t k = 0; k < (c->kind == LP_REMAPPED ? 4 : 2); k++)
			if (start < edges[k] && edges[k] < end && is_unclear(s, changes, mates, nr, move, edges[k]))
				return true;
	}
	return false;
}

/* Whether the ranges of two changes overlap. */
static bool meet(const struct lp_change *a, const struct lp_change *b)
{
	uint64_t a_to = a->kind == LP_REMAPPED ? a->to : a->start, b_to = b->kind == LP_REMAPPED ? b->to : b->start;

	return lp_overlap(a->start, a->len, b->start, b->len) || lp_overlap(a->start, a->len, b_to, b->len) ||
	       lp_overlap(a_to, a->len, b->start, b->len) || lp_overlap(a_to, a->len, b_to, b->len);
}

int lp_unclear(const struct lp_space *s, const struct lp_change *changes, size_t nr, bool *unclear)
{
	size_t *mates = malloc((2 * nr + 1) * sizeof(*mates)), *next = mates + nr, found = 0;

	if (!mates)
		return -ENOMEM;
	memset(unclear, 0, nr * sizeof(*unclear));
	find_mates(changes, nr, mates);
	for (size_t i = 0; i < nr; i++)
		if (changes[i].kind == LP_REMAPPED && is_unclear_somewhere(s, changes, mates, nr, i)) {
			unclear[i] = true;
			next[found++] = i;
		}
	/* A wrong order of one change would make the overlapping changes wrong, too. */
	for (size_t k = 0; k < found; k++)
		for (size_t i = 0; i < nr; i++)
			if (!unclear[i] && changes[i].kind != LP_FORKED && changes[i].kind != LP_QUESTION &&
			    meet(&changes[next[k]], &changes[i])) {
				unclear[i] = true;
				next[found++] = i;
			}
	free(mates);
	return (int)found;
}
