#define _GNU_SOURCE
#include "space_inner.h"

#include <stdlib.h>

static uint32_t kind_of(const struct lp_space *s, const struct lp_slot *slot, uint64_t d)
{
	if (!lp_test_bit(s->pending, d))
		return LP_ZERO;
	if (lp_test_bit(s->lost, d))
		return LP_LOST;
	if (lp_test_bit(s->claimed, d))
		return LP_CLAIMED;
	return slot->source == LP_SOURCE_REMOTE ? LP_REMOTE : LP_DATA;
}

struct lp_answer lp_space_lookup(const struct lp_space *s, uint64_t addr, uint64_t max_pages)
{
	struct lp_answer a = {.kind = LP_ZERO, .addr = addr, .image = addr, .nr_pages = max_pages};
	size_t r = lp_region_at(s, addr);
	const struct lp_region *region = &s->regions[r];
	const struct lp_slot *slot;
	size_t i;

	if (r == s->nr_regions)
		return a;
	if (addr < region->start) {
		a.nr_pages = lp_min(max_pages, lp_pages_between(addr, region->start));
		return a;
	}
	a.image = region->image + (addr - region->start);
	max_pages = lp_min(max_pages, lp_pages_between(addr, region->end));
	i = lp_slot_at(s->extents, a.image);
	slot = &s->extents->slots[i];
	if (i == s->extents->nr || a.image < slot->start) {
		a.nr_pages = lp_min(max_pages, lp_pages_between(a.image, slot->start));
		return a;
	}
	a.dense = slot->dense + lp_pages_between(slot->start, a.image);
	a.kind = kind_of(s, slot, a.dense);
	a.source = slot->source;
	a.offset = slot->offset + (a.image - slot->start);
	max_pages = lp_min(max_pages, slot[1].dense - a.dense);
	for (a.nr_pages = 1; a.nr_pages < max_pages; a.nr_pages++)
		if (kind_of(s, slot, a.dense + a.nr_pages) != a.kind)
			break;
	return a;
}

uint64_t lp_space_lookback(const struct lp_space *s, const struct lp_answer *at, uint64_t max_pages)
{
	const struct lp_region *region = &s->regions[lp_region_at(s, at->addr)];
	const struct lp_slot *slot = &s->extents->slots[lp_slot_of_page(s->extents, at->dense)];
	uint64_t n = 0;

	max_pages = lp_min(max_pages, lp_pages_between(region->start, at->addr));
	max_pages = lp_min(max_pages, at->dense - slot->dense);
	while (n < max_pages && kind_of(s, slot, at->dense - n - 1) == at->kind)
		n++;
	return n;
}

/* First wanted page in [d, end), or end. */
static uint64_t next_wanted(const struct lp_space *s, uint64_t d, uint64_t end)
{
	LP_FOR_WORDS(d, end - d, word, mask) {
		uint64_t bits = lp_wanted(s, word) & mask;

		if (bits)
			return word * 64 + (uint64_t)__builtin_ctzll(bits);
	}
	return end;
}

bool lp_space_next(const struct lp_space *s, uint64_t cursor, uint64_t max_pages, bool remote,
		   struct lp_answer *answer)
{
	for (size_t r = lp_region_at(s, cursor); r < s->nr_regions; r++) {
		const struct lp_region *region = &s->regions[r];
		uint64_t from = cursor > region->start ? cursor - region->start : 0;
		uint64_t d = lp_page_from(s->extents, region->image + from);
		uint64_t end = lp_page_from(s->extents, region->image + (region->end - region->start));

		while ((d = next_wanted(s, d, end)) < end) {
			size_t i = lp_slot_of_page(s->extents, d);
			const struct lp_slot *slot = &s->extents->slots[i];

			if ((slot->source == LP_SOURCE_REMOTE) != remote) {
				do
					slot++;
				while (slot->dense < end && (slot->source == LP_SOURCE_REMOTE) != remote);
				d = slot->dense;
				continue;
			}
			*answer = lp_space_lookup(s,
						  region->start + (slot->start - region->image) +
							  ((d - slot->dense) << LP_PAGE_SHIFT),
						  max_pages);
			if (answer->kind == LP_DATA || answer->kind == LP_REMOTE)
				return true;
			d++; /* somebody was faster */
		}
	}
	return false;
}

