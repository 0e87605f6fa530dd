#define _GNU_SOURCE
#include "address_space.h"

#include <errno.h>
#include <limits.h>
#include <stdatomic.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>

/* An extent, with the dense index of its first page; its length is the next one's less its own. */
struct slot {
	uint64_t start;
	uint64_t dense;
	uint64_t offset;
	uint32_t source;
};

/*
 * The table may be large, tens of MiB, and faults are looked up with cold caches: a binary search from its ends took 3 of 13 us
 * (perf, 1,000,000 slots).  It begins in a table of every 64th, and the large one lies in huge pages.
 */
#define MARK_EVERY 64
#define HUGE_FROM ((size_t)4 << 20)

struct image {
	atomic_int refs;
	size_t nr;
	uint64_t nr_pages;
	uint64_t *marks; /* where slots 0, 64, 128, ... start */
	size_t nr_marks;
	struct slot slots[]; /* nr, then one that closes the table */
};

typedef _Atomic uint64_t word_t;

struct lp_space {
	struct image *image;
	struct lp_region *regions;
	size_t nr_regions, cap_regions;
	uint32_t *by_image; /* regions sorted by image address; valid while by_image_valid */
	bool by_image_valid;
	struct lp_range *wiped; /* by image address, in no order */
	size_t nr_wiped;
	word_t *pending, *claimed, *lost;
	word_t *unknown; /* lost for good: where they are is not known */
	_Atomic uint64_t nr_pending, nr_lost;
	struct lp_range *left; /* by mremap; that these are unmapped is told later, unless they stay */
	size_t nr_left, cap_left;
	struct lp_doubt *doubts; /* in no order */
	size_t nr_doubts, cap_doubts;
	struct lp_range *gone; /* what changes have left since the layout was at rest */
	size_t nr_gone, cap_gone;
};

static size_t nr_words(const struct image *image)
{
	return (image->nr_pages + 63) / 64;
}

static uint64_t slot_pages(const struct image *image, size_t i)
{
	return image->slots[i + 1].dense - image->slots[i].dense;
}

static uint64_t slot_end(const struct image *image, size_t i)
{
	return image->slots[i].start + (slot_pages(image, i) << LP_PAGE_SHIFT);
}

/* The first of [lo, hi) that is above addr, of ascending addresses that lie `step` bytes apart; hi when there is none. */
static inline size_t first_above(const uint64_t *starts, size_t step, size_t lo, size_t hi, uint64_t addr)
{
	while (lo < hi) {
		size_t mid = lo + (hi - lo) / 2;

		if (starts[mid * (step / sizeof(*starts))] <= addr)
			lo = mid + 1;
		else
			hi = mid;
	}
	return lo;
}

/* First slot that ends after image address addr; image->nr when there is none. */
static size_t slot_at(const struct image *image, uint64_t addr)
{
	size_t mark = first_above(image->marks, sizeof(*image->marks), 0, image->nr_marks, addr);
	size_t end = mark * MARK_EVERY < image->nr ? mark * MARK_EVERY : image->nr;
	size_t lo = mark ? (mark - 1) * MARK_EVERY + 1 : 0;

	lo = first_above(&image->slots[0].start, sizeof(*image->slots), lo, end, addr);
	return lo && slot_end(image, lo - 1) > addr ? lo - 1 : lo;
}

/* The slot that holds dense index d (which must exist). */
static size_t slot_of_dense(const struct image *image, uint64_t d)
{
	size_t lo = 0, hi = image->nr;

	while (lo + 1 < hi) {
		size_t mid = lo + (hi - lo) / 2;

		if (image->slots[mid].dense <= d)
			lo = mid;
		else
			hi = mid;
	}
	return lo;
}

/* Dense index of the first page at or after image address addr. */
static uint64_t dense_from(const struct image *image, uint64_t addr)
{
	size_t i = slot_at(image, addr);
	const struct slot *slot = &image->slots[i];

	if (i == image->nr || addr <= slot->start)
		return slot->dense;
	return slot->dense + ((addr - slot->start) >> LP_PAGE_SHIFT);
}

/* ---- bitmaps: word-wise, each word changed atomically ---- */

static uint64_t mask_of(uint64_t from, uint64_t to)
{
	/* bits [from, to) of one word, 0 <= from < to <= 64 */
	return (to == 64 ? 0 : (uint64_t)1 << to) - ((uint64_t)1 << from);
}

#define FOR_WORDS(d, nr, word, mask)                                                                                   \
	for (uint64_t d_ = (d), e_ = d_ + (nr), word, mask, n_;                                                        \
	     d_ < e_ && (word = d_ / 64, n_ = (word + 1) * 64 < e_ ? (word + 1) * 64 : e_,                             \
			 mask = mask_of(d_ % 64, n_ - word * 64), true);                                               \
	     d_ = n_)

static bool test_bit(const word_t *bits, uint64_t d)
{
	return atomic_load(&bits[d / 64]) >> (d % 64) & 1;
}

static uint64_t count_bits(const word_t *bits, uint64_t d, uint64_t nr)
{
	uint64_t count = 0;

	FOR_WORDS(d, nr, word, mask)
		count += (uint64_t)__builtin_popcountll(atomic_load(&bits[word]) & mask);
	return count;
}

static uint64_t set_bits(word_t *bits, uint64_t d, uint64_t nr)
{
	uint64_t count = 0;

	FOR_WORDS(d, nr, word, mask)
		count += (uint64_t)__builtin_popcountll(~atomic_fetch_or(&bits[word], mask) & mask);
	return count;
}

static uint64_t clear_bits(word_t *bits, uint64_t d, uint64_t nr)
{
	uint64_t count = 0;

	FOR_WORDS(d, nr, word, mask)
		count += (uint64_t)__builtin_popcountll(atomic_fetch_and(&bits[word], ~mask) & mask);
	return count;
}

