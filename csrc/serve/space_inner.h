/*
 * The address space's own types, and the functions that space_*.c and address_space.c have in common.  Others know
 * csrc/serve/address_space.h.
 */
#ifndef LAZYPAGES_SPACE_INNER_H
#define LAZYPAGES_SPACE_INNER_H

#include "address_space.h"
#include "space_extents.h"
#include "page_bits.h"

struct lp_space {
	struct lp_extents *extents;
	struct lp_region *regions;
	size_t nr_regions, cap_regions;
	uint32_t *by_dump_addr; /* regions sorted by address at dump time; valid while by_dump_addr_valid */
	bool by_dump_addr_valid;
	struct lp_range *wiped; /* by address at dump time, in no order */
	size_t nr_wiped;
	lp_word *pending, *claimed, *lost;
	lp_word *unknown; /* lost for good: where they are is not known */
	_Atomic uint64_t nr_pending, nr_lost;
	struct lp_range *left; /* by mremap; that these are unmapped is reported later, unless they stay */
	size_t nr_left, cap_left;
	struct lp_doubt *doubts; /* in no order */
	size_t nr_doubts, cap_doubts;
	struct lp_range *gone; /* what changes have left since the layout was quiescent */
	size_t nr_gone, cap_gone;
};

static inline size_t lp_nr_words(const struct lp_extents *extents)
{
	return (extents->nr_pages + 63) / 64;
}

static inline uint64_t lp_min(uint64_t a, uint64_t b)
{
	return a < b ? a : b;
}

static inline uint64_t lp_pages_between(uint64_t start, uint64_t end)
{
	return (end - start) >> LP_PAGE_SHIFT;
}

/* First region that ends after addr. */
static inline size_t lp_region_at(const struct lp_space *s, uint64_t addr)
{
	size_t lo = 0, hi = s->nr_regions;

	while (lo < hi) {
		size_t mid = lo + (hi - lo) / 2;

		if (s->regions[mid].end <= addr)
			lo = mid + 1;
		else
			hi = mid;
	}
	return lo;
}

/* Pages of a word that wait to be brought: pending, not on the way, not lost. */
static inline uint64_t lp_wanted(const struct lp_space *s, uint64_t word)
{
	return atomic_load(&s->pending[word]) & ~atomic_load(&s->claimed[word]) & ~atomic_load(&s->lost[word]);
}

/* ---- space_pages.c ---- */

/* The counter of a source. */
uint64_t *lp_counter_of(const struct lp_counts *counts, uint32_t source);
/* The pages dumped at [start, end) are not waited for any more. */
void lp_drop_dumped(struct lp_space *s, uint64_t start, uint64_t end, struct lp_counts *dropped);
/* The same of what regions have in [start, end). */
void lp_drop_regions(struct lp_space *s, uint64_t start, uint64_t end, struct lp_counts *dropped);
/* Pages dumped at [start, end) that are pending. */
uint64_t lp_pending_of_dumped(const struct lp_space *s, uint64_t start, uint64_t end);

/* ---- space_regions.c ---- */

/* 0 or -ENOMEM */
int lp_reserve_regions(struct lp_space *s, size_t more);
/* Cuts [start, end) out of the regions; there is room for one more. */
void lp_cut_regions(struct lp_space *s, uint64_t start, uint64_t end);
/* Puts regions, which follow each other, where nothing is; there is room. */
void lp_insert_regions(struct lp_space *s, const struct lp_region *regions, size_t nr);
/* The first region in [start, end) that is empty; nr_regions when there is none. */
size_t lp_first_empty(const struct lp_space *s, uint64_t start, uint64_t end);
/* Cuts what is empty out of [start, end); there is room for one more. */
void lp_cut_empty(struct lp_space *s, uint64_t start, uint64_t end);
/* Of places where nothing empty is any more, nothing more will be reported. */
void lp_forget_left(struct lp_space *s);

/* ---- space_doubts.c ---- */

/* 0 or -ENOMEM */
int lp_reserve_doubts(struct lp_space *s, size_t more);
/* Splits what has `at` inside, so that every doubt lies on one side of it.  0 or -ENOMEM. */
int lp_split_doubts(struct lp_space *s, uint64_t at);
void lp_drop_doubt(struct lp_space *s, size_t i, struct lp_counts *dropped);
/* What is in doubt in [start, end) is gone: something else is there.  0 or -ENOMEM. */
int lp_doubts_gone(struct lp_space *s, uint64_t start, uint64_t end, struct lp_counts *dropped);
/*
 * What is in doubt in [from, from + len) was there, or something else was, when mremap moved it.  That moves within one mapping,
 * and unmapping, even if it fails, leaves a boundary where it begins: what was moved across that had grown there since.
 * 0 or -ENOMEM.
 */
int lp_move_doubts(struct lp_space *s, uint64_t from, uint64_t to, uint64_t len, struct lp_counts *dropped);
/* Whether, when `range` is left, what is registered beside the edge of a doubt says less. */
bool lp_unsettles(const struct lp_range *range, const struct lp_doubt *doubt);

#endif
