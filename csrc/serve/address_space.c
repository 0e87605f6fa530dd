#include "space_inner.h"

#include <errno.h>
#include <stdlib.h>
#include <string.h>

/* Page aligned, not empty, sorted, disjoint, below what has no address at dump time. */
static bool are_ranges(const struct lp_range *ranges, size_t nr)
{
	uint64_t end = 0;

	for (size_t i = 0; i < nr; i++) {
		if (ranges[i].start < end || ranges[i].start >= ranges[i].end || ranges[i].end > LP_NO_DUMP_ADDR ||
		    (ranges[i].start | ranges[i].end) % LP_PAGE_SIZE)
			return false;
		end = ranges[i].end;
	}
	return true;
}

/* Pages of extents outside of all VMAs have nowhere to go; that is the caller's error. */
static bool all_in_vmas(const struct lp_extents *extents, const struct lp_range *vmas, size_t nr_vmas)
{
	size_t v = 0;

	for (size_t i = 0; i < extents->nr; i++) {
		uint64_t at = extents->slots[i].start, end = lp_slot_end(extents, i);

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
	s->extents = lp_extents_new(extents, nr_extents);
	if (!s->extents)
		goto fail;
	errno = EINVAL;
	if (!are_ranges(vmas, nr_vmas) || !are_ranges(wiped, nr_wiped) || !all_in_vmas(s->extents, vmas, nr_vmas))
		goto fail;
	s->cap_regions = nr_vmas + 8;
	s->regions = malloc(s->cap_regions * sizeof(*s->regions));
	s->pending = calloc(lp_nr_words(s->extents) + 1, sizeof(lp_word));
	s->claimed = calloc(lp_nr_words(s->extents) + 1, sizeof(lp_word));
	s->lost = calloc(lp_nr_words(s->extents) + 1, sizeof(lp_word));
	s->unknown = calloc(lp_nr_words(s->extents) + 1, sizeof(lp_word));
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
	lp_set_bits(s->pending, 0, s->extents->nr_pages);
	atomic_init(&s->nr_pending, s->extents->nr_pages);
	for (size_t i = 0; i < s->extents->nr; i++) {
		if (s->extents->slots[i].source != LP_SOURCE_LOST)
			continue;
		atomic_fetch_add(&s->nr_lost, lp_set_bits(s->lost, s->extents->slots[i].index, lp_slot_pages(s->extents, i)));
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
	lp_extents_put(s->extents);
	free(s->regions);
	free(s->by_dump_addr);
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

static lp_word *copy_bits(const struct lp_space *s, const lp_word *bits)
{
	size_t size = (lp_nr_words(s->extents) + 1) * sizeof(lp_word);
	lp_word *copy = malloc(size);

	if (copy)
		memcpy(copy, (const void *)bits, size);
	return copy;
}

struct lp_space *lp_space_copy(const struct lp_space *s)
{
	struct lp_space *c = calloc(1, sizeof(*c));

	if (!c)
		return NULL;
	c->extents = s->extents;
	atomic_fetch_add(&s->extents->refs, 1);
	c->cap_regions = s->nr_regions + s->nr_left + 8;
	c->nr_regions = s->nr_regions;
	c->regions = malloc(c->cap_regions * sizeof(*c->regions));
	c->pending = copy_bits(s, s->pending);
	c->claimed = calloc(lp_nr_words(s->extents) + 1, sizeof(lp_word));
	c->lost = copy_bits(s, s->lost);
	c->unknown = copy_bits(s, s->unknown);
	c->wiped = malloc((s->nr_wiped + 1) * sizeof(*c->wiped));
	if (!c->regions || !c->pending || !c->claimed || !c->lost || !c->unknown || !c->wiped ||
	    lp_reserve_doubts(c, s->nr_doubts)) {
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
		lp_drop_dumped(c, c->wiped[i].start, c->wiped[i].end, dropped);
	/* the event that this is unmapped is still to come, for the parent; none will for the child */
	for (size_t i = 0; i < s->nr_left; i++)
		lp_cut_empty(c, s->left[i].start, s->left[i].end);
	return c;
}