/* Pages of a word that wait to be brought: pending, not on the way, not lost. */
static uint64_t wanted(const struct lp_space *s, uint64_t word)
{
	return atomic_load(&s->pending[word]) & ~atomic_load(&s->claimed[word]) & ~atomic_load(&s->lost[word]);
}

/* ---- life ---- */

static void image_put(struct image *image)
{
	if (image && atomic_fetch_sub(&image->refs, 1) == 1) {
		free(image->marks);
		free(image);
	}
}

/* Without any slot, but with room for nr of them. */
static struct image *image_alloc(size_t nr)
{
	size_t bytes = sizeof(struct image) + (nr + 1) * sizeof(struct slot);
	struct image *image = calloc(1, bytes);
	uintptr_t page = ((uintptr_t)image + LP_PAGE_SIZE - 1) & ~(LP_PAGE_SIZE - 1);

	if (!image)
		return NULL;
	if (bytes >= HUGE_FROM) /* no error matters */
		madvise((void *)page, ((uintptr_t)image + bytes - page) & ~(LP_PAGE_SIZE - 1), MADV_HUGEPAGE);
	atomic_init(&image->refs, 1);
	image->nr = nr;
	image->nr_marks = (nr + MARK_EVERY - 1) / MARK_EVERY;
	image->marks = calloc(image->nr_marks + 1, sizeof(*image->marks));
	if (!image->marks) {
		image_put(image);
		return NULL;
	}
	return image;
}

static struct image *image_new(const struct lp_extent *extents, size_t nr)
{
	size_t lazy = 0;
	struct image *image;
	uint64_t end = 0, dense = 0;

	for (size_t i = 0; i < nr; i++)
		lazy += extents[i].lazy != 0;
	image = image_alloc(lazy);
	if (!image)
		return NULL;
	lazy = 0;
	for (size_t i = 0; i < nr; i++) {
		const struct lp_extent *e = &extents[i];

		if (e->start < end || e->start % LP_PAGE_SIZE || !e->nr_pages ||
		    e->nr_pages > (UINT64_MAX - e->start) >> LP_PAGE_SHIFT) {
			image_put(image);
			errno = EINVAL;
			return NULL;
		}
		end = e->start + (e->nr_pages << LP_PAGE_SHIFT);
		if (!e->lazy)
			continue;
		if (lazy % MARK_EVERY == 0)
			image->marks[lazy / MARK_EVERY] = e->start;
		image->slots[lazy++] = (struct slot){e->start, dense, e->offset, e->source};
		dense += e->nr_pages;
	}
	image->slots[lazy] = (struct slot){UINT64_MAX, dense, 0, 0};
	image->nr_pages = dense;
	return image;
}

/* Page aligned, not empty, sorted, disjoint, below what has no image. */
static bool are_ranges(const struct lp_range *ranges, size_t nr)
{
	uint64_t end = 0;

	for (size_t i = 0; i < nr; i++) {
		if (ranges[i].start < end || ranges[i].start >= ranges[i].end || ranges[i].end > LP_NO_IMAGE ||
		    (ranges[i].start | ranges[i].end) % LP_PAGE_SIZE)
			return false;
		end = ranges[i].end;
	}
	return true;
}

/* Pages of extents outside of all VMAs have nowhere to go; that is the caller's error. */
static bool all_in_vmas(const struct image *image, const struct lp_range *vmas, size_t nr_vmas)
{
	size_t v = 0;

	for (size_t i = 0; i < image->nr; i++) {
		uint64_t at = image->slots[i].start, end = slot_end(image, i);

		while (at < end) {
			while (v < nr_vmas && vmas[v].end <= at)
				v++;
			if (v == nr_vmas || vmas[v].start > at)
				return false;
			at = vmas[v].end;
		}
	}
	return true;
}

struct lp_space *lp_space_new(const struct lp_extent *extents, size_t nr_extents, const struct lp_range *vmas,
			      size_t nr_vmas, const struct lp_range *wiped, size_t nr_wiped)
{
	struct lp_space *s = calloc(1, sizeof(*s));

	if (!s)
		return NULL;
	s->image = image_new(extents, nr_extents);
	if (!s->image)
		goto fail;
	errno = EINVAL;
	if (!are_ranges(vmas, nr_vmas) || !are_ranges(wiped, nr_wiped) || !all_in_vmas(s->image, vmas, nr_vmas))
		goto fail;
	s->cap_regions = nr_vmas + 8;
	s->regions = malloc(s->cap_regions * sizeof(*s->regions));
	s->pending = calloc(nr_words(s->image) + 1, sizeof(word_t));
	s->claimed = calloc(nr_words(s->image) + 1, sizeof(word_t));
	s->lost = calloc(nr_words(s->image) + 1, sizeof(word_t));
	s->unknown = calloc(nr_words(s->image) + 1, sizeof(word_t));
	s->wiped = calloc(nr_wiped + 1, sizeof(*wiped));
	errno = ENOMEM;
	if (!s->regions || !s->pending || !s->claimed || !s->lost || !s->unknown || !s->wiped)
		goto fail;
	for (size_t i = 0; i < nr_vmas; i++)
		s->regions[i] = (struct lp_region){vmas[i].start, vmas[i].end, vmas[i].start};
	s->nr_regions = nr_vmas;
	for (size_t i = 0; i < nr_wiped; i++)
		s->wiped[i] = wiped[i];
	s->nr_wiped = nr_wiped;
	set_bits(s->pending, 0, s->image->nr_pages);
	atomic_init(&s->nr_pending, s->image->nr_pages);
	for (size_t i = 0; i < s->image->nr; i++) {
		if (s->image->slots[i].source != LP_SOURCE_LOST)
			continue;
		atomic_fetch_add(&s->nr_lost, set_bits(s->lost, s->image->slots[i].dense, slot_pages(s->image, i)));
	}
	return s;
fail:
	lp_space_free(s);
	return NULL;
}

