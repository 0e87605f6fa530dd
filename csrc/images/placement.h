/*
 * The one rule that tells where a page is (images_spec/placement.md).
 */
#ifndef LAZYPAGES_PLACEMENT_H
#define LAZYPAGES_PLACEMENT_H

#include <stdint.h>

#include "common/extent.h"
#include "pagemap.h"

/* One level of a chain. A level that holds nothing of the task: count 0. */
struct lp_level {
	const struct lp_pagemap_entry *entries;
	uint64_t count;
};

struct lp_extents {
	struct lp_extent *extents;
	uint64_t count;
};

/* Addresses [start, end). */
struct lp_span {
	uint64_t start;
	uint64_t end;
};

struct lp_page_count {
	uint64_t lazy;
	uint64_t eager;
};

/*
 * Places every page of the top level, levels[0]. Linear in the entries of all
 * levels. `remote`: there is a source for pages that are lazy and nowhere in
 * the chain. 0, or -1 when memory is short. *table is to be freed with
 * lp_extents_free after success only.
 */
int lp_place(const struct lp_level *levels, uint32_t nr_levels, int remote, struct lp_extents *table);
void lp_extents_free(struct lp_extents *table);

/*
 * The same pages, but those that are lazy and in no level of `top` taken from
 * `other` where a level holds them there; its levels count on from nr_levels.
 * Linear in the extents of both. 0, or -1 when memory is short.
 */
int lp_fill(const struct lp_extents *top, uint32_t nr_levels, const struct lp_extents *other,
	    struct lp_extents *table);

/*
 * The same pages without those in the spans, which are sorted and do not
 * overlap: guard regions. Linear in extents and spans. 0, or -1 when memory
 * is short.
 */
int lp_exclude(const struct lp_extents *all, const struct lp_span *spans, uint64_t nr_spans,
	       struct lp_extents *table);

/*
 * Adds up the pages in each of the spans, which are sorted and do not overlap:
 * nr_levels + 2 counts a span, one for each level, then remote, then lost.
 */
void lp_count_pages(const struct lp_extents *table, uint32_t nr_levels, const struct lp_span *spans,
		    uint64_t nr_spans, struct lp_page_count *counts);

/*
 * Whether every lazy page lies in one of the spans, which are sorted and do
 * not overlap. 0, or 1 with the first run of pages that does not.
 */
int lp_find_uncovered(const struct lp_extents *table, const struct lp_span *spans, uint64_t nr_spans,
		      struct lp_span *found);

#endif
