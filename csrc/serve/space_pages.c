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

struct lp_run lp_space_lookup(const struct lp_space *s, uint64_t addr, uint64_t max_pages)
{
	struct lp_run a = {.kind = LP_ZERO, .addr = addr, .dump_addr = addr, .nr_pages = max_pages};
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
	a.dump_addr = region->dump_addr + (addr - region->start);
	max_pages = lp_min(max_pages, lp_pages_between(addr, region->end));
	i = lp_slot_at(s->extents, a.dump_addr);
	slot = &s->extents->slots[i];
	if (i == s->extents->nr || a.dump_addr < slot->start) {
		a.nr_pages = lp_min(max_pages, lp_pages_between(a.dump_addr, slot->start));
		return a;
	}
	a.index = slot->index + lp_pages_between(slot->start, a.dump_addr);
	a.kind = kind_of(s, slot, a.index);
	a.source = slot->source;
	a.offset = slot->offset + (a.dump_addr - slot->start);
	max_pages = lp_min(max_pages, slot[1].index - a.index);
	for (a.nr_pages = 1; a.nr_pages < max_pages; a.nr_pages++)
		if (kind_of(s, slot, a.index + a.nr_pages) != a.kind)
			break;
	return a;
}

uint64_t lp_space_lookback(const struct lp_space *s, const struct lp_run *at, uint64_t max_pages)
{
	const struct lp_region *region = &s->regions[lp_region_at(s, at->addr)];
	const struct lp_slot *slot = &s->extents->slots[lp_slot_of_page(s->extents, at->index)];
	uint64_t n = 0;

	max_pages = lp_min(max_pages, lp_pages_between(region->start, at->addr));
	max_pages = lp_min(max_pages, at->index - slot->index);
	while (n < max_pages && kind_of(s, slot, at->index - n - 1) == at->kind)
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
		   struct lp_run *answer)
{
	for (size_t r = lp_region_at(s, cursor); r < s->nr_regions; r++) {
		const struct lp_region *region = &s->regions[r];
		uint64_t from = cursor > region->start ? cursor - region->start : 0;
		uint64_t d = lp_page_from(s->extents, region->dump_addr + from);
		uint64_t end = lp_page_from(s->extents, region->dump_addr + (region->end - region->start));

		while ((d = next_wanted(s, d, end)) < end) {
			size_t i = lp_slot_of_page(s->extents, d);
			const struct lp_slot *slot = &s->extents->slots[i];

			if ((slot->source == LP_SOURCE_REMOTE) != remote) {
				do
					slot++;
				while (slot->index < end && (slot->source == LP_SOURCE_REMOTE) != remote);
				d = slot->index;
				continue;
			}
			*answer = lp_space_lookup(s,
						  region->start + (slot->start - region->dump_addr) +
							  ((d - slot->index) << LP_PAGE_SHIFT),
						  max_pages);
			if (answer->kind == LP_DATA || answer->kind == LP_REMOTE)
				return true;
			d++; /* another thread was faster */
		}
	}
	return false;
}

static int compare_dump_addr(const void *a, const void *b, void *regions)
{
	const struct lp_region *ra = (const struct lp_region *)regions + *(const uint32_t *)a;
	const struct lp_region *rb = (const struct lp_region *)regions + *(const uint32_t *)b;

	return (ra->dump_addr > rb->dump_addr) - (ra->dump_addr < rb->dump_addr);
}

void lp_space_index(struct lp_space *s)
{
	uint32_t *order;

	if (s->by_dump_addr_valid)
		return;
	order = realloc(s->by_dump_addr, (s->nr_regions + 1) * sizeof(*order));
	if (!order)
		return; /* lp_space_locate does without */
	for (size_t r = 0; r < s->nr_regions; r++)
		order[r] = (uint32_t)r;
	qsort_r(order, s->nr_regions, sizeof(*order), compare_dump_addr, s->regions);
	s->by_dump_addr = order;
	s->by_dump_addr_valid = true;
}

static bool in_region(const struct lp_region *region, uint64_t dump_addr, uint64_t *addr)
{
	if (dump_addr - region->dump_addr >= region->end - region->start)
		return false;
	*addr = region->start + (dump_addr - region->dump_addr);
	return true;
}