void lp_space_free(struct lp_space *s)
{
	int saved = errno;

	if (!s)
		return;
	image_put(s->image);
	free(s->regions);
	free(s->by_image);
	free(s->wiped);
	free(s->left);
	free(s->doubts);
	free(s->gone);
	free((void *)s->pending);
	free((void *)s->claimed);
	free((void *)s->lost);
	free((void *)s->unknown);
	free(s);
	errno = saved;
}

uint64_t lp_space_pending(const struct lp_space *s)
{
	return atomic_load(&s->nr_pending);
}

uint64_t lp_space_lost(const struct lp_space *s)
{
	return atomic_load(&s->nr_lost);
}

size_t lp_space_nr_regions(const struct lp_space *s)
{
	return s->nr_regions;
}

const struct lp_region *lp_space_regions(const struct lp_space *s)
{
	return s->regions;
}

/* ---- look-up ---- */

/* First region that ends after addr. */
static size_t region_at(const struct lp_space *s, uint64_t addr)
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

static uint32_t kind_of(const struct lp_space *s, const struct slot *slot, uint64_t d)
{
	if (!test_bit(s->pending, d))
		return LP_ZERO;
	if (test_bit(s->lost, d))
		return LP_LOST;
	if (test_bit(s->claimed, d))
		return LP_CLAIMED;
	return slot->source == LP_SOURCE_REMOTE ? LP_REMOTE : LP_DATA;
}

static uint64_t min_u64(uint64_t a, uint64_t b)
{
	return a < b ? a : b;
}

static uint64_t pages_between(uint64_t start, uint64_t end)
{
	return (end - start) >> LP_PAGE_SHIFT;
}

struct lp_answer lp_space_lookup(const struct lp_space *s, uint64_t addr, uint64_t max_pages)
{
	struct lp_answer a = {.kind = LP_ZERO, .addr = addr, .image = addr, .nr_pages = max_pages};
	size_t r = region_at(s, addr);
	const struct lp_region *region = &s->regions[r];
	const struct slot *slot;
	size_t i;

	if (r == s->nr_regions)
		return a;
	if (addr < region->start) {
		a.nr_pages = min_u64(max_pages, pages_between(addr, region->start));
		return a;
	}
	a.image = region->image + (addr - region->start);
	max_pages = min_u64(max_pages, pages_between(addr, region->end));
	i = slot_at(s->image, a.image);
	slot = &s->image->slots[i];
	if (i == s->image->nr || a.image < slot->start) {
		a.nr_pages = min_u64(max_pages, pages_between(a.image, slot->start));
		return a;
	}
	a.dense = slot->dense + pages_between(slot->start, a.image);
	a.kind = kind_of(s, slot, a.dense);
	a.source = slot->source;
	a.offset = slot->offset + (a.image - slot->start);
	max_pages = min_u64(max_pages, slot[1].dense - a.dense);
	for (a.nr_pages = 1; a.nr_pages < max_pages; a.nr_pages++)
		if (kind_of(s, slot, a.dense + a.nr_pages) != a.kind)
			break;
	return a;
}

uint64_t lp_space_lookback(const struct lp_space *s, const struct lp_answer *at, uint64_t max_pages)
{
	const struct lp_region *region = &s->regions[region_at(s, at->addr)];
	const struct slot *slot = &s->image->slots[slot_of_dense(s->image, at->dense)];
	uint64_t n = 0;

	max_pages = min_u64(max_pages, pages_between(region->start, at->addr));
	max_pages = min_u64(max_pages, at->dense - slot->dense);
	while (n < max_pages && kind_of(s, slot, at->dense - n - 1) == at->kind)
		n++;
	return n;
}

/* First wanted page in [d, end), or end. */
static uint64_t next_wanted(const struct lp_space *s, uint64_t d, uint64_t end)
{
	FOR_WORDS(d, end - d, word, mask) {
		uint64_t bits = wanted(s, word) & mask;

		if (bits)
			return word * 64 + (uint64_t)__builtin_ctzll(bits);
	}
	return end;
}

