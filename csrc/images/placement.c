/*
 * The rule that finds the data of each page. In words: images_spec/placement.md;
 * CRIU's flags: docs/criu.md ("Pagemap").
 */
#include "placement.h"

#include <stdlib.h>

#define PAGE_SIZE UINT64_C(4096)

/* Position in a level. Addresses are looked up in ascending order only. */
struct cursor {
	uint64_t index;
	uint64_t present_pages; /* in the entries before index */
};

struct builder {
	struct lp_extents table;
	uint64_t capacity;
};

static uint64_t entry_end(const struct lp_pagemap_entry *entry)
{
	return entry->vaddr + entry->nr_pages * PAGE_SIZE;
}

/* The entry of a level that contains `address`, else the first one behind it, else NULL. */
static const struct lp_pagemap_entry *seek(const struct lp_level *level, struct cursor *cursor, uint64_t address)
{
	while (cursor->index < level->count) {
		const struct lp_pagemap_entry *entry = &level->entries[cursor->index];

		if (entry_end(entry) > address)
			return entry;
		if (entry->flags & LP_PE_PRESENT)
			cursor->present_pages += entry->nr_pages;
		cursor->index++;
	}
	return NULL;
}

/*
 * The rule: where the data of the page at `address` is, for which the top level has
 * an entry. Lowers *end to the address up to which the answer is valid.
 */
static struct lp_extent place(const struct lp_level *levels, uint32_t nr_levels, int remote, struct cursor *cursors,
			      uint64_t address, uint64_t *end)
{
	struct lp_extent extent = {.start = address, .source = LP_SOURCE_LOST};

	for (uint32_t i = 0; i < nr_levels; i++) {
		const struct lp_pagemap_entry *entry = seek(&levels[i], &cursors[i], address);

		if (!entry)
			break;
		if (entry->vaddr > address) {
			if (entry->vaddr < *end)
				*end = entry->vaddr;
			break;
		}
		if (entry_end(entry) < *end)
			*end = entry_end(entry);
		if (i == 0)
			extent.lazy = !!(entry->flags & LP_PE_LAZY);
		if (entry->flags & LP_PE_PARENT)
			continue;
		if (entry->flags & LP_PE_PRESENT) {
			extent.source = i;
			extent.offset = cursors[i].present_pages * PAGE_SIZE + (address - entry->vaddr);
		} else if (i == 0 && extent.lazy && remote) {
			extent.source = LP_SOURCE_REMOTE;
		}
		break;
	}
	extent.nr_pages = (*end - address) / PAGE_SIZE;
	return extent;
}

/* Whether `next` continues `last`, so that they can be merged. */
static int continues(const struct lp_extent *last, const struct lp_extent *next)
{
	if (lp_extent_end(last) != next->start || last->source != next->source || last->lazy != next->lazy)
		return 0;
	return next->source >= LP_SOURCE_REMOTE || last->offset + (next->start - last->start) == next->offset;
}

static int append(struct builder *builder, const struct lp_extent *extent)
{
	struct lp_extents *table = &builder->table;

	if (table->count && continues(&table->extents[table->count - 1], extent)) {
		table->extents[table->count - 1].nr_pages += extent->nr_pages;
		return 0;
	}
	if (table->count == builder->capacity) {
		uint64_t capacity = builder->capacity ? 2 * builder->capacity : 16;
		struct lp_extent *grown = reallocarray(table->extents, capacity, sizeof(*grown));

		if (!grown)
			return -1;
		table->extents = grown;
		builder->capacity = capacity;
	}
	table->extents[table->count++] = *extent;
	return 0;
}

/* Moves the result to *table and frees unused capacity. */
static void finish(struct builder *builder, struct lp_extents *table)
{
	struct lp_extent *shrunk = reallocarray(builder->table.extents, builder->table.count, sizeof(*shrunk));

	if (shrunk)
		builder->table.extents = shrunk;
	*table = builder->table;
}

int lp_place(const struct lp_level *levels, uint32_t nr_levels, int remote, struct lp_extents *table)
{
	struct builder builder = {0};
	struct cursor *cursors = calloc(nr_levels, sizeof(*cursors));

	if (!cursors)
		return -1;
	for (uint64_t i = 0; i < levels[0].count; i++) {
		uint64_t stop = entry_end(&levels[0].entries[i]);

		for (uint64_t address = levels[0].entries[i].vaddr, end; address < stop; address = end) {
			struct lp_extent extent;

			end = stop;
			extent = place(levels, nr_levels, remote, cursors, address, &end);
			if (append(&builder, &extent)) {
				free(cursors);
				lp_extents_free(&builder.table);
				return -1;
			}
		}
	}
	free(cursors);
	finish(&builder, table);
	return 0;
}

