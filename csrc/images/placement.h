/*
 * The rule that finds the data of each page (images_spec/placement.md).
 */
#ifndef LAZYPAGES_PLACEMENT_H
#define LAZYPAGES_PLACEMENT_H

#include <stdint.h>

#include "common/extent.h"
#include "pagemap.h"

/* One level of a chain. Without pages of the task: count 0. */
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
 * Places every page of the top level, levels[0], in time linear in the entries of all
 * levels. `remote`: a page server has the pages that are lazy and nowhere in
 * the chain. Returns 0, or -1 if out of memory. Free *table with
 * lp_extents_free() after success only.
 */
int lp_place(const struct lp_level *levels, uint32_t nr_levels, int remote, struct lp_extents *table);
void lp_extents_free(struct lp_extents *table);

/*
 * Copies `top`, but takes pages that are lazy and in no level of `top` from
 * `other` if one of its levels has them; the levels of `other` are numbered from nr_levels on.
 * Linear in the extents of both. Returns 0, or -1 if out of memory.
 */
int lp_fill(const struct lp_extents *top, uint32_t nr_levels, const struct lp_extents *other,
	    struct lp_extents *table);

/*
 * Copies `all` without the pages in the spans (guard regions), which are sorted and disjoint.
 * Linear in extents and spans. Returns 0, or -1 if out of memory.
 */
int lp_exclude(const struct lp_extents *all, const struct lp_span *spans, uint64_t nr_spans,
	       struct lp_extents *table);

/*
 * Counts the pages in each of the spans, which are sorted and disjoint.
 * Stores nr_levels + 2 counts for each span: one for each level, then remote, then lost.
 */
void lp_count_pages(const struct lp_extents *table, uint32_t nr_levels, const struct lp_span *spans,
		    uint64_t nr_spans, struct lp_page_count *counts);

/*
 * Whether every lazy page lies in one of the spans, which are sorted and
 * disjoint: 0, or 1 and the first run of pages that does not.
 */
int lp_find_uncovered(const struct lp_extents *table, const struct lp_span *spans, uint64_t nr_spans,
		      struct lp_span *found);

#endif