bool lp_space_next(const struct lp_space *s, uint64_t cursor, uint64_t max_pages, bool remote,
		   struct lp_answer *answer)
{
	for (size_t r = region_at(s, cursor); r < s->nr_regions; r++) {
		const struct lp_region *region = &s->regions[r];
		uint64_t from = cursor > region->start ? cursor - region->start : 0;
		uint64_t d = dense_from(s->image, region->image + from);
		uint64_t end = dense_from(s->image, region->image + (region->end - region->start));

		while ((d = next_wanted(s, d, end)) < end) {
			size_t i = slot_of_dense(s->image, d);
			const struct slot *slot = &s->image->slots[i];

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

/* ---- claims ---- */

uint64_t lp_space_claim(struct lp_space *s, uint64_t dense, uint64_t nr)
{
	uint64_t got = 0;

	FOR_WORDS(dense, nr, word, mask) {
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
			want = mask_of(d_ % 64, d_ % 64 + length);
		} while (!atomic_compare_exchange_weak(&s->claimed[word], &claimed, claimed | want));
		got += length;
		if (want != mask)
			break;
	}
	return got;
}

uint64_t lp_space_commit(struct lp_space *s, uint64_t dense, uint64_t nr)
{
	uint64_t done = clear_bits(s->pending, dense, nr);

	clear_bits(s->claimed, dense, nr);
	atomic_fetch_sub(&s->nr_lost, clear_bits(s->lost, dense, nr));
	atomic_fetch_sub(&s->nr_pending, done);
	return done;
}

void lp_space_release(struct lp_space *s, uint64_t dense, uint64_t nr)
{
	clear_bits(s->claimed, dense, nr);
}

/*
 * Another source may bring a page at this very moment: what is not pending any more after it was marked can't be lost, and
 * lp_space_commit, which looks in the opposite order, may have come too early to take the mark away.  Counted before it is
 * marked, so that the count never falls below zero.
 */
void lp_space_lose(struct lp_space *s, uint64_t dense, uint64_t nr)
{
	FOR_WORDS(dense, nr, word, mask) {
		uint64_t bits = atomic_load(&s->pending[word]) & mask, not_new, arrived;

		atomic_fetch_add(&s->nr_lost, (uint64_t)__builtin_popcountll(bits));
		not_new = atomic_fetch_or(&s->lost[word], bits) & bits;
		arrived = bits & ~atomic_load(&s->pending[word]);
		arrived &= atomic_fetch_and(&s->lost[word], ~arrived);
		atomic_fetch_sub(&s->nr_lost, (uint64_t)__builtin_popcountll(not_new) +
						      (uint64_t)__builtin_popcountll(arrived));
	}
	clear_bits(s->claimed, dense, nr);
}

void lp_space_lose_for_good(struct lp_space *s, uint64_t dense, uint64_t nr)
{
	set_bits(s->unknown, dense, nr);
	lp_space_lose(s, dense, nr);
}

uint64_t lp_space_regain(struct lp_space *s)
{
	uint64_t count = 0;

	for (size_t i = 0; i < s->image->nr; i++) {
		if (s->image->slots[i].source == LP_SOURCE_LOST)
			continue;
		FOR_WORDS(s->image->slots[i].dense, slot_pages(s->image, i), word, mask) {
			uint64_t back = mask & ~atomic_load(&s->unknown[word]);

			count += (uint64_t)__builtin_popcountll(atomic_fetch_and(&s->lost[word], ~back) & back);
		}
	}
	atomic_fetch_sub(&s->nr_lost, count);
	return count;
}

/* ---- layout ---- */

static uint64_t *counter(const struct lp_counts *counts, uint32_t source)
{
	if (source == LP_SOURCE_REMOTE)
		return &counts->by_source[counts->nr_levels];
	if (source == LP_SOURCE_LOST)
		return &counts->by_source[counts->nr_levels + 1];
	return &counts->by_source[source];
}

/* The pages of image range [start, end) are not waited for any more. */
static void drop(struct lp_space *s, uint64_t start, uint64_t end, struct lp_counts *dropped)
{
	for (size_t i = slot_at(s->image, start); i < s->image->nr && s->image->slots[i].start < end; i++) {
		const struct slot *slot = &s->image->slots[i];
		uint64_t from = start > slot->start ? start : slot->start;
		uint64_t to = min_u64(end, slot_end(s->image, i));
		uint64_t d = slot->dense + pages_between(slot->start, from), nr = pages_between(from, to);
		uint64_t count = clear_bits(s->pending, d, nr);

		clear_bits(s->claimed, d, nr);
		atomic_fetch_sub(&s->nr_lost, clear_bits(s->lost, d, nr));
		atomic_fetch_sub(&s->nr_pending, count);
		*counter(dropped, slot->source) += count;
	}
}

void lp_space_forget(struct lp_space *s, uint64_t image, uint64_t nr_pages, struct lp_counts *dropped)
{
	uint64_t end = image + (nr_pages << LP_PAGE_SHIFT);

	for (size_t i = slot_at(s->image, image); i < s->image->nr && s->image->slots[i].start < end; i++) {
		uint64_t d = dense_from(s->image, image), last = dense_from(s->image, min_u64(end, slot_end(s->image, i)));

		for (image = slot_end(s->image, i); d < last; d++)
			if (test_bit(s->lost, d)) {
				lp_space_commit(s, d, 1);
				++*counter(dropped, s->image->slots[i].source);
			}
	}
}

static word_t *copy_bits(const struct lp_space *s, const word_t *bits)
{
	size_t size = (nr_words(s->image) + 1) * sizeof(word_t);
	word_t *copy = malloc(size);

	if (copy)
		memcpy(copy, (const void *)bits, size);
	return copy;
}

static void drop_regions(struct lp_space *s, uint64_t start, uint64_t end, struct lp_counts *dropped)
{
	for (size_t r = region_at(s, start); r < s->nr_regions && s->regions[r].start < end; r++) {
		const struct lp_region *region = &s->regions[r];
		uint64_t from = start > region->start ? start : region->start;
		uint64_t to = min_u64(end, region->end);

		drop(s, region->image + (from - region->start), region->image + (to - region->start), dropped);
	}
}

/* ---- doubts ---- */

static int reserve_doubts(struct lp_space *s, size_t more)
{
	if (s->nr_doubts + more > s->cap_doubts) {
		size_t cap = (s->nr_doubts + more) * 2;
		struct lp_doubt *doubts = realloc(s->doubts, cap * sizeof(*doubts));

		if (!doubts)
			return -ENOMEM;
		s->doubts = doubts;
		s->cap_doubts = cap;
	}
	return 0;
}

/* Splits what has `at` inside, so that every doubt lies on one side of it. */
static int split_doubts(struct lp_space *s, uint64_t at)
{
	if (reserve_doubts(s, s->nr_doubts))
		return -ENOMEM;
	for (size_t i = s->nr_doubts; i--;) {
		struct lp_doubt *d = &s->doubts[i], *rest;

		if (at <= d->start || at >= d->end)
			continue;
		rest = &s->doubts[s->nr_doubts++];
		*rest = *d;
		rest->image += at - d->start;
		rest->start = at;
		d->end = at;
	}
	return 0;
}

/* Pages of image range [start, end) that are pending. */
static uint64_t pending_of_image(const struct lp_space *s, uint64_t start, uint64_t end)
{
	uint64_t from = dense_from(s->image, start);

	return count_bits(s->pending, from, dense_from(s->image, end) - from);
}

static void drop_doubt(struct lp_space *s, size_t i, struct lp_counts *dropped)
{
	struct lp_doubt d = s->doubts[i];

	drop(s, d.image, d.image + (d.end - d.start), dropped);
	s->doubts[i] = s->doubts[--s->nr_doubts];
}

/* Room for one more. */
static int reserve_ranges(struct lp_range **ranges, size_t nr, size_t *cap)
{
	if (nr == *cap) {
		size_t more = *cap ? *cap * 2 : 16;
		struct lp_range *grown = realloc(*ranges, more * sizeof(*grown));

		if (!grown)
			return -ENOMEM;
		*ranges = grown;
		*cap = more;
	}
	return 0;
}

/* Whether, when `range` is left, what is registered beside the edge of a doubt says less. */
static bool unsettles(const struct lp_range *range, const struct lp_doubt *doubt)
{
	return range->start < doubt->top && range->end >= doubt->edge;
}

/* [start, end) is left by a change. */
static int leave(struct lp_space *s, uint64_t start, uint64_t end)
{
	const struct lp_range range = {start, end};

	if (reserve_ranges(&s->gone, s->nr_gone, &s->cap_gone))
		return -ENOMEM;
	s->gone[s->nr_gone++] = range;
	for (size_t i = 0; i < s->nr_doubts; i++)
		s->doubts[i].unsure |= unsettles(&range, &s->doubts[i]);
	return 0;
}

/* What is in doubt in [start, end) is gone: something else is there. */
static int doubts_gone(struct lp_space *s, uint64_t start, uint64_t end, struct lp_counts *dropped)
{
	if (split_doubts(s, start) || split_doubts(s, end))
		return -ENOMEM;
	for (size_t i = s->nr_doubts; i--;)
		if (s->doubts[i].start >= start && s->doubts[i].end <= end)
			drop_doubt(s, i, dropped);
	return 0;
}

/*
 * What is in doubt in [from, from + len) was there, or something else was, when mremap moved it.  That moves within one mapping,
 * and unmapping, even if it fails, leaves a boundary where it begins: what was moved across that had grown there since.
 */
static int move_doubts(struct lp_space *s, uint64_t from, uint64_t to, uint64_t len, struct lp_counts *dropped)
{
	if (split_doubts(s, from) || split_doubts(s, from + len))
		return -ENOMEM;
	for (size_t i = s->nr_doubts; i--;) {
		struct lp_doubt *d = &s->doubts[i];

		if (d->start < from || d->end > from + len)
			continue;
		if (from < d->edge && d->edge <= d->start) {
			drop_doubt(s, i, dropped);
			continue;
		}
		d->start += to - from;
		d->end += to - from;
		d->edge = LP_NO_EDGE;
		d->top = 0;
		d->unsure = true;
	}
	return 0;
}

size_t lp_space_nr_doubts(const struct lp_space *s)
{
	return s->nr_doubts;
}

struct lp_doubt lp_space_doubt(const struct lp_space *s, size_t i)
{
	return s->doubts[i];
}

void lp_space_asked(struct lp_space *s, size_t i)
{
	s->doubts[i].asked = true;
}

bool lp_space_in_doubt(const struct lp_space *s, const struct lp_doubt *d)
{
	return pending_of_image(s, d->image, d->image + (d->end - d->start));
}

void lp_space_lose_doubts(struct lp_space *s, uint64_t start, uint64_t end)
{
	for (size_t i = 0; i < s->nr_doubts; i++) {
		const struct lp_doubt *d = &s->doubts[i];
		uint64_t from = dense_from(s->image, d->image);

		if (d->start < end && d->end > start)
			lp_space_lose_for_good(s, from, dense_from(s->image, d->image + (d->end - d->start)) - from);
	}
}

size_t lp_space_not_pending(const struct lp_space *s, const struct lp_doubt *d, uint64_t *addrs, size_t max)
{
	size_t nr = 0;

	for (uint64_t at = d->start; at < d->end && nr < max; at += LP_PAGE_SIZE) {
		uint64_t image = d->image + (at - d->start), next = dense_from(s->image, image);

		if (dense_from(s->image, image + LP_PAGE_SIZE) == next || !test_bit(s->pending, next))
			addrs[nr++] = at;
	}
	return nr;
}

void lp_space_refill(struct lp_space *s, uint64_t start, uint64_t end)
{
	for (size_t i = 0; i < s->nr_doubts; i++)
		if (s->doubts[i].start <= end && s->doubts[i].end > start)
			s->doubts[i].refilled = true;
}

bool lp_space_knows(const struct lp_space *s, uint64_t start, uint64_t end)
{
	size_t r = region_at(s, start);

	for (size_t i = 0; i < s->nr_doubts; i++)
		if (s->doubts[i].start < end && s->doubts[i].end > start)
			return true;
	return r < s->nr_regions && s->regions[r].start < end;
}

void lp_space_obscure(struct lp_space *s, uint64_t start, uint64_t end)
{
	for (size_t i = 0; i < s->nr_doubts; i++) {
		struct lp_doubt *d = &s->doubts[i];

		if ((d->start < end && d->end > start) || (d->edge <= end && d->start >= end && d->top >= end))
			d->edge = LP_NO_EDGE;
	}
}

int lp_space_remove_from_child(struct lp_space *s, uint64_t start, uint64_t end, struct lp_counts *dropped)
{
	if (split_doubts(s, start) || split_doubts(s, end))
		return -ENOMEM;
	drop_regions(s, start, end, dropped);
	for (size_t i = 0; i < s->nr_doubts; i++)
		if (s->doubts[i].start >= start && s->doubts[i].end <= end)
			s->doubts[i].edge = LP_NO_EDGE;
	return 0;
}

void lp_space_remove(struct lp_space *s, uint64_t start, uint64_t end, struct lp_counts *dropped)
{
	drop_regions(s, start, end, dropped);
	for (size_t i = 0; i < s->nr_doubts; i++) {
		const struct lp_doubt *d = &s->doubts[i];
		uint64_t from = start > d->start ? start : d->start, to = min_u64(end, d->end);

		if (from < to)
			drop(s, d->image + (from - d->start), d->image + (to - d->start), dropped);
	}
}

static int reserve(struct lp_space *s, size_t more)
{
	if (s->nr_regions + more > s->cap_regions) {
		size_t cap = (s->nr_regions + more) * 2;
		struct lp_region *regions = realloc(s->regions, cap * sizeof(*regions));

		if (!regions)
			return -ENOMEM;
		s->regions = regions;
		s->cap_regions = cap;
	}
	return 0;
}

/* Replaces regions [at, at + nr) by the `with_nr` ones of `with`; there is room. */
static void splice(struct lp_space *s, size_t at, size_t nr, const struct lp_region *with, size_t with_nr)
{
	memmove(&s->regions[at + with_nr], &s->regions[at + nr], (s->nr_regions - at - nr) * sizeof(*with));
	if (with_nr)
		memcpy(&s->regions[at], with, with_nr * sizeof(*with));
	s->nr_regions += with_nr - nr;
	s->by_image_valid = false;
}

/* Cuts [start, end) out of the regions; there is room for one more. */
static void cut(struct lp_space *s, uint64_t start, uint64_t end)
{
	size_t first = region_at(s, start), last = first, nr = 0;
	struct lp_region rest[2];

	while (last < s->nr_regions && s->regions[last].start < end)
		last++;
	if (first == last)
		return;
	if (s->regions[first].start < start) {
		rest[nr] = s->regions[first];
		rest[nr++].end = start;
	}
	if (s->regions[last - 1].end > end) {
		rest[nr] = s->regions[last - 1];
		rest[nr].image += end - rest[nr].start;
		rest[nr++].start = end;
	}
	splice(s, first, last - first, rest, nr);
}

/* The first region in [start, end) that is empty; nr_regions when there is none. */
static size_t first_empty(const struct lp_space *s, uint64_t start, uint64_t end)
{
	for (size_t r = region_at(s, start); start < end && r < s->nr_regions && s->regions[r].start < end; r++)
		if (s->regions[r].image >= LP_NO_IMAGE)
			return r;
	return s->nr_regions;
}

/* Cuts what is empty out of [start, end); there is room for one more. */
static void cut_empty(struct lp_space *s, uint64_t start, uint64_t end)
{
	size_t r;

	while ((r = first_empty(s, start, end)) < s->nr_regions)
		cut(s, s->regions[r].start > start ? s->regions[r].start : start, min_u64(s->regions[r].end, end));
}

/* Of places where nothing empty is any more, nothing more will be told. */
static void forget_left(struct lp_space *s)
{
	size_t kept = 0;

	for (size_t i = 0; i < s->nr_left; i++)
		if (first_empty(s, s->left[i].start, s->left[i].end) < s->nr_regions)
			s->left[kept++] = s->left[i];
	s->nr_left = kept;
}

struct lp_space *lp_space_copy(const struct lp_space *s)
{
	struct lp_space *c = calloc(1, sizeof(*c));

	if (!c)
		return NULL;
	c->image = s->image;
	atomic_fetch_add(&s->image->refs, 1);
	c->cap_regions = s->nr_regions + s->nr_left + 8;
	c->nr_regions = s->nr_regions;
	c->regions = malloc(c->cap_regions * sizeof(*c->regions));
	c->pending = copy_bits(s, s->pending);
	c->claimed = calloc(nr_words(s->image) + 1, sizeof(word_t));
	c->lost = copy_bits(s, s->lost);
	c->unknown = copy_bits(s, s->unknown);
	c->wiped = malloc((s->nr_wiped + 1) * sizeof(*c->wiped));
	if (!c->regions || !c->pending || !c->claimed || !c->lost || !c->unknown || !c->wiped ||
	    reserve_doubts(c, s->nr_doubts)) {
		lp_space_free(c);
		return NULL;
	}
	if (s->nr_doubts)
		memcpy(c->doubts, s->doubts, s->nr_doubts * sizeof(*s->doubts));
	c->nr_doubts = s->nr_doubts;
	memcpy(c->regions, s->regions, s->nr_regions * sizeof(*s->regions));
	atomic_init(&c->nr_pending, atomic_load(&s->nr_pending));
	atomic_init(&c->nr_lost, atomic_load(&s->nr_lost));
	if (s->nr_wiped)
		memcpy(c->wiped, s->wiped, s->nr_wiped * sizeof(*s->wiped));
	c->nr_wiped = s->nr_wiped;
	return c;
}

struct lp_space *lp_space_clone(struct lp_space *s, struct lp_counts *dropped)
{
	struct lp_space *c = lp_space_copy(s);

	if (!c)
		return NULL;
	for (size_t i = 0; i < c->nr_wiped; i++)
		drop(c, c->wiped[i].start, c->wiped[i].end, dropped);
	/* of what is unmapped already, nobody will tell the child's */
	for (size_t i = 0; i < s->nr_left; i++)
		cut_empty(c, s->left[i].start, s->left[i].end);
	return c;
}

int lp_space_wipe_as(struct lp_space *s, const struct lp_space *as)
{
	struct lp_range *wiped = malloc((as->nr_wiped + 1) * sizeof(*wiped));

	if (!wiped)
		return -ENOMEM;
	if (as->nr_wiped)
		memcpy(wiped, as->wiped, as->nr_wiped * sizeof(*wiped));
	free(s->wiped);
	s->wiped = wiped;
	s->nr_wiped = as->nr_wiped;
	return 0;
}

/* A list of ranges of image addresses that has room. */
struct pieces {
	struct lp_range *at;
	size_t nr;
};

static void add_piece(struct pieces *pieces, uint64_t start, uint64_t end)
{
	if (start < end)
		pieces->at[pieces->nr++] = (struct lp_range){start, end};
}

static void cut_pieces(struct pieces *pieces, uint64_t start, uint64_t end)
{
	for (size_t i = pieces->nr; i--;) {
		struct lp_range was = pieces->at[i];

		if (was.end <= start || was.start >= end)
			continue;
		pieces->at[i] = pieces->at[--pieces->nr];
		add_piece(pieces, was.start, start);
		add_piece(pieces, end, was.end);
	}
}

/* What of the ranges comes from the image: added to the pieces, or cut out of them. */
static void images_of(const struct lp_space *s, const struct lp_range *ranges, size_t nr, struct pieces *pieces,
		      void (*change)(struct pieces *pieces, uint64_t start, uint64_t end))
{
	for (size_t i = 0; i < nr; i++)
		for (size_t r = region_at(s, ranges[i].start); r < s->nr_regions && s->regions[r].start < ranges[i].end; r++) {
			const struct lp_region *region = &s->regions[r];
			uint64_t start = ranges[i].start > region->start ? ranges[i].start : region->start;

			if (region->image < LP_NO_IMAGE)
				change(pieces, region->image + (start - region->start),
				       region->image + (min_u64(ranges[i].end, region->end) - region->start));
		}
}

int lp_space_wipe(struct lp_space *s, const struct lp_range *wiped, size_t nr_wiped, const struct lp_range *kept,
		  size_t nr_kept)
{
	/* nr ranges meet regions nr + nr_regions times at most; each time is a piece added, or a cut that makes one more */
	size_t most = s->nr_wiped + 2 * nr_wiped + nr_kept + 3 * s->nr_regions + 1;
	struct pieces pieces = {malloc(most * sizeof(*pieces.at)), s->nr_wiped};

	if (!pieces.at)
		return -ENOMEM;
	if (s->nr_wiped) {
		memcpy(pieces.at, s->wiped, s->nr_wiped * sizeof(*pieces.at));
		images_of(s, kept, nr_kept, &pieces, cut_pieces);
		images_of(s, wiped, nr_wiped, &pieces, cut_pieces);
	}
	images_of(s, wiped, nr_wiped, &pieces, add_piece);
	free(s->wiped);
	s->wiped = pieces.at;
	s->nr_wiped = pieces.nr;
	return 0;
}

void lp_space_rest(struct lp_space *s)
{
	s->nr_left = 0;
	s->nr_gone = 0;
}

int lp_space_unmap(struct lp_space *s, uint64_t start, uint64_t end, struct lp_counts *dropped)
{
	if (reserve(s, 1))
		return -ENOMEM;
	if (doubts_gone(s, start, end, dropped) || leave(s, start, end))
		return -ENOMEM;
	drop_regions(s, start, end, dropped);
	cut(s, start, end);
	forget_left(s);
	return 0;
}

bool lp_space_matters(const struct lp_space *s, uint64_t start, uint64_t end)
{
	for (size_t r = region_at(s, start); r < s->nr_regions && s->regions[r].start < end; r++) {
		const struct lp_region *region = &s->regions[r];
		uint64_t from = start > region->start ? start : region->start, to = min_u64(end, region->end);

		if (pending_of_image(s, region->image + (from - region->start), region->image + (to - region->start)))
			return true;
	}
	for (size_t i = 0; i < s->nr_doubts; i++)
		if (s->doubts[i].start < end && s->doubts[i].end > start)
			return true;
	return false;
}

int lp_space_question(struct lp_space *s, uint64_t start, uint64_t end)
{
	size_t first = region_at(s, start), last = first;

	while (last < s->nr_regions && s->regions[last].start < end)
		last++;
	if (split_doubts(s, start) || split_doubts(s, end) || reserve_doubts(s, last - first) || reserve(s, 1) ||
	    leave(s, start, end))
		return -ENOMEM;
	for (size_t i = 0; i < s->nr_doubts; i++) {
		struct lp_doubt *d = &s->doubts[i];

		if (d->start < start || d->end > end)
			continue;
		d->edge = d->edge == LP_NO_EDGE || d->edge < start ? start : d->edge;
		d->top = d->top && d->top < end ? d->top : end;
	}
	for (size_t r = first; r < last; r++) {
		const struct lp_region *region = &s->regions[r];
		struct lp_doubt d = {
			.start = start > region->start ? start : region->start,
			.end = min_u64(end, region->end),
			.edge = start,
			.top = end,
		};
		uint64_t from;

		if (region->image >= LP_NO_IMAGE)
			continue;
		d.image = region->image + (d.start - region->start);
		for (size_t i = 0; i + 1 < s->nr_gone; i++) /* but for this one */
			d.unsure |= unsettles(&s->gone[i], &d);
		if (!lp_space_in_doubt(s, &d))
			continue;
		/* who brings such a page meanwhile finds it wanted again, or gone */
		from = dense_from(s->image, d.image);
		clear_bits(s->claimed, from, dense_from(s->image, d.image + (d.end - d.start)) - from);
		s->doubts[s->nr_doubts++] = d;
	}
	cut(s, start, end);
	forget_left(s);
	return 0;
}

/* Puts regions, which follow each other, where nothing is; there is room. */
static void insert(struct lp_space *s, const struct lp_region *regions, size_t nr)
{
	splice(s, region_at(s, regions[0].start), 0, regions, nr);
}

int lp_space_remap(struct lp_space *s, uint64_t from, uint64_t to, uint64_t len, struct lp_counts *dropped)
{
	const struct lp_region empty = {from, from + len, LP_NO_IMAGE};
	size_t first = region_at(s, from), last = first, nr = 0;
	uint64_t at = from;
	struct lp_region *moved;

	if (!len)
		return 0;
	if (reserve_ranges(&s->left, s->nr_left, &s->cap_left))
		return -ENOMEM;
	if (doubts_gone(s, to, to + len, dropped) || move_doubts(s, from, to, len, dropped))
		return -ENOMEM;
	/* what is registered above may have grown with what has moved here */
	for (size_t i = 0; i < s->nr_doubts; i++)
		if (s->doubts[i].edge <= to + len && s->doubts[i].start >= to + len && s->doubts[i].top >= to + len)
			s->doubts[i].edge = to + len;
	if (leave(s, from, from + len))
		return -ENOMEM;
	while (last < s->nr_regions && s->regions[last].start < from + len)
		last++;
	/* the regions, and the gaps between them: memory that has grown since the dump */
	moved = malloc((2 * (last - first) + 1) * sizeof(*moved));
	/* every cut can add one; what moves, and what is left, come on top */
	if (!moved || reserve(s, 2 * (last - first) + 4)) {
		free(moved);
		return -ENOMEM;
	}
	for (size_t r = first; r < last; r++) {
		const struct lp_region *region = &s->regions[r];
		uint64_t start = from > region->start ? from : region->start;
		uint64_t end = min_u64(region->end, from + len);

		if (at < start)
			moved[nr++] = (struct lp_region){at - from + to, start - from + to, LP_NO_IMAGE};
		moved[nr++] = (struct lp_region){start - from + to, end - from + to,
						 region->image + (start - region->start)};
		at = end;
	}
	if (at < from + len)
		moved[nr++] = (struct lp_region){at - from + to, to + len, LP_NO_IMAGE};
	cut(s, from, from + len);
	insert(s, &empty, 1);
	drop_regions(s, to, to + len, dropped);
	cut(s, to, to + len);
	insert(s, moved, nr);
	free(moved);
	forget_left(s);
	s->left[s->nr_left++] = (struct lp_range){from, from + len};
	return 0;
}

int lp_space_answer_doubt(struct lp_space *s, size_t i, bool gone, struct lp_counts *dropped)
{
	struct lp_doubt d = s->doubts[i];
	const struct lp_region stays = {d.start, d.end, d.image};

	if (gone) {
		drop_doubt(s, i, dropped);
		return 0;
	}
	if (reserve(s, 3))
		return -ENOMEM;
	s->doubts[i] = s->doubts[--s->nr_doubts];
	cut(s, d.start, d.end); /* nothing is there, but what mremap had left */
	insert(s, &stays, 1);
	return 0;
}

static bool taken(const struct lp_space *s, uint64_t start, uint64_t end)
{
	size_t r = region_at(s, start);

	return start < end && r < s->nr_regions && s->regions[r].start < end;
}

/* Whether a change leaves some of [start, end) that is taken. */
static bool leaves(const struct lp_space *s, const struct lp_change *change, uint64_t start, uint64_t end)
{
	if (change->kind != LP_UNMAPPED && change->kind != LP_REMAPPED)
		return false;
	return taken(s, change->start > start ? change->start : start, min_u64(end, change->start + change->len));
}

/*
 * Which of the first nr changes, of all, leaves [start, end), where something is; nr when none of these tells so.  Not change
 * `but`, which moves there.
 */
static size_t who_leaves(const struct lp_space *s, const struct lp_change *changes, size_t nr, size_t all, size_t but,
			 uint64_t start, uint64_t end, bool at_rest)
{
	/* what a move has left is unmapped by the same mremap, not by who moves there next */
	for (size_t left = 0; left < s->nr_left; left++) {
		const struct lp_range *range = &s->left[left];

		if (first_empty(s, range->start > start ? range->start : start, min_u64(range->end, end)) ==
		    s->nr_regions)
			continue;
		/* if there is none for this mremap, who moves the rest away has unmapped it */
		size_t unmaps = all, moves = all;
		int more = 0; /* unmapped than moved away since */

		for (size_t i = all; i--;) {
			if (changes[i].start != range->start || changes[i].len != range->end - range->start)
				continue;
			if (changes[i].kind == LP_UNMAPPED) {
				unmaps = i;
				more++;
			} else if (changes[i].kind == LP_REMAPPED && i != but && unmaps < all) { /* told before */
				moves = i;
				more--;
			}
		}
		/* only what has been told before the first of them */
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
		if (!at_rest)
			return nr;
	}
	for (size_t i = 0; i < nr; i++)
		if (i != but && leaves(s, &changes[i], start, end))
			return i;
	return nr;
}

/* Whether a change has to wait for rest: what it tells may not be so, or not all there is to it. */
static bool must_wait(const struct lp_space *s, const struct lp_change *change)
{
	return change->kind == LP_FORKED || change->kind == LP_REMAPPED || change->kind == LP_QUESTION ||
	       (change->kind == LP_UNMAPPED && lp_space_matters(s, change->start, change->start + change->len));
}

/* Of the changes told so far; nr: none before more is told. */
static size_t next_so_far(const struct lp_space *s, const struct lp_change *changes, size_t nr, size_t all, bool at_rest)
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
		before = who_leaves(s, changes, nr, all, next, change->to, change->to + change->len, at_rest);
		if (before == nr)
			return at_rest ? next : nr;
		next = before;
	}
	return first; /* each waits for another: not what a kernel tells */
}

/* An mremap to a given place unmaps what is there first, and reports that before the move (mm/mremap.c, mremap_to). */
static size_t or_what_clears_its_place(const struct lp_change *changes, size_t next)
{
	for (size_t i = next; i-- && changes[next].kind == LP_REMAPPED;)
		if (changes[i].kind == LP_UNMAPPED && changes[i].start == changes[next].to)
			return i;
	return next;
}

size_t lp_space_next_change(const struct lp_space *s, const struct lp_change *changes, size_t nr, bool at_rest)
{
	size_t next;

	if (!at_rest)
		return nr && !must_wait(s, &changes[0]) ? 0 : nr;
	/* what could be made when only so much had been told */
	for (size_t told = 1; told <= nr; told++) {
		next = next_so_far(s, changes, told, nr, false);
		if (next < told)
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

void lp_space_count(const struct lp_space *s, struct lp_counts *counts)
{
	for (size_t i = 0; i < s->image->nr; i++)
		*counter(counts, s->image->slots[i].source) +=
			count_bits(s->pending, s->image->slots[i].dense, slot_pages(s->image, i));
}
