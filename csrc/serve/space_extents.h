/*
 * The lazy extents of a checkpoint by address at dump time: immutable, shared by forked tasks.  Pure.
 *
 * Page k of all extents laid end to end has the index k: bitmaps are indexed by it, so that their size follows the data and not the
 * address range.
 */
#ifndef LAZYPAGES_SPACE_EXTENTS_H
#define LAZYPAGES_SPACE_EXTENTS_H

#include <stdatomic.h>
#include <stddef.h>
#include <stdint.h>
#include "common/extent.h"
#include "common/page.h"

/* An extent, with the index index of its first page; its length is the next one's less its own. */
struct lp_slot {
	uint64_t start;
	uint64_t index;
	uint64_t offset;
	uint32_t source;
};

struct lp_extents {
	atomic_int refs;
	size_t nr;
	uint64_t nr_pages;
	uint64_t *marks; /* where slots 0, 64, 128, ... start */
	size_t nr_marks;
	struct lp_slot slots[]; /* nr, then one that closes the table */
};

static inline uint64_t lp_slot_pages(const struct lp_extents *dump_addr, size_t i)
{
	return dump_addr->slots[i + 1].index - dump_addr->slots[i].index;
}

static inline uint64_t lp_slot_end(const struct lp_extents *dump_addr, size_t i)
{
	return dump_addr->slots[i].start + (lp_slot_pages(dump_addr, i) << LP_PAGE_SHIFT);
}

/* NULL with errno set: EINVAL when extents are not sorted and disjoint, ENOMEM. */
struct lp_extents *lp_extents_new(const struct lp_extent *extents, size_t nr);
void lp_extents_put(struct lp_extents *extents);
/* First slot that ends after an address at dump time; nr when there is none. */
size_t lp_slot_at(const struct lp_extents *extents, uint64_t addr);
/* The slot that holds the page of this index (which must exist). */
size_t lp_slot_of_page(const struct lp_extents *extents, uint64_t index);
/* Index of the first page at or after an address at dump time. */
uint64_t lp_page_from(const struct lp_extents *extents, uint64_t addr);

#endif
