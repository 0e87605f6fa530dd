#include "space_inner.h"

static bool taken(const struct lp_space *s, uint64_t start, uint64_t end)
{
	size_t r = lp_region_at(s, start);

	return start < end && r < s->nr_regions && s->regions[r].start < end;
}

/* Whether a change leaves some of [start, end) that is taken. */
static bool leaves(const struct lp_space *s, const struct lp_change *change, uint64_t start, uint64_t end)
{
	if (change->kind != LP_UNMAPPED && change->kind != LP_REMAPPED)
		return false;
	return taken(s, change->start > start ? change->start : start, lp_min(end, change->start + change->len));
}

/*
 * Which of the first nr changes, of all, leaves [start, end), where something is; nr when none of these does.  Not change
 * `but`, which moves there.
 */
static size_t next_departure(const struct lp_space *s, const struct lp_change *changes, size_t nr, size_t all, size_t but,
			 uint64_t start, uint64_t end, bool quiescent)
{
	/* what a move has left is unmapped by the same mremap, not by the thread that moves there next */
	for (size_t left = 0; left < s->nr_left; left++) {
		const struct lp_range *range = &s->left[left];

		if (lp_first_empty(s, range->start > start ? range->start : start, lp_min(range->end, end)) ==
		    s->nr_regions)
			continue;
		/* if there is none for this mremap, the thread that moves the rest away has unmapped it */
		size_t unmaps = all, moves = all;
		int more = 0; /* unmapped than moved away since */

		for (size_t i = all; i--;) {
			if (changes[i].start != range->start || changes[i].len != range->end - range->start)
				continue;
			if (changes[i].kind == LP_UNMAPPED) {
				unmaps = i;
				more++;
			} else if (changes[i].kind == LP_REMAPPED && i != but && unmaps < all) { /* reported before */
				moves = i;
				more--;
			}
		}
		/* only what has been reported before the first of them */
		for (size_t i = unmaps; moves < all && i < all; i++)
			if (changes[i].kind == LP_REMAPPED && i != but && changes[i].start == range->start &&
			    changes[i].len == range->end - range->start)
				more++;
		if (moves > unmaps)
			moves = all;
		if (more > 0 || moves >= all) {
			if (unmaps < nr)
				return unmaps;
		} else if (moves < nr) {
			return moves;
		}
		if (!quiescent)
			return nr;
	}
	for (size_t i = 0; i < nr; i++)
		if (i != but && leaves(s, &changes[i], start, end))
			return i;
	return nr;
}

/* Whether a change has to wait until the layout is quiescent: what it reports may not be so, or not be all. */
static bool must_wait(const struct lp_space *s, const struct lp_change *change)
{
	return change->kind == LP_FORKED || change->kind == LP_REMAPPED || change->kind == LP_QUESTION ||
	       (change->kind == LP_UNMAPPED && lp_space_matters(s, change->start, change->start + change->len));
}

/* Of the changes reported so far; nr: none before more is reported. */
static size_t next_so_far(const struct lp_space *s, const struct lp_change *changes, size_t nr, size_t all, bool quiescent)
{
	size_t next = 0, first;

	while (next < nr && changes[next].kind == LP_FORKED)
		next++;
	first = next;
	for (size_t steps = 0; next < nr && steps < nr; steps++) {
		const struct lp_change *change = &changes[next];
		size_t before;

		if (change->kind != LP_REMAPPED || !taken(s, change->to, change->to + change->len))
			return next;
		before = next_departure(s, changes, nr, all, next, change->to, change->to + change->len, quiescent);
		if (before == nr)
			return quiescent ? next : nr;
		next = before;
	}
	return first; /* each waits for another: no kernel reports that */
}

/* An mremap to a given place unmaps what is there first, and reports that before the move (mm/mremap.c, mremap_to). */
static size_t or_what_clears_its_place(const struct lp_change *changes, size_t next)
{
	for (size_t i = next; i-- && changes[next].kind == LP_REMAPPED;)
		if (changes[i].kind == LP_UNMAPPED && changes[i].start == changes[next].to)
			return i;
	return next;
}

size_t lp_space_next_change(const struct lp_space *s, const struct lp_change *changes, size_t nr, bool quiescent)
{
	size_t next;

	if (!quiescent)
		return nr && !must_wait(s, &changes[0]) ? 0 : nr;
	/* what could be made when only so many had been reported */
	for (size_t reported = 1; reported <= nr; reported++) {
		next = next_so_far(s, changes, reported, nr, false);
		if (next < reported)
			return or_what_clears_its_place(changes, next);
	}
	next = next_so_far(s, changes, nr, nr, true);
	return next < nr ? or_what_clears_its_place(changes, next) : 0; /* only forks are left */
}

void lp_true_lengths(struct lp_change *changes, size_t nr)
{
	for (size_t i = 0; i < nr; i++) {
		struct lp_change *move = &changes[i];
		bool found = move->kind != LP_REMAPPED;

		for (size_t k = i + 1; k < nr && !found; k++) {
			const struct lp_change *head = &changes[k];

			/* another move from there, which left it to MREMAP_DONTUNMAP: what follows is that one's */
			if (head->kind == LP_REMAPPED && head->start == move->start)
				break;
			if (head->kind != LP_UNMAPPED || head->start != move->start || head->len > move->len)
				continue;
			found = head->len == move->len;
			for (size_t m = i + 1; m < nr && !found; m++)
				if (changes[m].kind == LP_UNMAPPED && changes[m].start == head->start + head->len &&
				    changes[m].len == move->len - head->len) {
					move->len = head->len;
					found = true;
				}
		}
	}
}
