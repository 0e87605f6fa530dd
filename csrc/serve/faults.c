#define _GNU_SOURCE
#include "faults.h"

#include <stdlib.h>
#include <string.h>

#define SHIFT 12 /* pages */
#define MIN_CAP 64

static struct lp_fault *number(const struct lp_faults *f, uint64_t n)
{
	return &f->ring[n & (f->cap - 1)];
}

struct lp_fault *lp_faults_at(const struct lp_faults *f, size_t n)
{
	return number(f, f->first + n);
}

/* Where the page is looked for first (multiplicative hashing). */
static size_t home(const struct lp_faults *f, uint64_t addr)
{
	return (size_t)((addr >> SHIFT) * 0x9e3779b97f4a7c15u >> 32) & (2 * f->cap - 1);
}

static size_t after(const struct lp_faults *f, size_t slot)
{
	return (slot + 1) & (2 * f->cap - 1);
}

/* Its slot, or the free one where it belongs. */
static size_t find(const struct lp_faults *f, uint64_t addr)
{
	size_t slot = home(f, addr);

	while (f->pages[slot] && number(f, f->pages[slot] - 1)->addr != addr)
		slot = after(f, slot);
	return slot;
}

static bool grow(struct lp_faults *f)
{
	struct lp_faults larger = {.cap = f->cap ? 2 * f->cap : MIN_CAP};

	larger.ring = malloc(larger.cap * sizeof(*larger.ring));
	larger.pages = calloc(2 * larger.cap, sizeof(*larger.pages));
	if (!larger.ring || !larger.pages) {
		lp_faults_free(&larger);
		return false;
	}
	for (size_t n = 0; n < f->nr; n++) {
		larger.ring[n] = *lp_faults_at(f, n);
		larger.pages[find(&larger, larger.ring[n].addr)] = n + 1;
	}
	larger.nr = f->nr;
	lp_faults_free(f);
	*f = larger;
	return true;
}

void lp_faults_free(struct lp_faults *f)
{
	free(f->ring);
	free(f->pages);
	*f = (struct lp_faults){0};
}

bool lp_faults_reserve(struct lp_faults *f, size_t nr)
{
	while (f->cap - f->nr < nr)
		if (!grow(f))
			return false;
	return true;
}

bool lp_faults_push(struct lp_faults *f, struct lp_fault fault)
{
	size_t slot;

	if (f->nr == f->cap && !grow(f))
		return false;
	slot = find(f, fault.addr);
	if (f->pages[slot]) {
		number(f, f->pages[slot] - 1)->times += fault.times;
		return true;
	}
	f->pages[slot] = f->first + f->nr + 1;
	*lp_faults_at(f, f->nr++) = fault;
	return true;
}

static int compare(const void *a, const void *b, void *from)
{
	uint64_t x = ((const struct lp_fault *)a)->addr - *(const uint64_t *)from;
	uint64_t y = ((const struct lp_fault *)b)->addr - *(const uint64_t *)from;

	return x < y ? -1 : x > y;
}

void lp_faults_sort(struct lp_faults *f, uint64_t from)
{
	size_t begin = (size_t)(f->first & (f->cap - 1)), whole = f->cap - begin;

	if (f->nr < 2)
		return;
	/* all together: the part that goes round follows the other one, whatever lies between is free */
	if (f->nr > whole)
		memmove(f->ring + f->nr - whole, f->ring + begin, whole * sizeof(*f->ring));
	else
		memmove(f->ring, f->ring + begin, f->nr * sizeof(*f->ring));
	qsort_r(f->ring, f->nr, sizeof(*f->ring), compare, &from);
	f->first = 0;
	memset(f->pages, 0, 2 * f->cap * sizeof(*f->pages));
	for (size_t n = 0; n < f->nr; n++)
		f->pages[find(f, f->ring[n].addr)] = n + 1;
}

struct lp_fault lp_faults_pop(struct lp_faults *f)
{
	struct lp_fault fault = *lp_faults_at(f, 0);
	size_t free_slot = find(f, fault.addr), slot;

	/* Those behind it that were moved on by it move back, so that no look-up ends at a gap. */
	for (slot = after(f, free_slot); f->pages[slot]; slot = after(f, slot)) {
		size_t wanted = home(f, number(f, f->pages[slot] - 1)->addr);

		if (((slot - wanted) & (2 * f->cap - 1)) < ((slot - free_slot) & (2 * f->cap - 1)))
			continue;
		f->pages[free_slot] = f->pages[slot];
		free_slot = slot;
	}
	f->pages[free_slot] = 0;
	f->first++;
	f->nr--;
	return fault;
}