bool lp_space_locate(const struct lp_space *s, uint64_t dump_addr, uint64_t *addr)
{
	size_t lo = 0, hi = s->nr_regions;

	if (!s->by_dump_addr_valid) {
		for (size_t r = 0; r < s->nr_regions; r++)
			if (in_region(&s->regions[r], dump_addr, addr))
				return true;
		return false;
	}
	while (lo < hi) {
		size_t mid = lo + (hi - lo) / 2;

		if (s->regions[s->by_dump_addr[mid]].dump_addr <= dump_addr)
			lo = mid + 1;
		else
			hi = mid;
	}
	return lo && in_region(&s->regions[s->by_dump_addr[lo - 1]], dump_addr, addr);
}

uint64_t lp_space_claim(struct lp_space *s, uint64_t index, uint64_t nr)
{
	uint64_t got = 0;

	LP_FOR_WORDS(index, nr, word, mask) {
		uint64_t claimed = atomic_load(&s->claimed[word]), want, length;

		/*
		 * Compare-and-swap: no page may look claimed, not even for a moment, by a thread that does not bring it
		 * or wake the threads that wait for it.
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

uint64_t lp_space_commit(struct lp_space *s, uint64_t index, uint64_t nr)
{
	uint64_t done = lp_clear_bits(s->pending, index, nr);

	lp_clear_bits(s->claimed, index, nr);
	atomic_fetch_sub(&s->nr_lost, lp_clear_bits(s->lost, index, nr));
	atomic_fetch_sub(&s->nr_pending, done);
	return done;
}

void lp_space_release(struct lp_space *s, uint64_t index, uint64_t nr)
{
	lp_clear_bits(s->claimed, index, nr);
}

/*
 * Another source may bring a page at this very moment: what is not pending any more after it was marked can't be lost, and
 * lp_space_commit, which looks in the opposite order, may have come too early to take the mark away.  Counted before it is
 * marked, so that the count never falls below zero.
 */
void lp_space_mark_lost(struct lp_space *s, uint64_t index, uint64_t nr)
{
	LP_FOR_WORDS(index, nr, word, mask) {
		uint64_t bits = atomic_load(&s->pending[word]) & mask, not_new, arrived;

		atomic_fetch_add(&s->nr_lost, (uint64_t)__builtin_popcountll(bits));
		not_new = atomic_fetch_or(&s->lost[word], bits) & bits;
		arrived = bits & ~atomic_load(&s->pending[word]);
		arrived &= atomic_fetch_and(&s->lost[word], ~arrived);
		atomic_fetch_sub(&s->nr_lost, (uint64_t)__builtin_popcountll(not_new) +
						      (uint64_t)__builtin_popcountll(arrived));
	}
	lp_clear_bits(s->claimed, index, nr);
}

void lp_space_mark_lost_for_good(struct lp_space *s, uint64_t index, uint64_t nr)
{
	lp_set_bits(s->unknown, index, nr);
	lp_space_mark_lost(s, index, nr);
}

uint64_t lp_space_retry_lost(struct lp_space *s)
{
	uint64_t count = 0;

	for (size_t i = 0; i < s->extents->nr; i++) {
		if (s->extents->slots[i].source == LP_SOURCE_LOST)
			continue;
		LP_FOR_WORDS(s->extents->slots[i].index, lp_slot_pages(s->extents, i), word, mask) {
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
		uint64_t d = slot->index + lp_pages_between(slot->start, from), nr = lp_pages_between(from, to);
		uint64_t count = lp_clear_bits(s->pending, d, nr);

		lp_clear_bits(s->claimed, d, nr);
		atomic_fetch_sub(&s->nr_lost, lp_clear_bits(s->lost, d, nr));
		atomic_fetch_sub(&s->nr_pending, count);
		*lp_counter_of(dropped, slot->source) += count;
	}
}

void lp_space_forget(struct lp_space *s, uint64_t dump_addr, uint64_t nr_pages, struct lp_counts *dropped)
{
	uint64_t end = dump_addr + (nr_pages << LP_PAGE_SHIFT);

	for (size_t i = lp_slot_at(s->extents, dump_addr); i < s->extents->nr && s->extents->slots[i].start < end; i++) {
		uint64_t d = lp_page_from(s->extents, dump_addr), last = lp_page_from(s->extents, lp_min(end, lp_slot_end(s->extents, i)));

		for (dump_addr = lp_slot_end(s->extents, i); d < last; d++)
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

		lp_drop_dumped(s, region->dump_addr + (from - region->start), region->dump_addr + (to - region->start), dropped);
	}
}

void lp_space_count(const struct lp_space *s, struct lp_counts *counts)
{
	for (size_t i = 0; i < s->extents->nr; i++)
		*lp_counter_of(counts, s->extents->slots[i].source) +=
			lp_count_bits(s->pending, s->extents->slots[i].index, lp_slot_pages(s->extents, i));
}