static int compare_image(const void *a, const void *b, void *regions)
{
	const struct lp_region *ra = (const struct lp_region *)regions + *(const uint32_t *)a;
	const struct lp_region *rb = (const struct lp_region *)regions + *(const uint32_t *)b;

	return (ra->image > rb->image) - (ra->image < rb->image);
}

void lp_space_index(struct lp_space *s)
{
	uint32_t *order;

	if (s->by_image_valid)
		return;
	order = realloc(s->by_image, (s->nr_regions + 1) * sizeof(*order));
	if (!order)
		return; /* lp_space_locate does without */
	for (size_t r = 0; r < s->nr_regions; r++)
		order[r] = (uint32_t)r;
	qsort_r(order, s->nr_regions, sizeof(*order), compare_image, s->regions);
	s->by_image = order;
	s->by_image_valid = true;
}

static bool in_region(const struct lp_region *region, uint64_t image, uint64_t *addr)
{
	if (image - region->image >= region->end - region->start)
		return false;
	*addr = region->start + (image - region->image);
	return true;
}

bool lp_space_locate(const struct lp_space *s, uint64_t image, uint64_t *addr)
{
	size_t lo = 0, hi = s->nr_regions;

	if (!s->by_image_valid) {
		for (size_t r = 0; r < s->nr_regions; r++)
			if (in_region(&s->regions[r], image, addr))
				return true;
		return false;
	}
	while (lo < hi) {
		size_t mid = lo + (hi - lo) / 2;

		if (s->regions[s->by_image[mid]].image <= image)
			lo = mid + 1;
		else
			hi = mid;
	}
	return lo && in_region(&s->regions[s->by_image[lo - 1]], image, addr);
}

uint64_t lp_space_claim(struct lp_space *s, uint64_t dense, uint64_t nr)
{
	uint64_t got = 0;

	LP_FOR_WORDS(dense, nr, word, mask) {
		uint64_t claimed = atomic_load(&s->claimed[word]), want, length;

		/*
		 * Compare-and-swap: no page may look claimed, not even for a moment, by someone who does not bring it
		 * or wakes those who wait for it.
		 */
		do {
			want = atomic_load(&s->pending[word]) & ~claimed & ~atomic_load(&s->lost[word]) & mask;
			want >>= d_ % 64;
			length = ~want ? (uint64_t)__builtin_ctzll(~want) : 64;
			if (!length)
				return got;
			want = lp_mask_of(d_ % 64, d_ % 64 + length);
		} while (!atomic_compare_exchange_weak(&s->claimed[word], &claimed, claimed | want));
		got += length;
		if (want != mask)
			break;
	}
	return got;
}

uint64_t lp_space_commit(struct lp_space *s, uint64_t dense, uint64_t nr)
{
	uint64_t done = lp_clear_bits(s->pending, dense, nr);

	lp_clear_bits(s->claimed, dense, nr);
	atomic_fetch_sub(&s->nr_lost, lp_clear_bits(s->lost, dense, nr));
	atomic_fetch_sub(&s->nr_pending, done);
	return done;
}

void lp_space_release(struct lp_space *s, uint64_t dense, uint64_t nr)
{
	lp_clear_bits(s->claimed, dense, nr);
}

/*
 * Another source may bring a page at this very moment: what is not pending any more after it was marked can't be lost, and
 * lp_space_commit, which looks in the opposite order, may have come too early to take the mark away.  Counted before it is
 * marked, so that the count never falls below zero.
 */
void lp_space_lose(struct lp_space *s, uint64_t dense, uint64_t nr)
{
	LP_FOR_WORDS(dense, nr, word, mask) {
		uint64_t bits = atomic_load(&s->pending[word]) & mask, not_new, arrived;

		atomic_fetch_add(&s->nr_lost, (uint64_t)__builtin_popcountll(bits));
		not_new = atomic_fetch_or(&s->lost[word], bits) & bits;
		arrived = bits & ~atomic_load(&s->pending[word]);
		arrived &= atomic_fetch_and(&s->lost[word], ~arrived);
		atomic_fetch_sub(&s->nr_lost, (uint64_t)__builtin_popcountll(not_new) +
						      (uint64_t)__builtin_popcountll(arrived));
	}
	lp_clear_bits(s->claimed, dense, nr);
}