int lp_fill(const struct lp_extents *top, uint32_t nr_levels, const struct lp_extents *other,
	    struct lp_extents *table)
{
	struct builder builder = {0};
	uint64_t k = 0;

	for (uint64_t i = 0; i < top->count; i++) {
		struct lp_extent rest = top->extents[i];
		uint64_t stop = lp_extent_end(&rest);

		while (rest.start < stop) {
			struct lp_extent piece = rest;
			uint64_t end = stop;

			while (k < other->count && lp_extent_end(&other->extents[k]) <= rest.start)
				k++;
			if (rest.lazy && rest.source >= LP_SOURCE_REMOTE && k < other->count) {
				const struct lp_extent *from = &other->extents[k];

				if (from->start > rest.start) {
					end = from->start < stop ? from->start : stop;
				} else {
					end = lp_extent_end(from) < stop ? lp_extent_end(from) : stop;
					if (from->source < LP_SOURCE_REMOTE) {
						piece.source = nr_levels + from->source;
						piece.offset = from->offset + (rest.start - from->start);
					}
				}
			}
			piece.nr_pages = (end - piece.start) / PAGE_SIZE;
			if (append(&builder, &piece)) {
				lp_extents_free(&builder.table);
				return -1;
			}
			if (rest.source < LP_SOURCE_REMOTE)
				rest.offset += end - rest.start;
			rest.start = end;
			rest.nr_pages = (stop - end) / PAGE_SIZE;
		}
	}
	finish(&builder, table);
	return 0;
}

int lp_exclude(const struct lp_extents *all, const struct lp_span *spans, uint64_t nr_spans,
	       struct lp_extents *table)
{
	struct builder builder = {0};
	uint64_t first = 0;

	for (uint64_t i = 0; i < all->count; i++) {
		const struct lp_extent *extent = &all->extents[i];
		uint64_t address = extent->start, stop = lp_extent_end(extent);

		while (first < nr_spans && spans[first].end <= address)
			first++;
		for (uint64_t k = first; address < stop; k++) {
			uint64_t end = k < nr_spans && spans[k].start < stop ? spans[k].start : stop;
			struct lp_extent piece = *extent;

			piece.start = address;
			if (extent->source < LP_SOURCE_REMOTE)
				piece.offset += address - extent->start;
			if (end > address) {
				piece.nr_pages = (end - address) / PAGE_SIZE;
				if (append(&builder, &piece)) {
					lp_extents_free(&builder.table);
					return -1;
				}
			}
			address = end < stop ? spans[k].end : stop;
		}
	}
	finish(&builder, table);
	return 0;
}

void lp_extents_free(struct lp_extents *table)
{
	free(table->extents);
	table->extents = NULL;
}

/* The index of a source in an array of counts. */
static uint32_t count_row(uint32_t source, uint32_t nr_levels)
{
	if (source == LP_SOURCE_REMOTE)
		return nr_levels;
	return source == LP_SOURCE_LOST ? nr_levels + 1 : source;
}

void lp_count_pages(const struct lp_extents *table, uint32_t nr_levels, const struct lp_span *spans,
		    uint64_t nr_spans, struct lp_page_count *counts)
{
	uint64_t first = 0;

	for (uint64_t k = 0; k < nr_spans; k++, counts += nr_levels + 2) {
		while (first < table->count && lp_extent_end(&table->extents[first]) <= spans[k].start)
			first++;
		for (uint64_t i = first; i < table->count && table->extents[i].start < spans[k].end; i++) {
			const struct lp_extent *extent = &table->extents[i];
			struct lp_page_count *count = &counts[count_row(extent->source, nr_levels)];
			uint64_t start = extent->start > spans[k].start ? extent->start : spans[k].start;
			uint64_t end = lp_extent_end(extent) < spans[k].end ? lp_extent_end(extent) : spans[k].end;

			*(extent->lazy ? &count->lazy : &count->eager) += (end - start) / PAGE_SIZE;
		}
	}
}

int lp_find_uncovered(const struct lp_extents *table, const struct lp_span *spans, uint64_t nr_spans,
		      struct lp_span *found)
{
	uint64_t k = 0;

	for (uint64_t i = 0; i < table->count; i++) {
		const struct lp_extent *extent = &table->extents[i];
		uint64_t address = extent->start, stop = lp_extent_end(extent);

		if (!extent->lazy)
			continue;
		while (address < stop) {
			while (k < nr_spans && spans[k].end <= address)
				k++;
			if (k == nr_spans || spans[k].start > address) {
				found->start = address;
				found->end = k < nr_spans && spans[k].start < stop ? spans[k].start : stop;
				return 1;
			}
			address = spans[k].end;
		}
	}
	return 0;
}
