/*
 * Chains of pagemaps: the placement against the rule of images_spec/placement.md page by page, and what is made of it.
 *
 * An input is a byte of options, then for each level how many entries it has, and three bytes for each: pages between it and the
 * one before, pages, flags; then spans: pages between, pages.
 */
#include "images/placement.h"

#include "fuzz.h"

#define LEVELS 3
#define ENTRIES 16
#define SPANS 8
#define MOST 4 /* pages of an entry, or between two */
#define PAGES (ENTRIES * (2 * MOST - 1))
#define BASE ((uint64_t)0x10000)

struct where {
	uint64_t offset;
	uint32_t source;
	int there, lazy;
};

static struct lp_pagemap_entry entries[2][LEVELS][ENTRIES];
static struct where expected[PAGES], other[PAGES], got[PAGES];

static void take_levels(struct input *in, struct lp_level *levels, struct lp_pagemap_entry (*room)[ENTRIES], uint32_t nr)
{
	for (uint32_t l = 0; l < nr; l++) {
		uint64_t at = BASE;

		levels[l].entries = room[l];
		levels[l].count = take(in) % (ENTRIES + 1);
		for (uint64_t i = 0; i < levels[l].count; i++) {
			at += take(in) % MOST * PAGE;
			room[l][i] = (struct lp_pagemap_entry){at, 1 + take(in) % MOST, take(in) & 7, 0};
			at += room[l][i].nr_pages * PAGE;
		}
	}
}

static const struct lp_pagemap_entry *find(const struct lp_level *level, uint64_t address, uint64_t *present)
{
	*present = 0;
	for (uint64_t i = 0; i < level->count; i++) {
		const struct lp_pagemap_entry *entry = &level->entries[i];

		if (address >= entry->vaddr && address < entry->vaddr + entry->nr_pages * PAGE)
			return entry;
		if (entry->flags & LP_PE_PRESENT)
			*present += entry->nr_pages;
	}
	return NULL;
}

/* The rule, for one page. */
static struct where rule(const struct lp_level *levels, uint32_t nr, int remote, uint64_t address)
{
	struct where page = {.source = LP_SOURCE_LOST};

	for (uint32_t l = 0; l < nr; l++) {
		uint64_t present;
		const struct lp_pagemap_entry *entry = find(&levels[l], address, &present);

		if (!entry)
			break;
		page.there = 1;
		if (!l)
			page.lazy = !!(entry->flags & LP_PE_LAZY);
		if (entry->flags & LP_PE_PARENT)
			continue;
		if (entry->flags & LP_PE_PRESENT) {
			page.source = l;
			page.offset = present * PAGE + (address - entry->vaddr);
		} else if (!l && page.lazy && remote) {
			page.source = LP_SOURCE_REMOTE;
		}
		break;
	}
	return page;
}

static void spread(const struct lp_extents *table, struct where *pages)
{
	uint64_t before = 0;

	memset(pages, 0, sizeof(*pages) * PAGES);
	for (uint64_t i = 0; i < table->count; i++) {
		const struct lp_extent *e = &table->extents[i];

		CHECK(e->nr_pages && e->start % PAGE == 0 && e->start >= before && e->lazy <= 1);
		before = e->start + e->nr_pages * PAGE;
		CHECK(before <= BASE + PAGES * PAGE);
		for (uint64_t k = 0; k < e->nr_pages; k++)
			pages[(e->start - BASE) / PAGE + k] = (struct where){
				e->source < LP_SOURCE_REMOTE ? e->offset + k * PAGE : 0, e->source, 1, (int)e->lazy};
	}
}

static void check_same(const struct lp_extents *table, const struct where *pages)
{
	spread(table, got);
	for (uint64_t i = 0; i < PAGES; i++) {
		CHECK(got[i].there == pages[i].there);
		CHECK(!got[i].there || (got[i].source == pages[i].source && got[i].offset == pages[i].offset &&
					got[i].lazy == pages[i].lazy));
	}
}

static void check_spans(const struct lp_extents *table, const struct where *pages, uint32_t nr, struct input *in)
{
	static struct lp_page_count counts[SPANS * (LEVELS + 2)], counted[SPANS * (LEVELS + 2)];
	static struct where left[PAGES];
	static int covered[PAGES];
	struct lp_span spans[SPANS], found;
	struct lp_extents rest;
	uint64_t nr_spans = take(in) % (SPANS + 1), at = BASE, first = PAGES;

	memcpy(left, pages, sizeof(left));
	memset(counts, 0, sizeof(counts));
	memset(counted, 0, sizeof(counted));
	memset(covered, 0, sizeof(covered));
	for (uint64_t s = 0; s < nr_spans; s++) {
		at += take(in) % 16 * PAGE;
		spans[s].start = at;
		at += (1 + take(in) % 16) * PAGE;
		spans[s].end = at;
		for (uint64_t k = (spans[s].start - BASE) / PAGE; k < (at - BASE) / PAGE && k < PAGES; k++) {
			uint32_t source = pages[k].source;
			uint32_t row = source == LP_SOURCE_REMOTE ? nr : source == LP_SOURCE_LOST ? nr + 1 : source;

			covered[k] = 1;
			left[k].there = 0;
			if (pages[k].there && pages[k].lazy)
				counted[s * (nr + 2) + row].lazy++;
			else if (pages[k].there)
				counted[s * (nr + 2) + row].eager++;
		}
	}
	lp_count_pages(table, nr, spans, nr_spans, counts);
	CHECK(!memcmp(counts, counted, sizeof(counts)));
	for (uint64_t k = PAGES; k--;)
		if (pages[k].there && pages[k].lazy && !covered[k])
			first = k;
	CHECK(lp_find_uncovered(table, spans, nr_spans, &found) == (first < PAGES));
	CHECK(first == PAGES || (found.start == BASE + first * PAGE && found.end > found.start));
	CHECK(!lp_exclude(table, spans, nr_spans, &rest));
	check_same(&rest, left);
	lp_extents_free(&rest);
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
	struct input in = {data, size};
	uint8_t options = take(&in);
	int remote = options & 1;
	uint32_t nr = 1 + (options >> 1 & 3) % LEVELS;
	struct lp_level levels[LEVELS], others[1];
	struct lp_extents table, second, filled;

	take_levels(&in, levels, entries[0], nr);
	take_levels(&in, others, entries[1], 1);
	for (uint64_t i = 0; i < PAGES; i++) {
		expected[i] = rule(levels, nr, remote, BASE + i * PAGE);
		other[i] = rule(others, 1, remote, BASE + i * PAGE);
	}
	CHECK(!lp_place(levels, nr, remote, &table));
	check_same(&table, expected);
	check_spans(&table, expected, nr, &in);
	CHECK(!lp_place(others, 1, remote, &second));
	check_same(&second, other);
	CHECK(!lp_fill(&table, nr, &second, &filled));
	for (uint64_t i = 0; i < PAGES; i++)
		if (expected[i].there && expected[i].lazy && expected[i].source >= LP_SOURCE_REMOTE && other[i].there &&
		    other[i].source < LP_SOURCE_REMOTE) {
			expected[i].source = nr + other[i].source;
			expected[i].offset = other[i].offset;
		}
	check_same(&filled, expected);
	lp_extents_free(&filled);
	lp_extents_free(&second);
	lp_extents_free(&table);
	return 0;
}