void lp_space_lose_for_good(struct lp_space *s, uint64_t dense, uint64_t nr)
{
	lp_set_bits(s->unknown, dense, nr);
	lp_space_lose(s, dense, nr);
}

uint64_t lp_space_regain(struct lp_space *s)
{
	uint64_t count = 0;

	for (size_t i = 0; i < s->extents->nr; i++) {
		if (s->extents->slots[i].source == LP_SOURCE_LOST)
			continue;
		LP_FOR_WORDS(s->extents->slots[i].dense, lp_slot_pages(s->extents, i), word, mask) {
			uint64_t back = mask & ~atomic_load(&s->unknown[word]);

			count += (uint64_t)__builtin_popcountll(atomic_fetch_and(&s->lost[word], ~back) & back);
		}
	}
	atomic_fetch_sub(&s->nr_lost, count);
	return count;
}

uint64_t *lp_counter_of(const struct lp_counts *counts, uint32_t source)
{
	if (source == LP_SOURCE_REMOTE)
		return &counts->by_source[counts->nr_levels];
	if (source == LP_SOURCE_LOST)
		return &counts->by_source[counts->nr_levels + 1];
	return &counts->by_source[source];
}

void lp_drop_dumped(struct lp_space *s, uint64_t start, uint64_t end, struct lp_counts *dropped)
{
	for (size_t i = lp_slot_at(s->extents, start); i < s->extents->nr && s->extents->slots[i].start < end; i++) {
		const struct lp_slot *slot = &s->extents->slots[i];
		uint64_t from = start > slot->start ? start : slot->start;
		uint64_t to = lp_min(end, lp_slot_end(s->extents, i));
		uint64_t d = slot->dense + lp_pages_between(slot->start, from), nr = lp_pages_between(from, to);
		uint64_t count = lp_clear_bits(s->pending, d, nr);

		lp_clear_bits(s->claimed, d, nr);
		atomic_fetch_sub(&s->nr_lost, lp_clear_bits(s->lost, d, nr));
		atomic_fetch_sub(&s->nr_pending, count);
		*lp_counter_of(dropped, slot->source) += count;
	}
}

void lp_space_forget(struct lp_space *s, uint64_t image, uint64_t nr_pages, struct lp_counts *dropped)
{
	uint64_t end = image + (nr_pages << LP_PAGE_SHIFT);

	for (size_t i = lp_slot_at(s->extents, image); i < s->extents->nr && s->extents->slots[i].start < end; i++) {
		uint64_t d = lp_page_from(s->extents, image), last = lp_page_from(s->extents, lp_min(end, lp_slot_end(s->extents, i)));

		for (image = lp_slot_end(s->extents, i); d < last; d++)
			if (lp_test_bit(s->lost, d)) {
				lp_space_commit(s, d, 1);
				++*lp_counter_of(dropped, s->extents->slots[i].source);
			}
	}
}

uint64_t lp_pending_of_dumped(const struct lp_space *s, uint64_t start, uint64_t end)
{
	uint64_t from = lp_page_from(s->extents, start);

	return lp_count_bits(s->pending, from, lp_page_from(s->extents, end) - from);
}

void lp_drop_regions(struct lp_space *s, uint64_t start, uint64_t end, struct lp_counts *dropped)
{
	for (size_t r = lp_region_at(s, start); r < s->nr_regions && s->regions[r].start < end; r++) {
		const struct lp_region *region = &s->regions[r];
		uint64_t from = start > region->start ? start : region->start;
		uint64_t to = lp_min(end, region->end);

		lp_drop_dumped(s, region->image + (from - region->start), region->image + (to - region->start), dropped);
	}
}

void lp_space_count(const struct lp_space *s, struct lp_counts *counts)
{
	for (size_t i = 0; i < s->extents->nr; i++)
		*lp_counter_of(counts, s->extents->slots[i].source) +=
			lp_count_bits(s->pending, s->extents->slots[i].dense, lp_slot_pages(s->extents, i));
}
